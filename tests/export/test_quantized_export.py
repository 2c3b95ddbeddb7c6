"""Plain checkpoints in few bits: what stock Transformers reads of them is what our model computes with."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import build, inputs
from helpers import batches, logits
from merged import Example, run_python
from pruned import pruned
from quantized import quantize
from safetensors import safe_open
from transformers import PreTrainedModel

from hf_mcsmoe import MergeConfig, QuantizationConfig, compress, moe_layers
from hf_mcsmoe.export import export
from hf_mcsmoe.modeling.convert import write_description

NAMES = {"qwen3_moe": ("gate_proj", "up_proj", "down_proj"), "mixtral": ("w1", "w3", "w2")}
NAMES["olmoe"] = NAMES["qwen3_moe"]


def uniform(name: str) -> Example:
    """Prune the tiny model of a family to one number of experts for all of its layers."""
    return pruned(name, "uniform")


def in_bits(
    name: str, bits: int | list[int] = 4, *, symmetric: bool = True, dtype: torch.dtype = torch.float32
) -> Any:
    """Return that in few bits; with a list, those of one layer after the other."""
    model = copy.deepcopy(uniform(name).merged).to(dtype)
    layers = moe_layers(model)
    each = [bits] * len(layers) if isinstance(bits, int) else bits
    for layer, number in zip(layers, each, strict=True):
        if number < 16:
            quantize(layer.container, number, symmetric=symmetric)
    write_description(model)
    return model


def decoded(folder: Path, name: str, bits: int) -> torch.Tensor:
    """Return the matrix of an expert that a checkpoint stores in few bits, read bit by bit."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        words, scale = file.get_tensor(f"{name}_packed"), file.get_tensor(f"{name}_scale")
        rows, width = file.get_tensor(f"{name}_shape").tolist()
    stream = np.unpackbits(words.numpy().view(np.uint8).reshape(rows, -1), axis=1, bitorder="little")
    codes = stream[:, : width * bits].reshape(rows, width, bits) @ (1 << np.arange(bits))
    values = torch.tensor(codes - 2 ** (bits - 1)).to(scale.dtype)
    return (values.unflatten(-1, (scale.shape[1], -1)) * scale[..., None]).flatten(1)


def header_bytes(folder: Path) -> int:
    """Return what the names in a checkpoint's file take."""
    return 8 + int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")


def told_bytes(folder: Path) -> int:
    """Return what the record says that the weights take."""
    steps = json.loads((folder / "mcsmoe_record.json").read_text())["steps"]
    return next(step["options"]["bytes"] for step in steps if step["title"] == "Packed experts")


def check_reads(model: PreTrainedModel, read: PreTrainedModel, folder: Path, name: str, bits: int) -> None:
    """Check that a model of the family holds the weights that the file says, which are those of ours."""
    for ours in moe_layers(model):
        stacks: Any = read.get_submodule(ours.name)
        inside = next(key for key in keys(folder) if key.startswith(ours.name.rpartition(".mlp")[0]))
        for expert in range(ours.num_experts):
            prefix = f"{inside.partition('.experts.')[0]}.experts.{expert}"
            gate, up, down = (decoded(folder, f"{prefix}.{matrix}.weight", bits) for matrix in NAMES[name])
            assert torch.equal(stacks.gate_up_proj[expert], torch.cat([gate, up]))
            assert torch.equal(stacks.down_proj[expert], down)
            own = [ours.container.quantized_stack(key)[expert] for key in ("gate_up_proj", "down_proj")]
            assert torch.equal(own[0].dequantized(model.dtype), torch.cat([gate, up]))
            assert torch.equal(own[1].dequantized(model.dtype), down)


