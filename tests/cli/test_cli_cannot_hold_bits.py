"""Models that cannot be stored in few bits, or are already: refused before any weight is loaded, by every command."""

import json
from pathlib import Path
from typing import Any

import pytest
from families import build
from helpers import Run

COMMANDS: dict[str, list[str]] = {
    "plan": ["plan"],
    "plan on text": ["plan", "--data"],
    "a size": ["compress", "--size", "0.4", "--data"],
    "a size of some bits": ["compress", "--size", "0.4", "--bits", "4", "--data"],
    "bits by hand": ["compress", "--experts", "1.0", "--bits", "4", "--data"],
}
QUANTIZED = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 32}, "quantized (gptq)"),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32}, "quantized (awq)"),
    "compressed-tensors": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}},
        "quantized (compressed-tensors)",
    ),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "--dequantize"),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "text.txt").write_text("\n".join(f"what is {number} {number}" for number in range(8)))
    for module in ("compress", "plan_measured"):
        monkeypatch.setattr(f"hf_mcsmoe.cli.{module}.load_model", _fails)
    return tmp_path


def _fails(*arguments: Any, **options: Any) -> None:
    raise AssertionError("weights were loaded")


def _said(run: Run, folder: Path, name: str, command: str, settings: dict[str, Any] | None = None) -> tuple[int, str]:
    verb, *others = COMMANDS[command]
    build(name).save_pretrained(folder / name)
    if settings:
        file = folder / name / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": settings}))
    others += [folder / "text.txt"] if others and others[-1] == "--data" else []
    others += ["--output", folder / "out"] if verb == "compress" else []
    code, _, err = run(verb, folder / name, *others)
    return code, " ".join(err.split())


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("method", QUANTIZED)
def test_a_checkpoint_that_others_quantized(method: str, command: str, folder: Path, run: Run) -> None:
    settings, message = QUANTIZED[method]
    code, said = _said(run, folder, "mixtral", command, settings)
    # A plan by the configuration is one of the weights that the bits stand for, where Transformers unpacks them.
    is_planned = command == "plan" and method in ("fp8", "compressed-tensors")
    assert code == (0 if is_planned else 1)
    assert message in said
    assert not (folder / "out").exists()


@pytest.mark.parametrize("command", ["a size of some bits", "bits by hand"])
def test_experts_that_layers_share(command: str, folder: Path, run: Run) -> None:
    code, said = _said(run, folder, "diffusion_gemma", command)
    assert code == 1
    assert "share their experts" in said
