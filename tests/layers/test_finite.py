"""A weight that is not finite is named before anything is made of it, wherever the weights are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from families import build, inputs
from helpers import Run, batches
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from hf_mcsmoe import MergeConfig, check_weights, collect_statistics, compress, merge_experts, plan_merge
from hf_mcsmoe.layers.finite import check_tensor
from hf_mcsmoe.layers.folder import Folder
from hf_mcsmoe.merge import merge_to_folder

NAME = "mixtral"
PLACES = {
    "lm_head.weight": (3, 1),
    "model.norm.weight": (2,),
    "model.layers.1.self_attn.q_proj.weight": (0, 5),
    "model.layers.2.mlp.experts.gate_up_proj": (5, 0, 0),
}


def broken(name: str, value: float = torch.nan) -> PreTrainedModel:
    model = build(NAME)
    model.get_parameter(name).data[PLACES[name]] = value
    return model


def told(name: str, value: str = "nan") -> str:
    return rf"The weight {name} is {value} at \[{', '.join(map(str, PLACES[name]))}\]"


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize(("value", "shown"), [(torch.nan, "nan"), (torch.inf, "inf"), (-torch.inf, "-inf")])
def test_a_broken_weight_is_named_with_its_place(name: str, value: float, shown: str) -> None:
    check_weights(build(NAME))
    for change in (lambda model: model, lambda model: model.to(torch.float16), accelerate.cpu_offload):
        with pytest.raises(ValueError, match=told(name, shown)):
            check_weights(change(broken(name, value)))


def test_large_values_are_finite() -> None:
    model = build(NAME)
    model.lm_head.weight.data.fill_(3e38)
    check_weights(model)


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (9,), (3, 33, 65)])
def test_one_value_that_is_not_finite_is_found_anywhere(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    whole = torch.randn(shape).to(dtype)
    check_tensor("whole", whole)
    check_tensor("empty", whole[:0])
    for place in {0, whole.numel() // 2, whole.numel() - 1}:
        tensor = whole.float().flatten()
        tensor[place] = torch.nan
        for given in (tensor.view(shape), tensor.view(shape).mT if len(shape) > 1 else tensor):
            with pytest.raises(ValueError, match="The weight w is nan at"):
                check_tensor("w", given.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_weights_are_not_copied_to_be_checked(dtype: torch.dtype) -> None:
    tensor = torch.ones(4, 2**22).to(dtype)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        check_tensor("w", tensor)
    most = max(event.cpu_memory_usage for event in recorded.events())
    assert most <= 2**22 * 4, "a piece of it at most"


def merged(model: PreTrainedModel) -> Any:
    plan = plan_merge(build(NAME), collect_statistics(build(NAME), batches(NAME, build(NAME))), MergeConfig(experts=2))
    return merge_experts(model, plan)


@pytest.mark.parametrize("make", [merged, lambda model: compress(model, iter(()))], ids=["merge", "compress"])
def test_a_broken_model_is_refused_before_anything_is_done(make: Callable[[PreTrainedModel], Any]) -> None:
    with pytest.raises(ValueError, match=told("lm_head.weight")):
        make(broken("lm_head.weight"))


def test_a_broken_folder_is_refused_and_nothing_is_written(tmp_path: Path, run: Run) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    build(NAME).save_pretrained(good)
    broken("lm_head.weight").save_pretrained(bad, max_shard_size="100KB")
    plan = plan_merge(Folder(good), collect_statistics(Folder(good), batches(NAME, build(NAME))), MergeConfig())
    for folder in (bad, str(bad), Folder(bad)):
        with pytest.raises(ValueError, match=told("lm_head.weight")):
            check_weights(folder)
    with pytest.raises(ValueError, match=told("lm_head.weight")):
        merge_to_folder(Folder(bad), plan, tmp_path / "result")
    assert not (tmp_path / "result").exists()
    merge_to_folder(Folder(good), plan, tmp_path / "result")
    check_weights(tmp_path / "result")
    assert run("inspect", tmp_path / "result", "--check")[0] == 0
    code, _, error = run("inspect", bad, "--check")
    assert code != 0
    assert "lm_head.weight is nan" in error


def test_what_a_pass_finds_is_traced_to_the_weight_or_to_an_overflow() -> None:
    batch = [inputs(NAME, build(NAME))]
    with pytest.raises(ValueError, match=told("model.layers.1.self_attn.q_proj.weight")):
        collect_statistics(broken("model.layers.1.self_attn.q_proj.weight"), batch)
    model = build(NAME)
    model.get_parameter("model.layers.0.mlp.gate.weight").data.fill_(3e38)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts gave values .* the model overflows"):
        collect_statistics(model, batch)


def test_a_folder_without_weights_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds neither model\.safetensors nor"):
        check_weights(tmp_path)
