"""Constants in the place of pruned experts: a layer's output is a loop over its picks, whatever the family."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import inputs
from helpers import batches, logits
from layouts import LAYOUTS
from merged import Example, Reports, check_without_package, save
from pruned import substituted
from transformers import AutoModelForCausalLM

from hf_mcsmoe import (
    LoSparseConfig,
    MergeConfig,
    QuantizationConfig,
    RepairConfig,
    collect_statistics,
    compress,
    decompose_experts,
    merge_experts,
    moe_layers,
    plan_merge,
    repair_experts,
)
from hf_mcsmoe.attached import record_of
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.folder import Folder
from hf_mcsmoe.layers.layer import MoELayer
from hf_mcsmoe.merge import merge_to_folder
from hf_mcsmoe.methods.routed import Routed
from hf_mcsmoe.modeling.configuration_mcsmoe import check_layer
from hf_mcsmoe.planning import check_request
from hf_mcsmoe.tables import layer_rows

FAST = ["mixtral"]
# Whose encoder and decoder share their experts.
TIED = "diffusion_gemma"
# One of each layout, and routers with groups, biases, hashes and identities; the others go the same ways.
# In the tiny Zaya no token picks an expert that is gone.
SUPPORTED = [*sorted({*LAYOUTS} - {"zaya"}), "deepseek_v3", "deepseek_v4", "gemma4", "qwen3_vl_moe"]


def _by_speed(names: list[str]) -> list[Any]:
    return [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in names]


def _seen(model: Any, layer: MoELayer, data: list[dict[str, torch.Tensor]], *, counted: bool = False) -> list[Routed]:
    """Return what a layer's experts see: a row each, or where inputs are scaled one for each pick.

    Args:
        counted: leave out padding, which a calibration does not count.
    """
    rows: list[Routed] = []
    handles = layer.routed(rows.append)
    for batch in data:
        logits(model, batch)
    for handle in handles:
        handle.remove()
    if counted:
        masks = [
            batch.get("attention_mask", torch.ones(len(row.logits))) for batch, row in zip(data, rows, strict=True)
        ]
        rows = [row.where(mask.flatten().bool()) for row, mask in zip(rows, masks, strict=True)]
    return [row.per_input() for row in rows]


def _picks(routed: Routed) -> list[tuple[int, int, float]]:
    """Return the token, the expert and the weight of each pick that counts; experts from E on give their input."""
    places = [(token, pick) for token in range(len(routed.index)) for pick in range(routed.index.shape[1])]
    found = [(token, int(routed.index[token, pick]), float(routed.weights[token, pick])) for token, pick in places]
    return [pick for pick in found if pick[2] != 0]


def _mean_outputs(layer: MoELayer, seen: list[Routed]) -> torch.Tensor:
    """Return each expert's mean output over the tokens that reached it, float64 [E, D]."""
    total = torch.zeros(layer.num_experts, layer.hidden_size, dtype=torch.float64)
    number = [0] * layer.num_experts
    with layer.open() as experts:
        for routed in seen:
            for token, expert, _ in _picks(routed):
                if expert < layer.num_experts:
                    total[expert] += experts.output(expert, routed.hidden[token, None])[0].double()
                    number[expert] += 1
    return total / torch.tensor(number).clamp(min=1)[:, None]


def _expected(layer: MoELayer, routed: Routed, kept: list[int], constants: torch.Tensor) -> torch.Tensor:
    """Return a layer's output with the experts `kept` alone and constants [E, D] in the place of the others."""
    output = torch.zeros_like(routed.hidden, dtype=torch.float64)
    with layer.open() as experts:
        for token, expert, weight in _picks(routed):
            state = routed.hidden[token, None]
            if expert >= layer.num_experts:
                output[token] += weight * state[0]
            elif expert in kept:
                output[token] += weight * experts.output(expert, state)[0].double()
            else:
                output[token] += weight * constants[expert]
    return output


def _first_output(case: Example) -> torch.Tensor:
    """Return what the first layer's experts of the result give for its example's batch, [T, D]."""
    found: list[torch.Tensor] = []
    container = moe_layers(case.merged)[0].container
    handle = container.register_forward_hook(lambda module, arguments, output: found.append(output))
    logits(case.merged, case.batch)
    handle.remove()
    return found[0].reshape(-1, found[0].shape[-1]).double()


@pytest.mark.parametrize("name", _by_speed(SUPPORTED))
def test_a_pick_of_an_expert_that_is_gone_gives_its_weight_times_the_mean_output(name: str) -> None:
    case = substituted(name)
    case = replace(case, batch=inputs(name, case.base, batch_size=4, seed=5))
    layer = moe_layers(case.base)[0]
    kept = case.plan.layers[layer.name].kept or []
    assert 0 < len(kept) < layer.num_experts
    means = _mean_outputs(layer, _seen(case.base, layer, batches(name, case.base), counted=True))
    (routed,) = _seen(case.base, layer, [case.batch])
    assert {expert for _, expert, _ in _picks(routed)} - {*kept, layer.num_experts}
    expected = _expected(layer, routed, kept, means)
    torch.testing.assert_close(_first_output(case), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["mixtral", pytest.param("dbrx", marks=pytest.mark.slow)])
