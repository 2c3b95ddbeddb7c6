"""Bars: a stage for each long work, on standard error, gone at the end; results alone on standard output."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from families import build
from helpers import Run
from transformers import PreTrainedTokenizerFast

from hf_mcsmoe.cli.display import Stages

Told = list[tuple[str, int, int | None]]
COMPRESS = {
    "reading": 40,
    "loading": 1,
    "tokenising": 24,
    "checking": 1,
    "statistics": 3,
    "planning": 1,
    "costs": 3,
    "measuring": 4,
    "merge": 4,
    "repair": 4,
    "low rank": 32,
    "saving": 1,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("progress")
    build("mixtral").save_pretrained(path / "mixtral")
    for name, rows in (("some", range(30)), ("more", range(30, 40))):
        (path / f"{name}.txt").write_text("\n".join(f"what is {n // 10} {n % 10} {n % 7}" for n in rows))
    return path


@pytest.fixture
def source(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    tokenizer.save_pretrained(folder / "mixtral")
    return folder / "mixtral"


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    """What the commands tell of their stages."""
    calls: Told = []
    show = Stages.__call__

    def recorded(self: Stages, stage: str, done: int, total: int | None) -> None:
        calls.append((stage, done, total))
        show(self, stage, done, total)

    monkeypatch.setattr(Stages, "__call__", recorded)
    return calls


def compressing(source: Path, output: Path) -> list[object]:
    """Return a command line in which every stage has work."""
    texts = ["--data", source.parent / "some.txt", "--data", source.parent / "more.txt", "--num-samples", 24]
    return ["compress", source, *texts, "--experts", 4, "--rank", 2, "--keep", 0.25, "--output", output]


def ends_of(calls: Told) -> dict[str, int | None]:
    """Return the stages in their order with their totals, after a look at every step of them."""
    for stage in {stage for stage, _, _ in calls}:
        done = [number for name, number, _ in calls if name == stage]
        totals = [total for name, _, total in calls if name == stage]
        assert done == sorted(done), stage
        assert all(total is None or number <= total for number, total in zip(done, totals, strict=True)), stage
        assert done[-1] == totals[-1], stage
        assert len({total for total in totals if total is not None}) == 1, "a total that is told is right"
    return {stage: total for stage, _, total in calls}


@pytest.mark.filterwarnings("ignore:The repair left", "ignore:Few calibration tokens")
def test_each_stage_counts_up_to_its_total(source: Path, tmp_path: Path, run: Run, told: Told) -> None:
    code, out, err = run(*compressing(source, tmp_path / "small"))
    assert code == 0, err
    assert ends_of(told) == COMPRESS
    assert list(ends_of(told)) == list(COMPRESS), "in this order"
    assert not [stage for stage in COMPRESS if re.search(rf"^{stage} ", out + err, re.MULTILINE)], "no terminal"
    for part in ("calibration on", "━"):
        assert part not in out
    told.clear()
    assert run(*compressing(source, tmp_path / "merged")[:-6], "--output", tmp_path / "merged")[0] == 0
    told.clear()
    taught = [tmp_path / "merged", "--teacher", source, "--data", source.parent / "some.txt", "--max-steps", 1]
    code, out, err = run("distill", *taught, "--rank", 2, "--start", 0, "--end", 0, "--output", tmp_path / "tuned")
    assert code == 0, err
    expected = {"reading": 30, "tokenising": 1, "loading": 2, "costs": 2, "low rank": 32, "saving": 1}
    assert list(ends_of(told).items()) == list(expected.items())
    assert "step 1/1" in err
    assert "step" not in out
    told.clear()
    code, _, err = run("evaluate", source, tmp_path / "tuned", "--data", source.parent / "more.txt")
    assert code == 0, err
    assert [call for call in told if call[1:] == (1, 1)] == [("loading", 1, 1)] * 2
    assert ends_of([call for call in told if call[0] != "loading"]) == {"reading": 10, "tokenising": 2}


def seen_on_a_terminal(command: list[str]) -> tuple[str, str]:
    """Run a command whose standard error is a terminal; return what it printed and what was shown there."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=environment, text=True) as process:
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 65536):
                shown += part
        except OSError:  # the other side is closed
            pass
        assert process.stdout is not None
        out = process.stdout.read()
    os.close(ours)
    assert process.returncode == 0, shown.decode()
    return out, shown.decode()


def left_on_screen(shown: str) -> list[str]:
    """Return the lines that a terminal holds in the end, as far as the sequences go that bars are drawn with."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[\??[\d;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", shown):
        if part == "\r":
            column = 0
        elif part == "\n":
            row, column = row + 1, 0
            lines += [""] * (row == len(lines))
        elif part == "\x1b[2K":
            lines[row] = ""
        elif up := re.fullmatch(r"\x1b\[(\d+)A", part):
            row -= int(up[1])
        elif not part.startswith("\x1b"):
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in lines if line.strip()]


@pytest.mark.slow
def test_bars_are_shown_on_a_terminal_and_vanish(source: Path, tmp_path: Path) -> None:
    assert left_on_screen("kept\na\nb\r\x1b[2K\x1b[1A\x1b[2Kc") == ["kept", "c"]
    arguments = map(str, compressing(source, tmp_path / "small"))
    out, shown = seen_on_a_terminal([sys.executable, "-W", "ignore", "-m", "hf_mcsmoe", *arguments])
    for stage, total in COMPRESS.items():
        assert re.search(rf"{stage} +(\x1b\[[\d;]*m)*━.*{total}/{total}", shown), stage
    left = left_on_screen(shown)
    assert not [line for line in left if "━" in line]
    assert any("calibration on 24 samples" in line for line in left)
    assert "bytes on disk" in out
    assert "written after" in out
    assert not re.search("━|\x1b|calibration on", out)
