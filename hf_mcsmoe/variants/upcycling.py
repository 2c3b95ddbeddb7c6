"""Dense models of one ancestor as the experts of one Mixture-of-Experts model (Branch-Train-MiX).

The branches' MLPs become the experts, everything else is averaged, and the routers are random: the mixture is to be
trained. The result is a model of Transformers' own, saved and served like any other, unless attention is mixed as well
(attention_mixture_mcsmoe.py).

Source: Sukhbaatar and others, Branch-Train-MiX (COLM 2024, arXiv 2403.07816); the baseline of Zhang and others, BAM
(NeurIPS 2024, arXiv 2408.08274).
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from hf_mcsmoe.variants.attention_mixture_mcsmoe import AttentionMixtureModel, stacked
from hf_mcsmoe.variants.remote_mcsmoe import become, check_counts, check_whole


@dataclass(frozen=True)
class Target:
    """A family that dense models of others become, exactly where they are all the same."""

    # Model types of the branches; "olmoe" stands for OLMoE with one expert, for no dense family is built like it.
    branches: tuple[str, ...]
    # The one of them that its experts become again where they are merged into one.
    dense: str
    # What the configuration calls the width of an expert.
    width: str
    # Fields that have to be so for the sum of equal experts to be one of them.
    fields: Mapping[str, Any] = field(default_factory=dict)


TARGETS = {
    "mixtral": Target(("llama", "mistral"), "mistral", "intermediate_size"),
    "qwen3_moe": Target(
        ("qwen3",), "qwen3", "moe_intermediate_size", {"norm_topk_prob": True, "decoder_sparse_step": 1}
    ),
    "olmoe": Target(("olmoe",), "olmoe", "intermediate_size", {"norm_topk_prob": True}),
    "flex_olmo": Target(("olmo2",), "olmo2", "intermediate_size", {"norm_topk_prob": True}),
}
# Fields that are the model's own, whatever the branch says.
OWN = {"architectures", "model_type", "transformers_version", "dtype", "torch_dtype", "_name_or_path", "auto_map"}
ATTENTIONS = ("average", "mixture", "shared_kv")
ROUTERS = ("mlp.gate.weight", "self_attn.router.weight")
MLP = ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")


@torch.no_grad()
def upcycle_dense(
    models: Sequence[PreTrainedModel],
    into: str,
    *,
    top_k: int = 2,
    router_std: float | None = None,
    attention: str = "average",
) -> PreTrainedModel:
    """Return a Mixture-of-Experts model with the MLP of each given model as an expert in every layer.

    Top-k weights are normalised, so that equal models give a mixture that equals them, whatever its routers say.

    Args:
        models: dense models for causal language modelling of one family and one configuration.
        into: "mixtral" (of Llama or Mistral models without biases), "qwen3_moe" (Qwen3), "flex_olmo" (OLMo 2), or
            "olmoe" (OLMoE with one expert, which is dense).
        top_k: how many experts a token gets; at most the number of models. With 1 the weight is always 1, so that no
            gradient of the model's loss reaches the routers, which is warned of.
        router_std: standard deviation of the routers' weights; None for the family's own.
        attention: "average" of the models', which makes a model of Transformers' own; "mixture", all of them, weighed
            by a router of its own (BAM), or "shared_kv", the same with averaged projections of keys and values, both
            saved with code beside the weights.

    Raises:
        ValueError: the family is unknown or cannot hold these models, a model has no head, carries adapters or is
            offloaded, their configurations differ, or `top_k` is out of its range.
    """
    if into not in TARGETS:
        raise ValueError(f"into must be one of {', '.join(TARGETS)}, not {into!r}.")
    if not models or not 1 <= top_k <= len(models):
        raise ValueError(f"Needs 1 <= top_k <= the number of models, not top_k={top_k} and {len(models)} models.")
    check_counts(top_k=top_k)
    for number, model in enumerate(models):
        _check_branch(number, model)
    _check_attention(attention, models[0].config)
    config = _config(models, into, top_k)
    if attention != "average" and "attention_bias" in vars(config) and config.attention_bias:
        raise ValueError(
            "Attention with biases is averaged alone: take attention='average', or models without biases."
        )
    if top_k == 1 < len(models):
        warnings.warn(
            "With top_k=1 the weight of the one expert picked is always 1, so that training gives the routers no "
            "gradient: take top_k=2 or more where they are to learn.",
            stacklevel=2,
        )
    mixture = AutoModelForCausalLM.from_config(config, dtype=models[0].dtype)
    states = [_dense_state(model) for model in models]
    filled = _averaged(states) | _experts(states, config.num_hidden_layers)
    if attention != "average":
        shared_kv = attention == "shared_kv"
        become(mixture, AttentionMixtureModel, {"num_branches": len(models), "shared_kv": shared_kv})
        filled = _with_attention(filled, states, config.num_key_value_heads, shared_kv)
    result = mixture.load_state_dict(filled, strict=False)
    lacking = [name for name in result.missing_keys if not name.endswith(ROUTERS)]
    if lacking or result.unexpected_keys:
        raise ValueError(
            f"{into} has no place for {result.unexpected_keys[:1] or 'nothing'} of the models, and they lack "
            f"{lacking[:1] or 'nothing'} that it has: biases and norms of other places cannot be carried over."
        )
    for name, parameter in mixture.named_parameters():
        if name.endswith(ROUTERS) and router_std is not None:
            parameter.normal_(0, router_std)
    mixture.tie_weights()
    mixture.generation_config = models[0].generation_config
    return mixture.eval()


def _check_branch(number: int, model: Any) -> None:
    """Refuse what is no whole causal language model of Transformers' own."""
    # PEFT's wrapper is no model of Transformers, and leaves its adapters in the one inside.
    if not isinstance(model, PreTrainedModel) or any(".base_layer." in name for name, _ in model.named_parameters()):
        raise ValueError(
            f"Model {number}, {type(model).__name__}, is no model of Transformers or carries adapters: call "
            "merge_and_unload() of a PEFT model first."
        )
    if not isinstance(model, AutoModelForCausalLM._model_mapping.get(type(model.config), PreTrainedModel)):
        raise ValueError(
            f"Model {number}, {type(model).__name__}, has no head for causal language modelling: load it with "
            "AutoModelForCausalLM."
        )
    check_whole(model)


