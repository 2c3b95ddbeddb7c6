"""Where each architecture keeps its experts: `Layers` finds them once, an adapter a kind of container reads them."""

import fnmatch
import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, overload

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_mcsmoe.layers.dequantize import check_not_quantized
from hf_mcsmoe.layers.fused import FusedLayer, fused_sizes, is_fused
from hf_mcsmoe.layers.layer import MoELayer, find_router
from hf_mcsmoe.layers.outside import (
    REFUSED,
    DbrxLayer,
    JetMoeLayer,
    Llama4Layer,
    MergedLlama4Layer,
    MergedSwitchLayer,
    SwitchLayer,
)
from hf_mcsmoe.layers.sharded import whole
from hf_mcsmoe.layers.source import Source, source_of
from hf_mcsmoe.layers.streaming import blocks
from hf_mcsmoe.modeling.constants_mcsmoe import num_constants
from hf_mcsmoe.modeling.pruned_mcsmoe import cut_of
from hf_mcsmoe.modeling.router_mcsmoe import map_of

# Parts of a multimodal model that are not its text part; their experts stay as they are.
OTHER_TOWERS = ("vision", "visual", "image", "audio", "speech", "talker")

# Per class of container: adapter, and its (E, D, F). The experts interface needs no entry.
OUTSIDE: dict[str, tuple[type[MoELayer], Callable[[Any], tuple[int, int, int]]]] = {
    "SwitchTransformersExperts": (
        SwitchLayer,
        lambda c: (len(c), *(c["expert_0"].wo.weight.shape if len(c) else (0, 0))),
    ),
    "Llama4TextExperts": (Llama4Layer, lambda c: (c.num_experts, c.hidden_size, c.expert_dim)),
    "JetMoeMoE": (JetMoeLayer, lambda c: (c.input_linear.num_experts, c.input_size, c.hidden_size)),
    "DbrxExperts": (DbrxLayer, lambda c: (c.num_experts, c.hidden_size, c.ffn_hidden_size)),
}
# Per class of block: the adapter of its merged experts. Others need no entry.
MERGED: dict[str, type[MoELayer]] = {
    "MergedLlama4TextMoe": MergedLlama4Layer,
    "MergedSwitchSparseMLP": MergedSwitchLayer,
}

TOP_K_FIELDS = ("top_k", "num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")


