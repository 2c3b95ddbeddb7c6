"""What no calibration data tell of a layer: how its router differs from that of a reference checkpoint."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.reference import read_weights
from hf_mcsmoe.methods.router_norm import CHANGE
from hf_mcsmoe.methods.statistics import of_data
from hf_mcsmoe.methods.view import Sums


def add_reference(statistics: RoutingStatistics, layers: Layers, base_model: str | Path) -> RoutingStatistics:
    """Return the statistics with "router_norm_change" [E] of every layer: how much longer its router's rows became.

    Args:
        layers: those of the model that the statistics are of, with its weights.
        base_model: folder or Hub id of the checkpoint that it was trained from; only its routers are read.

    Raises:
        ValueError: see `reference_norms`.
    """
    return with_reference(statistics, layers, reference_norms(layers, base_model))


def reference_norms(layers: Layers, base_model: str | Path) -> dict[str, torch.Tensor]:
    """Return the norms of the rows of the routers of a reference checkpoint, float64 [E], by the layer's name.

    Args:
        layers: of the model that is compared with it; no weight of theirs is read.

    Raises:
        ValueError: see `read_weights`; routers without rows for the experts, or of another shape there.
    """
    paths = {layer.name: _rows(layer.name, layer.router_rows) for layer in layers}
    found = read_weights(str(base_model), list(paths.values()))
    for path in paths.values():
        wanted = layers.model.get_parameter(path).shape
        if found[path].shape != wanted:
            raise ValueError(
                f"{path} is {tuple(found[path].shape)} in {base_model} and {tuple(wanted)} in the model: they are no "
                "two states of one model. Name the checkpoint that it was trained from."
            )
    return {name: found[path].double().norm(dim=1) for name, path in paths.items()}


def with_reference(
    statistics: RoutingStatistics, layers: Layers, norms: Mapping[str, torch.Tensor]
) -> RoutingStatistics:
    """Return the statistics with the changes of the routers' rows since they had these norms; see `add_reference`."""
    changed = {}
    for layer in layers:
        with layer.view(Sums(), 0) as view:
            rows = view.router
        if rows is None:
            raise ValueError(_without_rows(layer.name))
        change = rows.double().norm(dim=1).cpu() - norms[layer.name]
        changed[layer.name] = Sums(statistics[layer.name] | {CHANGE: change})
    return replace(statistics, layers={**statistics.layers, **changed})


def check_reference(
    needs: Iterable[str], base_model: str | Path | None, held: RoutingStatistics | None = None
) -> None:
    """Raise ValueError where a reference checkpoint is missing, or there is one that nothing reads.

    Args:
        held: statistics that were taken before, which may hold the change already.
    """
    needs = list(needs)
    reads = [name for name in needs if name not in of_data(needs)]
    lacking = [name for name in reads if held is None or any(name not in sums for sums in held.layers.values())]
    if lacking and base_model is None:
        raise ValueError(
            f"{lacking[0]} compares the routers with those of the checkpoint that the model was trained from: name it "
            "with --base-model (base_model)."
        )
    if base_model is not None and not reads:
        raise ValueError(
            f"base_model={str(base_model)!r} is read by the saliency {CHANGE!r} alone: choose that, or leave it out."
        )


def _rows(layer_name: str, path: str | None) -> str:
    if path is None:
        raise ValueError(_without_rows(layer_name))
    return path


def _without_rows(layer_name: str) -> str:
    return (
        f"The router of {layer_name} has no matrix with a row for each expert, so that {CHANGE!r} cannot be told: "
        "choose another saliency."
    )
