"""What the scripts of the recipe share, and the recipe from a fine-tuned model to a compressed one."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, inputs
from safetensors.torch import load_file
from scripts import EXAMPLES, data, run, training
from transformers import Seq2SeqTrainingArguments

from hf_mcsmoe import moe_layers
from hf_mcsmoe.distillation.finetuning import FinetuneTrainer
from hf_mcsmoe.distillation.processes import check_processes, mistakes_reported_once
from hf_mcsmoe.layers.loading import load_model

sys.path.insert(0, str(EXAMPLES))
import compress_and_distill
import merge_and_distill
import recipe


def parsed(*arguments: str) -> Seq2SeqTrainingArguments:
    given = ["--model_name_or_path", "m", *arguments]
    return recipe.parse([recipe.TaskArguments, Seq2SeqTrainingArguments], "", given)[1]


def test_settings_are_the_papers_for_the_task_unless_given() -> None:
    chosen = parsed("--task", "COPA")
    assert (chosen.learning_rate, chosen.per_device_train_batch_size) == (3e-5, 8)
    paper = (chosen.adam_beta1, chosen.adam_beta2, chosen.adam_epsilon, chosen.weight_decay)
    assert (*paper, chosen.warmup_steps) == (0.9, 0.98, 1e-6, 0.01, 16)
    assert chosen.lr_scheduler_type == "linear"
    chosen = parsed("--task=sst2", "--learning_rate", "0.1")
    assert (chosen.learning_rate, chosen.per_device_train_batch_size) == (0.1, 64)


@pytest.mark.parametrize(("rank", "told"), [("0", "error: no such thing"), ("1", 1)])
def test_of_several_processes_the_first_tells_a_mistake(
    rank: str, told: str | int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as caught, mistakes_reported_once():
        raise ValueError("no such thing")
    assert caught.value.code == told


@pytest.mark.parametrize(
    ("script", "wrong", "sentence"),
    [
        (merge_and_distill, ["--repair", "refitt"], "Did you mean 'refit'"),
        (merge_and_distill, ["--num_groups", "99"], "99"),
        (merge_and_distill, ["--budget", "adaptiv"], "Did you mean 'adaptive'"),
        (merge_and_distill, ["--skip", "nothing.*"], "matches no layer"),
        (compress_and_distill, ["--teacher", "m"], "not compressed"),
        (compress_and_distill, ["--teacher", "m", "--final_threshold", "1.5"], "keep=1.5"),
        (compress_and_distill, ["--teacher", "m", "--importance", "size"], "not compressed|Unknown importance"),
    ],
)
def test_mistakes_cost_one_sentence_before_training(
    script: Any,
    wrong: list[str],
    sentence: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = ["--model_name_or_path", folder / "model", "--use_cpu", "true", "--output_dir", folder / "out"]
    monkeypatch.setattr(sys, "argv", ["script", *map(str, [*given, *data(folder), *wrong])])
    with pytest.raises(SystemExit, match=f"^error: .*({sentence})"):
        script.main()
    assert not (folder / "out").exists()


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_processes()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"2 processes were started.*pass --use_cpu true"):
        check_processes()


@pytest.fixture
def questions(tmp_path: Path) -> recipe.TaskArguments:
    """Write ten questions of MultiRC with four answers each; return the arguments that name them."""
    made = [
        {"paragraph": "p", "question": f"q{n // 4}", "answer": str(n), "label": n % 2}
        | {"idx": {"paragraph": 0, "question": n // 4}}
        for n in range(40)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, made)))
    files = {"train_file": str(path), "evaluation_file": str(path)}
    return recipe.TaskArguments(model_name_or_path="m", task="multirc", **files)


def test_rows_kept_apart_share_no_question_with_those_trained_on(questions: recipe.TaskArguments) -> None:
    questions.holdout = 0.25
    made = recipe.load_data(questions, seed=1)
    groups = [{item.group for item in part} for part in (made.train, made.holdout)]
    assert (len(made.train), len(made.holdout), len(made.evaluation)) == (28, 12, 40)
    assert not groups[0] & groups[1]
    assert recipe.load_data(questions, seed=1).holdout == made.holdout
    assert recipe.load_data(questions, seed=2).holdout != made.holdout
    questions.holdout = 1.0
    with pytest.raises(ValueError, match=r"holdout of 1.0 is no share"):
        recipe.load_data(questions, seed=1)


def test_fewer_rows_are_a_random_part(questions: recipe.TaskArguments) -> None:
    whole = recipe.load_data(questions, seed=1)
    questions.max_train_rows, questions.max_evaluation_rows = 8, 5
    part = recipe.load_data(questions, seed=1)
    assert part.train == whole.train[:8]
    assert {item.source for item in part.train} != {item.source for item in whole.evaluation[:8]}
    assert len(part.evaluation) == 5


def figures(output: Path, name: str = "evaluation") -> dict[str, float]:
    return json.loads((output / f"{name}.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("script", ["merge_and_distill.py", "compress_and_distill.py"])
def test_help_tells_the_papers_arguments(script: str) -> None:
    result = run(script, "--help")
    assert result.returncode == 0, result.stderr
    wanted = {"merge_and_distill.py": ["--num_groups", "--skip"], "compress_and_distill.py": ["--final_threshold"]}
    for option in ("--task", "--kd_temperature", "--kd_weight", *wanted[script]):
        assert option in result.stdout


@pytest.mark.slow
def test_the_recipe_from_end_to_end(folder: Path) -> None:
    """The task is learnt, merging and compressing with distillation keep it, and the files hold what they should."""
    full, merged, small = folder / "full", folder / "merged", folder / "small"
    result = run("finetune_seq2seq.py", *training(folder, full))
    assert result.returncode == 0, result.stderr
    common = ["--learning_rate", "1e-2", "--max_steps", "60", "--use_cpu", "true", *data(folder)]
    names = [layer.name for layer in moe_layers(load_model(str(full)))]
    given = ["--model_name_or_path", full, "--num_experts", "8", "--num_groups", "4", "--skip", names[0]]
    result = run("merge_and_distill.py", *given, *common, "--output_dir", merged)
    assert result.returncode == 0, result.stderr
    assert figures(merged)["accuracy"] == 100.0
    sizes = [layer.num_experts for layer in moe_layers(load_model(str(merged)))]
    assert (sizes[0], sum(sizes[1:])) == (8, 4 * (len(sizes) - 1))

    given = ["--model_name_or_path", merged, "--teacher", full, "--rank", "4", "--output_dir", small, *common]
    given += ["--save_strategy", "steps", "--save_steps", "30"]
    result = run("compress_and_distill.py", *given)
    assert result.returncode == 0, result.stderr
    assert figures(small)["accuracy"] >= 80.0
    tensors = load_file(small / "model.safetensors")
    expected = load_file(merged / "model.safetensors")
    assert sum(value.numel() for value in tensors.values()) < sum(value.numel() for value in expected.values())
    result = run("evaluate_seq2seq.py", "--model_name_or_path", small, "--output_dir", folder / "again", *data(folder))
    assert result.returncode == 0, result.stderr
    assert figures(folder / "again") == figures(small)

    # Stopped after half of the steps and resumed, it ends with the same weights.
    for file in (small / "checkpoint-60").iterdir():
        file.unlink()
    (small / "checkpoint-60").rmdir()
    result = run("compress_and_distill.py", *given, "--resume_from_checkpoint", "last")
    assert result.returncode == 0, result.stderr
    again = load_file(small / "model.safetensors")
    assert again.keys() == tensors.keys()
    assert all(again[name].equal(value) for name, value in tensors.items())


@pytest.mark.slow
def test_merging_alone_and_a_wrong_number_of_experts(folder: Path) -> None:
    given = ["--model_name_or_path", folder / "model", "--use_cpu", "true", "--num_groups", "4", *data(folder)]
    given += ["--skip", "none", "--output_dir", folder / "merged"]
    result = run("merge_and_distill.py", *given, "--num_train_epochs", "0")
    assert result.returncode == 0, result.stderr
    assert figures(folder / "merged") == figures(folder / "merged", "before_distillation")
    result = run("merge_and_distill.py", *given, "--num_experts", "32")
    assert result.returncode != 0
    assert "--num_experts 32, but " in result.stderr


def test_fine_tuning_counts_the_routers_losses(tmp_path: Path) -> None:
    model = build("switch_transformers").train()
    batch = inputs("switch_transformers", model)
    batch["labels"] = batch.pop("decoder_input_ids")
    batch["labels"][0, -2:] = -100
    arguments = Seq2SeqTrainingArguments(tmp_path, use_cpu=True, report_to="none")
    losses = {}
    for counted in (True, False):
        trainer = FinetuneTrainer(model=model, args=arguments, router_losses=counted)
        given = {**batch, "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(batch["labels"])}
        torch.manual_seed(0)  # of the routers' noise and of dropout
        losses[counted] = trainer.compute_loss(model, given)
        torch.manual_seed(0)
        torch.testing.assert_close(losses[counted], model(**batch, output_router_logits=counted).loss)
    assert losses[True] > losses[False] + 1e-4
