"""Saving a merged model as a folder that is complete and loads anywhere. This file travels with every checkpoint."""

import contextlib
import inspect
import json
import os
import re
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any, cast

from huggingface_hub import CommitInfo, metadata_load, metadata_save
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from .companions_mcsmoe import (
    TOKENIZER,
    copy_companions,
    kind_of,
    matches,
    remember_source,
    source_of,
)
from .configuration_mcsmoe import source_files
from .folders_mcsmoe import COMMIT_ARGUMENTS, CONFIG, completed_folder, follow_umask, repository
from .losparse_mcsmoe import sparse_parts
from .plain_mcsmoe import plain_form

# What a checkpoint that is merged already passes on when it is saved again.
CARD_FILE, PLAN_FILE, RECORD_FILE = "README.md", "mcsmoe_plan.json", "mcsmoe_record.json"
RECIPE_FILE = "mcsmoe_recipe.yaml"
DOCUMENTS = (CARD_FILE, PLAN_FILE, RECORD_FILE, RECIPE_FILE)
# Stand in the card for what is known when it is saved: the name of the folder or repository, and the weights' bytes.
MODEL_ID, BYTES_ON_DISK, SAVED = "@MODEL_ID@", "@BYTES_ON_DISK@", "@SAVED@"
# What the generated section of the card stands between; all else belongs to whoever wrote it.
SECTION = ("<!-- mcsmoe -->", "<!-- /mcsmoe -->")


