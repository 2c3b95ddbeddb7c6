"""Tiny models of variants, and saved folders of them with what a process that loads them has to find."""

from pathlib import Path

import torch
from families import inputs
from helpers import Batch, logits
from merged import tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, XGLMConfig, XGLMForCausalLM
from without_package import generate, recorded

from hf_mcsmoe.variants.fairseq_moe_mcsmoe import FairseqMoeModel
from hf_mcsmoe.variants.remote_mcsmoe import become


def dense(seed: int = 0, **sizes: int) -> LlamaForCausalLM:
    """Make a tiny dense model with random weights."""
    torch.manual_seed(seed)
    given = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2} | sizes
    config = LlamaConfig(**given, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)
    config.pad_token_id = None
    return LlamaForCausalLM(config).eval()


def xglm() -> XGLMForCausalLM:
    """Make a tiny dense model as fairseq's are built, with random weights."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4}
    return XGLMForCausalLM(XGLMConfig(**sizes, max_position_embeddings=128, init_std=0.2)).eval()


def fairseq(model: PreTrainedModel) -> PreTrainedModel:
    """Give a model as `xglm` makes it experts with random weights in every second layer."""
    become(model, FairseqMoeModel, {"layers": [1], "num_experts": 4, "expert_dim": 32, "top_k": 2})
    for name, parameter in model.named_parameters():
        if ".moe_layer." in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def tokens(model: PreTrainedModel) -> Batch:
    """Make a batch of text of which one row is padded."""
    return inputs("", model)


def save(
    model: PreTrainedModel, base: PreTrainedModel, folder: Path, *, auto_class: str = "AutoModelForCausalLM"
) -> Path:
    """Save a variant of the model `base`, and beside it what is to be found."""
    batch = tokens(model)
    model.save_pretrained(folder, tokenizer=tokenizer())
    expected = {
        "auto_class": auto_class,
        "base_class": type(base).__name__,
        "batch": batch,
        "logits": logits(model, batch),
        "modules": [module for module, _ in model.named_modules()],
        "generated": generate(model, batch),
    }
    expected["recorded"] = recorded(base, batch)
    torch.save(expected, folder.with_suffix(".pt"))
    return folder
