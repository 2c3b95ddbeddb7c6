"""Pruned layers of every family: a stock model with fewer experts is the oracle."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import EXPERT_FIELDS, NUM_EXPERTS, build, families
from helpers import batches, logits, relative_error
from merged import REFUSED, Example, example
from pruned import pruned, unlike
from torch import nn
from transformers import PreTrainedConfig

from hf_mcsmoe import (
    MergeConfig,
    RepairConfig,
    collect_statistics,
    compress,
    merge_experts,
    moe_layers,
    plan_merge,
    repair_experts,
)
from hf_mcsmoe.calibration.inputs import LayerInputs, capture_inputs
from hf_mcsmoe.calibration.pruned import pruned_inputs
from hf_mcsmoe.layers.folder import Folder
from hf_mcsmoe.merge import merge_to_folder
from hf_mcsmoe.modeling.configuration_mcsmoe import check_layer
from hf_mcsmoe.modeling.plain_mcsmoe import plain_model
from hf_mcsmoe.modeling.pruned_mcsmoe import cut_routers
from hf_mcsmoe.plan import LayerPlan

FAST = ["mixtral", "deepseek_v3", "gpt_oss", "gemma4", "jetmoe", "switch_transformers"]
HASHED = "deepseek_v4"
# Their experts are stored in another layout once they are changed.
OTHER_LAYOUT = {"dbrx", "jetmoe", "llama4", "llama4_text", "switch_transformers"}
# Its one number of experts is that of its vision part as well, which keeps all.
SHARED_COUNT = "ernie4_5_vl_moe"
# Of which no configuration of the family's own class says what a pruned model stores.
NOT_PLAIN = {*OTHER_LAYOUT, SHARED_COUNT, "longcat_flash"}
# Their routers read, or scale, something else than the experts' inputs.
OTHER_INPUTS = ["gemma4", "llama4_text"]
SUPPORTED = [family.name for family in families() if family.name not in {*REFUSED, HASHED}]


def _by_speed(names: list[str]) -> list[Any]:
    return [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in names]


def _configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for part in vars(config).values():
        if isinstance(part, PreTrainedConfig):
            yield from _configs(part)


def _smaller(case: Example) -> nn.Module:
    """Return a stock model with fewer experts, whose tensors are those of the original at the kept ones."""
    config = copy.deepcopy(case.base.config)
    (count,) = {layer.num_experts for layer in moe_layers(case.merged)}
    for part in _configs(config.get_text_config()):
        for field in EXPERT_FIELDS:
            if vars(part).get(field) == NUM_EXPERTS:
                setattr(part, field, count)
    small = type(case.base)(config).eval()
    wanted, given = small.state_dict(), case.base.state_dict()
    for layer, item in case.plan.layers.items():
        assert len(item.kept or ()) == count
        block = layer.rpartition(".")[0] + "."
        for name in (name for name in wanted if name.startswith(block) and wanted[name].shape != given[name].shape):
            sizes = zip(wanted[name].shape, given[name].shape, strict=True)
            (axis,) = [axis for axis, (new, old) in enumerate(sizes) if new != old]
            rest = range(NUM_EXPERTS, given[name].shape[axis])
            given[name] = given[name].index_select(axis, torch.tensor([*(item.kept or ()), *rest]))
    small.load_state_dict(given)
    return small


@pytest.mark.parametrize("name", _by_speed([name for name in SUPPORTED if name not in {*OTHER_LAYOUT, SHARED_COUNT}]))
def test_a_pruned_model_is_the_familys_own_with_fewer_experts(name: str) -> None:
    case = pruned(name, "uniform")
    torch.testing.assert_close(
        logits(case.merged, case.batch), logits(_smaller(case), case.batch), atol=1e-4, rtol=1e-4
    )
    assert not torch.allclose(logits(case.merged, case.batch), logits(case.base, case.batch), atol=1e-2)


@pytest.mark.parametrize("name", _by_speed(sorted(OTHER_LAYOUT)))
def test_routers_that_never_wanted_the_other_experts_change_nothing(name: str) -> None:
    """The rows of the others are made such that none of them is ever picked, nor has a share in a softmax."""
    case = pruned(name)
    model = copy.deepcopy(case.base)
    for layer in moe_layers(model):
        router, kept = layer.router, set(case.plan.layers[layer.name].kept or ())
        linear = next((child for child in router.children() if isinstance(child, nn.Linear)), router)
        gone = torch.tensor([expert not in kept for expert in range(layer.num_experts)])
        linear.register_forward_hook(lambda module, args, output, gone=gone: _without(output, gone))
    torch.testing.assert_close(logits(case.merged, case.batch), logits(model, case.batch), atol=1e-4, rtol=1e-4)


def _without(output: Any, gone: torch.Tensor) -> Any:
    if isinstance(output, torch.Tensor):
        return output.masked_fill(gone, float("-inf"))
    values = output[1].masked_fill(gone, float("-inf"))  # Llama 4
    first = values.max(1, keepdim=True)
    return torch.full_like(values, float("-inf")).scatter(1, first.indices, first.values).sigmoid(), values


@pytest.mark.parametrize("name", ["mixtral", "jetmoe"])
def test_the_configuration_says_which_experts_are_kept_and_routers_have_no_others(name: str, tmp_path: Path) -> None:
    case = pruned(name)
    case.merged.save_pretrained(tmp_path)
    again = type(case.merged).from_pretrained(tmp_path)
    for model in (case.merged, again):
        said = model.config.mcsmoe["layers"]
        assert said == {layer: {"num_experts": 8, "kept": item.kept} for layer, item in case.plan.layers.items()}
        assert [router.kept_experts for _, router in cut_routers(model)] == [item["kept"] for item in said.values()]
    torch.testing.assert_close(logits(again, case.batch), logits(case.merged, case.batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", pytest.param("lfm2_moe", marks=pytest.mark.slow)])
def test_folder_to_folder_gives_the_same(name: str, tmp_path: Path) -> None:
    case = pruned(name)
    case.base.save_pretrained(tmp_path / "base")
    merge_to_folder(Folder(tmp_path / "base"), case.plan, tmp_path / "pruned")
    again = type(case.merged).from_pretrained(tmp_path / "pruned")
    torch.testing.assert_close(logits(again, case.batch), logits(case.merged, case.batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", pytest.param("switch_transformers", marks=pytest.mark.slow)])
def test_layers_of_unlike_counts_have_a_loss_of_load_balancing(name: str) -> None:
    case = pruned(name)
    batch = case.batch | {"labels": case.batch["input_ids"]}
    output = case.merged(**batch, output_router_logits=True)
    assert len({layer.num_experts for layer in moe_layers(case.merged)}) == 2
    assert output.loss.isfinite()


def test_merged_and_pruned_layers_stand_in_one_model() -> None:
    case = pruned("mixtral")
    merge = plan_merge(case.base, collect_statistics(case.base, batches("mixtral", case.base)), MergeConfig(experts=3))
    first = next(iter(merge.layers))
    plan = copy.deepcopy(merge)
    plan.layers[first] = case.plan.layers[first]
    model = merge_experts(case.base, plan)
    said = list(model.config.mcsmoe["layers"].values())
    assert ["kept" in entry for entry in said] == [True, False, False, False]
    assert logits(model, case.batch).isfinite().all()


def test_groups_of_a_router_keep_as_many_experts() -> None:
    kept = [item.kept or [] for item in pruned("deepseek_v3").plan.layers.values()]
    assert all(sum(expert < 4 for expert in experts) * 2 == len(experts) for experts in kept)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (HASHED, {"experts": 6}, "sends each token of the vocabulary to fixed experts"),
        ("mixtral", {"experts": 1}, "the 2 experts a layer that the routers need"),
        ("deepseek_v3", {"experts": 7}, "keep a multiple of 2"),
        ("deepseek_v3", {"experts": 4}, "the 6 experts a layer"),
    ],
)
def test_what_a_router_cannot_do_is_refused_before_any_forward(name: str, options: dict, message: str) -> None:
    model = build(name)
    with pytest.raises(ValueError, match=message):
        compress(model, batches(name, model), MergeConfig(reduce="prune", **options))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"num_experts": 8, "kept": [3, 1]}, "a rising list"),
        ({"num_experts": 8, "kept": [1, 8]}, "a rising list"),
        ({"num_experts": 8, "kept": []}, "a rising list"),
        ({"num_experts": 4, "kept": [1]}, "said to have had 4 experts, and has 8"),
        ({"num_experts": 8, "kept": [1], "expert_map": [0]}, "exclude each other"),
    ],
)
def test_a_damaged_entry_of_a_pruned_layer_is_refused(layer: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_layer("layer", layer, 8)


@pytest.mark.parametrize("kept", [[], [2, 1], [1, 1], [8], [-1, 2], ["a"], None])
def test_a_plan_of_no_such_experts_is_refused(kept: Any) -> None:
    with pytest.raises(ValueError, match="must be a rising list"):
        LayerPlan.pruned(8, kept)


def _captured(name: str) -> tuple[Example, LayerInputs, LayerInputs]:
    """Return what the experts of the first layer see in the original and in the pruned model, whose tokens agree."""
    case = pruned(name)
    layers = [moe_layers(model)[0] for model in (case.base, case.merged)]
    return case, *(capture_inputs([layer], batches(name, layer.model))[layer.name] for layer in layers)


@pytest.mark.parametrize("name", _by_speed(["mixtral", "deepseek_v3", "dbrx", "jetmoe", "longcat_flash", "lfm2_moe"]))
def test_the_picks_of_a_cut_router_are_told_without_running_the_model(name: str) -> None:
    case, before, after = _captured(name)
    layer = moe_layers(case.base)[0]
    found = pruned_inputs(layer, case.plan.layers[layer.name].kept or [], before)
    assert torch.equal(found.hidden, after.hidden)
    assert torch.equal(found.index, after.index)
    torch.testing.assert_close(found.weights, after.weights)


@pytest.mark.parametrize(
    "name", ["switch_transformers", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHER_INPUTS)]
)
def test_picks_that_do_not_follow_from_the_inputs_are_refused_and_repaired_all_the_same(name: str) -> None:
    case, before, _ = _captured(name)
    layer = moe_layers(case.base)[0]
    with pytest.raises(ValueError, match="do not follow from the inputs"):
        pruned_inputs(layer, case.plan.layers[layer.name].kept or [], before)
    student = copy.deepcopy(case.merged)
    report = repair_experts(student, case.base, batches(name, case.base), RepairConfig(method="joint"))
    assert len(report.layers) == len(moe_layers(student))


@pytest.mark.parametrize("method", ["joint", "refit", "local"])
def test_a_repair_brings_a_pruned_layer_nearer_to_the_original(method: str) -> None:
    case = pruned("mixtral")
    student, data = copy.deepcopy(case.merged), batches("mixtral", case.base, number=6)
    report = repair_experts(student, case.base, data, RepairConfig(method=method, steps=20))
    assert len(report.layers) == len(moe_layers(student))
    assert all(layer.is_better for layer in report.layers.values())
    target = torch.cat([logits(case.base, batch) for batch in data])
    errors = [
        relative_error(torch.cat([logits(model, batch) for batch in data]), target) for model in (student, case.merged)
    ]
    assert errors[0] < 0.97 * errors[1]


def test_a_repair_that_asks_what_members_did_is_refused_for_a_pruned_layer() -> None:
    case = pruned("mixtral")
    with pytest.raises(ValueError, match="choose the repair 'joint'"):
        repair_experts(copy.deepcopy(case.merged), case.base, [case.batch], RepairConfig(method="mean_shift"))


@pytest.mark.parametrize("name", _by_speed([name for name in SUPPORTED if name not in NOT_PLAIN]))
def test_a_model_of_one_count_is_saved_as_one_of_its_family_and_loads_without_any_code(
    name: str, tmp_path: Path
) -> None:
    case = pruned(name, "uniform")
    plain = plain_model(case.merged)
    assert type(plain) is type(case.base)
    torch.testing.assert_close(logits(plain, case.batch), logits(case.merged, case.batch), atol=1e-4, rtol=1e-4)
    case.merged.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    assert not {"auto_map", "mcsmoe"} & json.loads((tmp_path / "config.json").read_text()).keys()
    again, info = type(case.base).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    torch.testing.assert_close(logits(again, case.batch), logits(case.merged, case.batch), atol=1e-4, rtol=1e-4)


def test_a_checkpoint_to_resume_from_and_a_model_of_unlike_counts_keep_our_format(tmp_path: Path) -> None:
    for case, name in ((pruned("mixtral", "uniform"), "checkpoint-3"), (pruned("mixtral"), "saved")):
        case.merged.save_pretrained(tmp_path / name)
        assert "mcsmoe" in json.loads((tmp_path / name / "config.json").read_text())


def test_what_no_model_of_the_family_can_say_is_not_made_plain() -> None:
    for name, budget, message in (
        ("mixtral", unlike, "unlike numbers of experts"),
        ("switch_transformers", "uniform", "keeps .* otherwise"),
        ("longcat_flash", "uniform", "keeps .* otherwise"),
    ):
        with pytest.raises(ValueError, match=message):
            plain_model(pruned(name, budget).merged)
    with pytest.raises(ValueError, match="were merged, left whole"):
        plain_model(example("mixtral").merged)
