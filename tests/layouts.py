"""Where the experts of a family lie, written down by hand: views of one expert's matrices, neurons in rows or columns.

`gate`, `up` [F, D], `down` [D, F], `gate_bias`, `up_bias` [F], `down_bias` [D]; writing to a view writes to the model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Expert = dict[str, torch.Tensor]


def gated(experts: Any, index: int) -> Expert:
    """Read the layout that most families have: gate above up."""
    gate, up = experts.gate_up_proj.data[index].chunk(2)
    return {"gate": gate, "up": up, "down": experts.down_proj.data[index]}


def ungated(experts: Any, index: int) -> Expert:
    """Read experts of two matrices."""
    return {"up": experts.up_proj.data[index], "down": experts.down_proj.data[index]}


def transposed(experts: Any, index: int) -> Expert:
    """Read matrices that are stored the other way round."""
    gate, up = experts.gate_up_proj.data[index].T.chunk(2)
    return {"gate": gate, "up": up, "down": experts.down_proj.data[index].T}


def transposed_biased(experts: Any, index: int) -> Expert:
    """Read transposed matrices with biases."""
    gate_bias, up_bias = experts.gate_up_proj_bias.data[index].chunk(2)
    biases = {"gate_bias": gate_bias, "up_bias": up_bias, "down_bias": experts.down_proj_bias.data[index]}
    return transposed(experts, index) | biases


def interleaved_biased(experts: Any, index: int) -> Expert:
    """Read transposed matrices with biases, where a gate and an up neuron take turns."""
    columns, biases = experts.gate_up_proj.data[index], experts.gate_up_proj_bias.data[index]
    return {
        "gate": columns[:, ::2].T,
        "up": columns[:, 1::2].T,
        "down": experts.down_proj.data[index].T,
        "gate_bias": biases[::2],
        "up_bias": biases[1::2],
        "down_bias": experts.down_proj_bias.data[index],
    }


def dictionary(experts: Any, index: int) -> Expert:
    """Read a dictionary of dense layers."""
    dense = experts[f"expert_{index}"]
    return {"up": dense.wi.weight.data, "down": dense.wo.weight.data}


def parallel(block: Any, index: int) -> Expert:
    """Read JetMoE's two stacks."""
    gate, up = block.input_linear.weight.data[index].chunk(2)
    return {"gate": gate, "up": up, "down": block.output_linear.weight.data[index]}


def joined(experts: Any, index: int) -> Expert:
    """Read DBRX's rows of all experts in one matrix, `down` transposed."""
    width = experts.ffn_hidden_size
    gate, up, down = (
        getattr(experts.mlp, name).data[index * width : (index + 1) * width] for name in ("w1", "v1", "w2")
    )
    return {"gate": gate, "up": up, "down": down.T}


@dataclass(frozen=True)
class Layout:
    """How to read expert `index` of an experts container before, and expert `index` of a merged one after."""

    before: Callable[[Any, int], Expert]
    after: Callable[[Any, int], Expert]


LAYOUTS = {
    "mixtral": Layout(gated, gated),
    "qwen3_moe": Layout(gated, gated),
    "nemotron_h": Layout(ungated, ungated),
    "aria": Layout(transposed, transposed),
    "openai_privacy_filter": Layout(transposed_biased, transposed_biased),
    "gpt_oss": Layout(interleaved_biased, interleaved_biased),
    "muse_spark": Layout(gated, gated),
    "step3p7": Layout(gated, gated),
    "longcat_flash": Layout(gated, gated),
    "zaya": Layout(gated, gated),
    "switch_transformers": Layout(dictionary, ungated),
    "llama4": Layout(transposed, gated),
    "jetmoe": Layout(parallel, gated),
    "dbrx": Layout(joined, gated),
}
