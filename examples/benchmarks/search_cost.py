"""What measuring the choices of a size costs, as a ratio to the statistics pass and one refit.

    python examples/benchmarks/search_cost.py MODEL --text FILE

Both are timed in this run, on the rows that `quality_ladder.py` calibrates on. Candidates: what is fitted and measured
of a layer, all reductions, ranks and bits together.
"""

import argparse
import random
import time
from itertools import pairwise
from pathlib import Path

import torch
from quality_ladder import batches_of, rows_of
from transformers.utils import logging

from hf_mcsmoe import MergeConfig, RepairConfig, collect_statistics, merge_experts, plan_merge, repair_experts
from hf_mcsmoe.calibration.curves import LayerCurves
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.loading import load_model, load_tokenizer
from hf_mcsmoe.search.config import SizeConfig
from hf_mcsmoe.search.curves import SALIENCY, measure_curves, needs_of

logging.disable_progress_bar()
CANDIDATES = 6


def number_of(curves: LayerCurves) -> int:
    """Return how many candidates were measured of a layer."""
    parts = [*curves.reduced.values(), curves.w_in, curves.w_out, *curves.low_rank.values()]
    return sum(map(len, parts))


def main() -> None:
    """Print seconds, candidates and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a model")
    parser.add_argument("--text", type=Path, required=True, help="text, or a JSON object of texts by name")
    parser.add_argument("--rows", type=int, default=180, help="calibration rows (default %(default)s)")
    parser.add_argument("--max-length", type=int, default=128, help="tokens of a row (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, tokenizer = load_model(str(arguments.model)), load_tokenizer(str(arguments.model))
    fit = rows_of(tokenizer, arguments.text, (), arguments.max_length)["fit"]
    batches = batches_of(model, tokenizer, random.Random(0).sample(fit, min(arguments.rows, len(fit))))
    merge, search, times = MergeConfig(), SizeConfig(), [time.perf_counter()]
    needs = dict.fromkeys([*needs_of(merge, search), *MergeConfig().needs])
    statistics = collect_statistics(model, batches, tuple(needs))
    times.append(time.perf_counter())
    plan = plan_merge(model, statistics, MergeConfig(experts=0.5, saliency=SALIENCY))
    student = merge_experts(model, plan, statistics=statistics)
    repair_experts(student, model, batches, RepairConfig(method="joint"))
    times.append(time.perf_counter())
    curves = measure_curves(Layers.of(model), statistics, batches, merge, search)
    times.append(time.perf_counter())
    passed, refitted, searched = (after - before for before, after in pairwise(times))
    number = sum(map(number_of, curves.values())) / len(curves)
    ratio = searched / (passed + refitted)
    print(f"statistics {passed:.1f} s, merging and a joint refit {refitted:.1f} s, curves {searched:.1f} s")
    print(
        f"{number:.0f} candidates a layer: {ratio:.1f} times both; {ratio * CANDIDATES / number:.1f} for {CANDIDATES}"
    )


if __name__ == "__main__":
    main()
