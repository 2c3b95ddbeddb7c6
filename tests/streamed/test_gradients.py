"""Statistics that read gradients, block by block: the sums are those of a model in memory, and nothing is left."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from helpers import Batch, batches, relative_error, state
from transformers import PreTrainedModel

from hf_mcsmoe import MergeConfig, RoutingStatistics, collect_statistics
from hf_mcsmoe.layers.backward import backward_of
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.folder import Folder
from hf_mcsmoe.layers.snapshot import Passage
from hf_mcsmoe.methods.statistics import STATISTICS, gradient_names
from hf_mcsmoe.processes import Processes, working_as
from hf_mcsmoe.streamed.compress import compress_folder
from hf_mcsmoe.streamed.data import Data
from hf_mcsmoe.streamed.journal import Journal

pytestmark = pytest.mark.filterwarnings("ignore:Few calibration tokens")
LATE = gradient_names(STATISTICS)
NEEDS = ["counts", "gate_sum", *LATE]


def made(name: str, *, labels: bool, coefficient: float = 0.0) -> tuple[PreTrainedModel, list[Batch]]:
    """Make a model and rows; with a coefficient its loss reads what routers say."""
    model = build(name)
    rows = batches(name, model, 3, batch_size=2)
    if labels:
        rows = [{**row, "labels": row["decoder_input_ids"]} for row in rows]
    if coefficient:
        model.config.output_router_logits, model.config.router_aux_loss_coef = True, coefficient
    return model, rows


def saved(model: PreTrainedModel, folder: Path) -> Folder:
    model.save_pretrained(folder / "source", max_shard_size="50KB")
    return Folder(folder / "source")


def assert_same(one: RoutingStatistics, two: RoutingStatistics) -> None:
    assert one.layers.keys() == two.layers.keys()
    for layer, sums in one.layers.items():
        assert list(sums) == list(two[layer])
        for name, value in sums.items():
            assert torch.equal(value, two[layer][name]), f"{name} of {layer}"


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "olmoe", "deepseek_v3"])
@pytest.mark.parametrize("is_mapped", [True, False])
def test_sums_are_those_of_a_model_in_memory(name: str, is_mapped: bool, tmp_path: Path) -> None:
    model, rows = made(name, labels=False)
    folder, place = saved(model, tmp_path), tmp_path / "place"
    place.mkdir()
    before = state(model)
    expected = collect_statistics(model, rows, NEEDS)
    assert state(model) == before
    before = [(parameter.requires_grad, parameter.grad) for parameter in folder.model.parameters()]
    found = collect_statistics(folder, rows, NEEDS, place=place if is_mapped else None)
    assert_same(found, expected)
    assert all(sums[key].any() for sums in expected.layers.values() for key in LATE)
    assert not list(place.iterdir())
    assert all(parameter.is_meta for parameter in folder.model.parameters())
    assert [(parameter.requires_grad, parameter.grad) for parameter in folder.model.parameters()] == before


def test_what_an_encoder_gives_every_block_of_a_decoder_is_added_up(tmp_path: Path) -> None:
    model, rows = made("switch_transformers", labels=True)
    expected = collect_statistics(model, rows, NEEDS)
    found = collect_statistics(saved(model, tmp_path), rows, NEEDS, place=tmp_path)
    for layer, sums in expected.layers.items():
        for name, value in sums.items():
            if "decoder" in layer or name not in LATE:
                assert torch.equal(found[layer][name], value), f"{name} of {layer}"
            else:  # gradients of several blocks meet, in another order
                assert value.any()
                assert relative_error(found[layer][name], value) < 1e-5


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_what_waits_takes_what_is_counted(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = made(name, labels=False)
    counted, seen, save, count = list[int](), [0], Journal.save, Data.back_bytes

    def watched(self: Journal) -> None:
        seen.append(sum(payload(file) for file in self.folder.glob("?????.*")))
        save(self)

    monkeypatch.setattr(Journal, "save", watched)
    monkeypatch.setattr(Data, "back_bytes", lambda *given: counted.append(count(*given)) or counted[0])
    compress_folder(saved(model, tmp_path), tmp_path / "out", rows, MergeConfig(experts=4, saliency="taylor"))
    assert max(seen) <= counted[0] < 2 * max(seen)


def payload(file: Path) -> int:
    """Return the bytes of the tensors in a file of hidden states, which begin behind a header of multiples of 64."""
    start = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    return file.stat().st_size - (start + 63) // 64 * 64


def test_what_routers_say_is_read_by_a_loss(tmp_path: Path) -> None:
    model, rows = made("mixtral", labels=False, coefficient=3.0)
    folder = saved(model, tmp_path)
    expected = collect_statistics(type(model).from_pretrained(tmp_path / "source"), rows, NEEDS)
    assert_same(collect_statistics(folder, rows, NEEDS), expected)
    without = collect_statistics(made("mixtral", labels=False)[0], rows, NEEDS)
    first, *_, last = expected.layers
    assert not torch.equal(expected[first]["fisher"], without[first]["fisher"])
    assert torch.equal(expected[last]["fisher"], without[last]["fisher"])  # no router comes after it


def test_each_block_is_read_twice_and_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = made("deepseek_v3", labels=False)
    folder, read, loaded = saved(model, tmp_path), list[str](), Folder.loaded

    @contextmanager
    def watched(self: Folder, path: str) -> Iterator[Any]:
        with loaded(self, path) as module:
            if path.removesuffix(" back") in paths:
                read.append(path)
                assert [one for one in paths if not is_free(folder, one)] == [path.removesuffix(" back")]
            yield module

    paths = [f"model.layers.{number}" for number in range(len(model.model.layers))]
    monkeypatch.setattr(Folder, "loaded", watched)
    collect_statistics(folder, rows, LATE)
    read = [path for path in read if path]
    # The first block holds no experts, and no gradient reaches it.
    passed = [*paths, *(f"{path} back" for path in reversed(paths[1:]))]
    assert read[-len(passed) :] == passed


def is_free(folder: Folder, path: str) -> bool:
    return all(parameter.is_meta for parameter in folder.model.get_submodule(path).parameters())


@pytest.mark.parametrize("name", ["jetmoe", "ernie4_5_vl_moe"])
def test_logits_of_more_than_routers_are_refused_where_a_loss_reads_them(name: str, tmp_path: Path) -> None:
    model, rows = made(name, labels=False)
    config = MergeConfig(experts=2, saliency="taylor")
    assert_same(collect_statistics(saved(model, tmp_path), rows, NEEDS), collect_statistics(model, rows, NEEDS))
    compress_folder(tmp_path / "source", tmp_path / "out", rows, config)
    assert (tmp_path / "out" / "config.json").is_file()
    with pytest.raises(ValueError, match="says as router logits, and the loss reads them"):
        collect_statistics(Folder(tmp_path / "source"), [{**row, "output_router_logits": True} for row in rows], NEEDS)
    for part in (model.config, model.config.get_text_config()):
        part.output_router_logits = True
    with pytest.raises(ValueError, match="says as router logits, and the loss reads them"):
        compress_folder(saved(model, tmp_path / "loud"), tmp_path / "other", rows, config)
    assert not (tmp_path / "other").exists()


def test_a_family_with_routers_that_are_not_recorded_is_summed_with_its_loss(tmp_path: Path) -> None:
    model, rows = made("deepseek_v4", labels=False, coefficient=3.0)
    folder = saved(model, tmp_path)
    loud = collect_statistics(type(model).from_pretrained(tmp_path / "source"), rows, NEEDS)
    assert_same(collect_statistics(folder, rows, NEEDS), loud)
    quiet = collect_statistics(model, [{**row, "output_router_logits": False} for row in rows], NEEDS)
    assert any(not sums[name].equal(quiet[layer][name]) for layer, sums in loud.layers.items() for name in sums)


def test_several_processes_add_up_what_each_has_summed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = made("mixtral", labels=False)
    folder, shares = saved(model, tmp_path), []
    monkeypatch.setattr("hf_mcsmoe.calibration.collect.summed", lambda statistics: None)
    monkeypatch.setattr(Processes, "gathered", lambda self, value: [value])
    for rank in range(2):
        with working_as(Processes(rank, 2)):
            shares.append(collect_statistics(folder, rows, NEEDS, place=tmp_path))
    expected = collect_statistics(model, rows, NEEDS)
    for layer, sums in expected.layers.items():
        for name, value in sums.items():
            together = shares[0][layer][name] + shares[1][layer][name]
            torch.testing.assert_close(together, value, rtol=1e-12, atol=0)


def test_layers_that_share_experts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="share their experts"):
        backward_of(Layers.of(saved(build("diffusion_gemma"), tmp_path)))


def test_a_headless_model_is_refused(tmp_path: Path) -> None:
    model, rows = made("mixtral", labels=False)
    folder = saved(model.model, tmp_path)
    with pytest.raises(ValueError, match="MixtralModel has none"):
        compress_folder(folder, tmp_path / "out", rows, MergeConfig(experts=4, saliency="taylor"))


class Fetched:
    """Stands for a snapshot of the Hub: the shards that are there, and what was fetched ahead."""

    def __init__(self) -> None:
        self.ahead: list[list[str]] = []
        self.dropped: list[tuple[list[str], bool]] = []

    def fetch_ahead(self, names: list[str]) -> None:
        self.ahead.append(names)

    def drop(self, names: Iterator[str], *, is_back: bool) -> None:
        self.dropped.append((sorted(names), is_back))


def test_shards_are_fetched_and_dropped_on_the_way_back_as_well() -> None:
    fetched: Any = Fetched()
    passage = Passage(fetched, {"": [], "0": ["a"], "1": ["a", "b"], "2": ["b"]}, drops=True)
    for is_back, paths in ((False, "012"), (True, "210")):
        for path in paths:
            passage.entered(path, is_back=is_back)
            passage.left(path, is_back=is_back)
    assert fetched.ahead == [["a", "b"], ["b"], ["a", "b"], ["a"]]
    there, back = [[], ["a"], ["b"]], [[], ["b"], ["a"]]
    assert fetched.dropped == [*((names, False) for names in there), *((names, True) for names in back)]
