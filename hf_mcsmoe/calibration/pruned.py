"""What the experts of a layer would see if it was pruned: its router, cut, over inputs that were kept."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from hf_mcsmoe.calibration.inputs import LayerInputs
from hf_mcsmoe.layers.batches import evaluation_mode
from hf_mcsmoe.layers.layer import MoELayer
from hf_mcsmoe.layers.offloading import is_hooked
from hf_mcsmoe.layers.source import InMemory
from hf_mcsmoe.methods.routed import Routed
from hf_mcsmoe.modeling.pruned_mcsmoe import check_cut, cut_router
from hf_mcsmoe.modeling.router_mcsmoe import is_jetmoe, router_beside

# Tokens that are routed at a time.
CHUNK = 4096
# Sums in another order may turn a near tie: so many of the tokens may be routed otherwise, and weights be off so far.
TURNED, NEAR = 0.02, 0.02


def pruned_inputs(layer: MoELayer, kept: Sequence[int], inputs: LayerInputs) -> LayerInputs:
    """Return the same tokens with the picks and weights that the router gives when only the experts `kept` are left.

    A copy of the family's own router is cut and run on the experts' inputs. Where the router of the original, run on
    them, does not give the picks that were captured, nothing can be said of a cut one.

    Args:
        layer: of the original model.
        kept: experts, rising.
        inputs: what the layer's experts see, as `capture_inputs` found it; picks of `kept` count from 0 in the result.

    Raises:
        ValueError: the router cannot be cut so, or its picks do not follow from the inputs of the experts alone.
    """
    check_cut(layer.model, layer.name, layer.num_experts, kept)
    block = layer.name if is_jetmoe(layer.container) else layer.name.rpartition(".")[0]
    if is_hooked(layer.model):
        raise ValueError(f"{layer.name} is offloaded, so no router of it can be tried: load the model on one device.")
    with layer.source.loaded(block), torch.no_grad(), evaluation_mode(layer.model):
        if not _agree(_routed(_apart(layer), inputs.hidden), inputs, layer.num_experts):
            raise ValueError(
                f"The picks of {layer.name} do not follow from the inputs of its experts: its router reads something "
                "else, scales them, or has a capacity that turned tokens away. What a cut router would pick is not "
                "known without running the model: merge the layer."
            )
        index, weights = _routed(_apart(layer, kept), inputs.hidden)
    return replace(inputs, index=index, weights=weights.to(inputs.weights.dtype))


def _apart(layer: MoELayer, kept: Sequence[int] | None = None) -> MoELayer:
    """Return the layer as one of a model of its block alone, with a router of its own that is cut to `kept`.

    All but the router is shared with the layer.
    """
    router, whole = router_beside(layer.model, layer.name), is_jetmoe(layer.container)
    block = layer.container if whole else layer.block
    shared = {id(child): child for child in block.children() if child is not router}
    model = nn.Module()
    model.add_module("block", copy.deepcopy(block, cast(dict[int, Any], shared)))
    path = "block" if whole else "block.experts"
    if kept is not None:
        cut_router(model, path, layer.num_experts, kept)
    count = layer.num_experts if kept is None else len(kept)
    return replace(layer, name=path, source=InMemory(cast(Any, model)), num_experts=count)


class _SeenError(Exception):
    """Ends a forward whose router has spoken."""


def _routed(layer: MoELayer, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the picks int [T, K] and weights [T, K] that the layer's router gives tokens [T, D], each by itself."""
    found: list[tuple[torch.Tensor, torch.Tensor]] = []

    def see(routed: Routed) -> None:
        weights = routed.weights.masked_fill(~routed.reached, 0)
        if routed.scale is None:
            found.append((routed.index.cpu(), weights.cpu()))
        raise _SeenError

    block, device = layer.model.get_submodule("block"), next(layer.router.parameters()).device
    handles = layer.routed(see)
    try:
        for part in hidden.split(CHUNK):
            _run(block, part[:, None].to(device))
    finally:
        for handle in handles:
            handle.remove()
    if len(found) < -(-len(hidden) // CHUNK):
        return torch.empty(0, 1, dtype=torch.long), torch.empty(0, 1)
    index, weights = (torch.cat(parts) for parts in zip(*found, strict=True))
    return index, weights


def _run(block: nn.Module, hidden: torch.Tensor) -> None:
    try:
        block(hidden)
    except _SeenError:
        return
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return  # a block that needs more than its input, which is told by what was not found


def _agree(routed: tuple[torch.Tensor, torch.Tensor], inputs: LayerInputs, num_experts: int) -> bool:
    """Tell whether picks and weights are those of `inputs`, but for a few near ties."""
    index, weights = routed
    if index.shape != inputs.index.shape:
        return False
    ours, theirs = (
        torch.zeros(len(index), num_experts + 1).scatter_add_(1, picks, gates.float())
        for picks, gates in ((index, weights), (inputs.index, inputs.weights))
    )
    off = (ours - theirs).abs().amax(1) > NEAR * theirs.abs().amax(1).clamp(min=1e-6)
    return bool(off.float().mean() <= TURNED)
