"""`hf-mcsmoe inspect` with text: entropies, labels and stable ranks, and text that tells none."""

import json
import math
from pathlib import Path

import pytest
import torch
from families import build
from helpers import Run
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from hf_mcsmoe import moe_layers

ROWS = [{"text": f"a {word} " * 30, "kind": kind} for kind, word in (("one", "b"), ("two", "c"), ("one", "d"))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small model with a tokenizer, whose routers send each word to experts of its own."""
    folder = tmp_path_factory.mktemp("inspected") / "model"
    built = build("mixtral")
    built.save_pretrained(folder)
    vocabulary = {word: number for number, word in enumerate(("[UNK]", "[PAD]", "a", "b", "c", "d"))}
    words = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)
    return folder


def _rows(out: str, title: str) -> dict[str, list[str]]:
    lines = out.partition(title)[2].partition("mean stable rank")[0].splitlines()
    found = [line.split() for line in lines if line.strip().startswith("model.")]
    return {name: figures for name, *figures in found}


def test_text_with_labels_is_measured(model: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    code, out, error = run("inspect", str(model), "--data", str(data), "--label-column", "kind", "--stable-rank")
    assert code == 0, error
    assert "labels: one, two" in out
    layers = moe_layers(build("mixtral"))
    measured = _rows(out, "specialisation of the experts on 3 samples")
    ranks = _rows(out.replace("mean stable", "the stable"), "the stable rank")
    for layer in layers:
        gate, use, most, *_ = (float(value) for value in measured[layer.name][:3])
        assert most == pytest.approx(math.log(layer.num_experts), abs=0.006)
        assert 0 < gate <= most + 0.006
        assert 0 < use <= most + 0.006
        information, _, label = measured[layer.name][-3:]
        assert 0 <= float(information) <= float(label)
        assert float(label) == pytest.approx(-(math.log(2 / 3) * 2 + math.log(1 / 3)) / 3, abs=0.02)
        with layer.open() as experts:
            values = [torch.linalg.svdvals(experts.expert(e)["up"].double()) ** 2 for e in range(len(experts))]
        expected = sum(float(value.sum() / value.max()) for value in values) / len(values)
        assert float(ranks[layer.name][1]) == pytest.approx(expected, abs=0.06)


REFUSED = [
    (["--label-column", "kind"], "is a column of one --data"),
    (["--data", "{data}", "--label-column", "knid"], "has no column 'knid'"),
    (["--data", "{data}", "--label-column", "text", "--column", "text"], "cannot hold both"),
    (["--data", "{texts}", "--label-column", "kind"], "holds texts, not rows with columns"),
    (["--data", "{many}", "--label-column", "kind"], "holds 101 different values"),
    (["--data", "{data}missing.jsonl"], "There is no file"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_text_that_tells_no_label_is_refused(
    options: list[str], message: str, model: Path, run: Run, tmp_path: Path
) -> None:
    files = {name: tmp_path / f"{name}.jsonl" for name in ("data", "texts", "many")}
    files["data"].write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    files["texts"].write_text('"a b"\n"a c"\n')
    files["many"].write_text("".join(json.dumps({"text": "a", "kind": number}) + "\n" for number in range(101)))
    code, _, error = run("inspect", str(model), *(part.format(**files) for part in options))
    assert code == 1
    assert message in " ".join(error.split())
