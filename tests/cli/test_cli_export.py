"""`hf-mcsmoe export`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from helpers import Run
from merged import merge, tokenizer
from safetensors.torch import load_file
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
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(" ".join(f"w{40 + (i * j) % 80}" for j in range(12)) for i in range(32)))
    options = ["--for", "vllm,llama.cpp", "--data", text, "--check-data", other, "--router-steps", 2]
    options += ["--device-map", "cpu", "--dtype", "bfloat16"]
    code, out, err = run("export", folder, "--output", tmp_path / "plain", *options)
    assert code == 0, err
    assert "plain, router distilled" in out
    assert "KL to the merged model" in out
    assert "the same, other text" in out
    assert "KL to the original" not in out
    assert "Mixtral" in err
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert (config["model_type"], config["num_local_experts"]) == ("mixtral", 4)
    assert not list((tmp_path / "plain").glob("*.py"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", trust_remote_code=False)
    assert plain.dtype == torch.bfloat16
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
        (["--mxfp4", "--data", "none.txt"], "MXFP4"),
        (["--device-map", "nowhere"], "no device of torch"),
        (["--device-map", "cpu"], "--device-map cpu is where a router is fitted"),
        (["--dtype", "int3"], "no floating-point dtype"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_any_work(
    options: list[str], message: str, folder: Path, tmp_path: Path, run: Run
) -> None:
    code, _, err = run("export", folder, "--output", tmp_path / "plain", *options)
    assert code == 1
    assert message in " ".join(err.split())


def test_a_folder_in_use_is_kept(folder: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    code, _, err = run("export", folder, "--output", tmp_path)
    assert code == 1
    assert "exists and is not empty" in err


def test_compress_writes_a_plain_checkpoint_of_a_family_whose_router_picks_among_groups(
    tmp_path: Path, run: Run
) -> None:
    build("deepseek_v3").save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(" ".join(f"w{48 + (5 * i + j) % 80}" for j in range(24)) for i in range(48)))
    options = ["--data", text, "--experts", 6, "--plain", "--for", "vllm", "--router-steps", 1, "--repair", "none"]
    code, _, err = run("compress", tmp_path / "base", "--output", tmp_path / "plain", *options)
    assert code == 0, err
    assert "as a plain checkpoint needs" in err
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["n_routed_experts"] == 6
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not any(info.values()), info
    layers = json.loads((tmp_path / "plain" / "mcsmoe_plan.json").read_text())["layers"]
    for layer in layers.values():  # of eight experts four are of each of the router's groups
        assert all((expert < 4) == (layer["dominant"][group] < 4) for expert, group in enumerate(layer["expert_map"]))
        assert sum(expert < 4 for expert in layer["dominant"]) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "is_told"),
    [
        (["--reduce", "prune", "--repair", "refit"], False),
        (["--bits", 4, "--group-size", 8, "--reduce", "prune"], False),
        (["--expand", "--repair", "none"], False),
        (["--repair", "none", "--for", "vllm"], True),
    ],
)
def test_compress_writes_a_plain_checkpoint_block_by_block(
    options: list[Any], is_told: bool, tmp_path: Path, run: Run
) -> None:
    build("mixtral").save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(" ".join(f"w{48 + (5 * i + j) % 80}" for j in range(24)) for i in range(48)))
    weights = {}
    for name, way in (("loaded", "--no-stream"), ("streamed", "--stream")):
        place = tmp_path / name / "plain"
        given = ["--data", text, "--experts", 4, "--plain", way, "--output", place, *options]
        code, _, err = run("compress", tmp_path / "base", *given)
        assert code == 0, err
        assert ("the router's rows are combined and not fitted" in " ".join(err.split())) == (
            is_told and name == "streamed"
        )
        assert [path.name for path in place.parent.iterdir()] == ["plain"]
        files = {file.name: file for file in place.iterdir()}
        found = {key: value for file in place.glob("*.safetensors") for key, value in load_file(file).items()}
        weights[name] = found, files.keys(), json.loads(files["config.json"].read_text())
    (one, *others), (two, *same) = weights["loaded"], weights["streamed"]
    assert others == same
    unlike = {key for key, value in one.items() if not torch.equal(value, two[key])}
    assert one.keys() == two.keys()
    assert bool(unlike) == is_told
    assert all("gate.weight" in key for key in unlike), "all but routers is the same"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--experts", 0.5, "--for", "vllm"], "are about --plain"),
        (["--experts", 0.5, "--plain", "--rank", 4], "as low rank + sparse, which no model of the family's own class"),
        (["--experts", 0.5, "--plain", "--bits", 3, "--group-size", 8, "--for", "vllm"], "does not read experts in 3"),
        (["--experts", 0.5, "--plain", "--bits", 4, "--group-size", 8, "--for", "mlx"], "Leave that engine out"),
        (["--experts", 0.5, "--plain", "--bits", 4], "Quantize with bits=4 and group_size=8"),
        (["--experts", 0.5, "--plain", "--expand", "--reduce", "prune"], "leave expand out"),
        (["--experts", 0.5, "--plain", "--budget", "measured"], "choose budget='uniform'"),
        (["--size", 0.5, "--plain", "--bits", 3, "--for", "vllm"], "does not read experts in 3 bits"),
        (["--size", 0.5, "--plain", "--rank", 4], "stores experts as no model of the family's class does"),
        (["--size", 0.5, "--plain", "--mxfp4"], "MXFP4 is how gpt-oss stores its experts"),
        (["--size", 0.5, "--plain", "--router-rows", "logsumexp"], "has no bias to hold it"),
        (["--size", 0.5, "--plain", "--skip", "*.0.*"], "leaves layers as they are"),
        (["--size", 0.5, "--plain", "--expand", "--reduce", "prune"], "Choose reduce='merge'"),
        (["--experts", 0.5, "--plain", "--stream", "--router-steps", 0], "--router-steps 0 fits the router"),
        (["--experts", 0.5, "--plain", "--stream", "--router-steps", 5], "--router-steps 5 fits the router"),
        (["--experts", 0.5, "--plain", "--mxfp4"], "MXFP4 is how gpt-oss stores its experts"),
        (["--experts", 0.5, "--plain", "--router-rows", "logsumexp"], "has no bias to hold it"),
        (["--experts", 0.5, "--plain", "--skip", "*.0.*"], "a plain checkpoint cannot hold"),
    ],
)
def test_a_plain_result_that_cannot_be_is_refused_before_any_work(
    options: list[str], message: str, tmp_path: Path, run: Run
) -> None:
    build("mixtral").save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "text.txt").write_text("w50 w51 w52\n")
    code, _, err = run(
        *("compress", tmp_path / "base", "--output", tmp_path / "plain", "--data", tmp_path / "text.txt"), *options
    )
    assert code == 1
    assert message in " ".join(err.split())