def test_a_pick_of_an_expert_that_gives_nothing_adds_nothing(name: str) -> None:
    case = substituted(name, "zero")
    layer = moe_layers(case.base)[0]
    (routed,) = _seen(case.base, layer, [case.batch])
    zeros = torch.zeros(layer.num_experts, layer.hidden_size)
    expected = _expected(layer, routed, case.plan.layers[layer.name].kept or [], zeros)
    torch.testing.assert_close(_first_output(case), expected, atol=1e-4, rtol=1e-4)
    assert {one.num_constants for one in moe_layers(case.merged)} == {1}


@pytest.mark.parametrize("implementation", ["mcsmoe", "eager", "batched_mm", "grouped_mm"])
def test_every_implementation_gives_the_same(implementation: str) -> None:
    case = substituted("mixtral")
    model = copy.deepcopy(case.merged)
    model.set_experts_implementation(implementation)
    torch.testing.assert_close(logits(model, case.batch), logits(case.merged, case.batch), atol=1e-5, rtol=1e-5)


def test_gates_of_constants_have_gradients() -> None:
    case = substituted("mixtral")
    model = copy.deepcopy(case.merged).train().requires_grad_(True)
    model(**case.batch, labels=case.batch["input_ids"]).loss.backward()
    layer = moe_layers(model)[0]
    gone = model.config.mcsmoe["layers"][layer.name]["approximate_experts"]
    assert layer.container.approx_value.grad.abs().sum() > 0
    assert layer.router.weight.grad[gone].abs().sum() > 0


@pytest.mark.parametrize("kind", ["constant", "zero"])
def test_the_configuration_the_record_and_the_card_say_which_experts_gave_way(kind: str, tmp_path: Path) -> None:
    case = substituted("mixtral", kind)
    case.merged.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())["mcsmoe"]["layers"]
    for name, item in case.plan.layers.items():
        kept = item.kept or []
        gone = [expert for expert in range(8) if expert not in kept]
        assert said[name]["approximate_experts"] == gone
        assert [said[name]["expert_map"][expert] for expert in kept] == list(range(len(kept)))
        places = [said[name]["expert_map"][expert] for expert in gone]
        assert places == [len(kept) + (number if kind == "constant" else 0) for number in range(len(gone))]
    stored = record_of(case.merged).layers
    assert [(item.after, item.constants, item.reduce) for item in stored.values()] == [
        (len(item.kept or []), 8 - len(item.kept or []), "prune") for item in case.plan.layers.values()
    ]
    words, column = {"zero": ("zero", "zeros"), "constant": ("a constant", "constants")}[kind]
    assert f"a pick of one that is gone gives {words} in its" in (tmp_path / "README.md").read_text()
    assert column in layer_rows(stored)[0]
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits(again, case.batch), logits(case.merged, case.batch))


def test_a_folder_is_written_layer_by_layer_with_the_same_weights(tmp_path: Path) -> None:
    case = substituted("mixtral")
    case.base.save_pretrained(tmp_path / "base")
    folder = Folder(tmp_path / "base")
    config = MergeConfig(reduce="prune", saliency="fluctuation", pruned_router="constant", budget="uniform")
    statistics = collect_statistics(case.base, batches("mixtral", case.base), config.needs)
    plan = plan_merge(case.base, statistics, config)
    merge_to_folder(folder, plan, tmp_path / "result", statistics=statistics)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "result").state_dict()
    expected = merge_experts(case.base, plan, statistics=statistics).state_dict()
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], values) for name, values in expected.items())
    with pytest.raises(ValueError, match="read output_sum, counts: pass the statistics"):
        merge_experts(case.base, plan)


