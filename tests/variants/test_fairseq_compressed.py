"""Converted models of fairseq compressed: merged as the formulas say, in memory and from folder to folder."""

import json
from pathlib import Path

import oracle
import pytest
import torch
from fairseq_files import EXPERTS, VOCAB, expected, options, weights, write
from families import build
from helpers import Batch, Run, logits
from merged import check_without_package, tokenizer
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from variant_folders import fairseq, save, xglm

from hf_mcsmoe import (
    LoSparseConfig,
    MergeConfig,
    QuantizationConfig,
    RepairConfig,
    SparsityConfig,
    compress,
    compress_folder,
    moe_layers,
)
from hf_mcsmoe.variants import add_momentum, convert_fairseq_moe, set_top_k
from hf_mcsmoe.variants.fairseq_moe_mcsmoe import FairseqMoeModel
from hf_mcsmoe.variants.remote_mcsmoe import become

pytestmark = [
    pytest.mark.filterwarnings("ignore:Few calibration tokens"),
    pytest.mark.filterwarnings("ignore:The repair left"),
    pytest.mark.filterwarnings("ignore:No tokenizer lies beside"),
]
WAYS = {
    "merge": (MergeConfig(experts=0.5), {}),
    "refit, low rank": (MergeConfig(experts=0.5), {"repair": RepairConfig(), "low_rank": LoSparseConfig(rank=4)}),
    "bits": (MergeConfig(experts=0.5), {"quantization": QuantizationConfig(bits=4, group_size=8)}),
    "pruned": (MergeConfig(experts=0.5, reduce="prune"), {}),
    "pruned, constants": (MergeConfig(experts=0.5, reduce="prune", pruned_router="constant"), {}),
    "zeros": (MergeConfig(experts=0.5), {"sparsity": SparsityConfig()}),
}

QUICK = [
    "loads",
    "saves_again",
    "saves_all_files_again",
    "generates",
    "loads_by_device_map",
    "copies_deeply",
    "pickles",
]
MORE = [
    *("keeps_bfloat16", "builds_from_its_configuration", "loads_offloaded_to_disk_and_saves", "compiles"),
    *("checkpoints_gradients", "runs_every_experts_implementation", "works_in_a_pipeline"),
]
TRAINING = ["trains_saves_and_resumes", "takes_lora"]


def convert(folder: Path, learned: bool = False) -> PreTrainedModel:
    return convert_fairseq_moe(write(folder, weights(learned), options(no_scale_embedding=learned)))


def rows(number: int, length: int = 12) -> list[list[int]]:
    generator = torch.Generator().manual_seed(number)
    return torch.randint(4, VOCAB, (number, length), generator=generator).tolist()


def batches(number: int = 8) -> list[Batch]:
    return [{"input_ids": torch.tensor(rows(number))}]


def compressed(model: PreTrainedModel, way: str, data: list[Batch]) -> PreTrainedModel:
    config, stages = WAYS[way]
    return compress(model, data, config, **stages)


def _merged(held: dict[str, torch.Tensor], layer: int, seen: oracle.Sums, count: int) -> dict[str, torch.Tensor]:
    """Return by fairseq's names the weights of a layer whose every expert is what its group was merged to."""
    path = f"decoder.layers.{layer}.moe_layer.experts"
    read = lambda expert, name: held[f"{path}.{expert}.{name}"]  # noqa: E731
    experts = [
        {"up": read(e, "fc1.weight"), "up_bias": read(e, "fc1.bias")[:, None], "down": read(e, "fc2.weight")}
        for e in range(EXPERTS)
    ]
    expert_map, dominant = oracle.group(seen, count)
    found = {}
    for expert in range(EXPERTS):
        members = [other for other in range(EXPERTS) if expert_map[other] == expert_map[expert]]
        one = oracle.merged(experts, members, dominant[expert_map[expert]], seen.counts)
        shares = [seen.counts[member] or 1e-30 for member in members]
        bias = sum(
            share / sum(shares) * read(member, "fc2.bias") for share, member in zip(shares, members, strict=True)
        )
        parts = {
            "fc1.weight": one["up"],
            "fc1.bias": one["up_bias"][:, 0],
            "fc2.weight": one["down"],
            "fc2.bias": bias,
        }
        found |= {f"{path}.{expert}.{name}": value.float() for name, value in parts.items()}
    return found


