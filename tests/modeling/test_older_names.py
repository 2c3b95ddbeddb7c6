"""What a plain configuration says twice: by the names of Transformers 5, and by older ones that engines go by."""

import json
from pathlib import Path

import pytest
from pruned import pruned
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from hf_mcsmoe.modeling.plain_mcsmoe import older_names

CHECKED = {
    "qwen3_moe": {"num_experts", "rope_theta"},
    "olmoe": {"rope_theta"},
    "gpt_oss": {"num_experts", "rope_theta", "rope_scaling"},
    "glm4_moe": {"rope_theta", "partial_rotary_factor"},
    "gemma4_text": set(),  # which has a base for each kind of layer
}
# What a configuration has of the file that it was read from.
UNSAVED = {"transformers_version": None, "_name_or_path": None}


@pytest.mark.parametrize("name", CHECKED)
def test_transformers_reads_a_configuration_with_older_names_as_the_one_without(name: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(name)
    expected, names = config.to_dict(), older_names(config)
    assert names.keys() == CHECKED[name]
    vars(config).update(names)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert {key: written[key] for key in names} == names
    assert AutoConfig.from_pretrained(tmp_path).to_dict() | UNSAVED == expected | UNSAVED


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CONFIG_MAPPING_NAMES if "moe" in name or "deepseek" in name])
def test_every_family_reads_older_names_as_its_own(name: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(name)
    expected, text = config.to_dict(), config.get_text_config()
    vars(text).update(older_names(text))
    config.save_pretrained(tmp_path)
    assert type(config).from_pretrained(tmp_path).to_dict() | UNSAVED == expected | UNSAVED


def test_a_pruned_checkpoint_has_the_names_that_mlx_looks_for(tmp_path: Path) -> None:
    case = pruned("qwen3_moe", "uniform")
    case.merged.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "qwen3_moe"
    assert config["num_experts"] == config["num_local_experts"] < case.base.config.num_experts
    assert config["rope_theta"] == case.base.config.rope_parameters["rope_theta"]
