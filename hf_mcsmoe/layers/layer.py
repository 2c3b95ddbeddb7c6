"""A layer of experts as a description: where its tensors lie, which tokens go where, what its router says."""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from hf_mcsmoe.layers.source import Source
from hf_mcsmoe.methods.experts import Experts
from hf_mcsmoe.methods.routed import Routed
from hf_mcsmoe.methods.view import LayerView, Sums
from hf_mcsmoe.modeling.configuration_mcsmoe import PREFIX
from hf_mcsmoe.modeling.pruned_mcsmoe import CUT
from hf_mcsmoe.modeling.quantized_mcsmoe import uncounted

# Called once per forward of a layer with its tokens.
Sink = Callable[[Routed], None]


@dataclass(frozen=True, eq=False)
class MoELayer:
    """One layer of experts of a model, as a description: keeping it keeps no expert alive.

    `name` is the path of the experts container in `model.named_modules()`; `original_name` the one that it had before
    a merge. Of a merged layer `num_experts` counts the stored experts, and `expert_map` says which of them stands for
    each expert of the original, int [E] -> [G]. Of a pruned one `kept` says which of the `num_original` experts are
    left, int [G], and the router knows no others; or, where it knows all, the map sends those that are gone to
    constants, of which there are `num_constants`, behind the stored ones.
    """

    name: str
    source: Source = field(repr=False)
    num_experts: int
    top_k: int | None
    hidden_size: int
    intermediate_size: int
    expert_map: tuple[int, ...] | None = field(default=None, repr=False)
    original_name: str = field(default="", repr=False)
    kept: tuple[int, ...] | None = field(default=None, repr=False)
    num_original: int = field(default=0, repr=False)
    num_constants: int = field(default=0, repr=False)

    @property
    def pruned(self) -> bool:
        """Whether each stored expert is one of the original's, and others are gone."""
        return self.kept is not None or self.num_constants > 0

    @property
    def merged(self) -> bool:
        """Whether the layer holds merged experts, or what a pruning left."""
        return self.expert_map is not None or self.kept is not None

    @property
    def sizes(self) -> dict[str, int]:
        """The layer's sizes by their letters, as `Method.axes` names those of a sum."""
        return {"E": self.num_experts, "D": self.hidden_size, "F": self.intermediate_size}

    @property
    def model(self) -> PreTrainedModel:
        """The model that the layer is in."""
        return self.source.model

    @property
    def container(self) -> Any:
        """The module that holds the experts, as it is now."""
        return self.model.get_submodule(self.name)

    @property
    def members(self) -> list[list[int]]:
        """The experts of the original that each stored one stands for."""
        if self.expert_map is not None:
            return [
                [one for one, at in enumerate(self.expert_map) if at == group] for group in range(self.num_experts)
            ]
        return [[expert] for expert in self.kept or range(self.num_experts)]

    @property
    def is_normed(self) -> bool:
        """Whether a norm follows each expert, so that their outputs do not add up to one target."""
        return bool(getattr(self.container, "has_post_expert_norm", False))

    @property
    def scales_inputs(self) -> bool:
        """Whether routers scale the inputs of experts, not their outputs."""
        return False

    @property
    def block(self) -> Any:
        """The module that holds the experts container."""
        return self.model.get_submodule(self.name.rpartition(".")[0])

    @property
    def router(self) -> Any:
        """The module whose output includes the router logits."""
        return find_router(self.model, self.name)

    @property
    def output_name(self) -> str:
        """The path of the module that returns the layer's output, of the original and of the merged model alike."""
        return self.name

    @property
    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters of the experts alone, by their path in the container."""
        return list(self.container.named_parameters())

    @property
    def num_parameters(self) -> int:
        """Parameters held by the experts, of quantized ones those that they stand for."""
        return sum(parameter.numel() for _, parameter in self.parameters) + uncounted(self.container)

    @property
    def shared_parameters(self) -> int:
        """Parameters of the experts beside these that every token passes, by the name that families give them."""
        beside = [module for name, module in self.block.named_children() if name.startswith("shared_")]
        return sum(parameter.numel() for module in beside for parameter in module.parameters())

    @contextlib.contextmanager
    def open(self) -> Iterator[Experts]:
        """Yield the experts' tensors, there for the time of the block: writing to them writes to the model."""
        with self.source.loaded(self.name):
            yield self.read()

    def read(self) -> Experts:
        """Return the experts' tensors, views of the model's parameters as they are; see `open`."""
        raise NotImplementedError

    def read_first(self) -> dict[str, torch.Tensor]:
        """Return the tensors of one expert, by role, as they are; no other is looked at."""
        return self.read().expert(0)

    def read_with_gradients(self) -> Experts:
        """Return the experts with the gradients that the last backward pass left; zeros where it left none."""
        parameters = [parameter for _, parameter in self.parameters]
        values = [parameter.data for parameter in parameters]
        try:  # what reads the layout of the weights reads that of their gradients
            for parameter in parameters:
                parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradients = self.read().tensors
        finally:
            for parameter, value in zip(parameters, values, strict=True):
                parameter.data = value
        return replace(self.read(), gradients=gradients)

    @contextlib.contextmanager
    def view(self, sums: Sums, seed: int, capacity: int | None = None) -> Iterator[LayerView]:
        """Yield what methods see of the layer; its experts are opened when touched, for the time of the block."""
        with contextlib.ExitStack() as stack:
            experts = lambda: stack.enter_context(self.open())  # noqa: E731
            yield LayerView(sums, self.num_experts, seed, experts, self._router_weight, capacity)

    @property
    def router_rows(self) -> str | None:
        """The path in the model of the router's matrix with a row for each expert, or None where it has none."""
        inside = {id(module): path for path, module in self.model.named_modules()}[id(self.router)]
        found = [(name, value) for name, value in self.router.named_parameters() if value.ndim == 2]
        # Most routers read what the experts read; one that does not has rows of another length.
        found.sort(key=lambda item: item[1].shape[1] != self.hidden_size)
        return next((f"{inside}.{name}" for name, value in found if len(value) == self.num_routed), None)

    def _router_weight(self) -> torch.Tensor | None:
        """Return a copy of the router's weight, a row for each expert, or None where it has no such matrix."""
        path = self.router_rows
        if path is None:
            return None
        owner, _, name = path.rpartition(".")
        with self.source.loaded(owner) as module:
            return dict(module.named_parameters())[name].detach().clone()

    @property
    def num_routed(self) -> int:
        """How many experts the router knows: E, of a merged layer as well, and of a pruned one G."""
        return self.num_experts if self.expert_map is None else len(self.expert_map)

    def routed(self, sink: Sink) -> list[RemovableHandle]:
        """Call `sink` with the tokens of every forward of the layer until the returned handles are removed."""
        raise NotImplementedError

    def hand_over(
        self,
        sink: Sink,
        logits: torch.Tensor,
        hidden: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        scale: torch.Tensor | None = None,
    ) -> None:
        """Call `sink` with one forward; see `Routed`.

        Args:
            logits: [T, E] or more columns.
            hidden: [..., D].
            index: int [T, K], experts that are held, of a merged layer stored ones; others are no expert.
        """
        logits, hidden = logits[:, : self.num_routed].detach(), hidden.reshape(-1, hidden.shape[-1]).detach()
        tensors = logits, hidden, index.clamp(max=self.num_experts), weights.detach()
        scale = None if scale is None else scale.detach()
        with contextlib.ExitStack() as stack:
            sink(Routed(*tensors, self.num_experts, lambda: stack.enter_context(self.open()), scale))

    def stored(self, index: torch.Tensor) -> torch.Tensor:
        """Return the experts that are held, or their number for no expert, of an original router's picks."""
        known = list(range(self.num_experts) if self.expert_map is None else self.expert_map)
        return torch.tensor([*known, self.num_experts], device=index.device)[index.clamp(max=len(known))]


