"""The scripts of the recipe in two processes on the CPU: what one process does, to rounding; killed and resumed."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from copa import LETTERS, write_model
from safetensors.torch import load_file
from scripts import EXAMPLES, run

pytestmark = pytest.mark.slow
# Accelerate's name for several processes of one machine; --cpu starts a single one, whatever --num_processes says.
LAUNCHER = (
    *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
)
Arguments = list[str | Path]
# By this seed no token comes so near to the edge between two experts that rounding decides which of them it picks, and
# no expert sees padding alone, which differs with the size of a batch: Adam moves by a gradient of zero, not by none.
MERGE = ["--num_groups", "4", "--hidden_weight", "0.1", "--seed", "2"]


def _rows(number: int, shift: int) -> list[dict]:
    """Make rows of SQuAD whose question tells the answer, of one to five words: labels that count differ in number."""
    made = []
    for index in range(number):
        first = (index + shift) % 20
        answer = " ".join(LETTERS[(first + step) % 20] for step in range(1 + first % 5))
        context = " ".join([LETTERS[index // 20]] * (1 + index % 4))
        answers = {"text": [answer], "answer_start": [0]}
        made.append({"question": LETTERS[first], "context": f"{context} {answer}", "answers": answers})
    return made


def _script(name: str, *arguments: str | Path, processes: int = 1) -> Path:
    """Run a script to its end; returns its output folder."""
    done = run(name, *arguments, launcher=LAUNCHER if processes > 1 else ())
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("evaluation: ") == 1
    return Path(arguments[arguments.index("--output_dir") + 1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a tiny Switch without dropout and noise, which fall otherwise in each process, and rows of a task."""
    path = tmp_path_factory.mktemp("processes")
    write_model(path / "model", dropout_rate=0.0, router_jitter_noise=0.0)
    for name, made in (("train", _rows(48, shift=0)), ("evaluation", _rows(11, shift=5))):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def _common(folder: Path, model: Path, output: str, batch_size: int, steps: int = 6) -> Arguments:
    """Return arguments of a training without warm-up, of which eight rows are kept apart."""
    return [
        *("--task", "squad", "--train_file", folder / "train.jsonl", "--evaluation_file", folder / "evaluation.jsonl"),
        *("--model_name_or_path", model, "--output_dir", folder / output, "--use_cpu", "true"),
        *("--learning_rate", "3e-3", "--warmup_steps", "0", "--max_steps", str(steps), "--logging_steps", "1"),
        *("--holdout", "0.16", "--eval_strategy", "steps", "--eval_steps", "6", "--disable_tqdm", "true"),
        *("--save_strategy", "steps", "--save_steps", "6"),
        *("--per_device_train_batch_size", str(batch_size), "--per_device_eval_batch_size", str(batch_size)),
    ]


@pytest.fixture(scope="module")
def full(folder: Path) -> Path:
    """Fine-tune the model until it answers most questions."""
    more = ["--learning_rate", "1e-2", "--save_strategy", "no", "--eval_strategy", "no"]
    return _script("finetune_seq2seq.py", *_common(folder, folder / "model", "full", 8, steps=150), *more)


@pytest.fixture(scope="module")
def merged(folder: Path, full: Path) -> Path:
    """Merge the fine-tuned model."""
    return _script("merge_and_distill.py", *_common(folder, full, "merged", 8), *MERGE)


def _figures(output: Path, name: str = "evaluation") -> dict[str, float]:
    return json.loads((output / f"{name}.json").read_text())


def _history(output: Path) -> list[dict[str, float]]:
    """Return what the Trainer logged, without times."""
    state = json.loads((output / "checkpoint-6" / "trainer_state.json").read_text())
    return [
        {name: value for name, value in entry.items() if "runtime" not in name and "per_second" not in name}
        for entry in state["log_history"]
    ]


def _check_alike(one: Path, two: Path, start: Path) -> None:
    """Compare what one and two processes saved, logged and measured; the weights must have moved away from `start`."""
    expected, found = (load_file(path / "model.safetensors") for path in (one, two))
    assert found.keys() == expected.keys()
    # Adam divides by the gradient's size: what is rounding in a small one is much in the weight. Kept rows of S, which
    # are integers, must be the same.
    for name, value in expected.items():
        tolerance = 1e-4 if value.is_floating_point() else 0
        torch.testing.assert_close(found[name], value, atol=tolerance, rtol=0)
    before = load_file(start / "model.safetensors")["shared.weight"]
    assert float((expected["shared.weight"] - before).abs().max()) > 1e-3
    histories = _history(one), _history(two)
    assert len(histories[0]) == len(histories[1]) == 7
    for ours, reference in zip(*histories, strict=True):
        assert ours == pytest.approx(reference, rel=1e-3, abs=1e-6)
    assert _figures(one) == _figures(two)
    assert _figures(one)["f1"] > 50
    assert json.loads((one / "config.json").read_text()) == json.loads((two / "config.json").read_text())


