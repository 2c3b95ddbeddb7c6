"""What a run takes: parts added up by hand, the way that is chosen, and what is measured of this machine."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import build

from hf_mcsmoe import MergeConfig
from hf_mcsmoe.forecast.duration import seconds_of
from hf_mcsmoe.forecast.figures import figures_of
from hf_mcsmoe.forecast.fitting import work_of
from hf_mcsmoe.forecast.machine import Pace, measure_pace, resident
from hf_mcsmoe.forecast.memory import free_memory
from hf_mcsmoe.forecast.needs import IN_MEMORY, STREAMED, WORKING, Run, needs_of
from hf_mcsmoe.forecast.result import result_by_hand
from hf_mcsmoe.forecast.run import run_of
from hf_mcsmoe.forecast.sizes import Sizes, sizes_of
from hf_mcsmoe.forecast.way import NO_WAY, way_for
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.loading import empty_model

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
# Ten blocks of 1,000 bytes, 900 of them in experts, of which the largest weight is 600; 500 bytes outside.
SIZES = Sizes(
    weights=10_500,
    outside=500,
    block=1000,
    experts=900,
    converted=9000,
    joined=600,
    itemsize=2,
    block_count=10,
    layers=10,
    num_experts=8,
    top_k=2,
    hidden_size=10,
    intermediate_size=15,
    vocabulary=50,
)
RUN = Run(result=6000, merged=4500, kept=4, rows=4, judged=0, length=3, batch_size=2, aligned=False, consume=True)
BASE = 10_000


def test_streamed_holds_one_block_and_what_waits() -> None:
    needs = needs_of(SIZES, RUN, 10_500, base=BASE)[STREAMED]
    waiting = 4 * 3 * (10 * 2 + 3)
    block, conversion, merged = 1000, 2 * 600 - 900, 4500 // 10
    assert needs.peak == "statistics"
    flight = 2 * 3 * (2 * (2 * 10 + 4 * 15) * 2 + 50 * 6)
    assert needs.memory == BASE + WORKING + 500 + block + waiting + flight
    loading = sum(needs.phases["loading"].values())
    assert loading == BASE + WORKING + 500 + block + conversion + waiting
    merging = sum(needs.phases["merging"].values())
    assert merging == BASE + WORKING + 500 + block + waiting + merged
    assert (needs.disk, needs.read) == (6000 + waiting, 2 * 10_500)


def test_hidden_states_beyond_the_limit_are_on_disk_only() -> None:
    whole = needs_of(SIZES, RUN, 10_500, base=BASE)[STREAMED]
    limited = needs_of(SIZES, replace(RUN, hidden_limit=100), 10_500, base=BASE)[STREAMED]
    waiting = 4 * 3 * (10 * 2 + 3)
    assert whole.memory - limited.memory == waiting - 100
    assert limited.disk == whole.disk


def test_in_memory_counts_mapped_files_apart() -> None:
    needs = needs_of(SIZES, RUN, 10_500, base=BASE)[IN_MEMORY]
    assert needs.peak == "loading"
    assert needs.memory == BASE + WORKING + 2 * 10_500
    assert needs.memory - 10_500 < needs.needed, "files can be read again"
    joined = needs_of(replace(SIZES, joined=3100), RUN, 10_500, base=BASE)[IN_MEMORY]
    assert joined.memory == BASE + WORKING + 9000 + 3100 + 9000, "while 1500 are not read yet"
    kept = needs_of(SIZES, replace(RUN, consume=False), 10_500, base=BASE)[IN_MEMORY]
    assert sum(kept.phases["saving"].values()) == BASE + WORKING + 10_500 + (10_500 - 9000 + 4500)


def test_two_results_are_tried_for_a_size() -> None:
    one, two = (
        needs_of(SIZES, replace(RUN, consume=False, tried=tried, sweeps=tried + 1, copies=copies), 10_500, base=BASE)
        for tried, copies in ((1, 0), (2, 20_000))
    )
    for phase in ("merging", "saving"):
        assert sum(two[IN_MEMORY].phases[phase].values()) - sum(one[IN_MEMORY].phases[phase].values()) == 6000
    assert two[IN_MEMORY].phases["statistics"] == one[IN_MEMORY].phases["statistics"]
    waiting = 4 * 3 * (10 * 2 + 3)
    assert (two[STREAMED].disk, two[STREAMED].read) == (20_000 + waiting, 3 * 10_500)
    few = needs_of(SIZES, replace(RUN, tried=2, copies=500), 10_500, base=BASE)
    assert few[STREAMED].disk == 2 * 6000 + waiting
    assert (few[IN_MEMORY].disk, few[IN_MEMORY].read) == (6000, 10_500)


def test_gradients_take_a_way_back_past_all_blocks() -> None:
    run = replace(RUN, gradients=True, sweeps=3)
    plain, back = (needs_of(SIZES, one, 10_500, base=BASE) for one in (RUN, run))
    states = (10 + 2) * 4 * 3 * 10 * 2  # of ten blocks, and gradients at two of them
    phase = back[STREAMED].phases["statistics"]
    assert (phase["gradients"], phase["hidden states"]) == (900, states)
    assert (back[STREAMED].disk, back[STREAMED].read) == (plain[STREAMED].disk, 3 * 10_500)
    assert needs_of(SIZES, replace(run, result=10), 10_500, base=BASE)[STREAMED].disk == states
    mapped = needs_of(SIZES, replace(run, hidden_limit=0), 10_500, base=BASE)[STREAMED].phases["statistics"]
    assert mapped == phase | {"hidden states": 0}
    picks = 2 * 3 * 2 * (2 * 10 + 4 * 15) * 2
    assert back[IN_MEMORY].phases["statistics"]["gradients"] == 10 * (900 + picks)
    del back[IN_MEMORY].phases["statistics"]["gradients"]
    assert back[IN_MEMORY].phases == plain[IN_MEMORY].phases


@pytest.mark.parametrize(("plans", "cut", "streams"), [(0, True, 1), (3, False, 2), (5, True, 6)])
def test_plans_are_compared_for_a_measured_budget(plans: int, cut: bool, streams: int) -> None:
    needs = needs_of(SIZES, replace(RUN, plans=plans, cut=cut, sweeps=4), 10_500, base=BASE)
    waiting = 4 * 3 * (10 * 2 + 3)
    assert (needs[STREAMED].disk, needs[STREAMED].read) == (6000 + streams * waiting, 4 * 10_500)
    assert needs[STREAMED].phases["merging"]["hidden states"] == streams * waiting
    compared = needs[IN_MEMORY].phases.get("comparing", {}).get("results compared")
    assert compared == (2 * (10_500 - 9000 + 4500) if plans else None)


@pytest.mark.parametrize("bits", [0, 2])
def test_choices_are_tried_on_all_experts_of_a_layer(bits: int) -> None:
    run = replace(RUN, rows=10, repair="joint", reductions=1, bits=bits, consume=False)
    needs = needs_of(SIZES, run, 10_500, base=BASE)
    one, tokens = 10 * 2 + 12 * 2, 10 * 3
    for way, layers in ((STREAMED, 2), (IN_MEMORY, 11)):
        phase = needs[way].phases["curves"]
        assert phase["experts tried"] == 900 * (2 if bits else 1), "and what it was where it is rounded"
        assert phase["inputs of layers"] == layers * tokens * one
        assert phase["targets"] == 2 * 4 * tokens * 10
        assert phase["solutions"] == 8 * 8 * 10 * 15
        # Moments of the wider side of both matrices, and copies of 900 / 2 weights, where equations were before.
        equations = 4 * 8 * (8 * 15) ** 2 + 32 * 8 * 15 * 10
        assert phase["normal equations"] == equations
        assert phase.get("rounding", 0) == (max(0, 8 * (32 * 15**2 + 64 * 900 // 16) - equations) if bits else 0)
        assert phase["distributions"] == 4 * 6 * 50
    assert "curves" not in needs_of(SIZES, replace(run, reductions=0, bits=0), 10_500)[STREAMED].phases


def test_a_repair_and_an_alignment_take_more() -> None:
    plain, repaired = (
        needs_of(SIZES, replace(RUN, repair=name, aligned=True, consume=False), 10_500, base=BASE)
        for name in ("none", "refit")
    )
    for way in (IN_MEMORY, STREAMED):
        assert "repair" not in plain[way].phases
        assert repaired[way].phases["repair"]["solutions"] == 8 * 4 * 10 * 15
        assert plain[way].phases["merging"]["alignment"] == 12 * 15**2
        assert repaired[way].memory > plain[way].memory


WAYS = [(10**9, None, IN_MEMORY), (14_000, 10**9, NO_WAY), (10**9, 5000, NO_WAY)]


@pytest.mark.parametrize(("memory", "disk", "name"), WAYS)
def test_the_way_is_the_first_that_fits(memory: int, disk: int | None, name: str) -> None:
    assert way_for(needs_of(SIZES, RUN, 10_500, base=BASE), memory, disk).name == name


def test_a_model_that_does_not_fit_is_streamed_or_told_why_not() -> None:
    needs = needs_of(SIZES, RUN, 10_500, base=BASE)
    assert needs[STREAMED].needed < needs[IN_MEMORY].needed
    assert way_for(needs, needs[STREAMED].needed).name == STREAMED
    refused = way_for(needs, needs[STREAMED].needed - 1)
    assert refused.name == NO_WAY
    parts = {name: size for name, size in needs[STREAMED].phases["statistics"].items() if name != "process"}
    assert f"most is {max(parts, key=parts.__getitem__)} (" in refused.reason
    assert "while statistics" in refused.reason


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "switch_transformers"])
def test_sizes_are_those_of_the_model(name: str) -> None:
    model = build(name)
    layers = Layers.of(model)
    sizes = sizes_of(layers)
    assert sizes.weights == sum(parameter.nbytes for parameter in model.parameters())
    experts = [sum(parameter.nbytes for _, parameter in layer.parameters) for layer in layers]
    assert sizes.experts == max(experts)
    assert sizes.converted == (sum(experts) if name == "qwen3_moe" else 0)
    assert sizes_of(layers, is_quantized=True).converted == sizes.weights


def test_a_run_of_the_largest_published_model_is_planned_in_seconds() -> None:
    layers = Layers.of(empty_model(str(CONFIGS / "DeepSeek-V3"), dequantize=True))
    config = MergeConfig(experts=0.5)
    result = result_by_hand(layers, config)
    run = run_of(layers, result, config, repair="refit")
    needs = needs_of(sizes_of(layers, is_quantized=True), run, 673 * 10**9)
    assert needs[STREAMED].memory < 0.1 * needs[IN_MEMORY].memory
    # At least a block, with its experts once more while they are made.
    assert needs[STREAMED].memory > 2 * 256 * 3 * 7168 * 2048 * 2
    # logit_gram [E, E], counts and weights of each layer, 8 bytes each.
    assert run.sums >= 58 * 256 * 256 * 8


def test_time_follows_from_the_pace() -> None:
    layers = Layers.of(build("qwen3_moe"))
    figures, sizes = figures_of(layers), sizes_of(layers)
    config = MergeConfig(experts=4)
    run = run_of(layers, result_by_hand(layers, config), config, rows=10, judged=0, length=100)
    needs = needs_of(sizes, run, 10**6)
    speeds = {"products": 1e6, "single": 2e6, "double": 3e6, "reading": 1e5, "copying": 1e6}
    pace = Pace(**speeds, assignment=2.0, decomposition=5.0, width=sizes.intermediate_size // 2)
    told = seconds_of(sizes, figures, run, needs[STREAMED], pace)
    assert told["reading"] == pytest.approx(2 * 10**6 / 1e5)
    assert told["handling"] == pytest.approx(6 * 2 * 10**6 / 1e6)
    assert told["forwards"] == pytest.approx(2 * (figures.active - figures.embedding) * 1000 / 1e6)
    assert told["aligning"] >= 4 * len(layers) * 2.0 / run.threads
    assert told["fitting"] == 0
    fitted = replace(run, repair="refit")
    work = work_of(sizes, fitted)
    taken = work.experts / 1e6 + work.single / 2e6 + work.double / 3e6 + work.moved / 1e6
    told = seconds_of(sizes, figures, fitted, needs[STREAMED], pace)
    assert told["fitting"] == pytest.approx(taken + work.decompositions * 5.0 * 2**3)
    assert told["forwards"] == pytest.approx(2 * (figures.active - figures.embedding) * 3000 / 1e6)


def test_this_machine_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("hf_mcsmoe.forecast.machine.SECONDS", 0.02)
    (tmp_path / "model.safetensors").write_bytes(bytes(10**6))
    pace = measure_pace(4, 16, 8, torch.float32, tmp_path)
    assert all(value > 0 for value in vars(pace).values())
    assert pace.width == 8
    held = resident()
    assert held is None or 10**7 < held < 10**12
    assert free_memory() > 0
