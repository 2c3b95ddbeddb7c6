"""The scripts of `examples/` as processes of their own, and the arguments of a short training."""

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(script: str, *arguments: str | Path, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own, on one core."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "119"}
    command = [sys.executable, *launcher, str(EXAMPLES / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)


def data(folder: Path) -> list[str | Path]:
    """Return the arguments that name the task and its files."""
    return ["--task", "copa", "--train_file", folder / "train.jsonl", "--evaluation_file", folder / "evaluation.jsonl"]


def training(folder: Path, output: Path) -> list[str | Path]:
    """Return the arguments of a short training."""
    start = ["--model_name_or_path", folder / "model", "--output_dir", output, *data(folder)]
    return [*start, "--learning_rate", "1e-2", "--max_steps", "200", "--use_cpu", "true", "--disable_tqdm", "true"]
