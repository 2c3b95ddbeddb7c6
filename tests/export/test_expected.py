"""What is known of a plain checkpoint before any work is what `export` then says, or writes."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from families import build
from helpers import batches
from safetensors.torch import load_file

from hf_mcsmoe import LoSparseConfig, MergeConfig, QuantizationConfig, compress, compress_folder
from hf_mcsmoe.export import export
from hf_mcsmoe.export.expected import Plain, check_plain
from hf_mcsmoe.export.sized import plain_bytes, plain_size
from hf_mcsmoe.layers.batches import Batch
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.methods.choice import BITS
from hf_mcsmoe.search.choices import candidates
from hf_mcsmoe.search.config import LAYER, MODEL, SizeConfig
from hf_mcsmoe.sparsity.config import SparsityConfig
from hf_mcsmoe.streamed.config import Saving

HALF = MergeConfig(experts=4, budget="uniform")
FEW = QuantizationConfig(bits=4, group_size=8)
Case = tuple[str, MergeConfig, Plain, dict[str, Any]]
WRITTEN: dict[str, Case] = {
    "merged": ("mixtral", HALF, Plain(), {}),
    "pruned, in few bits": ("qwen3_moe", replace(HALF, reduce="prune"), Plain(("vllm",)), {"quantization": FEW}),
    "in all places": ("mixtral", replace(HALF, budget="adaptive"), Plain(expand=True), {}),
    "in groups": ("deepseek_v3", replace(HALF, experts=6, plain=True), Plain(("vllm", "sglang")), {}),
    "bits alone": ("olmoe", replace(HALF, experts=1.0), Plain(("llama.cpp",)), {"quantization": FEW}),
    "constants": ("olmoe", replace(HALF, reduce="prune", pruned_router="constant"), Plain(("vllm",)), {}),
    "one row a group": ("mixtral", replace(HALF, router="mean"), Plain(), {}),
    "multiplied out": ("mixtral", HALF, Plain(dense=True), {"low_rank": LoSparseConfig(rank=2)}),
    "narrower": ("qwen3_moe", HALF, Plain(), {"sparsity": SparsityConfig(pattern="units", share=0.5)}),
}
REFUSED: dict[str, Case] = {
    "bits that an engine does not read": ("mixtral", HALF, Plain(("vllm",)), {"quantization": replace(FEW, bits=3)}),
    "bits that it does not know": ("mixtral", HALF, Plain(("mlx",)), {"quantization": FEW}),
    "groups that differ": ("mixtral", HALF, Plain(), {"quantization": QuantizationConfig(bits=4)}),
    "zero points": ("mixtral", HALF, Plain(), {"quantization": replace(FEW, symmetric=False)}),
    "bits by expert": ("mixtral", HALF, Plain(("vllm",)), {"quantization": replace(FEW, low_bits=2)}),
    "a dense layer": ("mixtral", HALF, Plain(), {"quantization": replace(FEW, skip=("*.0.*",))}),
    "one tensor on disk": ("gpt_oss", HALF, Plain(), {"quantization": FEW}),
    "widths of MXFP4": ("gpt_oss", HALF, Plain(mxfp4=True), {}),
    "another family's MXFP4": ("mixtral", HALF, Plain(mxfp4=True), {}),
    "low rank": ("mixtral", HALF, Plain(), {"low_rank": LoSparseConfig(rank=2)}),
    "a skipped layer": ("mixtral", replace(HALF, skip=("*.0.*",)), Plain(), {}),
    "groups that mix": ("deepseek_v3", replace(HALF, experts=6), Plain(), {}),
    "constants in one tensor": (
        *("gpt_oss", replace(HALF, reduce="prune", pruned_router="constant"), Plain(("vllm",))),
        {},
    ),
    "constants elsewhere": ("olmoe", replace(HALF, reduce="prune", pruned_router="zero"), Plain(("sglang",)), {}),
    "too few for the router": ("deepseek_v3", replace(HALF, reduce="prune"), Plain(), {}),
    "a pruned model expanded": ("mixtral", replace(HALF, reduce="prune"), Plain(expand=True), {}),
    "no bias": ("mixtral", HALF, Plain(router_rows="logsumexp"), {}),
    "no counts": ("mixtral", replace(HALF, saliency="gate", weighting="uniform"), Plain(), {}),
}
# What the sentence says, of each of them.
WORDS = {
    "bits that an engine does not read": "vllm does not read experts in 3 bits",
    "bits that it does not know": "mlx does not read experts in 4 bits",
    "groups that differ": "Quantize with bits=4 and group_size=8",
    "zero points": "they have zero points",
    "bits by expert": "they differ in bits from expert to expert",
    "a dense layer": "4 bits in groups of 8 and dense weights",
    "one tensor on disk": "GptOssForCausalLM keeps the experts of a layer in one tensor on disk",
    "widths of MXFP4": "which do not divide the 24 inputs",
    "another family's MXFP4": "MXFP4 is how gpt-oss stores its experts",
    "low rank": "as low rank [+] sparse",
    "a skipped layer": "one number of experts for all of its layers",
    "groups that mix": "which its merged experts do not keep apart",
    "constants in one tensor": "of which vLLM cannot leave some out",
    "constants elsewhere": "has constants in the place of pruned experts",
    "too few for the router": "its router needs 6 of them at least",
    "a pruned model expanded": "leave expand out",
    "no bias": "has no bias to hold it",
    "no counts": "needs the counts of",
}
SLOW = ("bits alone", "constants", "one row a group", "multiplied out", "narrower", "in all places")


def cases(table: dict[str, Case], slow: tuple[str, ...] | None = None) -> list[Any]:
    """Return the names of a table, those that take long, or all, marked."""
    return [pytest.param(name, marks=pytest.mark.slow if slow is None or name in slow else ()) for name in table]


def made(case: Case) -> Any:
    """Return what `compress` makes."""
    name, config, _, options = case
    model = build(name)
    return compress(model, batches(name, model), config, **options)


@pytest.mark.filterwarnings("ignore:Few calibration tokens")
@pytest.mark.parametrize("what", cases(WRITTEN, SLOW))
def test_the_bytes_told_are_those_that_are_written(what: str, tmp_path: Path) -> None:
    case = WRITTEN[what]
    name, config, plain, options = case
    told = check_plain(Layers.of(build(name)), config, plain, **options)
    export(made(case), tmp_path / "out", **plain.options)
    files = (tmp_path / "out").glob("*.safetensors")
    assert told == pytest.approx(sum(value.nbytes for file in files for value in load_file(file).values()), rel=0.02)


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_refused_from_shapes_alone(what: str) -> None:
    name, config, plain, options = REFUSED[what]
    with pytest.raises(ValueError, match=WORDS[what]):
        check_plain(Layers.of(build(name)), config, plain, **options)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Few calibration tokens")
@pytest.mark.parametrize("what", [name for name in REFUSED if name != "too few for the router"])
def test_it_is_refused_as_when_all_is_done(what: str, tmp_path: Path) -> None:
    case = REFUSED[what]
    name, config, plain, options = case
    with pytest.raises(ValueError, match=r"[A-Za-z]") as early:
        check_plain(Layers.of(build(name)), config, plain, **options)
    with pytest.raises(ValueError, match=r"[A-Za-z]") as late:
        export(made(case), tmp_path / "out", **plain.options)
    assert str(early.value) == str(late.value)


def test_unlike_numbers_are_refused_unless_all_places_are_filled() -> None:
    layers, adaptive = Layers.of(build("mixtral")), MergeConfig(experts=0.5)
    with pytest.raises(ValueError, match=r"budget='adaptive' gives layers unlike numbers.*budget='uniform'"):
        check_plain(layers, adaptive, Plain())
    assert check_plain(layers, adaptive, Plain(expand=True)) == check_plain(layers, replace(HALF, experts=8), Plain())


# Family, plain form, options of a size: what may be chosen of bits, alike in what, and of counts.
SEARCHES: list[tuple[str, Plain, dict[str, Any], tuple[int, ...], str, tuple[int, ...] | None]] = [
    ("mixtral", Plain(), {}, BITS, MODEL, tuple(range(2, 9))),
    ("mixtral", Plain(("vllm",)), {"min_experts": 5}, (8, 4), LAYER, (5, 6, 7, 8)),
    ("mixtral", Plain(("vllm", "llama.cpp")), {"bits": (4,)}, (4,), MODEL, tuple(range(2, 9))),
    ("mixtral", Plain(("mlx",)), {}, (), MODEL, tuple(range(2, 9))),
    ("mixtral", Plain(expand=True), {}, BITS, MODEL, None),
    ("gpt_oss", Plain(), {}, (), MODEL, (4, 5, 6, 7, 8)),
    ("deepseek_v3", Plain(("sglang",)), {}, (8, 4), LAYER, (6, 8)),
]


@pytest.mark.parametrize(("name", "plain", "options", "bits", "alike", "counts"), SEARCHES)
def test_a_search_is_kept_to_what_can_be_held(
    name: str,
    plain: Plain,
    options: dict[str, Any],
    bits: tuple[int, ...],
    alike: str,
    counts: tuple[int, ...] | None,
) -> None:
    layers = Layers.of(build(name))
    found = plain_size(layers, SizeConfig(0.5, **options), plain)
    assert (found.bits, found.alike, found.counts, found.ranks) == (bits, alike, counts, ())
    assert found.uniform_experts == (counts is not None)
    assert plain_size(layers, found, plain) == found
    choices = candidates([layers[0]], found)
    assert choices
    assert all(choice.w_in == choice.w_out and choice.rank is None for choice in choices)
    assert all(choice.w_in is None or choice.w_in.symmetric for choice in choices)
    for choice in choices[:: max(1, len(choices) // 8)]:
        grid = choice.w_in
        few = None if grid is None else QuantizationConfig(bits=grid.bits, group_size=grid.group_size)
        config = MergeConfig(experts=choice.experts, reduce=choice.reduce, budget="uniform")
        check_plain(layers, config, plain, quantization=few)


SIZES: list[tuple[Plain, dict[str, Any], str]] = [
    (Plain(("vllm",)), {"bits": (3,)}, "vllm does not read experts in 3 bits"),
    (Plain(), {"ranks": (2,)}, "rank=2 stores experts as no model"),
    (Plain(expand=True), {"reduce": "prune"}, "Choose reduce='merge'"),
    (Plain(mxfp4=True), {}, "MXFP4 is how gpt-oss"),
    (Plain(router_rows="logsumexp"), {}, "has no bias"),
]


@pytest.mark.parametrize(("plain", "options", "words"), SIZES)
def test_a_search_that_asks_for_what_cannot_be_is_refused(plain: Plain, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        plain_size(Layers.of(build("mixtral")), SizeConfig(0.5, **options), plain)


def unread() -> Iterator[Batch]:
    """Fail when a batch is asked for."""
    raise AssertionError("work was begun")
    yield {}


@pytest.mark.parametrize(
    ("plain", "options", "words"),
    [
        (Plain(("vllm",)), {"config": HALF, "quantization": replace(FEW, bits=3)}, "vllm does not read"),
        (Plain(), {"config": MergeConfig(experts=0.5)}, "choose budget='uniform'"),
        (Plain(("vllm",)), {"size": SizeConfig(0.5, bits=(3,))}, "vllm does not read"),
    ],
)
def test_block_by_block_it_is_refused_before_any_batch_is_read(
    plain: Plain, options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    build("mixtral").save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=words):
        compress_folder(tmp_path / "base", tmp_path / "out", unread(), **options, saving=Saving(plain=plain))
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_of_a_size_about_its_bytes_are_told_and_of_whole_places_all() -> None:
    layers, search = Layers.of(build("mixtral")), SizeConfig("200000B")
    told = [
        plain_bytes(layers, MergeConfig(), plain, {"size": plain_size(layers, search, plain), "repair": None})
        for plain in (Plain(), Plain(expand=True), Plain(dense=True))
    ]
    whole = sum(value.nbytes for value in layers.model.state_dict().values())
    assert told[0] == 200_000
    assert told[1:] == pytest.approx([whole] * 2, rel=0.05)
