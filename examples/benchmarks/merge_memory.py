"""Peak memory of a whole merge (statistics, plan, merge) as a ratio to what it may take.

`consume=True`: to the loaded model. `consume=False`: to the original, the result and one layer of experts together.
Each merge runs in a fresh process on a model of random weights; memory is the resident set of that process (Linux),
less what Python and the imported libraries hold before the model is made. The largest merge takes 5 GB.

python examples/benchmarks/merge_memory.py
"""

import argparse
import json
import subprocess
import sys
import warnings
from pathlib import Path

import torch
from common import Row, print_table, qwen3_moe, switch, text

from hf_mcsmoe import MergeConfig, compress, moe_layers

AIM = {True: 1.1, False: 1.0}
MEGABYTE = 2**20
MODELS = {
    "Switch": lambda arguments: switch(arguments.layers, 32, 768, 1024, arguments.dtype),
    "Qwen3-MoE": lambda arguments: qwen3_moe(arguments.layers, 64, 640, arguments.dtype),
}


def main() -> None:
    """Print a table with two rows per family, or, as the process that is measured, one line of JSON."""
    arguments = parse_arguments()
    if arguments.family is None:
        print_table(measure(arguments))
    else:
        print(json.dumps(merge(arguments)))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12, help="layers with experts (default %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--family", choices=tuple(MODELS), help="merge in this process and print its memory as JSON")
    parser.add_argument("--consume", action="store_true", help="with --family: turn the model itself into the result")
    return parser.parse_args()


def measure(arguments: argparse.Namespace) -> list[Row]:
    """Return the ratios for a Switch and a Qwen3-MoE model."""
    return [_row(family, consume, arguments) for family in MODELS for consume in (True, False)]


def _row(family: str, consume: bool, arguments: argparse.Namespace) -> Row:
    command = [sys.executable, __file__, "--family", family, *(["--consume"] if consume else [])]
    command += ["--layers", str(arguments.layers), "--dtype", arguments.dtype]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    memory = json.loads(output.splitlines()[-1])
    limit = memory["loaded"] if consume else memory["loaded"] + memory["result"] + memory["layer"]
    allowed = "loaded model" if consume else "original + result + one layer"
    sizes = f"{memory['peak']:.0f} MB / {limit:.0f} MB"
    title = f"peak memory of a merge, consume={consume} / {allowed}, {family} ({sizes})"
    return Row(title, memory["peak"] / limit, AIM[consume])


def merge(arguments: argparse.Namespace) -> dict[str, float]:
    """Make and merge a model; return megabytes: before it, of it, the peak, after, the largest layer, the result."""
    warnings.simplefilter("ignore")  # so few tokens that the groups mean nothing
    before = resident("VmRSS")
    model = MODELS[arguments.family](arguments)
    loaded = resident("VmRSS") - before
    layer = max(size(layer.container) for layer in moe_layers(model))
    reset_peak()
    result = compress(model, text(model, 4, 1, 64), MergeConfig(experts=0.25), consume=arguments.consume)
    after = resident("VmRSS") - before
    peak = resident("VmHWM") - before
    return {"before": before, "loaded": loaded, "peak": peak, "after": after, "layer": layer, "result": size(result)}


def size(module: torch.nn.Module) -> float:
    """Return the megabytes of a module's parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters()) / MEGABYTE


def resident(field: str) -> float:
    """Return a field of `/proc/self/status` in megabytes: `VmRSS`, or its maximum `VmHWM`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def reset_peak() -> None:
    """Let `VmHWM` start again from now, so that it does not show how the model was made."""
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    main()
