"""Plain routers that are fitted: what does best on held-out rows stays, and nothing but the router changes."""

from pathlib import Path

import pytest
import torch
from families import build
from helpers import batches, logits
from merged import merge

from hf_mcsmoe import MergeConfig, compress
from hf_mcsmoe.attached import record_of
from hf_mcsmoe.export import RouterFit, export
from hf_mcsmoe.export.calibrate import COMBINED, DISTILLED, MERGED, RIDGE, _Routers, plain_model_of
from hf_mcsmoe.export.form import plain_form_of
from hf_mcsmoe.export.ridge import router_sums
from hf_mcsmoe.export.router_rows import row_weights
from hf_mcsmoe.export.write import router_tensors
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.source import source_of
from hf_mcsmoe.progress import silent


def test_the_router_that_does_best_on_held_out_rows_is_written_and_the_rest_stays(tmp_path: Path) -> None:
    base = build("mixtral")
    _, merged = merge(base, "mixtral", MergeConfig(experts=0.5, budget="uniform"))
    rows = batches("mixtral", base, number=3)
    export(merged, tmp_path / "combined")
    record = export(merged, tmp_path / "fitted", fit=RouterFit(rows[:2], rows[2:], base, steps=12))
    measured = {stage: value.kl for stage, value in record.quality.items() if stage != "original"}
    assert measured.keys() == {MERGED, COMBINED, RIDGE, DISTILLED}
    of_plain = {stage: kl or 0.0 for stage, kl in measured.items() if stage != MERGED}
    assert record.judged == min(of_plain, key=lambda stage: of_plain[stage])
    assert of_plain[record.judged] < of_plain[COMBINED]
    states = [type(base).from_pretrained(tmp_path / name).state_dict() for name in ("combined", "fitted")]
    changed = {name for name in states[0] if not torch.equal(states[0][name], states[1][name])}
    assert changed
    assert all(name.endswith("gate.weight") for name in changed)


def test_a_fit_without_held_out_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="judged on held-out ones"):
        RouterFit([{"input_ids": torch.ones(1, 4, dtype=torch.long)}])


def test_without_the_original_its_divergence_stays_that_of_the_compression(tmp_path: Path) -> None:
    base = build("mixtral")
    rows = batches("mixtral", base, number=4)
    merged = compress(base, rows[:2], MergeConfig(experts=0.5, budget="uniform"), held_out=rows[3:])
    told = record_of(merged)
    record = export(merged, tmp_path / "plain", fit=RouterFit(rows[:1], rows[1:2], steps=1, check=rows[2:3]))
    assert record.quality == told.quality
    assert record.judged == ""
    models = [merged, type(base).from_pretrained(tmp_path / "plain")]
    figures = record.steps[-1].figures
    for key, batch in {"kl_to_merged": rows[1], "check_kl_to_merged": rows[2]}.items():
        logs = [logits(model, batch)[:, :-1].log_softmax(-1).flatten(0, 1) for model in models]
        kept = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))[:, 1:].flatten() != 0
        measured = (logs[0].exp() * (logs[0] - logs[1])).sum(-1)[kept].mean()
        assert figures[key][figures["router"]] == pytest.approx(float(measured), rel=1e-3)
    card = (tmp_path / "plain" / "README.md").read_text()
    assert "They chose it" in card
    assert "fitted to the merged model" in card


def test_biases_of_routers_are_distilled_as_well(tmp_path: Path) -> None:
    base = build("gpt_oss")
    _, merged = merge(base, "gpt_oss", MergeConfig(experts=0.5, budget="uniform"))
    rows = batches("gpt_oss", base, number=1)
    form = plain_form_of(Layers.of(source_of(merged)))
    weights = {slot.layer.name: row_weights(slot, "mean", {}) for slot in form.slots}
    routers = _Routers(plain_model_of(form, router_tensors(form, weights)), router_tensors(form, weights))
    before = routers.held()
    routers.distil(RouterFit(rows, rows, base, steps=2), base, silent)
    moved = {
        name.rpartition(".")[2]
        for layer, held in routers.held().items()
        for name, tensor in held.items()
        if not torch.equal(tensor, before[layer][name])
    }
    assert moved == {"weight", "bias"}


def test_nothing_of_a_fit_is_made_on_a_device_of_its_own() -> None:
    merged = merge(build("gpt_oss"), "gpt_oss", MergeConfig(experts=0.5, budget="uniform"))[1]
    form = plain_form_of(Layers.of(source_of(merged)))
    rows = router_tensors(form, {slot.layer.name: row_weights(slot, "mean", {}) for slot in form.slots})
    sums = router_sums(form, batches("gpt_oss", merged, number=1))
    with torch.device("meta"):  # what names no device would land there, and go together with nothing else
        solved = {name: part.solved(rows[name], 0.1) for name, part in sums.items()}
        model = plain_model_of(form, rows)
    tensors = [
        *model.parameters(),
        *model.buffers(),
        *(tensor for held in solved.values() for tensor in held.values()),
    ]
    assert all(held for held in solved.values())
    assert {tensor.device.type for tensor in tensors} == {"cpu"}
