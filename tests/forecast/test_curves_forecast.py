"""What measuring choices is told to take, against what is counted while they are measured."""

from typing import Any

import pytest
import torch
from families import build

from hf_mcsmoe import MergeConfig, collect_statistics
from hf_mcsmoe.cli.way import swept
from hf_mcsmoe.forecast.curves import alignments, curves_work, fits, probed_tokens, rounding_work
from hf_mcsmoe.forecast.fitting import Work
from hf_mcsmoe.forecast.result import Result
from hf_mcsmoe.forecast.run import run_of
from hf_mcsmoe.forecast.sizes import sizes_of
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.methods import alignment
from hf_mcsmoe.search import bench
from hf_mcsmoe.search.bench import Bench
from hf_mcsmoe.search.config import SizeConfig
from hf_mcsmoe.search.curves import measure_curves, needs_of

ROWS, LENGTH = 10, 40


@pytest.mark.parametrize(
    "search", [SizeConfig(bits=(4, 2), ranks=(2,)), SizeConfig(bits=(), ranks=(), reduce="merge")]
)
def test_as_much_is_tried_as_is_told(search: SizeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = build("qwen3_moe"), MergeConfig()
    layers = Layers.of(model)
    run = run_of(layers, Result({}, 0, 0, 0), config, repair="joint", rows=ROWS, judged=0, length=LENGTH)
    run = swept(run, layers, config, {"size": search, "low_rank": None}, None)
    sizes = sizes_of(layers)
    tokens = torch.randint(3, 60, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in tokens.split(5)]
    statistics = collect_statistics(layers, batches, needs_of(config, search))
    refit, assigned = Bench._refit, alignment.assigned
    fitted, aligned, passed = list[int](), list[int](), list[int]()

    def fitting(own: Bench, fit: Any) -> None:
        fitted.append(fit.experts.num_experts)
        refit(own, fit)

    def aligning(costs: torch.Tensor) -> torch.Tensor:
        aligned.append(len(costs))
        return assigned(costs)

    monkeypatch.setattr(Bench, "_refit", fitting)
    monkeypatch.setattr(alignment, "assigned", aligning)
    monkeypatch.setattr(bench, "quantize_layer", lambda *_: {})  # which takes long, and is not counted here
    model.register_forward_pre_hook(lambda _, __, given: passed.append(given["input_ids"].numel()), with_kwargs=True)
    measure_curves(layers, statistics, batches, config, search)
    assert sorted(fitted) == sorted(fits(sizes, run) * len(layers))
    assert len(aligned) == alignments(sizes, run)
    assert sum(passed) - ROWS * LENGTH == probed_tokens(sizes, run), "beside those that inputs are taken of"


def test_what_is_not_measured_takes_nothing() -> None:
    layers = Layers.of(build("qwen3_moe"))
    run, sizes = run_of(layers, Result({}, 0, 0, 0), MergeConfig(), rows=ROWS, judged=0), sizes_of(layers)
    assert curves_work(sizes, run) == Work()
    assert (alignments(sizes, run), probed_tokens(sizes, run)) == (0, 0)


def test_a_rounding_factorises_the_moments_of_both_matrices() -> None:
    sizes = sizes_of(Layers.of(build("qwen3_moe")))
    d, f = sizes.hidden_size, sizes.intermediate_size
    errors = 4 * (2 * f * d**2 + d * f**2)
    assert rounding_work(sizes, 3).double == pytest.approx(3 * (8 / 3 * (d**3 + f**3) + errors))