@pytest.mark.parametrize("learned", [False, True])
def test_it_is_merged_as_the_formulas_say(learned: bool, tmp_path: Path) -> None:
    held, args, data = weights(learned), options(no_scale_embedding=learned), rows(8)
    seen: dict[int, list[oracle.Token]] = {}
    for ids in data:
        expected(held, args, ids, len(ids), seen)
    sums = {layer: oracle.sums(tokens) for layer, tokens in seen.items()}
    counts = oracle.budget([layer.counts for layer in sums.values()], EXPERTS)
    for (layer, found), count in zip(sums.items(), counts, strict=True):
        held |= _merged(held, layer, found, count)
    model = compress(convert(tmp_path, learned), batches(), MergeConfig(experts=0.5))
    assert [layer.num_experts for layer in moe_layers(model)] == counts
    assert min(counts) < EXPERTS
    found_logits = logits(model, {"input_ids": torch.tensor(data[:2])})
    for row, ids in zip(found_logits, data, strict=False):
        torch.testing.assert_close(row, expected(held, args, ids, len(ids)), atol=1e-4, rtol=1e-4)


def test_with_all_experts_it_is_the_model_itself(tmp_path: Path) -> None:
    model = convert(tmp_path)
    whole = compress(model, batches(), MergeConfig(experts=EXPERTS))
    assert torch.equal(logits(whole, batches()[0]), logits(model, batches()[0]))
    assert type(whole).__name__.startswith("MCSMoEFairseqMoeXGLM")


@pytest.mark.parametrize("way", WAYS)
def test_it_is_saved_with_the_code_of_both_and_loads(way: str, tmp_path: Path) -> None:
    model = compressed(convert(tmp_path), way, batches())
    model.save_pretrained(tmp_path / "saved")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values())
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded, batches()[0]), logits(model, batches()[0]))
    names = {file.name for file in (tmp_path / "saved").glob("*.py")}
    assert {"merged_fairseq_moe_mcsmoe.py", "fairseq_moe_mcsmoe.py", "remote_mcsmoe.py", "modeling_mcsmoe.py"} <= names
    assert not any("from hf_mcsmoe" in (tmp_path / "saved" / name).read_text() for name in names)
    assert "`xglm`" in (tmp_path / "saved" / "README.md").read_text()


def test_a_bare_model_and_one_that_is_offloaded_are_compressed_alike(tmp_path: Path) -> None:
    convert(tmp_path).save_pretrained(tmp_path / "given")
    config = MergeConfig(experts=0.5)
    whole = compress(AutoModelForCausalLM.from_pretrained(tmp_path / "given"), batches(), config)
    bare = compress(AutoModel.from_pretrained(tmp_path / "given"), batches(), config)
    assert torch.equal(bare(**batches()[0])[0], whole.model(**batches()[0])[0])
    places = {"model.embed_tokens": "cpu", "model.embed_positions": "cpu", "model.layers": "disk"}
    places |= {"model.layer_norm": "cpu", "lm_head": "cpu"}
    options = {"device_map": places, "offload_folder": tmp_path / "offload"}
    offloaded = compress(AutoModelForCausalLM.from_pretrained(tmp_path / "given", **options), batches(), config)
    assert torch.equal(logits(offloaded, batches()[0]), logits(whole, batches()[0]))
    whole.save_pretrained(tmp_path / "saved")
    loaded = AutoModel.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded(**batches()[0])[0], whole.model(**batches()[0])[0])


def test_experts_of_a_width_that_grouped_products_cannot_take(tmp_path: Path) -> None:
    model = xglm()
    become(model, FairseqMoeModel, {"layers": [1], "num_experts": 4, "expert_dim": 20, "top_k": 2})
    for parameter in model.model.layers[1].moe_layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    merged = compress(model, batches(), MergeConfig(experts=0.5), low_rank=LoSparseConfig(rank=3))
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (merged.config._experts_implementation, loaded.config._experts_implementation) == ("eager", "eager")
    assert torch.equal(logits(loaded, batches()[0]), logits(merged, batches()[0]))


def test_k_is_set_of_a_merged_model_and_saved(tmp_path: Path) -> None:
    model = compress(convert(tmp_path), batches(), MergeConfig(experts=0.5))
    set_top_k(model, 1)
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert [layer.top_k for layer in moe_layers(loaded)] == [1, 1]
    assert torch.equal(logits(loaded, batches()[0]), logits(model, batches()[0]))


