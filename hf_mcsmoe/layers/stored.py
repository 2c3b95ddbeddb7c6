"""How many bytes a checkpoint's weight files take: told by the files, by the index of its shards, or computed."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, hf_hub_download
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_mcsmoe.files import read_json
from hf_mcsmoe.layers.checkpoint import INDEX, WEIGHTS, weight_map
from hf_mcsmoe.layers.dequantize import quantization_method, quantization_settings
from hf_mcsmoe.layers.hub import HubError, HubFile

# How bytes are known.
FILES, BY_INDEX, BY_CONFIG = "files", "index", "configuration"
# Bits a weight of MXFP4: four, and a scale of eight for 32 of them.
MXFP4_BITS = 4 + 8 / 32


@dataclass(frozen=True)
class Stored:
    """The bytes of weight files, and how they are known: `FILES`, `BY_INDEX` or `BY_CONFIG`."""

    bytes: int
    known_by: str


def stored_bytes(name_or_path: str) -> Stored | None:
    """Return what a folder's or a repository's files or index say; None where neither is to be had. Reads no weights.

    Raises:
        ValueError: a damaged index, or one that names files elsewhere.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        return _in_folder(folder)
    with contextlib.suppress(HubError):
        return None if constants.is_offline_mode() else _on_hub(name_or_path)
    return None


def _in_folder(folder: Path) -> Stored | None:
    if (folder / WEIGHTS).is_file():
        return Stored((folder / WEIGHTS).stat().st_size, FILES)
    if not (folder / INDEX).is_file():
        return None
    shards = [folder / name for name in set(weight_map(folder / INDEX).values())]
    if all(shard.is_file() for shard in shards):
        return Stored(sum(shard.stat().st_size for shard in shards), FILES)
    return _by_index(folder / INDEX)


def _by_index(index: Path) -> Stored | None:
    """Return the total that an index tells, or None where it tells none."""
    weight_map(index)
    metadata = read_json(index, "download it again").get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return Stored(int(total), BY_INDEX) if isinstance(total, int | float) and total > 0 else None


def _on_hub(repo_id: str) -> Stored | None:
    """Return what the index of a repository says, or how long its single file is; the Hub is asked once for each."""
    if HubFile(repo_id, INDEX).exists():
        return _by_index(Path(hf_hub_download(repo_id, INDEX)))
    single = HubFile(repo_id, WEIGHTS)
    return Stored(single.size, FILES) if single.exists() else None


def configured_bytes(model: PreTrainedModel, config: PreTrainedConfig) -> Stored:
    """Return the bytes of the weights of `model`, dense and without memory, as `config` says that they are stored.

    FP8 takes a byte for each weight of a linear layer or expert, and a scale in float32 for each of its blocks; MXFP4
    takes 4.25 bits for each weight of an expert. What `modules_to_not_convert` names, and the output embedding, stay
    as they are.
    """
    method, settings = quantization_method(config), quantization_settings(config)
    kept = [str(name) for name in settings.get("modules_to_not_convert") or ()]
    small = {} if method is None else dict(_quantized(model, kept, experts_only=method == "mxfp4"))
    seen, total = set(), 0.0
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            total += _bytes(tensor, settings, method) if name in small else tensor.nbytes
    return Stored(math.ceil(total), BY_CONFIG)


def _quantized(model: PreTrainedModel, kept: list[str], *, experts_only: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights that are stored in few bits: matrices of linear layers, and the stacks of experts."""
    head = model.get_output_embeddings()
    for path, module in model.named_modules():
        if module is head or any(name.strip("*.").replace("*.", "") in path for name in kept):
            continue
        for name, tensor in module.named_parameters(recurse=False):
            is_linear = isinstance(module, nn.Linear) and tensor.ndim == 2
            if tensor.ndim == 3 or (is_linear and not experts_only):
                yield f"{path}.{name}", tensor


def _bytes(tensor: torch.Tensor, settings: Mapping[str, Any], method: str | None) -> float:
    if method == "mxfp4":
        return tensor.numel() * MXFP4_BITS / 8
    rows, columns = tensor.shape[-2:]
    block = settings.get("weight_block_size") or (rows, columns)
    scales = math.ceil(rows / block[0]) * math.ceil(columns / block[1])
    return tensor.numel() + scales * (tensor.numel() // (rows * columns)) * torch.float32.itemsize