def _check_attention(attention: str, config: Any) -> None:
    if attention not in ATTENTIONS:
        raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, not {attention!r}.")
    if attention != "average" and vars(config).get("attention_bias"):
        raise ValueError(
            "Attention with biases is averaged alone: take attention='average', or models without biases."
        )


def _config(models: Sequence[PreTrainedModel], into: str, top_k: int) -> PreTrainedConfig:
    """Return the mixture's configuration, after a look at whether it can be one."""
    target, configs = TARGETS[into], [model.config for model in models]
    if other := sorted({config.model_type for config in configs} - set(target.branches)):
        raise ValueError(f"{into} is made of models of {' or '.join(target.branches)}, not of {other[0]}.")
    said = [{key: value for key, value in config.to_dict().items() if key not in OWN} for config in configs]
    for number, fields in enumerate(said):
        if other := sorted(key for key in said[0].keys() | fields.keys() if said[0].get(key) != fields.get(key)):
            raise ValueError(
                f"Model {number} has {other[0]} {fields.get(other[0])!r}, and the first has "
                f"{said[0].get(other[0])!r}: branches must be of one ancestor."
            )
    base = CONFIG_MAPPING[into]
    if said[0].get("num_experts", 1) != 1 or (said[0].get("attention_bias") and into == "mixtral"):
        raise ValueError(f"{into} is made of dense models without biases; of OLMoE, of models with num_experts=1.")
    known = {*base().to_dict(), "head_dim"}  # which all families read, and not all declare
    if len(kinds := sorted(set(said[0].get("layer_types") or ()))) > 1 and "layer_types" not in known:
        raise ValueError(
            f"The models' layer_types are {' and '.join(kinds)}, and {into} has one kind of attention in all layers: "
            "branches must have one kind as well."
        )
    given = {key: value for key, value in said[0].items() if key in known}
    given |= {"num_experts": len(models), "num_experts_per_tok": top_k, **target.fields}
    if into == "mixtral":
        given["num_local_experts"] = given.pop("num_experts")
    given[target.width] = configs[0].intermediate_size
    return base(**given)


def _dense_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return a model's weights as those of a dense one, which an OLMoE with one expert becomes."""
    state = dict(model.state_dict())
    for name in [name for name in state if name.endswith("mlp.experts.gate_up_proj")]:
        path = name.removesuffix("mlp.experts.gate_up_proj")
        gate, up = state.pop(name)[0].chunk(2)
        down = state.pop(f"{path}mlp.experts.down_proj")[0]
        state |= {path + own: value for own, value in zip(MLP, (gate, up, down), strict=True)}
        state.pop(f"{path}mlp.gate.weight")
    return state


def _averaged(states: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the mean over the models of all but the MLPs."""
    names = [name for name in states[0] if not name.endswith(MLP)]
    means = {name: torch.stack([state[name].double() for state in states]).mean(0) for name in names}
    return {name: mean.to(states[0][name].dtype) for name, mean in means.items()}


def _experts(states: Sequence[Mapping[str, torch.Tensor]], num_layers: int) -> dict[str, torch.Tensor]:
    """Return the MLPs of the models as stacked experts: gate_up_proj [N, 2 F, D] and down_proj [N, D, F]."""
    stacked = {}
    for layer in range(num_layers):
        path = f"model.layers.{layer}."
        parts = [[state[path + own] for own in MLP] for state in states]
        stacked[f"{path}mlp.experts.gate_up_proj"] = torch.stack([torch.cat([gate, up]) for gate, up, _ in parts])
        stacked[f"{path}mlp.experts.down_proj"] = torch.stack([down for _, _, down in parts])
    return stacked


def _with_attention(
    filled: dict[str, torch.Tensor], states: Sequence[Mapping[str, torch.Tensor]], groups: int, shared_kv: bool
) -> dict[str, torch.Tensor]:
    """Return the weights of a mixture with the attention of each model in the place of the mean."""
    own = ("q",) if shared_kv else ("q", "k", "v")
    result = {}
    for name, mean in filled.items():
        path, _, last = name.rpartition("self_attn.")
        parts = [state[name] for state in states] if path else []
        if last in {f"{letter}_proj.weight" for letter in own}:
            result[name] = stacked(parts, groups, 0)
        elif last == "o_proj.weight":
            result[f"{path}self_attn.o_proj.linear.weight"] = stacked(parts, groups, 1)
        elif last in {f"{letter}_norm.weight" for letter in own}:
            kind = last.partition(".")[0]
            result |= {f"{path}self_attn.{kind}.branches.{i}.weight": part for i, part in enumerate(parts)}
        else:
            result[name] = mean
    return result
