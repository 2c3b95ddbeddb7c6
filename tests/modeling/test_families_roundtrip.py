"""Every family: merged, saved, loaded without the package; and merges whose result is known beforehand."""

import copy
from pathlib import Path

import pytest
import torch
from families import build, families, families_page, inputs
from helpers import logits
from merged import REFUSED, check_without_package, example, merge, save, stored_experts

from hf_mcsmoe import MergeConfig, moe_layers

SUPPORTED = [family.name for family in families() if family.name not in REFUSED]
EVERY = pytest.mark.parametrize("name", SUPPORTED)
PAGE = Path(__file__).parents[2] / "docs" / "families.md"


@pytest.fixture(scope="session")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Save every family's merged model and load them all in one process without the package."""
    folder = tmp_path_factory.mktemp("families")
    checks = {save(example(name), folder): ["loads", "saves_again"] for name in SUPPORTED}
    return check_without_package(checks, cwd=tmp_path_factory.mktemp("elsewhere"))


@pytest.mark.slow
@pytest.mark.parametrize("check", ["loads", "saves_again"])
@EVERY
def test_without_the_package_it(check: str, name: str, reports: dict[str, dict[str, str]]) -> None:
    assert not reports[name][check], reports[name][check]


@EVERY
def test_layers_keep_different_numbers_of_experts(name: str) -> None:
    kept, whole = stored_experts(example(name).merged), stored_experts(example(name).base)
    assert len(set(kept)) == 2
    assert all(after < before for after, before in zip(kept, whole, strict=True))


@EVERY
def test_merged_model_equals_the_base_model_with_copies_of_the_merged_experts(name: str) -> None:
    case = example(name)
    model = copy.deepcopy(case.base)
    for layer, stored in zip(moe_layers(model), moe_layers(case.merged), strict=True):
        for expert, group in enumerate(case.plan.layers[layer.name].expert_map):
            layer.read().set_expert(expert, stored.read().expert(group))
    torch.testing.assert_close(logits(case.merged, case.batch), logits(model, case.batch), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(case.merged, case.batch), logits(case.base, case.batch), atol=1e-2)


@EVERY
def test_keeping_all_experts_keeps_the_logits(name: str) -> None:
    case = example(name)
    _, merged = merge(case.base, name, MergeConfig(experts=1.0))
    assert torch.equal(logits(merged, case.batch), logits(case.base, case.batch))


@EVERY
def test_merging_identical_experts_keeps_the_logits(name: str) -> None:
    model = build(name)
    for layer in moe_layers(model):
        weights = layer.read()
        for expert in range(1, len(weights)):
            weights.set_expert(expert, weights.expert(0))
    batch = inputs(name, model)
    _, merged = merge(model, name, MergeConfig(experts=0.5))
    torch.testing.assert_close(logits(merged, batch), logits(model, batch), atol=1e-4, rtol=1e-4)
    assert merged.num_parameters() < model.num_parameters()


@pytest.mark.parametrize(("name", "reason"), REFUSED.items())
def test_a_refused_family_is_told_why(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        merge(build(name), name)


def test_the_page_of_the_families_is_that_of_the_installed_transformers() -> None:
    assert PAGE.read_text(encoding="utf-8") == families_page(), "write it: python tests/families.py > docs/families.md"
