"""The whole merge of a model of the shape of switch-base-32: 2 B random parameters, 12 sparse layers of 32 experts.

Statistics, plan (8 of 32 on average, the first sparse layer of the encoder left whole, as in the paper) and merge with
`consume=True`, timed by stage. What bounds the merge are the assignments of the alignment: they are timed as well.
Needs 10 GB of free memory in float32, 6 GB in bfloat16.

python examples/benchmarks/merge_2b.py
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from common import switch, text
from merge_memory import reset_peak, resident, size

from hf_mcsmoe import MergeConfig, collect_statistics, merge_experts, moe_layers, plan_merge
from hf_mcsmoe.methods import alignment
from hf_mcsmoe.plan import LayerPlan

PAPER = {"before": 1978.5e6, "after": 732.8e6}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12, help="layers on each side, every other one sparse")
    parser.add_argument("--experts", type=int, default=32, help="experts per layer")
    parser.add_argument("--keep", type=int, default=8, help="experts per merged layer, on average")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batches", type=int, default=4, help="calibration batches of 8 x 128 tokens")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch and of the alignment")
    return parser.parse_args()


def main() -> None:
    """Print seconds per stage, the share of the assignments, and parameters against the paper's."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    check_memory(arguments)
    solving: list[tuple[float, float]] = []
    alignment.linear_sum_assignment = timed(alignment.linear_sum_assignment, solving)
    start = time.perf_counter()
    model = switch(arguments.layers, arguments.experts, dtype=arguments.dtype)
    before = model.num_parameters()
    first = moe_layers(model)[0].name
    loaded, made = size(model), time.perf_counter()
    reset_peak()
    statistics = collect_statistics(model, text(model, arguments.batches, 8, 128))
    collected = time.perf_counter()
    plan = plan_merge(model, statistics, MergeConfig(experts=arguments.keep, skip=(first,)))
    planned, busy = time.perf_counter(), time.process_time()
    merged = merge_experts(model, plan, consume=True)
    done, busy = time.perf_counter(), time.process_time() - busy
    print(
        f"random model {made - start:.1f} s, statistics {collected - made:.1f} s, plan {planned - collected:.1f} s, "
        f"merge {done - planned:.1f} s"
    )
    wall = sum(seconds for seconds, _ in solving) / arguments.threads
    share = sum(seconds for _, seconds in solving) / busy
    print(f"{len(solving)} assignments of {aligned(plan.layers)} members: {wall:.1f} s on {arguments.threads} threads")
    print(f"| assignments / processor time of the merge | {share:.2f} |")
    print(f"| whole merge / its assignments alone | {(done - planned) / wall:.2f} |")
    print(f"| peak memory of the whole process / the model ({loaded:.0f} MB) | {resident('VmHWM') / loaded:.2f} |")
    for name, value in (("before", before), ("after", merged.num_parameters())):
        print(f"parameters {name} {value / 1e6:.1f} M (paper: {PAPER[name] / 1e6:.1f} M)")


def check_memory(arguments: argparse.Namespace) -> None:
    """Stop before the machine swaps: the whole model and a quarter more have to fit.

    Raises:
        SystemExit: too little memory is free.
    """
    size = PAPER["before"] * arguments.layers / 12 * arguments.experts / 32 * getattr(torch, arguments.dtype).itemsize
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    if free < 1.25 * size:
        raise SystemExit(f"{free / 2**30:.1f} GB of memory are free, {1.25 * size / 2**30:.1f} GB are needed.")


def timed(function: Any, times: list[tuple[float, float]]) -> Any:
    """Return the function with wall-clock and processor seconds of each call added to `times`."""

    def call(*arguments: Any, **keywords: Any) -> Any:
        start, busy = time.perf_counter(), time.thread_time()
        result = function(*arguments, **keywords)
        times.append((time.perf_counter() - start, time.thread_time() - busy))
        return result

    return call


def aligned(layers: dict[str, LayerPlan]) -> int:
    """Return how many experts are not their group's dominant one: the assignments that there are to solve."""
    return sum(len(layer.expert_map) - len(layer.dominant) for layer in layers.values())


if __name__ == "__main__":
    main()
