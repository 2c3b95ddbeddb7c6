"""One pass over calibration data: the routing statistics of every layer of experts."""

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_mcsmoe.adapters import MoELayer, moe_layers
from hf_mcsmoe.config import REGISTRIES
from hf_mcsmoe.offloading import onloaded
from hf_mcsmoe.registry import unknown
from hf_mcsmoe.statistics import LayerStatistics, RoutingStatistics

Batch = Mapping[str, Any]


def collect_statistics(
    model: PreTrainedModel, batches: Iterable[Batch], *, methods: Sequence[str | Callable] | None = None
) -> RoutingStatistics:
    """Run `model` once over `batches` and sum what its routers do (paper, section 3.1).

    Only tokens that count are summed: not padding (`attention_mask`, `decoder_attention_mask`), not positions outside
    the loss (`labels` of -100), not tokens that an expert's capacity turned away. The model is left as it was.

    Args:
        batches: dictionaries for `model(**batch)`; masks [batch, length].
        methods: the methods that will use the statistics, by name or as callables. Sums beyond the usual ones are to
            be collected only for methods that declare them, which none does now; names are checked all the same,
            before the first forward.

    Raises:
        ValueError: no batches, an unknown method, a model without experts or one that is compressed already, or
            router logits that are not finite.
    """
    known = [name for registry in REGISTRIES.values() for name in registry]
    for method in methods or ():
        if not callable(method) and method not in known:
            raise ValueError(unknown("method", method, known))
    layers = uncompressed_layers(model)
    statistics = RoutingStatistics(
        fingerprint(layers), {layer.name: LayerStatistics.empty(layer.num_experts) for layer in layers}
    )
    masks: dict[str, torch.Tensor] = {}
    count = 0
    with torch.no_grad(), as_it_was(model), _observed(layers, statistics, masks):
        for count, batch in enumerate(batches, start=1):  # noqa: B007
            masks.clear()
            masks.update(token_masks(model, batch))
            model(**on_device(batch, model))
    if count == 0:
        raise ValueError("The calibration set is empty: pass at least one batch.")
    check_finite(statistics)
    return statistics


def uncompressed_layers(model: PreTrainedModel) -> list[MoELayer]:
    """Return the model's layers of experts.

    Raises:
        ValueError: the model is compressed already.
    """
    layers = moe_layers(model)
    if any(layer.merged for layer in layers) or getattr(model.config, "mcsmoe", None):
        raise ValueError(
            "This model is compressed already. Its routers still speak of the original experts, which are gone: merge "
            "the original model again with a smaller `experts` instead of merging twice."
        )
    return layers


def fingerprint(layers: list[MoELayer]) -> str:
    """Return a hash of the layers' names and sizes, of their routers and of the model's norms and biases.

    Cheap to read, changed by any training, and the same in float32 and in bfloat16.
    """
    digest = hashlib.sha256()
    for layer in layers:
        digest.update(f"{layer.name} {layer.num_experts} {layer.hidden_size} {layer.intermediate_size}".encode())
        _add_weights(digest, layer.router)
    for module in layers[0].model.modules():
        if not any(module.children()) and any(parameter.ndim == 1 for parameter in module.parameters()):
            _add_weights(digest, module)
    return digest.hexdigest()


def _add_weights(digest: Any, module: nn.Module) -> None:
    with onloaded(module):
        for parameter in module.parameters():
            values = parameter.detach().to("cpu", torch.bfloat16).contiguous()
            digest.update(values.view(torch.int16).numpy().tobytes())


def token_masks(model: PreTrainedModel, batch: Batch) -> dict[str, torch.Tensor]:
    """Return which tokens count, bool [batch * length], on the side of the "encoder" and of the "decoder".

    Where nothing goes to a decoder apart, both sides are the same. A side without a mask counts every token.
    """
    names_of_sides: dict[str, tuple[str, ...]] = dict.fromkeys(("encoder", "decoder"), ("attention_mask", "labels"))
    inputs = batch.get("decoder_input_ids")
    if getattr(model.config, "is_encoder_decoder", False) or inputs is not None:
        names_of_sides = {"encoder": ("attention_mask",), "decoder": ("decoder_attention_mask", "labels")}
    masks = {}
    for side, names in names_of_sides.items():
        given = {name: batch[name] for name in names if batch.get(name) is not None}
        if "labels" in given and given["labels"].ndim == 1:  # one label a text, as for classification
            del given["labels"]
        if "decoder_attention_mask" in given and inputs is not None:
            # A block diffusion model's covers the prompt before its canvas as well.
            given["decoder_attention_mask"] = given["decoder_attention_mask"][:, -inputs.shape[1] :]
        parts = [values != (-100 if name == "labels" else 0) for name, values in given.items()]
        if any(part.ndim != 2 for part in parts):
            raise ValueError(f"{' and '.join(given)} must be [batch, length] for statistics; pass a padding mask.")
        if parts:
            masks[side] = torch.stack(parts).all(0).flatten()
    return masks


@contextlib.contextmanager
def _observed(layers: list[MoELayer], statistics: RoutingStatistics, masks: dict[str, torch.Tensor]) -> Iterator[None]:
    """Feed every forward of the layers to their statistics for the time of the block."""
    handles = []
    try:
        for layer in layers:
            handles += layer.observe(_observer(layer, statistics[layer.name], masks))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _observer(layer: MoELayer, sums: LayerStatistics, masks: dict[str, torch.Tensor]) -> Any:
    def observe(logits: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> None:
        sums.update(logits, index, weights, mask_of(layer, masks, len(logits)))

    return observe


def side_of(layer: MoELayer) -> str:
    """Return the side that a layer is on, "encoder" or "decoder"; without an encoder all are on the latter."""
    return "encoder" if "encoder" in layer.name.split(".") else "decoder"


def mask_of(layer: MoELayer, masks: dict[str, torch.Tensor], tokens: int) -> torch.Tensor | None:
    """Return which of the tokens that a layer saw count, bool [T]; None for all.

    Raises:
        ValueError: the batch's mask, see `token_masks`, has another number of tokens.
    """
    mask = masks.get(side_of(layer))
    if mask is not None and len(mask) != tokens:
        raise ValueError(
            f"{layer.name} saw {tokens} tokens, the batch's mask has {len(mask)}: pass masks of the shape of the "
            "layer's input."
        )
    return mask


@contextlib.contextmanager
def as_it_was(model: PreTrainedModel) -> Iterator[None]:
    """Put the model into evaluation mode (no router noise, no dropout) and back afterwards, module by module.

    Switch casts its routers to float32 in the first forward; that is undone as well.
    """
    modes = [(module, module.training) for module in model.modules()]
    dtypes = [(parameter, parameter.dtype) for parameter in model.parameters()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, dtype in dtypes:
            if parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)


def on_device(batch: Batch, model: PreTrainedModel) -> dict[str, Any]:
    """Return the batch with its tensors where the model is."""
    device = model.device if model.device.type != "meta" else torch.device("cpu")
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def check_finite(statistics: RoutingStatistics) -> None:
    """Raise ValueError where a sum is NaN or infinite."""
    for name, layer in statistics.layers.items():
        if not (layer.logit_gram.isfinite().all() and layer.gate_sum.isfinite().all()):
            raise ValueError(
                f"The router of {name} gave values that are not finite: the model holds NaN or overflows."
            )
