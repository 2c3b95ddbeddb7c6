"""Plain routers that are fitted: what does best on held-out rows stays, and nothing but the router changes."""

from pathlib import Path

import pytest
import torch
from families import build
from helpers import batches
from merged import merge

from hf_mcsmoe import MergeConfig
from hf_mcsmoe.export import RouterFit, export
from hf_mcsmoe.export.calibrate import COMBINED, DISTILLED, MERGED, RIDGE


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
