"""Loss and divergence on held-out rows: against sums written out, within their memory, and unseen by every fit."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from helpers import batches, logits, state
from huggingface_hub import ModelCard
from merged import example
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    MixtralConfig,
    MixtralModel,
    PreTrainedModel,
)

from hf_mcsmoe import LoSparseConfig, MergeConfig, RepairConfig, compress
from hf_mcsmoe.data.features import split_held_out
from hf_mcsmoe.evaluation.held_out import Judge, judge_of
from hf_mcsmoe.record import Quality, Record

Distributions = list[tuple[list[float], int | None]]


def _written_out(model: PreTrainedModel, data: list[dict[str, torch.Tensor]]) -> Distributions:
    """Return the log-probabilities of each position that counts, and the token that follows, one by one."""
    found = []
    for batch in data:
        scores, given = logits(model, batch).double().log_softmax(-1), batch.get("labels")
        for row, column in ((row, column) for row in range(scores.shape[0]) for column in range(scores.shape[1])):
            if given is not None and given[row, column] != -100:
                found.append((scores[row, column].tolist(), int(given[row, column])))
            elif given is None and column and batch["attention_mask"][row, column]:
                found.append((scores[row, column - 1].tolist(), int(batch["input_ids"][row, column])))
    return found


def _expected(before: Distributions, after: Distributions) -> Quality:
    loss = -sum(row[token] for row, token in after) / len(after)
    pairs = [zip(old, new, strict=True) for (old, _), (new, _) in zip(before, after, strict=True)]
    kl = sum(math.exp(old) * (old - new) for pair in pairs for old, new in pair) / len(after)
    return Quality(loss, kl)


def _data(name: str, model: PreTrainedModel) -> list[dict[str, torch.Tensor]]:
    data = [{key: value.clone() for key, value in batch.items()} for batch in batches(name, model, 3, batch_size=2)]
    if model.config.is_encoder_decoder:
        for batch in data:
            batch["labels"] = batch.pop("decoder_input_ids")
            batch["labels"][0, -4:] = -100
    return data


@pytest.mark.parametrize("name", ["mixtral", "switch_transformers"])
def test_loss_and_divergence_are_those_that_one_would_sum_by_hand(name: str) -> None:
    base, merged = example(name).base, example(name).merged
    data = _data(name, base)
    judge, before = judge_of(base, data), _written_out(base, data)
    judge.measure("merged", merged)
    wanted = {"original": _expected(before, before), "merged": _expected(before, _written_out(merged, data))}
    assert list(judge.quality) == list(wanted)
    assert wanted["merged"].kl > 1e-4
    for stage, quality in wanted.items():
        assert judge.quality[stage].loss == pytest.approx(quality.loss, rel=1e-5)
        assert judge.quality[stage].kl == pytest.approx(quality.kl, rel=1e-3, abs=1e-9)


def test_text_of_another_kind_is_told_apart() -> None:
    base, merged = example("mixtral").base, example("mixtral").merged
    held_out, check = _data("mixtral", base)[:1], _data("mixtral", base)[1:]
    judge = judge_of(base, held_out, check)
    judge.measure("merged", merged)
    ours, theirs = (_expected(_written_out(base, data), _written_out(merged, data)) for data in (held_out, check))
    wanted = (ours.loss, ours.kl, theirs.loss, theirs.kl)
    assert tuple(vars(judge.quality["merged"]).values()) == pytest.approx(wanted, rel=1e-3)
    assert judge.quality["original"].check_kl == 0
    alone = judge_of(base, None, check)
    alone.measure("merged", merged)
    assert alone.quality["merged"] == Quality(None, None, *tuple(vars(judge.quality["merged"]).values())[2:])


def test_of_the_originals_distributions_no_more_is_kept_than_the_limit_and_spread_over_all_batches() -> None:
    base, merged = example("mixtral").base, example("mixtral").merged
    data, vocabulary = _data("mixtral", base), base.config.vocab_size
    judge = Judge(data, memory_limit=3 * 5 * 4 * vocabulary)
    judge.remember(base)
    assert [len(places) for places, _ in judge.kept] == [5, 5, 5]
    assert sum(kept.nbytes for _, kept in judge.kept) <= judge.memory_limit
    judge.measure("merged", merged)
    before, after, total, start = _written_out(base, data), _written_out(merged, data), 0.0, 0
    for (places, _), batch in zip(judge.kept, data, strict=True):
        assert places[0] == 0
        chosen = [start + int(place) for place in places]
        total += _expected([before[place] for place in chosen], [after[place] for place in chosen]).kl * 5
        start += int(batch["attention_mask"][:, 1:].sum())
        assert chosen[-1] == start - 1
    assert judge.quality["merged"].kl == pytest.approx(total / 15, rel=1e-3)
    assert judge.quality["merged"].loss == pytest.approx(_expected(before, after).loss, rel=1e-5), "of all positions"


def _small(kind: Any, **options: Any) -> PreTrainedModel:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(
        vocab_size=64, num_key_value_heads=2, num_local_experts=4, pad_token_id=0, **sizes, **options
    )
    torch.manual_seed(0)
    return (kind.from_config if "Auto" in kind.__name__ else kind)(config)


@pytest.mark.parametrize("case", ["texts", "texts without labels", "tokens"])
def test_classifiers_are_compared_by_their_classes(case: str) -> None:
    kind = AutoModelForTokenClassification if case == "tokens" else AutoModelForSequenceClassification
    base, other = _small(kind, num_labels=3), _small(kind, num_labels=3)
    with torch.no_grad():
        other.score.weight.mul_(3)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    batch = {"input_ids": torch.randint(1, 64, (2, 4)) * mask, "attention_mask": mask}
    batch |= {"labels": torch.tensor([2, 0])} if case == "texts" else {}
    old, new = (logits(model.eval(), batch).double().log_softmax(-1) for model in (base, other))
    divergence = (old.exp() * (old - new)).sum(-1)
    divergence = divergence[mask == 1] if case == "tokens" else divergence
    judge = judge_of(base, [batch])
    judge.measure("other", other)
    assert judge.quality["other"].kl == pytest.approx(float(divergence.mean()), rel=1e-4)
    loss = judge.quality["other"].loss
    assert loss is None if case != "texts" else loss == pytest.approx(-float(new[[0, 1], [2, 0]].mean()), rel=1e-5)


def test_what_tells_no_distribution_is_not_measured() -> None:
    batch = {"input_ids": torch.randint(1, 64, (2, 4))}
    regression = _small(AutoModelForSequenceClassification, num_labels=1)
    for model in (_small(MixtralModel), regression):
        judge = judge_of(model, [batch])
        judge.measure("after", model)
        assert not judge.quality
    assert not judge_of(build("mixtral"), None).quality


STAGES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "merge": ({}, ["original", "merged"]),
    "consumed": ({"consume": True}, ["original", "merged"]),
    "repair": ({"repair": RepairConfig(ridges=(1.0,))}, ["original", "merged", "repaired"]),
    "all": (
        {"repair": RepairConfig(ridges=(1.0,)), "low_rank": LoSparseConfig(rank=2, keep=0.25)},
        ["original", "merged", "repaired", "low rank"],
    ),
}


@pytest.mark.filterwarnings("ignore:The repair left")
@pytest.mark.parametrize("case", STAGES)
def test_held_out_rows_tell_of_every_stage_and_change_none(case: str, tmp_path: Path) -> None:
    options, stages = STAGES[case]
    plain, judged = build("mixtral"), build("mixtral")
    data, held_out = batches("mixtral", plain, 2), batches("mixtral", plain, 5, batch_size=2)[3:]
    expected = compress(plain, data, MergeConfig(experts=4), **options)
    calls: list[tuple[str, int, int | None]] = []
    told = {"progress": lambda *call: calls.append(call)}
    model = compress(judged, data, MergeConfig(experts=4), held_out=held_out, **options, **told)
    assert state(model)["bits"] == state(expected)["bits"], "nothing was fitted to them"
    record = model.mcsmoe_record
    assert list(record.quality) == stages
    number = 2 * len(stages)
    measured = [call for call in calls if call[0] == "measuring"]
    assert measured == [("measuring", done, number) for done in range(1, number + 1)]
    last = _expected(_written_out(build("mixtral"), held_out), _written_out(model, held_out))
    assert record.quality[stages[-1]].kl == pytest.approx(last.kl, rel=1e-3)
    assert record.quality[stages[-1]].loss == pytest.approx(last.loss, rel=1e-5)
    assert Record.from_json(record.to_json()).quality == record.quality
    model.save_pretrained(tmp_path / "out")
    text = ModelCard.load(tmp_path / "out" / "README.md").text
    assert f"|  | {' | '.join(stages)} |" in text.partition("## Quality\n")[2]


def test_an_eighth_of_the_rows_is_held_out_and_none_of_too_few() -> None:
    for number in (1, 7, 8, 15, 16, 256):
        rows = [{"input_ids": [row]} for row in range(number)]
        fitted, held_out = split_held_out(rows)
        assert len(held_out) == number // 8
        assert sorted(row["input_ids"] for row in [*fitted, *held_out]) == [row["input_ids"] for row in rows]
