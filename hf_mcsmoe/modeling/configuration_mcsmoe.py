"""Configuration of a model with merged experts. This file travels with every checkpoint: no import of the package."""

import importlib
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from transformers import CONFIG_MAPPING, PreTrainedConfig

PREFIX = "MCSMoE"
FORMAT_VERSION = 2
# Bits a weight that can be stored, and the dtypes of their scales.
BITS = (8, 4, 3, 2)
SCALE_DTYPES = ("bfloat16", "float16")


def class_prefix(variant: str) -> str:
    """Return how the classes of a variant begin: "SmoeDropout" for "smoe_dropout"."""
    return "".join(part.capitalize() for part in variant.split("_"))


@cache
def auto_map(base_model_type: str, variant: str | None = None) -> dict[str, str]:
    """Return the `auto_map` entry of `config.json`: for each Auto class that serves the base family, our class.

    Heads that are built from a part of the configuration (the text model of a multimodal family) are left out.

    Args:
        variant: on whose code, beside the checkpoint, the model is built; None for Transformers' own.
    """
    modeling_auto = importlib.import_module("transformers.models.auto.modeling_auto")
    entries = {"AutoConfig": f"configuration_mcsmoe.{PREFIX}Config"}
    place, end = f"modeling_mcsmoe.{PREFIX}", ""
    if variant is not None:
        place, end = f"merged_{variant}_mcsmoe.{PREFIX}{class_prefix(variant)}", f"__{variant}_mcsmoe"
    for name in modeling_auto.__all__:
        mapping = getattr(getattr(modeling_auto, name), "_model_mapping", None)
        if name.startswith("AutoModel") and mapping is not None and base_model_type in mapping._model_mapping:
            base = mapping[CONFIG_MAPPING[base_model_type]]
            base = base[0] if isinstance(base, tuple | list) else base
            if base.config_class is CONFIG_MAPPING[base_model_type]:
                entries[name] = place + base.__name__ + end
    return entries


class MergedConfigMixin:
    """What a family's configuration gains: the family's name and the merged layers.

    `mcsmoe["layers"][name]` holds `num_experts` (E, the experts that the router knows) and `expert_map`
    (int [E] -> [G], from the router's index to the stored expert) of the experts container called `name`, or of a
    pruned one in its place `kept` (int [G], rising, which of the E experts are left; the router has no others); where
    experts gave way to constants `approximate_experts` (rising, those experts, which the map sends behind the G); of
    weights stored as low rank + sparse also `low_rank[weight]`, with `rank` and `kept_rows` (None in training form),
    and of those in few bits `quantized[weight]`, with `bits` (or a list, one number per stored expert), `group_size`,
    `symmetric` and `scale_dtype`.
    Format 1 says the same; its code sent picks to the stored experts inside the experts.
    """

    model_type = "mcsmoe"
    base_model_type: str | None = None
    mcsmoe: dict | None = None
    # On whose code, beside the checkpoint, the model is built, with options in the field `variant`.
    variant_name: ClassVar[str | None] = None
    # Made with the class: some models call `to_dict` in their forward, where a compiler cannot follow imports.
    auto_classes: ClassVar[dict[str, str]] = {}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the configuration; what it says of merged layers is checked, and is that of format 2 from here on.

        Raises:
            ValueError: see `check_mcsmoe`.
        """
        mcsmoe = config_dict.get("mcsmoe")
        check_mcsmoe(mcsmoe)
        config_dict = config_dict | {"mcsmoe": mcsmoe | {"format_version": FORMAT_VERSION}}
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields of the base family's configuration and ours, ready for `config.json`."""
        output = super().to_dict()
        output["auto_map"] = dict(self.auto_classes)
        return output


class MCSMoEConfig(MergedConfigMixin, PreTrainedConfig):
    """Entry point of `AutoConfig`: reads `base_model_type` and answers with that family's generated configuration."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the configuration of `config_dict["base_model_type"]` with merged experts.

        Raises:
            ValueError: the dictionary names no base family, one that the installed Transformers lacks, a variant that
                is none, or merged layers that `check_mcsmoe` refuses.
        """
        config_class = config_class_for(config_dict.get("base_model_type"), _variant_in(config_dict))
        return config_class.from_dict(config_dict, **kwargs)


