"""Where a model keeps its stacks of layers, and a layer its block of experts. This file travels with variants."""

from collections.abc import Iterator

from torch import nn


def stacks(model: nn.Module) -> Iterator[tuple[nn.Module, nn.ModuleList]]:
    """Yield the outermost lists of layers of which some have a block of experts inside, each behind its owner."""
    found: list[str] = []
    for path, module in model.named_modules():
        is_inside = path.startswith(tuple(f"{other}." for other in found))
        if isinstance(module, nn.ModuleList) and not is_inside and any(block_path(layer) for layer in module):
            found.append(path)
            yield model.get_submodule(path.rpartition(".")[0]), module


def block_path(layer: nn.Module) -> str | None:
    """Return where in a layer its block of experts is."""
    paths = [path for path, module in layer.named_modules() if path and "experts" in dict(module.named_children())]
    return paths[0] if paths else None
