"""What it takes to compress published models, as the table of docs/scale.md: from their configurations, by the plan.

python examples/benchmarks/scale_table.py
"""

from pathlib import Path

from hf_mcsmoe import MergeConfig, QuantizationConfig
from hf_mcsmoe.forecast.needs import IN_MEMORY, STREAMED, needs_of
from hf_mcsmoe.forecast.result import result_by_hand
from hf_mcsmoe.forecast.run import run_of
from hf_mcsmoe.forecast.sizes import sizes_of
from hf_mcsmoe.layers.dequantize import quantization_method
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.loading import empty_model, load_config
from hf_mcsmoe.layers.stored import configured_bytes

CONFIGS = Path(__file__).parents[2] / "tests" / "data" / "configs"
MODELS = ("Qwen3-30B-A3B", "Qwen3-235B-A22B", "DeepSeek-V3")
# What is done, and what for: options of a merge, whether in four bits, and whether there is a repair.
WAYS: tuple[tuple[str, float, bool, str], ...] = (
    ("half of the experts", 0.5, False, "none"),
    ("half of the experts, refit", 0.5, False, "refit"),
    ("half of the experts, refit, 4 bits", 0.5, True, "refit"),
)
HEAD = ("model", "what", "source", "result", "in memory", "streamed", "of that hidden states", "read")


def main() -> None:
    """Print the table, in GB (10^9 bytes)."""
    print(f"| {' | '.join(HEAD)} |\n|---|---|{'---:|' * (len(HEAD) - 2)}")
    for name in MODELS:
        layers = Layers.of(empty_model(str(CONFIGS / name), dequantize=True))
        for way in WAYS:
            print(f"| {name} | {way[0]} | {' | '.join(_cells(name, layers, way))} |")


def _cells(name: str, layers: Layers, way: tuple[str, float, bool, str]) -> list[str]:
    _, experts, in_bits, repair = way
    config, original = MergeConfig(experts=experts), load_config(str(CONFIGS / name))
    bits: QuantizationConfig | None = QuantizationConfig(bits=4) if in_bits else None
    result = result_by_hand(layers, config, quantization=bits)
    stored = configured_bytes(layers.model, original).bytes
    sizes = sizes_of(layers, is_quantized=quantization_method(original) is not None)
    needs = needs_of(sizes, run_of(layers, result, config, repair=repair, stores=in_bits), stored)
    streamed = needs[STREAMED]
    hidden = streamed.phases[streamed.peak].get("hidden states", 0)
    numbers = [stored, result.bytes, needs[IN_MEMORY].needed, streamed.memory, hidden, streamed.read]
    return [f"{number / 1e9:,.1f}" for number in numbers]


if __name__ == "__main__":
    main()
