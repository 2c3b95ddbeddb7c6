"""Mergings and alignments on whole models of several layouts, and published methods on models with planted copies."""

import pytest
import torch
from families import build
from helpers import Batch, batches, logits, relative_error
from layouts import LAYOUTS
from transformers import PreTrainedModel

from hf_mcsmoe import MergeConfig, MoELayer, collect_statistics, compress, moe_layers
from hf_mcsmoe.methods.alignment import ALIGNMENT
from hf_mcsmoe.methods.experts import output_of
from hf_mcsmoe.methods.merging import MERGING, merge_group
from hf_mcsmoe.presets import PRESETS

# Gated; transposed, interleaved and biased; ungated in a dictionary; with scaled inputs.
FAMILIES = ["mixtral", "gpt_oss", "switch_transformers", "llama4"]


def _labelled(name: str, model: PreTrainedModel) -> list[Batch]:
    data = batches(name, model)
    return [{**batch, "labels": batch["input_ids"]} for batch in data] if name == "switch_transformers" else data


def _with_copies(name: str, *, noise: float = 0, shuffle: bool = True) -> PreTrainedModel:
    """Make a model whose experts are copies of half of them in another order, with the same rows of the router."""
    model = build(name)
    generator = torch.Generator().manual_seed(0)
    for layer in moe_layers(model):
        order = torch.randperm(8, generator=generator).view(4, 2).tolist()
        for one, other in order:
            ours, theirs = (LAYOUTS[name].before(layer.container, number) for number in (one, other))
            width = len(ours["up"])
            neurons = torch.randperm(width, generator=generator) if shuffle else torch.arange(width)
            for role, value in theirs.items():
                shared = role == "down_bias"
                moved = ours[role] if shared else ours[role][:, neurons] if role == "down" else ours[role][neurons]
                value.copy_(moved + noise * torch.randn(value.shape, generator=generator))
            rows = getattr(layer.router, "classifier", layer.router).weight.data
            rows[other] = rows[one]
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_every_merging_and_alignment_brings_copies_together_in_every_layout(name: str) -> None:
    model = _with_copies(name)
    layer = moe_layers(model)[0]
    first, second = _copies(layer)
    states = torch.randn(40, layer.hidden_size, generator=torch.Generator().manual_seed(1))
    needs = {need for registry in (MERGING, ALIGNMENT) for method in registry for need in registry.needs(method)}
    sums = collect_statistics(model, _labelled(name, model), needs)[layer.name]
    with layer.view(sums, 0) as view, torch.no_grad():
        wanted = view.experts.output(first, states, normed=False)
        for alignment in (method for method in ALIGNMENT if method != "none"):
            order = ALIGNMENT[alignment](view, first, second)
            for merging in (method for method in MERGING if method != "zipit_within"):
                merged = merge_group(MERGING[merging], view, [first, second], [0.7, 0.3], [None, order])
                found = output_of(merged, view.experts.hidden_of(merged, states))
                assert relative_error(found, wanted) < 1e-3, (alignment, merging)


def _copies(layer: MoELayer) -> tuple[int, int]:
    """Return the first expert, and the one that is its copy."""
    rows = getattr(layer.router, "classifier", layer.router).weight.data
    return 0, next(other for other in range(1, 8) if torch.equal(rows[other], rows[0]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt_oss", "switch_transformers"])
def test_models_are_merged_by_every_method(name: str) -> None:
    model = build(name)
    data, seen = _labelled(name, model), []
    needs = {need for registry in (MERGING, ALIGNMENT) for method in registry for need in registry.needs(method)}
    statistics = collect_statistics(model, data, [*needs, *MergeConfig().needs])
    for number, merging in enumerate(MERGING):
        alignment = list(ALIGNMENT)[number % len(list(ALIGNMENT))]
        config = MergeConfig(experts=4, merging=merging, alignment=alignment)
        merged = compress(model, data, config, statistics=statistics)
        seen.append(logits(merged, data[0]))
        assert seen[-1].isfinite().all()
    assert len({round(float(values.double().sum()), 3) for values in seen}) == len(seen), "no two are the same"


PLANTED = {"uncurl": True, "hc-smoe": False, "dek": False, "sub-moe": False}


@pytest.mark.parametrize("preset", PLANTED)
def test_planted_copies_are_found_and_the_merged_model_is_the_original(preset: str) -> None:
    """Where nothing is aligned, neurons are in the same order; a router of one row a group would pick others."""
    model = _with_copies("mixtral", shuffle=PLANTED[preset])
    data = batches("mixtral", model)
    merged = compress(model, data, **PRESETS[preset].options(4, router="map"))
    torch.testing.assert_close(logits(merged, data[0]), logits(model, data[0]), rtol=1e-5, atol=1e-5)


def test_copies_with_a_little_noise_are_found_by_spectral_clustering() -> None:
    model = _with_copies("mixtral", noise=1e-4)
    data = batches("mixtral", model)
    merged = compress(model, data, **PRESETS["uncurl"].options(4))
    for layer, old in zip(moe_layers(merged), moe_layers(model), strict=True):
        rows = old.router.weight.data
        alike = [{j for j in range(8) if torch.equal(rows[i], rows[j])} for i in range(8)]
        found = [{j for j in range(8) if layer.expert_map[j] == layer.expert_map[i]} for i in range(8)]
        assert found == alike
    assert float((logits(merged, data[0]) - logits(model, data[0])).abs().max()) < 1e-3


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "switch_transformers"])
def test_fisher_information_is_that_of_autograd(name: str) -> None:
    model = build(name)
    data = _labelled(name, model)
    sums = collect_statistics(model, data, ["fisher", "unit_fisher"]).layers
    twin = build(name)
    expected: dict[str, torch.Tensor] = {}
    for batch in data:
        twin.zero_grad()
        labels = batch.get("labels", batch["input_ids"]).masked_fill(batch["attention_mask"] == 0, -100)
        twin(**{**batch, "labels": batch.get("labels", labels)}).loss.backward()
        for layer in moe_layers(twin):
            for parameter in layer.container.parameters():
                parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.square()
            for index in range(8):
                parts = LAYOUTS[name].before(layer.container, index)
                key = f"{layer.name}/{index}"
                total = torch.stack([value.double().sum() for value in parts.values()]).sum()
                units = sum(
                    value.double().flatten(1).sum(1) if value.ndim > 1 else value.double()
                    for value in (v.T if role == "down" else v for role, v in parts.items() if role != "down_bias")
                )
                expected[key] = expected.get(key, 0) + torch.cat([total[None], units])
        twin = build(name)
    for layer, held in sums.items():
        for index in range(8):
            found = torch.cat([held["fisher"][index : index + 1], held["unit_fisher"][index]])
            torch.testing.assert_close(found, expected[f"{layer}/{index}"], rtol=1e-3, atol=1e-12)
