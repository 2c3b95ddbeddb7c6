"""The ways to repair one merged layer against the original one, and their options."""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from hf_mcsmoe.calibration.inputs import MEMORY_LIMIT
from hf_mcsmoe.methods.config import option
from hf_mcsmoe.methods.registry import Registry, method_name
from hf_mcsmoe.repair.fit import (
    CHUNK,
    LayerFit,
    expert_rows,
    layer_error,
    merged_output,
    original_sum,
    output_weight,
    write_output_weight,
)
from hf_mcsmoe.repair.least_squares import RowSource, Solution, mean_shift, refit

REPAIR = Registry("repair")
# Steps of training after which the held-out tokens are asked.
JUDGE_EVERY = 25


@dataclass(frozen=True)
class RepairConfig:
    """How merged layers are repaired. The method is given by name, or as a callable of the same signature.

    Raises:
        ValueError: a name that no method has, or a number out of range.
    """

    method: str | Callable = option("refit", "how each merged layer is repaired: refit, local, mean_shift or none")
    joint: bool = option(False, "fit the layer's whole output with all of its experts together")
    sequential: bool = option(False, "layer after layer, with the inputs that the repaired model has; implies joint")
    ridges: tuple[float, ...] = option(
        (10.0, 1.0, 0.1, 0.03, 0.01, 3e-3, 1e-3, 1e-4), "ridges to choose from, in multiples of the mean diagonal"
    )
    sweeps: int = option(3, "times that a joint refit goes round the experts")
    steps: int = option(300, "Adam steps a layer (local)")
    learning_rate: float = option(3e-3, "learning rate at the start (local); it falls to zero as a cosine")
    batch_tokens: int = option(1024, "tokens a step (local)")
    memory_limit: int = option(MEMORY_LIMIT, "bytes for inputs of layers, and for the sums of one expert")
    seed: int = option(0, "seed of the batches (local)")

    def __post_init__(self) -> None:
        REPAIR[self.method]
        for name in ("sweeps", "steps", "batch_tokens", "memory_limit"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be a positive whole number.")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate={self.learning_rate!r} must be a positive number.")
        if not self.ridges or not all(math.isfinite(ridge) and ridge > 0 for ridge in self.ridges):
            raise ValueError(f"ridges={self.ridges!r} must be positive numbers, at least one.")
        if self.sequential and self.method == "mean_shift":
            raise ValueError("A mean shift is made expert by expert; use sequential=True with refit or local.")

    @property
    def is_joint(self) -> bool:
        """Whether the experts fit the layer's whole output together."""
        return self.joint or self.sequential

    def to_dict(self) -> dict[str, Any]:
        """Return the options as JSON values; a callable is written as its name."""
        return {**asdict(self), "method": method_name(self.method), "ridges": list(self.ridges)}


@dataclass(frozen=True)
class Repaired:
    """What became of a layer: a solution per stored expert, and the relative error of held-out outputs."""

    solutions: list[Solution]
    before: float | None
    after: float | None

    @classmethod
    def of(cls, solutions: list[Solution]) -> "Repaired":
        """Return the layer whose error is that of its experts, together."""
        energy = sum(solution.energy for solution in solutions)
        return cls(
            solutions,
            relative(sum(solution.before for solution in solutions), energy),
            relative(sum(solution.after for solution in solutions), energy),
        )


def relative(error: float, energy: float) -> float | None:
    """Return the root of squared error over squared norm; None where there is nothing to compare with."""
    return math.sqrt(max(error, 0.0) / energy) if energy > 0 else None


def _per_expert(problem: LayerFit, solve: Callable[[RowSource, torch.Tensor], Solution]) -> list[Solution]:
    """Fit each stored expert to the gated sum of its members' outputs, and store the result."""
    solutions = []
    for expert in range(problem.experts.num_experts):
        members = [m for m, target in enumerate(problem.expert_map) if target == expert]
        targets = original_sum(problem, members, problem.tokens_of(expert)[0])
        solution = solve(expert_rows(problem, expert, targets), output_weight(problem.experts, expert))
        write_output_weight(problem.experts, expert, solution.weight)
        solutions.append(solution)
    return solutions


@REPAIR.register("none")
def leave_layer(problem: LayerFit, config: RepairConfig) -> Repaired:
    """Leave the layer as it is."""
    return Repaired([], None, None)


@REPAIR.register("refit")
def refit_layer(problem: LayerFit, config: RepairConfig) -> Repaired:
    """Refit the output matrices in closed form, each expert by itself or, with `joint`, all of them together."""
    return Repaired.of(_refitted(problem, config, final=True))


def _refitted(problem: LayerFit, config: RepairConfig, *, final: bool) -> list[Solution]:
    """Refit and store the output matrices; unless `final`, the held-out tokens stay unseen."""
    if config.is_joint:
        return _refit_jointly(problem, config, final)
    return _per_expert(problem, lambda rows, start: _refit(rows, start, config, final))


