"""Weights inside experts that were left out stay out while a model is distilled."""

import copy
from pathlib import Path

import pytest
import torch
from distilled import make_trainer
from families import build
from helpers import batches

from hf_mcsmoe import MergeConfig, SparsityConfig, compress, moe_layers


def _weights(model: torch.nn.Module) -> list[torch.Tensor]:
    return [value.detach().clone() for layer in moe_layers(model) for _, value in layer.parameters]


def test_zeros_of_sparse_experts_stay_zero_while_the_rest_is_trained(tmp_path: Path) -> None:
    base = build("mixtral")
    student = compress(base, batches("mixtral", base), MergeConfig(experts=1.0), sparsity=SparsityConfig())
    before = _weights(student)
    options = {"train_parts": "experts", "learning_rate": 1e-2, "max_steps": 3, "warmup_steps": 0}
    trainer = make_trainer("mixtral", tmp_path, model=student, teacher=base, save_strategy="no", **options)
    trainer.train()
    for old, new in zip(before, _weights(student), strict=True):
        assert (old == 0).float().mean() == 0.5
        assert torch.equal(old == 0, new == 0)
        assert not torch.equal(old, new)


def test_adapters_that_would_fill_the_zeros_are_refused(tmp_path: Path) -> None:
    base = build("mixtral")
    config = SparsityConfig(score="magnitude")
    student = compress(base, batches("mixtral", base), MergeConfig(experts=1.0), sparsity=config)
    with pytest.raises(ValueError, match="fills the weights that were left out"):
        make_trainer("mixtral", tmp_path, model=copy.deepcopy(student), teacher=base, train_parts="lora")
