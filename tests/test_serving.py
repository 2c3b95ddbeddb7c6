"""What the page on other tools shows works as it stands there, and does what the page says of it."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from helpers import logits, relative_error
from merged import example, tokenizer
from torch import nn
from transformers import PreTrainedModel

from hf_mcsmoe import MergeConfig, compress, moe_layers
from hf_mcsmoe.demo import ASSETS, demo_batches
from hf_mcsmoe.layers.loading import load_model, load_tokenizer

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
# PEFT asks for it by the name that Transformers has given up.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
AUTO = {"switch_transformers": "AutoModelForSeq2SeqLM"}


def block(word: str) -> str:
    """Return the code of the page that holds a word."""
    return next(code for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if word in code)


def run_block(word: str, name: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> dict[str, Any]:
    """Run the code of the page that holds a word, for a model saved as `DIR`; returns its names."""
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(block(word).replace("AutoModelForCausalLM", AUTO.get(name, "AutoModelForCausalLM")), names)
    return names


def quantized(model: PreTrainedModel) -> set[str]:
    """Return the parameters that are stored quantized."""
    return {name for name, value in model.named_parameters() if type(value.data) is not torch.Tensor}


def weight_bytes(folder: Path) -> int:
    """Return the size of a folder's weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


CHECKED = ["mixtral", "gpt_oss", "switch_transformers"]
SLOW = ["qwen3_moe", "deepseek_v3", "dbrx", "llama4_text", "jetmoe", "nemotron_h"]


@pytest.mark.parametrize("name", [*CHECKED, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_the_recipe_of_torchao_quantizes_experts(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = example(name)
    case.merged.save_pretrained(tmp_path / "DIR")
    model = run_block("Int8WeightOnlyConfig", name, monkeypatch, tmp_path)["model"]
    experts = {
        f"{layer.name}.{key}" for layer in moe_layers(case.merged) for key, value in layer.parameters if value.ndim > 2
    }
    linear = {f"{key}.weight" for key, module in case.merged.named_modules() if isinstance(module, nn.Linear)}
    routers = {
        key
        for layer in moe_layers(case.merged)
        for key, value in case.merged.named_parameters()
        if any(value is own for own in layer.router.parameters())
    }
    stacked = {key for key, value in case.merged.named_parameters() if value.ndim == 3}  # also those of an attention
    assert experts <= quantized(model) <= experts | linear | stacked
    assert not routers & quantized(model)
    expected = logits(model, case.batch)
    assert relative_error(expected, logits(case.merged, case.batch)) < 0.2
    again = getattr(transformers, AUTO.get(name, "AutoModelForCausalLM")).from_pretrained("DIR-int8")
    assert torch.equal(logits(again, case.batch), expected)
    assert weight_bytes(tmp_path / "DIR-int8") < 0.6 * weight_bytes(tmp_path / "DIR")


def test_a_merged_model_in_8_bits_is_smaller_than_its_original_in_8_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(ASSETS / "model")
    original = load_model(folder)
    batches = demo_batches(load_tokenizer(folder), "calibration")[:4]
    sizes = []
    for kind, model in (("original", original), ("merged", compress(original, batches, MergeConfig(experts=0.5)))):
        model.save_pretrained(tmp_path / kind / "DIR")
        run_block("Int8WeightOnlyConfig", "switch_transformers", monkeypatch, tmp_path / kind)
        sizes.append(weight_bytes(tmp_path / kind / "DIR-int8"))
    assert sizes[1] < 0.75 * sizes[0]


def test_the_recipe_of_peft_adapts_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example("mixtral").merged.save_pretrained(tmp_path / "DIR")
    adapted = run_block("get_peft_model", "mixtral", monkeypatch, tmp_path)["adapted"]
    assert any(".experts." in name for name, value in adapted.named_parameters() if value.requires_grad)


@pytest.mark.parametrize("name", ["mixtral", "switch_transformers"])
def test_the_card_says_what_the_page_says(name: str, tmp_path: Path) -> None:
    example(name).merged.save_pretrained(tmp_path / "DIR")
    card = (tmp_path / "DIR" / "README.md").read_text(encoding="utf-8")
    called = re.search(r'from_pretrained\("([^"]*)", quantization_config', card)
    assert called is not None
    recipe = block("Int8WeightOnlyConfig").replace("AutoModelForCausalLM", AUTO.get(name, "AutoModelForCausalLM"))
    lines = [line.replace('"DIR"', f'"{called.group(1)}"') for line in recipe.splitlines() if "save_" not in line]
    assert "\n".join(lines) in card
    assert 'model_init_kwargs={"trust_remote_code": True}' in card
    assert f"pretrained={called.group(1)},trust_remote_code=True" in card


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_advice_for_trl_works(tmp_path: Path) -> None:
    from trl import DPOConfig, DPOTrainer

    advised = re.search(r"model_init_kwargs=(\{.*?\})", PAGE)
    assert advised is not None
    example("mixtral").merged.save_pretrained(tmp_path / "DIR")
    tokenizer().save_pretrained(tmp_path / "DIR")
    rows = Dataset.from_list([{"prompt": "w50 w51", "chosen": " w52", "rejected": " w53"}] * 2)
    options: dict[str, Any] = {"max_steps": 1, "use_cpu": True, "report_to": "none", "bf16": False}
    settings = DPOConfig(str(tmp_path / "out"), model_init_kwargs=eval(advised.group(1)), **options)
    trainer = DPOTrainer(str(tmp_path / "DIR"), args=settings, train_dataset=rows, processing_class=tokenizer())
    assert trainer.train().global_step == 1