@pytest.mark.parametrize(("way", "learned"), [("refit, low rank", True), ("bits", False)])
def test_from_folder_to_folder_it_is_bit_for_bit_the_same(way: str, learned: bool, tmp_path: Path) -> None:
    config, stages = WAYS[way]
    convert(tmp_path, learned).save_pretrained(tmp_path / "given")
    compress_folder(tmp_path / "given", tmp_path / "streamed", batches(), config, **stages)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "given")
    compress(model, batches(), config, **stages).save_pretrained(tmp_path / "whole")
    held = [
        {key: value for file in (tmp_path / name).glob("*.safetensors") for key, value in load_file(file).items()}
        for name in ("streamed", "whole")
    ]
    assert held[0].keys() == held[1].keys()
    assert all(torch.equal(held[0][name], value) for name, value in held[1].items())
    files = [{file.name for file in (tmp_path / name).glob("*.py")} for name in ("streamed", "whole")]
    assert files[0] == files[1]
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("streamed", "whole")]
    assert configs[0] == configs[1]


def test_hidden_units_stay_for_their_number_is_that_of_other_layers_too(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="choose the pattern unstructured or 2:4, or fewer experts"):
        compress(convert(tmp_path), batches(), sparsity=SparsityConfig("wanda", "units", 1 / 3))


def test_from_the_command_line(run: Run, tmp_path: Path) -> None:
    fairseq(xglm()).save_pretrained(tmp_path / "given", tokenizer=tokenizer())
    (tmp_path / "text.txt").write_text(" ".join(f"w{50 + (7 * number) % 60}" for number in range(90)))
    given = ["--data", tmp_path / "text.txt", "--max-length", 8, "--experts", 0.5]
    code, _, err = run("compress", tmp_path / "given", *given, "--output", tmp_path / "out")
    assert code == 0, err
    assert [layer.num_experts for layer in moe_layers(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))] == [2]


def test_what_no_class_of_transformers_can_be_is_refused_early(run: Run, tmp_path: Path) -> None:
    fairseq(xglm()).save_pretrained(tmp_path / "given", tokenizer=tokenizer())
    add_momentum(build("mixtral")).save_pretrained(tmp_path / "other", tokenizer=tokenizer())
    told = {
        ("given", "--plain"): "is of the variant 'fairseq_moe', which is no family of Transformers",
        ("other",): "is of the variant 'momentum', whose models are neither compressed nor run from a folder",
    }
    for (name, *others), message in told.items():
        given = [*others, "--data", tmp_path / "no.txt", "--output", tmp_path / "out"]
        code, _, err = run("compress", tmp_path / name, "--experts", 0.5, *given)
        assert code == 1
        assert message in " ".join(err.split())
    compress(fairseq(xglm()), batches(), MergeConfig(experts=0.5)).save_pretrained(tmp_path / "merged")
    code, _, err = run("export", tmp_path / "merged", "--output", tmp_path / "out")
    assert code == 1
    assert "there is no plain checkpoint of it" in " ".join(err.split())


def test_a_variant_that_this_version_does_not_merge_is_named(tmp_path: Path) -> None:
    compress(convert(tmp_path), batches(), MergeConfig(experts=0.5)).save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "config.json"
    config = json.loads(file.read_text())
    for variant, message in {
        "later": ({"name": "later", "options": {}}, "merges no models of the variant 'later': upgrade it"),
        "damaged": ({"name": "fairseq_moe"}, "`variant` must hold `name` and `options`, not {'name': 'fairseq_moe'}"),
        "no name": ("fairseq_moe", "`variant` must hold `name` and `options`, not 'fairseq_moe'"),
    }.values():
        file.write_text(json.dumps(config | {"variant": variant}))
        with pytest.raises(ValueError, match=message):
            AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


@pytest.mark.slow
def test_a_process_without_the_package_uses_what_was_compressed(tmp_path: Path) -> None:
    checks, training = {}, {}
    for way in WAYS:
        base = fairseq(xglm())
        data = [{"input_ids": torch.randint(48, 128, (8, 12), generator=torch.Generator().manual_seed(0))}]
        folder = save(compressed(base, way, data), xglm(), tmp_path / way.replace(", ", "_"))
        checks[folder] = QUICK + (MORE if way == "merge" else [])
        training |= {folder: TRAINING} if way == "merge" else {}
    for found, script in ((checks, "without_package.py"), (training, "train_without_package.py")):
        for name, report in check_without_package(found, tmp_path, script).items():
            assert not any(report.values()), "\n".join([name, *report.values()])
