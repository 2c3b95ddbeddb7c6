"""Tiny models whose experts are stored in few bits."""

import copy
import functools
from dataclasses import replace
from typing import Any

from helpers import batches
from merged import Example, example
from transformers import PreTrainedModel

from hf_mcsmoe import LoSparseConfig, compact, decompose_experts, moe_layers
from hf_mcsmoe.methods.choice import Grid
from hf_mcsmoe.modeling.convert import write_description
from hf_mcsmoe.modeling.forward_mcsmoe import unstacked
from hf_mcsmoe.modeling.modeling_mcsmoe import decomposable
from hf_mcsmoe.quantization.nearest import nearest
from hf_mcsmoe.quantization.packing import store_codes

STACKS = ("gate_up_proj", "up_proj", "down_proj")
GROUP = 8


def dense_names(experts: Any) -> list[str]:
    """Return the names of the matrices that are not stored in few bits, factors included."""
    names = [name for name in STACKS if name in experts._parameters]
    factors = [f"{name}_{part}" for name in experts.low_rank for part in ("u", "v", "s")]
    return names + [name for name in factors if name in experts._parameters]


def quantize(experts: Any, bits: int | list[int], *, symmetric: bool = False) -> None:
    """Store all matrices of merged experts in few bits, in place; with a list, those that can in bits per expert."""
    experts = decomposable(experts)
    for name in dense_names(experts):
        is_stack = name in STACKS
        matrices = unstacked(experts)[name] if is_stack else experts.by_expert(name)
        rows = len(experts.matrix_rows(name))
        each = (
            bits
            if isinstance(bits, list) and not name.endswith("_s")
            else [max([bits] if isinstance(bits, int) else bits)] * rows
        )
        codes = []
        for matrix, number in zip(matrices, each, strict=True):
            matrix = matrix.mT if is_stack and experts.is_transposed else matrix
            group = GROUP if matrix.shape[-1] % GROUP == 0 else matrix.shape[-1]
            codes.append(nearest(matrix.detach().contiguous(), Grid(number, group, symmetric)))
        store_codes(experts, name, codes)


def quantize_model(model: PreTrainedModel, bits: int = 4, *, symmetric: bool = False) -> PreTrainedModel:
    """Store all matrices of all merged experts of a model in few bits, in place; returns it."""
    for layer in moe_layers(model):
        quantize(layer.container, bits, symmetric=symmetric)
    write_description(model)
    return model


@functools.cache
def decomposed(name: str) -> PreTrainedModel:
    """Return the merged tiny model of a family as low rank + sparse, in the compact form."""
    case = example(name)
    config = LoSparseConfig(rank=3, keep=0.3)
    return compact(decompose_experts(copy.deepcopy(case.merged), config, batches(name, case.base), prune=True))


@functools.cache
def quantized_example(name: str, bits: int = 4) -> Example:
    """Return the merged tiny model of a family in few bits."""
    case = example(name)
    return replace(case, merged=quantize_model(copy.deepcopy(case.merged), bits))


@functools.cache
def by_expert(name: str) -> Example:
    """Return the merged tiny model of a family with bits of their own for the experts of each layer."""
    case, number = example(name), (4, 8, 3, 2)
    model = copy.deepcopy(case.merged)
    for layer in moe_layers(model):
        quantize(layer.container, [number[expert % len(number)] for expert in range(layer.num_experts)])
    write_description(model)
    return replace(case, name=f"{name}, bits by expert", merged=model)
