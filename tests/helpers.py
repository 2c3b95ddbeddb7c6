"""What several test files share: calibration batches, logits, and a grouping of the test's own choice."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import inputs
from transformers import PreTrainedModel
from transformers.integrations import moe

from hf_mcsmoe.methods.experts import Experts
from hf_mcsmoe.methods.grouping import Groups
from hf_mcsmoe.methods.view import LayerView, Sums

Batch = dict[str, torch.Tensor]
# The fixture that runs a command line and returns its exit code, standard output and error.
Run = Callable[..., tuple[int, str, str]]


def batches(name: str, model: PreTrainedModel, number: int = 2, batch_size: int = 8) -> list[Batch]:
    """Make batches of different text; two of them are enough tokens for a plan without a warning."""
    return [inputs(name, model, batch_size=batch_size, seed=seed) for seed in range(number)]


@torch.no_grad()
def logits(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Run the model."""
    return model(**batch).logits


def groups_of(expert_map: list[int], dominant: list[int]) -> Callable[..., Groups]:
    """Return a grouping method that answers with these groups for every layer."""
    return lambda view, saliency, similarity, groups: Groups(expert_map, dominant)


def state(model: PreTrainedModel) -> dict[str, Any]:
    """Return all of a model that somebody might change by mistake, to be compared with `==`."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {
        "classes": [type(module) for module in model.modules()],
        "training": [module.training for module in model.modules()],
        "hooks": [list(getattr(module, hook)) for module in model.modules() for hook in hooks],
        "forwards": ["forward" in vars(module) for module in model.modules()],
        "config": (type(model.config), model.config.to_dict()),
        "parameters": model.num_parameters(),
        "tensors": [(name, id(value), value.dtype, value.requires_grad) for name, value in tensors],
        "bits": [hash(value.detach().cpu().flatten().view(torch.uint8).numpy().tobytes()) for _, value in tensors],
        "gradients": [parameter.grad for parameter in model.parameters()],
    }


def costs_on_card(card: str) -> dict[str, list[str]]:
    """Return the cells of the table of costs by their row; the head's is ""."""
    table = card.partition("## Costs\n\n")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    return {label: cells for label, *cells in rows if not label.startswith("---")}


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the distance between two tensors over the norm of the expected one."""
    return float((value.double() - expected.double()).norm() / expected.double().norm())


def tensor(values: list[float]) -> torch.Tensor:
    """Return a vector in double precision."""
    return torch.tensor(values, dtype=torch.float64)


Expert = dict[str, torch.Tensor]


def expert(roles: tuple[str, ...], width: int, hidden_size: int = 8, seed: int = 0) -> Expert:
    """Make random weights of one expert with `width` neurons."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"down": (hidden_size, width), "down_bias": (hidden_size,), "gate_bias": (width,), "up_bias": (width,)}
    return {role: torch.randn(shapes.get(role, (width, hidden_size)), generator=generator) for role in roles}


def shuffled(weights: Expert, seed: int) -> Expert:
    """Return the same expert with its neurons in another order."""
    order = torch.randperm(len(weights["up"]), generator=torch.Generator().manual_seed(seed))
    moved = {"down": weights["down"][:, order], "down_bias": weights.get("down_bias")}
    return {role: moved[role] if role in moved else value[order] for role, value in weights.items()}


def swiglu(gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
    """Return the hidden states of the tests' experts."""
    return up.relu() if gate is None else torch.nn.functional.silu(gate) * up


def view_of(experts: list[Expert] | None = None, *, seed: int = 0, num_experts: int = 0, **sums: Any) -> LayerView:
    """Return what a method sees of a layer with these experts or sums."""
    given = experts or []
    stacked = Experts({role: [item[role] for item in given] for role in (given[0] if given else {})}, swiglu)
    return LayerView(Sums(sums), num_experts or len(given), seed, lambda: stacked)


class _Poisoned(torch.autograd.Function):
    """Rows from a place on are NaN, and so are their gradients."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, start: int) -> torch.Tensor:
        ctx.start = start
        return values.index_fill(0, torch.arange(start, len(values)), math.nan)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0].index_fill(0, torch.arange(ctx.start, len(gradients[0])), math.nan), None


def poison_grouped_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let grouped products leave NaN in rows of no group, forward and backward, as memory may hold on a device."""
    product = moe._grouped_linear

    def poisoned(states: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        end = int(offs[-1])
        return _Poisoned.apply(product(_Poisoned.apply(states, end), weight, offs, **kwargs), end)

    monkeypatch.setattr(moe, "_grouped_linear", poisoned)
