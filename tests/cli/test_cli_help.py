"""What a newcomer meets first: help by subject, examples that run as printed, the version, tables in any window."""

import io
import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from helpers import Run
from rich.console import Console

import hf_mcsmoe
from hf_mcsmoe import cli
from hf_mcsmoe.cli.display import cost_table, layers_table, quality_table
from hf_mcsmoe.cli.evaluate import figure_table
from hf_mcsmoe.record import Costs, Quality, Stored

PANELS = {
    "inspect": {"Merge", "Data", "Loading"},
    "plan": {"Size", "Merge", "Storage", "Run", "Data", "Loading", "Output"},
    "calibrate": {"Data", "Methods", "Loading", "Output"},
    "compare": {"Data", "Methods", "Loading", "Output"},
    "compress": {"Data", "Size", "Merge", "Repair", "Storage", "Loading", "Output", "Streaming", "Plain"},
    "distill": {"Data", "Training", "Merge", "Storage", "Loading", "Output"},
    "export": {"Plain", "Data", "Loading", "Output"},
    "evaluate": {"Data", "Loading", "Output"},
    "report": {"Data", "Output"},
    "methods": {"Output"},
    "demo": {"Merge", "Output"},
}


def _help(command: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 80)
    code, out, _ = run(command, "--help")
    assert code == 0
    return out


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_ends_with_an_example_that_fits_a_line(command: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _example(command, run, monkeypatch)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_what_a_recipe_turns_on_can_be_turned_off(command: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 160)
    flags = [line.split()[1:3] for line in run(command, "--help")[1].splitlines() if "<bool>" in line]
    assert flags.pop(0)[0] == "--help"
    assert [off for _, off in flags] == [f"--no-{on[2:]}" for on, _ in flags]
    assert bool(flags) == (command not in ("report", "methods"))


@pytest.mark.parametrize("command", PANELS)
def test_options_stand_under_their_subject(command: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    out = _help(command, run, monkeypatch)
    panels = dict(re.findall(r"^╭─ (\w+) ─(.*?)^╰", out, re.MULTILINE | re.DOTALL))
    assert set(panels) - {"Arguments", "Options"} == PANELS[command]
    assert re.findall(r"^│ +(--[\w-]+)", panels["Options"], re.MULTILINE) == ["--config", "--help"]


def _example(command: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the command lines with which the help of a command ends."""
    out = _help(command, run, monkeypatch)
    lines = [line.strip() for line in out.partition("Example")[2].splitlines()[1:] if line.strip()]
    assert 1 <= len(lines) <= 2
    assert max(map(len, lines)) <= 78
    assert lines[-1].startswith(f"hf-mcsmoe {command} ")
    return lines


def test_the_example_of_inspect_runs_as_it_is_printed(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for line in _example("inspect", run, monkeypatch):
        code, out, err = run(*shlex.split(line)[1:])
        assert code == 0, (line, err)
    assert "with --experts 0.5: parameters" in out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The repair left", "ignore:Few calibration tokens")
def test_the_example_of_each_command_runs_as_it_is_printed(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done: list[str] = []
    for command in ["demo", *(name for name in cli.COMMANDS if name != "demo")]:
        for line in (line for line in _example(command, run, monkeypatch) if line not in done):
            code, _, err = run(*shlex.split(line)[1:])
            assert code == 0, (line, err)
            done.append(line)
    assert len(done) == len(cli.COMMANDS)
    told = yaml.safe_load((tmp_path / "demo" / "small" / "mcsmoe_recipe.yaml").read_text())
    assert (told["model"], told["data"], told["experts"]) == ("model", ["calibration.jsonl"], 0.5)


def test_the_version_is_told(run: Run) -> None:
    code, out, _ = run("--version")
    assert (code, out.strip()) == (0, f"hf-mcsmoe {version('hf_mcsmoe')}")
    assert hf_mcsmoe.__version__ == version("hf_mcsmoe")
    command = [sys.executable, "-W", "ignore", "-m", "hf_mcsmoe", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == out


LAYER = "model.language_model.decoder.layers.17.feed_forward.experts"
BITS = {"gate_up_proj": 4, "down_proj": 3.5}
LAYERS = {LAYER: Stored(128, 64, "prune", {"gate_up_proj": 48, "down_proj": 48}, BITS, 1234567)}
TABLES = {
    "layers": (lambda: layers_table(LAYERS), ["128", "64", "48", "4 / 3.5", "1,234,567"]),
    "costs": (
        lambda: cost_table(
            {name: Costs(30532122624, 61064245248, 61066575656) for name in ("before", "merged", "last")}
        ),
        ["30,532,122,624", "61,064,245,248", "61,066,575,656"],
    ),
    "quality": (
        lambda: quality_table(
            {name: Quality(12.3456, 0.00123456) for name in ("original", "merged", "repaired", "low rank")}
        ),
        ["12.35", "0.001235"],
    ),
    "figures": (
        lambda: figure_table(
            {"some/name-of-a-model-7b": {"loss": 2.34567, "perplexity": 10.4, "parameters": 30532122624}}
        ),
        ["2.346", "10.400", "30,532,122,624"],
    ),
}


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("name", TABLES)
def test_tables_keep_their_figures_in_any_window(name: str, width: int) -> None:
    make, figures = TABLES[name]
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(make())
    text = console.export_text()
    assert all(figure in text for figure in figures), text
    assert max(map(len, text.splitlines())) <= width
