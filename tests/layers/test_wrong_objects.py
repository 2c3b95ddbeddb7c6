"""Objects of the wrong kind are refused by the public functions in one sentence, whose advice works."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import build
from helpers import batches
from merged import example
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_mcsmoe import (
    collect_statistics,
    compress,
    decompose_experts,
    merge_experts,
    moe_layers,
    plan_merge,
)

# Of PEFT and of Torch's compiler themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]


def _adapted() -> Any:
    return get_peft_model(build("mixtral"), LoraConfig(target_modules=["q_proj"]))


# What is put around a model, and how the refusal says to get it out.
WRAPPED: dict[str, tuple[Callable[[], Any], str, Callable[[Any], Any]]] = {
    "adapters": (_adapted, r"merge_and_unload\(\)", lambda model: model.merge_and_unload()),
    "data parallel": (lambda: nn.DataParallel(build("mixtral")), "`module`", lambda model: model.module),
    "compiled": (lambda: torch.compile(build("mixtral")), "`_orig_mod`", lambda model: model._orig_mod),
}


@pytest.mark.parametrize("case", WRAPPED)
def test_what_is_around_a_model_is_refused_and_the_advice_works(case: str) -> None:
    make, message, advice = WRAPPED[case]
    model = make()
    given = batches("mixtral", build("mixtral"), 1)
    for call in (moe_layers, lambda model: collect_statistics(model, given), lambda model: compress(model, given)):
        with pytest.raises(ValueError, match=rf"is no model of Transformers itself: .*{message}"):
            call(model)
    assert collect_statistics(advice(model), given, ["tokens"]).layers


def test_adapters_inside_a_model_are_refused_and_the_advice_works() -> None:
    adapted = _adapted()
    inner, given = adapted.get_base_model(), batches("mixtral", build("mixtral"), 1)
    for call in (collect_statistics, compress):
        with pytest.raises(ValueError, match=r"carries adapters of PEFT, .* call merge_and_unload\(\)"):
            call(inner, given)
    assert collect_statistics(adapted.merge_and_unload(), given, ["tokens"]).layers


@pytest.mark.parametrize("model", [None, 5, [], {}, torch.ones(2)])
def test_what_is_no_model_is_refused(model: Any) -> None:
    for call in (moe_layers, lambda model: collect_statistics(model, []), lambda model: compress(model, [])):
        with pytest.raises(TypeError, match="model must be a model of Transformers or the folder of one, not"):
            call(model)


@pytest.mark.parametrize("name", ["", "no/such/folder"])
def test_a_name_that_is_no_folder_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"is no folder|holds no config\.json"):
        moe_layers(name)  # type: ignore[arg-type]


def test_arguments_of_another_kind_are_refused() -> None:
    case = example("mixtral")
    model, statistics = case.base, collect_statistics(case.base, [case.batch])
    calls: list[tuple[Callable[[], Any], str]] = [
        (lambda: plan_merge(model, None), "statistics must be RoutingStatistics, not None"),
        (lambda: plan_merge(model, statistics, {"experts": 4}), "config must be MergeConfig or None, not {'experts'"),
        (lambda: plan_merge(model, statistics, "msmoe"), "config must be MergeConfig or None, not 'msmoe'"),
        (lambda: merge_experts(model, None), "plan must be MergePlan, not None"),
        (lambda: merge_experts(model, case.plan.to_dict()), "plan must be MergePlan, not dict"),
        (lambda: merge_experts(model, case.plan, statistics={}), "statistics must be RoutingStatistics or None"),
        (lambda: compress(model, [case.batch], {"experts": 4}), "config must be MergeConfig or None"),
        (lambda: compress(model, [case.batch], repair="refit"), "repair must be RepairConfig or None, not 'refit'"),
        (lambda: compress(model, [case.batch], low_rank=4), "low_rank must be LoSparseConfig or None, not 4"),
        (lambda: decompose_experts(copy.deepcopy(case.merged), 4), "config must be LoSparseConfig or None, not 4"),
    ]
    for call, message in calls:
        with pytest.raises(TypeError) as error:
            call()
        assert message in str(error.value)