class SavedWhole:
    """Base of merged models: saves and pushes code, tokenizer, plan, record and card together with the weights."""

    # What was done to the model in this process; None where the record beside its source still tells all.
    mcsmoe_record: Any = None
    # The checkpoint that it came from: its folder or id, a subfolder in there, and the cache; see `remember_source`.
    mcsmoe_source: Any = None
    # Whether its weights, which are on the meta device, were written block by block.
    mcsmoe_is_written = False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load as `PreTrainedModel.from_pretrained` does, and remember from where."""
        loaded = cast(Any, super()).from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        place = {"subfolder": kwargs.get("subfolder") or "", "cache_dir": kwargs.get("cache_dir")}
        remember_source(
            loaded[0] if isinstance(loaded, tuple) else loaded, str(pretrained_model_name_or_path), **place
        )
        return loaded

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save a complete folder: weights, configuration, modelling files, tokenizer, plan and model card.

        Low rank + sparse experts are saved in the compact form, and a model that was pruned to one count of experts as
        one of its family's own, which needs no modelling files; but not in a Trainer's `checkpoint-<step>` folders.

        Written beside the target and moved in when complete: a killed save leaves the old checkpoint, the new one, or
        none that loads. A tokenizer that was saved to the folder before stays. Takes the arguments of
        `PreTrainedModel.save_pretrained`, `tags` for the card, and a `tokenizer` in place of the source's.

        Raises:
            ValueError: another process writes to the folder, it is that of the original model, or the model carries
                adapters.
        """
        given = (
            inspect.signature(PreTrainedModel.save_pretrained).bind(self, save_directory, *args, **kwargs).arguments
        )
        kwargs = {key: value for key, value in given.items() if key not in ("self", "save_directory", "kwargs")}
        kwargs |= given.get("kwargs", {})
        target = Path(os.path.realpath(save_directory))
        push_to_hub = kwargs.pop("push_to_hub", False) and kwargs.get("is_main_process", True)
        repo_id, private = kwargs.pop("repo_id", target.name), kwargs.pop("private", None)
        commit = {key: kwargs.pop(key) for key in COMMIT_ARGUMENTS if key in kwargs}
        if push_to_hub:
            api, repo_id = repository(repo_id, private, kwargs.get("token"), commit.get("revision"))
        # Trainer's own name for what it resumes from, where S keeps its training form.
        resumable = re.fullmatch(r"checkpoint-\d+", target.name) is not None
        if not self.should_save_on_this_rank(kwargs.get("is_main_process", True)):
            with tempfile.TemporaryDirectory() as scratch:  # which stays empty
                self._save_folder(Path(scratch), repo_id, resumable=resumable, **kwargs)
            return
        self._check_target(target)
        with completed_folder(target) as folder:
            self._save_into(target, folder, repo_id, resumable=resumable, **kwargs)
            written = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]
        if push_to_hub:
            api.upload_folder(repo_id=repo_id, folder_path=target, allow_patterns=written, **commit)

    def _save_into(self, target: Path, folder: Path, model_id: str, **kwargs: Any) -> None:
        """Save to `folder` what will be moved to `target`, with regard to what lies there."""
        # Tokenizers beside no model are the user's.
        kept = _kinds_in(target) if target.is_dir() and not (target / CONFIG).exists() else ()
        self._save_folder(folder, model_id, leave=kept, **kwargs)
        with contextlib.suppress(OSError):
            _keep_card(target, folder)

    def _check_target(self, target: Path) -> None:
        source = source_of(self)
        if source and target == source and not _is_compressed(source):
            raise ValueError(
                f"{target} holds the original model, which saving here would destroy: name another folder."
            )

    def _save_folder(
        self,
        folder: Path,
        model_id: str,
        *,
        resumable: bool = False,
        tags: list[str] | str | None = None,
        tokenizer: Any = None,
        leave: tuple[str, ...] = (),
        **kwargs: Any,
    ) -> None:
        if kwargs.get("state_dict") is None and any(".base_layer." in name for name, _ in self.named_parameters()):
            raise ValueError(
                "The model carries adapters of PEFT, whose names no load would know: save it with the Trainer's "
                "save_model, which merges them into the weights, or call merge_and_unload() of the PEFT model first."
            )
        plain = None if resumable else plain_form(cast(Any, self))
        if plain is None:
            self._save_own(folder, is_compact=not resumable, **kwargs)
        else:
            plain.save_pretrained(folder, **kwargs)
        if not any(folder.iterdir()):  # another process writes
            return
        for file in () if plain else source_files():
            shutil.copyfile(file, folder / file.name)
        source = source_of(self)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if source:
            copy_companions(source, folder, leave if tokenizer is None else (*leave, "tokenizer"))
        _tell_what_is_lacking(self.name_or_path, source, folder, leave)
        write_documents(self.mcsmoe_record, source, folder, model_id)
        _add_tags(folder / CARD_FILE, [*(self.model_tags or []), *([tags] if isinstance(tags, str) else tags or [])])

    def _save_own(self, folder: Path, *, is_compact: bool, **kwargs: Any) -> None:
        """Save weights and configuration in our format."""
        mcsmoe = self.config.mcsmoe
        try:
            if is_compact and any(sparse_parts(cast(Any, self))):
                state = kwargs.get("state_dict") or self.state_dict()
                kwargs["state_dict"], self.config.mcsmoe = self._compact_state(state)
            # The base family's reverse conversion would take the fused experts apart, and no load would join them.
            super().save_pretrained(folder, **kwargs | {"save_original_format": False})
        finally:
            self.config.mcsmoe = mcsmoe

    def gather_sharded_state_dict_for_save(
        self, model_to_save: Any, state_dict: dict, *args: Any, **kwargs: Any
    ) -> dict:
        """Gather what is split over processes; the rest is as given, which the library would take from the model."""
        found = super().gather_sharded_state_dict_for_save(model_to_save, state_dict, *args, **kwargs)
        if not found:  # in processes that write nothing
            return found
        return {name: found[name] if isinstance(value, DTensor) else value for name, value in state_dict.items()}

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: bool | str | None = None, **kwargs: Any
    ) -> CommitInfo:
        """Create the repository if need be and upload the whole folder that `save_pretrained` writes.

        Takes the arguments of `PreTrainedModel.push_to_hub`, and those of `save_pretrained`.
        """
        commit = {key: kwargs.pop(key) for key in COMMIT_ARGUMENTS if key in kwargs}
        api, repo_id = repository(repo_id, private, token, commit.get("revision"))
        with tempfile.TemporaryDirectory() as folder:
            self._save_folder(Path(folder), repo_id, **kwargs)
            follow_umask(Path(folder))
            return api.upload_folder(repo_id=repo_id, folder_path=folder, **commit)


def _kinds_in(folder: Path) -> tuple[str, ...]:
    """Return of which kinds a folder holds files."""
    return tuple({kind for file in folder.iterdir() if (kind := kind_of(file.name))})


def _tell_what_is_lacking(name: str, source: Path | None, folder: Path, leave: tuple[str, ...]) -> None:
    """Warn where a model goes without what its users tokenize with."""
    if name and source is None:
        warnings.warn(
            f"{name!r}, which the model was loaded from, is not to be found here, so it is saved without the "
            "tokenizer, plan, record and card that lay there.",
            stacklevel=5,
        )
    elif source and "tokenizer" not in leave and not any(matches(file.name, TOKENIZER) for file in folder.iterdir()):
        warnings.warn(
            f"No tokenizer lies beside the weights of {source}, so none goes with the model: save one into the same "
            "folder, with tokenizer.save_pretrained.",
            stacklevel=5,
        )


