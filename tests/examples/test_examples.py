"""The scripts of the recipe as a user runs them: help, fine-tuning to the end and resumed, evaluation."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from families import build
from safetensors.torch import load_file
from scripts import EXAMPLES, data, run, training
from transformers import PreTrainedTokenizerFast

BENCHMARKS = {"distillation_step.py": ["--d-model", "64", "--experts", "4", "--batch-size", "2", "--length", "8"]}
MODELS = Path(__file__).parents[3] / "shared" / "data" / "models"
# With tables of their own: experts in other forms against the same as they were; what takes hours, or gigabytes.
RATES = {"quantized_forward.py", "real_shapes.py", "wide_alignment.py"}
LARGE = {"larger_than_memory.py", "kill_and_resume.py", "plan_accuracy.py", "scale_table.py"}
SCRIPTS = ["finetune_seq2seq.py", "evaluate_seq2seq.py"]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_tells_what_the_script_does(script: str) -> None:
    result = run(script, "--help")
    assert result.returncode == 0, result.stderr
    assert "--task" in result.stdout
    assert f"examples/{script}" in result.stdout


@pytest.mark.slow
def test_a_model_learns_the_task_and_is_evaluated_alike_afterwards(folder: Path) -> None:
    output = folder / "full"
    options = ["--holdout", "0.2", "--eval_strategy", "steps", "--eval_steps", "100", "--save_strategy", "steps"]
    choose = ["--save_steps", "100", "--load_best_model_at_end", "true"]
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1")
    result = run("finetune_seq2seq.py", *training(folder, output), *options, *choose, launcher=launcher)
    assert result.returncode == 0, result.stderr
    figures = json.loads((output / "evaluation.json").read_text())
    assert figures == {"accuracy": 100.0, "no_label": 0.0, "examples": 11}
    state = json.loads((output / "checkpoint-200" / "trainer_state.json").read_text())
    assert "eval_loss" in state["log_history"][-1], "or no checkpoint was chosen by the rows kept apart"
    for by in ("generation", "likelihood"):
        arguments = ["--model_name_or_path", output, "--output_dir", folder / by, "--by", by, *data(folder)]
        result = run("evaluate_seq2seq.py", *arguments)
        assert result.returncode == 0, result.stderr
        assert json.loads((folder / by / "evaluation.json").read_text())["accuracy"] == 100.0


@pytest.mark.slow
def test_a_training_that_was_stopped_ends_as_if_it_had_not_been(folder: Path) -> None:
    output = folder / "full"
    arguments = [*training(folder, output), "--max_steps", "8", "--save_strategy", "steps", "--save_steps", "4"]
    assert run("finetune_seq2seq.py", *arguments).returncode == 0
    expected = load_file(output / "model.safetensors")
    (output / "model.safetensors").unlink()
    shutil.rmtree(output / "checkpoint-8")
    result = run("finetune_seq2seq.py", *arguments, "--resume_from_checkpoint", "last")
    assert result.returncode == 0, result.stderr
    found = load_file(output / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(found[name].equal(value) for name, value in expected.items())


@pytest.mark.slow
def test_a_choice_of_checkpoint_needs_rows_kept_apart(folder: Path) -> None:
    result = run("finetune_seq2seq.py", *training(folder, folder / "full"), "--eval_strategy", "epoch")
    assert result.returncode != 0
    assert "pass --holdout" in result.stderr
    assert not (folder / "full" / "evaluation.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("script", BENCHMARKS)
def test_a_benchmark_prints_its_table(script: str) -> None:
    result = run(f"benchmarks/{script}", "--repetitions", "1", "--threads", "1", *BENCHMARKS[script])
    assert result.returncode == 0, result.stderr
    head, _, *rows = result.stdout.splitlines()
    assert head.split("|")[1:3] == [" measure ", " ratio "]
    assert len(rows) == 2
    assert all(float(row.split("|")[2]) > 0 for row in rows)


@pytest.mark.slow
def test_predicted_effects_stand_beside_measured_ones(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    build("mixtral").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("what is seven times six\n" * 60)
    options = ["--sizes", "0.7", "0.5", "--rows", "12", "--judge-rows", "6", "--max-length", "12", "--reduce", "merge"]
    result = run("benchmarks/predicted_effect.py", tmp_path / "model", "--text", tmp_path / "text.txt", *options)
    assert result.returncode == 0, result.stderr
    head, _, *rows = [line.strip("| ").split(" | ") for line in result.stdout.splitlines()]
    assert head == ["model", "bytes", "taken", "predicted KL", "KL, in", "predicted / in"]
    assert [row[0] for row in rows] == ["0.7", "0.5"]
    assert all(float(row[5]) == pytest.approx(float(row[3]) / float(row[4]), rel=0.02, abs=0.01) for row in rows)


@pytest.mark.slow
@pytest.mark.skipif(not MODELS.is_dir(), reason="needs the trained models of ../shared/data/models")
def test_methods_are_compared_on_a_trained_model(tmp_path: Path) -> None:
    options = [
        "--subject",
        "qwen",
        "--methods",
        "msmoe,reap",
        "--experts",
        "0.5",
        "--sizes",
        "0.25",
        "--seeds",
        "0",
        "1",
    ]
    few = ["--rows", "16", "--judge-rows", "8", "--output", tmp_path / "methods"]
    result = run("benchmarks/compare_methods.py", MODELS, *options, *few)
    assert result.returncode == 0, result.stderr
    table = [line.strip("| ").split(" | ") for line in result.stdout.splitlines() if line.startswith("|")]
    assert table[0][:2] == ["qwen3moe-mini-16e", "experts 0.5"]
    assert [row[0] for row in table[2:]] == ["msmoe", "reap"]
    for row in table[2:]:
        kept, larger = (float(cell.split(" ± ")[0]) for cell in row[1:3])
        assert 0 < kept < larger, "fewer bytes, and nothing worse"
        assert all(" / " in cell for cell in row[1:3]), "in and out of the calibrated kind"
    page = tmp_path / "methods" / "qwen3moe-mini-16e-1" / "report.html"
    assert page.read_text().count("<svg") >= 2


def test_all_benchmarks_are_run_but_those_that_are_named_here() -> None:
    listed = (EXAMPLES / "benchmarks" / "run_all.py").read_text()
    # Measures of quality have a model and a text to be told, and the structure is no measure of speed.
    quality = {"quality_ladder.py", "predicted_effect.py", "search_cost.py", "plain_router.py"}
    scripts = {path.name for path in (EXAMPLES / "benchmarks").glob("*.py") if not path.stem.startswith("compare_")}
    others = {name for name in scripts if f'"{name}"' not in listed}
    assert others - quality - {"structure.py"} - RATES - LARGE == {
        "common.py",
        "divergence.py",
        "run_all.py",
        "merge_2b.py",
    }


@pytest.mark.slow
def test_four_gigabytes_pass_through_one_and_a_half(tmp_path: Path) -> None:
    options = ["--gigabytes", "4", "--limit", "1.5", "--num-experts", "32"]
    result = run("benchmarks/larger_than_memory.py", tmp_path / "work", *options)
    assert result.returncode == 0, result.stderr
    source, output, peak, *_ = (float(cell.strip("| GB")) for cell in result.stdout.splitlines()[-1].split("|")[1:4])
    assert source > 4 > output > 2
    assert peak < 1.5
    assert not [*(tmp_path / "work").iterdir()], "made, and removed"


@pytest.mark.slow
def test_the_merge_of_two_billion_parameters_says_what_it_keeps() -> None:
    command = [sys.executable, EXAMPLES / "benchmarks" / "merge_2b.py", "--help"]
    assert "--keep" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
