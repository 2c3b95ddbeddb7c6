"""A Mixture-of-Experts model merged into a dense one for a prompt.

Every layer's experts are summed with weights that its router gives for the prompt, and the sum is the FFN of a dense
model of Transformers' own. This is how Lory generates: for a model that was trained softly (`soft_merge`) it is what
that computes. The experts of a model whose tokens are routed one by one are of no common basis, and their sum is worth
less the less alike they are: what was measured is in docs/variants.md.

Source: Zhong, Xia, Chen and Lewis, Lory (COLM 2024, arXiv 2405.03133), section 3.3.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from hf_mcsmoe.variants.lory_mcsmoe import routed_by_prompt
from hf_mcsmoe.variants.remote_mcsmoe import MODEL_TYPE, check_whole
from hf_mcsmoe.variants.stacks_mcsmoe import block_path
from hf_mcsmoe.variants.upcycling import MLP, OWN, TARGETS


@torch.no_grad()
def merge_for_prompt(
    model: PreTrainedModel, text: str, tokenizer: Callable[..., Mapping[str, torch.Tensor]] | None = None
) -> PreTrainedModel:
    """Return a dense model with the experts of every layer merged for a prompt; the given one is left as it is.

    A model changed by `soft_merge` merges as its `generate` does, by what its routers make of the prompt's mean. Of
    any other the weights are the mean over the prompt's tokens of the softmax over all experts.

    Args:
        model: a causal language model of Mixtral, which becomes a Mistral, Qwen3-MoE (Qwen3), FlexOlmo (OLMo 2), or
            OLMoE, which becomes an OLMoE with one expert, for no dense family is built like it.
        text: the prompt.
        tokenizer: called as `tokenizer(text, return_tensors="pt")`; None for the one that lies beside the model.

    Raises:
        ValueError: the model is of another family, has no head, is another variant, carries adapters or is offloaded,
            some of its layers are dense and of another width, the text is empty, or no tokenizer lies beside it.
    """
    family = _family(model)
    config = _dense_config(model.config, family)
    weights = _weights(model, _tokens(model, text, tokenizer))
    dense: Any = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    dense.load_state_dict(_dense_state(model, weights, one_expert=config.model_type == family))
    dense.generation_config = model.generation_config
    return dense.to(model.device).eval()


def _family(model: Any) -> str:
    """Return the family of a model; refuse what is no whole causal language model of one, plain or of `soft_merge`."""
    config = model.config
    is_variant = config.model_type == MODEL_TYPE
    family = config.base_model_type if is_variant else config.model_type
    if family not in TARGETS or (is_variant and config.variant["name"] != "lory"):
        raise ValueError(
            f"{type(model).__name__} is no model of {', '.join(TARGETS)}, plain or changed by soft_merge, so no dense "
            "one can be made of it."
        )
    if not isinstance(model, AutoModelForCausalLM._model_mapping[CONFIG_MAPPING[family]]):
        raise ValueError(
            f"{type(model).__name__} has no head for causal language modelling: load it with AutoModelForCausalLM."
        )
    if any(".base_layer." in name for name, _ in model.named_parameters()):
        raise ValueError("The model carries adapters: call merge_and_unload() of the PEFT model first.")
    check_whole(model)
    return family


def _dense_config(config: Any, family: str) -> PreTrainedConfig:
    """Return the configuration of the dense model."""
    target = TARGETS[family]
    said, base = config.to_dict(), CONFIG_MAPPING[target.dense]
    width = said[target.width]
    if (said.get("mlp_only_layers") or said.get("decoder_sparse_step", 1) > 1) and said["intermediate_size"] != width:
        raise ValueError(
            f"Some layers of the model are dense and {said['intermediate_size']} wide, and its experts are {width} "
            "wide: a dense model has one width in all layers."
        )
    known = {*base().to_dict(), "head_dim"} - OWN
    given = {key: value for key, value in said.items() if key in known} | {"intermediate_size": width}
    # A Qwen3-MoE that says none of its own has another than a Qwen3 that says none.
    given["head_dim"] = said.get("head_dim") or config.hidden_size // config.num_attention_heads
    if target.dense == family:  # of one expert
        given |= {**target.fields, "num_experts": 1, "num_experts_per_tok": 1}
    return base(**given)


def _tokens(model: PreTrainedModel, text: str, tokenizer: Any) -> dict[str, torch.Tensor]:
    """Return the prompt's tokens, [1, S]."""
    if tokenizer is None:
        if not model.name_or_path:
            raise ValueError("No tokenizer lies beside a model that was not loaded: give one as `tokenizer`.")
        tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    if not ids.numel():
        raise ValueError(f"The prompt {text!r} has no tokens to be routed by: give a text.")
    return {"input_ids": ids.to(model.device)}


def _weights(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return of every block's path the weights of its experts, [E]."""
    blocks = {f"model.layers.{number}.{path}": layer.get_submodule(path)
              for number, layer in enumerate(model.model.layers) if (path := block_path(layer))}  # fmt: skip
    found: dict[str, torch.Tensor] = {}

    def note(path: str) -> Callable[..., None]:
        return lambda _, __, output: found.update({path: output[0].float().softmax(dim=-1).mean(dim=0)})

    hooks = [block.gate.register_forward_hook(note(path)) for path, block in blocks.items()]
    is_training = model.training
    try:
        with routed_by_prompt(model, batch["input_ids"].shape[1]):
            model.eval()(**batch, use_cache=False)
    finally:
        model.train(is_training)
        for hook in hooks:
            hook.remove()
    return found


def _dense_state(model: nn.Module, weights: Mapping[str, torch.Tensor], one_expert: bool) -> dict[str, torch.Tensor]:
    """Return the dense model's state: of each block the merged matrices, all else as it is."""
    state = dict(model.state_dict())
    for path, given in weights.items():
        gate_up, down = (
            torch.tensordot(given, state.pop(f"{path}.experts.{name}").float(), dims=1).to(model.dtype)
            for name in ("gate_up_proj", "down_proj")
        )
        router = state.pop(f"{path}.gate.weight")
        if one_expert:
            merged = {"experts.gate_up_proj": gate_up[None], "experts.down_proj": down[None]}
            state |= {f"{path}.{name}": value for name, value in merged.items()} | {f"{path}.gate.weight": router[:1]}
        else:
            layer = path.removesuffix("mlp")
            state |= {layer + own: value for own, value in zip(MLP, (*gate_up.chunk(2), down), strict=True)}
    return state
