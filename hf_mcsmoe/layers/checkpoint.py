"""The safetensors files of a folder, and which of their tensors make which weights of a model."""

import contextlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig, str_to_torch_dtype
from transformers.utils import logging

from hf_mcsmoe.files import read_json
from hf_mcsmoe.layers.hub import HubError, HubFile

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file, read by `[...]`.

    Read and not mapped: a mapped one may lie unaligned, and keeps all that is touched of its file in memory.
    """

    file: Path | HubFile
    start: int
    empty: torch.Tensor  # of its shape and dtype, on the meta device

    def is_floating_point(self) -> bool:
        """Tell whether it holds numbers that are no integers; asked by quantizers."""
        return self.empty.is_floating_point()

    def __getitem__(self, _: EllipsisType) -> torch.Tensor:
        tensor = torch.empty_like(self.empty, device="cpu")
        with self.file.open("rb") as file:
            file.seek(self.start)
            if file.readinto(tensor.reshape(-1).view(torch.uint8).numpy().data) != tensor.nbytes:
                raise ValueError(f"{self.file} has become shorter since it was opened.")
        return tensor


def find_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a folder's safetensors by name: one file, or shards under an index. Reads headers only.

    Raises:
        ValueError: there are no safetensors, a shard or a tensor of the index is missing, or a file is damaged.
    """
    if (folder / WEIGHTS).is_file():
        return tensors_of_file(folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        raise ValueError(
            f"{folder} holds neither {WEIGHTS} nor {INDEX}. Weights of another format can be loaded with "
            "from_pretrained and saved as safetensors with save_pretrained."
        )
    files = weight_map(folder / INDEX)
    if missing := sorted({file for file in files.values() if not (folder / file).is_file()}):
        raise ValueError(f"{folder} lacks {', '.join(missing)}, which {INDEX} names: the download is incomplete.")
    return without_absent(files, {file: tensors_of_file(folder / file) for file in dict.fromkeys(files.values())})


def without_absent(
    files: Mapping[str, str], inside: Mapping[str, Mapping[str, StoredTensor]]
) -> dict[str, StoredTensor]:
    """Return the tensors of shards by name.

    Args:
        files: the file of each tensor, as the index says.
        inside: the tensors of each file.

    Raises:
        ValueError: a file lacks a tensor that the index says it holds.
    """
    if absent := sorted(name for name, file in files.items() if name not in inside[file]):
        raise ValueError(
            f"{files[absent[0]]} lacks {len(absent)} of the tensors that {INDEX} says it holds ({absent[0]}, ...): "
            "index and shards belong to different checkpoints. Download both again."
        )
    return {name: inside[file][name] for name, file in files.items()}


def check_index(folder: Path) -> None:
    """Raise ValueError where a folder's weights lie in shards whose index is damaged or names files elsewhere."""
    if (folder / INDEX).is_file() and not (folder / WEIGHTS).is_file():
        weight_map(folder / INDEX)


def weight_map(index: Path) -> dict[str, str]:
    """Return the file's name by the tensor's, as the index of a checkpoint says.

    Raises:
        ValueError: it is damaged, or names files elsewhere.
    """
    files = read_json(index, "download it again").get("weight_map")
    is_map = isinstance(files, dict) and all(isinstance(file, str) for file in files.values())
    if not is_map or not files:
        raise ValueError(f"{index} is no index of safetensors (its weight_map is no object); download it again.")
    for file in set(files.values()):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(
                f"{index} names the shard {file!r}, which is no safetensors file in its folder: download it again."
            )
    return files


def tensors_of_file(path: Path | HubFile) -> dict[str, StoredTensor]:
    """Read a file's header: its length in eight bytes, then JSON with dtype, shape and place of each tensor.

    Raises:
        ValueError: it is damaged, or cannot be read.
        HubError: the Hub cannot be reached.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = path.size if isinstance(path, HubFile) else path.stat().st_size
            header = json.loads(file.read(min(length, size)))
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            empty = torch.empty(entry["shape"], dtype=str_to_torch_dtype[entry["dtype"]], device="meta")
            start, end = (8 + length + offset for offset in entry["data_offsets"])
            if end - start != empty.nbytes or end > size:
                raise ValueError(f"{name} lies outside of it")
            tensors[name] = StoredTensor(path, start, empty)
    except HubError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OSError, OverflowError, RuntimeError) as error:
        told = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(f"{path} is no whole safetensors file ({told}); download it again.") from None
    return tensors


@dataclass(frozen=True, eq=False)
class Part:
    """Tensors of a checkpoint that make weights of the model together, such as all experts' matrices of one role."""

    stored: tuple[str, ...]
    names: tuple[str, ...]
    is_renamed: bool  # and nothing else: one tensor under another name, or the same


class Conversion:
    """From stored tensors to weights of a model on the meta device, by Transformers' own conversion of checkpoints."""

    def __init__(
        self, model: PreTrainedModel, dtype: torch.dtype, device: torch.device, quantizer: Any = None
    ) -> None:
        """Look up what the family converts; weights go to `device`, in `dtype` but for those kept in float32.

        Args:
            quantizer: Transformers' quantizer that dequantizes what is stored.
        """
        self.model = model
        self.transforms = get_model_conversion_mapping(model)
        if quantizer is not None:
            self.transforms = quantizer.update_weight_conversions(self.transforms, model)
        self.device = device
        self.settings: dict[str, Any] = {
            "dtype": dtype,
            "dtype_plan": model._get_dtype_plan(dtype),
            "weight_mapping": self.transforms,
            "hf_quantizer": quantizer,
        }

    def parts(self, stored: Iterable[str]) -> list[Part]:
        """Group stored tensors, by name, by what they become; those that the model has no place for are left out."""
        target_of = self._target()
        groups: dict[tuple[tuple[str, ...], bool], list[str]] = defaultdict(list)
        for name in stored:
            names, is_renamed = target_of(name)
            if names:
                groups[names, is_renamed].append(name)
        return [
            Part(tuple(group), names, is_renamed and len(group) == 1) for (names, is_renamed), group in groups.items()
        ]

    def load(self, tensors: dict[str, Any], *, device: torch.device | None = None) -> Any:
        """Put what `tensors` make into the model; returns what Transformers reports of it.

        `model._weight_conversions`, by which the model is saved in the format that it came in, stays.
        """
        config = LoadStateDictConfig(device_map={"": device or self.device}, **self.settings)
        before = vars(self.model).get("_weight_conversions")
        with _no_progress():
            report, _ = convert_and_load_state_dict_in_model(self.model, tensors, config)
        if before is not None:
            self.model._weight_conversions = before
        return report

    def _target(self) -> Callable[[str], tuple[tuple[str, ...], bool]]:
        """Return the function from the name of a stored tensor to the names of the weights that it is a part of.

        Its answer also tells whether the tensor is renamed only.
        """
        state, prefix = self.model.state_dict(), self.model.base_model_prefix
        renamings = [entry for entry in self.transforms if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self.transforms if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}

        def target(stored: str) -> tuple[tuple[str, ...], bool]:
            name, pattern = rename_source_key(stored, renamings, converters, prefix, state)
            if name not in state and stored in state:
                name, pattern = rename_source_key(stored, [], [], prefix, state)
            patterns = by_pattern[pattern].target_patterns if pattern is not None else [name]
            # A converter is told by its first target.
            names = (name.replace(patterns[0], other) for other in patterns)
            return tuple(name for name in names if name in state), pattern is None

        return target


def converted_names(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """Return which weights of a model its family's checkpoints hold as something else, such as experts one by one."""
    converters = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightConverter)]
    targets = [re.compile(pattern.lstrip("^.")) for entry in converters for pattern in entry.target_patterns]
    return [name for name in names if any(target.search(name) for target in targets)]


@contextlib.contextmanager
def _no_progress() -> Iterator[None]:
    """Show no bar, which would be one a block."""
    before = logging.set_tqdm_hook(lambda factory, arguments, options: logging.EmptyTqdm(*arguments, **options))
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)
