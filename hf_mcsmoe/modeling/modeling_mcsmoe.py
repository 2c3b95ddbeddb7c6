"""Models with merged experts, for every family: classes generated on demand as `MCSMoE<BaseClass>`.

`MCSMoEMixtralForCausalLM` is a subclass of `MixtralForCausalLM` whose experts are shrunk after `__init__` as its
configuration says; module paths are the base class's. This file travels with every checkpoint: torch, transformers
and its siblings only.
"""

import contextlib
import importlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub import CommitInfo, HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from torch import nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from .configuration_mcsmoe import PREFIX, MCSMoEConfig, auto_map, config_class_for, convert_config, source_files
from .experts_mcsmoe import (
    INSTALLERS,
    MergedExperts,
    MergedJetMoeMoE,
    MergedSwitchSparseMLP,
    StackedExperts,
    install_merged_experts,
)

__all__ = ["MCSMoEConfig", "MCSMoEModel", "MergedSwitchSparseMLP", "convert_model", "merged_class"]

# What a merged checkpoint takes over from its source.
COMPANIONS = (
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.tiktoken", "*.model"),
    *("chat_template*", "*processor_config.json", "LICENSE*", "NOTICE*"),
)
# What a checkpoint that is merged already passes on when it is saved again.
DOCUMENTS = ("README.md", "mcsmoe_plan.json")
# Arguments of `push_to_hub` that describe the commit.
COMMIT_ARGUMENTS = ("commit_message", "commit_description", "revision", "create_pr")
# Stands in the card for the name of the folder or repository, which is known when it is saved.
MODEL_ID = "@MODEL_ID@"


class MCSMoEModel:
    """First base of every generated model class: shrinks the experts, and saves a folder that loads anywhere."""

    # Text files that `save_pretrained` writes beside the weights: the plan and the card of the merge.
    mcsmoe_files: ClassVar[dict[str, str]] = {}

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        """Build the base model for `config`, then give each merged layer its G empty experts."""
        _serve_generic_heads(config)
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        for name, layer in (config.mcsmoe or {"layers": {}})["layers"].items():
            install_layer(self, name, layer["expert_map"])
        adopt_inner_models(self)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, MergedExperts):
            init.copy_(module.expert_map, torch.tensor(module.expert_map_values, device=module.expert_map.device))
        if isinstance(module, StackedExperts):
            for parameter in module.parameters(recurse=False):
                init.normal_(
                    parameter, mean=0.0, std=getattr(self.config.get_text_config(), "initializer_range", 0.02)
                )
        super()._init_weights(module)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save a complete folder: weights, configuration, modelling files, tokenizer, plan and model card.

        Written beside the target and moved in when complete, so that a killed save leaves no half-written checkpoint.
        Takes the arguments of `PreTrainedModel.save_pretrained`.
        """
        target = Path(save_directory).resolve()
        push_to_hub = kwargs.pop("push_to_hub", False) and kwargs.get("is_main_process", True)
        repo_id, private = kwargs.pop("repo_id", target.name), kwargs.pop("private", None)
        commit = {key: kwargs.pop(key) for key in COMMIT_ARGUMENTS if key in kwargs}
        if push_to_hub:
            api, repo_id = _repository(repo_id, private, kwargs.get("token"), commit.get("revision"))
        with completed_folder(target) as folder:
            self._save_folder(folder, repo_id, **kwargs)
            written = [file.name for file in folder.iterdir()]
        if push_to_hub:
            api.upload_folder(repo_id=repo_id, folder_path=target, allow_patterns=written, **commit)

    def _save_folder(self, folder: Path, model_id: str, **kwargs: Any) -> None:
        # The base family's reverse conversion would take the fused experts apart, and no load would join them again.
        super().save_pretrained(folder, **{**kwargs, "save_original_format": False})
        if not any(folder.iterdir()):  # another process writes
            return
        for file in source_files():
            shutil.copyfile(file, folder / file.name)
        source = source_folder(self.name_or_path)
        wanted = COMPANIONS if self.mcsmoe_files else COMPANIONS + DOCUMENTS
        for file in sorted(source.iterdir()) if source else ():
            if file.is_file() and any(file.match(pattern) for pattern in wanted):
                shutil.copyfile(file, folder / file.name)
        for name, text in self.mcsmoe_files.items():
            (folder / name).write_text(text, encoding="utf-8")
        loaded_from = Path(self.name_or_path).name if Path(self.name_or_path).is_dir() else self.name_or_path
        _rename_in_card(folder / "README.md", MODEL_ID if self.mcsmoe_files else loaded_from, model_id)

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: bool | str | None = None, **kwargs: Any
    ) -> CommitInfo:
        """Create the repository if need be and upload the whole folder that `save_pretrained` writes.

        Takes the arguments of `PreTrainedModel.push_to_hub`, and those of `save_pretrained`.
        """
        commit = {key: kwargs.pop(key) for key in COMMIT_ARGUMENTS if key in kwargs}
        api, repo_id = _repository(repo_id, private, token, commit.get("revision"))
        with tempfile.TemporaryDirectory() as folder:
            self._save_folder(Path(folder), repo_id, **kwargs)
            return api.upload_folder(repo_id=repo_id, folder_path=folder, **commit)


def _repository(
    repo_id: str, private: bool | None, token: bool | str | None, revision: str | None
) -> tuple[HfApi, str]:
    """Create the repository and the branch if need be; returns what talks to it and its full name."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return api, repo_id


