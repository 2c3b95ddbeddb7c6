"""Teacher outputs computed once: the k largest log-probabilities at each label that counts, memory-mapped on disk.

A folder holds, for N labels that count (-100 does not) of all rows one after another:

- `offsets.npy` int64 [rows + 1], where each row's labels begin, and `labels.npy` int32 [N];
- `log_probs.npy` float32 [N, k], `token_ids.npy` int32 [N, k] and `rest.npy` float32 [N], see `top_log_probs`;
- `teacher_outputs.json`, what they were made of.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch.utils.data import Dataset
from transformers import PreTrainedModel
from transformers.data.data_collator import default_data_collator

from hf_mcsmoe.distillation.fingerprints import rows_fingerprint, weights_fingerprint
from hf_mcsmoe.distillation.losses import aligned_labels, top_log_probs
from hf_mcsmoe.distillation.teacher import check_vocabulary, vocabulary_size
from hf_mcsmoe.files import read_json, write_json
from hf_mcsmoe.layers.batches import evaluation_mode, forward
from hf_mcsmoe.layers.labels import labelled
from hf_mcsmoe.layers.packing import unpacked
from hf_mcsmoe.modeling.folders_mcsmoe import working_folder
from hf_mcsmoe.record import public_name

Collator = Callable[[list[Any]], dict[str, Any]]
FORMAT_VERSION = 1
DESCRIPTION, PROGRESS = "teacher_outputs.json", "progress.json"
# In a row: its number. In a batch: what is stored of its labels.
ROW = "teacher_row"
STORED = ("teacher_log_probs", "teacher_token_ids", "teacher_rest")
# What a folder tells of what it was made of.
TOLD = ("teacher", "vocabulary", "temperature", "top_k", "data")
# Their files, in the order of `top_log_probs`.
KEPT = ("log_probs", "token_ids", "rest")


def store_teacher_outputs(
    teacher: PreTrainedModel,
    dataset: Any,
    folder: str | Path,
    *,
    data_collator: Collator = default_data_collator,
    temperature: float = 2.0,
    top_k: int = 64,
    batch_size: int = 8,
) -> Path:
    """Run the teacher once over a data set and store what a distillation needs of it, about 8 k bytes per label.

    Written beside it, to `.<folder>.mcsmoe-work`, and moved when it is complete. A run that was killed goes on there.

    Args:
        dataset: rows by number, as the Trainer will be given them.
        data_collator: the Trainer's; it makes a batch with labels.
        temperature: of the distribution that is stored; training has to use the same.
        top_k: tokens kept per label; all of them where the vocabulary is smaller.

    Raises:
        ValueError: the folder exists or another run writes to it, rows without numbers, no labels, or a collator that
            draws at random.
    """
    target = Path(os.path.realpath(folder))
    if labelled(teacher) != "text":
        raise ValueError(f"Outputs are stored of models that write text, not of a {type(teacher).__name__}.")
    if target.exists():
        raise ValueError(f"{target} exists already; name another folder for the teacher's outputs, or remove it.")
    labels = [_row_labels(teacher, dataset, number, data_collator) for number in range(_length(dataset))]
    if not any(len(row) for row in labels):
        raise ValueError("No label of the data set counts (all are -100): there is nothing to store. Check the data.")
    description = {
        "format_version": FORMAT_VERSION,
        "teacher": teacher.name_or_path,
        "weights": weights_fingerprint(teacher.named_parameters()),
        "vocabulary": vocabulary_size(teacher),
        "temperature": float(temperature),
        "top_k": min(top_k, vocabulary_size(teacher)),
        "data": data_fingerprint(dataset, teacher),
    }
    with working_folder(target) as work, torch.no_grad(), evaluation_mode(teacher):
        partial = work / "outputs"
        arrays, done = _open_partial(partial, description, labels)
        for first in range(done, len(labels), batch_size):
            rows = range(first, min(first + batch_size, len(labels)))
            _store_rows(teacher, data_collator([dataset[row] for row in rows]), rows, arrays, description)
            for name in KEPT:
                arrays[name].flush()
            write_json(partial / PROGRESS, {"rows": rows.stop})
        (partial / PROGRESS).unlink()
        os.rename(partial, target)
    return Path(folder)


def _length(dataset: Any) -> int:
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ValueError(
            f"Stored teacher outputs belong to rows by number, which a {type(dataset).__name__} does not have: pass a "
            "data set with a length, or train with the teacher itself."
        )
    return len(dataset)


def data_fingerprint(dataset: Any, model: PreTrainedModel) -> str:
    """Return a hash of all rows, see `rows_fingerprint`."""
    return rows_fingerprint(dataset, model, range(_length(dataset)))


def _flat_labels(labels: torch.Tensor) -> np.ndarray:
    """Return those of some aligned labels that count, int32 [n]."""
    return labels[labels != -100].cpu().numpy().astype(np.int32)


def _row_labels(teacher: PreTrainedModel, dataset: Any, number: int, collator: Collator) -> np.ndarray:
    batch = unpacked(collator([dataset[number]]), encoder_decoder=teacher.config.is_encoder_decoder)
    if "labels" not in batch:
        raise ValueError(f"Distillation needs labels; a batch has {', '.join(batch)}.")
    return _flat_labels(aligned_labels(batch["labels"], not teacher.config.is_encoder_decoder))


def _open_partial(
    folder: Path, description: dict[str, Any], labels: Sequence[np.ndarray]
) -> tuple[dict[str, Any], int]:
    """Return the arrays to fill and how many rows a run before this one has filled already."""
    offsets = np.cumsum([0, *map(len, labels)])
    size = (int(offsets[-1]), description["top_k"])
    shapes = dict(zip(KEPT, ((np.float32, size), (np.int32, size), (np.float32, size[:1])), strict=True))
    if _is_begun(folder, description, labels):
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r+") for name in shapes}
    else:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        np.save(folder / "offsets.npy", offsets)
        np.save(folder / "labels.npy", np.concatenate(labels))
        arrays = {
            name: open_memmap(folder / f"{name}.npy", "w+", dtype=dtype, shape=shape)
            for name, (dtype, shape) in shapes.items()
        }
        write_json(folder / DESCRIPTION, description)
        write_json(folder / PROGRESS, {"rows": 0})
    arrays |= {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("offsets", "labels")}
    return arrays, read_json(folder / PROGRESS, "start again")["rows"]


def _is_begun(folder: Path, description: dict[str, Any], labels: Sequence[np.ndarray]) -> bool:
    """Return whether a killed run for the same rows left its arrays whole."""
    if not (folder / PROGRESS).is_file():
        return False
    try:
        same = read_json(folder / DESCRIPTION, "start again") == description
        for name in KEPT:
            _array(folder / f"{name}.npy")
        return same and np.array_equal(_array(folder / "labels.npy"), np.concatenate(labels))
    except (OSError, ValueError):
        return False


def _array(file: Path) -> np.ndarray:
    """Return the array in a file, memory-mapped.

    Raises:
        ValueError: it is cut off or no array.
    """
    try:
        return np.load(file, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise ValueError(f"{file} is cut off or damaged ({error}): delete {file.parent} and store it anew.") from None


def _store_rows(
    teacher: PreTrainedModel,
    batch: dict[str, Any],
    rows: range,
    arrays: dict[str, Any],
    description: dict[str, Any],
) -> None:
    batch = dict(unpacked(batch, encoder_decoder=teacher.config.is_encoder_decoder))
    labels = aligned_labels(batch["labels"], not teacher.config.is_encoder_decoder)
    here = slice(arrays["offsets"][rows.start], arrays["offsets"][rows.stop])
    if not np.array_equal(_flat_labels(labels), arrays["labels"][here]):
        raise ValueError(
            f"The labels of the rows {rows.start} to {rows.stop - 1} differ from one pass to the next: a collator "
            "that draws at random has no outputs that could be stored."
        )
    logits = forward(teacher, batch).logits
    kept = top_log_probs(logits[labels.to(logits.device) != -100], description["temperature"], description["top_k"])
    for name, values in zip(KEPT, kept, strict=True):
        arrays[name][here] = values.cpu().numpy()


class TeacherOutputs:
    """A folder of `store_teacher_outputs`; opened where it is read, so that it can be sent to other processes."""

    def __init__(self, folder: str | Path) -> None:
        """Read what the folder was made of.

        Raises:
            ValueError: it is not there, was not completed, or is of a later format.
        """
        self.folder = Path(folder)
        if not (self.folder / DESCRIPTION).is_file():
            raise ValueError(f"{folder} holds no complete teacher outputs; store_teacher_outputs writes them.")
        self.description = read_json(self.folder / DESCRIPTION, "store the teacher's outputs anew")
        if self.description.get("format_version") not in range(1, FORMAT_VERSION + 1):
            raise ValueError(f"{folder} was written by another version of hf_mcsmoe: upgrade it, or store them anew.")
        if lacking := [name for name in TOLD if name not in self.description]:
            raise ValueError(
                f"{self.folder / DESCRIPTION} does not tell {', '.join(lacking)}: delete {folder} and store it anew."
            )

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return TeacherOutputs, (self.folder,)

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """The memory-mapped arrays by name."""
        return {name: _array(self.folder / f"{name}.npy") for name in ("offsets", "labels", *KEPT)}

    def check(self, dataset: Any, student: PreTrainedModel, temperature: float) -> None:
        """Check that the folder belongs to this data set, to the student's vocabulary and to this temperature.

        Raises:
            ValueError: it belongs to another one.
        """
        check_vocabulary(vocabulary_size(student), self.description["vocabulary"])
        if self.description["temperature"] != temperature:
            raise ValueError(
                f"{self.folder} holds the teacher's outputs at temperature {self.description['temperature']}, not "
                f"{temperature}: set kd_temperature to it, or store them anew."
            )
        if self.description["data"] != data_fingerprint(dataset, student):
            raise ValueError(f"{self.folder} was made from another data set than the one to train on: store it anew.")
        sizes = {name: len(values) for name, values in self.arrays.items()}
        wanted = dict.fromkeys(sizes, int(self.arrays["offsets"][-1])) | {"offsets": len(dataset) + 1}
        if sizes != wanted:
            raise ValueError(f"The files in {self.folder} hold {sizes} entries, not {wanted}: store them anew.")

    def check_teacher(self, teacher: PreTrainedModel | str | Path | None) -> None:
        """Check that the outputs are those of a teacher, where one is named beside them.

        Raises:
            ValueError: they are of another one.
        """
        of, problem = self.description["teacher"], False
        if isinstance(teacher, PreTrainedModel):
            weights = weights_fingerprint(teacher.named_parameters())
            problem = self.description.get("weights", weights) != weights
        elif teacher is not None:
            problem = public_name(str(teacher)) != public_name(of)
        if problem:
            raise ValueError(
                f"{self.folder} holds the outputs of the teacher {of!r}, not of the one given: leave that out, "
                "or store them anew."
            )

    def of_rows(self, rows: Sequence[int], labels: np.ndarray) -> dict[str, torch.Tensor]:
        """Return what is stored of some rows, one after another, under the names of `STORED`.

        Args:
            labels: int [n], the labels that count of these rows.

        Raises:
            ValueError: the labels are not those that the teacher saw.
        """
        offsets = self.arrays["offsets"]
        places = np.concatenate([np.arange(offsets[row], offsets[row + 1]) for row in rows])
        if not np.array_equal(self.arrays["labels"][places], labels):
            raise ValueError(
                f"The labels of the rows {list(rows)} are not those that {self.folder} was made with: use the same "
                "data collator, with the same lengths."
            )
        top, ids, rest = (torch.from_numpy(self.arrays[name][places]) for name in KEPT)
        return dict(zip(STORED, (top, ids.long(), rest), strict=True))


class NumberedRows(Dataset):
    """A data set whose rows know their number."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {**self.dataset[number], ROW: number}


class CollatorWithOutputs:
    """A collator that adds to the batch of another one what is stored of its rows."""

    def __init__(self, collator: Collator, outputs: TeacherOutputs, shifted: bool) -> None:
        self.collator, self.outputs, self.shifted = collator, outputs, shifted

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate rows of `NumberedRows`."""
        numbers = [row[ROW] for row in rows]
        batch = self.collator([{name: value for name, value in row.items() if name != ROW} for row in rows])
        if "labels" not in batch:
            raise ValueError(f"Distillation needs labels; the batch has {', '.join(batch)}.")
        batch = dict(unpacked(batch, encoder_decoder=not self.shifted))
        return {**batch, **self.outputs.of_rows(numbers, _flat_labels(aligned_labels(batch["labels"], self.shifted)))}
