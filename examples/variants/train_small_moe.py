"""Trains a small Qwen3-MoE and its tokenizer on a text, as mixed_precision.py measures one, in minutes on one core.

python examples/variants/train_small_moe.py --text TEXT.txt --output DIR
"""

import argparse
from pathlib import Path

import torch
from common import train
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

SIZES = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
EXPERTS = {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
ROUTING = {"norm_topk_prob": True, "router_aux_loss_coef": 0.01}
# Share of the text that is trained on; the rest lies beside the model.
TRAINED = 0.95


def tokenizer_of(text: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a BPE of bytes, trained on a text."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        text.splitlines(keepends=True),
        trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=["<eos>"]),
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<eos>")


def main() -> None:
    """Train one model; its folder also holds the text that it has not seen."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--text", type=Path, required=True)
    options.add_argument("--output", type=Path, required=True)
    options.add_argument("--steps", type=int, default=1500)
    options.add_argument("--batch-size", type=int, default=8)
    options.add_argument("--length", type=int, default=128)
    options.add_argument("--vocab-size", type=int, default=2048)
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    text = given.text.read_text(encoding="utf-8")
    split = int(len(text) * TRAINED)
    tokenizer = tokenizer_of(text[:split], given.vocab_size)
    ids = torch.tensor(tokenizer(text[:split]).input_ids)
    ids = ids[: len(ids) // given.length * given.length].view(-1, given.length)
    torch.manual_seed(given.seed)
    # As many names as the tokenizer has, which are fewer where the text is short.
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": None, "bos_token_id": None}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=len(tokenizer), **SIZES, **EXPERTS, **ROUTING, **ends))
    model.config.output_router_logits = True  # the loss of load balancing, as released models are trained with
    train(model, ids, given, given.seed)
    model.config.output_router_logits = False
    model.save_pretrained(given.output)
    tokenizer.save_pretrained(given.output)
    (given.output / "validation.txt").write_text(text[split:], encoding="utf-8")
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{count:,} parameters, {given.steps} steps of {given.batch_size} x {given.length} tokens: {given.output}")


if __name__ == "__main__":
    main()
