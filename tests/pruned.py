"""Tiny models whose routers were cut to some of the experts, and saved folders of them."""

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from families import build, inputs
from helpers import batches
from merged import Example, save, uneven
from without_package import recorded

from hf_mcsmoe import MergeConfig, collect_statistics, merge_experts, plan_merge


def unlike(saliency: list[torch.Tensor], experts: float, min_experts: int) -> list[int]:
    """Keep as many experts, or of each group, as a router needs, and one more in every other layer."""
    return [max(min_experts, len(scores) // 2) + number % 2 for number, scores in enumerate(saliency)]


@functools.cache
def pruned(name: str, budget: Callable | str = unlike) -> Example:
    """Prune the tiny model of a family."""
    base = build(name)
    config = MergeConfig(experts=0.75, reduce="prune", budget=budget)
    plan = plan_merge(base, collect_statistics(base, batches(name, base), config.needs), config)
    return Example(name, base, inputs(name, base), plan, merge_experts(base, plan))


@functools.cache
def substituted(name: str, kind: str = "constant") -> Example:
    """Prune the tiny model of a family to half of its experts, with constants in the place of the others."""
    base = build(name)
    config = MergeConfig(reduce="prune", budget=uneven, saliency="fluctuation", pruned_router=kind)
    statistics = collect_statistics(base, batches(name, base), config.needs)
    plan = plan_merge(base, statistics, config)
    return Example(name, base, inputs(name, base), plan, merge_experts(base, plan, statistics=statistics))


def save_pruned(case: Example, folder: Path, *, generated: bool = False) -> Path:
    """Save a pruned model; what it records of its routers has as many columns as these have rows."""
    path = save(case, folder, generated=generated)
    expected = torch.load(path.with_suffix(".pt")) | {"recorded": recorded(case.merged, case.batch)}
    torch.save(expected, path.with_suffix(".pt"))
    return path
