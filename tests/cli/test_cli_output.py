"""Where results go: refused before weights are loaded, kept from other runs, saved whatever becomes of the output."""

import errno
import fcntl
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from families import build
from helpers import Run, batches
from merged import example, tokenizer

from hf_mcsmoe import MergeConfig, cli, collect_statistics, plan_merge
from hf_mcsmoe.cli.streams import Tolerant
from hf_mcsmoe.layers.source import Folder
from hf_mcsmoe.merge import merge_to_folder
from hf_mcsmoe.modeling.folders_mcsmoe import work_place


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its merged form, and some text."""
    folder = tmp_path_factory.mktemp("models")
    build("mixtral").save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    example("mixtral").merged.save_pretrained(folder / "merged")
    tokenizer().save_pretrained(folder / "merged")
    (folder / "text.txt").write_text("w5 w6 w7 w8 w9 w10\n" * 20)
    return folder


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    for command in ("compress", "distill", "evaluate"):
        monkeypatch.setattr(f"hf_mcsmoe.cli.{command}.load_model", lambda *a, **k: pytest.fail("weights were loaded"))


def _compress(folder: Path, output: Path | str, *more: object) -> list[object]:
    data = ["--data", folder / "text.txt", "--max-length", 8, "--repair", "none", "--experts", "0.5"]
    return ["compress", folder / "model", *data, "--output", output, *more]


@pytest.mark.usefixtures("unloaded")
def test_a_second_run_to_one_output_is_refused_at_once(folder: Path, tmp_path: Path, run: Run) -> None:
    target, place = tmp_path / "out", work_place(tmp_path / "out")
    (tmp_path / "link").symlink_to(target)
    place.mkdir()
    distill = ["distill", folder / "merged", "--teacher", folder / "model", "--data", folder / "text.txt"]
    with (place / "lock").open("w") as held:  # as another process would
        fcntl.flock(held, fcntl.LOCK_EX)
        for arguments in (
            _compress(folder, target),
            _compress(folder, tmp_path / "link"),
            [*distill, "--output", target],
            ["demo", "--output", target],
        ):
            code, _, err = run(*arguments)
            assert code == 1
            assert f"Another run is writing to {target}" in err
            assert err.count("Error:") == 1


@pytest.mark.usefixtures("unloaded")
def test_a_path_that_cannot_be_written_is_refused(
    folder: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    evaluate = ["evaluate", folder / "model", "--data", folder / "text.txt", "--json"]
    cases: list[tuple[list[Any], str]] = [
        (_compress(folder, "loop"), "symbolic links"),
        (_compress(folder, tmp_path / "loop" / "out"), "symbolic links"),
        (_compress(folder, "out", "--scores", tmp_path), "--scores"),
        (_compress(folder, "out", "--scores", "loop"), "symbolic links"),
        ([*evaluate, tmp_path], "is a folder: name a file"),
        ([*evaluate, "loop"], "symbolic links"),
        ([*evaluate, "a" * 256], "File name too long"),
        ([*evaluate, tmp_path / "missing" / "file"], "its folder is missing or closed"),
    ]
    for arguments, message in cases:
        code, _, err = run(*arguments)
        assert code == 1
        assert message in err
        assert err.count("Error:") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["loop"]


def test_a_merge_into_its_own_source_is_refused(folder: Path, tmp_path: Path) -> None:
    source = Folder(folder / "model")
    model = build("mixtral")
    plan = plan_merge(model, collect_statistics(model, batches("mixtral", model, 1)), MergeConfig(experts=4))
    before = {file.name: file.read_bytes() for file in (folder / "model").iterdir()}
    (tmp_path / "link").symlink_to(folder / "model")
    for target in (folder / "model", folder / "model" / "inside", tmp_path / "link"):
        with pytest.raises(ValueError, match="the folder of the model, which is to stay as it is"):
            merge_to_folder(source, plan, target)
    assert {file.name: file.read_bytes() for file in (folder / "model").iterdir()} == before


def _main(arguments: list[Any], stream: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a command with `stream` as its standard output; returns the exit code."""
    with monkeypatch.context() as patched:
        patched.setattr("sys.argv", ["hf-mcsmoe", *map(str, arguments)])
        patched.setattr("sys.stdout", stream)
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    if stream is not None:
        stream.close()  # without an error: what it held went nowhere
    return int(stopped.value.code or 0)


def _left_reader() -> Any:
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w")


@pytest.mark.parametrize("kind", ["full", "left", "closed", "none"])
def test_a_result_is_saved_whatever_becomes_of_standard_output(
    kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stream() -> Any:
        if kind == "none":
            return None
        opened = _left_reader() if kind == "left" else open("/dev/full", "w")  # noqa: SIM115
        if kind == "closed":
            opened.close()
        return opened

    assert _main(_compress(folder, tmp_path / "out"), stream(), monkeypatch) == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()
    told = "could not be written" in capsys.readouterr().err
    assert told == (kind in ("full", "closed"))
    # Where what is printed is all that was asked for, its loss is one, but for a reader that has enough.
    assert _main(["inspect", folder / "model"], stream(), monkeypatch) == (kind in ("full", "closed"))


def test_a_stream_fails_once_and_is_quiet_from_then_on() -> None:
    class Full:
        encoding = "utf-8"
        written = 0

        def write(self, text: str) -> None:
            self.written += 1
            raise OSError(errno.ENOSPC, "full")

        def flush(self) -> None:
            self.written += 1

        def fileno(self) -> int:
            raise ValueError("none")

    stream = Tolerant(behind := Full())
    assert stream.write("text") == 4
    stream.write("more")
    stream.flush()
    assert behind.written == 1
    assert stream.error is not None
    assert stream.error.errno == errno.ENOSPC


def test_a_terminated_run_removes_what_it_was_writing(
    folder: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*arguments: Any, **keywords: Any) -> None:
        (work_place(tmp_path / "out") / "result").mkdir()
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("hf_mcsmoe.cli.compress.load_model", killed)
    assert run(*_compress(folder, tmp_path / "out"))[0] == 128 + signal.SIGTERM
    assert not any(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) == before
