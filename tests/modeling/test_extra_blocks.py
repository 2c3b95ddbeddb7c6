"""Blocks that a checkpoint holds and its class does not read: in no result, and said so."""

from pathlib import Path

import pytest
from commands import TEXT
from families import build
from helpers import Run, batches
from merged import tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PreTrainedModel

import hf_mcsmoe as mc
from hf_mcsmoe.attached import record_of
from hf_mcsmoe.distillation.pruned_students import prepare_pruning
from hf_mcsmoe.files import read_json
from hf_mcsmoe.layers.extra import extra_blocks
from hf_mcsmoe.layers.folder import Folder
from hf_mcsmoe.layers.source import source_of
from hf_mcsmoe.merge import merge_to_folder
from hf_mcsmoe.record import DROPPED

# As the families call them; of four layers the next would be the fifth, which a tiny checkpoint has in place of
# DeepSeek-V3's layer 61.
CASES = {"deepseek_v3": "model.layers.61", "glm4_moe": "model.layers.46", "qwen3_next": "mtp"}

NAMES = ["deepseek_v3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("glm4_moe", "qwen3_next"))]


def _write(name: str, folder: Path) -> Path:
    """Write a tiny model with a copy of its last layer as a block that nobody reads."""
    build(name).save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    last = {key.removeprefix("model.layers.3."): value for key, value in stored.items() if "layers.3." in key}
    place = CASES[name] + (".layers.0" if CASES[name] == "mtp" else "")
    extra = {f"{place}.{key}": value.clone() for key, value in last.items()} | {
        f"{CASES[name]}.eh_proj.weight": stored["lm_head.weight"].clone(),
    }
    assert any(".experts." in key for key in extra)
    save_file(stored | extra, folder / "model.safetensors", {"format": "pt"})
    return folder


def _loaded(folder: Path) -> PreTrainedModel:
    return type(build(folder.name)).from_pretrained(folder)


def _check_result(folder: Path, name: str) -> None:
    stored = load_file(folder / "model.safetensors") if (folder / "model.safetensors").is_file() else {}
    for file in folder.glob("model-*.safetensors"):
        stored |= load_file(file)
    assert stored
    assert not [key for key in stored if key.startswith(CASES[name])]
    config = read_json(folder / "config.json", "")
    counted = [key for key in config if key in ("num_nextn_predict_layers", "num_mtp_layers")]
    assert bool(counted) == (name != "qwen3_next")
    assert not any(config[key] for key in counted)
    assert CASES[name] in (folder / "README.md").read_text()
    steps = read_json(folder / "mcsmoe_record.json", "")["steps"]
    assert [step["options"] for step in steps if step["title"] == DROPPED] == [{"blocks": [CASES[name]]}]


@pytest.mark.parametrize("name", NAMES)
def test_a_merge_leaves_them_out_and_says_so(name: str, tmp_path: Path) -> None:
    source = _write(name, tmp_path / name)
    model = _loaded(source)
    assert extra_blocks(source_of(model)) == extra_blocks(Folder(source)) == [CASES[name]]
    statistics = mc.collect_statistics(model, batches(name, model))
    plan = mc.plan_merge(model, statistics, mc.MergeConfig(experts=4))
    merged = mc.merge_experts(model, plan)
    assert [step.options["blocks"] for step in record_of(merged).steps] == [[CASES[name]]]
    merged.save_pretrained(tmp_path / "merged")
    _check_result(tmp_path / "merged", name)
    merge_to_folder(Folder(source), plan, tmp_path / "streamed")
    _check_result(tmp_path / "streamed", name)


@pytest.mark.parametrize("name", NAMES)
def test_a_plain_result_counts_none(name: str, tmp_path: Path) -> None:
    model = _loaded(_write(name, tmp_path / name))
    config = mc.MergeConfig(experts=6, reduce="prune", budget="uniform")
    pruned = mc.compress(model, batches(name, model), config)
    pruned.save_pretrained(tmp_path / "pruned")
    _check_result(tmp_path / "pruned", name)
    config = AutoConfig.from_pretrained(tmp_path / "pruned")
    assert config.model_type == name
    assert not getattr(config, "num_nextn_predict_layers", 0)
    assert type(build(name)).from_pretrained(tmp_path / "pruned").config.model_type == name


def test_a_model_whose_experts_are_pruned_while_it_learns_counts_none(tmp_path: Path) -> None:
    student = prepare_pruning(_loaded(_write("glm4_moe", tmp_path / "glm4_moe")))
    student.save_pretrained(tmp_path / "student")
    _check_result(tmp_path / "student", "glm4_moe")


def test_models_that_hold_all_of_their_files_say_nothing(tmp_path: Path) -> None:
    for name in ("mixtral", "deepseek_v3"):
        build(name).save_pretrained(tmp_path / name)
        assert extra_blocks(Folder(tmp_path / name)) == extra_blocks(source_of(build(name))) == []
    model = build("deepseek_v3")
    merged = mc.merge_experts(model, mc.plan_merge(model, mc.collect_statistics(model, batches("deepseek_v3", model))))
    assert record_of(merged).steps == ()


@pytest.mark.slow
def test_the_command_line_says_so(tmp_path: Path, run: Run) -> None:
    source = _write("qwen3_next", tmp_path / "qwen3_next")
    tokenizer().save_pretrained(source)
    (tmp_path / "text.txt").write_text("\n\n".join([TEXT] * 20))
    given = ["--data", tmp_path / "text.txt", "--experts", 4, "--repair", "none", "--output", tmp_path / "out"]
    code, _, errors = run("compress", source, *given)
    assert code == 0, errors
    assert "`mtp` of the original is not in this model" in errors
