"""What holds for a saved checkpoint, family by family: loading, saving again, generating, training."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from helpers import logits
from merged import (
    ALL,
    INTERFACE,
    NOT_CHECKPOINTED,
    NOT_OFFLOADED,
    Reports,
    check_without_package,
    example,
    merge,
    run_python,
    save,
)
from safetensors import safe_open
from transformers import MixtralConfig, MixtralForCausalLM

from hf_mcsmoe import MergeConfig, collect_statistics, merge_experts, plan_merge

LOADING = {
    "loads": ALL,
    "saves_again": ALL,
    "saves_all_files_again": ["mixtral", "switch_transformers"],
    "keeps_bfloat16": ALL,
    "builds_from_its_configuration": ALL,
    "loads_by_device_map": ALL,
    "loads_offloaded_to_disk_and_saves": [name for name in ALL if name not in NOT_OFFLOADED],
    "loads_as_the_base_model_and_with_a_new_head": ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "jetmoe"],
    "generates": ALL,
    "works_in_a_pipeline": ["mixtral", "llama4_text"],
    "copies_deeply": ALL,
    "pickles": ALL,
    "compiles": ["mixtral", "gpt_oss", "switch_transformers", "llama4_text"],
    "runs_every_experts_implementation": INTERFACE,
    "checkpoints_gradients": [name for name in ALL if name not in NOT_CHECKPOINTED],
}
TRAINING = {
    "trains_saves_and_resumes": ["mixtral", "gpt_oss", "switch_transformers", "jetmoe"],
    "takes_lora": ["mixtral", "gpt_oss", "switch_transformers", "llama4_text", "jetmoe", "deepseek_v3"],
}


def _cases(table: dict[str, list[str]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("check", "name"), [(check, name) for check in table for name in table[check]])


def _checks(table: dict[str, list[str]], folders: dict[str, Path]) -> dict[Path, list[str]]:
    checks = {path: [check for check in table if name in table[check]] for name, path in folders.items()}
    return {path: names for path, names in checks.items() if names}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Saved merged models of the families."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return {name: save(example(name), folder, generated=True) for name in ALL}


@pytest.fixture(scope="session")
def loading(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """What a process without the package found when it loaded and used the models."""
    return check_without_package(_checks(LOADING, folders), tmp_path_factory.mktemp("loading"))


@pytest.fixture(scope="session")
def training(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """What a process without the package found when it trained the models."""
    cwd = tmp_path_factory.mktemp("training")
    return check_without_package(_checks(TRAINING, folders), cwd, "train_without_package.py")


@_cases(LOADING)
def test_without_the_package_it(check: str, name: str, loading: Reports) -> None:
    assert not loading[name][check], loading[name][check]


@_cases(TRAINING)
@pytest.mark.slow
def test_in_training_without_the_package_it(check: str, name: str, training: Reports) -> None:
    assert not training[name][check], training[name][check]


def test_without_the_package_and_the_flag_loading_says_what_is_lacking(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    code = f"from transformers import AutoModel; AutoModel.from_pretrained({str(folders['mixtral'])!r})"
    done = run_python(["-c", code], tmp_path)
    assert done.returncode == 1
    assert "trust_remote_code=True" in done.stderr.splitlines()[-1]


WITH_PACKAGE = """
import pickle, sys, torch, transformers, hf_mcsmoe
for folder in sys.argv[1:]:
    expected = torch.load(f"{folder}.pt")
    for kwargs in ({}, {"trust_remote_code": False}, {"trust_remote_code": True}):
        auto_class = getattr(transformers, expected["auto_class"])
        model, info = auto_class.from_pretrained(folder, output_loading_info=True, **kwargs)
        assert not any(info.values()), info
        assert torch.equal(model(**expected["batch"]).logits, expected["logits"])
        assert type(model).__module__.startswith("hf_mcsmoe.")
        transformers.AutoModel.from_pretrained(folder, **kwargs)
    model = pickle.load(open(f"{folder}.pickle", "rb"))
    assert torch.equal(model(**expected["batch"]).logits, expected["logits"])
