"""`hf-mcsmoe distill` as a user types it: what it writes, what it shows, killed and resumed."""

import copy
import io
import json
import re
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import command, write_models
from helpers import Run
from merged import check_without_package, example, save
from merged import tokenizer as word_tokenizer
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_mcsmoe import DistillationTrainer
from hf_mcsmoe.cli.distill import DISTILLATION
from hf_mcsmoe.cli.training import TrainingProgress
from hf_mcsmoe.distillation import DistillationOptions
from hf_mcsmoe.layers.loading import load_model

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("distill"))


def table(out: str) -> dict[str, list[str]]:
    lines = [re.split("  +", line.strip()) for line in out.splitlines()]
    return {line[0]: line[1:] for line in lines if len(line) > 3}


@pytest.mark.parametrize("name", ["mixtral", "switch_transformers"])
def test_a_merged_model_learns_and_is_saved_with_card_and_costs(
    name: str,
    folder: Path,
    tmp_path: Path,
    run: Run,
) -> None:
    output = tmp_path / "out"
    code, out, err = run(*command(folder, output, name))
    assert code == 0, err
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "the working folder is gone"
    before, after = (load_file(path / "model.safetensors") for path in (folder / f"merged_{name}", output))
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert any("experts" in key for key in changed)
    assert not any("router" in key or ".gate." in key for key in changed), "routers are frozen"
    sizes = [load_model(str(path)).num_parameters() for path in (folder / name, folder / f"merged_{name}", output)]
    assert table(out)["parameters"] == [*(f"{size:,}" for size in sizes), f"{1 - sizes[2] / sizes[0]:.1%}"]
    card = (output / "README.md").read_text()
    for row in ("parameters", "bytes", "bytes on disk", "FLOPs per token"):
        assert f"| {row} | {' | '.join(table(out)[row])} |" in card
    assert f"| tokens/s | {' | '.join(table(out)['tokens/s'])} |  |" in card
    folders = (folder / name, folder / f"merged_{name}", output)
    on_disk = [sum(file.stat().st_size for file in path.glob("*.safetensors")) for path in folders]
    assert table(out)["bytes on disk"] == [*map("{:,}".format, on_disk), f"{1 - on_disk[2] / on_disk[0]:.1%}"]
    assert "## Distillation\n\nTrained for 4 steps" in card
    assert '.from_pretrained("out"' in card
    assert {"mcsmoe_plan.json", "report.html", "tokenizer.json"} <= {path.name for path in output.iterdir()}
    lines = re.findall(r"step (\d)/4 task_loss [\d.]+ kd_loss [\d.]+", err)
    assert lines == ["1", "2", "3", "4"]