def on_logits(layer: MoELayer, sink: Callable[[torch.Tensor], None]) -> list[RemovableHandle]:
    """Hand the router logits [T, E] of every forward to `sink`.

    A few routers return probabilities where others return logits; theirs are read off the linear layer inside.
    """
    router, index, linear = layer.router, recorded_index(layer), {}

    def keep(module: nn.Module, arguments: tuple, output: torch.Tensor) -> None:
        linear["logits"] = output

    def emit(module: nn.Module, arguments: tuple, output: Any) -> None:
        logits = output[index] if isinstance(output, tuple) else output
        logits = linear["logits"] if "logits" in linear and is_distribution(logits) else logits
        linear.clear()
        sink(logits.reshape(-1, logits.shape[-1]))

    inner = [child for child in router.children() if getattr(child, "out_features", None) == layer.num_routed]
    handles = [child.register_forward_hook(keep) for child in inner[:1]]
    return [*handles, router.register_forward_hook(emit)]


def is_distribution(values: torch.Tensor) -> bool:
    """Tell whether rows are probabilities: not negative, and summing to one."""
    return bool((values >= 0).all()) and bool(((values.float().sum(-1) - 1).abs() < 1e-3).all())


def _recorders(model: nn.Module, name: str) -> list[Any]:
    """Return what the innermost model around `name` declares that it records as router logits."""
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        module = model.get_submodule(".".join(parts[:depth]))
        recorder = getattr(module, "_can_record_outputs", None) or {}
        if isinstance(module, PreTrainedModel) and "router_logits" in recorder:
            found = recorder["router_logits"]
            return found if isinstance(found, list) else [found]
    return []


