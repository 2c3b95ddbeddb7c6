"""`hf-mcsmoe compare`: the table, the folder, what is refused before weights are loaded, and a run that is killed."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from copa import rows, write_folder
from families import build
from helpers import Run
from transformers import PreTrainedTokenizerFast

from hf_mcsmoe.data.tasks import get_task
from hf_mcsmoe.evaluation.quality import evaluate_task
from hf_mcsmoe.layers.folder import Folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compare")


@pytest.fixture
def source(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    if not (folder / "moe").exists():
        build("mixtral").save_pretrained(folder / "moe")
        tokenizer.save_pretrained(folder / "moe")
        for name, word in (("text.txt", "what"), ("held.txt", "is"), ("other.txt", "it")):
            (folder / name).write_text("\n".join(f"{word} is {n} {m} {n}" for n in range(6) for m in range(8)))
        (folder / "empty.txt").write_text("\n\n")
    return folder


def _given(source: Path, output: Path) -> list[Any]:
    texts = ["--data", source / "text.txt", "--eval", source / "held.txt", "--check-data", source / "other.txt"]
    return [source / "moe", *texts, "--num-samples", 24, "--eval-samples", 8, "--max-length", 8, "--output", output]


def test_a_comparison_is_a_table_and_a_folder_that_goes_on(source: Path, tmp_path: Path, run: Run) -> None:
    methods = ["--methods", "msmoe,reap:budget=adaptive"]
    code, out, err = run("compare", *_given(source, tmp_path / "out"), *methods, "--experts", "0.5", "--seeds", 2)
    assert code == 0, err
    rows = [line.split() for line in out.splitlines()]
    assert ["method", "level", "size", "KL,", "held.txt", "KL,", "other.txt", "seconds"] in rows
    assert {row[0] for row in rows if len(row) > 5} >= {"original", "msmoe", "reap:budget=adaptive"}
    told = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [(cell["method"], cell["seed"]) for cell in told["cells"][1:]] == [
        (name, seed) for seed in (0, 1) for name in ("msmoe", "reap:budget=adaptive")
    ]
    assert set(told["cells"][1]["texts"]) == {"held.txt", "other.txt"}
    code, _, err = run("compare", *_given(source, tmp_path / "out"), *methods, "--experts", "0.5", "--seeds", 2)
    assert code == 0, err
    assert json.loads((tmp_path / "out" / "compare.json").read_text()) == told
    code, _, err = run("compare", *_given(source, tmp_path / "out"), *methods, "--experts", "0.5", "--max-length", 3)
    assert code == 1
    assert "holds a comparison with another" in err
    assert "--overwrite" in err


@pytest.mark.slow
def test_block_by_block_the_figures_are_the_same(source: Path, tmp_path: Path, run: Run) -> None:
    write_folder(source / "copa")
    told, task = {}, ["--task", "copa", "--data-dir", source / "copa" / "evaluation.jsonl"]
    for name, more in (("loaded", task), ("streamed", [*task, "--stream"])):
        given = [*_given(source, tmp_path / name), "--methods", "reap", "--experts", "0.5", *more]
        code, _, err = run("compare", *given)
        assert code == 0, err
        cells = json.loads((tmp_path / name / "compare.json").read_text())["cells"]
        told[name] = [(cell["method"], cell["bytes"], cell.get("metrics"), cell["texts"]) for cell in cells]
    for ours, theirs in zip(told["streamed"], told["loaded"], strict=True):
        assert ours[:3] == theirs[:3]
        assert [text["kl"] for text in ours[3].values()] == pytest.approx([text["kl"] for text in theirs[3].values()])
    assert "copa accuracy" in told["streamed"][1][2]


def test_block_by_block_no_model_with_an_encoder_writes_answers(source: Path, tmp_path: Path, run: Run) -> None:
    build("switch_transformers").save_pretrained(tmp_path / "encoder")
    given = [tmp_path / "encoder", *_given(source, tmp_path / "task")[1:]]
    code, _, err = run("compare", *given, "--stream", "--task", "copa")
    assert (code, "has the model write, for which it is loaded" in " ".join(err.split())) == (1, True)
    with pytest.raises(ValueError, match="token by token, for which all of it is loaded"):
        evaluate_task(Folder(tmp_path / "encoder"), None, get_task("copa"), rows(1))  # type: ignore[arg-type]


def test_what_cannot_be_compared_is_refused_before_weights_are_loaded(
    source: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_mcsmoe.cli.compare.load_model", lambda *a, **k: pytest.fail("weights were loaded"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    half = ["--experts", "0.5"]
    cases = [
        ([*half, "--methods", "reep"], "Unknown method 'reep'. Did you mean 'reap'?"),
        ([*half, "--methods", "reap:budget=unifrom"], "Did you mean 'uniform'?"),
        (["--experts", ""], "There is nothing to compare at"),
        (["--experts", "1", "--methods", "reap"], "No method can be tried on this model. reap at experts 1"),
        (["--sizes", "0.001", "--methods", "msmoe"], "the fewest experts take"),
        (["--experts", "half"], "'half' is neither a whole number"),
        ([*half, "--bits", "5"], "--bits 5 must be one of"),
        ([*half, "--check-data", source / "text.txt"], "is --data as well"),
        ([*half, "--eval", source / "text.txt"], "is --data as well"),
        ([*half, "--eval", source / ".." / source.name / "text.txt"], "is --data as well"),
        ([*half, "--base-model", source / "moe", "--methods", "msmoe"], "none of these reads it"),
        ([*half, "--eval", source / "missing.txt"], "There is no file"),
        ([*half, "--eval", source / "empty.txt"], "holds no text"),
        ([*half, "--output", tmp_path / "mine"], "holds no comparison"),
        ([*half, "--output", source / "moe"], "is the folder of the model"),
        ([*half, "--scores", tmp_path / "none"], "is no file: write it with `hf-mcsmoe calibrate"),
        ([*half, "--scores", tmp_path / "none", "--seeds", 2], "is of one draw"),
        ([*half, "--task", "sst2", "--data-dir", source / "missing"], "missing"),
    ]
    for options, message in cases:
        code, _, err = run("compare", *_given(source, tmp_path / "out"), *options)
        assert code == 1, options
        assert message in err
        assert err.count("Error:") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_run_that_is_killed_loses_no_finished_cell(source: Path, tmp_path: Path, run: Run) -> None:
    output = tmp_path / "out"
    options = ["--methods", "msmoe,average,reap,frequency-prune", "--experts", "0.75,0.5,0.25"]
    command = [sys.executable, "-W", "ignore", "-m", "hf_mcsmoe", "compare", *_given(source, output), *options]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    file, deadline = output / "cells.jsonl", time.time() + 120
    while time.time() < deadline and not (file.exists() and file.read_text().count("\n") >= 4):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = file.read_text().rpartition("\n")[0].splitlines()[1:]
    assert 3 <= len(kept) < 13
    code, _, err = run("compare", *_given(source, output), *options)
    assert code == 0, err
    lines = file.read_text().splitlines()[1:]
    assert lines[: len(kept)] == kept
    assert len(lines) == 13
