"""Presets: each is what `compress` takes, and what its command line says."""

from dataclasses import fields

import pytest

from hf_mcsmoe.methods.config import MergeConfig
from hf_mcsmoe.presets import PRESETS
from hf_mcsmoe.repair.methods import RepairConfig
from hf_mcsmoe.sparsity.config import SparsityConfig


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_made_for_any_number_of_experts(name: str) -> None:
    preset = PRESETS[name]
    assert preset.name == name
    assert 10 < len(preset.text) < 120
    for experts in () if preset.sparsify else (0.25, 3):
        options = preset.options(experts)
        assert set(options) == {"config", "repair", "low_rank", "quantization"}
        usual = MergeConfig()
        given = {item.name: getattr(options["config"], item.name) for item in fields(usual)}
        own = {key: value for key, value in given.items() if value != getattr(usual, key) and key != "experts"}
        assert given["experts"] == experts
        assert own.items() <= dict(preset.merge).items()
        assert options["config"].needs
    assert preset.options()["repair"] == (None if preset.repair == "none" else RepairConfig(method=preset.repair))


@pytest.mark.parametrize("name", PRESETS)
def test_its_command_line_says_the_same(name: str) -> None:
    preset = PRESETS[name]
    told = preset.command_line()
    assert told["repair"] == preset.repair
    stored = ("repair", "rank", "keep", "sparsify")
    assert (told.get("rank"), told.get("keep"), told.get("sparsify", "")) == (
        preset.rank,
        preset.keep,
        preset.sparsify,
    )
    assert {key: value for key, value in told.items() if key not in stored} == preset.merge


def test_a_preset_that_leaves_out_weights_keeps_all_experts() -> None:
    options = PRESETS["moe-pruner"].options(0.25)
    assert options["config"].experts == 1.0
    assert options["sparsity"] == SparsityConfig("moe_pruner", "unstructured", 0.75)
    with pytest.raises(ValueError, match="in place of 8 experts give the share of the weights that stays"):
        PRESETS["moe-pruner"].options(8)


def test_options_beside_a_preset_override_its_own() -> None:
    config = PRESETS["reap"].options(2, saliency="frequency", seed=3)["config"]
    assert (config.reduce, config.saliency, config.budget, config.seed) == ("prune", "frequency", "uniform", 3)


def test_a_name_that_no_preset_has_says_what_was_meant() -> None:
    with pytest.raises(ValueError, match=r"Unknown preset 'msmo'\. Did you mean 'msmoe'\?.*'reap'"):
        PRESETS["msmo"]
