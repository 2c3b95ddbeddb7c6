"""Tasks of lm-evaluation-harness, which is an extra: `pip install "hf_mcsmoe[lm-eval]"`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def harness_tasks(given: Sequence[str]) -> tuple[list[str], Any]:
    """Return names of tasks and the manager of lm-eval that knows them.

    Args:
        given: names of tasks of lm-eval, or files `*.yaml` that describe one each.

    Raises:
        ValueError: lm-eval is not installed, a file describes no task, or a name is unknown.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(f'Tasks of lm-eval need lm-eval: pip install "hf_mcsmoe[lm-eval]" ({error}).') from None
    files = [Path(name) for name in given if name.endswith((".yaml", ".yml"))]
    names = [_task_of(Path(name)) if Path(name) in files else name for name in given]
    # Its own tasks, thousands of files, are only looked through where one is asked for.
    folders = [str(file.absolute().parent) for file in files]
    manager = TaskManager(include_path=folders or None, include_defaults=len(files) < len(given))
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise ValueError(f"lm-eval has no task {unknown[0]!r}; `lm-eval ls tasks` lists what there is.")
    return names, manager


def _task_of(file: Path) -> str:
    """Return the name of the task that a file describes; functions that it names are not loaded."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    found = [line for line in lines if line.startswith("task:")]
    name = yaml.safe_load(found[0])["task"] if found else None
    if not isinstance(name, str):
        raise ValueError(f"{file} describes no task of lm-eval: it is missing, or has no line `task: NAME`.")
    return name


def harness_figures(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, names: Sequence[str], manager: Any, batch_size: int
) -> dict[str, float]:
    """Return what lm-eval measures of a model, on its own scale, by task and metric."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    kind: Any = "seq2seq" if model.config.is_encoder_decoder else "causal"
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, backend=kind, batch_size=batch_size)
    found: Any = simple_evaluate(
        wrapped, tasks=list(names), task_manager=manager, bootstrap_iters=0, log_samples=False
    )
    return {
        f"{task} {metric.partition(',')[0]}": float(value)
        for task, figures in found["results"].items()
        for metric, value in figures.items()
        if "," in metric and "_stderr" not in metric and isinstance(value, int | float)
    }
