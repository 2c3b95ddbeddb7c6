"""What holds for a saved checkpoint holds for one in few bits, in every family."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import families
from helpers import logits
from merged import (
    ALL,
    INTERFACE,
    NOT_CHECKPOINTED,
    NOT_OFFLOADED,
    REFUSED,
    Reports,
    check_without_package,
    save,
)
from peft import LoraConfig, get_peft_model
from quantized import by_expert, decomposed, quantize_model, quantized_example
from transformers import PreTrainedModel

from hf_mcsmoe import LoSparseConfig, decompose_experts, lora_targets, moe_layers
from hf_mcsmoe.evaluation.costs import account, bytes_on_disk, saved_costs

# Of these in 4 bits, and in bits of their own for each expert.
BY_EXPERT = {f"{name}, bits by expert": name for name in ("mixtral", "gpt_oss")}
BOTH = [*ALL, *BY_EXPERT]
LOADING = {
    "loads": BOTH,
    "saves_again": BOTH,
    "saves_all_files_again": ["mixtral"],
    "keeps_bfloat16": BOTH,
    "builds_from_its_configuration": BOTH,
    "loads_by_device_map": BOTH,
    "loads_offloaded_to_disk_and_saves": [name for name in BOTH if name not in NOT_OFFLOADED],
    "loads_as_the_base_model_and_with_a_new_head": ["mixtral", "jetmoe"],
    "generates": BOTH,
    "copies_deeply": BOTH,
    "pickles": BOTH,
    "compiles": ["mixtral", "gpt_oss", "switch_transformers", "llama4_text", *BY_EXPERT],
    "runs_every_experts_implementation": INTERFACE,
    "checkpoints_gradients": [name for name in ALL if name not in NOT_CHECKPOINTED],
}
TRAINING = {
    "trains_saves_and_resumes": ["mixtral", "gpt_oss", "switch_transformers", "jetmoe"],
    "takes_lora": ["mixtral", "gpt_oss", "switch_transformers", "llama4_text", "jetmoe", "deepseek_v3"],
}
FAST = ["mixtral", "gpt_oss", "switch_transformers"]
# Whose encoder and decoder share their experts, which quantizing refuses.
SHARED = {"diffusion_gemma"}
# Layouts of experts that none of `ALL` has; the other families differ around their experts alone, and of them every
# third will do.
UNLIKE = {"nemotron_h", "openai_privacy_filter", "aria", "llama4"}
ALIKE = sorted({family.name for family in families()} - {*REFUSED, *ALL, *SHARED, *UNLIKE})
OTHERS = sorted({*UNLIKE, *ALIKE[::3]})


def _cases(table: dict[str, list[str]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("check", "name"), [(check, name) for check in table for name in table[check]])


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Saved models of the families."""
    folder = tmp_path_factory.mktemp("checkpoints")
    cases = {name: quantized_example(name) for name in ALL} | {key: by_expert(name) for key, name in BY_EXPERT.items()}
    return {name: save(case, folder, generated=True) for name, case in cases.items()}


def _run(table: dict[str, list[str]], folders: dict[str, Path], cwd: Path, script: str) -> Reports:
    checks = {path: [check for check in table if name in table[check]] for name, path in folders.items()}
    return check_without_package({path: names for path, names in checks.items() if names}, cwd, script)


