"""The trained models of the shared data: merges equal the oracle's, and planted twins are found and merge for free."""

import copy
import functools
import json
import math
import sys
from pathlib import Path

import oracle
import pytest
import torch
from helpers import Batch, relative_error, shuffled
from layouts import LAYOUTS
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel

from hf_mcsmoe import (
    LoSparseConfig,
    MergeConfig,
    RepairConfig,
    collect_statistics,
    compact,
    decompose_experts,
    merge_experts,
    moe_layers,
    plan_merge,
    repair_experts,
)
from hf_mcsmoe.low_rank.pruning import prune_rows, zero_shot_importance
from hf_mcsmoe.methods.view import LayerView

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "benchmarks"))
import compare_causal
import compare_repair

MODELS = Path(__file__).parents[2] / "shared" / "data" / "models"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MODELS.is_dir(), reason="needs the trained models of ../shared/data/models"),
]

SWITCH, QWEN = MODELS / "switch-mini-16e", MODELS / "qwen3moe-mini-16e"
FAMILIES = {
    "switch_transformers": oracle.Family("router", "classifier.weight", 1, oracle.over_all, capacity=64),
    "qwen3_moe": oracle.Family("gate", "weight", 2, oracle.over_picks),
}


@functools.cache
def _qwen() -> tuple[PreTrainedModel, list[Batch]]:
    """Load the model and cut its text into batches of eight rows of 128 tokens."""
    ids = AutoTokenizer.from_pretrained(QWEN)((QWEN / "validation.txt").read_text()[:60_000])["input_ids"]
    rows = torch.tensor(ids[: len(ids) // 1024 * 1024]).view(-1, 8, 128)
    return AutoModelForCausalLM.from_pretrained(QWEN).eval(), [{"input_ids": batch} for batch in rows]


@functools.cache
def _switch() -> tuple[PreTrainedModel, list[Batch]]:
    """Load the model and give it, per domain, the beginnings of texts to read and their ends to write; padded."""
    tokenizer = AutoTokenizer.from_pretrained(SWITCH)
    batches = []
    for text in json.loads((SWITCH / "validation_text.json").read_text()).values():
        parts = [text[start : start + 300] for start in range(0, 2400, 300)]
        source = tokenizer([part[:200] for part in parts], padding=True, truncation=True, max_length=60)
        target = tokenizer([part[200:] for part in parts], padding=True, truncation=True, max_length=60)
        labels = torch.tensor(target["input_ids"]).masked_fill(torch.tensor(target["attention_mask"]) == 0, -100)
        batches.append(
            {key: torch.tensor(source[key]) for key in ("input_ids", "attention_mask")} | {"labels": labels}
        )
    return AutoModelForSeq2SeqLM.from_pretrained(SWITCH).eval(), batches


def _keep(batch: Batch, in_encoder: bool) -> list[bool]:
    if "labels" not in batch:
        return [True] * batch["input_ids"].numel()
    real = batch["attention_mask"] == 1 if in_encoder else batch["labels"] != -100
    return real.flatten().tolist()


@functools.cache
def _sums(name: str) -> dict[str, oracle.Sums]:
    model, batches = {"qwen3_moe": _qwen, "switch_transformers": _switch}[name]()
    seen = oracle.observe(model, FAMILIES[name], batches[:4])
    return {
        layer: oracle.sums(tokens, [kept for batch in batches[:4] for kept in _keep(batch, "encoder" in layer)])
        for layer, tokens in seen.items()
    }


@pytest.mark.parametrize("budget", ["adaptive", "uniform"])
@pytest.mark.parametrize("name", FAMILIES)
def test_groups_and_merged_weights_equal_the_oracle(name: str, budget: str) -> None:
    model, batches = {"qwen3_moe": _qwen, "switch_transformers": _switch}[name]()
    plan = plan_merge(model, collect_statistics(model, batches[:4]), MergeConfig(experts=8, budget=budget))
    merged = merge_experts(model, plan)
    sums = _sums(name)
    kept = oracle.budget([layer.counts for layer in sums.values()], 8 * len(sums))
    assert len(set(kept)) > 1, "or the two budgets would not differ"
    for position, (before, after) in enumerate(zip(moe_layers(model), moe_layers(merged), strict=True)):
        expected = sums[before.name]
        number = kept[position] if budget == "adaptive" else 8
        expert_map, dominant = oracle.group(expected, number)
        found = plan.layers[before.name]
        assert (found.expert_map, found.dominant) == (expert_map, dominant)
        assert after.num_experts == number
        experts = [LAYOUTS[name].before(before.container, index) for index in range(16)]
        for target, first in enumerate(dominant):
            members = [index for index in range(16) if expert_map[index] == target]
            weights = oracle.merged(experts, members, first, expected.counts)
            stored = LAYOUTS[name].after(after.container, target)
            assert all(relative_error(stored[role], value) < 1e-6 for role, value in weights.items())


@torch.no_grad()
def _perplexity(model: PreTrainedModel, batches: list[Batch]) -> float:
    losses = []
    for batch in batches:
        scores = model(**batch).logits[:, :-1].flatten(0, 1)
        losses.append(torch.nn.functional.cross_entropy(scores, batch["input_ids"][:, 1:].flatten()).item())
    return math.exp(sum(losses) / len(losses))


def _with_twins(noise: float) -> PreTrainedModel:
    """Replace experts 8 to 15 by shuffled, slightly noisy copies of 0 to 7, and their router rows by copies."""
    model = copy.deepcopy(_qwen()[0])
    for number, layer in enumerate(moe_layers(model)):
        layer.router.weight.data[8:] = layer.router.weight.data[:8]
        for index in range(8):
            twin = LAYOUTS["qwen3_moe"].before(layer.container, index + 8)
            original = LAYOUTS["qwen3_moe"].before(layer.container, index)
            for role, value in shuffled(original, seed=16 * number + index).items():
                generator = torch.Generator().manual_seed(index)
                twin[role].copy_(value + noise * value.std() * torch.randn(value.shape, generator=generator))
    return model


def _first_half(view: LayerView) -> torch.Tensor:
    """Let one of each pair be dominant: by frequency both would be, for every token picks both."""
    return view.sums.frequency + (torch.arange(16) < 8)


def test_planted_twins_are_found_and_merged_for_free_once_aligned() -> None:
    model, batches = _with_twins(noise=1e-3), _qwen()[1]
    statistics = collect_statistics(model, batches[:4])
    options = {"experts": 8, "budget": "uniform", "saliency": _first_half, "weighting": "uniform"}
    before, after = _perplexity(model, batches[4:]), {}
    for alignment in ("weight_matching", "none"):
        plan = plan_merge(model, statistics, MergeConfig(**options, alignment=alignment))
        assert {tuple(layer.expert_map) for layer in plan.layers.values()} == {(*range(8), *range(8))}
        after[alignment] = _perplexity(merge_experts(model, plan), batches[4:])
    assert after["weight_matching"] == pytest.approx(before, abs=5e-4)
    assert after["none"] > 1.5 * before


def test_merging_adaptively_with_alignment_beats_random_groups_and_no_alignment() -> None:
    """The order that the paper reports and that the shared data's own trial found, on held-out text."""
    model, batches = _qwen()
    statistics = collect_statistics(model, batches[:8])
    options = {"paper": {}, "random": {"similarity": "random"}, "unaligned": {"alignment": "none"}}
    after = {
        name: _perplexity(
            merge_experts(model, plan_merge(model, statistics, MergeConfig(experts=8, **choice))), batches[8:]
        )
        for name, choice in options.items()
    }
    assert _perplexity(model, batches[8:]) < after["paper"] < min(after["random"], after["unaligned"])


@torch.no_grad()
def _divergence(model: PreTrainedModel, original: PreTrainedModel, data: list[Batch]) -> float:
    """Return the mean KL from the original's predictions over all labels that count."""
    total, count = 0.0, 0
    for batch in data:
        ours, theirs = (one(**batch).logits.log_softmax(-1) for one in (model, original))
        counted = batch["labels"] != -100
        total += float((theirs.exp() * (theirs - ours)).sum(-1)[counted].sum())
        count += int(counted.sum())
    return total / count


def test_rows_by_importance_keep_nearer_to_the_original_than_rows_by_magnitude() -> None:
    model, data = _switch()
    plan = plan_merge(model, collect_statistics(model, data), MergeConfig(experts=8, budget="uniform"))
    start = decompose_experts(merge_experts(model, plan), LoSparseConfig(rank=8, keep=0.1, factorisation="svd"))
    found = {}
    for importance in ("sensitivity", "magnitude"):
        student = copy.deepcopy(start)
        prune_rows(student, zero_shot_importance(student, data[::2], importance=importance), 0.1)
        found[importance] = _divergence(compact(student), model, data[1::2])
    assert found["sensitivity"] < found["magnitude"]


def test_a_refit_and_low_rank_storage_without_training_stay_near_the_original() -> None:
    """At a tenth of the expert parameters nearer to the original than the merge alone was at half of them."""
    model, tokenizer = _switch()[0], AutoTokenizer.from_pretrained(SWITCH)
    parts = compare_repair.halves(tokenizer, compare_repair.texts_of(SWITCH / "validation_text.json"), 96)
    calibration, evaluation = (compare_repair.batches_of(model, tokenizer, rows) for rows in parts)
    calibration = [dict(batch) for batch in calibration]  # as one data set: no kind of text is left out
    evaluation = evaluation[:16]
    plan = plan_merge(model, collect_statistics(model, calibration), MergeConfig(experts=8, budget="uniform"))
    student = merge_experts(model, plan)
    before, dense = _divergence(student, model, evaluation), student.num_parameters()
    repair_experts(
        student, model, calibration, RepairConfig(elsewhere=0.0, made=0.0, caution=0.0)
    )  # for text of this kind alone
    repaired = _divergence(student, model, evaluation)
    assert repaired < 0.25 * before
    stored = {}
    for name, data in (("svd", None), ("weighted_svd", calibration)):
        config = LoSparseConfig(rank=8, keep=0.1, factorisation=name)
        small = compact(decompose_experts(copy.deepcopy(student), config, data, prune=True))
        stored[name] = _divergence(small, model, evaluation)
    others = model.num_parameters() - sum(layer.num_parameters for layer in moe_layers(model))
    assert (small.num_parameters() - others) / (dense - others) < 0.2
    assert repaired < stored["weighted_svd"] < 0.6 * before
    assert stored["weighted_svd"] < 0.2 * stored["svd"]


def test_the_causal_comparison_prints_its_table_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text, method = (QWEN / "validation.txt").read_text(), "M-SMoE (adaptive budget)"
    for name, part in (("train", text[:20_000]), ("evaluation", text[20_000:30_000])):
        (tmp_path / f"{name}.txt").write_text(" ".join(part.split()))
    files = ["--train", tmp_path / "train.txt", "--evaluation", tmp_path / "evaluation.txt"]
    options = ["--experts", 8, "--steps", 3, "--rank", 8, "--seeds", 0, "--threads", 1, "--methods", method]
    monkeypatch.setattr(sys, "argv", ["compare_causal.py", *map(str, [QWEN, *files, *options])])
    compare_causal.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| method | perplexity | parameters |")
    table = {name.strip(): cells for _, name, *cells, _ in (line.split("|") for line in lines[2:])}
    assert list(table) == [
        "original",
        *(method + state for state in (", not distilled", "", ", then MC-SMoE")),
    ]
    perplexity = {name: float(cells[0]) for name, cells in table.items()}
    model = AutoModelForCausalLM.from_pretrained(QWEN).eval()
    ids = AutoTokenizer.from_pretrained(QWEN)((tmp_path / "evaluation.txt").read_text(), return_tensors="pt")
    rows = ids["input_ids"][0].split(128)
    with torch.no_grad():
        sums = [float(model(input_ids=row[None], labels=row[None]).loss) * (len(row) - 1) for row in rows]
    expected = math.exp(sum(sums) / sum(len(row) - 1 for row in rows))
    assert perplexity["original"] == pytest.approx(expected, abs=0.006)
    assert perplexity[f"{method}, not distilled"] < 1.5 * expected
    parameters = [int(cells[1].replace(",", "")) for cells in table.values()]
    assert parameters[0] == model.num_parameters() > parameters[1] == parameters[2] > parameters[3]