def source_folder(name_or_path: str) -> Path | None:
    """Return the folder with the files of a model given by path or Hub id; None where there is none to be had."""
    if Path(name_or_path or "/nowhere").is_dir():
        return Path(name_or_path)
    try:
        return Path(snapshot_download(name_or_path, allow_patterns=[*COMPANIONS, *DOCUMENTS]))
    except (OSError, ValueError, HfHubHTTPError):  # no id, or neither online nor in the cache
        return None


def _rename_in_card(card: Path, old: str, new: str) -> None:
    """Let the card's example load the model by the name of the folder or repository that it now lies in."""
    if card.is_file():
        text = card.read_text(encoding="utf-8")
        card.write_text(text.replace(f'from_pretrained("{old}"', f'from_pretrained("{new}"'), encoding="utf-8")


@contextlib.contextmanager
def completed_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder; its files move to `target` when the block ends without an error.

    It lies beside `target`, or inside where that exists: a mounted folder can only be renamed into from within.
    """
    existing = target.is_dir()
    parent = target if existing else target.parent
    parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=parent))
    try:
        yield temporary
        if existing:
            _move_files(temporary, target)
        elif any(temporary.iterdir()):
            temporary.chmod(0o755)
            os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move_files(source: Path, target: Path) -> None:
    """Move the files of `source` into `target`, and remove those of the weights that they replace."""
    files = sorted(source.iterdir())
    replaced = {_weights_name(file) for file in files} - {None}
    for file in files:
        os.replace(file, target / file.name)
    for file in target.iterdir():
        if _weights_name(file) in replaced and file.name not in {new.name for new in files}:
            file.unlink()


def _weights_name(file: Path) -> str | None:
    """Return "model.safetensors" for it, its shards and its index (likewise for a variant); None for other files."""
    found = re.fullmatch(r"(.+?)(-\d{5}-of-\d{5})?\.safetensors(\.index(\.\w+)?\.json)?", file.name)
    return f"{found[1]}{found[4] or ''}.safetensors" if found else None


def _serve_generic_heads(config: Any) -> None:
    """Let `AutoModel.from_config(config)`, which the library's generic heads call, build the generated base model."""
    # Its presence would ask for `trust_remote_code`, whose answer does not reach that call. Saving writes it anew.
    vars(config).pop("auto_map", None)
    path = auto_map(config.base_model_type).get("AutoModel") if hasattr(config, "base_model_type") else None
    if path is not None and type(config) not in AutoModel._model_mapping:
        AutoModel.register(type(config), generated_class(path.rpartition(".")[2]), exist_ok=True)


