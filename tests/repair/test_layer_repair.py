"""Repairs of merged models: they see what the experts see, restore what was spoilt, and touch nothing else."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import NUM_EXPERTS, build, inputs
from helpers import Batch, batches, groups_of, logits, relative_error, state
from layouts import LAYOUTS
from transformers import PreTrainedModel

from hf_mcsmoe import MergeConfig, MoELayer, collect_statistics, merge_experts, moe_layers, plan_merge
from hf_mcsmoe.calibration.inputs import LayerInputs, capture_inputs, stream_inputs
from hf_mcsmoe.repair.elsewhere import with_elsewhere
from hf_mcsmoe.repair.fit import LayerFit, layer_error, merged_output, original_sum
from hf_mcsmoe.repair.methods import REPAIR, RepairConfig
from hf_mcsmoe.repair.repair import RepairReport, matching_layers, repair_experts

# Neither drawn to tokens routed elsewhere or made, nor kept from small ridges.
PLAIN: dict[str, Any] = {"elsewhere": 0.0, "made": 0.0, "caution": 0.0}
EXACT = RepairConfig(ridges=(1e-9,), **PLAIN)


def _merged(name: str, model: PreTrainedModel, data: list[Batch], **options: Any) -> PreTrainedModel:
    config = MergeConfig(**{"experts": 4, "budget": "uniform", **options})
    return merge_experts(model, plan_merge(model, collect_statistics(model, data), config))


def _alike(name: str) -> PreTrainedModel:
    """Build a model whose experts are all the same, so that merging them loses nothing."""
    model = build(name)
    for layer in moe_layers(model):
        first = LAYOUTS[name].before(layer.container, 0)
        for index in range(1, layer.num_experts):
            for role, tensor in LAYOUTS[name].before(layer.container, index).items():
                tensor.copy_(first[role])
    return model


def _spoil(model: PreTrainedModel, name: str) -> None:
    """Add noise to the output matrices (and their biases) of a merged model."""
    generator = torch.Generator().manual_seed(7)
    for layer in moe_layers(model):
        for index in range(layer.num_experts if layer.merged else 0):
            for role, tensor in LAYOUTS[name].after(layer.container, index).items():
                if role.startswith("down"):
                    tensor += 0.1 * torch.randn(tensor.shape, generator=generator)


def _kept_tokens(batch: Batch, layer: MoELayer) -> torch.Tensor:
    mask = batch.get("attention_mask")
    is_decoder = "decoder_input_ids" in batch and "encoder" not in layer.name
    return torch.ones_like(batch["input_ids"]) == 1 if mask is None or is_decoder else mask == 1


# What experts return in the families whose container returns more than their gated sum, or returns it otherwise.
OUTPUTS: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "llama4": lambda container, output: output.view(NUM_EXPERTS, -1, output.shape[-1]).sum(0),
    "jetmoe": lambda container, output: output - container.bias,
}


def _outputs(name: str, model: PreTrainedModel, batch: Batch) -> dict[str, torch.Tensor]:
    """Run a model and return what its experts' containers gave for the tokens that count, [T, D]."""
    found: dict[str, torch.Tensor] = {}

    def keep(layer: MoELayer) -> Callable[..., None]:
        def hook(module: Any, arguments: tuple, output: torch.Tensor) -> None:
            if not layer.merged and name in OUTPUTS:
                output = OUTPUTS[name](module, output)
            if name == "longcat_flash":  # takes its identity experts off again
                states, index, weights = arguments
                output = output - states * (weights * (index >= layer.num_experts)).sum(1, keepdim=True)
            output = output.reshape(-1, output.shape[-1])
            counted = _kept_tokens(batch, layer).flatten()
            found[layer.name] = output[counted.repeat_interleave(len(output) // len(counted))]

        return hook

    for layer in moe_layers(model):
        layer.container.register_forward_hook(keep(layer))
    logits(model, batch)
    return found


@torch.no_grad()
@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_computed_from_captured_inputs_is_what_the_layers_give(name: str) -> None:
    model, data = build(name), [inputs(name, build(name))]
    student = _merged(name, model, batches(name, model))
    given, merged = _outputs(name, copy.deepcopy(model), data[0]), _outputs(name, copy.deepcopy(student), data[0])
    groups = matching_layers(student, model)
    captured = capture_inputs([original for ((_, original),) in groups], data)
    own = capture_inputs([layer for ((layer, _),) in groups], data)
    for ((layer, original),) in groups:
        seen = own[layer.name], captured[original.name]
        layer_fit = LayerFit(layer.name, layer.container, original.read(), *seen, layer.expert_map)
        sums = original_sum(layer_fit, normed=True)
        if name == "llama4":  # a row for each pick
            sums = sums.view(len(given[original.name]), -1, sums.shape[-1]).sum(1)
        torch.testing.assert_close(sums, given[original.name], rtol=1e-4, atol=1e-5)
        ours = merged_output(layer_fit, layer.container, torch.arange(len(own[layer.name])))
        torch.testing.assert_close(ours, merged[layer.name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_refit_restores_spoilt_output_matrices(name: str) -> None:
    model = _alike(name)
    data = batches(name, model, number=10)
    student = _merged(name, model, data[:2])
    expected = logits(model, data[0])
    _spoil(student, name)
    spoilt = relative_error(logits(student, data[0]), expected)
    report = repair_experts(student, model, data, EXACT)
    assert relative_error(logits(student, data[0]), expected) < 1e-3 < 0.1 * spoilt
    for layer in report.layers.values():
        assert layer.after < 0.1 * layer.before
        for expert in layer.experts:
            before, after = expert.relative
            assert expert.tokens < 40 or after < 1e-3 < before, "F is 24"


@pytest.mark.parametrize("method", [method for method in REPAIR if method != "none"])
@pytest.mark.parametrize("name", ["switch_transformers", "qwen3_moe", "gpt_oss"])
def test_a_repair_lowers_the_error_of_pruned_experts_and_touches_nothing_else(name: str, method: str) -> None:
    model = build(name)
    data = batches(name, model, number=4)
    student = _merged(name, model, data, weighting="dominant")
    teacher_before, student_before = state(model), state(student)
    bits = dict(zip((key for key, *_ in student_before["tensors"]), student_before["bits"], strict=True))
    report = repair_experts(student, model, data, RepairConfig(method=method, steps=60))
    assert state(model) == teacher_before
    after = state(student)
    changed = {key for key, value in zip(bits, after["bits"], strict=True) if bits[key] != value}
    trained = ("down_proj", "down_proj_bias") if method != "local" else ("_proj", "_proj_bias")
    assert changed
    assert all(".experts." in key and key.endswith(trained) for key in changed)
    assert {**after, "bits": []} == {**student_before, "bits": []}
    for layer in report.layers.values():
        assert layer.after <= layer.before
        assert layer.held_out > 0
    assert any(layer.after < 0.97 * layer.before for layer in report.layers.values())


@pytest.mark.parametrize("method", ["joint", "local"])
@pytest.mark.parametrize("options", [{}, {"sequential": True}], ids=["", "sequential"])
def test_fits_of_the_whole_output_lower_the_error_too(method: str, options: dict) -> None:
    model = build("qwen3_moe")
    data = batches("qwen3_moe", model, number=6)
    student = _merged("qwen3_moe", model, data)
    alone = copy.deepcopy(student)
    report = repair_experts(student, model, data, RepairConfig(method=method, steps=40, **options))
    assert all(layer.after < layer.before for layer in report.layers.values())
    repair_experts(alone, model, data, RepairConfig(method="refit"))
    target = torch.cat([logits(model, batch) for batch in data])
    errors = [relative_error(torch.cat([logits(m, batch) for batch in data]), target) for m in (student, alone)]
    assert errors[0] < 1.02 * errors[1]


def _stacked(name: str, layer: MoELayer, seen: LayerInputs) -> torch.Tensor:
    """Return a row per token with the gated hidden units of all stored experts, float64 [T, N], for `seen` picks."""
    width = layer.intermediate_size + 1
    wide = torch.zeros(len(seen), layer.num_experts, width, dtype=torch.float64)
    for token in range(len(seen)):
        for pick, gate in zip(seen.index[token].tolist(), seen.weights[token].double(), strict=True):
            if pick < layer.num_experts and gate:
                wide[token, pick, :-1] += gate * _units(name, layer, pick, seen.hidden[token]).double()
                wide[token, pick, -1] += gate
    return wide if name == "gpt_oss" else wide[..., :-1]


def _units(name: str, layer: MoELayer, pick: int, x: torch.Tensor) -> torch.Tensor:
    weights = LAYOUTS[name].after(layer.container, pick)
    if name == "switch_transformers":
        return torch.relu(weights["up"] @ x)
    if name == "mixtral":
        return torch.nn.functional.silu(weights["gate"] @ x) * (weights["up"] @ x)
    gate = (weights["gate"] @ x + weights["gate_bias"]).clamp(max=layer.container.limit)
    up = (weights["up"] @ x + weights["up_bias"]).clamp(-layer.container.limit, layer.container.limit)
    return (up + 1) * gate * torch.sigmoid(layer.container.alpha * gate)


def _out(name: str, layer: MoELayer) -> torch.Tensor:
    """Return the output matrices side by side, with biases where there are any, float64 [D, N]."""
    stored = [LAYOUTS[name].after(layer.container, index) for index in range(layer.num_experts)]
    parts = [
        torch.cat([one["down"], *([one["down_bias"][:, None]] if "down_bias" in one else [])], 1) for one in stored
    ]
    return torch.cat(parts, 1).double()


@pytest.mark.parametrize(
    ("name", "memory_limit"),
    [("switch_transformers", 10**9), ("gpt_oss", 10**9), ("mixtral", 150_000), ("gpt_oss", 60_000)],
)
def test_a_joint_refit_is_the_least_squares_solution_over_all_experts(name: str, memory_limit: int) -> None:
    """A row per token with the units of all stored experts, and the ridge as further rows, solved at once.

    The smaller limits leave room for conjugate gradients alone, over all rows of the matrices or some at a time.
    """
    model = build(name)
    data = batches(name, model, number=4)
    student = _merged(name, model, data, experts=4)
    layer, original = matching_layers(student, model)[0][0]
    start, seen = _out(name, layer), capture_inputs([original], data)[original.name]
    config = RepairConfig(method="joint", ridges=(0.3,), memory_limit=memory_limit, **PLAIN)
    report = repair_experts(student, model, data, config).layers[layer.name]
    units = _stacked(name, layer, seen.mapped(layer.expert_map)).flatten(1)
    fit = LayerFit(layer.name, layer.container, original.read(), seen.mapped(layer.expert_map), seen, layer.expert_map)
    target = original_sum(fit).double()

    def solved(used: torch.Tensor) -> torch.Tensor:
        extra = (0.3 * units[used].square().sum() / units.shape[1]).sqrt() * torch.eye(units.shape[1]).double()
        return torch.linalg.lstsq(
            torch.cat([units[used], extra]), torch.cat([target[used], extra @ start.T])
        ).solution.T

    assert relative_error(_out(name, layer), solved(torch.ones_like(seen.held_out))) < 1e-4
    missed = (units @ solved(~seen.held_out).T - target)[seen.held_out].norm() / target[seen.held_out].norm()
    assert report.after == pytest.approx(float(missed), rel=1e-3)
    missed = (units @ start.T - target)[seen.held_out].norm() / target[seen.held_out].norm()
    assert report.before == pytest.approx(float(missed), rel=1e-4)


@pytest.mark.parametrize(
    ("name", "memory_limit"), [("switch_transformers", 10**9), ("mixtral", 10**9), ("mixtral", 150_000)]
)
def test_a_joint_refit_leaves_each_data_set_out_to_choose_its_ridge(name: str, memory_limit: int) -> None:
    model = build(name)
    data = batches(name, model, number=4)
    layer, original = matching_layers(_merged(name, model, data, experts=4), model)[0][0]
    seen = capture_inputs([original], data)[original.name]
    seen = replace(seen, domain=torch.arange(len(seen)) * 3 // len(seen))
    stored = seen.mapped(layer.expert_map)
    fit = LayerFit(layer.name, layer.container, original.read(), stored, seen, layer.expert_map)
    start, units, target = _out(name, layer), _stacked(name, layer, stored).flatten(1), original_sum(fit).double()
    own = ~seen.held_out

    def missed(used: torch.Tensor, judge: torch.Tensor, ridge: float) -> tuple[float, float]:
        extra = (ridge * units[used].square().sum() / units.shape[1]).sqrt() * torch.eye(units.shape[1]).double()
        rows, wanted = torch.cat([units[used], extra]), torch.cat([target[used], extra @ start.T])
        solved = torch.linalg.lstsq(rows, wanted).solution.T
        before, after = ((units @ weight.T - target)[judge].square().sum() for weight in (start, solved))
        return float(before), float(after)

    shares = {}
    for ridge in (0.03, 1.0, 10.0):
        inside = missed(own, ~own, ridge)
        outside = [missed(own & (seen.domain != kind), own & (seen.domain == kind), ridge) for kind in range(3)]
        before, after = (sum(part[place] for part in outside) for place in range(2))
        if inside[1] < inside[0] and after <= before:
            shares[ridge] = inside[1] / inside[0] + after / before
    config = RepairConfig(method="joint", ridges=(0.03, 1.0, 10.0), memory_limit=memory_limit, elsewhere=0.0, made=0.0)
    report = REPAIR["joint"](fit, config)
    assert {expert.ridge for expert in report.experts if expert.tokens} == {min(shares, key=lambda key: shares[key])}


@pytest.mark.parametrize("method", ["joint", "refit", "local"])
def test_what_is_left_of_a_pruned_layer_is_fitted_to_the_whole_of_its_output(method: str) -> None:
    """Its experts are some of the originals, and its tokens pick among these alone."""
    name, kept = "qwen3_moe", [1, 2, 5]
    model = build(name)
    data = batches(name, model, number=8)
    student = _merged(name, model, data, experts=3)
    layer, original = matching_layers(student, model)[0][0]
    for place, expert in enumerate(kept):
        for role, tensor in LAYOUTS[name].before(original.container, expert).items():
            LAYOUTS[name].after(layer.container, place)[role].copy_(tensor)
    seen = capture_inputs([original], data)[original.name]
    place = torch.tensor([kept.index(e) if e in kept else len(kept) for e in range(original.num_experts + 1)])
    picks = place[seen.index]
    own = replace(seen, index=picks, weights=seen.weights.masked_fill(picks == len(kept), 0))
    fit = LayerFit(layer.name, layer.container, original.read(), own, seen, None)
    before = layer_error(fit, layer.container, fit.target(), torch.arange(len(seen)))
    report = REPAIR[method](fit, RepairConfig(method=method, steps=20, **PLAIN))
    assert report.lossy == [0, 1, 2]
    assert report.after < report.before
    assert layer_error(fit, layer.container, fit.target(), torch.arange(len(seen))) < 0.98 * before


def test_rows_of_tokens_routed_elsewhere_ask_each_expert_for_what_its_members_say() -> None:
    name = "qwen3_moe"
    model = build(name)
    data = batches(name, model, number=3)
    student = _merged(name, model, data)
    layer, original = matching_layers(student, model)[0][0]
    seen = capture_inputs([original], data)[original.name]
    stored = seen.mapped(layer.expert_map)
    fit = LayerFit(layer.name, layer.container, original.read(), stored, seen, layer.expert_map)
    pruned = replace(fit, expert_map=None)
    assert with_elsewhere(pruned, 0.5) is pruned, "whose experts have no members"
    longer, weights = with_elsewhere(fit, 0.5), seen.weights.double()
    mass = [float(weights[seen.index == member].sum()) for member in range(original.num_experts)]
    assert torch.equal(longer.target()[: len(seen)], fit.target())
    for expert in range(layer.num_experts):
        own, gates = fit.tokens_of(expert)
        token, added = longer.tokens_of(expert)
        token, added = token[len(own) :], added[len(own) :]
        assert not longer.inputs.held_out[token].any()
        assert float(added.square().sum()) == pytest.approx(0.5 * float(gates.square().sum()), rel=1e-5)
        members = [member for member, place in enumerate(layer.expert_map) if place == expert]
        for row in token[:5].tolist():
            x = longer.inputs.hidden[row]
            place = int((seen.hidden == x).all(1).nonzero()[0])
            assert not seen.held_out[place]
            assert not set(members) & set(seen.index[place].tolist())
            parts = [mass[m] / sum(mass[k] for k in members) * _said(original, m, x) for m in members]
            wanted = torch.stack(parts).sum(0)
            torch.testing.assert_close(longer.target()[row], wanted * added[0], rtol=1e-4, atol=1e-5)


def _said(original: MoELayer, member: int, x: torch.Tensor) -> torch.Tensor:
    expert = LAYOUTS["qwen3_moe"].before(original.container, member)
    return expert["down"] @ (torch.nn.functional.silu(expert["gate"] @ x) * (expert["up"] @ x))


def test_no_ridge_is_smaller_than_so_few_tokens_allow() -> None:
    config = RepairConfig(ridges=(0.01, 0.1, 1.0), caution=2.0)
    assert config.ladder(unknowns=50, tokens=1000) == [0.1, 1.0]
    assert config.ladder(unknowns=50, tokens=10**6) == [0.01, 0.1, 1.0]
    assert config.ladder(unknowns=50, tokens=0) == [100.0]


@pytest.mark.slow
def test_wide_experts_get_the_same_weights_without_a_matrix_of_the_width_squared() -> None:
    model = build("gpt_oss")
    data = batches("gpt_oss", model, number=3)
    students = [_merged("gpt_oss", model, data) for _ in range(2)]
    config = RepairConfig(ridges=(0.1, 1.0), **PLAIN)
    repair_experts(students[0], model, data, config)
    repair_experts(students[1], model, data, RepairConfig(ridges=(0.1, 1.0), memory_limit=5000, **PLAIN))
    for one, other in zip(*(moe_layers(student) for student in students), strict=True):
        assert relative_error(other.container.down_proj, one.container.down_proj) < 1e-5
        assert relative_error(other.container.down_proj_bias, one.container.down_proj_bias) < 1e-5


def test_experts_that_saw_no_token_keep_their_weights_and_the_report_says_so() -> None:
    model = build("gpt_oss")
    for layer in moe_layers(model):
        layer.router.bias[6:] = -100
    data = batches("gpt_oss", model, number=3)
    student = _merged("gpt_oss", model, data, grouping=groups_of([0, 0, 1, 1, 2, 2, 3, 3], [0, 2, 4, 6]))
    seen = {layer.name: capture_inputs([layer], data)[layer.name] for layer in moe_layers(model)}
    assert all(int((one.index >= 6).sum()) == 0 for one in seen.values())
    before = [layer.container.down_proj[3].clone() for layer in moe_layers(student)]
    report = repair_experts(student, model, data)
    for layer, weight, name in zip(moe_layers(student), before, report.layers, strict=True):
        assert torch.equal(layer.container.down_proj[3], weight)
        assert 3 in report.layers[name].unchanged
        last = report.layers[name].experts[3]
        assert (last.tokens, last.ridge, last.relative) == (0, None, (None, None))
        assert not last.weight.numel(), "the model holds it"
    assert RepairReport(**json.loads(json.dumps(report.to_dict()))).seconds == report.seconds


@pytest.mark.parametrize("method", ["refit", "joint"])
def test_few_rows_are_told_with_the_number_that_would_do(method: str) -> None:
    model = build("mixtral")
    data = batches("mixtral", model, number=1)
    rows, needed = sum(len(batch["input_ids"]) for batch in data), {}
    student = _merged("mixtral", model, data)
    for ((layer, original),) in matching_layers(student, model):
        seen, medians = capture_inputs([original], data)[original.name], []
        for expert in range(layer.num_experts):
            reached = [layer.expert_map[pick] == expert for pick in seen.index.flatten().tolist()]
            medians.append(int((torch.tensor(reached).view_as(seen.index).any(1) & ~seen.held_out).sum()))
        median = sum(sorted(medians)[1:3]) // 2  # of four
        needed[layer.name] = rows * 2 * layer.intermediate_size / median, median
    name, (number, median) = max(needed.items(), key=lambda item: item[1])
    report = repair_experts(student, model, data, RepairConfig(method=method))
    enough = replace(report, rows=rows, layers={name: replace(report.layers[name], unknowns=median // 2)})
    assert enough.few_rows() is None
    shifted = replace(report, config={**report.config, "method": "mean_shift"})
    assert shifted.few_rows() is None, "one shift takes no more than a mean"
    told = report.few_rows() or ""
    assert told.startswith(f"{rows} calibration rows leave the experts of {name} some {median} tokens each")
    assert "for 24 hidden units" in told
    assert number <= int(told.split(": about ")[1].split(" rows")[0].replace(",", "")) <= 1.1 * number + 1
    assert told in report.step().lines


def test_layers_that_share_their_experts_are_repaired_once_on_the_tokens_of_both() -> None:
    model = build("mixtral")
    layers = moe_layers(model)
    for name, parameter in layers[0].parameters:
        setattr(layers[1].container, name, parameter)
    data = batches("mixtral", model, number=4)
    student = _merged("mixtral", model, data)
    done: list[tuple[str, int, int]] = []
    report = repair_experts(student, model, data, progress=lambda *arguments: done.append(arguments))
    ours = moe_layers(student)
    assert ours[0].container.down_proj is ours[1].container.down_proj
    assert list(report.layers) == [layers[0].name, *(layer.name for layer in layers[2:])]
    first, other = report.layers[layers[0].name], report.layers[layers[2].name]
    assert (first.tokens, first.held_out) == (2 * other.tokens, 2 * other.held_out)
    assert done[:2] == [(layers[0].name, 0, len(layers)), (layers[0].name, 2, len(layers))]
    assert done[-1] == (layers[-1].name, len(layers), len(layers))


def test_whole_sequences_are_held_out_and_only_tokens_that_count_are_kept() -> None:
    model = build("qwen3_moe")
    data = batches("qwen3_moe", model, number=3, batch_size=5)
    layer = moe_layers(model)[0]
    seen = capture_inputs([layer], iter(data))[layer.name]
    lengths = [int(row.sum()) for batch in data for row in batch["attention_mask"]]
    held_out = [number % 5 == 4 for number in range(15)]
    expected = [held for length, held in zip(lengths, held_out, strict=True) for _ in range(length)]
    assert seen.held_out.tolist() == expected
    one = capture_inputs([layer], [inputs("qwen3_moe", model, batch_size=1)])[layer.name]
    assert one.held_out.tolist() == [False] * 8 + [True]
    few = capture_inputs([layer], [inputs("qwen3_moe", model, batch_size=2)])[layer.name]
    assert few.held_out.tolist() == [False] * 12 + [True] * 9


def _equal(one: LayerInputs, other: LayerInputs) -> bool:
    return all(torch.equal(getattr(one, key), getattr(other, key)) for key in vars(one))


def test_layers_are_captured_in_as_many_passes_as_memory_asks_for() -> None:
    model = build("mixtral")
    data, layers = batches("mixtral", model), moe_layers(model)
    together = capture_inputs(layers, data)
    passes: list[int] = []
    handle = model.register_forward_pre_hook(lambda *_: passes.append(1))
    size = 2 * 8 * 12 * (layers[0].hidden_size * 4 + 12 * 2)
    for limit, expected in ((1, len(layers)), (2 * size, (len(layers) + 1) // 2), (len(layers) * size, 1)):
        passes.clear()
        streamed = list(stream_inputs([[layer] for layer in layers], data, memory_limit=limit))
        assert len(passes) == expected * len(data)
        assert [group[0].name for group, _ in streamed] == list(together)
        assert all(_equal(found, together[group[0].name]) for group, found in streamed)
    handle.remove()


@pytest.mark.parametrize("name", ["mixtral", "switch_transformers"])
def test_a_bfloat16_model_stays_one(name: str) -> None:
    model = build(name).bfloat16()
    data = batches(name, model, number=4)
    for method in ("refit", "local"):
        student = _merged(name, model, data)
        report = repair_experts(student, model, data, RepairConfig(method=method, steps=30))
        assert all(layer.container.down_proj.dtype == torch.bfloat16 for layer in moe_layers(student))
        assert all(layer.after < layer.before for layer in report.layers.values())


@pytest.mark.parametrize("method", ["refit", "joint", "mean_shift", "local"])
def test_what_judges_a_fit_that_is_not_final_is_not_fitted_to(method: str) -> None:
    """What other held-out tokens were, the fit (of "local", the start of its training) is the same."""
    name = "switch_transformers"
    model = build(name)
    data = batches(name, model, number=4)
    ours, layer = _merged(name, model, data), moe_layers(model)[0]
    seen = capture_inputs([layer], data)[layer.name]
    other = replace(seen, hidden=seen.hidden.clone())
    other.hidden[seen.held_out] *= 1.05
    config = RepairConfig(method=method, steps=1, learning_rate=1e-12, ridges=(0.1,))

    def fitted(inputs: LayerInputs, **options: bool) -> torch.Tensor:
        student = copy.deepcopy(ours)
        ((merged, original), *_) = matching_layers(student, model)[0]
        stored = inputs.mapped(merged.expert_map)
        layer_fit = LayerFit(layer.name, merged.container, original.read(), stored, inputs, merged.expert_map)
        REPAIR[method](layer_fit, config, **options)
        return merged.container.down_proj.clone()

    apart: dict[str, bool] = {} if method == "local" else {"final": False}
    first, second = fitted(seen, **apart), fitted(other, **apart)
    assert not torch.equal(first, moe_layers(ours)[0].container.down_proj)
    torch.testing.assert_close(first, second, rtol=0, atol=1e-7)
    if apart:
        assert (fitted(seen) - fitted(other)).abs().max() > 1e-6, "a final fit is one to all tokens"


def test_what_cannot_be_repaired_is_refused_before_a_forward() -> None:
    model = build("mixtral")
    data = batches("mixtral", model)
    student, other = _merged("mixtral", model, data), build("qwen3_moe")
    small = _merged("mixtral", model, data, skip="*.0.*")
    for one in (model, student, other):
        one.register_forward_pre_hook(lambda *_: pytest.fail("a forward ran"))
    with pytest.raises(ValueError, match="calibration set is empty"):
        repair_experts(student, model, [])
    with pytest.raises(ValueError, match="no merged layer to repair"):
        repair_experts(model, model, data)
    with pytest.raises(ValueError, match="is compressed already"):
        repair_experts(student, small, data)
    with pytest.raises(ValueError, match="is no compressed Qwen3MoeForCausalLM: it was made of another model"):
        repair_experts(student, other, data)
    next(iter(small.config.mcsmoe["layers"].values()))["expert_map"] = [0, 1, 2, 3, 3, 3, 3]
    with pytest.raises(ValueError, match=r"is \(7, 32, 24\) in the merged model and \(8, 32, 24\)"):
        repair_experts(small, model, data)
    with pytest.raises(ValueError, match=r"Unknown repair method 'refitt'\. Did you mean 'refit'\?"):
        RepairConfig(method="refitt")
    with pytest.raises(ValueError, match="steps=0 must be a positive whole number"):
        RepairConfig(steps=0)
    with pytest.raises(ValueError, match=r"ridges=\(0\.0,\) must be positive"):
        RepairConfig(ridges=(0.0,))
    with pytest.raises(ValueError, match=r"elsewhere=-1\.0 must not be negative"):
        RepairConfig(elsewhere=-1.0)
    with pytest.raises(ValueError, match="expert by expert"):
        RepairConfig(method="refit", sequential=True)
    assert repair_experts(student, model, data, RepairConfig(method="none")).layers == {}


def test_nan_in_activations_and_a_norm_behind_the_experts_are_named() -> None:
    model = build("mixtral")
    data = batches("mixtral", model)
    student = _merged("mixtral", model, data)
    model.model.layers[1].input_layernorm.weight[0] = torch.nan
    with pytest.raises(ValueError, match=r"inputs of model\.layers\.1\.\S+ are not finite"):
        repair_experts(student, model, data)
    model = build("muse_spark")
    data = batches("muse_spark", model)
    with pytest.raises(ValueError, match="norm behind each expert"):
        repair_experts(_merged("muse_spark", model, data), model, data, RepairConfig(method="joint"))


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield
