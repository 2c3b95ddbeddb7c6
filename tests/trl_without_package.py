"""Trains a saved folder with a trainer of TRL, given by name: `FOLDER TEACHER KIND`; writes what came of it."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer


def words(start: int) -> str:
    """Return a text of six words."""
    return " ".join(f"w{3 + (7 * start + 5 * number) % 50}" for number in range(6))


def main(folder: str, teacher: str, kind: str) -> None:
    """Train for two steps, save, and load what was saved."""
    options: dict[str, Any] = {"max_steps": 2, "per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True}
    options |= {"bf16": False, "model_init_kwargs": {"trust_remote_code": True, "dtype": "float32"}}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    given: dict[str, Any] = {"model": folder, "processing_class": tokenizer}
    if kind == "gkd":
        turns = [[("user", words(number)), ("assistant", words(number + 1))] for number in range(8)]
        rows = [{"messages": [{"role": role, "content": text} for role, text in turn]} for turn in turns]
        settings = GKDConfig(kind, max_new_tokens=4, teacher_model_init_kwargs={"dtype": "float32"}, **options)
        trainer: Any = GKDTrainer(teacher_model=teacher, args=settings, train_dataset=Dataset.from_list(rows), **given)
    else:
        texts = Dataset.from_list([{"text": words(number)} for number in range(8)])
        settings = SFTConfig(kind, packing=kind == "packed", max_length=16, **options)
        trainer = SFTTrainer(args=settings, train_dataset=texts, **given)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    trainer.save_model(f"{kind}/final")
    changed = [name for name, value in trainer.model.state_dict().items() if not value.equal(before[name])]
    loaded = AutoModelForCausalLM.from_pretrained(f"{kind}/final", trust_remote_code=True)
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        logits = [model.eval()(ids).logits for model in (loaded, trainer.model)]
    report = {"experts": any("experts" in name for name in changed), "same": torch.equal(*logits)}
    Path("report.json").write_text(json.dumps(report))


main(*sys.argv[1:])
