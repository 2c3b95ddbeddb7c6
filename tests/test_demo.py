"""The demo: its shipped figures hold, and the methods it compares differ as it says."""

import json
import re
from pathlib import Path

import pytest

from hf_mcsmoe import demo
from hf_mcsmoe.layers.loading import load_model, load_tokenizer


@pytest.fixture(scope="module")
def results() -> dict[str, demo.Result]:
    return {row.name: row for row in demo.run(0.5)}


@pytest.mark.slow
def test_the_original_has_the_figures_that_its_folder_states(results: dict[str, demo.Result]) -> None:
    stated = json.loads((demo.ASSETS / "figures.json").read_text())["all"]
    assert results["original"].loss == pytest.approx(stated["loss"], rel=1e-3)
    assert results["original"].accuracy == pytest.approx(stated["accuracy"], abs=0.005)


def test_msmoe_is_better_than_averaging_random_groups_and_pruning(results: dict[str, demo.Result]) -> None:
    msmoe = results["M-SMoE"]
    assert results["original"].accuracy > msmoe.accuracy
    for other in (results[name] for name in demo.METHODS if name != "M-SMoE"):
        assert msmoe.accuracy > other.accuracy + 0.02, other.name
        assert msmoe.loss < 0.9 * other.loss, other.name
        assert other.parameters == msmoe.parameters


def test_the_refit_recovers_most_of_what_the_merge_cost(results: dict[str, demo.Result]) -> None:
    original, merged, refitted = (results[name] for name in ("original", "M-SMoE", "M-SMoE, refit"))
    assert original.accuracy - refitted.accuracy < 0.25 * (original.accuracy - merged.accuracy)
    assert refitted.parameters == merged.parameters
    small = results["MC-SMoE, refit"]
    assert small.parameters < 0.6 * merged.parameters
    assert small.accuracy > results["plain averaging"].accuracy


def test_a_size_does_better_than_merging_or_bits_alone(results: dict[str, demo.Result]) -> None:
    merged, rounded, mixture = (results[name] for name in (demo.ONE, demo.BITS, demo.MIXTURE))
    assert mixture.bytes <= rounded.bytes < merged.bytes
    assert mixture.loss < rounded.loss < 0.5 * merged.loss


def test_the_readme_shows_these_figures(results: dict[str, demo.Result]) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    for row in results.values():
        shown = re.search(rf"\n {row.name} +([\d.]+) +([\d.]+)% +{row.parameters:,} ", readme)
        assert shown, row
        # Numbers of threads and processors move the last digit.
        assert float(shown[1]) == pytest.approx(row.loss, abs=0.0015), row
        assert float(shown[2]) == pytest.approx(100 * row.accuracy, abs=0.9), row


def test_half_of_the_experts_are_gone(results: dict[str, demo.Result]) -> None:
    model = load_model(str(demo.ASSETS / "model"), dtype="float32")
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    for row in (results[name] for name in ("original", *demo.METHODS)):
        assert row.parameters == model.num_parameters() - (experts // 2 if row.name != "original" else 0)
        assert row.bytes == 4 * row.parameters


def test_accuracy_is_that_of_generated_text() -> None:
    folder = str(demo.ASSETS / "model")
    model, tokenizer, examples = load_model(folder), load_tokenizer(folder), demo.demo_examples("evaluation")[:6]
    model.float()
    answers = []
    for item in examples:
        ids = tokenizer(item.source, return_tensors="pt").input_ids
        generated = model.generate(input_ids=ids, max_new_tokens=30, do_sample=False)
        answers.append(tokenizer.decode(generated[0], skip_special_tokens=True) == item.targets[0])
    assert demo.evaluate(model, tokenizer, examples)["accuracy"] == pytest.approx(sum(answers) / 6)
