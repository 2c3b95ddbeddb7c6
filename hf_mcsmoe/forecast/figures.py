"""What a model is by its configuration: layers, experts, parameters."""

from dataclasses import dataclass

from hf_mcsmoe.evaluation.costs import expert_parameters
from hf_mcsmoe.layers.find import Layers


@dataclass(frozen=True)
class Figures:
    """A model in figures; those of a layer are of the layer with most experts.

    `parameters` of all, `in_experts`, `shared` (of experts that every token passes), `embedding` (of the tokens at the
    input), `active`: all but the experts that a token does not pick, embeddings included.
    """

    layers: int
    experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    parameters: int
    in_experts: int
    shared: int
    embedding: int
    active: int


def figures_of(layers: Layers) -> Figures:
    """Return the figures of a model; works on the meta device."""
    model, largest = layers.model, max(layers, key=lambda layer: layer.num_experts)
    parameters, idle = model.num_parameters(), 0
    for layer, *others in layers.tied:
        picked = min(layer.num_experts, (layer.top_k or 1) * (1 + len(others)))
        idle += layer.num_parameters // layer.num_experts * (layer.num_experts - picked)
    return Figures(
        layers=len(layers),
        experts=largest.num_experts,
        top_k=largest.top_k or 1,
        hidden_size=largest.hidden_size,
        intermediate_size=largest.intermediate_size,
        parameters=parameters,
        in_experts=expert_parameters(layers),
        shared=sum(layer.shared_parameters for layer in layers),
        embedding=sum(part.numel() for part in model.get_input_embeddings().parameters()),
        active=parameters - idle,
    )
