"""A comparison block by block has the figures of one in memory, and leaves nothing behind."""

from pathlib import Path
from typing import Any

import pytest
from families import build
from helpers import batches
from merged import tokenizer
from transformers import PreTrainedModel

from hf_mcsmoe import LoSparseConfig, MergeConfig, QuantizationConfig, RepairConfig, SparsityConfig
from hf_mcsmoe.compare.cells import Cell
from hf_mcsmoe.compare.grid import Grid
from hf_mcsmoe.compare.run import Comparison, compare
from hf_mcsmoe.evaluation.quality import answer_scores
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.folder import Folder
from hf_mcsmoe.layers.loading import load_model
from hf_mcsmoe.streamed.journal import Journal

pytestmark = pytest.mark.filterwarnings("ignore:Few calibration tokens")
FEW: dict[str, dict[str, Any]] = {
    "merged": {"config": MergeConfig(budget="uniform")},
    "pruned": {"config": MergeConfig(reduce="prune", saliency="frequency", budget="uniform")},
}
MANY = FEW | {
    "adaptive": {"config": MergeConfig(), "repair": RepairConfig()},
    "low rank": {"config": MergeConfig(), "low_rank": LoSparseConfig(rank=4)},
    "bits": {"config": MergeConfig(), "quantization": QuantizationConfig(bits=4, group_size=8)},
    "measured": {"config": MergeConfig(budget="measured")},
}
SPARSE = {"sparse": {"config": MergeConfig(), "sparsity": SparsityConfig()}}


def compared(model: Any, data: list[Any], output: Path, grid: Grid, **given: Any) -> Comparison:
    return compare(model, {0: data[:4]}, {"in": data[4:5], "out": data[5:]}, grid, output, **given)


def told(found: Comparison) -> dict[tuple[str, str, int], Cell]:
    return {cell.key: cell for cell in found.cells}


def check(name: str, grid: Grid, tmp_path: Path) -> None:
    """Compare both ways, and each figure that both have."""
    model: PreTrainedModel = build(name)
    data = batches(name, model, number=6)
    model.save_pretrained(tmp_path / "source")
    ours = told(compared(Layers.of(Folder(tmp_path / "source")), data, tmp_path / "ours", grid))
    theirs = told(compared(load_model(str(tmp_path / "source")), data, tmp_path / "theirs", grid))
    assert ours.keys() == theirs.keys()
    assert not [cell.error for cell in ours.values() if cell.error]
    for key, cell in ours.items():
        other = theirs[key]
        assert (cell.done, cell.parameters, cell.bytes) == (other.done, other.parameters, other.bytes)
        assert cell.notes == other.notes
        assert not cell.layers
        for text, figures in other.texts.items():
            assert cell.texts[text].loss == pytest.approx(figures.loss, rel=1e-5)
            assert cell.texts[text].kl == pytest.approx(figures.kl, rel=1e-4, abs=1e-7)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "source", "theirs"]
    assert "<svg" in (tmp_path / "ours" / "report.html").read_text()


def test_figures_are_those_of_a_comparison_in_memory(tmp_path: Path) -> None:
    check("mixtral", Grid(FEW, [0.5]), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "switch_transformers"])
def test_figures_of_all_stages_are_those_of_a_comparison_in_memory(name: str, tmp_path: Path) -> None:
    check(name, Grid(MANY, [0.5], [0.7]), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("methods", [SPARSE, ["ours", "ours-bits"]])
def test_other_levels_have_the_figures_of_a_comparison_in_memory(methods: Any, tmp_path: Path) -> None:
    check("mixtral", Grid(methods, [0.75, 0.5]), tmp_path)


def test_a_run_that_is_interrupted_goes_on(tmp_path: Path) -> None:
    model = build("mixtral")
    data = batches("mixtral", model, number=6)
    model.save_pretrained(tmp_path / "source")
    grid, layers = Grid(FEW, [0.5]), Layers.of(Folder(tmp_path / "source"))

    def stop(cells: list[Cell]) -> None:
        if len(cells) > 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compared(layers, data, tmp_path / "out", grid, told=stop)
    found = told(compared(layers, data, tmp_path / "out", grid))
    whole = told(compared(layers, data, tmp_path / "whole", grid))
    assert {key: cell.texts for key, cell in found.items()} == {key: cell.texts for key, cell in whole.items()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source", "whole"]
    with pytest.raises(ValueError, match="one block in memory"):
        compared(load_model(str(tmp_path / "source")), data, tmp_path / "out", grid)


def test_a_result_that_was_begun_with_fewer_statistics_is_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("mixtral")
    data = batches("mixtral", model, number=6)
    model.save_pretrained(tmp_path / "source")
    layers, one = Layers.of(Folder(tmp_path / "source")), {"merged": FEW["merged"]}
    write, saves = Journal.save, iter(range(99))

    def save(self: Journal) -> None:
        write(self)
        if next(saves) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "save", save)
        with pytest.raises(KeyboardInterrupt):
            compared(layers, data, tmp_path / "out", Grid(one, [0.5]))
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    more = one | {"other": {"config": MergeConfig(reduce="prune", saliency="contribution", budget="uniform")}}
    found = told(compared(layers, data, tmp_path / "out", Grid(more, [0.5])))
    assert not [cell.error for cell in found.values() if cell.error]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_a_metric_is_measured_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_mcsmoe.evaluation.quality.TOGETHER", 2)
    model = build("mixtral")
    data, words = batches("mixtral", model, number=6), tokenizer()
    model.save_pretrained(tmp_path / "source")
    pairs = [(f"w50 w{place} w60", f" w{label}") for place in range(50, 64) for label in (70, 71, 72)]
    seen: list[Any] = []

    def metric(result: Any) -> dict[str, float]:
        seen.append(result)
        scores = answer_scores(result, words, pairs, batch_size=4)
        return {str(place): score for place, score in enumerate(scores)}

    layers = Layers.of(Folder(tmp_path / "source"))
    ours = told(compared(layers, data, tmp_path / "ours", Grid(FEW, [0.5]), metric=metric))
    assert all(isinstance(result, Folder) for result in seen)
    theirs = told(compared(model, data, tmp_path / "theirs", Grid(FEW, [0.5]), metric=metric))
    assert any(cell.metrics for cell in ours.values())
    for key, cell in ours.items():
        assert cell.metrics == pytest.approx(theirs[key].metrics, rel=1e-5)


def test_methods_that_read_gradients_are_compared_too(tmp_path: Path) -> None:
    check("mixtral", Grid({"late": {"config": MergeConfig(saliency="taylor", merging="fisher")}}, [0.5]), tmp_path)
