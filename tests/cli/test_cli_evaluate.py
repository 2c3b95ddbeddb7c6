"""`hf-mcsmoe evaluate` as a user types it, on folders on disk; figures are worked out from the models' logits."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from commands import TEXT
from copa import rows, write_folder
from families import build
from helpers import Run
from merged import example
from merged import tokenizer as word_tokenizer
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedModel

from hf_mcsmoe.layers.loading import load_model, load_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path)


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a tiny Mixtral, the same with merged experts, and a text."""
    path = tmp_path_factory.mktemp("causal")
    for name, model in (("full", build("mixtral")), ("merged", example("mixtral").merged)):
        model.save_pretrained(path / name)
        word_tokenizer().save_pretrained(path / name)
    (path / "text.txt").write_text(TEXT)
    return path


def cells(out: str, name: str) -> list[str]:
    """Return the cells of a table's row."""
    (line,) = (line for line in out.splitlines() if line.strip().startswith(f"{name} ") and "━" not in line)
    return re.split("  +", line.strip())[1:]


@torch.no_grad()
def loss(model: PreTrainedModel, blocks: list[list[int]]) -> float:
    losses = []
    for block in blocks:
        scores = model(input_ids=torch.tensor([block])).logits.log_softmax(-1)[0]
        losses += [-float(scores[place, token]) for place, token in enumerate(block[1:])]
    return sum(losses) / len(losses)


def test_perplexity_of_models_side_by_side(causal: Path, tmp_path: Path, run: Run) -> None:
    models, file = [causal / "full", causal / "merged"], tmp_path / "figures.json"
    options = ["--data", causal / "text.txt", "--max-length", 8, "--batch-size", 2, "--json", file]
    code, out, err = run("evaluate", *models, *options)
    assert code == 0, err
    tokens = [int(word[1:]) for word in TEXT.split()]
    blocks = [tokens[start : start + 8] for start in range(0, len(tokens), 8)]
    found = json.loads(file.read_text())
    assert list(found) == list(map(str, models))
    for path in models:
        model, figures = load_model(str(path)), found[str(path)]
        assert figures["loss"] == pytest.approx(loss(model, blocks), rel=1e-5)
        assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))
        assert figures["parameters"] == model.num_parameters()
        assert figures["bytes_on_disk"] == (path / "model.safetensors").stat().st_size
        shown = [f"{figures['loss']:.3f}", f"{figures['perplexity']:.3f}", f"{figures['parameters']:,}"]
        assert cells(out, path.name)[:3] == shown


@torch.no_grad()
def test_a_causal_model_chooses_by_likelihood(causal: Path, tmp_path: Path, run: Run) -> None:
    made = [
        {"sentence": f"w{50 + n} _ w{60 + n} w70", "option1": f"w{80 + n}", "option2": f"w{90 + n}", "answer": "1"}
        for n in range(10)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, made)))
    options = ["--task", "WinoGrande", "--file", tmp_path / "rows.jsonl", "--json", tmp_path / "figures.json"]
    code, _, err = run("evaluate", causal / "merged", *options, "--limit", 9)
    assert code == 0, err
    model, right = load_model(str(causal / "merged")), 0
    for n in range(9):
        values = []
        for option in (80, 90):
            block = [50 + n, option + n, 60 + n, 70]
            scores = model(input_ids=torch.tensor([block])).logits.log_softmax(-1)[0]
            values.append(float(scores[1, block[2]] + scores[2, block[3]]))
        right += values[0] > values[1]
    assert 0 < right < 9
    (figures,) = json.loads((tmp_path / "figures.json").read_text()).values()
    assert figures["accuracy"] == pytest.approx(100 * right / 9)
    assert figures["examples"] == 9


@torch.no_grad()
@pytest.mark.parametrize("by", [None, "generation", "likelihood"])
def test_an_encoder_decoder_on_a_task(by: str | None, folder: Path, tmp_path: Path, run: Run) -> None:
    options = ["--task", "copa", "--file", folder / "evaluation.jsonl", "--json", tmp_path / "figures.json"]
    code, out, err = run("evaluate", folder / "model", *options, *(["--by", by] if by else []), "--batch-size", 4)
    assert code == 0, err
    model, words, right, answered = load_model(str(folder / "model")), load_tokenizer(str(folder / "model")), 0, 0
    for row in rows(11, shift=4):
        text = f"copa choice1: x choice2: y premise: {row['premise']} question: {row['question']}"
        source = words(text, return_tensors="pt")["input_ids"]
        labels = [words.convert_tokens_to_ids(label) for label in ("choice1", "choice2")]
        if by == "likelihood":
            targets = [torch.tensor([[label, 1]]) for label in labels]
            losses = [float(model(input_ids=source, labels=target).loss) for target in targets]
            answer = losses.index(min(losses))
        else:
            written = model.generate(input_ids=source, max_new_tokens=8, do_sample=False)[0]
            kept = [int(token) for token in written if token not in (0, 1)]
            answer = labels.index(kept[0]) if len(kept) == 1 and kept[0] in labels else None
        right += answer == row["label"]
        answered += answer is not None
    (figures,) = json.loads((tmp_path / "figures.json").read_text()).values()
    assert figures["accuracy"] == pytest.approx(100 * right / 11)
    assert figures["no_label"] == pytest.approx(100 * (11 - answered) / 11)
    assert cells(out, "model")[2] == "11"


