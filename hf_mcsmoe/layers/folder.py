"""A checkpoint on disk or the Hub as a model: weights are read when a block asks for them, and freed after it."""

import contextlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from hf_mcsmoe.layers.checkpoint import Conversion, Part, StoredTensor, find_tensors
from hf_mcsmoe.layers.dequantize import check_not_quantized, dequantized
from hf_mcsmoe.layers.loading import load_config, model_class
from hf_mcsmoe.layers.memory import keep_few_kernels, return_freed_memory
from hf_mcsmoe.layers.snapshot import Passage, Snapshot
from hf_mcsmoe.layers.streaming import BACK, Run, Turnstile, blocks


class Folder:
    """A checkpoint on disk: the model stands on the meta device, and has weights only where a block asked for them.

    What is written to them within the block is lost with it. Buffers that no checkpoint holds (of rotary embeddings,
    for example) are there all the time.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "cpu",
        dequantize: bool = False,
        commit: str | None = None,
        drops: bool = False,
    ) -> None:
        """Build the model of a folder, and find each of its weights in the files without reading any.

        Args:
            path: a folder with `config.json` and safetensors, one file or several with an index; or a Hub id, of which
                a shard is fetched when a block needs it.
            dtype: "auto" for the checkpoint's own, as in `from_pretrained`, or a torch dtype or its name.
            device: where weights are read to.
            dequantize: read quantized weights as those that they stand for, where Transformers can.
            commit: of a Hub id; None for where its main branch stands now.
            drops: whether to remove shards of a Hub id from the cache once no later block needs them, but for those
                that were there before; what is read again is fetched again.

        Raises:
            ValueError: no such folder or id, a damaged or incomplete one, a quantized checkpoint (see `dequantize`),
                or weights of another model than the configuration's.
        """
        folder = Path(path).expanduser()
        self.snapshot = None if folder.is_dir() else Snapshot(os.fspath(path), commit)
        name, folder = (str(folder), folder) if self.snapshot is None else (os.fspath(path), self.snapshot.folder)
        self.place = folder
        config = load_config(str(folder))
        quantizer = dequantized(config, str(folder)) if dequantize else None
        check_not_quantized(config, str(folder))
        return_freed_memory()
        keep_few_kernels()
        self.stored = find_tensors(folder) if self.snapshot is None else self.snapshot.tensors()
        self.device = torch.device(device)
        dtype = _dtype(dtype, config, self.stored)
        with torch.device("meta"):
            self.model: PreTrainedModel = model_class(config)._from_config(config, dtype=dtype).eval()
        self.model.config.name_or_path = self.model.name_or_path = name
        if self.model.can_generate():
            with contextlib.suppress(OSError):  # none lies there
                self.model.generation_config = GenerationConfig.from_pretrained(str(folder))
        self._conversion = Conversion(self.model, dtype, self.device, quantizer)
        self._places = {name: _Place.of(self.model, name) for name in self.model.state_dict()}
        self._parts = {name: part for part in self._conversion.parts(self.stored) for name in part.names}
        self._passage = self._shards(drops=drops)
        self._tied = self._ties()
        self._uses: Counter[Part] = Counter()
        self._dtypes = self._check(folder)
        self._initialise()

    @contextlib.contextmanager
    def loaded(self, path: str) -> Iterator[nn.Module]:
        """Yield the module at `path` with its weights, which are read unless they are there, and freed afterwards.

        A path may be said as `back` does, where blocks are read in reverse.
        """
        path, is_back = path.removesuffix(BACK), path.endswith(BACK)
        module = self.model.get_submodule(path)
        with self._held(name for name in self._places if name.startswith(f"{path}.") or not path):
            if self._passage:
                self._passage.entered(path, is_back=is_back)
            yield module
        if self._passage:
            self._passage.left(path, is_back=is_back)

    @property
    def file_bytes(self) -> int:
        """The bytes of its weight files, which those of the Hub have where they are not fetched."""
        ends: Counter[str] = Counter()
        for tensor in self.stored.values():
            ends[tensor.file.name] = max(ends[tensor.file.name], tensor.start + tensor.empty.nbytes)
        return ends.total()

    @property
    def drops(self) -> bool:
        """Whether shards of a Hub id that this fetches leave the cache again."""
        return self._passage is not None and self._passage.drops

    def end_pass(self) -> None:
        """End a pass over the blocks that several processes share, each of which calls this; see `Passage.end`."""
        if self._passage:
            self._passage.end()

    def drop_fetched(self) -> None:
        """Remove all shards from the cache of the Hub that this has fetched, where they are to be dropped."""
        if self._passage:
            self._passage.close()

    def _shards(self, *, drops: bool) -> Passage | None:
        """Return the passage of the shards that are on the Hub; None for a folder."""
        if self.snapshot is None:
            return None
        paths = list(blocks(self.model))
        found: dict[str, set[str]] = {path: set() for path in ["", *paths]}
        for name, part in self._parts.items():
            path = next((path for path in paths if name.startswith(f"{path}.")), "")
            found[path] |= {self.stored[stored].file.name for stored in part.stored}
        return Passage(self.snapshot, found, drops=drops)

    @contextlib.contextmanager
    def streamed(self) -> Iterator[Run]:
        """Let forwards load and free block by block; what lies outside the blocks is there all the time.

        Pass `use_cache=False` in the batches, or each keeps the keys and values of all blocks. Gradients reach weights
        by `backward_of` alone, since these are gone after the forward.
        """
        turnstile = Turnstile(blocks(self.model), self.loaded)
        with self.loaded_outside(), turnstile.installed():
            yield turnstile.run

    @contextlib.contextmanager
    def loaded_outside(self) -> Iterator[None]:
        """Hold the weights that lie outside the model's blocks."""
        inside = tuple(f"{path}." for path in blocks(self.model))
        with self._held(name for name in self._places if not name.startswith(inside)):
            yield

    @contextlib.contextmanager
    def tensors(self, names: Iterable[str]) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the weights called `names`, as in `model.state_dict()`."""
        names = list(names)
        if unknown := [name for name in names if name not in self._places]:
            raise ValueError(f"{self.model.name_or_path} has no weight {unknown[0]!r}.")
        with self._held(names):
            yield {name: self._places[name].tensor for name in names}

    @contextlib.contextmanager
    def _held(self, names: Iterable[str]) -> Iterator[None]:
        """Hold the weights called `names`, together with those that are stored as one with them."""
        parts = list(dict.fromkeys(self._parts[name] for name in names if name in self._parts))
        self._fetch(part for part in parts if not self._uses[part])
        with contextlib.ExitStack() as stack:
            for part in parts:
                self._uses[part] += 1
                stack.callback(self._release, part)
                if self._uses[part] == 1:
                    self._load(part)
            yield

    def _fetch(self, parts: Iterable[Part]) -> None:
        """Let what parts are made of be on this machine before it is read."""
        if self.snapshot is not None:
            self.snapshot.fetch_for(self.stored[name] for part in parts for name in part.stored)

    def _load(self, part: Part) -> None:
        if part.is_renamed:
            place, tensor = self._places[part.names[0]], self.stored[part.stored[0]][...]
            place.tensor = _like(place.empty, tensor.to(self.device, self._dtypes[part.names[0]]))
        else:
            report = self._conversion.load({name: self.stored[name] for name in part.stored})
            _check_report(report, part.names)
        for name in part.names:
            tensor = self._places[name].tensor
            tensor.requires_grad_(self._places[name].empty.requires_grad)
            for alias in self._tied.get(name, ()):
                self._places[alias].tensor = tensor

    def _release(self, part: Part) -> None:
        self._uses[part] -= 1
        if not self._uses[part]:
            for name in part.names:
                for place in (self._places[name] for name in (name, *self._tied.get(name, ()))):
                    place.tensor = place.empty

    def _ties(self) -> dict[str, list[str]]:
        """Return the other names of weights that have several, by the name under which they are stored.

        Where a checkpoint holds two of them with different values they are no longer one, as in `from_pretrained`.
        """
        shared: dict[int, list[str]] = defaultdict(list)
        for name, place in self._places.items():
            shared[id(place.empty)].append(name)
        ties = {}
        for names in (names for names in shared.values() if len(names) > 1):
            first = next((name for name in names if name in self._parts), names[0])
            for name in names:
                if name in self._parts and not self._equal(self._parts[first], self._parts[name]):
                    self._places[name].untie()
                    self.model.all_tied_weights_keys.pop(name, None)
            ties[first] = [name for name in names if self._places[name].empty is self._places[first].empty]
            ties[first].remove(first)
            self._parts |= {name: self._parts[first] for name in ties[first] if first in self._parts}
        return ties

    def _equal(self, one: Part, other: Part) -> bool:
        if one is other:
            return True
        self._fetch((one, other))
        pairs = zip(one.stored, other.stored, strict=False)
        return len(one.stored) == len(other.stored) and all(
            torch.equal(self.stored[first][...], self.stored[second][...]) for first, second in pairs
        )

    def _check(self, folder: Path) -> dict[str, torch.dtype]:
        """Return the dtype that each weight is loaded in, found by a load on the meta device.

        Raises:
            ValueError: the files do not hold all weights of the model, in the shapes of its configuration.
        """
        ignored = self.model._keys_to_ignore_on_load_missing or ()
        missing = [
            name
            for name in self._places
            if name not in self._parts and not any(re.search(pattern, name) for pattern in ignored)
        ]
        if missing:
            raise ValueError(
                f"{folder} lacks {len(missing)} weights of {type(self.model).__name__} ({missing[0]}, ...): the "
                "download is incomplete or the checkpoint belongs to another class."
            )
        empty = {name: tensor.empty for name, tensor in self.stored.items()}
        try:
            report = self._conversion.load(empty, device=torch.device("meta"))
            dtypes = {name: place.tensor.dtype for name, place in self._places.items()}
        finally:
            for place in self._places.values():
                place.tensor = place.empty
        _check_report(report, [name for part in set(self._parts.values()) for name in part.names])
        return dtypes

    def _initialise(self) -> None:
        """Give buffers that are not stored, and weights that need not be, the values that the model's class gives."""
        made = [_Place.of(self.model, name) for name, _ in self.model.named_non_persistent_buffers()]
        for name, place in self._places.items():
            if name in self._parts:
                place.empty._is_hf_initialized = True  # type: ignore[attr-defined]
            else:
                made.append(place)
        for place in made:
            place.materialise()
        self.model.initialize_weights()
        for place in made:
            place.move(self.device)


