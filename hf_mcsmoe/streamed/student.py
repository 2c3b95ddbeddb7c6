"""The compressed model while it is made: without weights, but for the block in work."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.evaluation.costs import account, saved_costs
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.folder import Folder
from hf_mcsmoe.layers.layer import MoELayer
from hf_mcsmoe.layers.source import InMemory
from hf_mcsmoe.layers.streaming import blocks
from hf_mcsmoe.merge import described, merge_layer, prepared, sums_of
from hf_mcsmoe.modeling.auto import register_family
from hf_mcsmoe.modeling.companions_mcsmoe import remember_source
from hf_mcsmoe.modeling.convert import write_description
from hf_mcsmoe.modeling.modeling_mcsmoe import adopt_inner_models, install_described
from hf_mcsmoe.plan import MergePlan
from hf_mcsmoe.record import Costs
from hf_mcsmoe.sparsity.width import narrow_model


class Student:
    """A model that is made of a teacher's by a plan, block by block. What no stage changes it borrows of the teacher.

    `teacher` are layers of a `Folder`, none of which share experts.
    """

    def __init__(self, teacher: Layers, plan: MergePlan, width: int | None = None) -> None:
        """Make a model without weights of the class of the result, of which no layer is merged yet.

        Args:
            width: the hidden units of each expert in the end, where some of them go.
        """
        self.teacher, self.plan = teacher, plan
        whole = [name for name, item in plan.layers.items() if item.is_whole]
        merged = [layer for layer in teacher if layer.name in plan.layers and layer.name not in whole]
        self.model: PreTrainedModel = prepared(teacher.only(merged)).requires_grad_(False)
        vars(self.model)["mcsmoe_is_written"] = True  # when it is saved
        adopt_inner_models(self.model)
        # What lies beside the weights is of the same commit, and at hand.
        remember_source(self.model, str(cast(Folder, teacher.source).place))
        register_family(type(self.model.config))
        write_description(self.model, whole=whole)
        self.originals = {layer.name: layer for layer in teacher}
        self.names = _stored_names(self.model)
        self.width, self.narrower = width, cast(PreTrainedModel | None, None)
        if width is not None:
            self._key, self.narrower = narrow_model(self.layers, width)

    @property
    def layers(self) -> Layers:
        """Its layers as they are now."""
        return Layers.of(InMemory(self.model))

    def in_block(self, path: str) -> dict[str, MoELayer]:
        """Return the layers of the block at `path` as they are now, by the names that they had before."""
        return {layer.original_name: layer for layer in self.layers if layer.name.startswith(f"{path}.")}

    def resume(self, description: dict[str, Any]) -> None:
        """Give it, without weights, all that `config.mcsmoe` said when some of its blocks were done."""
        with torch.device("meta"):
            if self.narrower is not None:
                for name in description["layers"]:
                    _put(self.model, name, self.narrower.get_submodule(name))
            install_described(self.model, description["layers"])
        self.model.config.mcsmoe = description
        self.model.requires_grad_(False)

    def describe_narrower(self, layer: MoELayer) -> None:
        """Give the narrower model, without weights, the experts that a layer has: as many, and their map."""
        name = layer.original_name
        with torch.device("meta"):
            install_described(cast(PreTrainedModel, self.narrower), {name: self.model.config.mcsmoe["layers"][name]})

    def narrow(self) -> None:
        """Let the configuration say how wide experts are, once all of them are."""
        if self.width is not None:
            setattr(self.model.config.get_text_config(), self._key, self.width)

    def merge(self, layers: Iterable[MoELayer], statistics: RoutingStatistics | None) -> None:
        """Merge those of the teacher's layers that the plan merges."""
        for layer in layers:
            item = self.plan.layers.get(layer.name)
            if item is not None and not item.is_whole:
                merge_layer(layer, item, self.model, self.plan, sums_of(statistics, [layer])).requires_grad_(False)
        write_description(self.model)

    @contextlib.contextmanager
    def borrowed(self, path: str) -> Iterator[Any]:
        """Yield the block at `path`, all of it with weights; they are gone after the `with` block."""
        module = self.model.get_submodule(path)
        theirs = _tensors(self.teacher.model.get_submodule(path))
        with self._lent(module, theirs):
            yield module
        _free(module)

    @contextlib.contextmanager
    def borrowed_outside(self) -> Iterator[None]:
        """Lend it what lies outside its blocks."""
        inside = tuple(f"{path}." for path in blocks(self.model))
        theirs = {name: value for name, value in _tensors(self.teacher.model).items() if not name.startswith(inside)}
        with self._lent(self.model, theirs):
            yield

    @contextlib.contextmanager
    def _lent(self, module: nn.Module, theirs: dict[str, torch.Tensor]) -> Iterator[None]:
        lent: list[tuple[dict[str, Any], str, Any, Any]] = []
        try:
            for owner, attribute, name in _places(module):
                empty, value = owner[attribute], theirs.get(name)
                if value is not None and empty.is_meta and empty.shape == value.shape:
                    # A parameter of its own: a family's router may cast its own to another dtype.
                    own = nn.Parameter(value.detach(), False) if isinstance(empty, nn.Parameter) else value
                    owner[attribute] = own
                    lent.append((owner, attribute, empty, own))
            yield
        finally:
            for owner, attribute, empty, own in lent:
                if owner.get(attribute) is own:
                    owner[attribute] = empty


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, own = path.rpartition(".")
    setattr(model.get_submodule(parent), own, module)


def _places(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, str]]:
    """Yield where a module keeps its parameters and buffers: the dictionary, the key, and the name in the module."""
    for path, child in module.named_modules():
        for owner in (vars(child)["_parameters"], vars(child)["_buffers"]):
            for attribute in [key for key, value in owner.items() if value is not None]:
                yield owner, attribute, f"{path}.{attribute}" if path else attribute


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    named = (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
    return dict(chain(*named))


def _free(module: nn.Module) -> None:
    """Move all that a checkpoint holds of a module to the meta device."""
    saved = module.state_dict().keys()
    for owner, attribute, name in _places(module):
        value = owner[attribute]
        if name in saved and not value.is_meta:
            empty = torch.empty_like(value, device="meta")
            owner[attribute] = nn.Parameter(empty, False) if isinstance(value, nn.Parameter) else empty


def _stored_names(model: nn.Module) -> dict[str, str]:
    """Return for the name of each tensor that under which it is stored: of those that are one, the first."""
    state = model.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in state.items()}


def merged_costs(teacher: Layers, plan: MergePlan) -> Costs:
    """Return what the merged model holds before anything else is done, from sizes alone."""
    student = Student(teacher, plan)
    layers = {name: described(item, plan) for name, item in plan.layers.items() if not item.is_whole}
    with torch.device("meta"):
        install_described(student.model, layers)
    write_description(student.model)
    return replace(account(student.model), bytes_on_disk=saved_costs(student.model).bytes_on_disk)
