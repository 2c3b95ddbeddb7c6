"""Plain checkpoints: written for the family's own class, and read by it."""

import json
from pathlib import Path

import pytest
import torch
from families import build, inputs
from helpers import logits
from merged import Example, example, merge

from hf_mcsmoe import MergeConfig
from hf_mcsmoe.export import export


def uniform(name: str, experts: int | float = 0.5) -> Example:
    """Merge the tiny model of a family to one number of experts for all of its layers."""
    base = build(name)
    return Example(name, base, inputs(name, base), *merge(base, name, MergeConfig(experts=experts, budget="uniform")))


@pytest.mark.parametrize("name", ["qwen3_moe", "switch_transformers"])
def test_expanded_checkpoints_have_the_merged_models_logits_in_the_familys_own_class(
    name: str, tmp_path: Path
) -> None:
    case = uniform(name)
    export(case.merged, tmp_path / "expanded", expand=True)
    again, info = type(case.base).from_pretrained(tmp_path / "expanded", output_loading_info=True)
    assert not any(info.values()), info
    assert again.config.num_experts == case.base.config.num_experts
    torch.testing.assert_close(logits(again, case.batch), logits(case.merged, case.batch), atol=1e-4, rtol=1e-4)


def test_rows_of_a_plain_router_are_the_means_of_its_groups_by_their_frequency(tmp_path: Path) -> None:
    case = uniform("qwen3_moe")
    export(case.merged, tmp_path / "plain")
    assert not list((tmp_path / "plain").glob("*.py"))
    assert not {"auto_map", "mcsmoe"} & json.loads((tmp_path / "plain" / "config.json").read_text()).keys()
    again, info = type(case.base).from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not any(info.values()), info
    (name, plan), *_ = case.plan.layers.items()
    router = name.replace("experts", "gate.weight")
    rows, counts = case.base.get_parameter(router), torch.tensor(plan.counts or [])
    for group in range(len(plan.dominant)):
        members = plan.members(group)
        mean = sum(counts[member] * rows[member] for member in members) / counts[members].sum()
        torch.testing.assert_close(again.get_parameter(router)[group], mean)


def test_layers_of_unlike_numbers_of_experts_are_told_the_nearest_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="budget='uniform' and experts=4"):
        export(example("qwen3_moe").merged, tmp_path / "plain")


def test_a_folders_generation_config_goes_along(tmp_path: Path) -> None:
    merged = uniform("mixtral").merged
    merged.save_pretrained(tmp_path / "merged")
    settings = {"eos_token_id": [3, 7], "do_sample": True, "temperature": 0.6, "top_k": 20}
    (tmp_path / "merged" / "generation_config.json").write_text(json.dumps(settings))
    export(tmp_path / "merged", tmp_path / "plain")
    written = json.loads((tmp_path / "plain" / "generation_config.json").read_text())
    assert settings.items() <= written.items()
