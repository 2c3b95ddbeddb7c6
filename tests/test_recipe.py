"""The scripts of the recipe as a user types them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from families import build
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
import recipe  # noqa: E402
from transformers import Seq2SeqTrainingArguments  # noqa: E402

SCRIPTS = ["finetune_seq2seq", "merge_and_distill", "compress_and_distill", "evaluate_seq2seq"]
MODEL = ["--model_name_or_path", "m"]


def run(script: str, *arguments: object, launch: int = 0) -> subprocess.CompletedProcess:
    """Run a script in a process of its own, or in several under `accelerate launch`."""
    path = str(EXAMPLES / f"{script}.py")
    start = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(launch)] if launch else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_OFFLINE": "1", "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, *start, path, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=600,
    )


@pytest.mark.parametrize("script", [name for name in SCRIPTS if (EXAMPLES / f"{name}.py").exists()])
def test_help_explains_the_papers_arguments(script: str) -> None:
    done = run(script, "--help")
    assert done.returncode == 0, done.stderr
    wanted = {"merge_and_distill": ["--num_groups", "--kd_temperature"], "compress_and_distill": ["--final_threshold"]}
    for option in ("--task", "--data_dir", "--max_source_length", *wanted.get(script, [])):
        assert option in done.stdout


def parsed(*arguments: str) -> Seq2SeqTrainingArguments:
    return recipe.parse((recipe.TaskArguments, Seq2SeqTrainingArguments), "", [*MODEL, *arguments])[1]


def test_settings_are_the_papers_for_the_task_unless_given() -> None:
    training = parsed("--task", "COPA")
    assert (training.learning_rate, training.per_device_train_batch_size) == (3e-5, 8)
    paper = (training.adam_beta1, training.adam_beta2, training.adam_epsilon, training.weight_decay)
    assert (*paper, training.warmup_steps) == (0.9, 0.98, 1e-6, 0.01, 16)
    assert training.lr_scheduler_type == "linear"
    training = parsed("--task=sst2", "--learning_rate", "0.1")
    assert (training.learning_rate, training.per_device_train_batch_size) == (0.1, 64)


def arguments_for(folder: Path, **changes: object) -> recipe.TaskArguments:
    return recipe.TaskArguments(
        model_name_or_path="m", task="multirc", train_file=str(folder / "rows.jsonl"),
        evaluation_file=str(folder / "rows.jsonl"), **changes,
    )  # fmt: skip


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    made = [
        {"paragraph": "p", "question": f"q{n // 4}", "answer": str(n), "label": n % 2,
         "idx": {"paragraph": 0, "question": n // 4}}
        for n in range(40)
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, made)))
    return tmp_path


def test_the_holdout_shares_no_question_with_the_training_rows(rows: Path) -> None:
    data = recipe.load_data(arguments_for(rows, holdout=0.25), seed=1)
    groups = [{item.group for item in part} for part in (data.train, data.holdout)]
    assert (len(data.train), len(data.holdout), len(data.evaluation)) == (28, 12, 40)
    assert not groups[0] & groups[1]
    again = recipe.load_data(arguments_for(rows, holdout=0.25), seed=1)
    assert again.holdout == data.holdout
    assert recipe.load_data(arguments_for(rows, holdout=0.25), seed=2).holdout != data.holdout


def test_fewer_rows_are_a_random_part(rows: Path) -> None:
    data = recipe.load_data(arguments_for(rows, max_train_rows=8, max_evaluation_rows=5), seed=1)
    assert (len(data.train), len(data.evaluation)) == (8, 5)
    whole = recipe.load_data(arguments_for(rows), seed=1)
    assert data.train == whole.train[:8]
    assert {item.source for item in data.train} != {item.source for item in whole.evaluation[:8]}


def test_choosing_on_the_evaluation_split_is_refused(rows: Path, folder: Path, tmp_path: Path) -> None:
    arguments = arguments_for(rows)
    arguments.model_name_or_path = str(folder / "switch")
    training = Seq2SeqTrainingArguments(output_dir=str(tmp_path / "out"), eval_strategy="epoch", report_to="none")
    with pytest.raises(ValueError, match="needs rows to choose by: pass --holdout"):
        recipe.load(arguments, training)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a tiny Switch model that knows a few words, and rows of SST-2 in which one word tells the label."""
    path = tmp_path_factory.mktemp("recipe")
    words = ["<pad>", "</s>", "<unk>", "sst2", "sentence:", "positive", "negative", "True", "False", "good", "bad"]
    words += [f"x{index}" for index in range(30)]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )
    model = build("switch_transformers")
    model.generation_config.eos_token_id = model.config.eos_token_id = 1
    model.save_pretrained(path / "switch")
    made.save_pretrained(path / "switch")
    texts = [f"x{n % 30} {'good' if n % 2 else 'bad'} x{(7 * n) % 30}" for n in range(64)]
    lines = [json.dumps({"sentence": text, "label": n % 2}) for n, text in enumerate(texts)]
    (path / "train.jsonl").write_text("\n".join(lines))
    (path / "evaluation.jsonl").write_text("\n".join(lines[:20]))
    return path


def options(folder: Path, model: Path, output: Path) -> list[object]:
    """Return what every run of a script is given here."""
    data = ["--train_file", folder / "train.jsonl", "--evaluation_file", folder / "evaluation.jsonl"]
    return ["--model_name_or_path", model, "--task", "sst2", "--output_dir", output, *data]


def figures(output: Path) -> dict[str, float]:
    return json.loads((output / "evaluation.json").read_text())


TRAINING = ["--learning_rate", "1e-2", "--per_device_train_batch_size", "16", "--use_cpu", "true"]


@pytest.mark.slow
def test_finetune_resumes_and_evaluate_finds_the_same_figures(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "full"
    given = [*options(folder, folder / "switch", output), *TRAINING, "--num_train_epochs", "20", "--holdout", "0.1"]
    given += ["--save_strategy", "steps", "--save_steps", "10", "--save_total_limit", "20"]
    done = run("finetune_seq2seq", *given)
    assert done.returncode == 0, done.stderr
    assert figures(output)["accuracy"] == 100.0
    weights = (output / "model.safetensors").read_bytes()
    steps = sorted(int(path.name.partition("-")[2]) for path in output.glob("checkpoint-*"))
    for step in steps[len(steps) // 2 :]:
        for file in (output / f"checkpoint-{step}").iterdir():
            file.unlink()
        (output / f"checkpoint-{step}").rmdir()
    resumed = run("finetune_seq2seq", *given, "--resume_from_checkpoint", "last")
    assert resumed.returncode == 0, resumed.stderr
    assert (output / "model.safetensors").read_bytes() == weights
    for by in ("generation", "likelihood"):
        again = run("evaluate_seq2seq", *options(folder, output, tmp_path / by), "--by", by)
        assert again.returncode == 0, again.stderr
        assert figures(tmp_path / by) == figures(output)


@pytest.mark.slow
def test_two_processes_evaluate_each_row_once(folder: Path, tmp_path: Path) -> None:
    alone = run("evaluate_seq2seq", *options(folder, folder / "switch", tmp_path / "one"))
    both = run("evaluate_seq2seq", *options(folder, folder / "switch", tmp_path / "two"), launch=2)
    assert alone.returncode == both.returncode == 0, alone.stderr + both.stderr
    assert figures(tmp_path / "one") == figures(tmp_path / "two")
    assert figures(tmp_path / "one")["examples"] == 20