def keys(folder: Path) -> list[str]:
    """Return the names of a checkpoint's packed weights."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        return [key for key in file.keys() if key.endswith("weight_packed")]  # noqa: SIM118


@pytest.mark.parametrize(
    ("name", "bits", "dtype"),
    [
        ("qwen3_moe", 4, torch.float32),
        ("mixtral", 8, torch.bfloat16),
        pytest.param("olmoe", 3, torch.float32, marks=pytest.mark.slow),
    ],
)
def test_the_familys_class_reads_the_weights_that_ours_computes_with(
    name: str, bits: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    case, model = uniform(name), in_bits(name, bits, dtype=dtype)
    export(model, tmp_path)
    read, info = type(case.base).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    check_reads(model, read, tmp_path, name, bits)
    if dtype == torch.float32:  # in bfloat16 rounding sends tokens of random routers elsewhere
        torch.testing.assert_close(logits(read, case.batch), logits(model, case.batch), atol=1e-5, rtol=1e-4)
    size = (tmp_path / "model.safetensors").stat().st_size - header_bytes(tmp_path)
    assert size == pytest.approx(told_bytes(tmp_path), rel=0.02)


def test_engines_that_take_several_schemes_find_that_of_each_layer_and_nothing_else(tmp_path: Path) -> None:
    export(in_bits("qwen3_moe", [4, 8, 16, 4]), tmp_path, engines=["vllm"])
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]

    def found(module: str) -> int | None:
        if any(re.match(pattern.removeprefix("re:"), module) for pattern in settings["ignore"]):
            return None
        groups = settings["config_groups"].values()
        of = [
            group["weights"]["num_bits"]
            for group in groups
            if any(re.match(target.removeprefix("re:"), module) for target in group["targets"])
        ]
        assert len(of) == 1, module
        return of[0]

    layers = [found(f"model.layers.{place}.mlp.experts.0.up_proj") for place in range(4)]
    assert layers == [4, 8, None, 4]
    assert found("model.layers.14.mlp.experts.0.up_proj") is None
    assert {found(name) for name in ("lm_head", "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.gate")} == {
        None
    }
    stored = {key.split(".")[2] for key in keys(tmp_path)}
    assert stored == {"0", "1", "3"}
    card = (tmp_path / "README.md").read_text()
    assert "vllm has fast kernels for groups of 32, 64 or 128 weights, not 8." in card
    assert "vllm takes as many processes of tensor parallelism as divide 3." in card


def _zero_points() -> PreTrainedModel:
    return in_bits("qwen3_moe", symmetric=False)


def _unlike_groups() -> PreTrainedModel:
    model = in_bits("qwen3_moe")
    for layer in model.config.mcsmoe["layers"].values():
        layer["quantized"]["down_proj"]["group_size"] = 12
    return model


REFUSED: list[tuple[Callable[[], PreTrainedModel], tuple[str, ...], str]] = [
    (_zero_points, (), r"zero points, .*Quantize with symmetric=True.* Or written dense"),
    (_unlike_groups, (), "Quantize with bits=4 and group_size=4"),
    (lambda: in_bits("qwen3_moe", [4, 8, 4, 4]), (), "4 bits in groups of 8 and 8 bits in groups of 8.*vllm, sglang"),
    (lambda: in_bits("qwen3_moe", [16, 4, 4, 4]), (), "4 bits in groups of 8 and dense weights"),
    (lambda: in_bits("qwen3_moe", 3), ("vllm",), "vllm does not read experts in 3 bits.*it reads 8, 4"),
    (lambda: in_bits("qwen3_moe"), ("mlx",), "Leave that engine out"),
    (lambda: in_bits("gpt_oss"), (), "GptOssForCausalLM keeps the experts of a layer in one tensor on disk"),
]


@pytest.mark.parametrize(("make", "engines", "words"), REFUSED)
def test_what_a_reader_does_not_know_is_refused_with_the_way_out(
    make: Callable[[], PreTrainedModel], engines: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        export(make(), tmp_path / "plain", engines=engines)
    assert not (tmp_path / "plain").exists()


def test_on_request_experts_in_few_bits_are_written_dense(tmp_path: Path) -> None:
    case, model = uniform("qwen3_moe"), in_bits("qwen3_moe", symmetric=False)
    export(model, tmp_path, dense=True)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    read = type(case.base).from_pretrained(tmp_path)
    torch.testing.assert_close(logits(read, case.batch), logits(model, case.batch), atol=1e-5, rtol=1e-4)


# In a process of its own, where the package cannot be imported: folders, and a file with the inputs of each.
SCRIPT = """
import sys, torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert model.config.quantization_config.quant_method == "compressed-tensors"
    with torch.no_grad():
        torch.save(model(**torch.load(folder + ".pt")).logits, folder + ".logits")
assert "hf_mcsmoe" not in sys.modules
"""


@pytest.mark.slow
def test_stock_transformers_loads_them_in_a_fresh_process(tmp_path: Path) -> None:
    models = {name: in_bits(name, bits) for name, bits in {"qwen3_moe": 4, "mixtral": 8, "olmoe": 4}.items()}
    for name, model in models.items():
        export(model, tmp_path / name)
        torch.save(uniform(name).batch, tmp_path / f"{name}.pt")
    done = run_python(["-c", SCRIPT, *(str(tmp_path / name) for name in models)], tmp_path)
    assert done.returncode == 0, done.stderr
    for name, model in models.items():
        found = torch.load(tmp_path / f"{name}.logits")
        torch.testing.assert_close(found, logits(model, uniform(name).batch), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_merged_experts_in_few_bits_compute_the_same_in_all_their_places(name: str, tmp_path: Path) -> None:
    model = build(name)
    config, bits = MergeConfig(experts=0.5, budget="uniform"), QuantizationConfig(bits=4, group_size=8)
    merged = compress(model, batches(name, model), config, quantization=bits)
    export(merged, tmp_path / "expanded", expand=True)
    again, info = type(model).from_pretrained(tmp_path / "expanded", output_loading_info=True)
    assert not any(info.values()), info
    batch = inputs(name, model)
    torch.testing.assert_close(logits(again, batch), logits(merged, batch), atol=1e-5, rtol=1e-5)