@pytest.mark.parametrize("method", ["refit", pytest.param("local", marks=pytest.mark.slow)])
def test_a_repair_fits_the_experts_that_stay_to_what_the_constants_leave(method: str) -> None:
    case = substituted("mixtral")
    model, data = copy.deepcopy(case.merged), [case.batch, *batches("mixtral", case.base)]
    layer = moe_layers(model)[0]
    constants = layer.container.approx_value.clone()
    (routed,) = _seen(case.base, moe_layers(case.base)[0], [case.batch])
    target = _expected(moe_layers(case.base)[0], routed, list(range(8)), constants)
    before = (_first_output(case) - target).square().sum()
    report = repair_experts(model, case.base, data, RepairConfig(method=method, steps=50, caution=0.0, made=0.0))
    after = (_first_output(Example("", case.base, case.batch, case.plan, model)) - target).square().sum()
    assert after < 0.98 * before  # and not what fitting them to the whole output would give, which has both
    first = report.layers[layer.name]
    assert first.after is not None
    assert first.before is not None
    assert first.after < first.before
    assert torch.equal(layer.container.approx_value, constants)
    with pytest.raises(ValueError, match="of which constants are none"):
        repair_experts(model, case.base, data, RepairConfig(method="local", sequential=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage", [{"quantization": QuantizationConfig(bits=8)}, {"low_rank": LoSparseConfig(rank=4, keep=0.2)}]
)
def test_experts_that_stay_are_stored_in_other_ways_beside_constants(stage: dict[str, Any], tmp_path: Path) -> None:
    case = substituted("mixtral")
    config = MergeConfig(reduce="prune", saliency="fluctuation", pruned_router="constant", budget="uniform")
    data = batches("mixtral", case.base)
    dense, stored = (compress(case.base, data, config, **given) for given in ({}, stage))
    stored.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, case.batch), logits(stored, case.batch))
    for one, other in zip(moe_layers(dense), moe_layers(stored), strict=True):
        assert torch.equal(one.container.approx_value, other.container.approx_value)
    if "quantization" in stage:
        missed = (logits(stored, case.batch) - logits(dense, case.batch)).abs()
        assert (missed > 0.1).float().mean() < 0.05  # a near tie of a router may turn


def test_training_form_keeps_constants(tmp_path: Path) -> None:
    case = substituted("mixtral")
    model = decompose_experts(copy.deepcopy(case.merged), LoSparseConfig(rank=4, keep=0.5))
    torch.testing.assert_close(logits(model, case.batch), logits(case.merged, case.batch), atol=1e-4, rtol=1e-4)


WRONG = [
    ({"approximate_experts": []}, "rising list"),
    ({"approximate_experts": [3, 1]}, "rising list"),
    ({"approximate_experts": [4]}, "rising list"),
    ({"approximate_experts": [0, 1, 2, 3]}, "rising list"),
    ({"approximate_experts": "13"}, "rising list"),
    ({"approximate_experts": [0, 3]}, "behind the 2 stored experts"),
    ({"expert_map": [0, 2, 1, 4]}, "use each stored expert"),
]


@pytest.mark.parametrize(("change", "words"), WRONG)
def test_a_damaged_entry_is_refused(change: dict[str, Any], words: str) -> None:
    right = {"num_experts": 4, "expert_map": [0, 2, 1, 3], "approximate_experts": [1, 3]}
    check_layer("x", right)
    check_layer("x", right | {"expert_map": [0, 2, 1, 2]})
    with pytest.raises(ValueError, match=words):
        check_layer("x", right | change)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pruned_router": "nothing", "reduce": "prune"}, "Unknown pruned_router"),
        ({"pruned_router": "zero", "reduce": "prune", "budget": "measured"}, "budget='measured' judges"),
        ({"pruned_router": "constant", "reduce": "prune", "selection": "exhaustive"}, "selection='exhaustive' judges"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MergeConfig(**options)


def test_what_is_merged_leaves_no_rows_without_an_expert() -> None:
    with pytest.raises(ValueError, match=r"pruned_router='zero' keeps .* reduce='merge' is no pruning"):
        check_request(Layers.of(substituted("mixtral").base), MergeConfig(pruned_router="zero"))


@pytest.mark.slow
def test_experts_that_layers_share_do_not_give_way() -> None:
    with pytest.raises(ValueError, match="share their experts, of which none can give way"):
        substituted(TIED)


NAMES = ["mixtral", "gpt_oss", "switch_transformers", "longcat_flash"]
CHECKS = ["loads", "saves_again", "keeps_bfloat16", "builds_from_its_configuration", "copies_deeply", "pickles"]
MORE = ["generates", "checkpoints_gradients", "compiles", "runs_every_experts_implementation", "loads_by_device_map"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Saved models with constants, by family."""
    folder = tmp_path_factory.mktemp("constants")
    return {name: save(substituted(name), folder, generated=True) for name in NAMES}


@pytest.fixture(scope="module")
def reports(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """What a process without the package found when it loaded and used the models."""
    checks = {path: CHECKS + MORE * (name == "mixtral") for name, path in folders.items()}
    return check_without_package(checks, tmp_path_factory.mktemp("elsewhere"))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_without_the_package_a_model_with_constants_is_whole(name: str, reports: Reports) -> None:
    assert not any(reports[name].values()), reports[name]


@pytest.mark.slow
def test_adapters_are_trained_on_a_model_with_constants(folders: dict[str, Path], tmp_path: Path) -> None:
    checks = ["takes_lora"]
    found = check_without_package({folders["mixtral"]: checks}, tmp_path, "train_without_package.py")
    assert found == {"mixtral": dict.fromkeys(checks, "")}
