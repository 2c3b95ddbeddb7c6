"""Training checks of saved folders, run like those of `without_package.py`."""

import copy
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments
from without_package import Saved, check, main


def train(saved: Saved, steps: int, **kwargs: Any) -> Trainer:
    """Train for some steps in all, one checkpoint a step; with the trainer of translation models where it fits."""
    model = saved.load()
    seq2seq = model.config.is_encoder_decoder
    trainer_class, arguments_class = (
        (Seq2SeqTrainer, Seq2SeqTrainingArguments) if seq2seq else (Trainer, TrainingArguments)
    )
    arguments = arguments_class(
        saved.scratch, max_steps=steps, save_steps=1, use_cpu=True, report_to=[], disable_tqdm=True, learning_rate=0.01
    )
    ids = saved.expected["batch"]["input_ids"]
    trainer = trainer_class(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids])
    trainer.train(**kwargs)
    return trainer


@check
def trains_saves_and_resumes(saved: Saved) -> None:
    trainer, first = train(saved, steps=1), saved.scratch / "checkpoint-1"
    reloaded = saved.load(first)
    trained = saved.logits(trainer.model.eval())
    assert torch.equal(saved.logits(reloaded), trained)
    assert not torch.allclose(trained, saved.expected["logits"], atol=1e-3)
    names = {file.name for file in saved.folder.iterdir() if not file.name.startswith("tokenizer")}
    assert names <= {file.name for file in first.iterdir()}
    again = train(saved, steps=2, resume_from_checkpoint=str(first))
    assert again.state.global_step == 2
    assert torch.equal(saved.logits(saved.load(saved.scratch / "checkpoint-2")), saved.logits(again.model.eval()))


def adapted(saved: Saved) -> PeftModel:
    """Put LoRA on all linear layers and on the experts' matrices, and train it for a step."""
    model = saved.load()
    matrices = ("experts.gate_up_proj", "experts.up_proj", "experts.down_proj")
    experts = [name for name, _ in model.named_parameters() if name.endswith(matrices)]
    assert experts or any(name.endswith("_packed") for name, _ in model.named_parameters())
    torch.manual_seed(0)
    # Llama 4's router is a linear layer that returns two tensors, which PEFT cannot wrap.
    config = LoraConfig(
        r=4, lora_alpha=16, target_modules="all-linear", exclude_modules=r".*\.router", target_parameters=experts
    )
    model = get_peft_model(model, config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        saved.loss(model).backward()
        optimizer.step()
    ends = ("experts.lora_B.default.weight", "experts.base_layer.lora_B.default.weight")
    assert len([name for name, p in model.named_parameters() if name.endswith(ends) and p.any()]) == len(experts)
    return model.eval()


@check
def takes_lora(saved: Saved) -> None:
    model, folder = adapted(saved), saved.scratch / "adapter"
    logits = saved.logits(model)
    assert not torch.allclose(logits, saved.expected["logits"], atol=1e-3)
    model.save_pretrained(folder)
    reloaded = PeftModel.from_pretrained(saved.load(), folder)
    assert torch.equal(saved.logits(reloaded), logits)
    whole = copy.deepcopy(reloaded).merge_and_unload()
    torch.testing.assert_close(saved.logits(whole), logits, atol=1e-3, rtol=1e-3)
    whole.save_pretrained(saved.scratch / "whole")
    assert torch.equal(saved.logits(saved.load(saved.scratch / "whole")), saved.logits(whole))
    assert Path(folder, "adapter_model.safetensors").stat().st_size < 200_000


if __name__ == "__main__":
    main(*sys.argv[1:])