class Layers(Sequence[MoELayer]):
    """The layers of experts of one model, in the order of its modules, found once and passed on.

    Slices and selections are `Layers` of the same model.
    """

    def __init__(self, source: Source, layers: Sequence[MoELayer], whole: "Layers | None" = None) -> None:
        """Hold some layers of a source; use `Layers.of` to find those of a model.

        Args:
            whole: all layers of the model, where these are only some of them.
        """
        self.source, self._layers, self._whole = source, tuple(layers), whole

    @classmethod
    def of(cls, origin: "PreTrainedModel | Source | Layers") -> "Layers":
        """Return the layers of experts of a model or of a source of weights, or layers that were found already.

        Experts of vision, audio and speech parts and shared experts are left out. In an already compressed model the
        layers have `merged` set, and `num_experts` counts the stored experts.

        Raises:
            ValueError: the model is quantized, has no experts, or experts of a kind that cannot be merged.
        """
        if isinstance(origin, Layers):
            return origin
        source = source_of(origin)
        model = source.model
        check_not_quantized(getattr(model, "config", None), type(model).__name__)
        entries = _merged_entries(model)
        modules = [(name, module) for name, module in model.named_modules() if _is_text_experts(name, module)]
        layers = [_layer(source, name, module, entries.get(name)) for name, module in modules]
        if not layers:
            raise ValueError(
                f"{type(model).__name__} has no Mixture-of-Experts layer in its text part. hf_mcsmoe merges experts "
                "of sparse models (Mixtral, Qwen3-MoE, OLMoE, gpt-oss, Switch Transformers ...); a dense one has none."
            )
        return cls(source, layers)

    @overload
    def __getitem__(self, index: int) -> MoELayer: ...
    @overload
    def __getitem__(self, index: slice) -> "Layers": ...
    def __getitem__(self, index: int | slice) -> "MoELayer | Layers":
        return self._layers[index] if isinstance(index, int) else self.only(self._layers[index])

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Iterator[MoELayer]:
        return iter(self._layers)

    @property
    def model(self) -> PreTrainedModel:
        """The model that the layers are in."""
        return self.source.model

    @property
    def names(self) -> list[str]:
        """The names of the layers."""
        return [layer.name for layer in self]

    def only(self, layers: Sequence[MoELayer]) -> "Layers":
        """Return some of the layers as layers of the same model."""
        return Layers(self.source, layers, self._whole or self)

    @cached_property
    def tied(self) -> list[list[MoELayer]]:
        """The layers in lists that share one set of experts (an encoder tied to a decoder); mostly lists of one."""
        shared: dict[int, list[MoELayer]] = {}
        for layer in self:
            shared.setdefault(id(layer.parameters[0][1]), []).append(layer)
        return list(shared.values())

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all layers' names and sizes, of their routers and of the model's norms and biases.

        Cheap to read, changed by any training, and the same in float32 and in bfloat16. Computed once: find the layers
        anew after training.
        """
        if self._whole is not None:
            return self._whole.fingerprint
        digest = hashlib.sha256()
        paths = {id(module): path for path, module in self.model.named_modules()}
        for layer in self:
            digest.update(f"{layer.name} {layer.num_experts} {layer.hidden_size} {layer.intermediate_size}".encode())
            self._add_weights(digest, paths[id(layer.router)])
        for path, module in self.model.named_modules():
            if not any(module.children()) and any(parameter.ndim == 1 for parameter in module.parameters()):
                self._add_weights(digest, path)
        return digest.hexdigest()

    def _add_weights(self, digest: Any, path: str) -> None:
        with self.source.loaded(path) as module:
            for parameter in module.parameters():
                values = whole(parameter.detach()).to("cpu", torch.bfloat16).contiguous()
                digest.update(values.view(torch.int16).numpy().tobytes())

    @property
    def compressed(self) -> bool:
        """Whether the model is compressed, be it that all layers were left whole."""
        return any(layer.merged for layer in self) or bool(getattr(self.model.config, "mcsmoe", None))

    def uncompressed(self) -> "Layers":
        """Return the layers themselves.

        Raises:
            ValueError: the model is compressed already, or carries adapters.
        """
        if any(type(module).__module__.startswith("peft.") for module in self.model.modules()):
            raise ValueError(
                f"{type(self.model).__name__} carries adapters of PEFT, which are no part of its weights: call "
                "merge_and_unload() of the PeftModel (PeftModel.from_pretrained(model, adapter)), and pass what that "
                "returns."
            )
        if self.compressed:
            raise ValueError(
                "This model is compressed already. Its routers still speak of the original experts, which are gone: "
                "merge the original model again with a smaller `experts` instead of merging twice."
            )
        return self

    def selected(self, skip: Sequence[str]) -> "Layers":
        """Return the layers that no pattern of `skip` matches, nor a layer that shares their experts.

        Patterns match names, of a merged layer also the one that it had before.

        Raises:
            ValueError: a pattern matches nothing, or the patterns leave nothing.
        """
        skipped: set[str] = set()
        for pattern in skip:
            matched = {x.name for x in self if fnmatch.filter({x.name, x.original_name}, pattern)}
            if not matched:
                raise ValueError(f"skip={pattern!r} matches no layer. The layers are: {', '.join(self.names)}.")
            skipped |= matched
        for shared in self.tied:
            if skipped & (names := {layer.name for layer in shared}):
                skipped |= names
        if len(skipped) == len(self):
            raise ValueError(f"skip={list(skip)} leaves no layer.")
        return self.only([layer for layer in self if layer.name not in skipped])


def moe_layers(model: PreTrainedModel | Source | Layers) -> Layers:
    """Return the model's layers of experts, in the order of its modules; see `Layers.of`.

    Raises:
        ValueError: the model is quantized, has no experts, or experts of a kind that cannot be merged.
    """
    return Layers.of(model)


def check_blocks(layers: Layers) -> None:
    """Raise ValueError where experts lie in no block, or in several: a model is not read block by block then."""
    for shared in layers.tied:
        if len(shared) > 1:
            raise ValueError(
                f"{', '.join(layer.name for layer in shared)} share their experts, and lie in several blocks: what "
                "all of them see is never at hand together, and the later ones read a cache that the earlier ones "
                "fill, which a run that goes on would lack. Load the model (--no-stream)."
            )
    paths = tuple(f"{path}." for path in blocks(layers.model))
    if outside := [layer.name for layer in layers if not layer.name.startswith(paths)]:
        raise ValueError(f"{outside[0]} lies in no block of {type(layers.model).__name__}: load it (--no-stream).")


def _is_text_experts(name: str, module: nn.Module) -> bool:
    kind = type(module).__name__
    if any(tower in part for part in name.split(".") for tower in OTHER_TOWERS):
        return False
    if kind in REFUSED:
        raise ValueError(f"The experts of {name!r} ({kind}) cannot be merged: {REFUSED[kind]}.")
    return kind in OUTSIDE or is_fused(module)


def _merged_entries(model: nn.Module) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return what the configuration says of changed layers: by path, the name that they had before, and the entry."""
    modules, entries = dict(model.named_modules()), {}
    mcsmoe = getattr(getattr(model, "config", None), "mcsmoe", None) or {"layers": {}}
    prefix = getattr(model, "base_model_prefix", "") + "."
    for name, entry in mcsmoe["layers"].items():
        # A head's checkpoint may be loaded into the bare base model, and the other way round.
        path = next(path for path in (name, name.removeprefix(prefix), prefix + name) if path in modules)
        for inner in (path, path + ".experts"):  # JetMoE's merged experts lie inside what was the layer
            entries[inner] = (name, entry)
    return entries


