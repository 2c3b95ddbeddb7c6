"""Classes of options: equal to themselves after a round trip, and anything else refused in one sentence."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hf_mcsmoe import DistillationArguments, LoSparseConfig, MergeConfig, RepairConfig
from hf_mcsmoe.distillation import DistillationOptions
from hf_mcsmoe.methods.options import Options
from hf_mcsmoe.methods.saliency import SALIENCY

CONFIGS = [
    MergeConfig(),
    MergeConfig(reduce="prune", saliency="gate"),
    MergeConfig(experts=3, skip=("*.0.*", "*.1.*"), min_experts=2, similarity="random", seed=7),
    RepairConfig(),
    RepairConfig(method="local", ridges=(0.1, 1e-7), learning_rate=1 / 3, sequential=True),
    LoSparseConfig(),
    LoSparseConfig(energy=0.9, scope="global", allow_dense=True, skip="*.3.*"),
    LoSparseConfig(parameter_ratio=0.5),
    DistillationOptions(),
    DistillationOptions(lora_targets=["q_proj", "v_proj"], train_parts="lora", kd_weight=1.5),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_options_equal_themselves_after_a_round_trip(config: Options, tmp_path: Path) -> None:
    kind = type(config)
    assert kind.from_dict(config.to_dict()) == config
    assert kind.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    config.save_pretrained(tmp_path / "new")
    assert [file.name for file in (tmp_path / "new").iterdir()] == [kind.file_name]
    assert kind.from_pretrained(tmp_path / "new") == config


@pytest.mark.parametrize("chosen", [None, "frequency", "gate"])
def test_a_saliency_that_nobody_chose_goes_with_the_reduction(chosen: str | None) -> None:
    given = MergeConfig(saliency=chosen)
    for config in (given, MergeConfig.from_dict(given.to_dict()), replace(replace(given, reduce="prune"), seed=1)):
        assert config.saliency == chosen
        for reduce, default in (("merge", "frequency"), ("prune", "contribution")):
            used = replace(config, reduce=reduce)
            assert used.resolved().saliency == (chosen or default)
            assert set(SALIENCY.needs(chosen or default)) <= set(used.needs)


def test_several_kinds_share_a_folder(tmp_path: Path) -> None:
    kept = {type(config): config for config in CONFIGS}
    for config in kept.values():
        config.save_pretrained(tmp_path)
    assert all(kind.from_pretrained(tmp_path) == config for kind, config in kept.items())


def test_a_callable_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    for config in (MergeConfig(grouping=sorted), RepairConfig(method=print), LoSparseConfig(factorisation=max)):
        with pytest.raises(ValueError, match=r"cannot be saved: \w+ is a callable \(builtins\.\w+\)"):
            config.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "no mapping": ([("experts", 2)], TypeError, "from a dictionary of options, not list"),
    "unknown": ({"expert": 2}, ValueError, "Unknown option of MergeConfig 'expert'. Did you mean 'experts'?"),
    "no name": ({2: 2}, ValueError, "Unknown option of MergeConfig 2"),
    "text": ({"experts": "2"}, TypeError, "experts='2' must be a whole number or a number"),
    "truth": ({"min_experts": True}, TypeError, "min_experts=True must be a whole number"),
    "share": ({"min_experts": 1.5}, TypeError, "min_experts=1.5 must be a whole number"),
    "one text": ({"skip": "*.0.*"}, TypeError, "must be a list, each text"),
    "list of numbers": ({"skip": [1]}, TypeError, "must be a list, each text"),
    "number for a method": ({"grouping": 3}, TypeError, "grouping=3 must be text or a callable"),
    "nothing": ({"seed": None}, TypeError, "seed=None must be a whole number"),
    "out of range": ({"experts": 0}, ValueError, "experts=0 must be"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_no_option_may_be_is_refused(case: str) -> None:
    values, error, message = WRONG[case]
    with pytest.raises(error) as caught:
        MergeConfig.from_dict(values)
    assert message in str(caught.value)


def test_missing_and_damaged_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no mcsmoe_repair\.json, which RepairConfig\.save_pretrained writes"):
        RepairConfig.from_pretrained(tmp_path)
    for damage in (b"{", b"\xff\xfe", b"[" * 100_000, b""):
        (tmp_path / "mcsmoe_repair.json").write_bytes(damage)
        with pytest.raises(ValueError, match=r"mcsmoe_repair\.json is damaged .*: delete it"):
            RepairConfig.from_pretrained(tmp_path)


def test_arguments_of_a_trainer_are_told_as_transformers_does(tmp_path: Path) -> None:
    told = DistillationArguments(str(tmp_path), kd_weight=0.5, use_cpu=True, report_to="none").to_dict()
    assert (told["kd_weight"], told["output_dir"], told["adam_beta2"]) == (0.5, str(tmp_path), 0.98)
