"""What a search for a size may choose so that a plain checkpoint can hold it, and engines can run that."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from hf_mcsmoe.export.engines import broken, check_engines
from hf_mcsmoe.export.expected import Plain, check_plain
from hf_mcsmoe.export.form import check_family, least_experts, router_groups, shape_of
from hf_mcsmoe.export.quantized import READERS, TRANSFORMERS, Scheme, check_readers
from hf_mcsmoe.export.stored import check_mxfp4
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.methods.choice import AUTO, BITS
from hf_mcsmoe.methods.config import UNIFORM, MergeConfig
from hf_mcsmoe.quantization.config import QuantizationConfig
from hf_mcsmoe.search.choices import grids
from hf_mcsmoe.search.compress import check_size, saved_bytes
from hf_mcsmoe.search.config import LAYER, MODEL, SizeConfig

# The stages of `compress` that change how experts are stored.
BY_HAND = ("low_rank", "quantization", "sparsity")


def plain_size(layers: Layers, search: SizeConfig, plain: Plain, skip: Sequence[str] = ()) -> SizeConfig:
    """Return a search with no choice that the plain form, or an engine, has no place for; before any forward.

    These are counts of experts that all engines run, the same in all layers; bits that all of them read, around zero
    and alike in a layer, or in all of them; experts that are pruned where merged ones would not keep a router's groups
    apart. With `expand` counts are free, and with `dense` bits and ranks. A search that is one already stays as it is.

    Raises:
        ValueError: what is asked for by name is none of that, or nothing is left to choose.
    """
    check_family(layers)
    if skip:
        raise ValueError(
            f"skip={tuple(skip)!r} leaves layers as they are, and a plain checkpoint has one number of experts for "
            "all: leave it out."
        )
    if plain.mxfp4:
        check_mxfp4(layers, is_dense=plain.dense)
    search = replace(search, reduce=_reduction(layers, search, plain))
    if not plain.expand:
        search = replace(search, uniform_experts=True, counts=_counts(layers, search, plain))
    _check_fewest(layers, search, plain)
    return search if plain.dense else _stored(layers, search, plain)


def plain_bytes(layers: Layers, config: MergeConfig, plain: Plain, stages: Mapping[str, Any]) -> int:
    """Check, before any forward and without weights, that all of `compress` ends with a model that has a plain form.

    Args:
        stages: all options of `compress` beside the merge by their names, a `size` as `plain_size` gave it.

    Returns:
        The bytes of the weights of the plain checkpoint, of a size about as many.

    Raises:
        ValueError: see `check_plain`.
    """
    search = stages.get("size")
    if search is None:
        return check_plain(layers, config, plain, **{name: stages.get(name) for name in BY_HAND})
    is_whole = plain.expand or plain.dense
    return saved_bytes(layers) if is_whole else check_size(layers, config, search)


def _reduction(layers: Layers, search: SizeConfig, plain: Plain) -> str:
    """Return the reductions that there may be."""
    groups = router_groups(layers[0])
    if plain.expand:
        wanted, why = "merge", "expand puts merged experts into all of their places, and pruned ones have none"
    elif groups > 1:
        wanted, why = "prune", f"these routers pick among {groups} groups, which merged experts would not keep apart"
    else:
        return search.reduce
    if search.reduce not in (AUTO, wanted):
        raise ValueError(f"reduce={search.reduce!r} has no plain form here: {why}. Choose reduce={wanted!r}.")
    return wanted


def _counts(layers: Layers, search: SizeConfig, plain: Plain) -> tuple[int, ...]:
    """Return the numbers of experts that all engines run, and that were asked for where some were."""
    most, groups = min(layer.num_experts for layer in layers), router_groups(layers[0])
    least = max(search.min_experts, *(max(least_experts(layer), layer.top_k or 1) for layer in layers))
    known = range(least, most + 1) if search.counts is None else search.counts
    counts = [count for count in known if least <= count <= most and count % groups == 0]
    found = tuple(count for count in counts if not broken(plain.engines, shape_of(layers, count)))
    if not found:
        check_engines(plain.engines, shape_of(layers, counts[-1] if counts else most))
        raise ValueError(f"No number of experts from {least} to {most} suits these routers: keep to none of them.")
    return found


def _check_fewest(layers: Layers, search: SizeConfig, plain: Plain) -> None:
    """Raise ValueError where `export` would not take the fewest experts that may be chosen, dense."""
    fewest = max(1, layers[0].num_experts // 2) if search.counts is None else search.counts[0]
    for reduce in search.reductions:
        # Dense as they are, so that MXFP4 is looked at by itself.
        check_plain(layers, _by_hand(fewest, reduce), replace(plain, mxfp4=False))


def _by_hand(experts: int | float, reduce: str = "merge") -> MergeConfig:
    return MergeConfig(experts=experts, reduce=reduce, budget=UNIFORM, plain=True)


def _stored(layers: Layers, search: SizeConfig, plain: Plain) -> SizeConfig:
    """Return a search among the bits that all readers know, and in which they know them."""
    if search.ranks:
        raise ValueError(
            f"rank={search.ranks[0]} stores experts as no model of the family's class does: leave it out, or multiply "
            "them out with dense=True (--dense)."
        )
    names = plain.engines or (TRANSFORMERS,)
    is_asked = search.bits != BITS
    if is_asked:
        for bits in search.bits:
            check_readers({"": Scheme(bits, search.group_size)}, names)
    known = tuple(bits for bits in search.bits if all(bits in READERS[name].bits for name in names))
    several = all(READERS[name].several for name in names)
    search = replace(search, ranks=(), bits=known, alike=LAYER if several else MODEL)
    if not known:
        return search
    try:
        if several and len(layers) > 1:
            _check_packed(layers, search, plain, skip=(layers[0].name,))
        _check_packed(layers, search, plain)
    except ValueError:
        if is_asked:
            raise
        return replace(search, bits=())
    return search


def _check_packed(layers: Layers, search: SizeConfig, plain: Plain, **options: Any) -> None:
    """Raise ValueError where `export` would not take experts in few bits."""
    grid = grids(layers[0], search)[0][0]
    config = QuantizationConfig(bits=grid.bits, group_size=grid.group_size, **options)
    if any(len(shared) > 1 for shared in layers.tied):
        raise ValueError(f"Layers share their experts, and cannot be stored in few bits: leave bits={search.bits!r}.")
    check_plain(layers, _by_hand(1.0), plain, quantization=config)
