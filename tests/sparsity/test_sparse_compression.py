"""Sparsity beside merging, pruning and repair, and as options of the command line."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from helpers import batches, logits
from transformers import AutoModelForCausalLM

from hf_mcsmoe import (
    LoSparseConfig,
    MergeConfig,
    QuantizationConfig,
    RepairConfig,
    SparsityConfig,
    collect_statistics,
    compress,
    moe_layers,
)
from hf_mcsmoe.cli.options import Inside
from hf_mcsmoe.methods.sparsity import SCORE
from hf_mcsmoe.sparsity import sparsify


@pytest.mark.filterwarnings("ignore:The repair left")
@pytest.mark.parametrize(("pattern", "width", "zeros"), [("unstructured", 24, 0.5), ("units", 12, 0.0)])
def test_merged_and_repaired_experts_are_sparse_and_load_again(
    pattern: str, width: int, zeros: float, tmp_path: Path
) -> None:
    model = build("qwen3_moe")
    data = batches("qwen3_moe", model)
    options = {"repair": RepairConfig(), "sparsity": SparsityConfig(pattern=pattern), "held_out": data}
    small = compress(model, data, MergeConfig(experts=4, budget="uniform"), **options)
    assert [step.title for step in small.mcsmoe_record.steps] == ["Sparsity", "Repair"]
    assert {"merged", "sparse", "repaired"} <= set(small.mcsmoe_record.quality)
    for layer in moe_layers(small):
        assert (layer.num_experts, layer.intermediate_size) == (4, width)
        down = layer.read().tensors["down"]
        assert torch.as_tensor(down == 0).float().mean() == zeros
    small.save_pretrained(tmp_path / "small")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small", trust_remote_code=True)
    assert torch.equal(logits(loaded, data[0]), logits(small, data[0]))


def test_hidden_units_alone_are_repaired_too_and_come_nearer() -> None:
    model = build("qwen3_moe")
    data = batches("qwen3_moe", model, number=6)
    config, sparsity = MergeConfig(experts=1.0), SparsityConfig(pattern="units")
    repair = RepairConfig(elsewhere=0.0, made=0.0, caution=0.0)
    plain, repaired = (compress(model, data, config, sparsity=sparsity, repair=fit) for fit in (None, repair))
    error = [sum((logits(x, b) - logits(model, b)).square().sum() for b in data) for x in (plain, repaired)]
    assert error[1] < 0.9 * error[0]


def test_sums_that_are_held_spare_the_pass_and_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("qwen3_moe")
    data, config, sparsity = batches("qwen3_moe", model), MergeConfig(experts=1.0), SparsityConfig("moe_pruner")
    statistics = collect_statistics(model, data, [*config.needs, *SCORE.needs("moe_pruner")])
    lacking = collect_statistics(model, data, config.needs)
    own = compress(model, data, config, sparsity=sparsity, statistics=lacking)
    monkeypatch.setattr(sparsify, "collect_sums", lambda *_: pytest.fail("a pass was made"))
    for given in (statistics, None):  # or they are summed in the one pass that there is
        found = compress(model, data, config, sparsity=sparsity, statistics=given)
        assert all(torch.equal(value, found.state_dict()[name]) for name, value in own.state_dict().items())
    with pytest.raises(pytest.fail.Exception, match="a pass was made"):  # what merged experts see is another thing
        compress(model, data, MergeConfig(experts=4), sparsity=sparsity, statistics=statistics)


PRUNED = {"reduce": "prune", "budget": "uniform", "experts": 4}
STAGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "low rank": ({"experts": 4}, {"low_rank": LoSparseConfig(rank=2, keep=0.1)}),
    "few bits, all experts": ({"experts": 1.0}, {"quantization": QuantizationConfig(bits=8, group_size=4)}),
    "pruned": (PRUNED, {"repair": RepairConfig(caution=0.0)}),
    "constants": ({**PRUNED, "pruned_router": "constant"}, {"repair": RepairConfig(caution=0.0)}),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The repair left")
@pytest.mark.parametrize("case", STAGES)
def test_narrower_experts_are_stored_in_every_way(case: str, tmp_path: Path) -> None:
    name, (merge, stages) = "gpt_oss", STAGES[case]
    model, sparsity = build(name), SparsityConfig(pattern="units")
    data = batches(name, model)
    small = compress(model, data, MergeConfig(**merge), sparsity=sparsity, **stages)
    small.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()), info
    assert {layer.intermediate_size for layer in moe_layers(loaded)} == {12}
    assert (loaded.config.model_type == name) == (case == "pruned"), "which is an ordinary model of its family"
    torch.testing.assert_close(logits(loaded, data[0]), logits(small, data[0]), atol=1e-4, rtol=1e-4)


def test_what_would_fill_the_zeros_is_refused() -> None:
    model = build("qwen3_moe")
    options = {"sparsity": SparsityConfig(), "quantization": QuantizationConfig(bits=8, group_size=4)}
    with pytest.raises(ValueError, match="quantization would make other values of the zeros"):
        compress(model, batches("qwen3_moe", model), MergeConfig(experts=1.0), **options)


def test_groups_of_bits_that_do_not_divide_what_is_left_are_refused_at_once() -> None:
    model = build("qwen3_moe")
    options = {"sparsity": SparsityConfig(pattern="units", share=0.25), "quantization": QuantizationConfig(8, 8)}
    with pytest.raises(ValueError, match="group_size=8 does not divide the 18 inputs of W_out"):
        compress(model, [], MergeConfig(experts=4), **options)


def test_options_of_the_command_line_make_the_configuration() -> None:
    assert Inside().config() is None
    assert Inside("wanda", "units", 0.25).config() == SparsityConfig("wanda", "units", 0.25)
    assert Inside("magnitude").config(["*.0.*"]) == SparsityConfig("magnitude", skip=("*.0.*",))
    with pytest.raises(ValueError, match=r"--sparsity 0\.6 is about weights that --sparsify leaves out"):
        Inside(sparsity=0.6).config()
