"""The tiny models that the other tests stand on: each builds, is reproducible, and depends on each expert it uses."""

import pytest
import torch
from families import Family, build, construct, families, inputs
from torch import nn
from transformers import PreTrainedModel

EVERY = pytest.mark.parametrize("family", families(), ids=lambda family: family.name)
INTERFACE = [family for family in families() if family.interface]
FUSED = pytest.mark.parametrize("family", INTERFACE, ids=lambda family: family.name)


def _experts(model: PreTrainedModel) -> dict[str, nn.Module]:
    flags = ("has_gate", "is_transposed", "down_proj")
    return {name: module for name, module in model.named_modules() if all(hasattr(module, flag) for flag in flags)}


@torch.no_grad()
def _logits(name: str, model: PreTrainedModel) -> torch.Tensor:
    return model(**inputs(name, model)).logits


def _routed(name: str, model: PreTrainedModel) -> dict[nn.Module, torch.Tensor]:
    """Return, per experts module that runs, the experts that some token selects with a gate other than zero."""
    routed = {}

    def record(module: nn.Module, arguments: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        _, index, weights = arguments
        routed[module] = index[weights != 0].unique()

    handles = [module.register_forward_pre_hook(record) for module in _experts(model).values()]
    _logits(name, model)
    for handle in handles:
        handle.remove()
    return routed


@EVERY
def test_build_gives_a_small_model_with_reproducible_finite_logits(family: Family) -> None:
    model = build(family.name)
    logits = _logits(family.name, model)
    assert type(model).__name__ == family.model_class
    assert model.num_parameters() < 1_000_000
    assert not model.training
    assert model.dtype == torch.float32
    assert logits.isfinite().all()
    assert logits.std() > 0.01
    assert torch.equal(logits, _logits(family.name, model))
    assert torch.equal(logits, _logits(family.name, construct(family.name)))
    assert not torch.equal(logits, _logits(family.name, construct(family.name, seed=1)))


@EVERY
def test_interface_says_whether_experts_carry_the_run_time_flags(family: Family) -> None:
    assert (len(_experts(build(family.name))) >= 2) == family.interface


@EVERY
def test_inputs_hold_text_only_and_one_padded_row(family: Family) -> None:
    batch = inputs(family.name, build(family.name), batch_size=3, sequence_length=7)
    assert all(tensor.shape[:2] == (3, 7) for tensor in batch.values())
    assert batch["attention_mask"].sum(1).tolist() == [7, 7, 4]
    assert batch.keys() <= {"input_ids", "inputs_embeds", "attention_mask", "decoder_input_ids"}


@FUSED
def test_each_layer_depends_on_an_expert_that_it_uses(family: Family) -> None:
    model = build(family.name)
    logits = _logits(family.name, model)
    routed = _routed(family.name, model)
    assert len(routed) >= 2
    for module, used in routed.items():
        down_proj = module.get_parameter("down_proj").data
        original = down_proj.clone()
        down_proj[used[-1]] = 0
        assert not torch.allclose(_logits(family.name, model), logits, atol=1e-4), f"expert {used[-1]}"
        down_proj.copy_(original)


def test_families_are_sorted_and_name_distinct_classes() -> None:
    names = [family.name for family in families()]
    assert names == sorted(set(names))
    assert len({family.model_class for family in families()}) == len(names)
