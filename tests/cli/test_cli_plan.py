"""`hf-mcsmoe plan`: sizes without data, and with what choices cost from a file, before anything is written."""

import re
from pathlib import Path

import pytest
from families import build
from helpers import Run, batches

from hf_mcsmoe import MergeConfig, collect_statistics
from hf_mcsmoe.calibration.curves import LayerCurves, Part
from hf_mcsmoe.methods.choice import Grid
from hf_mcsmoe.search.conditions import conditions
from hf_mcsmoe.search.config import JOINT, SizeConfig


def _share(text: str, method: str) -> float:
    """Return the share of the source that a line of the table tells."""
    line = next(line for line in text.splitlines() if method in line)
    return float(re.search(r"\b[01]\.\d{3}\b", line)[0])


def test_plan_tells_sizes_and_with_curves_what_they_cost(tmp_path: Path, run: Run) -> None:
    model, folder, scores = build("qwen3_moe"), tmp_path / "model", tmp_path / "scores.safetensors"
    model.save_pretrained(folder)
    code, out, _ = run("plan", str(folder))
    assert code == 0
    assert "all experts at 4 bits" in out
    assert "50% of the experts, pruned" in out
    code, half, _ = run("plan", str(folder), "--dtype", "bfloat16")
    assert code == 0
    sizes = [_share(text, "50% of the experts, pruned") for text in (out, half)]
    assert sizes[1] == pytest.approx(sizes[0] / 2, rel=0.1), "the file is float32"
    statistics = collect_statistics(model, batches("qwen3_moe", model))
    statistics.save(scores)
    code, _, error = run("plan", str(folder), "--scores", str(scores))
    assert code == 1
    assert "not what choices cost" in error
    for name, sums in statistics.layers.items():
        experts = len(sums.counts)
        parts = {Grid(bits, size): Part(4.0**-bits, 4.0**-bits) for bits in (8, 4, 3, 2) for size in range(1, 129)}
        reduced = {count: Part(1 / count, 1 / count) for count in range(1, experts)}
        low_rank = {rank: dict.fromkeys((0, 8, 4, 3, 2), Part(2.0, 2.0)) for rank in range(1, 65)}
        statistics.curves[name] = LayerCurves(experts, {"merge": reduced}, parts, parts, low_rank)
    statistics.save(scores)
    code, _, error = run("plan", str(folder), "--scores", str(scores))
    assert code == 1
    assert "What choices cost was measured with bits None" in error, "nobody knows how it was"
    statistics.conditions = conditions(MergeConfig(), SizeConfig(), JOINT)
    statistics.save(scores)
    code, out, error = run("plan", str(folder), "--scores", str(scores))
    assert code == 0, error
    rows = [line.split() for line in out.splitlines() if line.strip().startswith("chosen")]
    effects = [float(row[-1]) for row in rows]
    assert len(rows) > 1
    assert effects == sorted(effects)
    assert not list(tmp_path.glob("*.mcsmoe-work"))
