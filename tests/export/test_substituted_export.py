"""Pruned layers with constants in vLLM's format: what its rules make of the files is what our model computes."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import logits
from pruned import substituted
from safetensors.torch import load_file
from torch import nn

from hf_mcsmoe import moe_layers
from hf_mcsmoe.export import export
from hf_mcsmoe.record import Record

MATRICES = {"qwen3_moe": ("gate_proj", "up_proj", "down_proj"), "mixtral": ("w1", "w3", "w2")}


class Substituted(nn.Module):
    """The experts of one block as vLLM fills and runs them: a loop over picks by the numbers on disk."""

    def __init__(self, stored: dict[str, torch.Tensor], gone: list[int], matrices: tuple[str, ...]) -> None:
        super().__init__()
        self.stored, self.gone, self.matrices = stored, gone, matrices

    def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Sum the picks; that of an expert that gave way is its constant."""
        output = torch.zeros_like(hidden)
        for token, pick in ((token, pick) for token in range(len(index)) for pick in range(index.shape[1])):
            output[token] += weights[token, pick] * self._expert(int(index[token, pick]), hidden[token])
        return output

    def _expert(self, expert: int, token: torch.Tensor) -> torch.Tensor:
        if expert in self.gone:
            return self.stored[f"{expert}.approx_value"]
        gate, up, down = (self.stored[f"{expert}.{name}.weight"] for name in self.matrices)
        return down @ (nn.functional.silu(gate @ token) * (up @ token))


@pytest.mark.parametrize(("name", "kind"), [("qwen3_moe", "constant"), ("mixtral", "zero")])
def test_the_rules_of_vllm_make_our_logits_of_the_files(name: str, kind: str, tmp_path: Path) -> None:
    case = substituted(name, kind)
    export(case.merged, tmp_path, engines=["vllm"])
    config: Any = json.loads((tmp_path / "config.json").read_text())
    assert "mcsmoe" not in config
    gone = {int(block): experts for block, experts in config["approximate_experts"].items()}
    assert len({len(experts) for experts in gone.values()}) > 1
    stored = load_file(tmp_path / "model.safetensors")
    steps = json.loads((tmp_path / "mcsmoe_record.json").read_text())["steps"]
    told = next(step["options"]["bytes"] for step in steps if step["title"] == "Packed experts")
    assert told == sum(tensor.nbytes for tensor in stored.values())
    model = copy.deepcopy(case.base)
    for block, layer in enumerate(moe_layers(model)):
        inside = {
            key.partition(".experts.")[2]: stored[key]
            for key in stored
            if f"layers.{block}." in key and ".experts." in key
        }
        assert {int(key.partition(".")[0]) for key in inside} == set(range(layer.num_experts))
        layer.block.experts = Substituted(inside, gone[block], MATRICES[name])
        router = stored[next(key for key in stored if f"layers.{block}." in key and key.endswith("gate.weight"))]
        assert len(router) == layer.num_experts
    torch.testing.assert_close(logits(model, case.batch), logits(case.merged, case.batch), atol=1e-5, rtol=1e-4)


def test_the_card_of_constants_says_how_vllm_serves_them(tmp_path: Path) -> None:
    case = substituted("mixtral")
    record = export(case.merged, tmp_path / "served", engines=["vllm"])
    card = (tmp_path / "served" / "README.md").read_text()
    assert "vllm serve served" in card
    assert "Transformers and other engines do not load it" in card
    for told in ("from_pretrained", "no further code", "lm_eval", "Plain checkpoint", "custom_code"):
        assert told not in card
    layers = moe_layers(case.merged)
    assert [layer.after for layer in record.layers.values()] == [layer.num_experts for layer in layers]
    again = Record.from_json((tmp_path / "served" / "mcsmoe_record.json").read_text())
    assert again.engine == "vllm"


@pytest.mark.parametrize("option", ["expand", "dense", "mxfp4"])
def test_other_forms_of_constants_are_refused(option: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"leave {option}"):
        export(substituted("mixtral").merged, tmp_path, engines=["vllm"], **{option: True})


def test_constants_are_for_vllm_alone(tmp_path: Path) -> None:
    for engines in ((), ("transformers",), ("vllm", "sglang")):
        with pytest.raises(ValueError, match="constants in the place of pruned experts"):
            export(substituted("mixtral").merged, tmp_path, engines=engines)
    with pytest.raises(ValueError, match="in one tensor on disk"):
        export(substituted("gpt_oss").merged, tmp_path / "plain", engines=["vllm"])
