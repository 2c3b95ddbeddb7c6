"""Run the paper's recipe on tasks, with its baselines and ablations, and print one table per task.

    python examples/benchmarks/compare_recipe.py --model google/switch-base-32 --tasks sst2 mrpc --output-dir runs

Per task and seed: fine-tune the model, merge it in several ways and distil each (`merge_and_distill.py`), then store
the experts of M-SMoE as low rank + sparse and distil (`compress_and_distill.py`). Every run is a command of these
scripts, printed as it starts, and leaves its folder in `--output-dir`; runs that are complete there are not repeated,
so a killed comparison goes on where it stopped. Figures: mean and standard deviation over the seeds, and what the
models of the first seed hold and execute. With --one-model a task is fine-tuned once, with the first seed.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_mcsmoe.data.calibration import calibration_batches
from hf_mcsmoe.data.tasks import get_task, task_rows
from hf_mcsmoe.evaluation.costs import account, expert_parameters
from hf_mcsmoe.evaluation.quality import WAYS
from hf_mcsmoe.layers.loading import load_model, load_tokenizer

SCRIPTS = Path(__file__).parents[1]
FINETUNE, MERGE, COMPRESS = "finetune_seq2seq.py", "merge_and_distill.py", "compress_and_distill.py"
EVALUATION, BEFORE = "evaluation", "before_distillation"


@dataclass(frozen=True)
class Run:
    """A run of a script: what it adds to the command, the run whose model it starts from, and how long it trains."""

    script: str
    flags: tuple[str, ...] = ()
    source: str = "full"


RUNS: dict[str, Run] = {
    "full": Run(FINETUNE),
    "pruning": Run(MERGE, ("--weighting", "dominant")),
    "averaging": Run(MERGE, ("--weighting", "uniform", "--alignment", "none")),
    "M-SMoE": Run(MERGE),
    "M-SMoE, refit": Run(MERGE, ("--repair", "refit")),
    "MC-SMoE": Run(COMPRESS, (), "M-SMoE"),
    "MC-SMoE, refit, weighted": Run(COMPRESS, ("--factorisation", "weighted_svd"), "M-SMoE, refit"),
    "M-SMoE, no alignment": Run(MERGE, ("--alignment", "none")),
    "M-SMoE, uniform weights": Run(MERGE, ("--weighting", "uniform")),
    "M-SMoE, uniform budget": Run(MERGE, ("--budget", "uniform")),
}
# Rows of the table: label, run, and which of its evaluations.
ROWS = [
    *((name, name, EVALUATION) for name in RUNS),
    ("M-SMoE, no distillation", "M-SMoE", BEFORE),
    ("M-SMoE, refit, no distillation", "M-SMoE, refit", BEFORE),
]


def main() -> None:
    """Run what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of the model to fine-tune")
    parser.add_argument("--tasks", nargs="+", required=True, help="names of tasks")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), help="runs to make and to show")
    parser.add_argument("--data-dir", help="folder laid out like the Hub; by default the Hub itself")
    parser.add_argument("--num-groups", type=int, default=8, help="experts that a layer keeps on average")
    parser.add_argument("--skip", nargs="+", default=["encoder.block.1.*"], help="layers to leave whole, or none")
    parser.add_argument("--rank", type=int, default=32, help="rank of U V")
    parser.add_argument("--keep", type=float, default=0.1, help="share of the rows of S that is kept")
    parser.add_argument("--learning-rate", help="of fine-tuning; by default the paper's for the task")
    parser.add_argument("--distill-learning-rate", help="of distillation; by default the paper's for the task")
    parser.add_argument("--steps", type=int, default=1000, help="of fine-tuning")
    parser.add_argument("--distill-steps", type=int, default=300, help="of distillation after merging")
    parser.add_argument("--compress-steps", type=int, default=600, help="of distillation while rows are pruned")
    parser.add_argument("--batch-size", type=int, help="rows a step; by default the paper's for the task")
    parser.add_argument("--max-source-length", type=int, help="in tokens; by default the task's")
    parser.add_argument("--by", choices=WAYS, default="generation", help="how to evaluate")
    parser.add_argument("--warmup-steps", type=int, default=16, help="of fine-tuning")
    parser.add_argument("--one-model", action="store_true", help="compress one fine-tuned model with every seed")
    parser.add_argument("--only-table", action="store_true", help="run nothing; show what is complete")
    arguments = parser.parse_args()
    for task in arguments.tasks:
        for seed in () if arguments.only_table else arguments.seeds:
            for name in arguments.runs:
                run(name, task, seed, arguments)
    for task in arguments.tasks:
        print(*table(task, arguments), sep="\n", flush=True)


def folder(name: str, task: str, seed: int, arguments: argparse.Namespace) -> Path:
    """Return the folder of a run."""
    seed = arguments.seeds[0] if name == "full" and arguments.one_model else seed
    return arguments.output_dir / task / f"seed-{seed}" / name.replace(", ", "-").replace(" ", "-")


