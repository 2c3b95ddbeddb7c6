"""One pass over calibration data: the routing statistics of every layer of experts."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.layers.batches import Batch, evaluation_mode, mask_of, on_device, token_masks
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.layer import MoELayer
from hf_mcsmoe.methods.config import REGISTRIES
from hf_mcsmoe.methods.registry import unknown
from hf_mcsmoe.methods.statistics import LayerStatistics


def collect_statistics(
    model: PreTrainedModel | Layers, batches: Iterable[Batch], *, methods: Sequence[str | Callable] | None = None
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
    layers = Layers.of(model).uncompressed()
    model = layers.model
    statistics = RoutingStatistics(
        layers.fingerprint, {layer.name: LayerStatistics.empty(layer.num_experts) for layer in layers}
    )
    masks: dict[str, torch.Tensor] = {}
    count = 0
    with torch.no_grad(), evaluation_mode(model), _observed(layers, statistics, masks):
        for count, batch in enumerate(batches, start=1):  # noqa: B007
            masks.clear()
            masks.update(token_masks(model, batch))
            model(**on_device(batch, model))
    if count == 0:
        raise ValueError("The calibration set is empty: pass at least one batch.")
    check_finite(statistics)
    return statistics


@contextlib.contextmanager
def _observed(layers: Layers, statistics: RoutingStatistics, masks: dict[str, torch.Tensor]) -> Iterator[None]:
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


def check_finite(statistics: RoutingStatistics) -> None:
    """Raise ValueError where a sum is NaN or infinite."""
    for name, layer in statistics.layers.items():
        if not (layer.logit_gram.isfinite().all() and layer.gate_sum.isfinite().all()):
            raise ValueError(
                f"The router of {name} gave values that are not finite: the model holds NaN or overflows."
            )