def _recorder(model: nn.Module, name: str) -> Any:
    """Return the last of them, which is that of routers of experts."""
    return next(reversed(_recorders(model, name)), None)


def recorded_modules(model: nn.Module, path: str) -> list[nn.Module]:
    """Return the modules below `path` whose outputs the family records as router logits."""
    named = model.get_submodule(path).named_modules(prefix=path)
    return [module for name, module in named if any(_is_of(name, module, one) for one in _recorders(model, name))]


def _is_of(name: str, module: nn.Module, recorder: Any) -> bool:
    """Tell whether a recorder, which may be a class or the end of a path alone, is of this module."""
    target = getattr(recorder, "target_class", recorder)
    end = recorder if isinstance(recorder, str) else getattr(recorder, "class_name", None)
    place = (getattr(recorder, "layer_name", None) or "").strip(".")
    is_meant = (isinstance(target, type) and isinstance(module, target)) or bool(end and name.endswith(end))
    return is_meant and (not place or f".{place}." in f".{name}.")


def recorded_index(layer: MoELayer) -> int:
    """Return which output of the router holds the logits."""
    recorder = _recorder(layer.model, layer.name)
    is_recorded = recorder is not None and _library_name(layer.router) == _class_name(recorder)
    return recorder.index if is_recorded else 0


def _class_name(recorder: Any) -> str:
    target = getattr(recorder, "target_class", recorder)
    return target if isinstance(target, str) else target.__name__


def _library_name(module: nn.Module) -> str:
    """Return the name of a module's class in Transformers, of which a merged model generates another."""
    return type(module).__name__.removeprefix(PREFIX).removeprefix(CUT).partition("__")[0]


def find_router(model: PreTrainedModel, name: str) -> Any:
    """Return the router of the experts called `name`.

    It is the module of the class that the family records as the source of its router logits, else a router or gate by
    the name of its class, nearest to the experts.

    Raises:
        ValueError: there is none.
    """
    recorder, parts = _recorder(model, name), name.split(".")
    recorded = _class_name(recorder) if recorder is not None else ""
    tests: list[Callable[[str], bool]] = [
        lambda cls: cls == recorded,
        lambda cls: any(word in cls for word in ("Router", "Gating", "Gate")),
    ]
    container = model.get_submodule(name)
    for depth in range(len(parts), max(len(parts) - 3, 0) - 1, -1):
        near = dict(model.get_submodule(".".join(parts[:depth])).named_modules())
        for test in tests:
            for module in near.values():
                if test(_library_name(module)) and all(child is not container for child in module.modules()):
                    return module
    raise ValueError(f"Found no router beside the experts {name!r} of {type(model).__name__}.")


def call_arguments(module: nn.Module, arguments: tuple, keywords: dict[str, Any]) -> list[Any]:
    """Return a call's arguments in the order of the module's `forward`, however they were passed."""
    return list(inspect.signature(module.forward).bind(*arguments, **keywords).arguments.values())
