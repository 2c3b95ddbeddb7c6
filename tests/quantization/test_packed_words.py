"""Packed weights against the package whose layout they have, and experts that compute with them."""

import copy
import functools
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from helpers import batches, relative_error
from layouts import LAYOUTS
from merged import example

from hf_mcsmoe import LoSparseConfig, compact, decompose_experts, moe_layers
from hf_mcsmoe.layers.fused import fused_sizes, fused_views, plain
from hf_mcsmoe.methods.choice import Grid
from hf_mcsmoe.modeling import quantized_mcsmoe
from hf_mcsmoe.modeling.forward_mcsmoe import eager_experts_forward, grouped_experts_forward
from hf_mcsmoe.modeling.modeling_mcsmoe import decomposable
from hf_mcsmoe.modeling.quantized_mcsmoe import QuantizedMatrix, unpacked
from hf_mcsmoe.quantization.codes import Codes
from hf_mcsmoe.quantization.packing import expert_bytes, store_codes

T, K = 11, 3
FAST = ["mixtral", "gpt_oss", "switch_transformers"]
NAMES = [
    pytest.param(name, marks=[] if name in FAST else pytest.mark.slow)
    for name in (name.replace("llama4", "llama4_text") for name in LAYOUTS)
]


def _codes(shape: tuple[int, int], grid: Grid, seed: int, dtype: torch.dtype = torch.bfloat16) -> Codes:
    """Make codes of every value there is."""
    generator = torch.Generator().manual_seed(seed)
    (out, width), low = shape, -(2 ** (grid.bits - 1))
    values = torch.randint(low, -low, shape, generator=generator).to(torch.int8)
    groups = out, width // grid.group_size
    zero = None if grid.symmetric else torch.randint(low, -low, groups, generator=generator).to(torch.int8)
    scale = (torch.rand(groups, generator=generator) + 0.5) / 2**grid.bits / width**0.5
    return Codes(values, scale.to(dtype), zero, grid)


@pytest.mark.parametrize("width", [1, 7, 24, 32, 40, 100])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_are_those_of_compressed_tensors(bits: int, width: int) -> None:
    values = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, 5, width)).to(torch.int8)
    words = pack_to_int32(values, bits)
    assert torch.equal(unpacked(words, bits, width), values)
    assert torch.equal(unpacked(words, bits, width), unpack_from_int32(words, bits, values.shape))


