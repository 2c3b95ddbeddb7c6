"""What `hf-mcsmoe demo` prints about its figures: what they are, their units, and what to do next."""

import re
import shlex
from pathlib import Path

import pytest
from helpers import Run

from hf_mcsmoe import cli, demo

NAMES = ["original", *demo.METHODS, *demo.REFINEMENTS, *demo.SMALL, demo.MIXTURE]
NUMBERS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch, run: Run) -> str:
    """What the command prints of figures that are made up."""
    rows = [
        demo.Result(name, 0.125 + place, 0.5 - place / 100, 1_000_000 + place, 4_000_000 + place, 12_345.6 + place)
        for place, name in enumerate(NAMES)
    ]
    monkeypatch.setattr(demo, "run", lambda experts, output: rows)
    code, out, err = run("demo")
    assert code == 0, err
    return out


def test_each_way_has_its_row_of_figures(printed: str) -> None:
    for place, name in enumerate(NAMES):
        cells = [f"{0.125 + place:.3f}", f"{50 - place:.1f}%", f"{1_000_000 + place:,}", f"{4_000_000 + place:,}"]
        assert re.search(" +".join(map(re.escape, [name, *cells, f"{12_345.6 + place:,.0f}"])), printed), name


def test_the_caption_tells_the_number_of_ways_and_what_each_figure_is(printed: str) -> None:
    head, caption = printed.splitlines()[0].split(), " ".join(printed.split())
    assert head == ["loss", "accuracy", "parameters", "bytes", "tokens/s"]
    assert f"made smaller in {len(NAMES) - 1} ways" in caption
    for words in ("loss: nats per letter", "accuracy: share of", "tokens/s: fastest of nine forwards"):
        assert words in caption
    assert f"in {NUMBERS[len(NAMES) - 1]} ways" in str(cli.COMMANDS["demo"].__doc__), "as the help says"


def test_the_next_step_that_it_names_can_be_taken(
    printed: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    steps = re.findall(r"hf-mcsmoe (\w+(?: --?\w+)+(?: demo\b)?)", printed.partition("Next:")[2])
    assert steps == ["demo --files demo", "compress --help"]
    assert all(run(*shlex.split(step))[0] == 0 for step in steps)
    assert {"model", "calibration.jsonl", "compress.yaml"} <= {path.name for path in (tmp_path / "demo").iterdir()}
    assert "experts: 0.5" in (tmp_path / "demo" / "compress.yaml").read_text()
    assert run("demo", "--files", "fewer", "--experts", "0.25")[0] == 0
    for command in ("compress", "compare"):
        assert "experts: 0.25" in (tmp_path / "fewer" / f"{command}.yaml").read_text()
