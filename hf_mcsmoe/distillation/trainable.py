"""What of a student is trained: all of it, its experts, its routers, or adapters (LoRA) beside its weights."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer, ParamWrapper
from transformers import PreTrainedModel

from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.lora import lora_targets, named_targets
from hf_mcsmoe.modeling.quantized_mcsmoe import quantized_modules


def check_trainable(model: PreTrainedModel, parts: str) -> None:
    """Raise ValueError where weights that are stored in few bits would have to be trained."""
    if parts in ("all", "experts") and any(True for _ in quantized_modules(model)):
        raise ValueError(
            f"train_parts={parts!r} would train experts that are stored in few bits, which only whole values can be: "
            "distil the model before it is quantized, and quantize last, or train adapters beside them with "
            "train_parts='lora' ('routers' goes as well)."
        )


def choose_parameters(model: PreTrainedModel, parts: str, freeze_routers: bool) -> PreTrainedModel:
    """Let only the chosen parts of a model be trained: "all", its "experts" or its "routers". Returns `model`."""
    layers = Layers.of(model)
    routers = {id(parameter) for layer in layers for parameter in layer.router.parameters()}
    experts = {id(parameter) for layer in layers for _, parameter in layer.parameters}
    for parameter in model.parameters():
        is_router = id(parameter) in routers
        if parts == "routers":
            chosen = is_router
        elif parts == "experts":
            chosen = id(parameter) in experts
        else:
            chosen = not (is_router and freeze_routers)
        parameter.requires_grad_(chosen and parameter.is_floating_point())
    return model


def add_lora(model: PreTrainedModel, rank: int, alpha: float, targets: Sequence[str] | None = None) -> PeftModel:
    """Put adapters beside the weights of a student, in place, and freeze all else.

    Args:
        targets: names of linear layers, as in `LoraConfig.target_modules`, in place of all that `lora_targets` names.

    Raises:
        ValueError: see `lora_targets`, or targets that match no linear layer.
    """
    chosen = lora_targets(model) if targets is None else named_targets(model, targets)
    config = LoraConfig(r=rank, lora_alpha=alpha, **chosen)  # type: ignore[arg-type]  # PEFT declares alpha an int
    return get_peft_model(model, config)


def student_of(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Return the model itself, or the one that adapters were put into."""
    return cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model


@torch.no_grad()
def merged_state(model: PeftModel) -> dict[str, torch.Tensor]:
    """Return the student's weights with the adapters' products added, by their own names, on the CPU.

    The model itself is not touched: adding and subtracting in place, as `merge_adapter` and `unmerge_adapter` do,
    would leave its weights rounded.
    """
    student = student_of(model)
    state = {
        name.replace(".base_layer", ""): tensor
        for name, tensor in student.state_dict().items()
        if not any(part.startswith("lora_") for part in name.split("."))
    }
    for path, module in student.named_modules():
        if isinstance(module, LoraLayer):
            weight = module.parameter_name if isinstance(module, ParamWrapper) else "weight"
            name = f"{path.replace('.base_layer', '')}.{weight}"
            for adapter in module.active_adapters:
                state[name] = state[name] + cast(Any, module).get_delta_weight(adapter)
    return {name: tensor.cpu() for name, tensor in state.items()}