"""


def test_with_the_package_it_loads_without_the_flag_and_unpickles(folders: dict[str, Path], tmp_path: Path) -> None:
    for name, folder in folders.items():
        folder.with_suffix(".pickle").write_bytes(pickle.dumps(example(name).merged))
    done = run_python(["-c", WITH_PACKAGE, *map(str, folders.values())], tmp_path, package=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ALL)
def test_the_configuration_is_the_base_models_and_says_what_was_merged(name: str, folders: dict[str, Path]) -> None:
    case, written = example(name), json.loads((folders[name] / "config.json").read_text())
    base = json.loads(case.base.config.to_json_string())
    changed = {"model_type", "architectures", "transformers_version", "dtype"}
    assert {key: written[key] for key in base.keys() - changed} == {key: base[key] for key in base.keys() - changed}
    assert (written["model_type"], written["base_model_type"]) == ("mcsmoe", case.base.config.model_type)
    assert written["auto_map"]["AutoConfig"] == "configuration_mcsmoe.MCSMoEConfig"
    assert written["architectures"] == [f"MCSMoE{type(case.base).__name__}"]
    assert written["mcsmoe"]["layers"] == {
        layer: {"num_experts": len(item.expert_map), "expert_map": item.expert_map}
        for layer, item in case.plan.layers.items()
    }


@pytest.mark.parametrize("name", INTERFACE)
def test_keys_and_module_paths_are_the_base_models(name: str, folders: dict[str, Path]) -> None:
    case = example(name)
    assert case.merged.state_dict().keys() == case.base.state_dict().keys()
    assert [path for path, _ in case.merged.named_modules()] == [path for path, _ in case.base.named_modules()]
    assert isinstance(case.merged, type(case.base))
    with safe_open(folders[name] / "model.safetensors", "pt") as file:
        assert set(file.keys()) <= case.base.state_dict().keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_file_holds_each_parameter_once(dtype: torch.dtype, tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=256, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=8
    )
    _, merged = merge(MixtralForCausalLM(config).to(dtype), "mixtral", MergeConfig(experts=3))
    merged.save_pretrained(tmp_path / "saved")
    parameters = sum(parameter.numel() for parameter in merged.parameters())
    size = sum(file.stat().st_size for file in (tmp_path / "saved").glob("*.safetensors"))
    assert parameters * dtype.itemsize <= size <= 1.02 * parameters * dtype.itemsize
    assert parameters < 0.6 * MixtralForCausalLM(config).num_parameters()


@pytest.mark.parametrize("name", ["mixtral", "switch_transformers"])
def test_a_merged_model_is_not_merged_again(name: str) -> None:
    case = example(name)
    for again in (
        lambda: collect_statistics(case.merged, [case.batch]),
        lambda: merge_experts(case.merged, case.plan),
        lambda: plan_merge(case.merged, collect_statistics(case.base, [case.batch])),
    ):
        with pytest.raises(ValueError, match=r"compressed already.*merge the original model again"):
            again()


@pytest.mark.parametrize("consume", [False, True])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "switch_transformers", "qwen3_vl_moe"])
@pytest.mark.parametrize("kept_in_memory", [0.0, pytest.param(0.5, marks=pytest.mark.slow)])
def test_an_offloaded_model_merges_to_the_same_result(
    name: str, kept_in_memory: float, consume: bool, tmp_path: Path
) -> None:
    case = example(name)
    case.base.save_pretrained(tmp_path / "base")
    size = sum(file.stat().st_size for file in (tmp_path / "base").glob("*.safetensors"))
    model = type(case.base).from_pretrained(
        tmp_path / "base",
        device_map="auto",
        max_memory={"cpu": int(kept_in_memory * size) + 1},
        offload_folder=tmp_path / "offload",
    )
    assert "disk" in model.hf_device_map.values()
    before = logits(model, case.batch)
    merged = merge_experts(model, case.plan, consume=consume)
    assert (merged is model) == consume
    assert torch.equal(logits(merged, case.batch), logits(case.merged, case.batch))
    assert consume or torch.equal(logits(model, case.batch), before)
    assert not any(parameter.is_meta for parameter in merged.parameters())
    merged.save_pretrained(tmp_path / "merged")
    again = type(case.merged).from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(again, case.batch), logits(case.merged, case.batch))
