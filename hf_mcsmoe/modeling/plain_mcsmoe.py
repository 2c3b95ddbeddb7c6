"""A pruned model of one count of experts as what it is: a model of its family. This file travels with checkpoints."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

# What families call the number of their experts.
EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
ADVICE = "save it with save_pretrained, which any Transformers loads with trust_remote_code=True."


def plain_form(model: PreTrainedModel) -> PreTrainedModel | None:
    """Return what `save_pretrained` writes in place of a model: see `plain_model`; None where it writes that itself.

    Weights that are not all in this process's memory as they are, be they offloaded, split among processes or of a
    quantizer's class, are left to the model that they belong to; but not those that are written already, block by
    block, of a model that tells so (`mcsmoe_is_written`).
    """
    is_there = vars(model).get("mcsmoe_is_written", False)
    if any(
        type(tensor.data) is not torch.Tensor or (tensor.is_meta and not is_there) for tensor in model.parameters()
    ):
        return None
    with contextlib.suppress(ValueError):  # it is not pruned, or not to one count
        return plain_model(model)
    return None


def plain_model(model: PreTrainedModel) -> PreTrainedModel:
    """Return a pruned model as one of the family's own class with fewer experts, which shares its weights.

    Its folder, by `save_pretrained`, holds nothing of this package and loads without any code beside it.

    Args:
        model: of which all layers of experts were pruned to the same number.

    Raises:
        ValueError: a layer was merged, left whole, or is stored in another way, the numbers differ, or the family's
            configuration cannot say that there are fewer experts.
    """
    before, after = _counts(model)
    plain = empty_plain(model, before, after)
    ours, theirs = ({key: value.shape for key, value in item.state_dict().items()} for item in (model, plain))
    if other := sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)):
        raise ValueError(
            f"{type(plain).__name__} with {after} experts keeps {other[0]} otherwise than the pruned model does: "
            f"{ADVICE}"
        )
    plain.load_state_dict(model.state_dict(), assign=True)
    for name, buffer in model.named_buffers():  # also those that no checkpoint has
        owner, _, own = name.rpartition(".")
        if own in plain.get_submodule(owner)._buffers:
            plain.get_submodule(owner)._buffers[own] = buffer
    plain.tie_weights()
    if plain.can_generate():
        plain.generation_config = model.generation_config
    return plain.train(model.training)


def empty_plain(model: PreTrainedModel, before: int, after: int) -> PreTrainedModel:
    """Return an empty model on the meta device, of a compressed model's family, with `after` experts for `before`."""
    base: Any = next(cls for cls in type(model).__mro__ if cls.__module__.startswith("transformers.models."))
    config = _fewer(base.config_class, model.config, before, after)
    with torch.device("meta"):
        plain: PreTrainedModel = base._from_config(config, dtype=model.dtype)
    text = plain.config.get_text_config()
    vars(text).update(older_names(text))
    return plain


def older_names(config: PreTrainedConfig) -> dict[str, Any]:
    """Return what engines that read `config.json` themselves look for (mlx-lm 0.32), as Transformers 4 wrote it.

    Transformers 5 has it under other names, and reads either.

    Args:
        config: of the text model.
    """
    names: dict[str, Any] = {}
    if counts := vars(config).get(config.attribute_map.get("num_experts", "")):
        names["num_experts"] = counts
    rope = vars(config).get("rope_parameters") or {}
    if any(isinstance(value, dict) for value in rope.values()):  # a kind of layer each, for which there was no name
        return names
    names |= {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    if rope.get("rope_type", "default") != "default":
        names["rope_scaling"] = {key: value for key, value in rope.items() if key not in names}
    return names


def _counts(model: PreTrainedModel) -> tuple[int, int]:
    """Return the number of experts before and after in all layers."""
    mcsmoe: dict[str, Any] = getattr(model.config, "mcsmoe", None) or {"layers": {}}
    layers = mcsmoe["layers"]
    if not layers or mcsmoe.get("whole") or any(entry.keys() != {"num_experts", "kept"} for entry in layers.values()):
        raise ValueError(
            f"{type(model).__name__} has layers that were merged, left whole, or are stored as low rank + sparse or "
            f"in few bits, of which no model of the family's own class knows: {ADVICE}"
        )
    counts = {(entry["num_experts"], len(entry["kept"])) for entry in layers.values()}
    if len(counts) > 1:
        raise ValueError(
            f"The layers keep unlike numbers of experts ({sorted(after for _, after in counts)}); prune with "
            f"budget='uniform' for a model of the family's own class, or {ADVICE}"
        )
    return counts.pop()


def _fewer(kind: type[PreTrainedConfig], config: PreTrainedConfig, before: int, after: int) -> PreTrainedConfig:
    """Return the family's own configuration, in whose text part the experts are `after` in place of `before`."""
    ours = ("auto_map", "mcsmoe", "base_model_type", "model_type", "architectures")
    plain = kind.from_dict({key: value for key, value in config.to_dict().items() if key not in ours})
    for part, name in expert_fields(plain.get_text_config(), before):
        setattr(part, name, after)
    return plain


def expert_fields(config: PreTrainedConfig, number: int) -> list[tuple[PreTrainedConfig, str]]:
    """Return the parts of a text configuration, and their fields, that say that there are so many experts."""
    return [(part, name) for part in _parts(config) for name in EXPERT_FIELDS if vars(part).get(name) == number]


def _parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    yield from (part for part in vars(config).values() if isinstance(part, PreTrainedConfig))
