"""Weights that Accelerate keeps off the device, in memory or on disk, and brings in for the time of a forward."""

import contextlib
from collections.abc import Iterator
from itertools import chain

from accelerate.hooks import ModelHook, remove_hook_from_module
from accelerate.utils import align_module_device
from torch import nn


def is_hooked(model: nn.Module) -> bool:
    """Tell whether Accelerate manages where the model's weights are."""
    return any("_hf_hook" in vars(module) for module in model.modules())


@contextlib.contextmanager
def onloaded(module: nn.Module) -> Iterator[None]:
    """Bring the weights of a module that Accelerate offloaded to the CPU for the time of the block."""
    with contextlib.ExitStack() as stack:
        for child in module.modules():
            if any(parameter.is_meta for parameter in child.parameters(recurse=False)):
                stack.enter_context(align_module_device(child, "cpu"))
        yield


def detach(module: nn.Module, target: nn.Module, *, load: bool = True) -> None:
    """Free one module of Accelerate: no hook, the class's own forward, and offloaded weights on the CPU for good.

    Args:
        module: the module that the hook works for.
        target: `module` itself, or its copy in another model.
        load: whether to fetch the weights.
    """
    own = chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
    offloaded = [name for name, tensor in own if load and tensor.is_meta]
    loaded = {}
    if offloaded:
        with align_module_device(module, "cpu"):
            loaded = {name: getattr(module, name).detach().cpu().clone() for name in offloaded}
    if "_hf_hook" in vars(target):
        target._hf_hook = ModelHook()  # whose removal, other than that of the real one, loads nothing
        remove_hook_from_module(target)
        # A bound method is left behind, which would win over the forward of the class that the target becomes.
        vars(target).pop("forward", None)
    for name, tensor in loaded.items():
        old = getattr(target, name)
        setattr(target, name, nn.Parameter(tensor, old.requires_grad) if isinstance(old, nn.Parameter) else tensor)


def detach_all(model: nn.Module, result: nn.Module, left_out: set[int]) -> None:
    """Free `result`, which is `model` or a copy of it, of Accelerate, and load what is offloaded.

    Args:
        left_out: ids of the parameters not to load. In `model` itself their modules stay hooked, to be read later.
    """
    for module, target in list(zip(model.modules(), result.modules(), strict=True)):
        left = any(id(parameter) in left_out for parameter in module.parameters(recurse=False))
        if not (left and module is target):
            detach(module, target, load=not left)


def unhooked_copies(model: nn.Module) -> dict[int, ModelHook]:
    """Return what to put into the memo of `deepcopy` so that it does not copy all that the hooks hold."""
    hooks = (vars(module).get("_hf_hook") for module in model.modules())
    return {id(hook): ModelHook() for hook in hooks if hook is not None}