def run(name: str, task: str, seed: int, arguments: argparse.Namespace) -> None:
    """Run a script unless its result is there; what it prints goes to `log.txt` of its folder.

    Raises:
        RuntimeError: the script failed.
    """
    target = folder(name, task, seed, arguments)
    if (target / f"{EVALUATION}.json").is_file():
        return
    command = [sys.executable, str(SCRIPTS / RUNS[name].script), *flags(name, task, seed, arguments)]
    print("$", shlex.join(["python", *command[1:]]), flush=True)
    target.mkdir(parents=True, exist_ok=True)
    with (target / "log.txt").open("a", encoding="utf-8") as log:
        if subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL).returncode:
            raise RuntimeError(f"{RUNS[name].script} failed for {name!r}; {target / 'log.txt'} tells why.")


def flags(name: str, task: str, seed: int, arguments: argparse.Namespace) -> list[str]:
    """Return the arguments of a run's script."""
    this = RUNS[name]
    source = arguments.model if this.script == FINETUNE else str(folder(this.source, task, seed, arguments))
    given: list[object] = ["--model_name_or_path", source, "--task", task, "--seed", seed]
    given += ["--output_dir", folder(name, task, seed, arguments), "--save_strategy", "no", "--logging_steps", 50]
    given += ["--train_sampling_strategy", "group_by_length", "--by", arguments.by, *this.flags]
    if arguments.data_dir:
        given += ["--data_dir", arguments.data_dir]
    if arguments.batch_size:
        given += ["--per_device_train_batch_size", arguments.batch_size]
    if arguments.max_source_length:
        given += ["--max_source_length", arguments.max_source_length]
    steps, rate = arguments.steps, arguments.learning_rate
    if this.script == FINETUNE:
        given += ["--warmup_steps", arguments.warmup_steps]
    if this.script == MERGE:
        steps, rate = arguments.distill_steps, arguments.distill_learning_rate
        given += ["--num_groups", arguments.num_groups, "--skip", *arguments.skip]
    elif this.script == COMPRESS:
        steps, rate = arguments.compress_steps, arguments.distill_learning_rate
        given += ["--rank", arguments.rank, "--final_threshold", arguments.keep]
        given += ["--teacher", folder("full", task, seed, arguments)]
    given += ["--max_steps", steps, *(["--learning_rate", rate] if rate else [])]
    return [str(item) for item in given]


def table(task: str, arguments: argparse.Namespace) -> list[str]:
    """Return a task's markdown table: metrics over the seeds, costs of the first seed's models."""
    lines: list[str] = []
    costs = costs_of(task, arguments)
    for label, name, evaluation in ROWS:
        files = [folder(name, task, seed, arguments) / f"{evaluation}.json" for seed in arguments.seeds]
        files = list(dict.fromkeys(files))  # one model for all seeds has one
        found = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]
        if name not in arguments.runs or not found:
            continue
        metrics = [key for key in found[0] if key not in ("no_label", "examples")]
        if not lines:
            head = ["method", *metrics, "seeds", "parameters", "in experts", "bytes", "FLOPs per token", "tokens/s"]
            lines += [f"\n{task}, {found[0]['examples']} examples\n", "| " + " | ".join(head) + " |"]
            lines += ["|---|" + "---:|" * (len(head) - 1)]
        cells = [spread([item[key] for item in found]) for key in metrics]
        lines.append("| " + " | ".join([label, *cells, str(len(found)), *costs.get(name, [""] * 5)]) + " |")
    return lines


def spread(values: Sequence[float]) -> str:
    """Return mean and standard deviation."""
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def costs_of(task: str, arguments: argparse.Namespace) -> dict[str, list[str]]:
    """Return, per run, what its model of the first seed holds and executes on a batch of the task, as cells."""
    cells: dict[str, list[str]] = {}
    rows = task_rows(get_task(task), data_dir=arguments.data_dir, limit=32)
    texts = [item.pair for item in get_task(task).examples(rows)]
    for name in arguments.runs:
        path = folder(name, task, arguments.seeds[0], arguments)
        if not (path / "config.json").is_file():
            continue
        model = load_model(str(path))
        length = arguments.max_source_length or get_task(task).max_source_length
        options = {"max_length": length, "batch_size": len(texts)}
        cost = account(
            model, calibration_batches(texts, load_tokenizer(str(path)), model, **options)[0], path, repetitions=5
        )
        figures = (
            cost.parameters,
            expert_parameters(model),
            cost.bytes_on_disk,
            cost.flops_per_token,
            cost.tokens_per_second,
        )
        cells[name] = [f"{value:,.0f}" for value in figures if value is not None]
    return cells


if __name__ == "__main__":
    main()
