"""Methods by name: what is there is found, what is not is refused with the name that was probably meant."""

import re
from dataclasses import fields
from functools import partial
from typing import Any

import pytest
from methods_page import PAGE, page

from hf_mcsmoe import MergeConfig
from hf_mcsmoe.card import method_steps
from hf_mcsmoe.methods.config import REGISTRIES, option_help
from hf_mcsmoe.methods.registry import Registry, method_name
from hf_mcsmoe.methods.view import Sums

METHODS = [(stage, name) for stage, registry in REGISTRIES.items() for name in registry]


def _registry() -> Registry:
    registry = Registry("colour")
    registry.register("crimson", paper="1234.56789")(str.upper)
    registry.register("blue")(str.lower)
    return registry


def test_a_method_is_found_by_name_and_a_callable_stands_for_itself() -> None:
    registry = _registry()
    assert list(registry) == ["crimson", "blue"]
    assert registry["crimson"] is str.upper
    assert registry.methods["crimson"].paper == "1234.56789"
    assert registry[str.title] is str.title


@pytest.mark.parametrize(
    ("name", "suggestion"), [("crimsom", " Did you mean 'crimson'?"), ("Blue", " Did you mean 'blue'?"), ("zzz", "")]
)
def test_an_unknown_name_says_what_was_meant_and_what_there_is(name: str, suggestion: str) -> None:
    message = f"Unknown colour method '{name}'.{suggestion} Known: 'crimson', 'blue'."
    with pytest.raises(ValueError, match=re.escape(message)):
        _registry()[name]


def test_what_a_method_needs_may_be_a_single_name() -> None:
    def mine() -> None: ...

    registry = _registry()
    assert registry.needs(mine) == ()
    mine.needs = "counts"
    assert registry.needs(mine) == ("counts",)
    registry.register("green", needs="gate_sum")(str.title)
    assert registry.needs("green") == ("gate_sum",)


def test_the_advice_on_a_sum_that_is_missing_works_for_a_function_of_ones_own() -> None:
    with pytest.raises(ValueError, match=r"a function of your own names .* `function\.needs = \['gate_sum'\]`"):
        Sums()["gate_sum"]


@pytest.mark.parametrize(("stage", "name"), METHODS)
def test_every_method_is_a_documented_option_with_a_paper_identifier(stage: str, name: str) -> None:
    method = REGISTRIES[stage].methods[name]
    assert method.name == name
    assert method.function.__doc__
    assert re.fullmatch(r"(\d{4}\.\d{5})?", method.paper)
    assert name in re.findall(r"\w+", option_help(stage).partition(": ")[2]), "among the names, behind the colon"
    assert getattr(MergeConfig(**{stage: name}), stage) == name


def test_every_option_is_described_and_every_stage_has_its_option() -> None:
    assert all(option_help(item.name) for item in fields(MergeConfig))
    assert REGISTRIES.keys() <= {item.name for item in fields(MergeConfig)}


def frequency(statistics: object) -> None:
    """Stand for a user's method that has a built-in one's name."""


NAMED = [
    ("frequency", "frequency"),
    (frequency, f"{__name__}.frequency"),
    (partial(frequency, 1), "functools.partial"),
]


@pytest.mark.parametrize(("method", "name"), NAMED)
def test_a_plan_names_a_method_given_either_way(method: Any, name: str) -> None:
    assert method_name(method) == name


def test_the_card_credits_the_paper_for_its_own_methods_only() -> None:
    ours, theirs = MergeConfig().resolved(), MergeConfig(saliency=frequency)
    rows = [next(row for row in method_steps(config.to_dict()) if row[0] == "saliency") for config in (ours, theirs)]
    assert "2310.01334" in rows[0][2]
    assert rows[1] == ("saliency", f"{__name__}.frequency", "")


def test_the_page_of_methods_is_what_they_say_of_themselves() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "write it with: python tests/methods_page.py > docs/methods.md"
