"""Time of the assignment of two wide experts by lapx, as a ratio to SciPy's, and the bytes that it takes.

Related experts are one and the same with noise, in another order; unrelated ones are drawn apart. A width of 14336 is
that of Mixtral: it takes minutes, and SciPy's many.

python examples/benchmarks/wide_alignment.py
python examples/benchmarks/wide_alignment.py --widths 14336 --only lapx
"""

import argparse
import resource
import time
from functools import partial

import torch
from common import Row, compare, parser, print_table

from hf_mcsmoe.methods import assignment
from hf_mcsmoe.methods.alignment import matching_cost
from hf_mcsmoe.methods.assignment import assigned, assignment_bytes
from hf_mcsmoe.methods.experts import Expert

HIDDEN = 512


def expert(width: int, seed: int) -> Expert:
    """Return an expert of random weights."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {"gate": (width, HIDDEN), "up": (width, HIDDEN), "down": (HIDDEN, width)}
    return {role: torch.randn(shape, generator=draw) for role, shape in shapes.items()}


def related(one: Expert, seed: int) -> Expert:
    """Return the same expert with noise of its own size, in another order."""
    other = expert(len(one["up"]), seed)
    order = torch.randperm(len(one["up"]), generator=torch.Generator().manual_seed(seed))
    return {role: (one[role][:, order] if role == "down" else one[role][order]) + 0.7 * other[role] for role in one}


def seconds(cost: torch.Tensor, *, has_lapx: bool) -> float:
    """Return how long an assignment takes."""
    assignment.HAS_LAPX = has_lapx
    begin = time.process_time()
    assigned(cost)
    return time.process_time() - begin


def main() -> None:
    """Print a table with a row for each width and kind of experts."""
    arguments = parser(__doc__, repetitions=3)
    arguments.add_argument("--widths", type=int, nargs="+", default=[2048, 4096])
    arguments.add_argument("--only", choices=("both", "lapx"), default="both")
    print_table(measure(arguments.parse_args()))


def measure(arguments: argparse.Namespace) -> list[Row]:
    """Return the ratios; seconds and bytes are told on the way."""
    torch.set_num_threads(arguments.threads)
    rows = []
    for width in arguments.widths:
        one = expert(width, 0)
        for kind, other in (("related", related(one, 1)), ("unrelated", expert(width, 2))):
            begin = time.process_time()
            cost = matching_cost(one, other)
            made = time.process_time() - begin
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            lapx = seconds(cost, has_lapx=True)
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
            share = (grown + cost.nbytes) / assignment_bytes(width)
            told = f"{lapx:.2f} s after {made:.1f} s for the costs, {share:.2f} of the bytes told"
            print(f"{width} {kind}: {told}", flush=True)
            if arguments.only == "both":
                ways = [partial(seconds, cost, has_lapx=has) for has in (True, False)]
                rows.append(compare(f"lapx / SciPy, {kind} experts of {width}", *ways, arguments))
    return rows


if __name__ == "__main__":
    main()
