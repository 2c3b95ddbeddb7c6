"""Tiny models before and after a merge, saved folders of them, and processes that cannot import the package."""

import functools
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from families import VOCAB_SIZE, build, inputs
from helpers import Batch, batches, logits
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from without_package import generate, recorded

from hf_mcsmoe import MergeConfig, MergePlan, collect_statistics, merge_experts, moe_layers, plan_merge
from hf_mcsmoe.attached import loading_class

TESTS = Path(__file__).parent
# Families that cannot be merged, and a few words of the reason that they are told.
REFUSED = {
    "doge": "nothing to align",
    "nllb_moe": "only its experts 0 and 1",
    "qwen3_omni_moe_talker": "it is not supported",
}
# One of each layout, for what is checked family by family.
INTERFACE = ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "qwen3_vl_moe", "gemma4"]
OUTSIDE = ["switch_transformers", "llama4_text", "jetmoe", "dbrx", "longcat_flash", "step3p7"]
ALL = INTERFACE + OUTSIDE
# Base models of Transformers that fail by themselves: under offloading, and under gradient checkpointing.
NOT_OFFLOADED, NOT_CHECKPOINTED = {"jetmoe", "longcat_flash"}, {"jetmoe"}
# What went wrong, or "", per family and check.
Reports = dict[str, dict[str, str]]


@dataclass(frozen=True)
class Example:
    """A base model, what it was merged by, and the result; shared by tests, so none of it may be changed."""

    name: str
    base: PreTrainedModel
    batch: Batch
    plan: MergePlan
    merged: PreTrainedModel


def uneven(saliency: list[torch.Tensor], experts: float, min_experts: int) -> list[int]:
    """Keep a share of the experts, one more or less from layer to layer."""
    return [int(len(scores) * experts) + (-1) ** number for number, scores in enumerate(saliency)]


def merge(model: PreTrainedModel, name: str, config: MergeConfig | None = None) -> tuple[MergePlan, PreTrainedModel]:
    """Merge a tiny model, by default to about half of its experts, unlike from layer to layer."""
    config = config or MergeConfig(experts=0.5, budget=uneven)
    plan = plan_merge(model, collect_statistics(model, batches(name, model)), config)
    return plan, merge_experts(model, plan)


@functools.cache
def example(name: str) -> Example:
    """Merge the tiny model of a family."""
    base = build(name)
    return Example(name, base, inputs(name, base), *merge(base, name))


def stored_experts(model: PreTrainedModel) -> list[int]:
    """Return how many experts each layer stores."""
    return [layer.num_experts for layer in moe_layers(model)]


def tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of whole words `w0 w1 ...`, as many as the tiny models have embeddings."""
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(VOCAB_SIZE)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2", unk_token="w0")


def save(case: Example, folder: Path, *, generated: bool = False) -> Path:
    """Save a merged model in `folder`, and beside it what a process that loads it has to find."""
    path = folder / case.name
    case.merged.save_pretrained(path)
    tokenizer().save_pretrained(path)
    expected = {
        "auto_class": loading_class(case.merged),
        "base_class": type(case.base).__name__,
        "batch": case.batch,
        "logits": logits(case.merged, case.batch),
        "modules": [module for module, _ in case.merged.named_modules()],
        "recorded": recorded(case.base, case.batch),
        "generated": generate(case.merged, case.batch) if generated else {},
    }
    torch.save(expected, path.with_suffix(".pt"))
    return path


def run_python(
    arguments: list[str], cwd: Path, *, package: bool = False, **environment: str
) -> subprocess.CompletedProcess:
    """Run a fresh interpreter in `cwd`; unless `package`, one where `hf_mcsmoe` cannot be imported."""
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    # One thread, as in the tests: how many there are decides how sums are split, and so their last bits.
    variables |= {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    variables |= {"HF_MODULES_CACHE": str(cwd / ".modules"), **environment}
    if not package:
        variables["PYTHONPATH"] = str(TESTS / "absent")
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=cwd, env=variables, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=900
    )


def check_without_package(checks: dict[Path, list[str]], cwd: Path, script: str = "without_package.py") -> Reports:
    """Run the checks of each folder in one process; returns what went wrong, or "", per folder's name and check."""
    done = run_python([str(TESTS / script), *(f"{path}={','.join(names)}" for path, names in checks.items())], cwd)
    assert done.returncode == 0, done.stderr
    return json.loads((cwd / "report.json").read_text())
