"""A comparison: its figures against ones computed in another way, what is kept of it, and what is refused."""

import csv
import io
import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from helpers import batches, logits
from transformers import PreTrainedModel

from hf_mcsmoe import MergeConfig, QuantizationConfig, RepairConfig, collect_statistics, compress
from hf_mcsmoe.compare import results, run
from hf_mcsmoe.compare.cells import Cell
from hf_mcsmoe.compare.grid import Grid
from hf_mcsmoe.compare.run import Comparison, compare
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.methods.statistics import STATISTICS
from hf_mcsmoe.search.compress import source_bytes

OWN = {
    "merged": {"config": MergeConfig(budget="uniform")},
    "pruned": {"config": MergeConfig(reduce="prune", saliency="frequency", budget="uniform")},
}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build("mixtral")


@pytest.fixture(scope="module")
def data(model: PreTrainedModel) -> list[dict[str, torch.Tensor]]:
    return batches("mixtral", model, number=6)


def _compared(
    model: PreTrainedModel, data: list[Any], output: Path, grid: Grid | None = None, **given: Any
) -> Comparison:
    grid = grid or Grid(OWN, [0.5])
    return compare(model, {0: data[:4]}, {"in": data[4:5], "out": data[5:]}, grid, output, **given)


def _cells(found: Comparison) -> dict[str, Cell]:
    return {cell.method: cell for cell in found.cells}


def _divergence(model: PreTrainedModel, student: PreTrainedModel, batch: dict[str, torch.Tensor]) -> float:
    counted = batch["attention_mask"][:, 1:] != 0
    before, after = (logits(each, batch)[:, :-1][counted].double().softmax(-1) for each in (model, student))
    return float((before * (before / after).log()).sum(-1).mean())


def _file_bytes(folder: Path) -> int:
    """Return the bytes of the tensors in the weight files of a folder, the headers left out."""
    total = 0
    for file in folder.glob("*.safetensors"):
        total += file.stat().st_size - 8 - struct.unpack("<Q", file.read_bytes()[:8])[0]
    return total


