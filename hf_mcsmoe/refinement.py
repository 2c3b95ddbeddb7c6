"""What follows a merge: repair against the original, storage as low rank + sparse, and the costs of each stage."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from hf_mcsmoe.card import add_to_card, describe_costs
from hf_mcsmoe.evaluation.costs import Account, stored_bytes
from hf_mcsmoe.layers.batches import Batch
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.low_rank.config import LoSparseConfig
from hf_mcsmoe.low_rank.decompose import compact, decompose_experts
from hf_mcsmoe.low_rank.ranks import check_low_rank
from hf_mcsmoe.methods.budget import BUDGET, adaptive_budget, uniform_budget
from hf_mcsmoe.methods.config import MergeConfig
from hf_mcsmoe.methods.registry import method_name
from hf_mcsmoe.modeling.forward_mcsmoe import low_rank_of
from hf_mcsmoe.modeling.losparse_mcsmoe import sparse_parts
from hf_mcsmoe.repair.methods import RepairConfig
from hf_mcsmoe.repair.repair import repair_experts

REPAIR_TEXT = (
    "Each changed layer was fitted to the original one on the calibration data, layer by layer (method `{method}`)."
)
LOW_RANK_TEXT = (
    "Each matrix of a stored expert is held as `U V + S` (MC-SMoE): ranks {ranks}, and the share {keep} of S\n"
    "(hidden units: rows of the first matrix, columns of the second). The factors err least on the calibration data;\n"
    "no dense matrix is kept or rebuilt."
)


def refine(
    merged: PreTrainedModel,
    original: PreTrainedModel,
    batches: Iterable[Batch],
    *,
    repair: RepairConfig | None = None,
    low_rank: LoSparseConfig | None = None,
) -> PreTrainedModel:
    """Repair a merged model against the original and store its experts as low rank + sparse, in place; return it.

    Warns of merged experts that the repair could not improve, and says so in the card.

    Raises:
        ValueError: see `repair_experts` and `decompose_experts`; nothing to repair.
    """
    repair = wanted(repair)
    batches = list(batches) if repair or low_rank else []
    is_merged = bool(merged.config.mcsmoe["layers"])
    if repair and not is_merged:
        _check_repair_of_whole_layers(repair, low_rank)
    unchanged = _repair(merged, original, batches, repair) if repair and is_merged else None
    if low_rank:
        decompose_experts(merged, low_rank, batches, prune=True)
        if sparse_parts(merged):  # or all of it was to stay dense
            compact(merged)
        if repair and repair.method == "local":  # once more, with what is stored now
            unchanged = _repair(merged, original, batches, repair)
    if repair:
        _tell_of_repair(merged, repair, unchanged)
    if low_rank:
        _tell_of_low_rank(merged, low_rank)
    return merged


def refine_and_account(
    merged: PreTrainedModel,
    original: PreTrainedModel,
    batches: Iterable[Batch],
    before: Account,
    measure: Callable[[PreTrainedModel], Account],
    *,
    repair: RepairConfig | None = None,
    low_rank: LoSparseConfig | None = None,
) -> dict[str, Account]:
    """Refine a merged model, in place; return what each stage costs, which the card tells as well.

    The stages are those that there were of "before", "merged" and "compressed"; where nothing was merged and nothing
    compressed, the last is called "after".

    Args:
        before: costs of the original.
        measure: returns those of a stage; its bytes on disk are what a save would write.

    Raises:
        ValueError: see `refine`.
    """

    def measured() -> Account:
        return replace(measure(merged), bytes_on_disk=stored_bytes(merged))

    accounts, is_merged = {"before": before}, bool(merged.config.mcsmoe["layers"])
    if low_rank and is_merged:
        accounts["merged"] = measured()
    refine(merged, original, batches, repair=repair, low_rank=low_rank)
    accounts["compressed" if low_rank else "merged" if is_merged else "after"] = measured()
    describe_costs(merged, accounts)
    return accounts


def wanted(repair: RepairConfig | None) -> RepairConfig | None:
    """Return the repair, or None where its method is "none"."""
    return None if repair is None or repair.method == "none" else repair


def check_refinement(
    layers: Layers, config: MergeConfig, *, repair: RepairConfig | None, low_rank: LoSparseConfig | None
) -> None:
    """Check before any forward that what follows the merge of `layers` can be done; needs no weights.

    Raises:
        ValueError: see `check_low_rank`; nothing to repair.
    """
    if low_rank:
        check_low_rank(layers, low_rank)
    if wanted(repair) and _merges_nothing(layers, config):
        _check_repair_of_whole_layers(repair, low_rank)


def _merges_nothing(layers: Layers, config: MergeConfig) -> bool:
    """Tell whether every layer will keep all its experts; False where that depends on their saliency."""
    budget, sizes = BUDGET[config.budget], [layer.num_experts for layer, *_ in layers.tied]
    if budget not in (uniform_budget, adaptive_budget):
        return False
    return budget([torch.ones(size) for size in sizes], config.experts, config.min_experts) == sizes


def _check_repair_of_whole_layers(repair: RepairConfig | None, low_rank: LoSparseConfig | None) -> None:
    if repair and (low_rank is None or repair.method != "local"):
        raise ValueError(
            f"Every layer keeps all its experts, so repair={repair.method!r} has nothing to do: leave it out. Where "
            "the experts become low rank + sparse, method 'local' repairs that."
        )


def _tell_of_low_rank(merged: PreTrainedModel, config: LoSparseConfig) -> None:
    """Write into the card how the experts are stored; where none is smaller so, warn instead."""
    stored = [layer.get("low_rank", {}) for layer in merged.config.mcsmoe["layers"].values()]
    ranks = sorted({entry["rank"] for entries in stored for entry in entries.values()})
    if ranks:
        add_to_card(merged, "Low rank + sparse", LOW_RANK_TEXT.format(ranks=ranks, keep=config.keep))
    else:
        warnings.warn(
            f"keep={config.keep} and the ranks asked for make no expert smaller, so all stay dense: lower them.",
            stacklevel=3,
        )


def _tell_of_repair(merged: PreTrainedModel, repair: RepairConfig, unchanged: str | None) -> None:
    """Write into the card what a repair did; what it could not do is a warning as well."""
    lines = [REPAIR_TEXT.format(method=method_name(repair.method))]
    if unchanged:
        warnings.warn(f"{unchanged} Calibrate on more text, or leave them so.", stacklevel=3)
        lines.append(unchanged)
    add_to_card(merged, "Repair", "\n\n".join(lines))


def _repair(
    merged: PreTrainedModel, original: PreTrainedModel, batches: list[Batch], repair: RepairConfig
) -> str | None:
    """Repair a merged model, in place; return which experts stayed as they were though something was lost in them.

    Nothing is lost in a dense expert that was merged with no other.
    """
    report = repair_experts(merged, original, batches, repair)
    lossy: dict[str, list[int]] = {}
    for layer in Layers.of(merged):
        if layer.name in report.layers:
            members = Counter(layer.expert_map)
            lossy[layer.name] = [e for e in sorted(members) if members[e] > 1 or low_rank_of(layer.container)]
    unchanged: dict[str, list[int]] = {}
    for name, done in report.layers.items():
        kept = done.unchanged
        if repair.method == "local":  # which trains all of a layer together, and keeps the result or nothing
            improved = done.before is not None and done.after is not None and done.after < done.before
            kept = [] if improved else lossy[name]
        unchanged[name] = [expert for expert in lossy[name] if expert in kept]
    total, number = sum(map(len, lossy.values())), sum(map(len, unchanged.values()))
    places = [
        f"{name} (experts {', '.join(map(str, experts))}; {report.layers[name].tokens:,} tokens in the layer)"
        for name, experts in unchanged.items()
        if experts
    ]
    if not places:
        return None
    return (
        f"The repair left {number} of the {total} experts that it was to fit as they were, because too few tokens "
        f"reached them or no fit did better on tokens held out: {', '.join(places)}."
    )
