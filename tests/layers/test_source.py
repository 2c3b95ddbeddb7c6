"""Sources of weights: every family from a folder equals the model in memory, with one block of it in memory."""

import gc
import json
import os
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import DEVICE, build, families, inputs
from helpers import batches, logits, state
from offloaded import OFFLOADED
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.source import Folder, InMemory, Offloaded, Source, source_of
from hf_mcsmoe.layers.streaming import blocks

# Families whose checkpoint alone does not say what it is.
NO_CHECKPOINT = {"qwen3_omni_moe_talker": "it is a part of Qwen3-Omni, and AutoConfig does not know it by itself"}
# One of each kind of storage, in the tests that always run; all families are among the slow ones.
KINDS = [
    *("mixtral", "gpt_oss", "deepseek_v3", "switch_transformers", "dbrx", "llama4", "jetmoe", "nemotron_h"),
    *("diffusion_gemma", "ernie4_5_vl_moe", "qwen3_next"),
]
FAMILIES = [
    pytest.param(family.name, marks=() if family.name in KINDS else pytest.mark.slow)
    for family in families()
    if family.name not in NO_CHECKPOINT
]


def _here(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.is_meta]


def _assert_same_experts(model: PreTrainedModel, source: Source) -> None:
    """Compare what the adapters read; a family that they refuse has nothing to compare."""
    try:
        layers = Layers.of(model)
    except ValueError:
        return
    before = _here(source.model)
    for layer, other in zip(layers, Layers.of(source), strict=True):
        with other.open() as read:
            for number, expert in ((number, layer.read().expert(number)) for number in range(layer.num_experts)):
                assert expert.keys() == read.expert(number).keys()
                assert all(torch.equal(tensor, read.expert(number)[role]) for role, tensor in expert.items())
        assert _here(source.model) == before


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_gives_the_experts_and_the_logits_of_the_model(name: str, tmp_path: Path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    source = Folder(tmp_path, device=DEVICE)
    assert type(source.model) is type(model)
    assert not _here(source.model)
    _assert_same_experts(model, source)
    texts = [inputs(name, model, batch_size=batch_size, seed=batch_size) for batch_size in (2, 3)]
    with source.streamed() as run:
        together = run(lambda batch: logits(source.model, batch), texts)
        alone = logits(source.model, texts[0])
    assert not _here(source.model)
    expected = [logits(model, batch) for batch in texts]
    assert all(map(torch.equal, [*together, alone], [*expected, expected[0]]))


@pytest.mark.parametrize("name", NO_CHECKPOINT)
def test_families_left_out_are_refused(name: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="names no model type"):
        Folder(tmp_path, device=DEVICE)


@pytest.fixture
def mixtral(tmp_path: Path) -> tuple[PreTrainedModel, Path]:
    """Return a model and the folder that it is saved to."""
    model = build("mixtral")
    model.save_pretrained(tmp_path / "mixtral")
    return model, tmp_path / "mixtral"


@pytest.mark.parametrize("name", ["mixtral", "switch_transformers"])
def test_never_more_than_one_block_is_in_memory(name: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path)
    source = Folder(tmp_path, device=DEVICE)
    of_model = blocks(source.model)
    seen: dict[str, int] = {}

    def look(module: nn.Module, arguments: tuple, output: object) -> None:
        here = {name.rpartition(".")[0] for name in _here(source.model)}
        inside = {path for path in of_model if any(name.startswith(f"{path}.") for name in here)}
        assert len(inside) == 1
        path = inside.pop()
        assert of_model[path] is module
        assert not any(parameter.is_meta for parameter in module.parameters())
        seen[path] = seen.get(path, 0) + 1

    handles = [block.register_forward_hook(look) for block in of_model.values()]
    with source.streamed() as run:
        run(lambda batch: logits(source.model, batch), batches(name, source.model))
    assert seen == dict.fromkeys(of_model, 2)
    for handle in handles:
        handle.remove()


def test_weights_are_there_while_any_block_asks_for_them_and_then_their_memory_goes(mixtral: tuple) -> None:
    source = Folder(mixtral[1], device=DEVICE)
    empty = dict(source.model.named_parameters())
    with source.loaded("model.layers.0") as block, source.loaded("model.layers.0.mlp") as inner:
        assert block.mlp is inner
        memory = weakref.ref(inner.experts.down_proj.untyped_storage())
        with source.loaded("model.layers.0.mlp"):
            pass
        assert torch.equal(inner.experts.down_proj, mixtral[0].model.layers[0].mlp.experts.down_proj)
    gc.collect()
    assert memory() is None
    assert all(parameter is empty[name] for name, parameter in source.model.named_parameters())


def test_no_file_stays_open(mixtral: tuple) -> None:
    source = Folder(mixtral[1], device=DEVICE)

    def opened() -> bool:
        links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
        mapped = str(mixtral[1]) in Path("/proc/self/maps").read_text()
        return mapped or any(os.readlink(link).endswith("safetensors") for link in links if os.path.exists(link))

    with source.loaded("model.layers.0"):
        assert not opened()
    assert not opened()


def test_a_block_that_fails_frees_its_weights(mixtral: tuple) -> None:
    source = Folder(mixtral[1], device=DEVICE)
    for manager in (source.loaded("model.layers.0"), source.streamed()):
        with pytest.raises(KeyError), manager:
            raise KeyError
        assert not _here(source.model)
    with pytest.raises(AttributeError), source.loaded("model.layers.9"):
        pass


def test_parameters_keep_what_was_said_of_them(mixtral: tuple) -> None:
    source = Folder(mixtral[1], device=DEVICE)
    source.model.model.layers[0].requires_grad_(False)
    with source.loaded("model.layers.0"), source.loaded("model.layers.1"):
        assert not any(parameter.requires_grad for parameter in source.model.model.layers[0].parameters())
        assert all(parameter.requires_grad for parameter in source.model.model.layers[1].parameters())


@pytest.mark.parametrize("name", ["mixtral", "switch_transformers", "nemotron_h"])
@pytest.mark.parametrize(
    ("saved", "dtype"),
    [(torch.bfloat16, "auto"), (torch.float32, "bfloat16"), (torch.bfloat16, torch.float32)],
)
def test_dtypes_are_those_of_from_pretrained(
    name: str, saved: torch.dtype, dtype: str | torch.dtype, tmp_path: Path
) -> None:
    build(name).to(saved).save_pretrained(tmp_path)
    source = Folder(tmp_path, dtype=dtype, device=DEVICE)
    loaded = type(source.model).from_pretrained(tmp_path, dtype=dtype)
    with source.loaded("") as whole:
        tensors = whole.state_dict(keep_vars=True) | dict(whole.named_buffers())
        expected = loaded.state_dict(keep_vars=True) | dict(loaded.named_buffers())
        assert [(key, tensor.dtype) for key, tensor in tensors.items()] == [
            (key, tensor.dtype) for key, tensor in expected.items()
        ]
        assert all(torch.equal(tensor, expected[key]) for key, tensor in tensors.items())
    assert source.model.config.dtype == loaded.config.dtype


def test_tied_weights_are_one_and_untied_ones_are_not(tmp_path: Path) -> None:
    build("switch_transformers").save_pretrained(tmp_path)
    source = Folder(tmp_path, device=DEVICE)
    for path in ("shared", "lm_head", ""):
        with source.loaded(path):
            model = source.model
            assert model.shared.weight is model.encoder.embed_tokens.weight is model.lm_head.weight
            assert not model.shared.weight.is_meta
    # A checkpoint that holds both, as files of other tools do: different ones stay two, as in from_pretrained.
    weights = load_file(tmp_path / "model.safetensors")
    for factor, is_tied in ((1, True), (2, False)):
        both = weights | {"lm_head.weight": factor * weights["shared.weight"]}
        save_file(both, tmp_path / "model.safetensors", {"format": "pt"})
        source = Folder(tmp_path, device=DEVICE)
        with source.loaded(""):
            assert (source.model.lm_head.weight is source.model.shared.weight) == is_tied
            assert torch.equal(source.model.lm_head.weight, both["lm_head.weight"])
            assert torch.equal(source.model.encoder.embed_tokens.weight, both["shared.weight"])
        assert not _here(source.model)


def _merged(folder: Path) -> PreTrainedModel:
    from hf_mcsmoe import MergeConfig, compress

    model = build("qwen3_moe")
    merged = compress(model, batches("qwen3_moe", model), MergeConfig(experts=4))
    merged.save_pretrained(folder)
    return merged


def test_a_merged_checkpoint_is_a_source_too(tmp_path: Path) -> None:
    merged = _merged(tmp_path)
    source, text = Folder(tmp_path, device=DEVICE), batches("qwen3_moe", merged)
    _assert_same_experts(merged, source)
    with source.streamed() as run:
        streamed = run(lambda batch: logits(source.model, batch), text)
    assert all(map(torch.equal, streamed, [logits(merged, batch) for batch in text]))


@pytest.mark.parametrize("layout", OFFLOADED)
def test_offloaded_and_present_models_are_sources(layout: str, tmp_path: Path) -> None:
    plain = build("mixtral")
    expected = [logits(plain, batch) for batch in batches("mixtral", plain)]
    offloaded = source_of(OFFLOADED[layout](build("mixtral"), tmp_path))
    present = source_of(plain)
    assert isinstance(offloaded, Offloaded)
    assert isinstance(present, InMemory)
    assert source_of(present) is present
    for source in (offloaded, present):
        before = _here(source.model)
        _assert_same_experts(plain, source)
        with source.streamed() as run:
            streamed = run(lambda batch: logits(source.model, batch), batches("mixtral", plain))  # noqa: B023
        assert all(map(torch.equal, streamed, expected))
        assert _here(source.model) == before


def test_a_model_without_weights_gives_none(mixtral: tuple) -> None:
    source = source_of(mixtral[1])
    assert isinstance(source, Folder)
    empty = source_of(source.model)
    for manager in (empty.loaded("lm_head"), empty.streamed()):
        with pytest.raises(ValueError, match=r"Folder\(path\)"), manager:
            pass


def test_a_present_model_is_left_as_it_was(mixtral: tuple) -> None:
    before = state(mixtral[0])
    source = InMemory(mixtral[0])
    with source.streamed() as run, source.loaded("model.layers.0"):
        run(lambda batch: logits(source.model, batch), batches("mixtral", mixtral[0]))
    assert state(mixtral[0]) == before


def _drop_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.1.block_sparse_moe.gate.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def _drop_from_index(folder: Path) -> None:
    _shard(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"].pop("model.norm.weight")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _add_to_index(folder: Path) -> None:
    _shard(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.other.weight"] = next(iter(index["weight_map"].values()))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    build("mixtral").save_pretrained(folder, max_shard_size="50KB")


def _drop_shard(folder: Path) -> None:
    _shard(folder)
    next(folder.glob("model-00002-of-*.safetensors")).unlink()


def _cut(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])


def _set(**values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return change


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "holds neither model.safetensors nor"),
    "a missing shard": (_drop_shard, "lacks model-00002-of-"),
    "a missing tensor": (_drop_tensor, r"lacks 1 weights of MixtralForCausalLM \(model.layers.1.mlp.gate.weight"),
    "a tensor missing in the index": (_drop_from_index, r"lacks 1 weights .*\(model.norm.weight"),
    "a tensor only in the index": (_add_to_index, r"lacks 1 of the tensors .*\(model.other.weight"),
    "no safetensors": (lambda folder: (folder / "model.safetensors").write_text("<html>"), "no whole safetensors"),
    "half a file": (_cut, "no whole safetensors file"),
    "another class": (
        _set(architectures=["OlmoeForCausalLM"], model_type="olmoe", head_dim=8),
        "lacks .* weights of Olmoe",
    ),
    "an unknown class": (_set(architectures=["NoSuchModel"]), "'NoSuchModel'"),
    "another width": (_set(hidden_size=48), "should be"),
    "more layers": (_set(num_hidden_layers=6), r"lacks .*\(model.layers.4"),
    "fewer experts": (_set(num_local_experts=4), "should be"),
    "quantized": (_set(quantization_config={"quant_method": "gptq", "bits": 4}), "is quantized"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_no_whole_checkpoint_is_refused_before_any_work(mixtral: tuple, damage: str) -> None:
    change, told = DAMAGES[damage]
    Folder(mixtral[1])
    change(mixtral[1])
    with pytest.raises(ValueError, match=told):
        Folder(mixtral[1])


def test_no_folder_and_no_dtype_are_refused(mixtral: tuple, tmp_path: Path) -> None:
    for path, told in ((tmp_path / "nowhere", "is no folder with a model"), (mixtral[1] / "config.json", "is a file")):
        with pytest.raises(ValueError, match=f"{path}'? {told}"):
            Folder(path)
    with pytest.raises(ValueError, match="'float99'"):
        Folder(mixtral[1], dtype="float99")


LIMITED = """
import resource, sys, threading
import torch
from transformers import AutoModelForCausalLM
from hf_mcsmoe.layers.source import Folder

torch.set_num_threads(1)
threading.stack_size(2**18)  # by default 8 MB of addresses, not of memory, which would count here
folder, allowed = sys.argv[1], int(sys.argv[2])
source = Folder(folder)
used = 1024 * int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmSize")))
resource.setrlimit(resource.RLIMIT_AS, (used + allowed, used + allowed))
batches = [{"input_ids": torch.arange(8 * seed, 8 * seed + 8)[None], "use_cache": False} for seed in range(3)]
with torch.no_grad(), source.streamed() as run:
    streamed = run(lambda batch: source.model(**batch).logits, batches)
torch.save(streamed, sys.argv[3])
with source.loaded("model.layers.1.mlp.experts") as experts:
    assert not experts.down_proj.is_meta
try:
    AutoModelForCausalLM.from_pretrained(folder)
except (MemoryError, RuntimeError, OSError) as error:
    print("does not fit")
"""


@pytest.mark.slow
def test_a_checkpoint_larger_than_the_memory_allowed(tmp_path: Path) -> None:
    config = build("mixtral").config
    config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.head_dim = 256, 1024, 12, 64
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path / "large")
    size = (tmp_path / "large" / "model.safetensors").stat().st_size
    assert size > 300e6
    command = [sys.executable, "-c", textwrap.dedent(LIMITED), tmp_path / "large", str(size // 2), tmp_path / "logits"]
    settings = os.environ | {"MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "does not fit" in done.stdout
    texts = [{"input_ids": torch.arange(8 * seed, 8 * seed + 8)[None]} for seed in range(3)]
    assert all(map(torch.equal, torch.load(tmp_path / "logits"), [logits(model, text) for text in texts]))