def _output_error(
    model: PreTrainedModel, student: PreTrainedModel, block: str, batch: dict[str, torch.Tensor]
) -> float:
    """Return the relative squared error of a block of the student at what the original's block is given."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    hook = model.get_submodule(block).register_forward_hook(lambda _, given, output: seen.append((given[0], output)))
    logits(model, batch)
    hook.remove()
    states, expected = seen[0]
    expected = expected[0] if isinstance(expected, tuple) else expected
    with torch.no_grad():
        found = student.get_submodule(block)(states)
    found = found[0] if isinstance(found, tuple) else found
    counted = batch["attention_mask"].flatten() != 0
    missed, whole = (
        (value.reshape(len(counted), -1)[counted]).square().sum() for value in (found - expected, expected)
    )
    return float(missed / whole)


def test_figures_are_those_of_the_results_themselves(model: PreTrainedModel, data: list[Any], tmp_path: Path) -> None:
    cells = _cells(_compared(model, data, tmp_path / "out"))
    statistics = collect_statistics(model, data[:3], ["counts", "gate_sum", "logit_gram"])
    for name, options in OWN.items():
        student, cell = compress(model, [], options["config"], statistics=statistics), cells[name]
        for text, batch in (("in", data[4]), ("out", data[5])):
            assert cell.texts[text].kl == pytest.approx(_divergence(model, student, batch), rel=1e-4)
            assert cell.texts[text].loss == pytest.approx(_loss(student, batch), rel=1e-4)
        student.save_pretrained(tmp_path / name)
        assert cell.bytes == _file_bytes(tmp_path / name)
        assert cell.parameters == student.num_parameters()
        for layer, error in cell.layers.items():
            assert error == pytest.approx(_output_error(model, student, layer.rpartition(".")[0], data[4]), rel=1e-3)
        assert cell.seconds > 0
        assert cell.memory > 10_000_000
    assert cells["original"].bytes == _file_bytes(_saved(model, tmp_path / "whole"))
    assert cells["merged"].done == "4 of 8 experts, merged"
    assert cells["pruned"].done == "4 of 8 experts, pruned"


@torch.no_grad()
def _loss(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> float:
    return float(model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss)


def test_a_size_is_the_most_experts_that_fit(model: PreTrainedModel, data: list[Any], tmp_path: Path) -> None:
    found = _compared(model, data, tmp_path / "out", Grid(OWN, sizes=[0.7]))
    for cell in (cell for cell in found.cells if cell.method in OWN):
        experts = int(cell.done.split()[0])
        assert cell.bytes <= cell.asked == int(0.7 * source_bytes(Layers.of(model)))
        larger = compress(model, data[:3], replace(OWN[cell.method]["config"], experts=experts + 1))
        assert (_saved(larger, tmp_path / cell.method) / "model.safetensors").stat().st_size > cell.asked


def _saved(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def _counting(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    made: list[Any] = []

    def counted(*given: Any, **options: Any) -> PreTrainedModel:
        made.append(given)
        return compress(*given, **options)

    monkeypatch.setattr(results, "compress", counted)
    return made


def test_what_is_finished_is_kept_when_a_run_is_broken_off(
    model: PreTrainedModel, data: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, output = _counting(monkeypatch), tmp_path / "out"

    def stop(cells: list[Cell]) -> None:
        if len(made) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _compared(model, data, output, told=stop)
    lines = (output / "cells.jsonl").read_text()
    with (output / "cells.jsonl").open("a") as file:
        file.write('{"method": "pruned", "lev')  # a kill in the middle of a line
    monkeypatch.setattr(run, "collect_statistics", lambda *a, **k: pytest.fail("collected again"), raising=False)
    found = _compared(model, data, output)
    assert len(made) == 2, "the first cell was made again"
    assert [cell.method for cell in found.cells] == ["original", "merged", "pruned"]
    assert (output / "cells.jsonl").read_text().startswith(lines)
    whole = _compared(model, data, tmp_path / "at once")
    for cell, other in zip(found.cells, whole.cells, strict=True):
        assert (cell.texts, cell.layers, cell.bytes) == (other.texts, other.layers, other.bytes)


def test_the_outputs_tell_the_same(model: PreTrainedModel, data: list[Any], tmp_path: Path) -> None:
    found = _compared(
        model, data, tmp_path, Grid({**OWN, "broken": {"repair": _Broken()}}, [0.5]), metric=lambda _: {"f": 2.0}
    )
    told = json.loads((tmp_path / "compare.json").read_text())
    assert [Cell.from_dict(cell) for cell in told["cells"]] == found.cells
    assert told["fingerprint"] == Layers.of(model).fingerprint
    rows = list(csv.DictReader(io.StringIO((tmp_path / "compare.csv").read_text())))
    assert [row["method"] for row in rows] == ["original", "merged", "pruned", "broken"]
    assert float(rows[1]["kl out"]) == found.cells[1].texts["out"].kl
    assert rows[1]["f"] == "2.0"
    assert rows[3]["error"] == found.cells[3].error == "it does not fit"
    page = (tmp_path / "report.html").read_text()
    assert "it does not fit" in page
    assert page.index("Quality against bytes") < page.index("Method by method") < page.index("Layer by layer")


class _Broken(RepairConfig):
    """A repair that fails when it is at work."""

    def __init__(self) -> None:
        super().__init__(method=_fails)


def _fails(*_: Any, **__: Any) -> None:
    raise ValueError("it does\nnot fit")


def _other(model: PreTrainedModel) -> PreTrainedModel:
    return build("mixtral", seed=1)


CHANGED: dict[str, tuple[Callable[[PreTrainedModel, list[Any]], dict[str, Any]], str]] = {
    "model": (lambda model, data: {"model": _other(model)}, "with fingerprint"),
    "text": (lambda model, data: {"texts": {"in": data[3:4], "out": data[5:]}}, "another text of in"),
    "texts": (lambda model, data: {"texts": {"in": data[4:5]}}, "with the texts in, out, not in"),
    "draw": (lambda model, data: {"draws": {0: data[1:4]}}, "another calibration text of seed 0"),
    "method": (
        lambda model, data: {"grid": Grid({"merged": {"config": MergeConfig(budget="adaptive")}}, [0.5])},
        "another make of the method merged",
    ),
    "bits": (lambda model, data: {"grid": Grid(OWN, [0.5], bits=4)}, "with bits None, not 4"),
}


def test_other_conditions_are_refused_by_what_changed(model: PreTrainedModel, data: list[Any], tmp_path: Path) -> None:
    given = {
        "model": model,
        "draws": {0: data[:4]},
        "texts": {"in": data[4:5], "out": data[5:]},
        "grid": Grid(OWN, [0.5]),
    }
    compare(**given, output=tmp_path)
    before = (tmp_path / "cells.jsonl").read_text()
    for change, message in CHANGED.values():
        with pytest.raises(ValueError, match=message):
            compare(**{**given, **change(model, data)}, output=tmp_path)
    assert (tmp_path / "cells.jsonl").read_text() == before
    more = compare(**{**given, "grid": Grid({**OWN, "more": {}}, [0.5])}, output=tmp_path)
    assert len(more.cells) == 4, "a further method is no other condition"
    anew = compare(**{**given, "draws": {0: data[1:4]}}, output=tmp_path, overwrite=True)
    assert len(anew.cells) == 3


def test_what_cannot_be_compared_is_refused_before_a_forward(
    model: PreTrainedModel, data: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    statistics = collect_statistics(model, data[:4])
    other = collect_statistics(_other(model), data[:4])
    monkeypatch.setattr(run, "Bench", lambda *_: pytest.fail("a forward"))
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "notes.txt").write_text("mine")
    texts = {"in": data[4:5]}
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: Grid(["reep"], [0.5]), "Unknown method 'reep'. Did you mean 'reap'"),
        (lambda: Grid(["reap:budgit=uniform"], [0.5]), "Unknown option 'budgit'. Did you mean 'budget'"),
        (lambda: Grid(["reap:budget=unifrom"], [0.5]), "Did you mean 'uniform'"),
        (lambda: Grid(["reap:min_experts=x"], [0.5]), "min_experts='x' must be a whole number"),
        (lambda: Grid(["reap"], [1.5]), "experts=1.5 must be a whole number"),
        (lambda: Grid(["reap"], [], ["5 apples"]), "in no known unit"),
        (lambda: Grid(["reap"]), "There is nothing to compare at"),
        (lambda: Grid([], [0.5]), "There are no methods to compare"),
        (lambda: compare(model, {}, texts, Grid(OWN, [0.5]), tmp_path / "x"), "There is no calibration text"),
        (lambda: compare(model, {0: data}, {}, Grid(OWN, [0.5]), tmp_path / "x"), "There is no text to judge on"),
        (
            lambda: compare(model, {0: data}, {"in": []}, Grid(OWN, [0.5]), tmp_path / "x"),
            "in has no rows to judge on",
        ),
        (lambda: compare(model, {0: data}, texts, Grid(["reap"], [1]), tmp_path / "x"), "No method can be tried"),
        (
            lambda: compare(model, {0: data}, texts, Grid(["moe-pruner"], [], [0.5]), tmp_path / "x"),
            "leaves out weights, which saves no bytes",
        ),
        (lambda: compare(model, {0: data}, texts, Grid(OWN, [0.5]), tmp_path / "file"), "holds no comparison"),
        (
            lambda: compare(model, {0: data}, texts, Grid(OWN, [0.5]), tmp_path / "x", statistics=other),
            "taken from another model",
        ),
        (
            lambda: compare(model, {0: data}, texts, Grid(["reap"], [0.5]), tmp_path / "x", statistics=statistics),
            "The statistic 'contribution' was not collected",
        ),
        (
            lambda: compare(model, {0: data, 1: data}, texts, Grid(OWN, [0.5]), tmp_path / "x", statistics=statistics),
            "of one draw",
        ),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    assert not list(tmp_path.glob("x/*"))


def test_a_size_too_small_for_some_is_told_and_the_others_go_on(
    model: PreTrainedModel, data: list[Any], tmp_path: Path
) -> None:
    methods = {"merged": OWN["merged"], "kept": {"config": MergeConfig(min_experts=4, budget="uniform")}}
    cells = _cells(_compared(model, data, tmp_path, Grid(methods, sizes=[0.4])))
    assert "and the fewest experts take" in cells["kept"].error
    assert cells["merged"].texts["in"].kl > 0


def test_a_method_with_changes_is_that_method_with_other_options() -> None:
    (way,) = Grid(["reap:budget=adaptive:repair=joint:min_experts=2"], [0.5]).ways
    options = way.options(0.25)
    assert options["config"] == MergeConfig(0.25, "adaptive", 2, saliency="reap", reduce="prune")
    assert options["repair"] == RepairConfig(method="joint")


def test_a_method_by_a_reference_checkpoint_needs_one(model: PreTrainedModel, data: list[Any], tmp_path: Path) -> None:
    build("mixtral", seed=1).save_pretrained(tmp_path / "base")
    methods = ["router-norm", "frequency-prune"]
    without = _cells(_compared(model, data, tmp_path / "without", Grid(methods, [0.5])))
    assert "name it with --base-model" in without["router-norm"].error
    assert not without["frequency-prune"].error
    grid = Grid(methods, [0.5], base_model=str(tmp_path / "base"))
    found = _cells(_compared(model, data, tmp_path / "with", grid))["router-norm"]
    assert not found.error
    options = {"reduce": "prune", "saliency": "router_norm_change", "budget": "uniform", "pruned_router": "zero"}
    student = compress(model, data[:3], MergeConfig(experts=0.5, **options), base_model=tmp_path / "base")
    assert found.texts["in"].kl == pytest.approx(_divergence(model, student, data[4]), rel=1e-4)


@pytest.mark.slow
def test_the_search_for_a_size_takes_the_bytes_that_experts_take(
    model: PreTrainedModel, data: list[Any], tmp_path: Path
) -> None:
    found = _compared(model, data, tmp_path, Grid(["frequency-prune", "ours-bits"], [0.5]))
    cells = _cells(found)
    assert cells["ours-bits"].bytes <= cells["ours-bits"].asked
    assert cells["ours-bits"].asked == pytest.approx(cells["frequency-prune"].bytes, rel=0.1), "headers are counted"
    assert "bits a weight" in cells["ours-bits"].done
    assert cells["ours-bits"].texts["in"].kl < cells["frequency-prune"].texts["in"].kl


def test_figures_of_other_data_another_task_or_another_draw_are_not_mixed(
    model: PreTrainedModel, data: list[Any], tmp_path: Path
) -> None:
    needs = ["counts", "gate_sum", "logit_gram"]
    digests = {name: replace(collect_statistics(model, own, needs), data=name) for name, own in (("x", data[4:]),)}
    untold = collect_statistics(model, data[4:], needs)
    for statistics in (digests["x"], untold):
        with pytest.raises(ValueError, match="taken from other data"):
            _compared(model, data, tmp_path / "scores", statistics=statistics)
    own = collect_statistics(model, data[:3], needs)
    _compared(model, data, tmp_path / "own", statistics=own)
    assert not list((tmp_path / "own").glob("*.safetensors")), "what was given is not kept as the folder's own"

    def one(_: PreTrainedModel) -> dict[str, float]:
        return {"accuracy": 1.0}

    _compared(model, data, tmp_path / "task", metric=one, metric_of="a task of 3 rows")
    for other in ({"metric": one, "metric_of": "a task of 4 rows"}, {}):
        with pytest.raises(ValueError, match="holds a comparison with task"):
            _compared(model, data, tmp_path / "task", **other)


def test_a_result_that_overflows_is_a_failed_cell_and_the_folder_stays_usable(
    model: PreTrainedModel, data: list[Any], tmp_path: Path
) -> None:
    def huge(view: Any, members: list[int], shares: list[float], permutations: list[Any]) -> dict[str, torch.Tensor]:
        return {role: torch.full_like(tensor, 3e38) for role, tensor in view.experts.expert(members[0]).items()}

    grid = Grid({"huge": {"config": MergeConfig(merging=huge, alignment="none")}}, [0.5])
    cells = _cells(_compared(model, data, tmp_path / "out", grid))
    assert "overflows" in cells["huge"].error
    assert not cells["huge"].texts
    assert _cells(_compared(model, data, tmp_path / "out"))["merged"].texts["in"].kl > 0


def test_a_sum_that_cannot_be_taken_is_told_in_the_cells_of_its_method_alone(
    model: PreTrainedModel, data: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(routed: Any) -> torch.Tensor:
        raise RuntimeError("no memory for this sum")

    monkeypatch.setitem(STATISTICS.methods, "contribution", replace(STATISTICS.find("contribution"), function=broken))
    grid = Grid(["reap", "frequency-prune", "msmoe"], [0.5, 0.25])
    found = _compared(model, data, tmp_path / "out", grid)
    told = {(cell.method, cell.level): cell.error for cell in found.cells if cell.method != "original"}
    assert {key for key, error in told.items() if error == "no memory for this sum"} == {
        ("reap", "experts 0.5"),
        ("reap", "experts 0.25"),
    }
    assert sum(not error for error in told.values()) == 4
    monkeypatch.undo()
    assert not any(cell.error for cell in _compared(model, data, tmp_path / "out", grid).cells)


@pytest.mark.slow
def test_curves_that_cannot_be_measured_are_told_in_their_cell(
    model: PreTrainedModel, data: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no memory for curves")

    monkeypatch.setattr(run, "add_curves", broken)
    cells = _cells(_compared(model, data, tmp_path, Grid(["frequency-prune", "ours"], [0.5])))
    assert cells["ours"].error == "no memory for curves"
    assert not cells["frequency-prune"].error


@pytest.mark.slow
def test_bits_and_a_tasks_value_are_those_of_the_result(
    model: PreTrainedModel, data: list[Any], tmp_path: Path
) -> None:
    def largest(student: PreTrainedModel) -> dict[str, float]:
        return {"largest": float(logits(student, data[5]).abs().max())}

    grid = Grid(["frequency-prune"], [0.5], bits=4)
    cell = _cells(_compared(model, data, tmp_path / "out", grid, metric=largest, metric_of="one batch"))[
        "frequency-prune"
    ]
    config = MergeConfig(experts=0.5, reduce="prune", saliency="frequency", budget="uniform")
    student = compress(model, data[:3], config, quantization=QuantizationConfig(bits=4))
    assert cell.metrics == largest(student)
    assert cell.bytes == _file_bytes(_saved(student, tmp_path / "student"))
    assert "4 bits a weight" in cell.done
    dense = _cells(_compared(model, data, tmp_path / "dense", Grid(["frequency-prune"], [0.5])))["frequency-prune"]
    assert cell.bytes < 0.6 * dense.bytes
    with pytest.raises(ValueError, match="bits"):
        _compared(model, data, tmp_path / "out", Grid(["frequency-prune"], [0.5], bits=8))


def test_random_methods_take_the_seed_of_their_draw(model: PreTrainedModel, data: list[Any], tmp_path: Path) -> None:
    changes = "msmoe:saliency=random:similarity=random:grouping=random"
    grid = Grid([changes, f"{changes}:seed=3"], [0.5])
    draws = {0: data[:4], 1: data[:4]}  # the same text, so nothing but the seed differs
    found = compare(model, draws, {"in": data[4:5]}, grid, tmp_path / "out").cells
    worth = {(cell.method, cell.seed): cell.texts["in"].kl for cell in found if cell.method != "original"}
    assert worth[changes, 0] != worth[changes, 1]
    assert worth[f"{changes}:seed=3", 0] == worth[f"{changes}:seed=3", 1]


def test_one_expert_and_all_of_them_are_two_levels() -> None:
    assert [str(level) for level in Grid(OWN, [1.0, 1, 1.0]).levels] == ["experts 1.0", "experts 1"]
