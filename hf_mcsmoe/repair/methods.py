"""The ways to repair one merged layer against the original one, and their options.

A method changes the experts of a `LayerFit` in place and tells what became of them. The closed forms (all but "local")
take `final`: False leaves the held-out tokens, which choose, out of what the weights are fitted to, so that the error
on them is that of text which a fit has not seen.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from hf_mcsmoe.calibration.inputs import MEMORY_LIMIT
from hf_mcsmoe.methods.checks import check_fields
from hf_mcsmoe.methods.config import option
from hf_mcsmoe.methods.options import Options
from hf_mcsmoe.methods.registry import Registry
from hf_mcsmoe.modeling.forward_mcsmoe import low_rank_of
from hf_mcsmoe.processes import current
from hf_mcsmoe.repair.elsewhere import with_elsewhere
from hf_mcsmoe.repair.fit import (
    LayerFit,
    expert_rows,
    layer_error,
    merged_output,
    original_sum,
    output_weight,
    write_output_weight,
)
from hf_mcsmoe.repair.joint import refit_jointly
from hf_mcsmoe.repair.least_squares import ExpertFit, RowSource, folds_of, mean_shift, refit, relative

REPAIR = Registry("repair")
# Steps of training after which the held-out tokens are asked.
JUDGE_EVERY = 25


@dataclass(frozen=True)
class RepairConfig(Options):
    """How merged layers are repaired. The method is given by name, or as a callable of the same signature.

    Raises:
        ValueError: a name that no method has, or a number out of range.
    """

    file_name = "mcsmoe_repair.json"

    method: str | Callable = option("refit", "how each changed layer is repaired", REPAIR)
    sequential: bool = option(False, "layer after layer, with the inputs that the repaired model has (joint, local)")
    ridges: tuple[float, ...] = option(
        (10.0, 1.0, 0.1, 0.03, 0.01, 3e-3, 1e-3, 1e-4), "ridges to choose from, in multiples of the mean diagonal"
    )
    elsewhere: float = option(
        1.0, "weight of tokens routed elsewhere, which keep experts right for other text; in multiples of their own"
    )
    made: float = option(
        1.0,
        "rows with half of their tokens drawn at random that a fit sees too, as a share of the calibration rows",
    )
    caution: float = option(
        2.0,
        "the smallest ridge, in multiples of unknowns over tokens (an expert's width over the tokens that it sees), "
        "where there is one data set; of several each is left out in turn to choose",
    )
    steps: int = option(300, "Adam steps a layer (local)")
    learning_rate: float = option(3e-3, "learning rate at the start (local); it falls to zero as a cosine")
    batch_tokens: int = option(1024, "tokens a step (local)")
    memory_limit: int = option(MEMORY_LIMIT, "bytes for inputs of layers, and for the sums of one expert")
    seed: int = option(0, "seed of the batches (local)")

    def __post_init__(self) -> None:
        REPAIR.check(self.method)
        check_fields(self)
        counts = {"steps": self.steps}
        counts |= {"batch_tokens": self.batch_tokens, "memory_limit": self.memory_limit}
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name}={value!r} must be a positive whole number.")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate={self.learning_rate!r} must be a positive number.")
        for name in ("elsewhere", "caution"):
            if vars(self)[name] < 0:
                raise ValueError(f"{name}={vars(self)[name]!r} must not be negative; 0 does without.")
        if not 0 <= self.made <= 1:
            raise ValueError(f"made={self.made!r} must be between 0 and 1; 0 does without made rows.")
        if not self.ridges or not all(ridge > 0 for ridge in self.ridges):
            raise ValueError(f"ridges={self.ridges!r} must be positive numbers, at least one.")
        if self.sequential and self.method in ("refit", "mean_shift"):
            raise ValueError(
                f"The repair {self.method!r} is made expert by expert, and has no use for sequential=True: choose "
                "joint or local."
            )

    def ladder(self, unknowns: int, tokens: int, domains: int = 1) -> list[float]:
        """Return the ridges to choose from, none of them smaller than so few tokens for so many unknowns allow.

        With several data sets those that are left out say what is too small.
        """
        least = self.caution * unknowns / max(tokens, 1) if domains == 1 else 0.0
        return sorted({max(ridge, least) for ridge in self.ridges})


@dataclass(frozen=True)
class LayerRepair:
    """One layer: tokens fitted to and held out, held-out relative errors of its outputs, seconds, and its experts.

    Where experts are fitted one by one, the errors are those of all of them together. `lossy` are the experts that had
    lost something: several in one, or stored as low rank + sparse. `unknowns` are an expert's in each row of its
    output matrix: its width, with a bias one more.
    """

    tokens: int
    held_out: int
    before: float | None
    after: float | None
    experts: list[ExpertFit]
    lossy: list[int]
    seconds: float = 0.0
    unknowns: int = 0

    @property
    def unchanged(self) -> list[int]:
        """The experts that fell back to the weights they had: too few tokens, or no fit was better."""
        return [number for number, expert in enumerate(self.experts) if expert.ridge is None]

    @property
    def is_better(self) -> bool:
        """Whether the held-out outputs are nearer to the original's than before."""
        return self.before is not None and self.after is not None and self.after < self.before


