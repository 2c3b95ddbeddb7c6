"""The curves of all layers: each part of a choice fitted as in the final model, its error and its effect measured."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from hf_mcsmoe.calibration.curves import LayerCurves, Part
from hf_mcsmoe.calibration.inputs import LayerInputs, stream_inputs
from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.layers.batches import Batch, evaluation_mode
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.layer import MoELayer
from hf_mcsmoe.low_rank.decompose import decompose_container
from hf_mcsmoe.methods.choice import Choice, Grid
from hf_mcsmoe.methods.config import MergeConfig
from hf_mcsmoe.methods.experts import Experts
from hf_mcsmoe.plan import LayerPlan, MergePlan, plan_merge
from hf_mcsmoe.quantization.layer import quantize_layer
from hf_mcsmoe.repair.fit import LayerFit, layer_error, merged_output, original_sum
from hf_mcsmoe.repair.methods import REPAIR, RepairConfig
from hf_mcsmoe.search.choices import grids, nearest_count, ranks
from hf_mcsmoe.search.config import JOINT, SizeConfig
from hf_mcsmoe.search.probe import Probe
from hf_mcsmoe.search.student import refit_method, seen_by, student_experts

# Shares of a layer's experts at which a reduction is fitted.
SHARES = (0.75, 0.5, 0.25, 0.125)
# Which experts others are merged around, or which stay. Tried: plain merging of three trained models to halves and
# three quarters of their experts diverges 1.3 to 3.3 times less by it than by frequency.
SALIENCY = "contribution"
# Exponents between which the effect grows with the error, where it was measured twice.
POWERS = (0.4, 1.3)
# The exponent at errors smaller than any that was measured: to second order a divergence is quadratic in the change.
SMALL = 1.0
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Observed:
    """One part of a choice in place: held-out error, and what the probe says of it, error and nats; None unasked."""

    error: float
    probed: tuple[float, float] | None = None


def measure_curves(
    layers: Layers,
    statistics: RoutingStatistics,
    batches: Sequence[Batch],
    merge: MergeConfig,
    search: SizeConfig,
    *,
    repair: RepairConfig | None = None,
    progress: Progress | None = None,
) -> dict[str, LayerCurves]:
    """Return the curves of the layers that `merge.skip` leaves, by name; of those that share experts the first's name.

    Args:
        statistics: of these layers; with what the reductions need, see `needs_of`.
        batches: calibration data, all that a fit sees; a fifth of its rows judges.
        repair: how output matrices are fitted; None for the default.
        progress: called as `progress(layer name, layers done, layers)`.

    Raises:
        ValueError: a sum that a reduction needs was not collected; a model or batches by which no choice is measured.
    """
    check_sums(statistics, merge, search)
    chosen, repair = layers.selected(merge.skip), repair or JOINT
    plans = _plans_of_all(layers, statistics, merge, search)
    probe, curves = Probe(layers.model, batches), {}
    if not probe.tells:
        raise ValueError(
            f"{type(layers.model).__name__} tells no distribution on these batches, by which a choice would be "
            "measured: load it with its head, and give an encoder-decoder labels."
        )
    with torch.no_grad(), evaluation_mode(layers.model):
        for done, (shared, inputs) in enumerate(stream_inputs(chosen.tied, batches, memory_limit=repair.memory_limit)):
            first = shared[0]
            with first.open() as originals:
                bench = Bench(shared, originals, inputs, statistics.together([x.name for x in shared]), probe, repair)
                curves[first.name] = bench.curves(search, plans)
            if progress:
                progress(first.name, done + 1, len(chosen.tied))
    return curves


def ladder(layer: MoELayer, reduce: str, search: SizeConfig) -> list[int]:
    """Return the numbers of experts at which a reduction of a layer is fitted, from the most on."""
    counts = {nearest_count(layer, share * layer.num_experts, reduce, search) for share in SHARES}
    return sorted((count for count in counts if count and count < layer.num_experts), reverse=True)


def _plans_of_all(
    layers: Layers, statistics: RoutingStatistics, merge: MergeConfig, search: SizeConfig
) -> dict[str, list[MergePlan]]:
    """Return the plans of each reduction; with "auto" none of one that the model's routers do not allow."""
    plans = {}
    for reduce in search.reductions:
        try:
            plans[reduce] = _plans(layers, statistics, merge, reduce, search)
        except ValueError:
            if reduce == "merge" or search.reduce == reduce:
                raise
    return plans


def _plans(
    layers: Layers, statistics: RoutingStatistics, merge: MergeConfig, reduce: str, search: SizeConfig
) -> list[MergePlan]:
    """Return a plan for each step of the ladder; layers with a shorter ladder stay at its end."""
    groups = layers.selected(merge.skip).tied
    ladders = [ladder(shared[0], reduce, search) or [shared[0].num_experts] for shared in groups]
    plans = []
    for step in range(max(map(len, ladders))):
        counts = [rungs[min(step, len(rungs) - 1)] for rungs in ladders]
        plans.append(plan_with(layers, statistics, merge, counts, reduce))
    return plans


