"""`--preset` on the command line and in recipes, and the list of presets and methods."""

import json
from pathlib import Path

import pytest
import yaml
from families import build
from helpers import Run
from transformers import PreTrainedTokenizerFast

from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.methods.config import REGISTRIES, MergeConfig
from hf_mcsmoe.presets import PRESETS, TRAINED


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preset")
    build("mixtral").save_pretrained(folder / "moe")
    (folder / "text.txt").write_text("\n".join(f"what is {n} {m}" for n in range(6) for m in range(8)))
    return folder


def _compress(run: Run, source: Path, output: Path, *options: object) -> tuple[int, str]:
    given = ["--data", source / "text.txt", "--num-samples", "40", "--max-length", "8", "--output", output]
    code, _, err = run("compress", source / "moe", *given, *options)
    return code, err


@pytest.mark.filterwarnings("ignore:Few calibration tokens")
def test_a_preset_is_taken_from_the_command_line_to_the_recipe(
    source: Path, tmp_path: Path, run: Run, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer.save_pretrained(source / "moe")
    code, err = _compress(run, source, tmp_path / "out", "--preset", "reap", "--experts", "4", "--budget", "adaptive")
    assert code == 0, err
    plan = json.loads((tmp_path / "out" / "mcsmoe_plan.json").read_text())
    expected = {"reduce": "prune", "saliency": "reap", "budget": "adaptive"}
    assert {key: plan["config"][key] for key in expected} == expected
    recipe = yaml.safe_load((tmp_path / "out" / "mcsmoe_recipe.yaml").read_text())
    assert (recipe["preset"], recipe["repair"]) == ("reap", "none")


REAP, AVERAGE = ("prune", "uniform", "saliency"), ("merge", "adaptive", "uniform")
ORDERS = [  # arguments, what comes of them: reduce, budget, weighting; {} is a recipe of reap with another saliency
    (["--config", "{}"], REAP),
    (["--config", "{}", "--preset", "average", "--reduce", "merge"], AVERAGE),
    (["--preset", "average", "--reduce", "merge", "--config", "{}"], AVERAGE),
    (["--config", "{}", "--budget", "adaptive"], ("prune", "adaptive", "saliency")),
]


@pytest.mark.parametrize(("arguments", "expected"), ORDERS)
def test_what_is_typed_comes_before_what_a_recipe_says(
    arguments: list[str],
    expected: tuple[str, str, str],
    source: Path,
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file, seen = tmp_path / "own.yaml", []
    file.write_text("preset: reap\nexperts: 4\nsaliency: gate\n")

    def see(layers: Layers, config: MergeConfig, **stages: object) -> None:
        seen.append(config)
        raise ValueError("seen")

    monkeypatch.setattr("hf_mcsmoe.cli.compress.check_options", see)
    assert _compress(run, source, tmp_path / "out", *(text.format(file) for text in arguments))[0] == 1
    (config,) = seen
    assert (config.reduce, config.budget, config.weighting) == expected
    assert config.saliency == ("frequency" if expected == AVERAGE else "gate")


REFUSED = [
    (["--preset", "reep", "--experts", "0.5"], "Unknown preset 'reep'. Did you mean 'reap'?"),
    (["--preset", "reap"], "give --experts as well"),
    (["--preset", "reap", "--size", "0.5"], "give --experts as well"),
]


@pytest.mark.parametrize(("options", "said"), REFUSED)
def test_what_is_no_preset_costs_one_sentence(
    options: list[str], said: str, source: Path, tmp_path: Path, run: Run
) -> None:
    code, err = _compress(run, source, tmp_path / "out", *options)
    assert code == 1
    assert said in " ".join(err.split())
    assert not (tmp_path / "out").exists()


def test_methods_lists_all_that_there_is(run: Run, tmp_path: Path) -> None:
    code, out, err = run("methods", "--json", tmp_path / "methods.json")
    assert code == 0, err
    found = json.loads((tmp_path / "methods.json").read_text())
    assert [row["name"] for row in found["presets"]] == [*PRESETS, *TRAINED]
    for stage, registry in REGISTRIES.items():
        assert [row["name"] for row in found[stage]] == list(registry)
        assert all(row["text"].endswith((".", ":")) or len(row["text"]) > 20 for row in found[stage])
    costs = {row["name"]: row["cost"] for row in found["saliency"]}
    assert costs["frequency"] == "forward"
    assert costs["taylor"] == "gradients"
    assert costs["reap"] == "products"
    assert costs["router_norm_change"] == "reference"
    assert {row["name"]: row["cost"] for row in found["similarity"]}["random"] == "nothing"
    assert {row["name"]: row["cost"] for row in found["merging"]}["zipit"] == "sample"
    assert all(name in out for name in (*PRESETS, *REGISTRIES, "2510.13999"))