def stop(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Interrupt a training after so many forwards, as Ctrl-C does."""
    step, done = DistillationTrainer.training_step, []

    def interrupted(self: DistillationTrainer, *arguments: Any, **keywords: Any) -> torch.Tensor:
        if len(done) == after:
            raise KeyboardInterrupt
        done.append(1)
        return step(self, *arguments, **keywords)

    monkeypatch.setattr(DistillationTrainer, "training_step", interrupted)


@pytest.mark.slow
def test_low_rank_experts_killed_and_resumed_end_as_if_nothing_had_happened(
    folder: Path,
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pruning = ["--rank", 2, "--keep", 0.25, "--start", 0.25, "--end", 0.25]
    working, mine = tmp_path / ".again.mcsmoe-work" / "training", tmp_path / "again.training" / "notes.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    code, _, err = run(*command(folder, tmp_path / "whole"), *pruning)
    assert code == 0, err
    assert re.findall(r"kept_share ([\d.]+)", err)[-1] == "0.2500"
    with monkeypatch.context() as patched:
        stop(patched, after=3)
        code, _, err = run(*command(folder, tmp_path / "again"), *pruning)
    assert code == 130
    assert "/training/checkpoint-2iskept" in "".join(err.split())
    assert not (tmp_path / "again").exists()
    unfinished = shutil.copytree(working / "checkpoint-2", tmp_path / "unfinished")
    (working / "checkpoint-3").mkdir()  # killed while it was written

    for more, message in (([], "go on from there with --resume"), (["--resume", "--kd-weight", 1], "had other opt")):
        code, _, err = run(*command(folder, tmp_path / "again"), *pruning, *more)
        assert code == 1
        assert message in err
    with monkeypatch.context() as patched:  # killed once more, between the last step and the result
        patched.setattr("hf_mcsmoe.cli.distill.compact", lambda model: (_ for _ in ()).throw(MemoryError))
        assert run(*command(folder, tmp_path / "again"), *pruning, "--resume")[0] == 1
    code, _, err = run(*command(folder, tmp_path / "again"), *pruning, "--resume")
    assert code == 0, err
    assert "4 steps, resumed from checkpoint-4" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "again.training", "unfinished", "whole"]
    assert mine.read_text() == "mine"
    whole, again = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "again"))
    assert whole.keys() == again.keys()
    assert all(torch.equal(value, whole[key]) for key, value in again.items())
    kept = sum(len(value) for key, value in whole.items() if key.endswith("_rows"))
    # Experts times rows of the first matrix, and columns of the second.
    units = [value.shape[0] * value.shape[1] for key, value in whole.items() if key.endswith("up_proj_u")]
    units += [value.shape[0] * value.shape[2] for key, value in whole.items() if key.endswith("down_proj_v")]
    assert kept == round(0.25 * sum(units))

    # A checkpoint of the Trainer, where S has all its rows still, is a student as well.
    arguments = command(folder, tmp_path / "third")
    arguments[1] = unfinished
    code, _, err = run(*arguments, "--start", 0.25, "--end", 0.25)
    assert code == 0, err
    third = load_file(tmp_path / "third" / "model.safetensors")
    assert third.keys() == whole.keys()
    assert sum(len(value) for key, value in third.items() if key.endswith("_rows")) == kept
    code, _, err = run(*arguments, "--rank", 2, "--overwrite")
    assert code == 1
    assert "is decomposed already" in err
    code, _, err = run(*arguments, "--factorisation", "svd", "--overwrite")
    assert code == 1
    assert "--factorisation svd would do nothing to" in err


@pytest.mark.slow
def test_the_result_loads_where_the_package_is_not_installed(
    folder: Path,
    tmp_path: Path,
    run: Run,
) -> None:
    code, _, err = run(*command(folder, tmp_path / "out"), "--rank", 2, "--start", 0.25, "--end", 0.25)
    assert code == 0, err
    case = copy.copy(example("mixtral"))
    object.__setattr__(case, "merged", load_model(str(tmp_path / "out")))
    path = save(case, tmp_path)  # once more, beside it what a process is to find
    assert (path / "model.safetensors").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()
    path.with_suffix(".pt").rename(tmp_path / "out.pt")
    assert check_without_package({tmp_path / "out": ["loads"]}, tmp_path) == {"out": {"loads": ""}}


def test_a_student_in_bfloat16_is_trained_in_float32_and_saved_as_it_was(
    folder: Path,
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student = copy.deepcopy(example("mixtral").merged).to(torch.bfloat16)
    student.save_pretrained(tmp_path / "student")
    word_tokenizer().save_pretrained(tmp_path / "student")
    seen, step = set(), DistillationTrainer.training_step

    def observed(self: DistillationTrainer, *arguments: Any, **keywords: Any) -> torch.Tensor:
        seen.update(parameter.dtype for parameter in self.model.parameters())
        return step(self, *arguments, **keywords)

    monkeypatch.setattr(DistillationTrainer, "training_step", observed)
    arguments = command(folder, tmp_path / "out")
    arguments[1] = tmp_path / "student"
    code, _, err = run(*arguments)
    assert code == 0, err
    assert seen == {torch.float32}
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {value.dtype for value in found.values()} == {torch.bfloat16}


def test_a_run_that_fails_before_its_first_checkpoint_leaves_nothing(
    folder: Path,
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patched:
        stop(patched, after=1)
        assert run(*command(folder, tmp_path / "out"))[0] == 130
    assert not list(tmp_path.iterdir())
    code, _, err = run(*command(folder, tmp_path / "out"), "--resume")
    assert code == 0, "a run that never got far enough begins anew: " + err


def test_a_run_whose_weights_overflow_says_so_once_and_leaves_nothing(folder: Path, tmp_path: Path, run: Run) -> None:
    more = ["--learning-rate", "1e38", "--warmup-steps", 0, "--save-steps", 1]
    code, _, err = run(*command(folder, tmp_path / "out"), *more)
    assert code == 1
    assert "is kept" not in err
    assert "no longer finite at step 1; no checkpoint was saved yet: start again with a lower learning rate" in err
    assert not list(tmp_path.iterdir())


def test_a_run_goes_on_from_the_last_finite_weights_at_a_lower_learning_rate(
    folder: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*command(folder, tmp_path / "out"), "--save-steps", 1]
    working = tmp_path / ".out.mcsmoe-work" / "training"
    with monkeypatch.context() as patched:
        stop(patched, after=3)
        assert run(*arguments)[0] == 130
    weights = load_file(working / "checkpoint-3" / "model.safetensors")
    weights["lm_head.weight"][0, 0] = float("nan")
    save_file(weights, working / "checkpoint-3" / "model.safetensors", {"format": "pt"})
    step, rates = DistillationTrainer.training_step, []

    def observed(self: DistillationTrainer, *arguments: Any, **keywords: Any) -> torch.Tensor:
        rates.append(self.optimizer.param_groups[0]["lr"])
        return step(self, *arguments, **keywords)

    monkeypatch.setattr(DistillationTrainer, "training_step", observed)
    with pytest.warns(UserWarning, match=r"learning_rate: 0\.01 before, 0\.0001 now"):
        code, _, err = run(*arguments, "--resume", "--learning-rate", "1e-4")
    assert code == 0, err
    assert re.search(r"No run goes on from .*checkpoint-3: model\.safetensors is damaged", err)
    assert "4 steps, resumed from checkpoint-2" in err
    assert rates == pytest.approx([5e-5, 2.5e-5])  # half and a quarter of the rate are left of four steps


def test_options_of_the_distillation_are_the_fields_of_its_dataclass(run: Run) -> None:
    code, out, _ = run("distill", "--help")
    assert code == 0
    known = {item.name: item for item in fields(DistillationOptions)}
    text = " ".join(out.replace("│", " ").split())
    for name in DISTILLATION:
        assert f"--{name.replace('_', '-')}" in text
        assert known[name].metadata["help"] in text


def shown(console: Console) -> None:
    """Show two logs of a training of ten steps."""
    bar, state, control = TrainingProgress(console), TrainerState(max_steps=10), TrainerControl()
    args = TrainingArguments("unused", report_to="none", use_cpu=True)
    bar.on_train_begin(args, state, control)
    for step, loss in ((1, 2.5), (2, 1.25)):
        state.global_step = step
        bar.on_step_end(args, state, control)
        bar.on_log(args, state, control, {"task_loss": loss, "kept_share": 0.5, "learning_rate": 1.0})
    bar.on_log(args, state, control, {"train_loss": 9.0, "train_runtime": 1.0})
    bar.stop()


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere() -> None:
    terminal, file = io.StringIO(), io.StringIO()
    shown(Console(file=terminal, force_terminal=True, width=120))
    assert "task_loss 1.2500  kept_share 0.5000" in terminal.getvalue()
    assert "2/10" in terminal.getvalue()
    assert "step" not in terminal.getvalue()
    shown(Console(file=file))
    lines = file.getvalue().splitlines()
    assert lines == [
        "step 1/10  task_loss 2.5000  kept_share 0.5000",
        "step 2/10  task_loss 1.2500  kept_share 0.5000",
    ]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The repair left")
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
def test_a_trained_switch_is_merged_distilled_and_evaluated(tmp_path: Path, run: Run) -> None:
    full = SHARED / "models" / "switch-mini-16e"
    text = ["--data", full / "validation_text.json", "--num-samples", 64, "--max-length", 96]
    code, _, err = run("compress", full, *text, "--experts", 8, "--output", tmp_path / "merged")
    assert code == 0, err
    task = ["--task", "sst2", "--data-dir", SHARED / "hub"]
    options = ["--max-steps", 30, "--batch-size", 16, "--limit", 2000, "--rank", 16, "--keep", 0.1]
    arguments = ["distill", tmp_path / "merged", "--teacher", full, *task, *options, "--output", tmp_path / "small"]
    code, _, err = run(*arguments)
    assert code == 0, err
    losses = [float(value) for value in re.findall(r"task_loss ([\d.]+)", err)]
    assert losses[-1] < 0.7 * losses[0]
    models = [full, tmp_path / "merged", tmp_path / "small"]
    code, _, err = run("evaluate", *models, *task, "--limit", 64, "--json", tmp_path / "figures.json")
    assert code == 0, err
    sizes = [figures["parameters"] for figures in json.loads((tmp_path / "figures.json").read_text()).values()]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[2] < 0.35 * sizes[0]
