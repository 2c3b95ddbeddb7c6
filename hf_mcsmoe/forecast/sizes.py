"""The sizes of a model that memory follows from, counted on the meta device."""

from dataclasses import dataclass

from torch import nn

from hf_mcsmoe.layers.checkpoint import converted_names
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.streaming import blocks


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model in memory, and its sizes by their letters; of layers and blocks the largest count.

    `weights` of all; `outside` the blocks; `block` of a block; `experts` of a layer; `converted` of what is stored as
    something else (each expert by itself, or in few bits) and is made from it, in all and, `joined`, the largest
    weight that is. `itemsize` of a weight, `block_count` of blocks, `vocabulary` V.
    """

    weights: int
    outside: int
    block: int
    experts: int
    converted: int
    joined: int
    itemsize: int
    block_count: int
    layers: int
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    vocabulary: int


def sizes_of(layers: Layers, *, is_quantized: bool = False) -> Sizes:
    """Return the sizes of a model; works on the meta device.

    Args:
        is_quantized: whether it is stored in few bits, so that every weight is made from something else.
    """
    model, largest = layers.model, max(layers, key=lambda layer: layer.num_parameters)
    of_model, state = blocks(model), {name: value.nbytes for name, value in _own(model).items()}
    inside = tuple(f"{path}." for path in of_model)
    made = state if is_quantized else converted_names(model, state)
    head = model.get_output_embeddings()
    return Sizes(
        weights=sum(state.values()),
        outside=sum(size for name, size in state.items() if not name.startswith(inside)),
        block=max(sum(value.nbytes for value in _own(block).values()) for block in of_model.values()),
        experts=sum(value.nbytes for _, value in largest.parameters),
        converted=sum(state[name] for name in made),
        joined=max((state[name] for name in made), default=0),
        itemsize=model.dtype.itemsize,
        block_count=len(of_model),
        layers=len(layers),
        num_experts=largest.num_experts,
        top_k=largest.top_k or 1,
        hidden_size=largest.hidden_size,
        intermediate_size=largest.intermediate_size,
        vocabulary=0 if head is None else head.weight.shape[0],
    )


def _own(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a module by name, those that have several once."""
    return dict(module.named_parameters())
