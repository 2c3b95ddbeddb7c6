"""A model's config.json, found by folder or Hub id and looked over before anything is built of it."""

import difflib
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from transformers import CONFIG_MAPPING
from transformers.utils import cached_file

from hf_mcsmoe.files import read_json
from hf_mcsmoe.layers.hub import HubFile

CONFIG, ADAPTER = "config.json", "adapter_config.json"
# More than these are damage: of a million layers, even empty ones, no model would ever be built.
LARGEST = {"layers": 4096, "experts": 65536}


def check_config_file(name_or_path: str) -> None:
    """Check that a model is there, and that Transformers could build one of its kind without code of the model's own.

    A folder is only looked at; the Hub is asked once, without waiting and asking again where it cannot be reached.

    Raises:
        ValueError: no such folder or repository, an adapter, a config.json that is damaged or of an unknown kind, or
            one that needs code of its own, which is never run.
    """
    content = read_json(_config_file(name_or_path), "download it again")
    kind = content.get("model_type")
    if not isinstance(kind, str):
        raise ValueError(
            f"{CONFIG} of {name_or_path} names no model type (model_type is {kind!r}), so nothing tells which model "
            "it is of: download it again."
        )
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"{name_or_path} is of model type {kind!r}, {_unknown_kind(kind, content)}")
    _check_counts(name_or_path, content)


def _unknown_kind(kind: str, content: dict[str, Any]) -> str:
    if content.get("auto_map"):
        return (
            "which is no part of the installed Transformers and brings code of its own (auto_map): such code is never "
            "run, so the model is not supported."
        )
    near = difflib.get_close_matches(kind, [*CONFIG_MAPPING], n=1)
    meant = f" (is {near[0]!r} meant?)" if near else ""
    return f"which the installed Transformers does not know{meant}: upgrade transformers."


def _check_counts(name_or_path: str, content: dict[str, Any]) -> None:
    for key, value in content.items():
        if isinstance(value, dict) and key != "mcsmoe":
            _check_counts(name_or_path, value)
        most = LARGEST.get(key.rpartition("_")[2]) if key.startswith(("num_", "n_")) else None
        if most is not None and isinstance(value, int) and value > most:
            raise ValueError(f"{CONFIG} of {name_or_path} says {key}={value}: it is damaged, download it again.")


def _config_file(name_or_path: str) -> Path:
    """Return where the config.json is, after fetching it if need be."""
    try:
        path = Path(name_or_path or "no name at all")
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError) as error:  # too long a name, a null byte
        raise ValueError(f"{name_or_path[:100]!r} is no name of a model ({error}).") from None
    if is_folder:
        return _in_folder(path)
    if exists:
        raise ValueError(f"{name_or_path} is a file: name the folder that holds the model's {CONFIG}.")
    try:
        validate_repo_id(name_or_path)
    except HFValidationError:
        raise ValueError(
            f"{name_or_path!r} is no folder with a model{_near(path)}, nor an id of the Hub, like organisation/name."
        ) from None
    return _on_hub(name_or_path)


def _in_folder(folder: Path) -> Path:
    if (folder / ADAPTER).is_file():
        raise ValueError(_adapter(str(folder)))
    if not (folder / CONFIG).is_file():
        raise ValueError(f"The folder {folder} holds no {CONFIG}, so no model that Transformers can load.")
    return folder / CONFIG


def _adapter(name: str) -> str:
    return (
        f"{name} holds an adapter ({ADAPTER}), whose weights are no part of the model yet: load it with "
        "AutoPeftModelForCausalLM (or the class of its task), call merge_and_unload(), save the result with "
        "save_pretrained, and name that folder."
    )


def _near(path: Path) -> str:
    """Say which folder beside a path that is none has nearly its name; or ""."""
    try:
        others = [other.name for other in path.absolute().parent.iterdir() if other.is_dir()]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, others, n=1)
    return f" (is {path.with_name(near[0])} meant?)" if near and path.name else ""


def _on_hub(name: str) -> Path:
    if not isinstance(try_to_load_from_cache(name, CONFIG), str):
        _ask_hub(name)
    return Path(str(cached_file(name, CONFIG)))


def _ask_hub(name: str) -> None:
    """Ask the Hub for the config.json of a repository, once.

    Raises:
        ValueError: it cannot be asked, or has none.
    """
    missing = f"Found no model {name!r}: there is neither such a folder{_near(Path(name))} nor "
    if constants.is_offline_mode():
        raise ValueError(f"{missing}a model of that id in the cache, and HF_HUB_OFFLINE keeps the Hub out.")
    try:
        get_hf_file_metadata(hf_hub_url(name, CONFIG))
    except GatedRepoError:
        raise ValueError(f"{name} is gated: ask for access on its page of the Hub, then `hf auth login`.") from None
    except RepositoryNotFoundError:
        raise ValueError(f"{missing}a repository of that id on the Hub that may be read with your token.") from None
    except EntryNotFoundError:
        is_adapter = HubFile(name, ADAPTER).exists()
        raise ValueError(_adapter(name) if is_adapter else f"{name} on the Hub holds no {CONFIG}.") from None
    except Exception as error:  # whatever the network says
        told = str(error).splitlines() or [type(error).__name__]
        raise ValueError(f"{missing}a Hub that can be reached ({told[0]}).") from None