@dataclass
class _Place:
    """Where a module keeps one tensor, and what stands there while it is not loaded."""

    owner: dict[str, Any]
    attribute: str
    empty: torch.Tensor

    @classmethod
    def of(cls, model: nn.Module, name: str) -> "_Place":
        """Return the place of a parameter or buffer by its name in the model."""
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        owner = vars(module)["_parameters" if attribute in vars(module)["_parameters"] else "_buffers"]
        return cls(owner, attribute, owner[attribute])

    @property
    def tensor(self) -> torch.Tensor:
        """What stands there."""
        return self.owner[self.attribute]

    @tensor.setter
    def tensor(self, tensor: torch.Tensor) -> None:
        self.owner[self.attribute] = tensor

    def untie(self) -> None:
        """Let something of its own stand there while it is not loaded."""
        self.tensor = self.empty = _like(self.empty, self.empty)

    def materialise(self) -> None:
        """Give it memory on the CPU for good."""
        self.tensor = _like(self.empty, torch.empty_like(self.empty, device="cpu"))

    def move(self, device: torch.device) -> None:
        """Move it for good."""
        self.tensor = self.empty = _like(self.empty, self.tensor.detach().to(device))


def _like(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    return nn.Parameter(new.detach(), old.requires_grad) if isinstance(old, nn.Parameter) else new


def _dtype(dtype: str | torch.dtype, config: PreTrainedConfig, stored: dict[str, StoredTensor]) -> torch.dtype:
    if dtype == "auto":
        floating = (tensor.empty.dtype for tensor in stored.values() if tensor.empty.is_floating_point())
        dtype = config.dtype or next(floating, torch.float32)
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype={dtype!r} names no dtype of Torch; say auto, bfloat16, float16 or float32.")
    return found


def _check_report(report: Any, names: Iterable[str]) -> None:
    """Raise ValueError where weights called `names` could not be made of the stored tensors."""
    told = [
        f"{name} is {tuple(stored)} and should be {tuple(shape)}" for name, stored, shape in report.mismatched_keys
    ]
    told += [f"{name}: {error}" for name, error in report.conversion_errors.items()]
    told += [f"{name} was not made" for name in sorted(report.missing_keys.intersection(names))]
    if told:
        raise ValueError(
            f"The checkpoint does not fit its configuration: {'; '.join(told[:3])}. It is damaged or belongs to "
            "another model."
        )
