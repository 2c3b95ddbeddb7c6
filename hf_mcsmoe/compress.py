"""M-SMoE from top to bottom: statistics, plan, then layer by layer read, align, merge, write (paper, section 3.1).

`refinement.py` then repairs the merged layers and stores them as low rank + sparse (section 3.2).
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from itertools import chain, islice

from transformers import PreTrainedModel

from hf_mcsmoe.calibration.collect import collect_statistics
from hf_mcsmoe.evaluation.costs import account, folder_bytes
from hf_mcsmoe.layers.batches import Batch
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.low_rank.config import LoSparseConfig
from hf_mcsmoe.merge import Progress, merge_experts
from hf_mcsmoe.methods.config import MergeConfig
from hf_mcsmoe.plan import check_request, plan_merge
from hf_mcsmoe.refinement import check_refinement, refine_and_account, wanted
from hf_mcsmoe.repair.methods import RepairConfig


def compress(
    model: PreTrainedModel | Layers,
    batches: Iterable[Batch],
    config: MergeConfig | None = None,
    *,
    repair: RepairConfig | None = None,
    low_rank: LoSparseConfig | None = None,
    consume: bool = False,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """Return `model` with merged experts: statistics over `batches`, plan, merge; then what `refine` adds.

    The card tells what each stage holds, and what it executes in a forward of the first batch.

    Args:
        repair: how merged layers are fitted to the original ones; None leaves them as merged.
        low_rank: how merged experts are stored as low rank + sparse; None leaves them dense.
        consume: see `merge_experts`; not together with `repair`, which needs the original, nor with what may be
            refused only after the merge (`LoSparseConfig(energy=...)` without `allow_dense`).
        progress: called as `progress(layer name, layers done, layers)` while merging.

    Raises:
        ValueError: see `collect_statistics`, `plan_merge`, `merge_experts` and `refine`. Options are checked before
            any forward; only ranks by `energy` that make an expert larger are refused later, with `model` unchanged.
    """
    config, repair = config or MergeConfig(), wanted(repair)
    layers = Layers.of(model).uncompressed()
    model = layers.model
    check_refinement(check_request(layers, config), config, repair=repair, low_rank=low_rank)
    if consume:
        _check_consumed(repair, low_rank)
    stream = iter(batches)
    first = list(islice(stream, 1))
    batches = [*first, *stream] if repair or low_rank else chain(first, stream)
    statistics = collect_statistics(layers, batches, config.needs)
    measure = partial(account, batch=first[0])
    before = replace(measure(model), bytes_on_disk=folder_bytes(model.name_or_path))
    merged = merge_experts(
        layers, plan_merge(layers, statistics, config), statistics=statistics, consume=consume, progress=progress
    )
    refine_and_account(merged, model, batches, before, measure, repair=repair, low_rank=low_rank)
    return merged


def _check_consumed(repair: RepairConfig | None, low_rank: LoSparseConfig | None) -> None:
    """Raise ValueError where the original would be needed after the merge, or be lost to a refusal then."""
    if repair:
        raise ValueError("consume=True frees the experts that `repair` compares with; leave out one of them.")
    if low_rank and low_rank.energy is not None and not low_rank.allow_dense:
        raise ValueError(
            f"With energy={low_rank.energy} the merged weights decide on the ranks, and consume=True leaves no model "
            "to go back to if they are too large: pass allow_dense=True, or leave out consume."
        )