def layer_path(model: nn.Module, name: str) -> str:
    """Return the path in `model` of the layer that the configuration calls `name`.

    A head's checkpoint may be loaded into the bare base model and the other way round, as Transformers allows.

    Raises:
        ValueError: the model has no such module.
    """
    prefix = model.base_model_prefix + "."
    modules = dict(model.named_modules())
    for path in (name, name.removeprefix(prefix), prefix + name):
        if path in modules:
            return path
    raise ValueError(
        f"{type(model).__name__} has no module {name!r}, which the checkpoint's configuration names as merged. "
        "The checkpoint belongs to another class, or to another version of Transformers."
    )


def install_layer(model: nn.Module, name: str, expert_map: list[int]) -> MergedExperts:
    """Give layer `name` its G empty merged experts, re-classing experts of the experts interface."""
    path = layer_path(model, name)
    experts = model.get_submodule(path)
    if isinstance(experts, MergedExperts | MergedJetMoeMoE):  # by the base model inside a head
        return experts
    if type(experts).__name__ not in INSTALLERS:
        experts.__class__ = merged_class(type(experts))
    return install_merged_experts(model, path, expert_map)


def adopt_inner_models(model: nn.Module) -> None:
    """Re-class the library models inside `model`, so that none is converted to the base family's file format."""
    for module in model.modules():
        if module is not model and isinstance(module, PreTrainedModel) and not isinstance(module, MCSMoEModel):
            module.__class__ = merged_class(type(module))


def convert_model(model: PreTrainedModel, layers: dict[str, dict]) -> None:
    """Turn a base model, in place, into the generated class; its layers are still to be installed.

    Args:
        layers: per experts container its `num_experts` (E) and `expert_map` (int [E] -> [G]).
    """
    convert_config(model.config, layers)
    model.__class__ = merged_class(type(model))
    # Set by a load of the base model; a save would apply the reverse to the merged experts.
    vars(model).pop("_weight_conversions", None)


def merged_class(base: type[nn.Module]) -> type[nn.Module]:
    """Return the generated subclass `MCSMoE<base>` of a model or experts class of Transformers.

    Raises:
        ValueError: the class is not one of Transformers, so a checkpoint could not name it.
    """
    parts = base.__module__.split(".")
    if parts[:2] != ["transformers", "models"]:
        raise ValueError(
            f"{base.__name__} is defined in {base.__module__}, not in Transformers. A merged checkpoint of it could "
            "not be loaded elsewhere; only models of Transformers itself are supported."
        )
    exported = getattr(importlib.import_module("transformers"), base.__name__, None) is base
    return generated_class(PREFIX + base.__name__ + ("" if exported else "__" + "__".join(parts[2:])))


@cache
def generated_class(name: str) -> type[nn.Module]:
    """Return the class called `MCSMoE<Base>`, or `MCSMoE<Base>__<module>` where Transformers does not export `Base`.

    Raises:
        AttributeError: the name leads to no class of Transformers.
    """
    base_name, _, module = name.removeprefix(PREFIX).partition("__")
    source = "transformers.models." + module.replace("__", ".") if module else "transformers"
    base = getattr(importlib.import_module(source), base_name, None) if name.startswith(PREFIX) else None
    if not isinstance(base, type) or not issubclass(base, nn.Module):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    fields: dict[str, Any] = {
        "__module__": __name__,
        "__qualname__": name,
        "__doc__": f"`{base.__name__}` with merged experts.",
    }
    if not issubclass(base, PreTrainedModel):
        return type(name, (MergedExperts, base), fields)
    # Named among the direct bases, or Auto classes would derive a further class, which could not be pickled.
    generation = (GenerationMixin,) if issubclass(base, GenerationMixin) else ()
    # Read off the source of a class's module, which for a generated class is this one.
    fields["_can_set_experts_implementation_cached_value"] = base._can_set_experts_implementation()
    if getattr(base.config_class, "model_type", None):
        with contextlib.suppress(ValueError):  # an inner model whose configuration is not registered by itself
            fields["config_class"] = config_class_for(base.config_class.model_type)
    cls = type(name, (MCSMoEModel, base, *generation), fields)
    # Done by `__init__` for the class that it builds. Without it `output_router_logits` and the like record nothing.
    dict.__setitem__(_CAN_RECORD_REGISTRY, str(cls), base._can_record_outputs)
    return cls


def __getattr__(name: str) -> type[nn.Module]:
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return generated_class(name)
