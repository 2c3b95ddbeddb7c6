"""Adapters (LoRA): what they are put on, what a save makes of them, resuming."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from distilled import KINDS, make_student, make_trainer
from helpers import logits
from merged import example
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, HfArgumentParser, PreTrainedModel

from hf_mcsmoe import DistillationArguments, LoSparseConfig, compact, decompose_experts, moe_layers

# PEFT asks for it by the name that Transformers has given up.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
LORA = {"train_parts": "lora", "lora_rank": 2, "lora_alpha": 4.0, "warmup_steps": 0}
AUTO = {"mixtral": AutoModelForCausalLM, "switch_transformers": AutoModelForSeq2SeqLM}


@pytest.mark.parametrize("name", KINDS)
def test_adapters_train_and_are_saved_within_the_weights(name: str, tmp_path: Path) -> None:
    trainer = make_trainer(name, tmp_path / "out", **LORA, learning_rate=0.1)
    before, batch = dict(example(name).merged.named_parameters()), example(name).batch
    trainer.train()
    assert {key.split(".lora_")[1][:1] for key, value in trainer.model.named_parameters() if value.requires_grad} == {
        *"AB"
    }
    trainer.save_model(tmp_path / "final")
    oracle = copy.deepcopy(trainer.model).merge_and_unload()
    saved = load_file(tmp_path / "final" / "model.safetensors")
    routers = {
        key
        for key, value in before.items()
        if any(value is own for layer in moe_layers(example(name).merged) for own in layer.router.parameters())
    }
    experts = {f"{layer.name}.{key}" for layer in moe_layers(example(name).merged) for key, _ in layer.parameters}
    changed = {key for key, value in saved.items() if not torch.equal(value, before[key])}
    assert experts <= changed
    assert not changed & routers
    assert saved.keys() <= oracle.state_dict().keys()
    assert all(torch.equal(value, oracle.state_dict()[key]) for key, value in saved.items())
    loaded = AUTO[name].from_pretrained(tmp_path / "final")
    torch.testing.assert_close(logits(loaded, batch), logits(trainer.model.eval(), batch), atol=1e-4, rtol=1e-4)
    assert not (tmp_path / "final" / "adapter_config.json").exists()
    card = (tmp_path / "final" / "README.md").read_text()
    assert "trained: adapters of rank 2 (LoRA), merged into the weights; routers frozen" in card
    assert f"| parameters | {example(name).base.num_parameters():,} | {loaded.num_parameters():,} |" in card


def test_a_save_leaves_the_adapters_as_they_were(tmp_path: Path) -> None:
    trainer = make_trainer("mixtral", tmp_path, **LORA)
    trainer.train()
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.save_model(tmp_path / "final")
    assert isinstance(trainer.model, PeftModel)
    assert all(torch.equal(value, before[key]) for key, value in trainer.model.state_dict().items())


@pytest.mark.parametrize("name", KINDS)
def test_a_run_with_adapters_resumes_as_if_nothing_had_happened(name: str, tmp_path: Path) -> None:
    whole = make_trainer(name, tmp_path / "whole", **LORA, max_steps=4)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert not list(checkpoint.glob("model*.safetensors"))
    again = make_trainer(name, tmp_path / "again", **LORA, max_steps=4)
    again.train(resume_from_checkpoint=checkpoint)
    expected = whole.model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in again.model.state_dict().items())
    adapted = PeftModel.from_pretrained(make_student(name), tmp_path / "whole" / "checkpoint-4")
    batch = example(name).batch
    assert torch.equal(logits(adapted.eval(), batch), logits(whole.model.eval(), batch))


def test_adapters_of_low_rank_experts_lie_beside_their_factors(tmp_path: Path) -> None:
    student = compact(decompose_experts(make_student("mixtral"), LoSparseConfig(rank=2, keep=0.5), prune=True))
    before = {key: value.clone() for key, value in student.named_parameters()}
    trainer = make_trainer("mixtral", tmp_path, model=student, **LORA, learning_rate=0.1)
    trainer.train()
    trainer.save_model(tmp_path / "final")
    loaded = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "final").named_parameters())
    changed = {key for key, value in loaded.items() if not torch.equal(value, before[key])}
    assert {key for key in before if ".experts." in key} <= changed


def test_targets_may_be_named(tmp_path: Path) -> None:
    trainer = make_trainer("mixtral", tmp_path, **LORA, lora_targets=["q_proj", "v_proj"])
    adapted = {key.rpartition(".lora_")[0] for key, _ in trainer.model.named_parameters() if ".lora_" in key}
    layers = example("mixtral").base.config.num_hidden_layers
    assert {key.rpartition(".")[2] for key in adapted} == {"q_proj", "v_proj"}
    assert len(adapted) == 2 * layers


def test_the_seed_alone_says_where_adapters_begin(tmp_path: Path) -> None:
    begun = []
    for number, seed in enumerate((5, 5, 6)):
        torch.manual_seed(number)
        trainer = make_trainer("mixtral", tmp_path, **LORA, seed=seed)
        begun.append({key: value for key, value in trainer.model.named_parameters() if ".lora_A." in key})
    assert all(torch.equal(value, begun[1][key]) for key, value in begun[0].items())
    assert not any(torch.equal(value, begun[2][key]) for key, value in begun[0].items())


def test_options_are_read_from_a_command_line(tmp_path: Path) -> None:
    given = "--train_parts lora --lora_targets q_proj v_proj --lora_alpha 8"
    parser = HfArgumentParser([DistillationArguments])
    options = parser.parse_args_into_dataclasses([*given.split(), "--output_dir", str(tmp_path)])[0]
    assert (options.lora_targets, options.lora_rank, options.lora_alpha) == (["q_proj", "v_proj"], 16, 8.0)


def _saved_directly(folder: Path) -> None:
    student = make_student("mixtral")
    make_trainer("mixtral", folder, model=student, **LORA)
    student.save_pretrained(folder / "final")


def _decomposed() -> PreTrainedModel:
    return decompose_experts(make_student("mixtral"), LoSparseConfig(rank=2, keep=0.5))


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (_saved_directly, "carries adapters of PEFT"),
        (lambda folder: make_trainer("mixtral", folder, model=_decomposed(), **LORA), "call compact first"),
        (lambda folder: make_trainer("mixtral", folder, **LORA, freeze_routers=False), "routers stay frozen"),
        (lambda folder: make_trainer("mixtral", folder, **LORA, lora_targets=["w_q"]), "w_q.* not found"),
        (lambda folder: make_trainer("mixtral", folder, **LORA | {"lora_rank": 0}), "lora_rank=0 must be positive"),
        (
            lambda folder: make_trainer("mixtral", folder, lora_rank=4),
            "lora_rank goes with train_parts='lora', not 'all'",
        ),
    ],
    ids=["save", "training form", "routers", "targets", "rank", "idle"],
)
def test_what_adapters_cannot_do_is_said(attempt: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        attempt(tmp_path)
