"""`hf-mcsmoe export`."""

import json
from pathlib import Path

import pytest
from families import build
from helpers import Run
from merged import merge, tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_mcsmoe import MergeConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a model that was merged to one number of experts, and its tokenizer."""
    path = tmp_path_factory.mktemp("merged")
    _, merged = merge(build("mixtral"), "mixtral", MergeConfig(experts=0.5, budget="uniform"))
    merged.save_pretrained(path, tokenizer=tokenizer())
    return path


def test_a_folder_becomes_an_ordinary_checkpoint_with_what_lies_beside_it(
    folder: Path, tmp_path: Path, run: Run
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(" ".join(f"w{48 + (3 * i + j) % 80}" for j in range(12)) for i in range(32)))
    options = ["--for", "vllm,llama.cpp", "--data", text, "--router-steps", 2]
    code, out, err = run("export", folder, "--output", tmp_path / "plain", *options)
    assert code == 0, err
    assert "plain, router distilled" in out
    assert "Mixtral" in err
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert (config["model_type"], config["num_local_experts"]) == ("mixtral", 4)
    assert not list((tmp_path / "plain").glob("*.py"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "plain", trust_remote_code=False)
    assert AutoTokenizer.from_pretrained(tmp_path / "plain")("w60")["input_ids"] == [60]
    card = (tmp_path / "plain" / "README.md").read_text()
    assert "## Plain checkpoint" in card
    assert "trust_remote_code" not in card


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--for", "vlm"], "Unknown engine 'vlm'"),
        (["--router-rows", "median"], "none of frequency"),
        (["--base-model", "original"], "--base-model original is imitated on --data"),
        (["--check-data", "other.txt"], "judges what --data fitted"),
        (["--mxfp4"], "MXFP4"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_any_work(
    options: list[str], message: str, folder: Path, tmp_path: Path, run: Run
) -> None:
    code, _, err = run("export", folder, "--output", tmp_path / "plain", *options)
    assert code == 1
    assert message in err


def test_a_folder_in_use_is_kept(folder: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    code, _, err = run("export", folder, "--output", tmp_path)
    assert code == 1
    assert "exists and is not empty" in err