def repaired(
    layer: LayerFit, fits: list[ExpertFit], errors: tuple[float | None, float | None] | None = None
) -> LayerRepair:
    """Return what became of a layer.

    Args:
        errors: relative ones before and after; None for those of the experts, together.
    """
    if errors is None:
        energy = sum(fit.energy for fit in fits)
        errors = relative(sum(fit.before for fit in fits), energy), relative(sum(fit.after for fit in fits), energy)
    held_out, tokens = int(layer.inputs.held_out.sum()), len(layer.inputs)
    unknowns = output_weight(layer.experts, 0).shape[1]
    experts = [fit.without_weight() for fit in fits]
    return LayerRepair(tokens - held_out, held_out, *errors, experts, _lossy(layer), unknowns=unknowns)


def _lossy(layer: LayerFit) -> list[int]:
    """Return the experts that have lost something: several in one, not all there are, or low rank + sparse."""
    if layer.expert_map is None or low_rank_of(layer.experts):
        return list(range(layer.experts.num_experts))
    members = Counter(layer.expert_map)
    return [expert for expert in sorted(members) if members[expert] > 1]


def _per_expert(
    layer: LayerFit, config: RepairConfig, solve: Callable[[RowSource, torch.Tensor, Sequence[float]], ExpertFit]
) -> list[ExpertFit]:
    """Fit each stored expert to the gated sum of its members' outputs, and store the result.

    Each of several processes fits a share of the experts.
    """
    if layer.expert_map is None:
        raise ValueError(
            f"{layer.name} is pruned, and what its experts lack was done by others: choose the repair 'joint' or "
            "'local'."
        )
    tokens, expert_map, processes = len(layer.inputs), layer.expert_map, current()
    layer = with_elsewhere(layer, config.elsewhere, config.seed)

    def solution(expert: int) -> ExpertFit:
        members = [m for m, target in enumerate(expert_map) if target == expert]
        seen, start = layer.tokens_of(expert)[0], output_weight(layer.experts, expert)
        fitted = int(layer.calibrates[seen[seen < tokens]].sum())
        domains = len(folds_of([layer.parts[seen]])) or 1
        targets = original_sum(layer, members, seen)
        ladder = config.ladder(start.shape[1], fitted, domains)
        found = solve(expert_rows(layer, expert, targets), start, ladder)
        return replace(found, tokens=fitted, weight=found.weight.cpu())

    experts = range(layer.experts.num_experts)
    solutions = processes.joined([solution(expert) for expert in processes.own(experts)])
    for expert, found in zip(experts, solutions, strict=True):
        write_output_weight(layer.experts, expert, found.weight)
    return solutions


@REPAIR.register("none")
def leave_layer(layer: LayerFit, config: RepairConfig, *, final: bool = True) -> LayerRepair:
    """Leave the layer as it is."""
    return repaired(layer, [], (None, None))


@REPAIR.register("refit")
def refit_layer(layer: LayerFit, config: RepairConfig, *, final: bool = True) -> LayerRepair:
    """Refit the output matrices in closed form, each expert by itself; those of a pruned layer jointly.

    A pruned layer's experts have lost nothing by themselves: it is the others that their sum lacks.
    """
    if layer.expert_map is None:
        return refit_layer_jointly(layer, config, final=final)
    solve = partial(refit, memory_limit=config.memory_limit, final=final)
    return repaired(layer, _per_expert(layer, config, solve))


