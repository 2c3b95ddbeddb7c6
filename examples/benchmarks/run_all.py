"""Run the measurements that take minutes (not the merge of 2 B parameters) and print one markdown table.

python examples/benchmarks/run_all.py
"""

import subprocess
import sys
from pathlib import Path

from common import parser

TIMED = ("statistics_pass.py", "grouping.py", "merged_forward.py", "compact_forward.py", "distillation_step.py")
SCRIPTS = (*TIMED, "merge_memory.py")


def main() -> None:
    """Run each script in a process of its own, so that none sees another's memory, and join their tables."""
    arguments = parser(__doc__, repetitions=5).parse_args()
    dtype = ["--dtype", arguments.dtype]
    timing = ["--repetitions", arguments.repetitions, "--threads", arguments.threads, "--clock", arguments.clock]
    rows: list[str] = []
    for script in SCRIPTS:
        command = [sys.executable, Path(__file__).parent / script, *dtype, *(timing if script in TIMED else [])]
        output = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True).stdout
        table = [line for line in output.splitlines() if line.startswith("|")]
        print(*(table[2:] if rows else table), sep="\n", flush=True)
        rows += table


if __name__ == "__main__":
    main()
