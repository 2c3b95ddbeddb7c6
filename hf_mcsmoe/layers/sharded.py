"""Models whose weights are split over processes (FSDP2, expert or tensor parallelism): whole tensors of parts."""

import torch
from torch.distributed.tensor import DTensor, Replicate
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig


def is_sharded(model: PreTrainedModel) -> bool:
    """Tell whether some of a model's weights are split over processes, all of which then take part in a forward."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of which this process may hold a part; all processes have to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of a tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part_of(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return the part of a tensor that a process holds of one that is split as `like` is, by leading axes."""
    if not isinstance(like, DTensor):
        return tensor
    replicated = [Replicate()] * like.device_mesh.ndim
    return (
        DTensor.from_local(tensor, like.device_mesh, replicated, run_check=False)
        .redistribute(placements=like.placements)
        .to_local()
    )


def check_whole(model: PreTrainedModel, purpose: str) -> None:
    """Raise ValueError where a model is split over processes, and what it is needed for needs all of it."""
    if is_sharded(model):
        raise ValueError(
            f"{type(model).__name__} is split over processes (DistributedConfig), and {purpose} needs its weights "
            "whole: load it without one, on the CPU where an accelerator is too small."
        )


def layout(model: PreTrainedModel) -> tuple[int, int]:
    """Return over how many processes tensors, and over how many experts, are split by Transformers (tp, ep)."""
    config = getattr(model.config, "distributed_config", None)
    return (config.tp_size or 1, config.ep_size or 1) if isinstance(config, DistributedConfig) else (1, 1)
