"""What engines ask of a plain checkpoint, as data: each rule with its source."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from hf_mcsmoe.methods.registry import unknown

ENGINES = ("vllm", "sglang", "llama.cpp", "mlx", "transformers")


@dataclass(frozen=True)
class Shape:
    """What rules look at of a plain checkpoint: experts a layer, picks a token, the router's groups, expert width."""

    num_experts: int
    top_k: int = 1
    router_groups: int = 1
    width: int = 0


@dataclass(frozen=True)
class Rule:
    """What an engine asks of a shape; where `holds` says no it cannot run it or, of an advice, runs it slower.

    `words` end the sentence "ENGINE ...", and are formatted with the fields of the shape.
    """

    engine: str
    words: str
    source: str
    holds: Callable[[Shape], bool]
    is_advice: bool = False


def _grouped(shape: Shape) -> bool:
    fits = shape.num_experts > shape.router_groups and shape.num_experts % shape.router_groups == 0
    return shape.router_groups == 1 or fits


RULES = [
    Rule(
        "vllm",
        "picks among all experts, without a word, unless their number is a multiple of the router's {router_groups} "
        "groups and larger",
        "vLLM 0.33, fused_moe: grouped top-k",
        _grouped,
    ),
    Rule(
        "vllm",
        "shares experts out evenly only where their number is a multiple of the processes, as 8",
        "vLLM 0.33, expert parallelism with EPLB",
        lambda shape: shape.num_experts % 8 == 0,
        is_advice=True,
    ),
    Rule(
        "sglang",
        "needs a number of experts that is a multiple of the processes of expert parallelism, as 8",
        "SGLang 0.5.23, fused_moe_triton: num_experts % ep_size",
        lambda shape: shape.num_experts % 8 == 0,
        is_advice=True,
    ),
    Rule(
        "sglang",
        "needs a multiple of the router's {router_groups} groups",
        "SGLang 0.5.23, topk: grouped top-k",
        _grouped,
    ),
    Rule(
        "llama.cpp",
        "holds 1024 experts a layer at most",
        "llama.cpp, autumn 2026: LLAMA_MAX_EXPERTS",
        lambda shape: shape.num_experts <= 1024,
    ),
    Rule(
        "llama.cpp",
        "needs a multiple of the router's {router_groups} groups",
        "llama.cpp, autumn 2026: n_expert % n_expert_groups",
        _grouped,
    ),
    Rule(
        "llama.cpp",
        "falls back to slower kinds of quantization, for K-quants want expert widths of multiples of 256, not {width}",
        "llama.cpp, autumn 2026: QK_K",
        lambda shape: shape.width % 256 == 0,
        is_advice=True,
    ),
    Rule(
        "llama.cpp",
        "has its fast path on CUDA for powers of two, 288 and 576 experts",
        "llama.cpp, autumn 2026: ggml-cuda, topk-moe",
        lambda shape: shape.num_experts.bit_count() == 1 or shape.num_experts in (288, 576),
        is_advice=True,
    ),
    Rule(
        "mlx",
        "needs a multiple of the router's {router_groups} groups",
        "mlx-lm, autumn 2026: group_expert_select",
        _grouped,
    ),
]


def check_engine_names(engines: Iterable[str]) -> None:
    """Raise ValueError where an engine is not known."""
    for name in engines:
        if name not in ENGINES:
            raise ValueError(unknown("engine", name, list(ENGINES)))


def broken(engines: Sequence[str], shape: Shape, *, advice: bool = False) -> list[Rule]:
    """Return the rules of the engines that a shape breaks: those without which it does not run, or what is advised."""
    rules = [rule for rule in RULES if rule.engine in engines and rule.is_advice == advice]
    return [rule for rule in rules if not rule.holds(shape)]


def check_engines(engines: Sequence[str], shape: Shape) -> list[str]:
    """Return what engines advise otherwise for a shape, a sentence each.

    Raises:
        ValueError: an engine is not known, or cannot run it: the nearest number of experts that all run is told.
    """
    check_engine_names(engines)
    if refused := broken(engines, shape):
        near = nearest_count(engines, shape, most=math.inf)
        raise ValueError(
            f"{refused[0].engine} cannot run {shape.num_experts} experts a layer: it "
            f"{refused[0].words.format(**vars(shape))} ({refused[0].source}). "
            + (f"Keep {near} experts." if near else "No number of experts helps: leave that engine out.")
        )
    return [
        f"{rule.engine} {rule.words.format(**vars(shape))} ({rule.source})."
        for rule in broken(engines, shape, advice=True)
    ]


def nearest_count(engines: Sequence[str], shape: Shape, *, least: int = 1, most: float = math.inf) -> int | None:
    """Return the number of experts nearest to a shape's that all engines run, the larger of two; None where none is.

    It is as many as a token picks, or more, and a multiple of the router's groups.

    Args:
        least: fewest experts that the routers can do with.
        most: the experts that there are.
    """
    for distance in range(max(2 * shape.num_experts, 1025)):
        for count in (shape.num_experts + distance, shape.num_experts - distance):
            is_routed = max(least, shape.top_k, 1) <= count <= most and count % shape.router_groups == 0
            if is_routed and not broken(engines, replace(shape, num_experts=count)):
                return count
    return None
