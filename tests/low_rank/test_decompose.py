"""Merged experts as low rank + sparse: exact at the start, compact on disk, and the same without the package."""

import copy
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import build
from helpers import batches, logits
from merged import (
    ALL,
    NOT_CHECKPOINTED,
    NOT_OFFLOADED,
    Example,
    Reports,
    check_without_package,
    example,
    save,
)
from offloaded import OFFLOADED
from safetensors import safe_open
from transformers import PreTrainedModel

from hf_mcsmoe import LoSparseConfig, compact, decompose_experts, moe_layers
from hf_mcsmoe.layers.fused import dense
from hf_mcsmoe.low_rank.decompose import row_importance
from hf_mcsmoe.modeling.forward_mcsmoe import activated, expert_inner, expert_output
from hf_mcsmoe.modeling.losparse_mcsmoe import low_rank_modules, sparse_parts

OPTIONS = {"rank": 2, "keep": 0.25}
CHECKS = {
    "loads": ALL,
    "saves_again": ALL,
    "keeps_bfloat16": ALL,
    "builds_from_its_configuration": ALL,
    "loads_by_device_map": ALL,
    "loads_offloaded_to_disk_and_saves": [name for name in ALL if name not in NOT_OFFLOADED],
    "generates": ALL,
    "copies_deeply": ALL,
    "pickles": ALL,
    "compiles": ["mixtral", "gpt_oss", "switch_transformers", "llama4_text"],
    "checkpoints_gradients": [name for name in ALL if name not in NOT_CHECKPOINTED],
}


def _decomposed(name: str, *, prune: bool = False) -> PreTrainedModel:
    case = example(name)
    return decompose_experts(
        copy.deepcopy(case.merged), LoSparseConfig(**OPTIONS), batches(name, case.base), prune=prune
    )


def _compacted(name: str) -> Example:
    return replace(example(name), merged=compact(_decomposed(name, prune=True)))


@pytest.fixture(scope="session")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """What a process without the package found when it loaded and used compact models."""
    folder = tmp_path_factory.mktemp("compact")
    paths = {name: save(_compacted(name), folder, generated=True) for name in ALL}
    checks = {path: [check for check in CHECKS if name in CHECKS[check]] for name, path in paths.items()}
    return check_without_package(checks, tmp_path_factory.mktemp("loading"))


@pytest.mark.slow
@pytest.mark.parametrize(("check", "name"), [(check, name) for check in CHECKS for name in CHECKS[check]])
def test_a_compact_model_without_the_package(check: str, name: str, reports: Reports) -> None:
    assert not reports[name][check], reports[name][check]


@pytest.mark.parametrize("name", ALL)
def test_the_training_form_is_the_merged_model(name: str) -> None:
    case = example(name)
    model = _decomposed(name)
    torch.testing.assert_close(logits(model, case.batch), logits(case.merged, case.batch), atol=1e-5, rtol=1e-4)
    assert [layer.num_experts for layer in moe_layers(model)] == [
        layer.num_experts for layer in moe_layers(case.merged)
    ]
    assert len(sparse_parts(model)) == 2 * len(list(low_rank_modules(model))) > 0


@pytest.mark.parametrize("name", ALL)
def test_the_compact_form_gives_the_outputs_of_the_training_form_and_holds_what_it_says(name: str) -> None:
    case, model = example(name), _decomposed(name, prune=True)
    expected, merged = logits(model, case.batch), case.merged.num_parameters()
    saved = 0
    for _, module in low_rank_modules(model):
        for weight in module.low_rank:
            count, out, rank = getattr(module, f"{weight}_u").shape
            width = getattr(module, f"{weight}_v").shape[-1]
            assert rank == 2
            units, length = (width, out) if weight == "down_proj" else (out, width)  # columns, or rows
            saved += count * (out * width - rank * (out + width) - round(0.25 * units) * length)
    compact(model)
    torch.testing.assert_close(logits(model, case.batch), expected, atol=1e-5, rtol=1e-4)
    assert model.num_parameters() == merged - saved
    assert not sparse_parts(model)


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@pytest.mark.parametrize("name", ["mixtral", "switch_transformers"])
def test_saving_compacts_but_for_a_trainers_checkpoint(name: str, tmp_path: Path) -> None:
    model = _decomposed(name, prune=True)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "compact")
    model.save_pretrained(tmp_path / "checkpoint-7")
    assert _bytes(tmp_path / "compact") < _bytes(tmp_path / "checkpoint-7")
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items()), "the live model changed"
    for folder in ("compact", "checkpoint-7"):
        loaded = type(model).from_pretrained(tmp_path / folder)
        assert bool(sparse_parts(loaded)) == (folder == "checkpoint-7")
        torch.testing.assert_close(
            logits(loaded, example(name).batch), logits(model, example(name).batch), atol=1e-5, rtol=1e-4
        )
    with safe_open(tmp_path / "checkpoint-7" / "model.safetensors", "pt") as file:
        assert {key for key in file.keys() if key.endswith("_kept")} == {  # noqa: SIM118
            f"{key}_kept" for key in sparse_parts(model)
        }


def test_rows_over_the_share_are_pruned_by_magnitude_with_a_warning() -> None:
    model = _decomposed("mixtral")
    parts = {name: part.weight.detach().abs().mean(-1) for name, part in sparse_parts(model).items()}
    scores = torch.cat([score.flatten() for score in parts.values()]).sort(descending=True).values
    threshold = scores[round(0.25 * len(scores)) - 1]
    with pytest.warns(UserWarning, match="100% of the rows of S are still kept, 25% are to remain"):
        compact(model)
    for path, module in low_rank_modules(model):
        for name, entry in module.low_rank.items():
            assert entry["kept_rows"] == (parts[f"{path}.{name}"] >= threshold).sum(-1).tolist()


