"""Quantized checkpoints: read as the weights that they stand for, or refused with advice that works."""

import copy
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import TEXT
from families import build, inputs
from helpers import Run, batches, logits
from merged import tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_mcsmoe import MergeConfig, collect_statistics, merge_experts, plan_merge
from hf_mcsmoe.layers.folder import Folder
from hf_mcsmoe.layers.loading import load_model
from hf_mcsmoe.merge import merge_to_folder

Tensors = dict[str, torch.Tensor]
BLOCK = 16  # experts are 24 wide, so that their last blocks are cut off
FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def _fp8(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """Return what is stored of a matrix in blocks of FP8, and the matrix that this stands for, block by block."""
    rows, columns = weight.shape
    scales = torch.zeros(math.ceil(rows / BLOCK), math.ceil(columns / BLOCK))
    stored, meant = torch.zeros(rows, columns, dtype=torch.float8_e4m3fn), torch.zeros(rows, columns)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK)
            scales[i, j] = weight[block].float().abs().max() / 448
            stored[block] = (weight[block].float() / scales[i, j]).to(torch.float8_e4m3fn)
            meant[block] = stored[block].float() * scales[i, j]
    return {name: stored, f"{name}_scale_inv": scales}, meant.to(weight.dtype)


def _mxfp4(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """Return random codes and exponents of gpt-oss' experts [E, in, out], and the weights that these stand for."""
    count, width, out = weight.shape
    generator = torch.Generator().manual_seed(len(name))
    codes = torch.randint(0, 16, (count, out, width // 32, 32), generator=generator)
    exponents = torch.randint(-4, 0, (count, out, width // 32), generator=generator)
    packed = (codes[..., ::2] + 16 * codes[..., 1::2]).to(torch.uint8)
    meant = torch.tensor(FP4)[codes] * 2.0 ** exponents[..., None]
    stored = {f"{name}_blocks": packed, f"{name}_scales": (exponents + 127).to(torch.uint8)}
    return stored, meant.flatten(2).mT.contiguous().to(weight.dtype)


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
KINDS: dict[str, tuple[dict[str, Any], Callable[..., Any], str]] = {
    "mixtral": (FP8, _fp8, r"(proj|w\d)\.weight$"),
    "deepseek_v3": (FP8, _fp8, r"proj(_with_mqa)?\.weight$|_[ab]_proj\.weight$"),
    "gpt_oss": (MXFP4, _mxfp4, r"experts\.(gate_up|down)_proj$"),
}


def _write(name: str, folder: Path) -> tuple[Path, Path]:
    """Write a quantized checkpoint, and a plain one of the weights that it stands for."""
    settings, quantize, pattern = KINDS[name]
    model = build(name)
    if name == "gpt_oss":  # its groups of 32 are never cut off
        config = copy.deepcopy(model.config)
        config.intermediate_size = 32
        model = type(model)(config)
    model = model.to(torch.bfloat16)
    for kind in ("quantized", "plain"):
        model.save_pretrained(folder / kind)
        tokenizer().save_pretrained(folder / kind)
    stored: Tensors = {}
    plain = load_file(folder / "plain" / "model.safetensors")
    for key, weight in list(plain.items()):
        new, plain[key] = quantize(key, weight) if re.search(pattern, key) else ({key: weight}, weight)
        stored |= new
    assert len(stored) > len(plain)
    save_file(stored, folder / "quantized" / "model.safetensors", metadata={"format": "pt"})
    save_file(plain, folder / "plain" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "quantized" / "config.json").read_text())
    (folder / "quantized" / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return folder / "quantized", folder / "plain"


@pytest.fixture(scope="module", params=KINDS)
def checkpoints(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """Write one family's checkpoints."""
    return request.param, *_write(request.param, tmp_path_factory.mktemp(request.param))


def _same(one: Path, other: Path) -> None:
    first, second = (load_file(path / "model.safetensors") for path in (one, other))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    configs = [json.loads((path / "config.json").read_text()) for path in (one, other)]
    assert configs[0] == configs[1]
    assert "quantization_config" not in configs[0]


def test_it_loads_as_what_it_stands_for_and_saves_as_that(checkpoints: tuple, tmp_path: Path) -> None:
    _, quantized, plain = checkpoints
    loaded, expected = load_model(str(quantized), dequantize=True), load_model(str(plain))
    assert all(torch.equal(value, expected.state_dict()[key]) for key, value in loaded.state_dict().items())
    for model, name in ((loaded, "one"), (expected, "two")):
        model.save_pretrained(tmp_path / name)
    _same(tmp_path / "one", tmp_path / "two")


def test_its_merge_is_that_of_the_plain_checkpoint(checkpoints: tuple, tmp_path: Path) -> None:
    name, quantized, plain = checkpoints
    models = load_model(str(quantized), dequantize=True), load_model(str(plain))
    plan = plan_merge(models[1], collect_statistics(models[1], batches(name, models[1])), MergeConfig(experts=0.5))
    for model, folder in zip(models, ("memory", "expected"), strict=True):
        merge_experts(model, plan).save_pretrained(tmp_path / folder)
    _same(tmp_path / "memory", tmp_path / "expected")
    merge_to_folder(Folder(quantized, dequantize=True), plan, tmp_path / "streamed")
    merged = [AutoModelForCausalLM.from_pretrained(tmp_path / folder) for folder in ("expected", "streamed")]
    batch = inputs(name, merged[0])
    assert torch.equal(*(logits(model, batch) for model in merged))


def test_the_command_line_refuses_it_and_the_advice_works(checkpoints: tuple, tmp_path: Path, run: Run) -> None:
    name, quantized, _ = checkpoints
    (tmp_path / "text.txt").write_text("\n\n".join([TEXT] * 20))
    given = ["compress", quantized, "--data", tmp_path / "text.txt", "--repair", "none", "--output", tmp_path / "out"]
    given += ["--experts", "0.5"]
    code, _, error = run(*given)
    assert code == 1
    assert "packed weights cannot be merged" in error
    advised = re.search(r"--\w+", error)
    assert advised is not None
    code, _, error = run(*given, advised.group())
    assert code == 0, error
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    code, out, error = run("inspect", quantized, advised.group())
    assert code == 0, error
    assert f"family {name}" in out


def test_the_advice_for_python_works(checkpoints: tuple) -> None:
    _, quantized, _ = checkpoints
    with pytest.raises(ValueError, match="is quantized") as told:
        Folder(quantized)
    call, module, other = re.search(  # type: ignore[union-attr]
        r"in Python (load_model\(.*?\)) of ([\w.]+), or (Folder\(.*?\))\.", str(told.value)
    ).groups()
    names: dict[str, Any] = {"path": quantized, "Folder": Folder}
    exec(f"from {module} import load_model\nmodel = {call}\nfolder = {other}", names)
    assert names["model"].config.to_dict().get("quantization_config") is None
    assert names["folder"].model.config.to_dict().get("quantization_config") is None


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"quant_method": "gptq", "bits": 4}, "does not dequantize gptq: compress the checkpoint that it was quant"),
        ({"quant_method": "bitnet"}, "does not dequantize bitnet: compress the checkpoint"),
        ({"quant_method": "nonsense"}, "does not dequantize nonsense"),
    ],
)
def test_what_transformers_does_not_dequantize_is_refused(
    settings: dict[str, Any], told: str, tmp_path: Path, run: Run
) -> None:
    build("mixtral").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    (tmp_path / "model.safetensors").unlink()
    for more in ([], ["--dequantize"]):
        code, _, error = run("inspect", tmp_path, *more)
        assert code == 1
        assert told in error
