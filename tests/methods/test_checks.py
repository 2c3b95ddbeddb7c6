"""Options of a wrong kind are refused when they are given, in one sentence that shows the value."""

import math
from typing import Any

import pytest

from hf_mcsmoe import DistillationArguments, LoSparseConfig, MergeConfig, RepairConfig, SparsificationCallback
from hf_mcsmoe.methods.checks import check_given

# What no option that is a number takes.
NO_NUMBERS: list[Any] = [math.nan, math.inf, -math.inf, "0.5", "0,5", "", True, [], [1], {}, b"1", 1 + 2j]
NUMBERS = [
    *((MergeConfig, name) for name in ("experts", "min_experts", "seed")),
    *((LoSparseConfig, name) for name in ("rank", "keep", "parameter_ratio", "energy")),
    *((RepairConfig, name) for name in ("steps", "learning_rate", "batch_tokens", "memory_limit", "seed")),
    *((SparsificationCallback, name) for name in ("keep", "start", "end", "beta", "beta2")),
    *((DistillationArguments, name) for name in ("kd_weight", "kd_temperature", "lora_rank", "teacher_top_k")),
]


@pytest.mark.parametrize(("config", "name"), NUMBERS)
def test_a_number_that_is_none_is_refused(config: type, name: str) -> None:
    for value in NO_NUMBERS:
        with pytest.raises(ValueError, match=rf"^{name}=") as error:
            config(**{name: value})
        assert "must be a" in str(error.value)
        assert repr(value) in str(error.value)


OTHERS: list[tuple[type, dict[str, Any], str]] = [
    (MergeConfig, {"seed": 1.5}, "seed=1.5 must be a whole number"),
    (MergeConfig, {"experts": None}, "experts=None must be a whole number or a finite number"),
    (MergeConfig, {"skip": 5}, "skip=5 must be a list, each entry text"),
    (MergeConfig, {"skip": [5]}, "skip=[5] must be a list, each entry text"),
    (MergeConfig, {"saliency": ["frequency"]}, "Unknown saliency method ['frequency']"),
    (MergeConfig, {"reference": None}, "reference=None must be text"),
    (LoSparseConfig, {"allow_dense": "yes"}, "allow_dense='yes' must be True or False"),
    (LoSparseConfig, {"rank": 1.0}, "rank=1.0 must be a whole number or None"),
    (RepairConfig, {"sequential": 1}, "sequential=1 must be True or False"),
    (RepairConfig, {"ridges": 0.1}, "ridges=0.1 must be a list, each entry a finite number"),
    (RepairConfig, {"ridges": [math.nan]}, "ridges=[nan] must be a list"),
    (DistillationArguments, {"train_parts": 5}, "train_parts=5 must be text"),
    (DistillationArguments, {"lora_targets": "q_proj"}, "lora_targets='q_proj' must be a list, each entry text"),
    (DistillationArguments, {"freeze_routers": "no"}, "freeze_routers='no' must be True or False"),
]


@pytest.mark.parametrize(("config", "values", "message"), OTHERS)
def test_another_kind_of_value_is_refused(config: type, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011, the message is compared below
        config(**values)
    assert str(error.value).startswith(message)


def test_what_fits_is_taken() -> None:
    assert MergeConfig(experts=1, skip=["a"]).experts == 1
    assert LoSparseConfig(keep=0, energy=1).keep == 0
    assert RepairConfig(ridges=[1, 0.5], learning_rate=1).steps == 300
    check_given(config=(MergeConfig(), MergeConfig), other=(None, (int, type(None))))


@pytest.mark.parametrize(
    ("value", "shown"), [(None, "None"), ("x", "'x'"), ({"a": 1}, r"{'a': 1}"), ([1] * 9, "list"), (object, "type")]
)
def test_an_argument_of_another_kind_is_shown(value: object, shown: str) -> None:
    with pytest.raises(TypeError) as error:
        check_given(config=(value, (MergeConfig, int)))
    assert str(error.value) == f"config must be MergeConfig or int, not {shown}."
