"""Layers that keep all experts, in the form that merged ones have: what is to be stored otherwise must be ours."""

from transformers import PreTrainedModel

from hf_mcsmoe.layers.fused import fused_views
from hf_mcsmoe.layers.layer import MoELayer
from hf_mcsmoe.modeling.convert import write_description
from hf_mcsmoe.modeling.modeling_mcsmoe import install_layer


def convert_whole(model: PreTrainedModel, layer: MoELayer) -> None:
    """Give a layer of library experts, in place, the merged experts' form with the identity as its map.

    Args:
        model: a model that is merged, be it that all of its layers were left whole.
    """
    identity, weights = list(range(layer.num_experts)), layer.read()
    views = fused_views(install_layer(model, layer.name, identity))
    for expert in identity:
        views.set_expert(expert, weights.expert(expert))
    write_description(model, whole=[name for name in model.config.mcsmoe.get("whole", []) if name != layer.name])