@pytest.fixture(scope="session")
def loading(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """What a process without the package found when it loaded and used the models."""
    return _run(LOADING, folders, tmp_path_factory.mktemp("loading"), "without_package.py")


@pytest.fixture(scope="session")
def training(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """What a process without the package found when it trained the models."""
    return _run(TRAINING, folders, tmp_path_factory.mktemp("training"), "train_without_package.py")


@_cases(LOADING)
@pytest.mark.slow
def test_without_the_package_it(check: str, name: str, loading: Reports) -> None:
    assert not loading[name][check], loading[name][check]


@_cases(TRAINING)
@pytest.mark.slow
def test_in_training_without_the_package_it(check: str, name: str, training: Reports) -> None:
    assert not training[name][check], training[name][check]


@pytest.fixture(scope="session")
def others(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """What a process without the package found when it loaded models of other families."""
    folder, cwd = tmp_path_factory.mktemp("families"), tmp_path_factory.mktemp("elsewhere")
    return check_without_package({save(quantized_example(name), folder): ["loads"] for name in OTHERS}, cwd)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_another_family_without_the_package_loads(name: str, others: Reports) -> None:
    assert not others[name]["loads"], others[name]["loads"]


def _reloaded(model: PreTrainedModel, folder: Path, **options: object) -> PreTrainedModel:
    model.save_pretrained(folder, max_shard_size="20KB")
    return type(model).from_pretrained(folder, **options)


@pytest.mark.parametrize("name", FAST)
def test_a_reload_holds_the_bytes_of_its_file_and_no_more(name: str, tmp_path: Path) -> None:
    case = quantized_example(name)
    loaded = _reloaded(case.merged, tmp_path)
    assert torch.equal(logits(loaded, case.batch), logits(case.merged, case.batch))
    costs, told = account(loaded, folder=tmp_path), saved_costs(case.merged)
    headers = sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in tmp_path.glob("*.safetensors"))
    assert bytes_on_disk(tmp_path) - headers == told.bytes_on_disk
    assert costs.bytes_resident == pytest.approx(told.bytes_on_disk, rel=0.02)
    assert costs.parameters == told.parameters == case.base.num_parameters() - _merged_away(case.base, case.merged)


def _merged_away(base: PreTrainedModel, merged: PreTrainedModel) -> int:
    pairs = zip(moe_layers(base), moe_layers(merged), strict=True)
    return sum(old.num_parameters // old.num_experts * (old.num_experts - new.num_experts) for old, new in pairs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_reload_in_another_dtype_leaves_the_codes(dtype: torch.dtype, tmp_path: Path) -> None:
    model = quantized_example("mixtral").merged
    loaded = _reloaded(model, tmp_path / "saved", dtype=dtype)
    again = _reloaded(loaded, tmp_path / "again", dtype=torch.float32)
    for name, tensor in model.named_parameters():
        if name.endswith(("_packed", "_scale", "_zero")):
            for other in (loaded, again):
                assert torch.equal(other.get_parameter(name), tensor)
                assert not other.get_parameter(name).requires_grad


@pytest.mark.parametrize("bits", [8, 3])
def test_low_rank_weights_in_few_bits_load(bits: int, tmp_path: Path) -> None:
    case = replace(quantized_example("mixtral"), merged=quantize_model(copy.deepcopy(decomposed("mixtral")), bits))
    loaded = _reloaded(case.merged, tmp_path)
    assert torch.equal(logits(loaded, case.batch), logits(case.merged, case.batch))
    assert any(name.endswith("down_proj_u_packed") for name, _ in loaded.named_parameters())


def test_a_quantized_model_is_neither_decomposed_nor_trained_where_it_is_frozen() -> None:
    model = copy.deepcopy(quantized_example("mixtral").merged)
    with pytest.raises(ValueError, match="decompose the model that it was made of, and quantize the result"):
        decompose_experts(model, LoSparseConfig(rank=2))
    model.requires_grad_(True)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen
    assert all(name.endswith(("_packed", "_scale", "_zero")) for name in frozen)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_train_over_quantized_experts() -> None:
    model = copy.deepcopy(quantized_example("mixtral").merged)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    targets = lora_targets(model)
    assert not any(".experts." in name for names in targets.values() for name in names)
    adapted = get_peft_model(model, LoraConfig(**targets, r=2))
    adapted(**quantized_example("mixtral").batch).logits.logsumexp(-1).mean().backward()
    trained = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert all(".lora_" in name for name in trained)
    first = [parameter.grad for name, parameter in trained.items() if ".layers.0." in name and "lora_B" in name]
    assert first
    assert all(gradient.any() for gradient in first)  # those below all experts are reached through them
    for name, parameter in adapted.get_base_model().named_parameters():
        assert ".lora_" in name or torch.equal(parameter, before[name.replace(".base_layer", "")])