def _variant_in(config_dict: dict[str, Any]) -> str | None:
    """Return the name of the variant on whose code a model is built; None for a model of Transformers' own."""
    variant = config_dict.get("variant")
    if variant is None:
        return None
    is_told = isinstance(variant, dict) and "options" in variant and str(variant.get("name")).isidentifier()
    _refuse(not is_told, f"`variant` must hold `name` and `options`, not {variant!r}.")
    return variant["name"]


def _refuse(is_wrong: bool, sentence: str) -> None:
    if is_wrong:
        raise ValueError(f"{sentence} The config.json is damaged or was edited; take it from the original checkpoint.")


def _is_count(value: Any, least: int = 0) -> bool:
    return type(value) is int and value >= least


def check_mcsmoe(mcsmoe: Any) -> None:
    """Check the object of config.json that says what was merged.

    Raises:
        ValueError: it is missing, of a format that this file does not know, or holds values that mean nothing.
    """
    _refuse(not isinstance(mcsmoe, dict), f"`mcsmoe`, which says what was merged, is missing: it is {mcsmoe!r}.")
    version, layers, keep = mcsmoe.get("format_version"), mcsmoe.get("layers"), mcsmoe.get("keep")
    _refuse(not _is_count(version, 1), f"`mcsmoe.format_version` must be a whole number from 1 on, not {version!r}.")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"This checkpoint has format {version}; this code reads up to {FORMAT_VERSION}. Upgrade hf_mcsmoe, or "
            "load with trust_remote_code=True in an environment without it."
        )
    _refuse(not isinstance(layers, dict), f"`mcsmoe.layers` must be an object with the merged layers, not {layers!r}.")
    is_share = keep is None or (type(keep) in (int, float) and 0 <= keep <= 1)
    _refuse(not is_share, f"`mcsmoe.keep` must be a share from 0 to 1, not {keep!r}.")
    whole = mcsmoe.get("whole", [])
    is_names = isinstance(whole, list) and all(isinstance(name, str) for name in whole)
    _refuse(not is_names, f"`mcsmoe.whole` must be a list of layers' names, not {whole!r}.")
    _refuse(not layers.keys().isdisjoint(whole), f"`mcsmoe.whole` names merged layers as unmerged: {whole!r}.")
    for name, layer in layers.items():
        check_layer(name, layer)


def check_layer(name: str, layer: Any, num_experts: int | None = None) -> None:
    """Check what is said of one merged layer.

    Args:
        num_experts: E of the base model; None where it is not known yet.

    Raises:
        ValueError: the map does not send E experts onto 0 .. G-1, or a rank or a number of rows is impossible.
    """
    _refuse(not isinstance(layer, dict), f"The merged layer {name} must be an object, not {layer!r}.")
    known = layer.get("num_experts") if num_experts is None else num_experts
    count = _check_kept(name, layer, known) if "kept" in layer else _check_map(name, layer.get("expert_map"), known)
    if "approximate_experts" in layer:
        count = _check_constants(name, layer)
    low_rank = layer.get("low_rank", {})
    _refuse(not isinstance(low_rank, dict), f"`low_rank` of {name} must be an object, not {low_rank!r}.")
    for weight, entry in low_rank.items():
        check_low_rank(f"{weight} of {name}", entry, count)
    quantized = layer.get("quantized", {})
    _refuse(not isinstance(quantized, dict), f"`quantized` of {name} must be an object, not {quantized!r}.")
    for weight, entry in quantized.items():
        check_quantized(f"{weight} of {name}", entry, count)