def _layer(source: Source, name: str, module: nn.Module, entry: tuple[str, dict[str, Any]] | None) -> MoELayer:
    """Return the description of the experts `module`; `entry` is what the configuration says of changed ones."""
    if entry is None and type(module).__name__ in OUTSIDE:
        adapter, measure = OUTSIDE[type(module).__name__]
        sizes = measure(module)
    else:
        block = source.model.get_submodule(name.rpartition(".")[0])
        adapter, sizes = MERGED.get(type(block).__name__, FusedLayer), fused_sizes(module)
    if entry is None and (map_of(source.model, name) or cut_of(source.model, name)) is not None:
        raise ValueError(f"{name!r} holds merged experts of which the configuration's `mcsmoe` says nothing.")
    original_name, told = entry or (name, {})
    expert_map, kept = (tuple(told[key]) if key in told else None for key in ("expert_map", "kept"))
    top_k, routed = _top_k(source.model, name), len(expert_map or range(sizes[0]))
    if min(sizes) < 1 or (top_k is not None and not 1 <= top_k <= routed):
        raise ValueError(
            f"{name} has {sizes[0]} experts of {sizes[1]} x {sizes[2]}, of which a token picks {top_k}: the "
            f"configuration is damaged, a token must pick 1 to {routed}, and no size may be 0."
        )
    known = told.get("num_experts", sizes[0])
    constants = num_constants(module)
    return adapter(name, source, sizes[0], top_k, *sizes[1:], expert_map, original_name, kept, known, constants)


def _top_k(model: PreTrainedModel, name: str) -> int | None:
    """Return how many experts a token picks, from the router, the block or the configuration; None where unsaid."""
    try:
        router = find_router(model, name)
    except ValueError:
        router = None
    block = model.get_submodule(name.rpartition(".")[0])
    for owner in (router, block, model.config.get_text_config()):
        for field in TOP_K_FIELDS:
            if isinstance(value := getattr(owner, field, None), int):
                return value
    return 1 if type(block).__name__.startswith(("Switch", "MergedSwitch")) else None
