"""Sparsity beside merging, pruning and repair, and as options of the command line."""

from pathlib import Path

import pytest
import torch
from families import build
from helpers import batches, logits
from transformers import AutoModelForCausalLM

from hf_mcsmoe import MergeConfig, RepairConfig, SparsityConfig, compress, moe_layers
from hf_mcsmoe.cli.options import Inside
from hf_mcsmoe.quantization.config import QuantizationConfig


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


def test_what_would_fill_the_zeros_is_refused() -> None:
    model = build("qwen3_moe")
    options = {"sparsity": SparsityConfig(), "quantization": QuantizationConfig(bits=8, group_size=4)}
    with pytest.raises(ValueError, match="quantization would make other values of the zeros"):
        compress(model, batches("qwen3_moe", model), MergeConfig(experts=1.0), **options)


def test_options_of_the_command_line_make_the_configuration() -> None:
    assert Inside().config() is None
    assert Inside("wanda", "units", 0.25).config() == SparsityConfig("wanda", "units", 0.25)
    assert Inside("magnitude").config(["*.0.*"]) == SparsityConfig("magnitude", skip=("*.0.*",))
    with pytest.raises(ValueError, match=r"--sparsity 0\.6 is about weights that --sparsify leaves out"):
        Inside(sparsity=0.6).config()
