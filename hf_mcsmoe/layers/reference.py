"""A few weights of another checkpoint, by their names in a model: nothing else of it is read."""

from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError

from hf_mcsmoe.layers.checkpoint import INDEX, WEIGHTS, Conversion, tensors_of_file, weight_map
from hf_mcsmoe.layers.hub import HubFile
from hf_mcsmoe.layers.loading import empty_model

File = Path | HubFile


def read_weights(name_or_path: str, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Return weights of a checkpoint, in the dtype that they are stored in.

    Args:
        name_or_path: a folder or Hub id. Of its files only the index is fetched whole; of the shards that hold these
            weights, the header, and the weights.
        names: as in `model.state_dict()`, of the class that its configuration names.

    Raises:
        ValueError: see `load_config`; a damaged file, or a name that the checkpoint has no weight of.
    """
    model = empty_model(name_or_path)
    conversion = Conversion(model, torch.float32, torch.device("cpu"))
    headers = cache(tensors_of_file)
    files = _files(name_or_path, headers)
    parts = {name: part for part in conversion.parts(files) for name in part.names}
    if missing := [name for name in names if name not in parts]:
        raise ValueError(
            f"{name_or_path} has no weight {missing[0]!r}: it is incomplete or of another architecture. Name the "
            "checkpoint that the model was trained from."
        )
    needed = list(dict.fromkeys(stored for name in names for stored in parts[name].stored))
    tensors = {stored: headers(files[stored])[stored] for stored in needed}
    found = {}
    for name in names:
        part = parts[name]
        if part.is_renamed:
            found[name] = tensors[part.stored[0]][...]
        else:
            conversion.load({stored: tensors[stored] for stored in part.stored})
            found[name] = model.state_dict()[name]
    return found


def _files(name_or_path: str, headers: Callable[[File], Iterable[str]]) -> dict[str, File]:
    """Return the file of each tensor of a checkpoint by the tensor's name.

    Args:
        headers: returns the tensors of a file.

    Raises:
        ValueError: there are no safetensors, or a damaged index.
    """
    folder = Path(name_or_path)
    index: Path | None
    place: Callable[[str], File]
    if folder.is_dir():
        index, place = None if (folder / WEIGHTS).is_file() else folder / INDEX, folder.joinpath
    else:
        index, place = _index(name_or_path), partial(_on_hub, name_or_path)
    if index is None:
        single = place(WEIGHTS)
        return dict.fromkeys(headers(single), single)
    shards = weight_map(index)
    places = {shard: place(shard) for shard in set(shards.values())}
    return {name: places[shard] for name, shard in shards.items()}


def _on_hub(repo_id: str, name: str) -> File:
    """Return a file in the cache, or else on the Hub."""
    cached = try_to_load_from_cache(repo_id, name)
    return Path(cached) if isinstance(cached, str) else HubFile(repo_id, name)


def _index(repo_id: str) -> Path | None:
    """Return the index of a repository's shards, or None where all weights are in one file."""
    if isinstance(_on_hub(repo_id, WEIGHTS), Path):
        return None
    try:
        return Path(hf_hub_download(repo_id, INDEX))
    except EntryNotFoundError:
        return None
