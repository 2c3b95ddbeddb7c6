"""Run the measurements that take minutes (not the merge of 2 B parameters) and print one markdown table.

python examples/benchmarks/run_all.py
"""

import argparse
import subprocess
import sys
from pathlib import Path

SCRIPTS = (
    "statistics_pass.py",
    "merge_memory.py",
    "merged_forward.py",
    "compact_forward.py",
    "distillation_step.py",
)


def main() -> None:
    """Run each script in a process of its own, so that none sees another's memory, and join their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    dtype = parser.parse_args().dtype
    rows: list[str] = []
    for script in SCRIPTS:
        command = [sys.executable, str(Path(__file__).parent / script), "--dtype", dtype]
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        table = [line for line in output.splitlines() if line.startswith("|")]
        print(*(table[2:] if rows else table), sep="\n", flush=True)
        rows += table


if __name__ == "__main__":
    main()
