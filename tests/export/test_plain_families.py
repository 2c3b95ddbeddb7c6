"""Every family as a plain checkpoint: stock Transformers reads it, with the logits of a router cut in memory."""

import json
import traceback
from pathlib import Path

import pytest
import torch
from families import NO_FEWER_ROWS, build, families, inputs
from helpers import batches, logits
from merged import REFUSED, TESTS, run_python

from hf_mcsmoe import MergeConfig, collect_statistics, merge_experts, plan_merge
from hf_mcsmoe.export import export

SUPPORTED = [family.name for family in families() if family.name not in REFUSED]
# Their routers pick among groups, and need more than half of the eight experts of the tests.
GROUPED = ("axk1", "bailing_hybrid", "beam", "deepseek_v3", "deepseek_v32", "kimi_k25")
REASONS = {
    **dict.fromkeys(GROUPED, "needs 6 at least"),
    **{"deepseek_v4": "fixed experts", "jetmoe": "self_attention", "ernie4_5_vl_moe": "vision_moe"},
}
FAMILIES = [pytest.param(name, marks=pytest.mark.slow) for name in SUPPORTED]


def made(name: str, folder: Path) -> None:
    """Export a family's merged model, plain where it can be and expanded, with the logits that either must have."""
    base = build(name)
    statistics, batch = collect_statistics(base, batches(name, base)), inputs(name, base)
    for kind, router in (("expanded", "map"), ("plain", "weighted")):
        merged = merge_experts(base, plan_merge(base, statistics, MergeConfig(experts=0.5, budget="uniform")))
        if kind == "plain" and name in REASONS:
            with pytest.raises(ValueError, match=REASONS[name]):
                export(merged, folder / f"{name}-{kind}")
            continue
        export(merged, folder / f"{name}-{kind}", expand=kind == "expanded")
        config = MergeConfig(experts=0.5, budget="uniform", router=router)
        expected = merge_experts(base, plan_merge(base, statistics, config))
        torch.save({"batch": batch, "logits": logits(expected, batch)}, folder / f"{name}-{kind}.pt")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return what went wrong in a process without the package, by the folder's name; "" where nothing did."""
    folder = tmp_path_factory.mktemp("plain")
    failed = {}
    for name in SUPPORTED:
        try:
            with torch.no_grad():
                made(name, folder)
        except Exception:  # is told of this family alone
            failed[f"{name}-expanded"] = traceback.format_exc()
    paths = [str(path) for path in sorted(folder.iterdir()) if path.is_dir()]
    done = run_python([str(TESTS / "plain_without_package.py"), *paths], folder)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "report.json").read_text()) | failed


@pytest.mark.parametrize("name", FAMILIES)
def test_stock_transformers_reads_plain_and_expanded_checkpoints(name: str, report: dict[str, str]) -> None:
    kinds = ("expanded",) if name in REASONS else ("expanded", "plain")
    assert [report[f"{name}-{kind}"] for kind in kinds] == ["" for _ in kinds]
    assert (f"{name}-plain" in report) == (name not in REASONS)


def test_the_page_names_the_families_that_can_only_be_expanded() -> None:
    assert REASONS.keys() - set(GROUPED) == NO_FEWER_ROWS.keys()
