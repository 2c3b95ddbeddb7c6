"""Every family as a plain checkpoint: its own class reads it, with the logits of a router that was cut in memory."""

from pathlib import Path

import pytest
import torch
from families import build, families, inputs
from helpers import batches, logits
from merged import REFUSED

from hf_mcsmoe import MergeConfig, collect_statistics, merge_experts, plan_merge
from hf_mcsmoe.export import export

SUPPORTED = [family.name for family in families() if family.name not in REFUSED]
# Families whose routers pick among groups need more than half of eight experts, and one sends tokens to fixed experts.
GROUPED = ("axk1", "bailing_hybrid", "beam", "deepseek_v3", "deepseek_v32", "kimi_k25")
# One has attention experts of the same number, which are not merged.
REASONS = {**dict.fromkeys(GROUPED, "needs 6 at least"), "deepseek_v4": "fixed experts", "jetmoe": "self_attention"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SUPPORTED if name not in REASONS])
def test_plain_and_expanded_checkpoints_are_read_by_the_familys_own_class(name: str, tmp_path: Path) -> None:
    base = build(name)
    statistics, batch = collect_statistics(base, batches(name, base)), inputs(name, base)
    merged, cut = (
        merge_experts(base, plan_merge(base, statistics, MergeConfig(experts=0.5, budget="uniform", router=router)))
        for router in ("map", "weighted")
    )
    for folder, expand, expected in (("expanded", True, merged), ("plain", False, cut)):
        export(merged, tmp_path / folder, expand=expand)
        again, info = type(base).from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(info.values()), info
        torch.testing.assert_close(logits(again, batch), logits(expected, batch), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", REASONS)
def test_routers_that_cannot_have_so_few_rows_say_so_and_are_expanded(name: str, tmp_path: Path) -> None:
    base = build(name)
    config = MergeConfig(experts=0.5, budget="uniform")
    merged = merge_experts(base, plan_merge(base, collect_statistics(base, batches(name, base)), config))
    with pytest.raises(ValueError, match=REASONS[name]):
        export(merged, tmp_path / "plain")
    export(merged, tmp_path / "expanded", expand=True)
    again, batch = type(base).from_pretrained(tmp_path / "expanded"), inputs(name, base)
    torch.testing.assert_close(logits(again, batch), logits(merged, batch), atol=1e-4, rtol=1e-4)
