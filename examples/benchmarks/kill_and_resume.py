"""Kill a streamed compression at random moments, let it go on, and compare what it ends with, byte for byte.

    python examples/benchmarks/kill_and_resume.py --runs 100

A small model is made and compressed once in peace (merge, repair, low rank, 4 bits). Then the same is begun again and
again, and killed (SIGKILL) at random moments until it ends by itself. Each time the files must be the same, and
nothing may be left beside them. Prints kills and runs that were right; exits with 1 where one was not.
"""

import argparse
import hashlib
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.utils import logging

from hf_mcsmoe import LoSparseConfig, MergeConfig, QuantizationConfig, RepairConfig
from hf_mcsmoe.streamed.compress import compress_folder


def make_model(folder: Path) -> None:
    """Write a random Mixtral of two layers with six experts each."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=99, num_key_value_heads=2, num_local_experts=6, num_experts_per_tok=2, **sizes)
    MixtralForCausalLM(config).save_pretrained(folder)


def compress(source: Path, output: Path) -> None:
    """Compress it with all stages."""
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(99, (8, 24), generator=generator)} for _ in range(3)]
    compress_folder(
        source,
        output,
        rows[:2],
        MergeConfig(experts=3),
        repair=RepairConfig(method="joint", sequential=True),
        low_rank=LoSparseConfig(rank=4),
        quantization=QuantizationConfig(bits=4, group_size=16),
        held_out=rows[2:],
    )


def in_child(work: Callable[[], None], seconds: float | None = None) -> bool | None:
    """Do some work in a process of its own, which is killed after so many seconds; returns None where it was."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    end = time.monotonic() + (seconds or 1e9)
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def hashes(folder: Path) -> dict[str, str]:
    """Return the hash of each file."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    torch.set_num_threads(1)  # as the children have to
    warnings.simplefilter("ignore")
    logging.disable_progress_bar()
    rng, kills, right = random.Random(asked.seed), 0, 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        in_child(lambda: make_model(folder / "source"))
        began = time.monotonic()
        if not in_child(lambda: compress(folder / "source", folder / "whole" / "out")):
            sys.exit("The run in peace failed.")
        whole, seconds = hashes(folder / "whole" / "out"), time.monotonic() - began
        for number in range(asked.runs):
            output = folder / f"run-{number}" / "out"
            output.parent.mkdir()
            for attempt in range(99):  # later ones have more time, for some has to end
                limit = rng.uniform(0, seconds / 3) * (1 + attempt // 3)
                if (ended := in_child(partial(compress, folder / "source", output), limit)) is not None:
                    break
                kills += 1
            alike = bool(ended) and hashes(output) == whole and [p.name for p in output.parent.iterdir()] == ["out"]
            right += alike
            if not alike:
                print(f"run {number}: {sorted(p.name for p in output.parent.rglob('*'))}", file=sys.stderr)
    print(
        f"{seconds:.1f} s in peace; {kills} kills, {right} of {asked.runs} runs ended with the same bytes and left "
        "nothing behind"
    )
    sys.exit(right < asked.runs)


if __name__ == "__main__":
    main()