def _check_map(name: str, expert_map: Any, num_experts: Any) -> int:
    """Return G of a merged layer whose map is right."""
    whole = isinstance(expert_map, list) and bool(expert_map) and all(map(_is_count, expert_map))
    _refuse(not whole, f"The expert map of {name} must be a list of whole numbers from 0 on, not {expert_map!r}.")
    is_long = len(expert_map) == num_experts
    _refuse(not is_long, f"The expert map of {name} has {len(expert_map)} entries for {num_experts!r} experts.")
    count = max(expert_map) + 1
    _refuse(
        count > len(expert_map) or count > len(set(expert_map)),
        f"The expert map of {name} must use each stored expert from 0 on, but goes up to {count - 1} with "
        f"{len(set(expert_map))} different ones.",
    )
    return count


def _check_constants(name: str, layer: dict[str, Any]) -> int:
    """Return G of a layer whose map, which is one, sends some experts to constants behind the stored ones."""
    gone, expert_map = layer["approximate_experts"], layer.get("expert_map")
    _refuse(expert_map is None, f"{name} has `approximate_experts` and no map that says where these went.")
    is_list = isinstance(gone, list) and bool(gone) and all(map(_is_count, gone))
    _refuse(
        not is_list or sorted(set(gone)) != gone or gone[-1] >= len(expert_map) or len(gone) == len(expert_map),
        f"`approximate_experts` of {name} must be a rising list of some of its {len(expert_map)} experts, not "
        f"{gone!r}.",
    )
    stored = {at for expert, at in enumerate(expert_map) if expert not in gone}
    _refuse(
        max(stored) >= len(stored) or any(expert_map[expert] < len(stored) for expert in gone),
        f"The expert map of {name} must send its `approximate_experts` behind the {len(stored)} stored experts, and "
        "no others.",
    )
    return len(stored)


def _check_kept(name: str, layer: dict[str, Any], num_experts: Any) -> int:
    """Return G of a pruned layer whose kept experts are right."""
    kept, told = layer["kept"], layer.get("num_experts")
    _refuse("expert_map" in layer, f"{name} has an expert map and is pruned (`kept`), which exclude each other.")
    _refuse(told != num_experts, f"{name} is said to have had {told!r} experts, and has {num_experts!r}.")
    _refuse(not _is_count(told, 1), f"`num_experts` of {name} must be a whole number from 1 on, not {told!r}.")
    is_list = isinstance(kept, list) and bool(kept) and all(map(_is_count, kept))
    _refuse(
        not is_list or sorted(set(kept)) != kept or kept[-1] >= told,
        f"`kept` of {name} must be a rising list of experts from 0 to {told - 1}, not {kept!r}.",
    )
    return len(kept)


def check_low_rank(name: str, entry: Any, count: int, shape: tuple[int, int] | None = None) -> None:
    """Check what is said of a weight stored as low rank + sparse.

    Args:
        count: the number of its matrices, G.
        shape: how many rows (or columns) S can keep, and the largest rank; None where it is not known yet.

    Raises:
        ValueError: the rank or a number of rows is impossible.
    """
    _refuse(not isinstance(entry, dict), f"What is said of {name} must be an object, not {entry!r}.")
    rank, rows = entry.get("rank"), entry.get("kept_rows", "missing")
    most, largest = shape or (None, None)
    is_rank = _is_count(rank, 1) and (largest is None or rank <= largest)
    _refuse(not is_rank, f"The rank of {name} must be a whole number from 1{_up_to(largest)}, not {rank!r}.")
    is_list = rows is None or (isinstance(rows, list) and len(rows) == count)
    fits = is_list and all(_is_count(number) and (most is None or number <= most) for number in rows or ())
    _refuse(
        not fits,
        f"`kept_rows` of {name} must be {count} whole numbers from 0{_up_to(most)}, or null, not {rows!r}.",
    )