@pytest.mark.parametrize("tokens", [0, 1, 2, 15, 16, 33])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_product_in_blocks_is_that_with_the_whole_matrix(
    bits: int, symmetric: bool, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, width = 37, 64
    block = 8 * width // quantized_mcsmoe.PLACES[bits] // torch.get_num_threads()
    monkeypatch.setattr(quantized_mcsmoe, "BLOCK", block)  # of 8 rows, the last of 5
    codes = _codes((out, width), Grid(bits, 16, symmetric), tokens)
    zero = None if codes.zero is None else pack_to_int32(codes.zero, bits, packed_dim=0)
    matrix = QuantizedMatrix(pack_to_int32(codes.values, bits), codes.scale, zero, bits, width)
    generator, whole = torch.Generator().manual_seed(0), codes.dequantized(torch.float64)
    for one, values in ((matrix, whole.mT), (matrix.mT, whole)):
        states = torch.randn(tokens, len(values), generator=generator)
        torch.testing.assert_close(one.product(states).double(), states.double() @ values, rtol=0, atol=5e-6)
        gradient = torch.randn(tokens, len(values.mT), generator=generator)
        states.requires_grad_()
        (found,) = torch.autograd.grad(one(states), states, gradient)
        torch.testing.assert_close(found.double(), gradient.double() @ values.mT, rtol=0, atol=5e-6)


def _quantized(experts: Any, bits: int | list[int], group_size: int, *, symmetric: bool = False) -> dict[str, list]:
    """Quantize all matrices of experts to made codes; returns the dense matrices by name."""
    low_rank = [f"{name}_{part}" for name in experts.low_rank for part in ("u", "v", "s")]
    dense = [name for name in ("gate_up_proj", "up_proj", "down_proj") if name in experts._parameters]
    matrices = {}
    for number, name in enumerate(low_rank + dense):
        rows, width = experts.matrix_rows(name), experts.dense_shape(name)[-1]
        each = bits if isinstance(bits, list) else [bits] * len(rows)
        group = group_size if width % group_size == 0 else width
        codes = [
            _codes((out, width), Grid(one, group, symmetric), 10 * number + expert)
            for expert, (out, one) in enumerate(zip(rows, each, strict=True))
        ]
        store_codes(experts, name, codes)
        matrices[name] = [one.dequantized(torch.float32) for one in codes]
    return matrices


@functools.cache
def _merged(name: str, is_low_rank: bool = False) -> Any:
    case = example(name)
    if not is_low_rank:
        return case.merged
    config = LoSparseConfig(rank=3, keep=0.3)
    return compact(decompose_experts(copy.deepcopy(case.merged), config, batches(name, case.base), prune=True))


def _experts(name: str, is_low_rank: bool = False) -> Any:
    """Return a layer's experts, of the layer that stores the most."""
    layer = max(moe_layers(_merged(name, is_low_rank)), key=lambda layer: layer.num_experts)
    return decomposable(copy.deepcopy(layer.container))


def _dense(experts: Any, matrices: dict[str, list]) -> Any:
    """Return experts that hold the dense matrices that quantized ones stand for."""
    experts = copy.deepcopy(experts)
    for name, values in matrices.items():
        if name.endswith("_s"):
            getattr(experts, name).data.copy_(torch.cat(values))
        else:
            transposed = experts.is_transposed and name in ("gate_up_proj", "up_proj", "down_proj")
            stack = torch.stack(values)
            getattr(experts, name).data.copy_(stack.mT if transposed else stack)
    return experts


def _routing(experts: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return inputs [T, D], picks int [T, K] and weights [T, K]. The last expert gets no token, some picks none."""
    generator = torch.Generator().manual_seed(0)
    count, hidden_size, _ = fused_sizes(experts)
    hidden = torch.randn(T, hidden_size, generator=generator)
    index = torch.stack([torch.randperm(count - 1, generator=generator) for _ in range(T)])[:, :K]
    index[0, 0] = index[3] = count
    return hidden, index, torch.rand(index.shape, generator=generator) * (index < count)


@pytest.mark.parametrize("is_low_rank", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_experts_compute_with_what_the_codes_stand_for(name: str, is_low_rank: bool) -> None:
    plain_experts = _experts(name, is_low_rank)
    quantized = copy.deepcopy(plain_experts)
    dense = _dense(plain_experts, _quantized(quantized, 4, 8))
    hidden, index, weights = _routing(dense)
    inputs = [(hidden.clone().requires_grad_(), weights.clone().requires_grad_()) for _ in range(3)]
    results = [
        forward(experts, states, index, gates)
        for forward, experts, (states, gates) in zip(
            (eager_experts_forward, eager_experts_forward, grouped_experts_forward),
            (dense, quantized, quantized),
            inputs,
            strict=True,
        )
    ]
    gradients = [
        torch.autograd.grad(result.square().sum(), given) for result, given in zip(results, inputs, strict=True)
    ]
    for found in (1, 2):
        assert relative_error(results[found].detach(), results[0].detach()) < 1e-5
        assert relative_error(gradients[found][0], gradients[0][0]) < 1e-5
        reached = weights != 0
        assert relative_error(gradients[found][1][reached], gradients[0][1][reached]) < 1e-5
    assert results[0].any()
    for role, tensor in fused_views(quantized).tensors.items():
        torch.testing.assert_close(tensor, fused_views(dense).tensors[role].float())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [8, 3, 2, [8, 3, 4, 2, 4]])
def test_every_number_of_bits_computes(bits: int | list[int], symmetric: bool) -> None:
    experts = _experts("mixtral")
    quantized, bits = copy.deepcopy(experts), bits if isinstance(bits, int) else bits[: experts.num_experts]
    dense = _dense(experts, _quantized(quantized, bits, 8, symmetric=symmetric))
    routing = _routing(dense)
    for forward in (eager_experts_forward, grouped_experts_forward):
        assert relative_error(forward(quantized, *routing), forward(dense, *routing).detach()) < 1e-5
    each = bits if isinstance(bits, list) else [bits] * experts.num_experts
    for name in ("gate_up_proj", "down_proj"):
        shape = experts.dense_shape(name)[1:]
        held = sum(tensor.nbytes for key, tensor in quantized.named_parameters() if key.startswith(name))
        assert held == sum(expert_bytes(shape, Grid(one, 8, symmetric), torch.float32) for one in each)


def test_casts_leave_scales_and_words() -> None:
    experts = _experts("mixtral")
    matrices = _quantized(experts, 4, 8)
    for cast in (experts.float(), experts.half(), experts.to(torch.bfloat16), experts.to(torch.float64)):
        dtypes = {name.rpartition("_")[2]: tensor.dtype for name, tensor in cast.named_parameters()}
        assert dtypes == {"packed": torch.int32, "scale": torch.bfloat16, "zero": torch.int32}
    for name, values in matrices.items():
        assert torch.equal(
            torch.stack([plain(matrix) for matrix in experts.quantized_stack(name)]), torch.stack(values)
        )
    assert not any(parameter.requires_grad for parameter in experts.parameters())