def test_fine_tuning_with_accumulation(folder: Path, full: Path) -> None:
    """With parts of two rows on both sides: padding decides which experts get a gradient of zero and which none."""
    # A balance of the load is no sum over rows: each part has its own.
    more = ["--router_losses", "false", "--per_device_eval_batch_size", "8", "--gradient_accumulation_steps", "4"]
    one = _script("finetune_seq2seq.py", *_common(folder, full, "tuned1", 2), *more)
    more = ["--router_losses", "false", "--per_device_eval_batch_size", "4", "--gradient_accumulation_steps", "2"]
    two = _script("finetune_seq2seq.py", *_common(folder, full, "tuned2", 2), *more, processes=2)
    _check_alike(one, two, full)


def test_merging(folder: Path, full: Path, merged: Path) -> None:
    two = _script("merge_and_distill.py", *_common(folder, full, "merged2", 4), *MERGE, processes=2)
    _check_alike(merged, two, full)
    assert _figures(merged, "before_distillation") == _figures(two, "before_distillation")
    assert (merged / "mcsmoe_plan.json").read_text() == (two / "mcsmoe_plan.json").read_text()
    assert sorted(path.name for path in merged.iterdir()) == sorted(path.name for path in two.iterdir())


def test_compressing_with_checkpointed_activations(folder: Path, full: Path, merged: Path) -> None:
    """The layer left whole has experts that no token of a process chose: other processes must not wait for them."""
    more: Arguments = ["--teacher", full, "--rank", "4"]
    one = _script("compress_and_distill.py", *_common(folder, merged, "small1", 8), *more)
    more += ["--gradient_checkpointing", "true"]
    two = _script("compress_and_distill.py", *_common(folder, merged, "small2", 4), *more, processes=2)
    _check_alike(one, two, merged)
    rows = [value for name, value in load_file(one / "model.safetensors").items() if name.endswith("_rows")]
    assert sum(len(value) for value in rows) > 10


def _killed(arguments: Arguments, when: Path) -> None:
    """Start a script in two processes and kill all of them with SIGKILL as soon as a file is there."""
    command = [sys.executable, *LAUNCHER, EXAMPLES / "compress_and_distill.py", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    deadline = time.monotonic() + 240
    while not when.is_file():
        assert process.poll() is None, "it ended without having written the file"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for part in [*psutil.Process(process.pid).children(recursive=True), process]:
        part.kill()
    process.wait()


def test_a_killed_run_resumes_with_the_random_numbers_of_each_process(folder: Path, full: Path, merged: Path) -> None:
    shutil.copytree(merged, folder / "noisy", ignore=shutil.ignore_patterns("checkpoint-*"))
    config = folder / "noisy" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dropout_rate": 0.1}))

    def arguments(output: str) -> Arguments:
        more = ["--teacher", full, "--rank", "4", "--save_steps", "10", "--eval_strategy", "no"]
        return [*_common(folder, folder / "noisy", output, 4, steps=60), *more]

    whole = _script("compress_and_distill.py", *arguments("whole"), processes=2)
    again = folder / "again"
    _killed(arguments("again"), again / "checkpoint-10" / "sparsification.json")
    assert not (again / "evaluation.json").exists()
    # What a kill in the middle of a later save leaves: no averages of the scores.
    (again / "checkpoint-50").mkdir(exist_ok=True)
    (again / "checkpoint-50" / "trainer_state.json").write_text("{}")
    (again / "checkpoint-50" / "sparsification.json").unlink(missing_ok=True)
    _script("compress_and_distill.py", *arguments("again"), "--resume_from_checkpoint", "last", processes=2)
    expected, found = (load_file(path / "model.safetensors") for path in (whole, again))
    assert found.keys() == expected.keys()
    assert all(found[name].equal(value) for name, value in expected.items())


def test_evaluation_counts_each_row_once(folder: Path, full: Path) -> None:
    data = ["--task", "squad", "--evaluation_file", folder / "evaluation.jsonl"]
    more: Arguments = ["--model_name_or_path", full, *data, "--use_cpu", "true", "--output_dir", folder / "evaluated"]
    two = _script("evaluate_seq2seq.py", *more, processes=2)
    assert _figures(two) == _figures(full)
    assert _figures(two)["examples"] == 11


def test_a_mistake_is_told_once(folder: Path) -> None:
    arguments = ["--model_name_or_path", folder / "model", "--task", "sst3", "--use_cpu", "true"]
    done = run("evaluate_seq2seq.py", *arguments, launcher=LAUNCHER)
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1
    assert "Did you mean 'sst2'" in done.stderr
    assert "recipe.py" not in done.stderr, "a traceback"
