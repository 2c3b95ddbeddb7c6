"""What `compress` says of the result: good by default, on rows that nothing was fitted to, beside the sizes."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from helpers import Run, logits
from huggingface_hub import ModelCard
from transformers import PreTrainedTokenizerFast

from hf_mcsmoe import compress
from hf_mcsmoe.attached import record_of
from hf_mcsmoe.layers.loading import load_model

ROWS = [f"what is {number} {other} {(number * other) % 10}" for number in range(8) for other in range(8)]


@pytest.fixture
def folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    for name in ("mixtral", "switch_transformers"):
        build(name).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "mixtral" / "README.md").write_text("---\nlanguage: [en, fr]\nlicense: mit\n---\n# Mine\n")
    (tmp_path / "text.txt").write_text("\n".join(ROWS))
    return tmp_path


def _printed(out: str) -> dict[str, list[str]]:
    """Return the cells of the printed tables by their row."""
    rows = (re.split("  +", line.strip()) for line in out.splitlines())
    return {label: cells for label, *cells in rows}


@pytest.mark.filterwarnings("ignore:The repair left")
@pytest.mark.parametrize("name", ["mixtral", "switch_transformers"])
def test_it_repairs_by_default_and_tells_loss_and_divergence_of_rows_that_no_fit_saw(
    name: str, folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Any, Any]] = []

    def spied(model: Any, batches: Any, *arguments: Any, held_out: Any, **options: Any) -> Any:
        seen.append((batches, held_out))
        return compress(model, batches, *arguments, held_out=held_out, **options)

    monkeypatch.setattr("hf_mcsmoe.cli.compress.compress", spied)
    options = ["--data", folder / "text.txt", "--experts", "4", "--num-samples", "40", "--output", folder / "out"]
    code, out, err = run("compress", folder / name, *options)
    assert code == 0, err
    fitted, held_out = ([tuple(row) for batch in part for row in batch["input_ids"].tolist()] for part in seen[0])
    assert (len(fitted), len(held_out)) == (35, 5)
    assert not set(fitted) & set(held_out)
    loaded = load_model(str(folder / "out"))
    record = record_of(loaded)
    assert [step.title for step in record.steps] == ["Repair"]
    assert (record.calibration.data, record.calibration.rows, record.calibration.held_out) == (["text.txt"], 40, 5)
    assert list(record.quality) == ["original", "merged", "repaired"]
    figures = {
        label: [f"{vars(q)[key]:.4g}" for q in record.quality.values()]
        for label, key in (("loss", "loss"), ("KL to the original", "kl"))
    }
    printed = _printed(out)
    assert {label: printed[label] for label in figures} == figures
    assert "on 5 of 40 rows" in out
    assert out.index("KL to the original") < out.index("bytes on disk")
    text = (folder / "out" / "README.md").read_text()
    for label, cells in figures.items():
        assert f"| {label} | {' | '.join(cells)} |" in text
    assert "on 5 of the 40 calibration rows that" in text
    kept = [model.eval() for model in (load_model(str(folder / name)), loaded)]
    before, after = (
        torch.cat([logits(model, batch).double().log_softmax(-1)[_counted(model, batch)] for batch in seen[0][1]])
        for model in kept
    )
    expected = float((before.exp() * (before - after)).sum(-1).mean())
    assert record.quality["repaired"].kl == pytest.approx(expected, rel=1e-3, abs=1e-7)


def _counted(model: Any, batch: Any) -> torch.Tensor:
    """Return the positions [batch, length] that tell of something."""
    if model.config.is_encoder_decoder:
        return batch["labels"] != -100
    counted = batch["attention_mask"].bool()
    return torch.cat([counted[:, 1:], torch.zeros_like(counted[:, :1])], 1)


@pytest.mark.filterwarnings("ignore:The repair left", "ignore:Few calibration tokens")
def test_the_card_declares_what_is_known_and_its_snippet_runs(
    folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--data", folder / "text.txt", "--experts", "4", "--num-samples", "16", "--output", folder / "out"]
    code, _, err = run("compress", folder / "mixtral", *options)
    assert code == 0, err
    card, record = ModelCard.load(folder / "out" / "README.md"), record_of(load_model(str(folder / "out")))
    assert (card.data.language, card.data.license, card.data.model_name) == (["en", "fr"], "mit", "out")
    assert card.data.datasets is None, "a file is no data set of the Hub"
    quality = record.quality["repaired"]
    assert [(item.metric_type, item.metric_value) for item in card.data.eval_results] == [
        ("loss", quality.loss),
        ("kl_divergence", quality.kl),
    ]
    assert {item.dataset_type for item in card.data.eval_results} == {"text.txt"}
    assert f"torch {torch.__version__}" in card.text
    snippet = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)[0]
    monkeypatch.chdir(folder)
    printed: list[str] = []
    exec(snippet, {"print": printed.append})
    assert len(printed) == 1
    assert isinstance(printed[0], str)


@pytest.mark.filterwarnings("ignore:The repair left", "ignore:Few calibration tokens")
def test_too_few_rows_and_nothing_to_repair_are_told(folder: Path, run: Run) -> None:
    options = ["--data", folder / "text.txt", "--num-samples", "7", "--experts", "8", "--output", folder / "out"]
    code, out, err = run("compress", folder / "mixtral", *options)
    assert code == 0, err
    assert "nothing to repair" in out + err
    assert "7 calibration rows are too few to hold an eighth of them out" in out
    record = record_of(load_model(str(folder / "out")))
    assert (record.quality, record.steps, record.calibration.held_out) == ({}, (), 0)
    assert "## Quality" not in record.card


@pytest.mark.filterwarnings("ignore:The repair left")
def test_text_of_another_kind_judges_and_is_told_of_and_named_in_the_recipe(folder: Path, run: Run) -> None:
    (folder / "other.txt").write_text("\n".join(row[::-1] for row in ROWS))
    options = ["--experts", "4", "--num-samples", "40"]
    given = ["--data", folder / "text.txt", "--check-data", folder / "other.txt"]
    code, out, err = run("compress", folder / "mixtral", *given, *options, "--output", folder / "out")
    assert code == 0, err
    record = record_of(load_model(str(folder / "out")))
    assert (record.calibration.check, record.calibration.check_rows) == (["other.txt"], 32)
    last = record.quality["repaired"]
    assert last.check_kl != last.kl
    assert _printed(out)["KL, other text"][-1] == f"{last.check_kl:.4g}"
    assert "on 5 of 40 rows, and 32 of other text (other.txt), that nothing was fitted to" in out
    card = (folder / "out" / "README.md").read_text()
    assert "The other text is 32 rows of other.txt" in card
    results = {(item.dataset_name, item.metric_type): item.metric_value for item in ModelCard(card).data.eval_results}
    assert results["other.txt", "kl_divergence"] == pytest.approx(last.check_kl)
    recipe = folder / "out" / "mcsmoe_recipe.yaml"
    assert "check_data:\n- other.txt\n" in recipe.read_text()
    paths = ["--data", folder / "text.txt", "--check-data", folder / "other.txt", "--output", folder / "again"]
    code, _, err = run("compress", folder / "mixtral", "--config", recipe, *paths)
    assert code == 0, err
    assert record_of(load_model(str(folder / "again"))).quality["repaired"] == last
    code, _, err = run("compress", folder / "mixtral", *given[:3], folder / "text.txt", "--output", folder / "no")
    assert code != 0
    assert "is --data as well, which is fitted to: name other text" in err
