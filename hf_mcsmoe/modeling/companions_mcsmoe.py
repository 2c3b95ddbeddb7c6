"""What lies beside a source's weights and goes beside those of the result. This file travels with every checkpoint."""

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    AutoVideoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)

TOKENIZER = (
    *("tokenizer*", "tokenization_*.py", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("*.tiktoken", "*.model", "*.spm", "tekken*.json"),
)
TEMPLATES = ("chat_template*", "additional_chat_templates")
PROCESSOR = ("*processor_config.json", "processing_*.py", "*_processing_*.py", "feature_extraction_*.py")
# What belongs together: where a save brings some of a kind, none of an older model stays.
KINDS = {"tokenizer": (*TOKENIZER, *TEMPLATES), "processor": PROCESSOR, "record": ("mcsmoe_*.json", "mcsmoe_*.yaml")}
# A source may hold anything that its tokenizer reads, so all goes along but for this: weights in any format and what
# describes them, ...
WEIGHTS = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.ggml", "*.msgpack", "*.h5", "*.onnx*", "*.ot"),
    *("*.tflite", "*.np[yz]", "*.pkl", "*.pickle", "*.distcp", "*.mlmodel", "*.engine", "*.index*.json", "adapter_*"),
    *("params.json", "hf_quant_config.json", "*.zip", "*.tar*", "*.part", "*.incomplete"),
)
# ... pages, pictures, data, what a training left, and code of models.
PICTURES = ("*.png", "*.jp*g", "*.gif", "*.svg", "*.webp", "*.pdf", "*.mp[34]", "*.wav", "*.ipynb")
OTHERS = (
    *(".*", "*.md", "*.rst", "*.html", "*.yaml", "*.yml", "*.sh", "*.jsonl", "*.csv", "*.tsv", "*.parquet", "*.arrow"),
    *("*.log", "*.lock", "trainer_state.json", "training_args*", "optimizer*", "scheduler*", "scaler*", "rng_state*"),
    *("*_results.json", "events.out*", "sparsification*", "mcsmoe_*", "modeling_*.py", "modular_*.py", "*_mcsmoe.py"),
)
LICENCE = ("licen[cs]e*", "notice*", "copying*", "*policy*")
# Nothing that a tokenizer reads comes near to it, in bytes.
LARGEST = 2 * 10**8


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Tell whether a file has one of these names, in capitals or not."""
    return any(fnmatch(name.lower(), pattern) for pattern in patterns)


def kind_of(name: str) -> str | None:
    """Return the kind of a file that belongs with others; None for those that stand for themselves."""
    return next((kind for kind, patterns in KINDS.items() if matches(name, patterns)), None)


def source_folder(name_or_path: str, revision: str | None = None, cache_dir: Any = None) -> Path | None:
    """Return the folder with the files of a model given by path or Hub id; None where there is none to be had."""
    if Path(name_or_path or "/nowhere").is_dir():
        return Path(name_or_path).resolve()
    left = [*WEIGHTS, *PICTURES]
    try:
        return Path(snapshot_download(name_or_path, revision=revision, cache_dir=cache_dir, ignore_patterns=left))
    except (OSError, ValueError, HfHubHTTPError):  # no id, or neither online nor in the cache
        return None


def remember_source(model: PreTrainedModel, name_or_path: str, subfolder: str = "", cache_dir: Any = None) -> None:
    """Let a model know where it was loaded from, wherever the process goes from here."""
    given = Path(name_or_path or "/nowhere")
    name = str(given.resolve()) if given.is_dir() else name_or_path
    vars(model)["mcsmoe_source"] = (name, subfolder, cache_dir)


def source_of(model: PreTrainedModel) -> Path | None:
    """Return the folder with the files of the checkpoint that a model was loaded from, if there is one."""
    name, subfolder, cache_dir = vars(model).get("mcsmoe_source") or (model.name_or_path or "", "", None)
    folder = source_folder(name, vars(model.config).get("_commit_hash"), cache_dir)
    if folder is None or subfolder or (folder / "config.json").is_file():
        return folder / subfolder if folder else None
    inside = [*sorted(folder.glob("*/config.json")), *sorted(folder.glob("*/*/config.json"))]
    fitting = [file.parent for file in inside if _is_of(file, model.config)]
    return fitting[0] if len(fitting) == 1 else folder


def _is_of(file: Path, config: PreTrainedConfig) -> bool:
    """Return whether a model of `config` may have been loaded from beside this file: the two say the same."""
    changed = {"architectures", "auto_map", "dtype", "torch_dtype", "model_type", "transformers_version"}
    with contextlib.suppress(OSError, ValueError, TypeError):
        written, ours = json.loads(file.read_text(encoding="utf-8")), json.loads(config.to_json_string(use_diff=False))
        types = {ours.get("base_model_type"), ours["model_type"]}
        same = all(written[name] == ours[name] for name in (written.keys() & ours.keys()) - changed)
        return same and written.get("model_type") in types
    return False


def copy_companions(source: Path, folder: Path, leave: tuple[str, ...] = ()) -> None:
    """Copy what lies beside the weights of `source`, also in folders of tokenizers, templates and the like.

    What is in `folder` already stays, and what `leave` names is left.
    """
    for file in companions(source):
        place = folder / file.relative_to(source)
        if place.exists() or kind_of(file.relative_to(source).parts[0]) in leave:
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(file, place)
        except OSError as error:
            warnings.warn(f"{file} cannot be read, so the model is saved without: {error}", stacklevel=6)
    # A compressed source names them already, and its type is one that Transformers by itself does not know.
    if not (source / "configuration_mcsmoe.py").is_file():
        name_classes(source, folder)


def companions(source: Path) -> list[Path]:
    """Return the files beside the weights of `source` that a user of it would miss."""
    files = sorted(path for path in source.iterdir() if path.is_file() and _goes_along(path))
    for nested in sorted(path for path in source.iterdir() if path.is_dir() and not path.name.startswith(".")):
        inside = [path for path in nested.iterdir() if path.is_file()]
        # One with weights is a model of its own.
        if any(kind_of(path.name) for path in (nested, *inside)) and not any(
            matches(path.name, WEIGHTS) for path in inside
        ):
            files += sorted(path for path in inside if _goes_along(path))
    return files


def _goes_along(file: Path) -> bool:
    if matches(file.name, LICENCE):
        return True
    return not matches(file.name, (*WEIGHTS, *PICTURES, *OTHERS)) and file.stat().st_size <= LARGEST


def name_classes(source: Path, folder: Path) -> None:
    """Write down which classes read the source's tokenizer and processors.

    Transformers chooses them by the family's model type where the files name none, and the tokenizer's even where they
    do; a merged model has another type.
    """
    if any(matches(path.name, TOKENIZER) for path in folder.iterdir()):
        _name_class(folder / "tokenizer_config.json", "tokenizer_class", source, AutoTokenizer, always=True)
    one = folder / "preprocessor_config.json"
    for key, loader in (
        ("image_processor_type", AutoImageProcessor),
        ("feature_extractor_type", AutoFeatureExtractor),
    ):
        if one.is_file() and not (_has(one, "image_processor_type") or _has(one, "feature_extractor_type")):
            _name_class(one, key, source, loader)
    if (folder / "video_preprocessor_config.json").is_file():
        _name_class(folder / "video_preprocessor_config.json", "video_processor_type", source, AutoVideoProcessor)
    settings = [folder / f"{name}_config.json" for name in ("processor", "preprocessor", "video_preprocessor")]
    settings = [file for file in settings if file.is_file()]
    if settings and not any(_has(file, "processor_class") for file in (*settings, folder / "tokenizer_config.json")):
        _name_class(settings[0], "processor_class", source, AutoProcessor)


def _has(file: Path, key: str) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return key in json.loads(file.read_text(encoding="utf-8"))
    return False


def _name_class(file: Path, key: str, source: Path, loader: Any, always: bool = False) -> None:
    """Write into a file of settings the class that `loader` makes of `source`, where it names none or `always`."""
    with contextlib.suppress(Exception):  # what does not load here is passed on as it is
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if key in content and not always:
            return
        name = type(loader.from_pretrained(os.fspath(source), trust_remote_code=False)).__name__
        if content.get(key) != name:
            text = json.dumps(content | {key: name}, indent=2, ensure_ascii=False)
            file.write_text(text + "\n", encoding="utf-8")
