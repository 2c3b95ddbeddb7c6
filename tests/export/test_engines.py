"""Rules of engines: which numbers of experts they run, and what they are told instead."""

import pytest

from hf_mcsmoe.export.architectures import check_architecture
from hf_mcsmoe.export.engines import ENGINES, RULES, Shape, check_engines, nearest_count


@pytest.mark.parametrize(
    ("engines", "shape", "message"),
    [
        (["vllm"], Shape(12, 2, router_groups=8), "multiple of the router's 8 groups.*Keep 16 experts"),
        (["vllm"], Shape(8, 2, router_groups=8), "Keep 16 experts"),
        (["sglang"], Shape(20, 2, router_groups=8), "Keep 24 experts"),
        (["llama.cpp"], Shape(1500, 8, width=256), "1024 experts a layer at most.*Keep 1024 experts"),
        (["mlx"], Shape(10, 2, router_groups=4), "Keep 12 experts"),
        (["vlm"], Shape(8), "Unknown engine 'vlm'.*vllm"),
    ],
)
def test_numbers_that_an_engine_cannot_run_are_refused_with_the_nearest_one(
    engines: list[str], shape: Shape, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_engines(engines, shape)


def test_what_only_runs_slower_is_told_and_not_refused() -> None:
    told = check_engines(["vllm", "llama.cpp"], Shape(12, 2, width=768))
    assert len(told) == 2
    assert told[0].startswith("vllm shares experts out evenly")
    assert "powers of two" in told[1]
    assert check_engines(ENGINES, Shape(64, 8, width=768)) == []


@pytest.mark.parametrize("engine", ["llama.cpp", "mlx"])
def test_families_that_an_engine_does_not_know_are_refused(engine: str) -> None:
    assert check_architecture([engine], "MixtralForCausalLM", "mixtral") == []
    with pytest.raises(ValueError, match=f"{engine} does not know JetMoeForCausalLM"):
        check_architecture([engine], "JetMoeForCausalLM", "jetmoe")
    (told,) = check_architecture(["vllm", "transformers"], "JetMoeForCausalLM", "jetmoe")
    assert told == "Whether vllm knows `JetMoeForCausalLM` was not looked up."


def test_every_rule_is_of_an_engine_and_tells_its_source() -> None:
    assert {rule.engine for rule in RULES} == set(ENGINES) - {"transformers"}
    assert all(rule.source and rule.words.format(**vars(Shape(8))) for rule in RULES)


def test_the_nearest_number_lies_between_what_a_router_needs_and_what_there_is() -> None:
    shape = Shape(12, 2, router_groups=8)
    assert nearest_count(["vllm"], shape) == 16
    assert nearest_count(["vllm"], shape, most=15) is None
    assert nearest_count([], shape) == 16
    assert nearest_count([], Shape(3, 4), least=2) == 4
    assert nearest_count([], Shape(12, 2), least=14) == 14
