"""The experts of gpt-oss in MXFP4: what Transformers makes of the blocks, and how near that is."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import logits
from merged import run_python
from pruned import pruned
from safetensors.torch import load_file
from transformers import GptOssConfig, GptOssForCausalLM, PreTrainedModel
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from hf_mcsmoe import MergeConfig, collect_statistics, merge_experts, moe_layers, plan_merge
from hf_mcsmoe.export import RouterFit, export
from hf_mcsmoe.export.mxfp4 import mxfp4
from hf_mcsmoe.layers.loading import load_model

LEVELS = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
BATCH = {"input_ids": torch.arange(3, 27).view(2, 12)}
# Half of the experts of each kind of model: merged ones, and such as are left.
REDUCTIONS = ("merge", "prune")


@functools.cache
def halved(reduce: str) -> PreTrainedModel:
    """Return a tiny gpt-oss with half of its experts, of widths that MXFP4 divides."""
    sizes = {"hidden_size": 64, "intermediate_size": 32, "head_dim": 16, "vocab_size": 64}
    counts = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 8}
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    model = GptOssForCausalLM(GptOssConfig(**sizes, **counts, num_experts_per_tok=2, rope_parameters=rope)).eval()
    config = MergeConfig(experts=0.5, budget="uniform", reduce=reduce)
    text = [{"input_ids": torch.randint(64, (32, 32), generator=torch.Generator().manual_seed(0))}]
    return merge_experts(model, plan_merge(model, collect_statistics(model, text, config.needs), config))


def decoded(blocks: torch.Tensor, scales: torch.Tensor) -> np.ndarray:
    """Return the matrices [G, out, in] that blocks [G, out, groups, 16] and scales stand for."""
    octets = blocks.numpy()
    codes = np.stack([octets % 16, octets // 16], -1).reshape(*octets.shape[:-1], 32)
    values = np.where(codes >= 8, -1, 1) * LEVELS[codes % 8]
    return (values * 2.0 ** (scales.numpy()[..., None].astype(float) - 127)).reshape(*octets.shape[:2], -1)


def test_each_group_has_the_better_of_two_scales_and_each_weight_the_nearest_level() -> None:
    weight = torch.randn(1, 64, 96, generator=torch.Generator().manual_seed(0)) * 0.02
    found = decoded(*mxfp4(weight)).reshape(-1, 32)
    groups = weight.numpy().astype(float).reshape(-1, 32)
    least = 2.0 ** (np.floor(np.log2(np.abs(groups).max(1))) - 2)
    errors = []
    for scale in (least, 2 * least):
        levels = np.concatenate([-LEVELS, LEVELS]) * scale[:, None]
        errors.append(np.square(np.abs(groups[..., None] - levels[:, None]).min(-1)).sum(1))
    np.testing.assert_allclose(np.square(found - groups).sum(1), np.minimum(*errors), rtol=1e-5)
    assert 0.1 < np.mean(errors[0] > errors[1]) < 0.9


def test_weights_that_were_in_mxfp4_come_out_as_they_were() -> None:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 256, (2, 32, 3, 16), generator=generator).to(torch.uint8)
    scales = torch.randint(100, 140, (2, 32, 3), generator=generator).to(torch.uint8)
    scales[0, 0], codes[0, 1] = 0, 0  # the least scale, and groups of zeros
    weight = convert_moe_packed_tensors(codes, scales, dtype=torch.float32).mT
    assert torch.equal(convert_moe_packed_tensors(*mxfp4(weight), dtype=torch.float32).mT, weight)


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_ours_and_transformers_read_the_blocks_as_what_they_stand_for(reduce: str, tmp_path: Path) -> None:
    model = halved(reduce)
    export(model, tmp_path, mxfp4=True)
    stored = load_file(tmp_path / "model.safetensors")
    told = json.loads((tmp_path / "mcsmoe_record.json").read_text())["steps"]
    size = sum(tensor.nbytes for tensor in stored.values())
    assert size == next(step["options"]["bytes"] for step in told if step["title"] == "Packed experts")
    read = load_model(str(tmp_path), dequantize=True)
    for layer in moe_layers(read):
        for name in ("gate_up_proj", "down_proj"):
            prefix = f"{layer.name}.{name}"
            expected = decoded(stored[f"{prefix}_blocks"], stored[f"{prefix}_scales"]).swapaxes(1, 2)
            weight = layer.container.get_parameter(name)
            np.testing.assert_array_equal(weight.detach().float().numpy(), expected)
            assert torch.equal(layer.container.get_parameter(f"{name}_bias"), stored[f"{prefix}_bias"])
    assert {tensor.dtype for name, tensor in stored.items() if "_proj_" in name} >= {torch.uint8, torch.float32}


def test_what_has_no_mxfp4_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="MXFP4 is how gpt-oss stores its experts, and Qwen3MoeForCausalLM has no"):
        export(pruned("qwen3_moe", "uniform").merged, tmp_path, mxfp4=True)
    with pytest.raises(ValueError, match="do not divide the 24 inputs"):
        export(pruned("gpt_oss", "uniform").merged, tmp_path, mxfp4=True)


def test_a_router_is_judged_with_the_experts_that_the_blocks_stand_for(tmp_path: Path) -> None:
    model, rows = halved("merge"), [{"input_ids": BATCH["input_ids"][:1]}]
    record = export(model, tmp_path / "plain", mxfp4=True, fit=RouterFit(rows, [BATCH], steps=0))
    read = load_model(str(tmp_path / "plain"), dequantize=True, dtype="float32")
    merged, plain = (logits(found, BATCH)[:, :-1].log_softmax(-1) for found in (model, read))
    figures = record.steps[-1].figures
    divergence = (merged.exp() * (merged - plain)).sum(-1).mean()
    assert figures["kl_to_merged"][figures["router"]] == pytest.approx(float(divergence), rel=1e-3)
    stored = load_file(tmp_path / "plain" / "model.safetensors")
    for block, layer in enumerate(record.layers.values()):
        size = sum(value.nbytes for name, value in stored.items() if f"layers.{block}.mlp.experts." in name)
        assert (layer.bytes, {*layer.bits.values()}) == (size, {4})


SCRIPT = """
import sys, torch
from transformers import AutoModelForCausalLM, Mxfp4Config
torch.set_num_threads(1)
options = {"quantization_config": Mxfp4Config(dequantize=True), "output_loading_info": True}
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], **options)
assert not any(info.values()), info
with torch.no_grad():
    logits = model(input_ids=torch.arange(3, 27).view(2, 12)).logits
torch.save({"logits": logits, "weights": dict(model.named_parameters())}, "found.pt")
assert "hf_mcsmoe" not in sys.modules
"""


@pytest.mark.slow
def test_stock_transformers_dequantizes_them_in_a_fresh_process(tmp_path: Path) -> None:
    export(halved("merge"), tmp_path / "plain", mxfp4=True)
    done = run_python(["-c", SCRIPT, str(tmp_path / "plain")], tmp_path)
    assert done.returncode == 0, done.stderr
    ours, found = load_model(str(tmp_path / "plain"), dequantize=True), torch.load(tmp_path / "found.pt")
    for name, weight in ours.named_parameters():
        assert torch.equal(found["weights"][name].float(), weight.float()), name
    torch.testing.assert_close(found["logits"].float(), logits(ours, BATCH).float(), atol=1e-4, rtol=1e-3)
