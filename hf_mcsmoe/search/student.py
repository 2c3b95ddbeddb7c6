"""The experts that a plan makes of one layer, apart from any model: to be fitted, measured and thrown away."""

import copy
from typing import Any

from torch import nn

from hf_mcsmoe.calibration.inputs import LayerInputs
from hf_mcsmoe.calibration.pruned import pruned_inputs
from hf_mcsmoe.layers.layer import MoELayer
from hf_mcsmoe.layers.offloading import detach, unhooked_copies
from hf_mcsmoe.merge import fill_experts, materialise
from hf_mcsmoe.methods.view import Sums
from hf_mcsmoe.modeling.experts_mcsmoe import install_experts
from hf_mcsmoe.plan import LayerPlan, MergePlan
from hf_mcsmoe.repair.fit import LayerFit
from hf_mcsmoe.repair.methods import RepairConfig


def student_experts(layer: MoELayer, item: LayerPlan, plan: MergePlan, sums: Sums) -> Any:
    """Return the container of G experts that `item` of a plan makes of a layer; the model is left as it was."""
    with layer.view(sums, plan.config["seed"]) as view:
        device = view.experts.expert(0)["down"].device
        experts = empty_experts(layer, [max(group, 0) for group in item.expert_map])  # of a pruned layer -1 is none
        materialise(experts, device)
        fill_experts(experts, view, item, plan)
    return experts.requires_grad_(False)


def empty_experts(layer: MoELayer, expert_map: list[int]) -> Any:
    """Return G experts of a layer's family on the meta device, in the layout that the merged model stores."""
    block = layer.block
    experts = {id(parameter): _empty(parameter) for _, parameter in layer.parameters}
    tensors = {id(tensor): tensor for tensor in [*block.parameters(), *block.buffers()]}
    holder = nn.Module()
    holder.block = copy.deepcopy(block, {**tensors, **experts, **unhooked_copies(block)})
    for module in holder.modules():
        detach(module, module, load=False)
    return install_experts(holder, f"block.{layer.name.rpartition('.')[2]}", expert_map)


def _empty(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().to("meta"), requires_grad=False)


def refit_method(fit: LayerFit, repair: RepairConfig) -> str:
    """Return the method that refits a layer's output matrices: the one asked for, where it can be done to them.

    Behind a norm outputs do not add up to be fitted together, and experts of a pruned layer have lost nothing that
    they could be fitted to one by one.
    """
    if repair.method == "none":
        return "none"
    if fit.experts.has_post_expert_norm:
        return "none" if fit.expert_map is None else "refit"
    return "joint" if fit.expert_map is None else str(repair.method)


def seen_by(layer: MoELayer, item: LayerPlan, inputs: LayerInputs) -> LayerInputs:
    """Return what the experts that a plan leaves see of the tokens that the layer's own experts see.

    Raises:
        ValueError: they are pruned, and the router's picks do not follow from the inputs; see `pruned_inputs`.
    """
    return inputs.mapped(item.expert_map) if item.kept is None else pruned_inputs(layer, item.kept, inputs)