def write_documents(record: Any, source: Path | None, folder: Path, model_id: str) -> None:
    """Write plan, record and card into `folder`: those of a compressed source, with what `record` knows anew.

    The card is new for a model that was merged just now. A source's card is left alone but for its marked section, and
    whatever has become of it, or of the record, is no reason not to save.
    """
    kept = source is not None and _is_compressed(source)
    if kept:
        _copy_documents(cast(Path, source), folder)
    if record is not None and record.plan:  # or what lies there could not be read, and stays
        (folder / PLAN_FILE).write_text(record.plan_json(), encoding="utf-8")
    if record is not None:
        (folder / RECORD_FILE).write_text(record.to_json(), encoding="utf-8")
        (folder / RECIPE_FILE).unlink(missing_ok=True)  # that of a source says nothing of what was done since
        if record.recipe:
            (folder / RECIPE_FILE).write_text(record.recipe, encoding="utf-8")
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):  # none, or a damaged one
        text, card = _filled(folder, model_id).encode(), folder / CARD_FILE
        card.write_bytes(_with_section(card.read_bytes(), text) if kept else text)


def _parts(card: bytes) -> tuple[bytes, bytes, bytes] | None:
    """Return a card's marked section with what stands before and after it; None where it has none."""
    start, end = (mark.encode() for mark in SECTION)
    before, _, rest = card.partition(start)
    section, closed, after = rest.partition(end)
    return (before, start + section + end, after) if closed else None


def _with_section(card: bytes, new: bytes) -> bytes:
    """Return `card` with the marked section of `new`, if both have one."""
    old, other = _parts(card), _parts(new)
    return card if old is None or other is None else old[0] + other[1] + old[2]


def _keep_card(target: Path, folder: Path) -> None:
    """Let the card in `folder` keep what a person wrote into that of `target`, which it is about to replace.

    A card without a marked section that lies there alone, beside no model, stays as it is.
    """
    old, new = target / CARD_FILE, folder / CARD_FILE
    if not (old.is_file() and new.is_file()):
        return
    parts, generated = _parts(old.read_bytes()), None
    if parts is None and not (target / "config.json").exists():
        new.unlink()
    elif parts is not None:
        with contextlib.suppress(
            OSError, ValueError, TypeError, KeyError
        ):  # no record: the card is not known to be ours
            lines = json.loads((target / RECORD_FILE).read_text(encoding="utf-8"))["card"]
            generated = _parts("\n".join([*lines, ""]).encode())
        if generated is None or (parts[0], parts[2]) != (generated[0], generated[2]):
            new.write_bytes(_with_section(old.read_bytes(), new.read_bytes()))


def _copy_documents(source: Path, folder: Path) -> None:
    for file in (source / name for name in DOCUMENTS):
        try:
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
        except OSError as error:
            warnings.warn(f"{file} cannot be read, so the model is saved without: {error}", stacklevel=6)


def _is_compressed(source: Path) -> bool:
    """Tell whether a folder holds a model of ours, and so a card of it."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        return json.loads((source / "config.json").read_text(encoding="utf-8"))["model_type"] == "mcsmoe"
    return False


def _filled(folder: Path, model_id: str) -> str:
    """Return the card of the record in `folder` with the name and the bytes of the weights, which it is told as well.

    Raises:
        KeyError, TypeError, ValueError, OSError: no such record, or a damaged one.
    """
    file, size = folder / RECORD_FILE, sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    record = json.loads(file.read_text(encoding="utf-8"))
    text, stages = "\n".join([*record["card"], ""]), list(record["costs"].values())
    if stages and size:
        stages[-1]["bytes_on_disk"] = size
        file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    first = stages[0]["bytes_on_disk"] if stages else None
    figures = {MODEL_ID: model_id, BYTES_ON_DISK: f"{size:,}", SAVED: f"{1 - size / first:.1%}" if first else ""}
    for place, value in figures.items():
        text = text.replace(place, value)
    return text


def _add_tags(card: Path, tags: list[str]) -> None:
    """Add tags to those of the card's metadata, which is made where there is none."""
    if not tags:
        return
    try:
        metadata = (metadata_load(card) if card.is_file() else None) or {}
        metadata_save(card, {**metadata, "tags": list(dict.fromkeys([*(metadata.get("tags") or []), *tags]))})
    except Exception as error:
        warnings.warn(
            f"The tags {tags} are not in {CARD_FILE}, whose metadata cannot be read: {error!r}", stacklevel=4
        )
