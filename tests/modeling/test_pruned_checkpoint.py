"""Saved pruned models, in few bits as well: they load anywhere, and do what others of their families do."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import logits
from merged import Example, Reports, check_without_package
from pruned import pruned, save_pruned
from quantized import quantize_model

# One of each kind of router and of layout.
NAMES = ["mixtral", "deepseek_v3", "gpt_oss", "gemma4", "jetmoe", "switch_transformers", "llama4_text", "dbrx"]
MANY = ["loads", "saves_again", "generates", "copies_deeply", "pickles"]
CHECKS = {name: MANY + ["compiles"] * (name == "mixtral") for name in [*NAMES, "few_bits"]}


def _few_bits() -> Example:
    """Return a pruned model whose experts are stored in 4 bits."""
    case = pruned("mixtral")
    return replace(case, name="few_bits", merged=quantize_model(copy.deepcopy(case.merged)))


def test_pruned_experts_in_few_bits_are_saved_and_loaded(tmp_path: Path) -> None:
    case = _few_bits()
    case.merged.save_pretrained(tmp_path)
    again, info = type(case.merged).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    for layer, item in case.plan.layers.items():
        said = again.config.mcsmoe["layers"][layer]
        assert said["kept"] == item.kept
        assert said["quantized"].keys() == {"gate_up_proj", "down_proj"}
    assert torch.equal(logits(again, case.batch), logits(case.merged, case.batch))
    assert not torch.allclose(logits(again, case.batch), logits(pruned("mixtral").merged, case.batch), atol=1e-3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Saved pruned models, by name."""
    folder = tmp_path_factory.mktemp("pruned")
    cases = [*map(pruned, NAMES), _few_bits()]
    return {case.name: save_pruned(case, folder, generated=True) for case in cases}


@pytest.fixture(scope="module")
def reports(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """What a process without the package found when it loaded and used the models."""
    checks = {path: CHECKS[name] for name, path in folders.items()}
    return check_without_package(checks, tmp_path_factory.mktemp("elsewhere"))


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_without_the_package_a_pruned_model_is_whole(name: str, reports: Reports) -> None:
    assert reports[name] == dict.fromkeys(CHECKS[name], "")


@pytest.mark.slow
def test_adapters_are_trained_on_a_pruned_model(folders: dict[str, Path], tmp_path: Path) -> None:
    checks = ["takes_lora", "trains_saves_and_resumes"]
    found = check_without_package({folders["mixtral"]: checks}, tmp_path, "train_without_package.py")
    assert found == {"mixtral": dict.fromkeys(checks, "")}
