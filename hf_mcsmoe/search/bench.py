"""One layer on which parts of a choice are tried, each fitted as in the final model and thrown away."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from hf_mcsmoe.calibration.inputs import LayerInputs
from hf_mcsmoe.layers.layer import MoELayer
from hf_mcsmoe.low_rank.decompose import decompose_container
from hf_mcsmoe.methods.choice import Choice, Grid
from hf_mcsmoe.methods.experts import Experts
from hf_mcsmoe.plan import LayerPlan, MergePlan
from hf_mcsmoe.quantization.layer import quantize_layer
from hf_mcsmoe.repair.fit import LayerFit, layer_error, merged_output, original_sum
from hf_mcsmoe.repair.methods import REPAIR, RepairConfig
from hf_mcsmoe.search.choices import grids, ranks
from hf_mcsmoe.search.config import SizeConfig
from hf_mcsmoe.search.observed import Observations, Observed
from hf_mcsmoe.search.probe import Probe
from hf_mcsmoe.search.student import refit_method, seen_by, student_experts


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

    def observations(self, search: SizeConfig, plans: dict[str, list[MergePlan]]) -> Observations:
        """Return what is seen of all parts of a choice that are tried."""
        layer = self.layers[0]
        whole = LayerPlan(*_identity(layer.num_experts))
        some = next(iter(plans.values()))[0]
        fit = self._fit(whole, some)
        # Weights to go back to after each rounding, where any is tried.
        before = fit.experts.named_parameters() if search.bits else ()
        kept = {name: value.detach().clone() for name, value in before}
        of_in, of_out = grids(layer, search)
        w_out = dict(self._rounded(fit, kept, of_out, False))
        w_in = dict(self._rounded(fit, kept, of_in, True))
        del fit, kept
        low_rank = {rank: dict(self._of_low_rank(rank, search, whole, some)) for rank in ranks(self.layers, search)}
        reduced = {reduce: dict(self._reduced(steps, search.reduce == reduce)) for reduce, steps in plans.items()}
        return Observations(layer.num_experts, len(self.layers), reduced, w_in, w_out, low_rank)

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
        """Return the held-out error and, where it is probed, the error at the rows of the probe and the trial."""
        error = self._error(fit)
        if not probed:
            return Observed(error)
        layer = self.layers[0]
        own = self.inputs.held_out[: len(self.inputs) // len(self.layers)]  # of the first of layers that share experts
        token = self.probe.tokens(own)[: self.probe.positions * (layer.top_k or 1)]
        difference = merged_output(fit, fit.experts, token).cpu() - self.normed[token]
        return Observed(error, self.probe.trial(layer, difference))

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
        fit = self._fit(whole, plan)
        decompose_container(fit.experts, rank, Choice.keep, fit.inputs.fitted())
        kept = {name: value.detach().clone() for name, value in fit.experts.named_parameters()}
        w_in, w_out = ({grid.bits: grid for grid in own} for own in grids(self.layers[0], search))
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
            del fit  # before the next is made


def _unjudged(fit: LayerFit) -> LayerFit:
    """Return the layer with the tokens alone that do not judge, for what is fitted to all that it is given."""
    return replace(fit, inputs=fit.inputs.fitted(), original_inputs=fit.original_inputs.fitted(), given=None)


def _identity(experts: int) -> tuple[list[int], list[int], list[float]]:
    return list(range(experts)), list(range(experts)), [1.0] * experts