@REPAIR.register("joint")
def refit_layer_jointly(layer: LayerFit, config: RepairConfig, *, final: bool = True) -> LayerRepair:
    """Refit the output matrices of all experts together, in closed form, to the layer's whole output.

    Raises:
        ValueError: a norm follows each expert, so that their outputs do not add up.
    """
    if layer.experts.has_post_expert_norm:
        raise ValueError(
            f"{layer.name} has a norm behind each expert, so that their outputs do not add up: choose the repair "
            "'refit', which fits its experts one by one, or 'local'."
        )
    seen = [int(layer.calibrates[layer.tokens_of(e)[0]].sum()) for e in range(layer.experts.num_experts)]
    unknowns = sum(output_weight(layer.experts, expert).shape[1] for expert in range(len(seen)))
    longer = with_elsewhere(layer, config.elsewhere, config.seed)
    ladder = config.ladder(unknowns, sum(seen), len(folds_of([longer.parts])) or 1)
    fit = refit_jointly(longer, ladder, memory_limit=config.memory_limit, final=final)
    experts = []
    for expert, (weight, fitted) in enumerate(zip(fit.weights, seen, strict=True)):
        write_output_weight(layer.experts, expert, weight)
        experts.append(ExpertFit(weight, fit.ridge if fitted else None, fitted, 0.0, 0.0, 0.0))
    return repaired(layer, experts, (relative(fit.before, fit.energy), relative(fit.after, fit.energy)))


@REPAIR.register("mean_shift")
def shift_layer(layer: LayerFit, config: RepairConfig, *, final: bool = True) -> LayerRepair:
    """Make each expert's mean output that of its members: by its bias, or by a change of rank one."""

    def shift(rows: RowSource, start: torch.Tensor, ridges: Sequence[float]) -> ExpertFit:
        return mean_shift(rows, start, has_bias=layer.experts.has_bias, final=final)

    # The mean is that of an expert's own tokens.
    return repaired(layer, _per_expert(layer, replace(config, elsewhere=0.0), shift))


@REPAIR.register("local")
def distil_layer(layer: LayerFit, config: RepairConfig) -> LayerRepair:
    """Train all weights of the layer's experts on its output, from the joint refit on; the best held-out state stays.

    Experts with a norm behind them, which no closed form fits together, are trained from where they are.
    """
    target = original_sum(layer, normed=True) if layer.experts.has_post_expert_norm else layer.target()
    judge = layer.inputs.held_out.nonzero()[:, 0]
    before = layer_error(layer, layer.experts, target, judge)
    error, state = before, _values(layer.experts)
    longer = with_elsewhere(layer, config.elsewhere, config.seed)
    # From a fit that left the held-out tokens aside, or none of the steps would look better than the start.
    solutions = [] if layer.experts.has_post_expert_norm else refit_layer_jointly(layer, config, final=False).experts
    work = copy.deepcopy(layer.experts).float().requires_grad_(True)
    for reached in _trained(longer, work, target if longer is layer else longer.target(), judge, config):
        if reached < error:
            error, state = reached, _values(work)
    for name, parameter in layer.experts.named_parameters():
        parameter.copy_(state[name])
    energy = target[judge].square().sum().item()
    return repaired(layer, solutions, (relative(before, energy), relative(error, energy)))


def _values(experts: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in experts.named_parameters()}


def _trained(
    layer: LayerFit, work: Any, target: torch.Tensor, judge: torch.Tensor, config: RepairConfig
) -> Iterator[float]:
    """Train `work` on the tokens that are not held out; yield its error on those that are, now and then."""
    fit = (~layer.inputs.held_out).nonzero()[:, 0]
    optimizer = torch.optim.Adam(work.parameters(), lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    generator = torch.Generator().manual_seed(config.seed)
    scale = target.square().mean().clamp(min=torch.finfo(torch.float32).tiny)
    for step in range(config.steps):
        if step % JUDGE_EVERY == 0:
            yield layer_error(layer, work, target, judge)
        token = fit[torch.randint(len(fit), (config.batch_tokens,), generator=generator)]
        with torch.enable_grad():
            missed = merged_output(layer, work, token) - target[token].to(layer.device)
            loss = missed.square().mean() / scale
            optimizer.zero_grad()
            loss.backward()
        if not loss.isfinite():
            raise ValueError(f"{layer.name}: the loss is {loss.item()} at step {step}; lower learning_rate.")
        optimizer.step()
        schedule.step()
    yield layer_error(layer, work, target, judge)