def _refit(rows: RowSource, start: torch.Tensor, config: RepairConfig, final: bool) -> Solution:
    return refit(rows, start, config.ridges, memory_limit=config.memory_limit, final=final)


def _refit_jointly(problem: LayerFit, config: RepairConfig, final: bool) -> list[Solution]:
    """Fit the layer's whole output: one expert after the other what the others leave over, a few times round.

    Raises:
        ValueError: a norm follows each expert, so that their outputs do not add up.
    """
    experts = problem.experts
    if experts.has_post_expert_norm:
        raise ValueError(f"{problem.name} has a norm behind each expert; refit its experts with joint=False.")
    residual = original_sum(problem)
    starts = [output_weight(experts, expert) for expert in range(experts.num_experts)]
    solutions = {expert: Solution(start, None, 0, 0.0, 0.0, 0.0) for expert, start in enumerate(starts)}
    for expert, start in enumerate(starts):
        _subtract(problem, expert, start, residual)
    for sweep in range(config.sweeps):
        for expert, start in enumerate(starts):
            _subtract(problem, expert, -solutions[expert].weight, residual)
            rows = expert_rows(problem, expert, residual[problem.tokens_of(expert)[0]])
            solutions[expert] = _refit(rows, start, config, final and sweep == config.sweeps - 1)
            _subtract(problem, expert, solutions[expert].weight, residual)
    for expert, solution in solutions.items():
        write_output_weight(experts, expert, solution.weight)
    return list(solutions.values())


def _subtract(problem: LayerFit, expert: int, weight: torch.Tensor, residual: torch.Tensor) -> None:
    """Subtract a stored expert's gated output, with this output matrix, from `residual` [T, D]."""
    token, gates = problem.tokens_of(expert)
    for part in torch.arange(len(token)).split(CHUNK):
        output = problem.hidden(token[part], gates[part], expert) @ weight.float().T
        residual.index_add_(0, token[part], output.cpu(), alpha=-1)


@REPAIR.register("mean_shift")
def shift_layer(problem: LayerFit, config: RepairConfig) -> Repaired:
    """Make each expert's mean output that of its members: by its bias, or by a change of rank one."""
    has_bias = problem.experts.has_bias
    return Repaired.of(_per_expert(problem, lambda rows, start: mean_shift(rows, start, has_bias=has_bias)))


@REPAIR.register("local")
def distil_layer(problem: LayerFit, config: RepairConfig) -> Repaired:
    """Train all weights of the layer's experts on its output, from the refit on; the best held-out state stays.

    Experts that no closed form can refit are trained from where they are.
    """
    target = original_sum(problem, normed=True)
    judge = problem.inputs.held_out.nonzero()[:, 0]
    before = layer_error(problem, problem.experts, target, judge)
    error, state = before, _values(problem.experts)
    # From a fit that left the held-out tokens aside, or none of the steps would look better than the start.
    solutions = _refitted(problem, config, final=False) if _can_refit(problem, config) else []
    work = copy.deepcopy(problem.experts).float().requires_grad_(True)
    for reached in _trained(problem, work, target, judge, config):
        if reached < error:
            error, state = reached, _values(work)
    for name, parameter in problem.experts.named_parameters():
        parameter.copy_(state[name])
    energy = target[judge].square().sum().item()
    return Repaired(solutions, relative(before, energy), relative(error, energy))


def _values(experts: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in experts.named_parameters()}


def _can_refit(problem: LayerFit, config: RepairConfig) -> bool:
    experts = problem.experts
    return not (config.is_joint and experts.has_post_expert_norm)


def _trained(
    problem: LayerFit, work: Any, target: torch.Tensor, judge: torch.Tensor, config: RepairConfig
) -> Iterator[float]:
    """Train `work` on the tokens that are not held out; yield its error on those that are, now and then."""
    fit = (~problem.inputs.held_out).nonzero()[:, 0]
    optimizer = torch.optim.Adam(work.parameters(), lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    generator = torch.Generator().manual_seed(config.seed)
    scale = target.square().mean().clamp(min=torch.finfo(torch.float32).tiny)
    for step in range(config.steps):
        if step % JUDGE_EVERY == 0:
            yield layer_error(problem, work, target, judge)
        token = fit[torch.randint(len(fit), (config.batch_tokens,), generator=generator)]
        with torch.enable_grad():
            missed = merged_output(problem, work, token) - target[token].to(problem.device)
            loss = missed.square().mean() / scale
            optimizer.zero_grad()
            loss.backward()
        if not loss.isfinite():
            raise ValueError(f"{problem.name}: the loss is {loss.item()} at step {step}; lower learning_rate.")
        optimizer.step()
        schedule.step()
    yield layer_error(problem, work, target, judge)
