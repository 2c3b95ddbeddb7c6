"""One pass over calibration data: the sums that the methods of a merge read, of every layer of experts."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_mcsmoe.calibration.gradients import check_loss, gradients_of_experts, loss_of
from hf_mcsmoe.calibration.shares import Filler, check_layout, own_batches, summed
from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.data.batches import as_batches
from hf_mcsmoe.layers.backward import Backward, backward_of
from hf_mcsmoe.layers.batches import Batch, run_routed
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.finite import check_weights
from hf_mcsmoe.layers.layer import MoELayer
from hf_mcsmoe.methods.config import MergeConfig
from hf_mcsmoe.methods.routed import Routed
from hf_mcsmoe.methods.statistics import STATISTICS, gradient_names, with_tokens
from hf_mcsmoe.methods.view import Sums, advice


def collect_statistics(
    model: PreTrainedModel | Layers,
    batches: Iterable[Batch],
    needs: Iterable[str] | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    place: Path | None = None,
) -> RoutingStatistics:
    """Run a model once over `batches` and sum what its routers and experts do (paper, section 3.1).

    Each of several processes runs a share of the batches, see `together`, and all get the sums over all of them. Only
    tokens that count are summed: not padding (`attention_mask`, `decoder_attention_mask`), not positions outside
    the loss (`labels` of -100), not tokens that an expert's capacity turned away. The model is left as it was.

    Args:
        model: a model, or its layers where they are found already.
        batches: dictionaries for `model(**batch)`; masks [batch, length]. With a `tokenizer` also texts, or rows of a
            data set; see `as_batches`.
        needs: the statistics to sum, by name, e.g. `MergeConfig(saliency="gate").needs`; no others are. None for
            those that the default methods read. Some run one backward pass a batch, of the loss that the model gives
            with the batch's `labels`, or else of predicting each next token. Of layers that share their experts the
            first to run takes the gradients, which are those of all, and the others zeros.
        place: a folder on the disk of which hidden states lie meanwhile, where gradients are read of a model that is
            read block by block; None for memory. They are those between all blocks, of all batches.

    Raises:
        TypeError: what is passed as batches is none; see `as_batches`.
        ValueError: no batches or no layers, an unknown statistic, one that no data tell, a model without experts or
            one that is compressed already, or sums that are not finite.
    """
    names = with_tokens(MergeConfig().needs if needs is None else needs)
    check_collected(names)
    layers = Layers.of(model).uncompressed()
    if not layers:
        raise ValueError("There is no layer to collect statistics of: pass the model, or some of its layers.")
    check_loss(layers.model, names)
    check_layout(layers.model, names)
    batches = as_batches(batches, layers.model, tokenizer)
    statistics = RoutingStatistics(layers.fingerprint, {layer.name: Sums() for layer in layers})
    if (own := own_batches(layers.model, batches)) is not None:
        _collect(layers, own, statistics, names, place)
    summed(statistics)
    check_finite(statistics, layers)
    return statistics


def _collect(
    layers: Layers, batches: Iterable[Batch], statistics: RoutingStatistics, names: list[str], place: Path | None
) -> None:
    """Sum over the batches of this process."""
    if gradient_names(names):
        _collect_with_gradients(layers, batches, statistics, names, place)
        return

    def take(layer: MoELayer, routed: Routed, counted: torch.Tensor | None, batch: Batch) -> None:
        if not isinstance(batch, Filler):
            _add(statistics, layer, routed, counted, names)

    run_routed(layers, batches, take)


def check_collected(names: Iterable[str]) -> None:
    """Raise ValueError where a statistic is none that tokens tell."""
    for name in names:
        if not STATISTICS.find(name).from_data:
            raise ValueError(f"{name} cannot be collected: {advice(name)}.")


def _add(
    statistics: RoutingStatistics, layer: MoELayer, routed: Routed, counted: torch.Tensor | None, names: list[str]
) -> None:
    """Add what some statistics say of one forward to the sums of a layer."""
    add_sums(statistics[layer.name], routed, counted, names)


def add_sums(sums: Sums, routed: Routed, counted: torch.Tensor | None, names: Iterable[str]) -> None:
    """Add what statistics, by name, say of the tokens of one forward that count to sums."""
    routed = counted_tokens(routed, counted)
    for name in names:
        sums.add(name, STATISTICS.find(name).function(routed).cpu())


def counted_tokens(routed: Routed, counted: torch.Tensor | None) -> Routed:
    """Return the tokens that count and that no expert's capacity turned away."""
    kept = ~routed.turned_away
    if counted is not None:
        kept &= counted.to(kept.device)
    return routed if kept.all() else routed.where(kept)


def _collect_with_gradients(
    layers: Layers, batches: Iterable[Batch], statistics: RoutingStatistics, names: list[str], place: Path | None
) -> None:
    """Sum statistics of each batch, some after its backward pass."""
    taken = WithGradients(statistics, names, backward_of(layers, place))
    with gradients_of_experts(layers), taken.backward.installed():
        run_routed(layers, batches, taken.take, taken.step)


class WithGradients:
    """Sums statistics of forwards, and after their backward passes those that read gradients."""

    def __init__(self, statistics: RoutingStatistics, names: list[str], backward: Backward) -> None:
        """Add to the sums of some layers, whose experts take gradients, what statistics by name say."""
        self.statistics, self.backward, self.late = statistics, backward, gradient_names(names)
        self.early = [name for name in names if name not in self.late]
        self._kept: list[tuple[MoELayer, Routed, torch.Tensor | None]] = []

    def step(self, model: PreTrainedModel, batch: Batch) -> None:
        """Run a forward and its backward pass; see `run_routed`."""
        with torch.enable_grad():
            self.backward.run(lambda: loss_of(model, batch), self._add)

    def take(self, layer: MoELayer, routed: Routed, counted: torch.Tensor | None, batch: Batch) -> None:
        """Take what a layer sees in a forward; see `RoutedSink`."""
        if not self.backward.is_last():
            return
        with torch.no_grad():
            _add(self.statistics, layer, routed, counted, self.early)
        self._kept.append((layer, routed, counted))

    @torch.no_grad()
    def _add(self) -> None:
        for layer, routed, counted in self._kept:
            routed = replace(routed, open_experts=layer.read_with_gradients)
            _add(self.statistics, layer, routed, counted, self.late)
            # They are the sums over all layers that share the experts: the others find zeros.
            for _, parameter in layer.parameters:
                parameter.grad = None
        self._kept.clear()


def check_finite(statistics: RoutingStatistics, layers: Layers | None = None) -> None:
    """Raise ValueError where a sum is NaN or infinite; where a weight of the layers' model is, name that one."""
    for layer, sums in statistics.layers.items():
        if bad := [name for name, value in sums.items() if not value.isfinite().all()]:
            if layers is not None:
                check_weights(layers.source)
            raise ValueError(
                f"{layer} gave values that are not finite (in {', '.join(bad)}): the model overflows, or held NaN "
                "then. Load it in bfloat16 or float32."
            )
