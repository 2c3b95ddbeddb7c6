"""What the scripts of the variants share: a text, tokens of it, small models, and a plain training."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

SIZES = {"vocab_size": 256, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
LENGTH = 64


def parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options of all scripts."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--text", type=Path, nargs="+", required=True, help="files of text, read as bytes")
    options.add_argument("--steps", type=int, default=300)
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    options.add_argument("--batch-size", type=int, default=16)
    return options


def rows(path: Path, share: tuple[float, float] = (0.0, 1.0)) -> torch.Tensor:
    """Return a share of a file as rows of bytes, int [N, LENGTH]."""
    data = path.read_bytes()
    start, end = (int(len(data) * place) for place in share)
    values = torch.frombuffer(bytearray(data[start:end]), dtype=torch.uint8).long()
    return values[: len(values) // LENGTH * LENGTH].view(-1, LENGTH)


def dense(seed: int, width: int = 256, layers: int = 3) -> LlamaForCausalLM:
    """Return a small dense model."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=width, num_hidden_layers=layers))


def sparse(seed: int, *, num_experts: int = 8, top_k: int = 2, width: int = 64, layers: int = 3) -> MixtralForCausalLM:
    """Return a small Mixture-of-Experts model."""
    torch.manual_seed(seed)
    experts = {"num_local_experts": num_experts, "num_experts_per_tok": top_k}
    return MixtralForCausalLM(MixtralConfig(**SIZES, **experts, intermediate_size=width, num_hidden_layers=layers))


def train(
    model: PreTrainedModel,
    data: torch.Tensor,
    options: Any,
    seed: int,
    before_step: Callable[[int], None] = lambda step: None,
    rate: float = 2e-3,
) -> PreTrainedModel:
    """Train a model on rows drawn by a seed; `before_step` is told each step."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    model.train()
    for step in range(options.steps):
        before_step(step)
        batch = data[torch.randint(len(data), (options.batch_size,), generator=generator)]
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


@torch.no_grad()
def perplexity(model: PreTrainedModel, data: torch.Tensor, number: int = 64) -> float:
    """Return the perplexity per byte of a model on the first rows."""
    return math.exp(float(model(input_ids=data[:number], labels=data[:number]).loss))


def table(head: list[str], lines: list[list[Any]]) -> None:
    """Print a table in Markdown."""
    shown = [[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in line] for line in lines]
    for line in [head, ["---"] * len(head), *shown]:
        print("| " + " | ".join(line) + " |", flush=True)
