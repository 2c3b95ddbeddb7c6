"""Where adapters go: every matrix of the experts has one, which trains, is saved, loads and merges."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, families
from helpers import logits
from merged import REFUSED, example, merge
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import nn
from transformers import PreTrainedModel

from hf_mcsmoe import LoSparseConfig, MergeConfig, compact, decompose_experts, lora_targets, moe_layers

FAST = ["mixtral", "gpt_oss", "deepseek_v3", "switch_transformers", "dbrx"]
pytestmark = [
    # PEFT asks for it by the name that Transformers has given up.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # Patches of images are embedded by a linear layer.
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]
# PEFT cannot adapt these, and a few words of the reason; in the original alone, or merged as well.
ORIGINAL = {
    "dbrx": "the container reads directly",
    **dict.fromkeys(
        ["deepseek_ocr2", "inkling2", "inkling2_text", "laguna", "mistral_large4", "unlimited_ocr"], "and lose it"
    ),
}
ALWAYS = {"diffusion_gemma": "share their experts"}


def _matrices(model: PreTrainedModel) -> set[str]:
    """Return the experts' matrices by name, found by their shape and not by what is tested."""
    found = {f"{layer.name}.{name}": value for layer in moe_layers(model) for name, value in layer.parameters}
    return {name for name, value in found.items() if value.ndim > 1 and value.numel() and not name.endswith("bias")}


def _adapted(model: PeftModel) -> list[str]:
    """Return the parameters that an adapter lies beside."""
    return [
        f"{path.replace('.base_layer', '')}.{module.parameter_name if isinstance(module, ParamWrapper) else 'weight'}"
        for path, module in model.get_base_model().named_modules()
        if isinstance(module, LoraLayer)
    ]


def _train(model: PeftModel, batch: dict[str, torch.Tensor]) -> None:
    """Make two steps, the first of which moves B alone."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for _ in range(2):
        model(**batch).logits.float().square().mean().backward()
        for parameter in trained:
            if parameter.grad is not None:
                parameter.data -= parameter.grad / (parameter.grad.norm() + 1e-9)
                parameter.grad = None


def _check(model: PreTrainedModel, batch: dict[str, torch.Tensor], folder: Path) -> None:
    fresh, matrices = copy.deepcopy(model), _matrices(model)
    routers = {name for layer in moe_layers(model) for name, value in model.named_parameters()
               if any(value is own for own in layer.router.parameters())}  # fmt: skip
    before = {name: value.clone() for name, value in model.named_parameters()}
    adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, **lora_targets(model)))
    names = _adapted(adapted)
    assert len(set(names)) == len(names)
    assert matrices <= set(names)
    assert not routers & set(names)
    _train(adapted, batch)
    expected = logits(adapted.eval(), batch)
    adapted.save_pretrained(folder)
    again = PeftModel.from_pretrained(fresh, folder).eval()
    torch.testing.assert_close(logits(again, batch), expected, atol=1e-4, rtol=1e-4)
    merged = adapted.merge_and_unload()
    # Rounding may send a token near the edge to another expert, and what follows it differs as well.
    close = torch.isclose(logits(merged, batch), expected, atol=1e-3, rtol=1e-3)
    assert float(close.float().mean()) > 0.7
    changed = {name for name, value in merged.named_parameters() if not torch.equal(value, before[name])}
    assert changed <= set(names)
    # Of experts in modules of their own, those that no token reached stay as they were.
    assert {name.partition(".experts.")[0] for name in matrices} == {
        name.partition(".experts.")[0] for name in changed & matrices
    }
    assert matrices <= changed or any("expert_" in name for name in matrices)


def _low_rank(model: PreTrainedModel) -> PreTrainedModel:
    return compact(decompose_experts(model, LoSparseConfig(rank=2, keep=0.5), prune=True))


@pytest.mark.parametrize("kind", ["original", "merged", "low rank"])
@pytest.mark.parametrize(
    "name", [*FAST, *(pytest.param(f.name, marks=pytest.mark.slow) for f in families() if f.name not in FAST)]
)
def test_all_experts_are_adapted(name: str, kind: str, tmp_path: Path) -> None:
    if name in REFUSED or (name in ALWAYS and kind == "low rank"):
        pytest.skip("cannot be merged or decomposed")
    case = example(name)
    model = copy.deepcopy(case.base if kind == "original" else case.merged)
    told = ALWAYS.get(name) or (ORIGINAL.get(name) if kind == "original" else None)
    if told:
        with pytest.raises(ValueError, match=told):
            lora_targets(model)
        return
    _check(_low_rank(model) if kind == "low rank" else model, case.batch, tmp_path)


def test_every_other_linear_layer_is_adapted_but_routers_and_the_output() -> None:
    for name in ("deepseek_v3", "qwen3_vl_moe"):
        model = copy.deepcopy(example(name).base)
        layers = moe_layers(model)
        kept = {id(module) for layer in layers for module in layer.router.modules()}
        kept.add(id(model.get_output_embeddings()))
        linear = {f"{path}.weight" for path, module in model.named_modules()
                  if isinstance(module, nn.Linear) and id(module) not in kept}  # fmt: skip
        assert linear <= set(_adapted(get_peft_model(model, LoraConfig(r=2, **lora_targets(model)))))


def _one_expert() -> PreTrainedModel:
    return merge(build("gpt_oss"), "gpt_oss", MergeConfig(experts=1))[1]


def _training_form() -> PreTrainedModel:
    return decompose_experts(copy.deepcopy(example("mixtral").merged), LoSparseConfig(rank=2, keep=0.5))


@pytest.mark.parametrize(
    ("make", "told"), [(_one_expert, "at least 2 experts"), (_training_form, "call compact first")], ids=["one", "S"]
)
def test_what_cannot_be_adapted_is_said(make: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        lora_targets(make())


def test_attention_of_dbrx_can_be_named_as_its_refusal_says() -> None:
    model = copy.deepcopy(example("dbrx").base)
    with pytest.raises(ValueError, match=r'target_modules=\["Wqkv", "out_proj"\]'):
        lora_targets(model)
    names = _adapted(get_peft_model(model, LoraConfig(r=2, target_modules=["Wqkv", "out_proj"])))
    assert {name.split(".")[-2] for name in names} == {"Wqkv", "out_proj"}
