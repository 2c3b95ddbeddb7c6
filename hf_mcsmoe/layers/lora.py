"""Where adapters (LoRA, by PEFT) go in a model, so that its experts are trained as well."""

from collections.abc import Iterator, Sequence

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.layer import MoELayer
from hf_mcsmoe.modeling.losparse_mcsmoe import sparse_parts
from hf_mcsmoe.modeling.quantized_mcsmoe import frozen_parameters, quantized_of

# Names of the experts' linear layers before they were stacked. For the library's own models PEFT takes a target that
# is called so for the experts, and then leaves the linear layer of that name (of a shared expert) without an adapter.
TAKEN_FOR_EXPERTS = ("gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj")
# Modules outside the layers of experts that hold matrices [*, out, in], and read them in their own forward.
STACKED_LINEAR = ("JetMoeParallelExperts",)
# Containers that read their matrices out of a module inside, which PEFT puts another in the place of.
UNREACHABLE = ("DbrxExperts",)


def lora_targets(model: PreTrainedModel) -> dict[str, list[str]]:
    """Return what PEFT is to adapt in a model, compressed or not: `LoraConfig(**lora_targets(model), r=16)`.

    That is every linear layer but the routers, which keep to the choice among the original's experts, and the output
    embeddings; and every matrix of the text part's experts, be it stacked, in a module of its own, or stored as low
    rank + sparse (then the adapters lie beside U, V and S). Experts in few bits stay frozen, without adapters. Biases
    and norms get none, nor do the output projections of Mamba, whose kernels read the weight past any adapter. PEFT
    itself, with `target_modules="all-linear"`, adapts no stacked expert.

    Returns:
        `target_modules`, paths of linear layers, and `target_parameters`, paths of matrices that lie in none. The
        latter allow neither `lora_dropout` nor DoRA.

    Raises:
        ValueError: the model is quantized or has no experts, PEFT cannot adapt its experts, or S is in its training
            form.
    """
    layers = Layers.of(model)
    _check_adaptable(layers)
    modules, parameters = _linear(layers)
    parameters += [name for layer in layers for name in _matrices(layer)]
    _check_reloadable(model, [*modules, *parameters])
    return {"target_modules": modules, "target_parameters": list(dict.fromkeys(parameters))}


def named_targets(model: PreTrainedModel, names: Sequence[str]) -> dict[str, list[str]]:
    """Return what PEFT is to adapt of the linear layers called `names`, as `lora_targets` does for all: no router.

    Raises:
        ValueError: the model is quantized or has no experts, or S is in its training form.
    """
    layers = Layers.of(model)
    _check_compact(model)
    endings = tuple(f".{name}" for name in names)
    modules = [module for module in _linear(layers)[0] if f".{module}".endswith(endings)]
    return {"target_modules": modules or list(names)}  # PEFT says that it found none


def _linear(layers: Layers) -> tuple[list[str], list[str]]:
    """Return the paths of linear layers to adapt, and of weights of those that PEFT would not treat as such."""
    model, modules, parameters = layers.model, [], []
    routers = {id(module) for layer in layers for module in layer.router.modules()}
    left_out = routers | {id(model.get_output_embeddings())}
    renamed = get_checkpoint_conversion_mapping(model.config.model_type) is not None
    for name, module in model.named_modules():
        if id(module) in left_out or not (isinstance(module, nn.Linear) or type(module).__name__ in STACKED_LINEAR):
            continue
        parent, _, own_name = name.rpartition(".")
        if own_name == "out_proj" and hasattr(model.get_submodule(parent), "conv1d"):
            continue
        # A wrapper of the parameter leaves the module's own forward in place.
        own_forward = type(module).forward is not nn.Linear.forward
        if own_forward or (renamed and own_name in TAKEN_FOR_EXPERTS):
            parameters.append(f"{name}.weight")
        else:
            modules.append(name)
    return modules, parameters


def _matrices(layer: MoELayer) -> Iterator[str]:
    """Yield the paths of the experts' matrices that lie in no linear layer."""
    frozen = {id(parameter) for parameter in frozen_parameters(layer.container)}
    for name, parameter in layer.parameters:
        owner = layer.container.get_submodule(name.rpartition(".")[0])
        if id(parameter) in frozen:
            continue
        if parameter.ndim > 1 and parameter.numel() and not name.endswith("bias") and not isinstance(owner, nn.Linear):
            yield f"{layer.name}.{name}"


def _check_compact(model: PreTrainedModel) -> None:
    """Raise ValueError where S is in its training form."""
    if sparse_parts(model):
        raise ValueError(
            "S is in its training form and stays frozen beside adapters, so nothing tells which of its rows to prune: "
            "call compact first, or train the model without adapters."
        )


def _check_adaptable(layers: Layers) -> None:
    """Raise ValueError where adapters would not reach the experts, or not do what they should."""
    _check_compact(layers.model)
    for layer in layers:
        if (kind := type(layer.container).__name__) in UNREACHABLE:
            raise ValueError(
                f"PEFT cannot adapt the experts of {layer.name!r} ({kind}): it replaces the module that holds their "
                "matrices, which the container reads directly. Merge the model, whose experts it can adapt, or train "
                'attention alone with target_modules=["Wqkv", "out_proj"].'
            )
    if shared := next((shared for shared in layers.tied if len(shared) > 1), None):
        raise ValueError(
            f"{shared[0].name!r} and {shared[1].name!r} share their experts, and PEFT would adapt one of the two "
            "alone: train the model without adapters, or name target_modules outside of the shared layers."
        )
    single = [layer for layer in layers if layer.num_experts == 1 and getattr(layer.container, "is_transposed", False)]
    if single and not getattr(single[0].container, "low_rank", {}) and not quantized_of(single[0].container):
        raise ValueError(
            f"PEFT takes the matrix of the only expert of {single[0].name!r}, which is stored transposed, for one "
            "that is not: keep at least 2 experts in each layer."
        )


def _check_reloadable(model: PreTrainedModel, targets: list[str]) -> None:
    """Raise ValueError where PEFT would look for a saved adapter under the names of the family's checkpoints."""
    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    for target in targets:
        name = f"{target}.weight"
        for entry in renamings:
            name, _ = entry.rename_source_key(name)
        if name != f"{target}.weight":
            raise ValueError(
                f"PEFT would look for a saved adapter of {target!r} under {name!r}, a name of this family's "
                "checkpoints, and lose it: merge the model first, whose names stay, or train it without adapters."
            )
