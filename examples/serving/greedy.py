"""What the scripts beside this one compare an engine with: the greedy tokens of Transformers in float32."""

import argparse
from dataclasses import dataclass
from itertools import takewhile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass(frozen=True)
class Greedy:
    """A prompt and its continuation as token ids, and the logits (tokens, V) that each token was chosen by."""

    prompt: list[int]
    tokens: list[int]
    logits: torch.Tensor
    eos: frozenset[int]

    def compare(self, tokens: list[int]) -> str:
        """Say how far an engine's tokens are those of Transformers, up to the end of the text."""
        alike = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(tokens, self.tokens, strict=False))))
        if alike == len(self.tokens):
            return f"the same {alike} greedy tokens"
        told = f"{alike} of {len(self.tokens)} greedy tokens, then"
        if alike == len(tokens):
            return f"{told} the end"
        logits = self.logits[alike]
        return f"{told} one whose logit is {float(logits.max() - logits[tokens[alike]]):.2g} below"


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of what all scripts take: the checkpoint, a prompt and a number of tokens."""
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=kind)
    parser.add_argument("model", help="folder of the checkpoint")
    parser.add_argument(
        "--prompt", default="Once upon a time there was a little girl who", help="default: %(default)s"
    )
    parser.add_argument("--tokens", type=int, default=32, help="tokens to generate (default: %(default)s)")
    return parser


def with_transformers(folder: str, prompt: str, count: int) -> Greedy:
    """Continue a prompt by at most `count` tokens, each the likeliest."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs = AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt", return_token_type_ids=False)
    options = {"do_sample": False, "max_new_tokens": count, "output_logits": True, "return_dict_in_generate": True}
    result = model.generate(**inputs, **options)
    end = model.generation_config.eos_token_id
    eos = frozenset(end if isinstance(end, list) else [end])
    ids = inputs["input_ids"][0]
    return Greedy(ids.tolist(), result.sequences[0, len(ids) :].tolist(), torch.cat(result.logits), eos)