def test_s_keeps_hidden_units_on_both_sides() -> None:
    model = _decomposed("mixtral", prune=True)
    for _, module in low_rank_modules(model):
        for weight, axis in (("gate_up_proj", 1), ("down_proj", 0)):
            for factors in module.factors(weight):
                s = dense(factors) - factors.u @ factors.v
                assert int((s.abs().amax(axis) > 1e-6).sum()) <= int(factors.kept.sum()) < s.shape[1 - axis]


@pytest.mark.parametrize("name", ["mixtral", "switch_transformers", "gpt_oss"])
def test_a_row_of_w_in_counts_as_much_as_it_moves_the_output(name: str) -> None:
    layer = next(layer for layer in moe_layers(copy.deepcopy(example(name).merged)) if layer.merged)
    experts, generator, step = layer.container.double(), torch.Generator().manual_seed(0), 1e-4
    states = torch.randn(30, layer.hidden_size, generator=generator).double()
    gates = torch.rand(30, 1, generator=generator).double()
    counts = row_importance(experts, [(states, gates)] * layer.num_experts)[1]
    inner = expert_inner(experts, states, 1).detach()
    for row, shift in enumerate(step * torch.eye(inner.shape[1]).double()):
        up, down = (expert_output(experts, activated(experts, inner + sign * shift), 1) for sign in (1, -1))
        slope = (up - down).detach() * gates / (2 * step)
        assert float(counts[row]) == pytest.approx(float(slope.square().sum(1).mean()), rel=1e-2, abs=1e-9)


def test_calibration_data_lessen_the_error() -> None:
    case, errors = example("mixtral"), {}
    for data in (None, batches("mixtral", case.base, number=8)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = compact(
                decompose_experts(copy.deepcopy(case.merged), LoSparseConfig(rank=4, keep=0.1), data, prune=True)
            )
        errors[data is None] = float((logits(model, case.batch) - logits(case.merged, case.batch)).norm())
    assert errors[False] < errors[True]


def _twice(model: PreTrainedModel) -> None:
    decompose_experts(decompose_experts(model, LoSparseConfig(**OPTIONS)))


def _tries(**options: object) -> object:
    return lambda model: decompose_experts(model, LoSparseConfig(**options))


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (_tries(rank=1000), "rank=1000 is larger than W_in"),
        (_tries(rank=12, keep=0.9), "larger than it is"),
        (_tries(rank=2, skip="nothing.*"), "matches no layer"),
        (_tries(rank=2, skip="*"), "leaves no layer"),
        (_tries(rank=12, keep=0.9, scope="global"), "larger than it is"),
        (_tries(energy=0.9999, keep=0.5), "larger than it is"),
        (_tries(parameter_ratio=0.3, keep=0.3), "parameter_ratio=0.3 is no more than keep=0.3"),
        (_tries(parameter_ratio=0.31, keep=0.3), "leaves no parameters"),
        (_tries(parameter_ratio=1.2), "parameter_ratio=1.2 must be a share"),
        (_tries(rank=0), "rank=0 must be"),
        (_tries(rank=2.0), "rank=2.0 must be"),
        (_tries(rank=True), "rank=True must be"),
        (_tries(keep=-0.1), "keep=-0.1 must be a share"),
        (_tries(keep=1.5), "keep=1.5 must be a share"),
        (_tries(rank=2, energy=0.5), "rank and energy are given"),
        (_tries(rank=2, factorisation="svdd"), "Did you mean 'svd'"),
        (_tries(scope="all"), "Unknown scope"),
        (_twice, "decomposed already"),
        (compact, "no low rank"),
    ],
)
def test_bad_input(attempt: object, message: str) -> None:
    model = copy.deepcopy(example("mixtral").merged)
    before = model.state_dict()
    with pytest.raises(ValueError, match=message):
        attempt(model)
    if attempt is not _twice:
        assert model.state_dict().keys() == before.keys()


@pytest.mark.parametrize("place", ["loaded to disk", "loaded in parts"])
def test_offloaded_experts_are_refused_and_left_as_they_were(place: str, tmp_path: Path) -> None:
    model = OFFLOADED[place](copy.deepcopy(example("mixtral").merged), tmp_path)
    first = next(layer.name for layer in moe_layers(model) if layer.parameters[0][1].is_meta)
    before = [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match=f"The experts of {first} are offloaded; load the merged model onto one"):
        decompose_experts(model, LoSparseConfig(**OPTIONS))
    assert [name for name, _ in model.named_parameters()] == before


def test_a_model_that_is_not_merged_is_refused() -> None:
    with pytest.raises(ValueError, match="not compressed"):
        decompose_experts(build("mixtral"))


def test_what_would_grow_stays_dense_where_allowed() -> None:
    model = copy.deepcopy(example("mixtral").merged)
    decompose_experts(model, LoSparseConfig(rank=12, keep=0.9, allow_dense=True))
    assert not sparse_parts(model)


@pytest.mark.parametrize("name", ["mixtral", "switch_transformers"])
def test_experts_that_no_calibration_token_reaches_are_decomposed_as_well(name: str) -> None:
    case = example(name)
    one = {key: value[:1, :1] for key, value in case.batch.items()}
    model = decompose_experts(copy.deepcopy(case.merged), LoSparseConfig(**OPTIONS), [one])
    torch.testing.assert_close(logits(model, case.batch), logits(case.merged, case.batch), atol=1e-4, rtol=1e-4)