@torch.no_grad()
def test_an_encoder_decoder_on_texts_with_targets(folder: Path, tmp_path: Path, run: Run) -> None:
    made = [{"text": f"copa letter{n}", "answer": f"letter{n + 1}"} for n in range(5)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, made)))
    options = ["--data", tmp_path / "rows.jsonl", "--column", "text", "--target-column", "answer"]
    code, _, err = run("evaluate", folder / "model", *options, "--json", tmp_path / "figures.json")
    assert code == 0, err
    model, words = load_model(str(folder / "model")), load_tokenizer(str(folder / "model"))
    encoded = [{key: words(row[key], return_tensors="pt")["input_ids"] for key in row} for row in made]
    losses = [float(model(input_ids=item["text"], labels=item["answer"]).loss) for item in encoded]
    (figures,) = json.loads((tmp_path / "figures.json").read_text()).values()
    assert figures["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


WRONG = {
    "nothing to read": ([], "either --task or --data"),
    "both": (["--data", "{text}", "--task", "copa"], "either --task or --data"),
    "task": (["--task", "winogrand"], "Did you mean 'winogrande'?"),
    "free text": (["--task", "squad", "--file", "{squad}"], "has free answers"),
    "generation": (["--task", "copa", "--file", "{copa}", "--by", "generation"], "would repeat the question"),
    "way": (["--task", "copa", "--file", "{copa}", "--by", "likelyhood"], "Did you mean 'likelihood'?"),
    "way of text": (["--data", "{text}", "--by", "likelihood"], "--by goes with --task"),
    "no file": (["--task", "copa", "--file", "missing.jsonl"], "There is no file missing.jsonl"),
    "no folder": (["--task", "copa", "--data-dir", "missing"], "There is no folder missing"),
    "no data set": (["--task", "copa", "--data-dir", "."], "has no split 'validation' here"),
    "other rows": (["--task", "mrpc", "--file", "{copa}"], "does not fit task 'mrpc'"),
    "two places": (["--task", "copa", "--file", "{copa}", "--split", "test"], "leave out --data-dir and --split"),
    "column of a task": (["--task", "copa", "--file", "{copa}", "--column", "x"], "--column goes with --data"),
    "folder of a text": (["--data", "{text}", "--data-dir", "."], "--data-dir goes with --task"),
    "column": (["--data", "{copa}", "--column", "x"], "no column 'x'"),
    "labels": (["--task", "boolq", "--file", "{boolq}"], "turns the label 'False'"),
    "dtype": (["--data", "{text}", "--dtype", "float7"], "no floating-point dtype"),
    "tokenizer": (["--data", "{text}", "--tokenizer", "./none"], "no tokenizer that loads"),
    "other tokenizer": (["--data", "{text}", "--tokenizer", "{larger}"], "belongs to another model"),
    "json": (["--data", "{text}", "--json", "missing/figures.json"], "cannot be written"),
    "second model": (["./missing", "--data", "{text}"], "is no folder with a model"),
    "no text": (["{classifier}", "--data", "{text}"], "writes no text"),
}


@pytest.fixture(scope="module")
def files(causal: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write rows of tasks, a tokenizer of more words, and a model that writes no text."""
    path = tmp_path_factory.mktemp("files")
    made = {
        "copa": rows(2),
        "boolq": [{"question": "q", "passage": "p", "label": 0}],
        "squad": [{"question": "q", "context": "c", "answers": {"text": ["c"]}}],
    }
    for name, content in made.items():
        (path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, content)))
    larger = word_tokenizer()
    larger.add_tokens([f"w{number}" for number in range(128, 200)] + ["w50 w51"])
    larger.save_pretrained(path / "larger")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForSequenceClassification(LlamaConfig(vocab_size=16, **sizes)).save_pretrained(path / "classifier")
    names = {name: path / f"{name}.jsonl" for name in made}
    return names | {"text": causal / "text.txt", "larger": path / "larger", "classifier": path / "classifier"}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_requests_are_one_sentence_before_any_model_is_loaded(
    case: str,
    causal: Path,
    files: dict[str, Path],
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hf_mcsmoe.cli.evaluate.load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    arguments, message = WRONG[case]
    code, _, err = run("evaluate", causal / "full", *(argument.format(**files) for argument in arguments))
    assert code == 1
    assert message in err
    assert err.startswith("Error: ")
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_figures_of_models_that_are_done_are_kept(causal: Path, tmp_path: Path, run: Run) -> None:
    damaged = shutil.copytree(causal / "full", tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes((damaged / "model.safetensors").read_bytes()[:1000])
    options = ["--data", causal / "text.txt", "--json", tmp_path / "figures.json"]
    code, _, err = run("evaluate", causal / "merged", damaged, *options)
    assert code == 1
    assert "Cannot load" in err
    assert list(json.loads((tmp_path / "figures.json").read_text())) == [str(causal / "merged")]