def check_quantized(name: str, entry: Any, count: int, width: int | None = None, *, in_stack: bool = True) -> None:
    """Check what is said of a weight stored in few bits.

    Args:
        count: the number of its matrices, G.
        width: length of their input axis; None where it is not known yet.
        in_stack: whether they are a tensor [G, out, in], whose matrices can differ in bits.

    Raises:
        ValueError: bits that cannot be stored, groups that do not fill the width, or an unknown dtype of scales.
    """
    _refuse(not isinstance(entry, dict), f"What is said of {name} must be an object, not {entry!r}.")
    bits, group = entry.get("bits"), entry.get("group_size")
    is_list = in_stack and isinstance(bits, list) and len(bits) == count
    known = all(type(number) is int and number in BITS for number in (bits if is_list else [bits]))
    choices = " or ".join([", ".join(map(str, BITS)), *([f"a list of {count} of these"] if in_stack else [])])
    _refuse(not known, f"The bits of {name} must be {choices}, not {bits!r}.")
    _refuse(not _is_count(group, 1), f"`group_size` of {name} must be a whole number from 1 on, not {group!r}.")
    _refuse(
        width is not None and width % group != 0,
        f"`group_size` of {name} must divide its {width} inputs, which {group!r} does not.",
    )
    symmetric, dtype = entry.get("symmetric"), entry.get("scale_dtype")
    _refuse(type(symmetric) is not bool, f"`symmetric` of {name} must be true or false, not {symmetric!r}.")
    _refuse(dtype not in SCALE_DTYPES, f"`scale_dtype` of {name} must be {' or '.join(SCALE_DTYPES)}, not {dtype!r}.")


def _up_to(most: int | None) -> str:
    return " on" if most is None else f" to {most}"


def family_of(config_class: type[PreTrainedConfig]) -> tuple[str, str | None]:
    """Return the model type of the family that a configuration is of, and the name of the variant of it, if it is one.

    What `config_class_for` takes, of a class of Transformers, of a variant, or of a merged model.
    """
    family = getattr(config_class, "base_model_type", None) or config_class.model_type
    return family, getattr(config_class, "variant_name", None)


def config_class_for(base_model_type: str | None, variant: str | None = None) -> type[PreTrainedConfig]:
    """Return the generated configuration class of a family, e.g. `MCSMoEMixtralConfig` for "mixtral".

    Args:
        variant: see `auto_map`; its name ends that of the class.

    Raises:
        ValueError: the installed Transformers does not know the family.
    """
    if not isinstance(base_model_type, str) or base_model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"AutoConfig of this Transformers knows no model type {base_model_type!r}, so a merged model of it "
            "could not be loaded: it is not supported. A later version of transformers may know it."
        )
    base = CONFIG_MAPPING[base_model_type]
    return generated_config_class(PREFIX + base.__name__ + (f"__{variant}_mcsmoe" if variant else ""))


@cache
def generated_config_class(name: str) -> type[PreTrainedConfig]:
    """Return the class called `MCSMoE<BaseConfig>`: the base configuration with `model_type` "mcsmoe".

    `MCSMoE<BaseConfig>__<variant>_mcsmoe` is that of a model that is built on a variant's code.

    Raises:
        AttributeError: `name` does not name a configuration class of Transformers.
    """
    base_name, _, file = name.removeprefix(PREFIX).partition("__")
    variant = file.removesuffix("_mcsmoe") or None
    base = getattr(importlib.import_module("transformers"), base_name, None)
    if not name.startswith(PREFIX) or not isinstance(base, type) or not issubclass(base, PreTrainedConfig):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    fields = {
        "__module__": __name__,
        "__doc__": f"`{base.__name__}` of a model whose experts were merged.",
        "__annotations__": {"base_model_type": str | None, "mcsmoe": dict | None},
        "base_model_type": base.model_type,
        "auto_classes": auto_map(base.model_type, variant),
        "mcsmoe": None,
        "model_type": "mcsmoe",
    }
    if variant is not None:
        fields["__annotations__"]["variant"] = dict | None
        fields |= {"variant": None, "variant_name": variant}
    return type(name, (MergedConfigMixin, base), fields)


def source_files() -> list[Path]:
    """Return the files that must lie beside a checkpoint so that it loads without the package."""
    return sorted(Path(__file__).parent.glob("*_mcsmoe.py"))


def __getattr__(name: str) -> type[PreTrainedConfig]:
    return generated_config_class(name)
