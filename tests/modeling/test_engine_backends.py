"""Merged models under the rules by which vLLM's Transformers backend puts its kernels in the place of experts.

Read from vLLM 0.33: the child `experts` of a block, all of whose parameters have three axes, gives way to a table of
as many experts as the configuration counts; a stacked tensor fills it from the first place on; a gate that has more
than a `weight` is called as it is, for (logits, weights, ids). What is not filled is whatever the memory held.
"""

import copy

import pytest
import torch
from helpers import logits
from merged import Example, example
from pruned import pruned
from torch import nn

from hf_mcsmoe import moe_layers
from hf_mcsmoe.layers.layer import MoELayer

FAMILIES = ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3"]
COUNTS = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts")


class Table(nn.Module):
    """What takes the experts' place: E of them, of which a checkpoint's stacks fill the first G."""

    def __init__(self, experts: nn.Module, num_experts: int) -> None:
        super().__init__()
        self.used: set[int] = set()
        for name, stack in experts.named_parameters():
            table = stack.new_full((num_experts, *stack.shape[1:]), float("nan"))
            for place, expert in enumerate(stack.detach().unbind()):
                table[place] = expert
            self.register_buffer(name, table)

    def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Sum the picks one by one; the same expert may be picked twice."""
        output = torch.zeros_like(hidden)
        for token, pick in ((token, pick) for token in range(len(index)) for pick in range(index.shape[1])):
            expert = int(index[token, pick])
            self.used.add(expert)
            gate, up = (self.gate_up_proj[expert] @ hidden[token]).chunk(2)
            output[token] += weights[token, pick] * (self.down_proj[expert] @ (nn.functional.silu(gate) * up))
        return output


def counted(model: nn.Module) -> int:
    """Return the number of experts by which an engine sizes its tables."""
    config = model.config.get_text_config()
    return next(value for name in COUNTS if (value := getattr(config, name, None)) is not None)


def check_layer(layer: MoELayer) -> None:
    """Check what the backend looks for."""
    own, experts = dict(layer.block.named_children()), layer.container
    assert own["experts"] is experts
    assert all(parameter.ndim == 3 for parameter in experts.parameters())
    assert type(experts).__module__.startswith("transformers.models.")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_merged_model_runs_on_tables_that_its_stacks_fill_in_part(name: str) -> None:
    case = example(name)
    found = _on_tables(case)
    assert counted(case.merged) > max(layer.num_experts for layer in moe_layers(case.merged))
    for layer in moe_layers(case.merged):
        assert "expert_map" in dict(layer.router.named_buffers())  # which tells the backend to leave the gate alone
    torch.testing.assert_close(found, logits(case.merged, case.batch), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pruned_model_of_unlike_counts_does_as_well(name: str) -> None:
    case = pruned(name)
    assert len({layer.num_experts for layer in moe_layers(case.merged)}) > 1
    torch.testing.assert_close(_on_tables(case), logits(case.merged, case.batch), atol=1e-5, rtol=1e-4)


def _on_tables(case: Example) -> torch.Tensor:
    model = copy.deepcopy(case.merged)
    tables = []
    for layer in moe_layers(model):
        check_layer(layer)
        tables.append((layer.num_experts, Table(layer.container, counted(model))))
        layer.block.experts = tables[-1][1]
    found = logits(model, case.batch)
    assert all(max(table.used) < count for count, table in tables)
    return found