def plan_with(
    layers: Layers, statistics: RoutingStatistics, merge: MergeConfig, counts: list[int], reduce: str = "merge"
) -> MergePlan:
    """Return the plan that leaves each set of experts so many of them."""

    sizes = [shared[0].num_experts for shared in layers.selected(merge.skip).tied]

    def budget(saliency: list[torch.Tensor], experts: float, min_experts: int) -> list[int]:
        # Of a router with groups each unit is an expert of every group.
        return [max(1, count * len(units) // size) for count, size, units in zip(counts, sizes, saliency, strict=True)]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few tokens, which the plan that is taken tells
        return plan_merge(layers, statistics, replace(reduced_by(merge, reduce), experts=1.0, budget=budget))


def reduced_by(merge: MergeConfig, reduce: str) -> MergeConfig:
    """Return a configuration for one of the reductions, with `SALIENCY` where none was chosen."""
    saliency = SALIENCY if merge.saliency is None else merge.saliency
    return replace(merge, reduce=reduce, saliency=saliency, min_experts=1)


def needs_of(merge: MergeConfig, search: SizeConfig) -> tuple[str, ...]:
    """Return the statistics that the reductions which may be chosen read."""
    return tuple(dict.fromkeys(name for reduce in search.reductions for name in reduced_by(merge, reduce).needs))


def check_sums(statistics: RoutingStatistics, merge: MergeConfig, search: SizeConfig) -> None:
    """Raise ValueError where a sum was not collected that a reduction which may be chosen reads."""
    for sums in statistics.layers.values():
        sums.check(needs_of(merge, search))


@dataclass
class Bench:
    """One layer, or several that share their experts, on which parts of a choice are tried."""

    layers: Sequence[MoELayer]
    originals: Experts
    inputs: LayerInputs
    sums: Any
    probe: Probe
    repair: RepairConfig

    def __post_init__(self) -> None:
        self.target: torch.Tensor | None = None
        self.normed, self.ridge = torch.empty(0), 0.0
        self.judge = self.inputs.held_out.nonzero()[:, 0]
        if not len(self.judge):
            raise ValueError(
                f"{len(self.inputs)} calibration tokens of {self.layers[0].name} are too few to hold some out, which "
                "tell what a choice costs: calibrate on more text."
            )

    def curves(self, search: SizeConfig, plans: dict[str, list[MergePlan]]) -> LayerCurves:
        """Return the curves of the layer."""
        layer = self.layers[0]
        whole = LayerPlan(*_identity(layer.num_experts))
        some = next(iter(plans.values()))[0]
        fit = self._fit(whole, some)
        kept = {name: value.detach().clone() for name, value in fit.experts.named_parameters()}
        w_out = dict(self._rounded(fit, kept, grids(layer.intermediate_size, search), False))
        w_in = dict(self._rounded(fit, kept, grids(layer.hidden_size, search), True))
        del fit, kept
        low_rank = {
            rank: _parts(dict(self._of_low_rank(rank, search, whole, some))) for rank in ranks(self.layers, search)
        }
        reduced = {reduce: dict(self._reduced(steps, search.reduce == reduce)) for reduce, steps in plans.items()}
        parts = {name: _parts(seen) for name, seen in reduced.items()}
        return LayerCurves(layer.num_experts, parts, _parts(w_in), _parts(w_out), low_rank)

    def _fit(self, item: LayerPlan, plan: MergePlan) -> LayerFit:
        """Return the layer with the experts of a plan."""
        layer = self.layers[0]
        seen, experts = seen_by(layer, item, self.inputs), student_experts(layer, item, plan, self.sums)
        expert_map = None if item.kept else item.expert_map
        fit = LayerFit(layer.name, experts, self.originals, seen, self.inputs, expert_map, self.target)
        if self.target is None:
            self.target = fit.target()
            self.normed = original_sum(fit, normed=True) if self.originals.norm else self.target
        return fit

    def _error(self, fit: LayerFit) -> float:
        return layer_error(fit, fit.experts, self.normed, self.judge) / max(len(self.judge), 1)

    def _observed(self, fit: LayerFit, *, probed: bool) -> Observed:
        """Return the held-out error and, where it is probed, the error and the effect at the rows of the probe."""
        error = self._error(fit)
        if not probed:
            return Observed(error)
        layer = self.layers[0]
        own = self.inputs.held_out[: len(self.inputs) // len(self.layers)]  # of the first of layers that share experts
        token = self.probe.tokens(own)[: self.probe.positions * (layer.top_k or 1)]
        difference = merged_output(fit, fit.experts, token).cpu() - self.normed[token]
        missed, effect = self.probe.measure(layer, difference)
        return Observed(error, (missed, effect * len(self.layers)))

    def _rounded(
        self, fit: LayerFit, kept: dict[str, torch.Tensor], choices: list[Grid], is_input: bool
    ) -> Iterator[tuple[Grid, Observed]]:
        """Yield what rounding one of the matrices does, the other as it was; W_in with the refit of W_out to it."""
        if not choices:
            return
        probed = [choices[-1], next((grid for grid in choices if grid.bits <= 4), choices[0])]
        gain = 1.0
        for grid in reversed(choices):
            quantize_layer(_unjudged(fit), grid if is_input else None, None if is_input else grid)
            if is_input and grid == probed[0]:
                before = self._error(fit)
                self._refit(fit)
                gain = self._error(fit) / before if before else 1.0
            seen = self._observed(fit, probed=grid in probed)
            yield grid, replace(seen, error=seen.error * (gain if is_input and grid != probed[0] else 1.0))
            for name, value in fit.experts.named_parameters():
                value.copy_(kept[name])

    def _refit(self, fit: LayerFit) -> None:
        """Refit the output matrices; held-out tokens choose, and are not fitted to."""
        method, repair = refit_method(fit, self.repair), self.repair
        ladder = sorted(repair.ridges)
        if method == "joint" and self.ridge:
            # Near to the ridge that the first fit has chosen, with each of several data sets left out in turn.
            place = min(range(len(ladder)), key=lambda number: abs(math.log(ladder[number] / self.ridge)))
            repair = replace(repair, ridges=tuple(ladder[max(place - 1, 0) : place + 2]))
            if len(self.inputs.domains) > 1:
                repair = replace(repair, caution=0.0)
                fit = replace(fit, inputs=fit.inputs.of_one_domain())
        ridges = [expert.ridge for expert in REPAIR[method](fit, repair, final=False).experts]
        self.ridge = next((ridge for ridge in ridges if method == "joint" and ridge), self.ridge)

    def _of_low_rank(
        self, rank: int, search: SizeConfig, whole: LayerPlan, plan: MergePlan
    ) -> Iterator[tuple[int, Observed]]:
        """Yield what low rank + sparse does to all experts, by the bits of its factors; 0: as they are."""
        layer, fit = self.layers[0], self._fit(whole, plan)
        decompose_container(fit.experts, rank, Choice.keep, fit.inputs.fitted())
        kept = {name: value.detach().clone() for name, value in fit.experts.named_parameters()}
        w_in, w_out = (
            {grid.bits: grid for grid in grids(width, search)}
            for width in (layer.hidden_size, layer.intermediate_size)
        )
        for bits in (0, *w_in):
            quantize_layer(_unjudged(fit), w_in.get(bits), None, None)
            self._refit(fit)
            quantize_layer(_unjudged(fit), None, w_out.get(bits), None)
            yield bits, self._observed(fit, probed=bits in (0, 4, min(w_in, default=0)))
            for name, value in fit.experts.named_parameters():
                value.copy_(kept[name])

    def _reduced(self, plans: list[MergePlan], is_asked: bool) -> Iterator[tuple[int, Observed]]:
        """Yield what fewer experts do, by their number; nothing where none can tell, unless it `is_asked` for."""
        items = {len(plan.layers[self.layers[0].name].dominant): plan for plan in plans}
        for number, (count, plan) in enumerate(items.items()):
            item = plan.layers[self.layers[0].name]
            if item.is_whole:
                continue
            try:
                fit = self._fit(item, plan)
            except ValueError:  # a router whose picks cannot be told once it is cut
                if item.kept is None or is_asked:
                    raise
                return
            self._refit(fit)
            yield count, self._observed(fit, probed=number in (0, len(items) - 1, len(items) // 2))


def _unjudged(fit: LayerFit) -> LayerFit:
    """Return the layer with the tokens alone that do not judge, for what is fitted to all that it is given."""
    return replace(fit, inputs=fit.inputs.fitted(), original_inputs=fit.original_inputs.fitted(), given=None)


def _identity(experts: int) -> tuple[list[int], list[int], list[float]]:
    return list(range(experts)), list(range(experts)), [1.0] * experts


def _parts(seen: dict[Any, Observed]) -> dict[Any, Part]:
    """Return the effect of each part, on a power of its error through those that the probe has measured."""
    points = sorted(point.probed for point in seen.values() if point.probed and min(point.probed) > 0)
    return {key: Part(item.error, _effect(points, item.error)) for key, item in seen.items()}


def _effect(points: Sequence[tuple[float, float]], error: float) -> float:
    """Return the effect of an error, given pairs of both; the nearest two decide."""
    if not points or error <= 0:
        return 0.0
    values = torch.tensor(points, dtype=torch.float64).log()
    place = torch.tensor(error, dtype=torch.float64).log()
    nearest = values[(values[:, 0] - place).abs().argsort(stable=True)[:2]]
    (near, effect), other = nearest[0], nearest[-1]
    slope = SMALL
    if len(nearest) > 1 and place >= values[0, 0] and not torch.isclose(near, other[0]):
        slope = float(((other[1] - effect) / (other[0] - near)).clamp(*POWERS))
    return float((effect + slope * (place - near)).exp())
