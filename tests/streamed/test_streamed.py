"""A compression from folder to folder is bit for bit the one in memory, whatever is asked for."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import DEVICE, build
from helpers import batches
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_mcsmoe import LoSparseConfig, MergeConfig, QuantizationConfig, RepairConfig, SparsityConfig, compress
from hf_mcsmoe.layers.folder import Folder
from hf_mcsmoe.streamed.compress import compress_folder

pytestmark = [
    pytest.mark.filterwarnings("ignore:The repair left"),
    pytest.mark.filterwarnings("ignore:Few calibration tokens"),
]
MODELS = Path(__file__).parents[3] / "shared" / "data" / "models"
INDEX = "model.safetensors.index.json"
REFIT, LOCAL = RepairConfig(), RepairConfig(method="local", steps=30, batch_tokens=64)
IN_TURN = RepairConfig(method="joint", sequential=True)
BITS, RANK = QuantizationConfig(bits=4, group_size=8), LoSparseConfig(rank=2, keep=0.25)
COMPETING = LoSparseConfig(energy=0.5, scope="global", keep=0.1, allow_dense=True)
WAYS: dict[str, dict[str, Any]] = {
    "merge": {},
    "refit": {"repair": REFIT},
    "local": {"repair": LOCAL},
    "in turn": {"repair": IN_TURN},
    "low rank": {"repair": REFIT, "low_rank": RANK},
    "low rank, local": {"repair": LOCAL, "low_rank": RANK},
    "bits": {"repair": REFIT, "quantization": BITS},
    "all": {"repair": IN_TURN, "low_rank": RANK, "quantization": BITS},
}
ZEROS, PAIRS = SparsityConfig(), SparsityConfig("magnitude", "2:4", skip=("*.1.*",))
NARROW = SparsityConfig("wanda", "units", 1 / 3)
# To one count, which a model of the family's own class is.
PRUNED = MergeConfig(experts=4, reduce="prune", budget="uniform")
HALF, WHOLE = MergeConfig(experts=4), MergeConfig(experts=1.0)
SKIPPED = MergeConfig(experts=4, skip=("*.0.*",))
MEASURED = MergeConfig(experts=4, budget="measured")
# A family, what is merged, and what else is done; those of the first list are quick.
GRADIENTS = MergeConfig(experts=4, saliency="taylor", merging="fisher", similarity="gradient")
QUICK: list[Any] = [
    ("mixtral", GRADIENTS, {}),
    ("mixtral", GRADIENTS, {"routers": True}),
    ("switch_transformers", HALF, WAYS["refit"]),
    ("mixtral", PRUNED, {}),
    ("mixtral", SKIPPED, {"sparsity": NARROW}),
    ("mixtral", MEASURED, {}),
    ("mixtral", HALF, {"low_rank": COMPETING}),
]
SLOW: list[Any] = [
    *(("mixtral", HALF, way) for way in WAYS.values()),
    *(("switch_transformers", HALF, way) for way in WAYS.values()),
    ("deepseek_v3", HALF, WAYS["refit"]),
    *((name, GRADIENTS, WAYS["refit"]) for name in ("qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss")),
    ("gpt_oss", HALF, WAYS["bits"]),
    ("switch_transformers", WHOLE, {"quantization": BITS}),
    ("switch_transformers", WHOLE, {"repair": LOCAL, "low_rank": RANK, "quantization": BITS}),
    ("mixtral", MergeConfig(experts=4, reduce="prune"), WAYS["bits"]),
    ("mixtral", PRUNED, WAYS["refit"]),
    *(("mixtral", config, {"sparsity": way}) for config in (WHOLE, PRUNED) for way in (ZEROS, PAIRS, NARROW)),
    *(("mixtral", HALF, {**WAYS[name], "sparsity": NARROW}) for name in ("low rank, local", "bits")),
    ("mixtral", WHOLE, {"repair": LOCAL, "sparsity": NARROW}),
    ("gpt_oss", SKIPPED, {"repair": IN_TURN, "sparsity": ZEROS}),
    ("gpt_oss", replace(PRUNED, pruned_router="constant"), {"repair": REFIT, "sparsity": NARROW}),
    ("jetmoe", HALF, {"repair": REFIT, "sparsity": NARROW}),
    ("switch_transformers", WHOLE, {"sparsity": ZEROS}),
    ("switch_transformers", HALF, {"sparsity": PAIRS}),
    ("mixtral", HALF, {"sparsity": NARROW, "low_rank": LoSparseConfig(energy=0.5, scope="global", allow_dense=True)}),
    ("mixtral", MergeConfig(experts=4, budget="measured"), {"sparsity": NARROW}),
    ("qwen3_moe", replace(MEASURED, reduce="auto"), WAYS["refit"]),
    ("qwen3_moe", replace(MEASURED, reduce="prune", experts=0.5), WAYS["bits"]),
    ("switch_transformers", MEASURED, WAYS["all"]),
    ("switch_transformers", HALF, {"repair": LOCAL, "low_rank": COMPETING, "quantization": BITS}),
    ("qwen3_moe", HALF, {"repair": IN_TURN, "low_rank": LoSparseConfig(rank=3, scope="global")}),
    ("mixtral", WHOLE, {"low_rank": LoSparseConfig(parameter_ratio=0.4, scope="global")}),
    ("mixtral", MEASURED, {"repair": REFIT, "sparsity": NARROW, "low_rank": COMPETING}),
]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


def documents(folder: Path) -> dict[str, Any]:
    """Return the contents of all that is not weights; bytes on disk, headers included, differ."""
    found: dict[str, Any] = {}
    for file in folder.iterdir():
        if file.suffix == ".safetensors" or file.name == INDEX:
            continue
        lines = file.read_text().splitlines()
        found[file.name] = [line for line in lines if "bytes on disk" not in line and "bytes_on_disk" not in line]
    return found


def assert_alike(ours: Path, theirs: Path) -> None:
    """Check that two folders hold the same."""
    streamed, expected = weights(ours), weights(theirs)
    assert streamed.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(streamed[name], tensor), name
        assert streamed[name].dtype == tensor.dtype
    assert documents(ours) == documents(theirs)
    size = sum(file.stat().st_size for file in ours.glob("*.safetensors"))
    *_, last = json.loads((ours / "mcsmoe_record.json").read_text())["costs"].values()
    assert last["bytes_on_disk"] == size
    index = json.loads((ours / INDEX).read_text())
    assert index["weight_map"].keys() == streamed.keys()


def both(name: str, config: MergeConfig, folder: Path, *, routers: bool = False, **options: Any) -> tuple[Path, Path]:
    """Compress a model of a family in memory and from folder to folder; returns both results.

    Args:
        routers: whether its loss reads what they say.
    """
    model = build(name)
    if routers:
        model.config.output_router_logits, model.config.router_aux_loss_coef = True, 3.0
    model.save_pretrained(folder / "source")
    rows, held_out, other = batches(name, model, 2), batches(name, model, 4)[2:3], batches(name, model, 4)[3:]
    given = {"held_out": held_out, "check": {"other": other}, **options}
    compress_folder(Folder(folder / "source", device=DEVICE), folder / "a" / "out", rows, config, **given)
    loaded = type(model).from_pretrained(folder / "source").to(DEVICE)
    compress(loaded, rows, config, **given).save_pretrained(folder / "b" / "out")
    return folder / "a" / "out", folder / "b" / "out"


CASES = [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]


@pytest.mark.parametrize(("name", "config", "options"), CASES)
def test_bit_for_bit(name: str, config: MergeConfig, options: dict[str, Any], tmp_path: Path) -> None:
    assert_alike(*both(name, config, tmp_path, **options))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3moe-mini-16e"])
@pytest.mark.parametrize("way", ["refit", "low rank", "bits", "gradients"])
def test_trained_models_bit_for_bit(name: str, way: str, tmp_path: Path) -> None:
    config = replace(GRADIENTS if way == "gradients" else HALF, experts=8)
    place = MODELS / name
    tokenizer = AutoTokenizer.from_pretrained(place)
    lines = [line for line in (place / "validation.txt").read_text().splitlines() if len(line) > 200][:12]
    rows = [dict(tokenizer(line, return_tensors="pt", truncation=True, max_length=64)) for line in lines]
    options = {**WAYS.get(way, {}), "held_out": rows[8:]}
    compress_folder(place, tmp_path / "a" / "out", rows[:8], config, **options)
    model = AutoModelForCausalLM.from_pretrained(place)
    compress(model, rows[:8], config, **options).save_pretrained(tmp_path / "b" / "out")
    assert_alike(tmp_path / "a" / "out", tmp_path / "b" / "out")
