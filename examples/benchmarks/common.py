"""What the measurements share: models with random weights, batches, alternating timing, and rows of one table."""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import (
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)
from transformers.initialization import no_init_weights
from transformers.utils import logging

logging.disable_progress_bar()

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
HEADER = "| measure | ratio | middle half | aim |\n|---|---|---|---|"


@dataclass(frozen=True)
class Row:
    """One measure: a median ratio, its quartiles over the repetitions, and the aim (None: for information)."""

    measure: str
    ratio: float
    aim: float | None = None
    quartiles: tuple[float, float] | None = None

    def __str__(self) -> str:
        spread = f"{self.quartiles[0]:.2f} - {self.quartiles[1]:.2f}" if self.quartiles else ""
        return f"| {self.measure} | {self.ratio:.2f} | {spread} | {'' if self.aim is None else f'<= {self.aim}'} |"


def parser(description: str | None, repetitions: int) -> argparse.ArgumentParser:
    """Return a parser with the options that every timing has."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--repetitions", type=int, default=repetitions, help="alternations (default %(default)s)")
    result.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="PyTorch's threads (default: all)"
    )
    result.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    clock = "wall time, or the process's own cpu time: steadier on a busy machine, fair with --threads 1 only"
    result.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help=clock)
    return result


def print_table(rows: list[Row]) -> None:
    """Print the rows as a markdown table."""
    print(HEADER, *rows, sep="\n", flush=True)


def compare(
    measure: str,
    ours: Callable[[], object],
    reference: Callable[[], object],
    arguments: argparse.Namespace,
    aim: float | None = None,
) -> Row:
    """Time `reference` and `ours` in turn, and return the median over the repetitions of ours / reference.

    Each pair is taken back to back, so that what else the machine does falls on both sides.
    """
    clock = CLOCKS[arguments.clock]
    seconds(reference, clock)
    seconds(ours, clock)
    ratios = []
    for _ in range(arguments.repetitions):
        base = seconds(reference, clock)
        ratios.append(seconds(ours, clock) / base)
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return Row(measure, middle, aim, (low, high))


def seconds(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the time of one call."""
    start = clock()
    call()
    return clock() - start


def switch(
    layers: int, num_experts: int = 32, d_model: int = 768, d_ff: int = 3072, dtype: str = "float32"
) -> PreTrainedModel:
    """Return a Switch Transformer of `layers` layers on each side, every other one sparse; by default of base size."""
    config = SwitchTransformersConfig(
        d_model=d_model,
        d_ff=d_ff,
        d_kv=64,
        num_heads=d_model // 64,
        num_experts=num_experts,
        num_layers=layers,
        num_decoder_layers=layers,
        num_sparse_encoder_layers=layers // 2,
        num_sparse_decoder_layers=layers // 2,
        decoder_start_token_id=0,
    )
    return random_weights(SwitchTransformersForConditionalGeneration, config, dtype)


def qwen3_moe(layers: int, num_experts: int = 64, hidden_size: int = 512, dtype: str = "float32") -> PreTrainedModel:
    """Return a small model of the Qwen3-MoE kind: gated experts behind the experts interface, 8 per token."""
    config = Qwen3MoeConfig(
        vocab_size=32000,
        hidden_size=hidden_size,
        moe_intermediate_size=hidden_size * 3 // 8,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=max(hidden_size // 256, 1),
        num_experts=num_experts,
        num_experts_per_tok=8,
        norm_topk_prob=True,
    )
    return random_weights(Qwen3MoeForCausalLM, config, dtype)


def random_weights(model_class: type[PreTrainedModel], config: object, dtype: str) -> PreTrainedModel:
    """Build a model for inference whose matrices keep the scale of their input, so that tokens spread over experts."""
    torch.manual_seed(0)
    config.dtype = dtype
    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with no_init_weights():
            model = model_class(config)
            model.tie_weights()
    finally:
        torch.set_default_dtype(default)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
            else:
                parameter.fill_(1)
    return model.eval()


def text(model: PreTrainedModel, number: int, batch_size: int, length: int) -> list[dict[str, torch.Tensor]]:
    """Return `number` batches of random tokens for `model(**batch)`, `length` on each side that the model has."""
    names = ("input_ids", "decoder_input_ids") if model.config.is_encoder_decoder else ("input_ids",)
    generator = torch.Generator().manual_seed(0)
    size = (batch_size, length)
    vocabulary = model.config.vocab_size
    return [{name: torch.randint(2, vocabulary, size, generator=generator) for name in names} for _ in range(number)]
