"""Grouped products of low rank + sparse experts: the sums of the loop in every layout, one graph for all batches."""

import copy
import functools
from typing import Any

import pytest
import torch
from helpers import batches, poison_grouped_products, relative_error
from layouts import LAYOUTS
from merged import example
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from hf_mcsmoe import LoSparseConfig, LoSparseLinear, decompose_experts
from hf_mcsmoe.evaluation.costs import FORMULAS
from hf_mcsmoe.layers.fused import dense
from hf_mcsmoe.low_rank.decompose import compact_weight
from hf_mcsmoe.modeling import forward_mcsmoe
from hf_mcsmoe.modeling.forward_mcsmoe import eager_experts_forward, grouped_experts_forward
from hf_mcsmoe.modeling.losparse_mcsmoe import low_rank_modules

T, K = 11, 3
FORMS = ["training", "compact", "no_rows"]
NAMES = [name.replace("llama4", "llama4_text") for name in LAYOUTS]


@functools.cache
def _decomposed(name: str) -> Any:
    case = example(name)
    config = LoSparseConfig(rank=3, keep=0.3)
    return decompose_experts(copy.deepcopy(case.merged), config, batches(name, case.base), prune=True)


def _experts(name: str, form: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return one layer's experts; they keep different numbers of rows, and one of them none."""
    _, module = next(low_rank_modules(_decomposed(name)))
    module = copy.deepcopy(module).to(dtype)
    for number, weight in enumerate(module.low_rank):
        kept = getattr(module, f"{weight}_kept")
        kept[0] = False
        kept[1, :: 2 + number] = True
        kept.logical_and_(torch.tensor(form != "no_rows"))
        if form != "training":
            compact_weight(module, weight, kept)
    return module


def _routing(experts: Any, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return inputs [T, D], picks int [T, K] and weights [T, K]. The last expert gets no token, some picks none."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(T, experts.down_proj_u.shape[1], generator=generator)
    index = torch.stack([torch.randperm(experts.num_experts - 1, generator=generator) for _ in range(T)])[:, :K]
    index[0, 0] = index[3] = experts.num_experts
    weights = torch.rand(index.shape, generator=generator) * (index < experts.num_experts)
    return hidden, index, weights


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("frozen_input", [False, True])
def test_the_sums_and_gradients_are_those_of_the_loop(
    name: str, form: str, frozen_input: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison_grouped_products(monkeypatch)
    experts = _experts(name, form)
    hidden, index, weights = _routing(experts)
    trained = [tensor for tensor in experts.parameters() if tensor.requires_grad]
    results = []
    for forward in (eager_experts_forward, grouped_experts_forward):
        inputs = [hidden.clone().requires_grad_(not frozen_input), weights.clone().requires_grad_()]
        output = forward(experts, inputs[0], index, inputs[1])
        wanted = [*inputs[frozen_input:], *trained]
        gradients = torch.autograd.grad(output.square().sum(), wanted, allow_unused=True)
        filled = [
            torch.zeros_like(one) if found is None else found for one, found in zip(wanted, gradients, strict=True)
        ]
        router = 0 if frozen_input else 1
        filled[router] = filled[router].masked_fill(
            weights == 0, 0
        )  # what the picks of no expert tell the router is unused
        results.append([output.detach(), *filled])
    for found, expected in zip(results[1], results[0], strict=True):
        assert relative_error(found, expected) < 1e-5 if expected.any() else not found.any()
    assert results[0][0].any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weight", ["gate_up_proj", "down_proj"])
def test_the_dense_matrix_is_what_the_factors_multiply_by(weight: str, form: str) -> None:
    for factors in _experts("mixtral", form).factors(weight):
        identity = torch.eye(factors.v.shape[1])
        torch.testing.assert_close(factors(identity).T, dense(factors))
        assert dense(factors).shape == (len(factors.u), factors.v.shape[1])


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "switch_transformers"])
def test_bfloat16_is_as_near_to_float32_as_the_loop(name: str) -> None:
    hidden, index, weights = _routing(_experts(name, "compact"))
    exact = eager_experts_forward(_experts(name, "compact"), hidden, index, weights)
    experts = _experts(name, "compact", torch.bfloat16)
    inputs = (hidden.bfloat16(), index, weights.bfloat16())
    looped, grouped = (
        relative_error(forward(experts, *inputs).detach(), exact.detach())
        for forward in (eager_experts_forward, grouped_experts_forward)
    )
    assert grouped < 1.2 * looped < 0.05
    assert grouped_experts_forward(experts, *inputs).dtype == torch.bfloat16


@pytest.mark.parametrize("form", FORMS)
def test_it_executes_the_operations_of_the_loop_but_for_rows_of_zeros(form: str) -> None:
    experts = _experts("mixtral", form).requires_grad_(False)
    hidden, index, weights = _routing(experts)
    counts = []
    for forward in (eager_experts_forward, grouped_experts_forward):
        with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
            forward(experts, hidden, index, weights)
        counts.append(counter.get_total_flops())
    routed = int((index < experts.num_experts).sum())
    rank = -experts.low_rank["down_proj"]["rank"] % forward_mcsmoe.ALIGNMENT  # columns of zeros
    more = sum(2 * routed * rank * (experts_part.shape[1] + width) for experts_part, width in _shapes(experts))
    if form == "compact":
        for weight, entry in experts.low_rank.items():
            zeros = [-rows % forward_mcsmoe.ALIGNMENT for rows in entry["kept_rows"]]
            filled = sum(zeros[pick] for pick in index.flatten().tolist() if pick < experts.num_experts)
            more += 2 * filled * getattr(experts, f"{weight}_s").shape[-1]
    assert counts[1] == counts[0] + more


@pytest.mark.parametrize("limit", [1, 2, 8])
def test_few_levels_of_kept_rows_give_the_same_sums(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward_mcsmoe, "MAX_LEVELS", limit)
    experts = _experts("mixtral", "compact")
    found, expected = (
        forward(experts, *_routing(experts)).detach() for forward in (grouped_experts_forward, eager_experts_forward)
    )
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize(
    ("counts", "levels"),
    [
        ([0, 8, 9, 300], [0, 8, 16, 304]),
        ([307] * 8, [312] * 8),
        # More than eight numbers: 3072, 1536, 768, 384, 192, 96, 48, 24, 16, 8.
        ([0, 1, 20, 30, 40, 90, 170, 370, 400, 1000, 3072], [0, 8, 24, 48, 48, 96, 192, 384, 768, 1536, 3072]),
    ],
)
def test_levels_of_kept_rows(counts: list[int], levels: list[int]) -> None:
    assert forward_mcsmoe.row_levels(counts) == levels


def _shapes(experts: Any) -> list[tuple[torch.Tensor, int]]:
    return [(getattr(experts, f"{name}_u"), getattr(experts, f"{name}_v").shape[-1]) for name in experts.low_rank]


# The library asks for versions of torch through a cache while it is traced.
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["training", "compact"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "switch_transformers"])
def test_one_graph_serves_all_batches_of_a_size(name: str, form: str, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    experts = _experts(name, form, dtype).requires_grad_(False)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(experts, backend=counter, fullgraph=True)
    for seed in range(4):
        hidden, index, weights = _routing(experts, seed)
        inputs = (hidden.to(dtype), index, weights.to(dtype))
        tolerance = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 5e-2, "rtol": 5e-2}
        torch.testing.assert_close(compiled(*inputs), experts(*inputs), **tolerance)
    assert counter.frame_count == 1


@pytest.mark.parametrize("kept", [None, 0, 2])
def test_a_linear_layer_compiles_to_one_graph(kept: int | None) -> None:
    torch._dynamo.reset()
    layer = LoSparseLinear.from_linear(nn.Linear(6, 4), torch.randn(4, 2), torch.randn(2, 6))
    if kept is not None:
        layer.weight_kept[kept:] = False
        compact_weight(layer, "weight", layer.weight_kept)
    states = torch.randn(2, 5, 6)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(states), layer(states))
