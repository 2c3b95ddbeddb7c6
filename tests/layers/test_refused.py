"""Models whose experts cannot be merged are refused, and the reasons given still hold."""

import copy
import inspect
from typing import Any

import pytest
import torch
from families import build, inputs
from helpers import batches
from merged import example
from torch import nn
from transformers import BitsAndBytesConfig, FineGrainedFP8Config

from hf_mcsmoe import collect_statistics, moe_layers
from hf_mcsmoe.layers.outside import REFUSED


def test_a_dense_model_has_no_layer() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="Sequential has no Mixture-of-Experts layer"):
        moe_layers(model)


QUANTIZED = [
    ({"quant_method": "mxfp4"}, "mxfp4", "Load it dequantized"),
    (BitsAndBytesConfig(load_in_8bit=True), "bitsandbytes", "compress the checkpoint that it was quantized from"),
    (FineGrainedFP8Config(), "fp8", "Load it dequantized"),
]


@pytest.mark.parametrize(("settings", "method", "advice"), QUANTIZED)
def test_a_quantized_model_is_refused_with_what_to_do(settings: Any, method: str, advice: str) -> None:
    model = build("mixtral")
    model.config.quantization_config = settings
    for refused in (moe_layers, lambda model: collect_statistics(model, [])):
        with pytest.raises(ValueError, match=rf"is quantized \({method}\).*{advice}"):
            refused(model)
    del model.config.quantization_config  # as Transformers leaves a model that it dequantized
    assert moe_layers(model)


@pytest.mark.parametrize(("name", "container"), [("nllb_moe", "NllbMoeExperts"), ("doge", "DogeCDMoE")])
def test_experts_that_cannot_be_merged_are_refused_with_the_reason(name: str, container: str) -> None:
    model = build(name)
    for refused in (moe_layers, lambda model: collect_statistics(model, batches(name, model))):
        with pytest.raises(ValueError, match=rf"\({container}\) cannot be merged: ") as error:
            refused(model)
        assert REFUSED[container] in str(error.value)


@pytest.mark.parametrize("name", ["mixtral", "dbrx", "jetmoe", "llama4_text", "switch_transformers"])
def test_merged_experts_that_the_configuration_does_not_know_are_refused(name: str) -> None:
    model = copy.deepcopy(example(name).merged)
    name = moe_layers(model)[0].original_name
    del model.config.mcsmoe["layers"][name]
    with pytest.raises(ValueError, match=r"holds merged experts .*`mcsmoe` says nothing"):
        moe_layers(model)


def test_nllb_moe_still_runs_only_its_experts_0_and_1() -> None:
    """Once this fails, Transformers is repaired and the family can be supported."""
    model = build("nllb_moe")
    batch = inputs("nllb_moe", model)
    sparse = [module for module in model.modules() if type(module).__name__ == "NllbMoeExperts"]
    assert sparse
    with torch.no_grad():
        expected = model(**batch).logits
        for experts in sparse:
            for name, expert in experts.items():
                if name in [f"expert_{index}" for index in range(2, 8)]:
                    expert.fc1.weight.zero_()
                    expert.fc2.weight.zero_()
        assert torch.equal(model(**batch).logits, expected)
        for experts in sparse:
            experts["expert_1"].fc2.weight.zero_()
        assert not torch.equal(model(**batch).logits, expected)


def test_doge_still_has_experts_of_one_neuron() -> None:
    model = build("doge")
    experts = next(module for module in model.modules() if type(module).__name__ == "DogeCDMoE")
    assert experts.up_embed.weight.shape == experts.down_embed.weight.shape == (experts.num_experts, 32)
    assert "keys" in inspect.getsource(type(experts)), "experts are found by product keys"
