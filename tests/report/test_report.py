"""The page of pictures: true to the folder, complete in itself, readable at any size, and refused in one sentence."""

import json
import random
import re
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from families import build
from helpers import Run, batches
from merged import ALL, example
from safetensors import safe_open

from hf_mcsmoe import (
    LoSparseConfig,
    MergeConfig,
    RepairConfig,
    RoutingStatistics,
    collect_statistics,
    compress,
    moe_layers,
)
from hf_mcsmoe.cli.report import draw
from hf_mcsmoe.methods.specialisation import NEEDS
from hf_mcsmoe.record import Base, Predicted, Record, SizeChoice, Stored
from hf_mcsmoe.report.charts import Point, scatter, unbeaten
from hf_mcsmoe.report.page import render, write_report
from hf_mcsmoe.report.result import LayerResult, Result, read_result
from hf_mcsmoe.report.svg import WIDTH, ceiling, level
from hf_mcsmoe.report.words import short_names, size

# What a letter of a drawing is wide at most, in units.
LETTER = 5.4


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a merged model, a repaired one, one of low rank, and the statistics of their original."""
    path, base = tmp_path_factory.mktemp("results"), build("mixtral")
    data = batches("mixtral", base, number=4)
    statistics = collect_statistics(base, data, [*MergeConfig().needs, *NEEDS])
    statistics.save(path / "statistics.safetensors")
    options: dict[str, dict[str, Any]] = {
        "merged": {},
        "repaired": {"repair": RepairConfig()},
        "low_rank": {"low_rank": LoSparseConfig(rank=4, keep=0.1)},
    }
    for name, steps in options.items():
        config = MergeConfig(experts=0.5)
        compress(base, data, config, statistics=statistics, **steps).save_pretrained(path / name)
    example("switch_transformers").merged.save_pretrained(path / "other")
    return path


class Page(HTMLParser):
    """Collects a page's elements and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep an element."""
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        """Keep text."""
        self.text += f" {data}"


def _text(html: str) -> str:
    return " ".join(Page(html).text.split())


def _drawings(html: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(found) for found in re.findall(r"<svg.*?</svg>", html, re.DOTALL)]


def _extent(path: str) -> Iterator[float]:
    """Yield the coordinates across that the rectangles, lines and dots of a path reach."""
    x = 0.0
    for letter, values in re.findall(r"([MLhvz])([^MLhvz]*)", path):
        if letter in "ML":
            x = float(values.split()[0])
        elif letter == "h":
            x += float(values)
        yield x


def _check(html: str) -> None:
    """Check what holds of any page: it needs nothing else, and nothing is drawn or written outside of a drawing."""
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert not [attributes for _, attributes in page.tags if {"src", "href", "onload"} & attributes.keys()]
    assert not re.search(r"url\(|@import", html)
    for drawing in _drawings(html):
        assert drawing.get("aria-label") == drawing.findtext("title") != ""
        height = float(drawing.get("viewBox", "").split()[3])
        for path in drawing.iter("path"):
            assert all(-0.2 <= x <= WIDTH + 0.4 for x in _extent(path.get("d", "")))
        for label in drawing.iter("text"):
            width = LETTER * len(label.text or "")
            shift = {"start": 0.0, "middle": width / 2, "end": width}[label.get("text-anchor", "")]
            left = float(label.get("x", "")) - shift
            assert -10 <= left <= left + width <= WIDTH + 10
            assert 0 <= float(label.get("y", "")) <= height


def _layer(number: int, experts: int, groups: int, **told: Any) -> LayerResult:
    draw = random.Random(number)
    dominant = sorted(draw.sample(range(experts), groups))
    expert_map = [draw.randrange(groups) for _ in range(experts)]
    for group, expert in enumerate(dominant):
        expert_map[expert] = group
    shown = {
        "dominant": dominant,
        "similarity": [1.0 if expert in dominant else draw.uniform(-1, 1) for expert in range(experts)],
        "counts": [draw.randrange(1000) for _ in range(experts)],
        "error_before": 0.5,
        "error_after": 0.1,
    }
    name = f"model.layers.{number}.mlp.experts"
    return LayerResult(name, expert_map, experts * 10**6, groups * 10**6, **{**shown, **told})


def _result(layers: list[LayerResult], name: str = "small", kl: float | None = 0.1, held: int = 10**9) -> Result:
    stages = {} if kl is None else {"before": {"loss": 1.0, "kl": 0.0}, "merged": {"loss": 1.5, "kl": kl}}
    told = {"fingerprint": "x", "similarity": "router_logits", "stages": stages, "judged": "merged" if stages else ""}
    return Result(name, "base", layers, 2 * 10**9, held, **told)


@pytest.mark.parametrize("name", ["merged", "repaired", "low_rank"])
def test_bytes_per_layer_are_those_of_the_file(name: str, folders: Path) -> None:
    result, base = read_result(folders / name), build("mixtral")
    held: dict[str, int] = {}
    with safe_open(folders / name / "model.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118
            if ".experts." in key:
                layer, tensor = key.partition(".experts.")[0] + ".experts", file.get_tensor(key)
                held[layer] = held.get(layer, 0) + tensor.numel() * tensor.element_size()
    assert {layer.name: layer.bytes_after for layer in result.layers} == held
    for layer in result.layers:
        original = base.get_submodule(layer.name).parameters()
        assert layer.bytes_before == sum(tensor.numel() * tensor.element_size() for tensor in original)
    assert result.bytes_after == (folders / name / "model.safetensors").stat().st_size


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_results_of_every_layout_are_drawn(name: str, tmp_path: Path) -> None:
    case = example(name)
    case.merged.save_pretrained(tmp_path / name)
    result = read_result(tmp_path / name)
    merged = {item.original_name: item.num_parameters for item in moe_layers(case.merged)}
    whole = {item.original_name: item.num_parameters for item in moe_layers(case.base)}
    width = case.merged.dtype.itemsize
    for layer in result.layers:
        if name != "longcat_flash":  # whose gates have rows for experts without weights as well, that nothing reads
            assert layer.bytes_before == whole[layer.name] * width
        assert layer.bytes_after == merged[layer.name] * width
        assert layer.dominant == case.plan.layers[layer.name].dominant
    _check(render([result]))


def test_a_result_is_what_plan_and_record_say(folders: Path) -> None:
    plan = json.loads((folders / "repaired" / "mcsmoe_plan.json").read_text())
    record = json.loads((folders / "repaired" / "mcsmoe_record.json").read_text())
    errors = record["steps"][0]["figures"]["relative_error"]
    for layer in read_result(folders / "repaired").layers:
        told = plan["layers"][layer.name]
        assert (layer.expert_map, layer.dominant) == (told["expert_map"], told["dominant"])
        assert (layer.similarity, layer.counts) == (told["similarity"], told["counts"])
        assert [group[0] for group in layer.groups] == told["dominant"]
        assert sorted(expert for group in layer.groups for expert in group) == list(range(8))
        if layer.is_merged:
            assert {"before": layer.error_before, "after": layer.error_after} == errors[layer.name]


def test_the_page_of_a_result_tells_what_is_in_its_folder(folders: Path) -> None:
    file = write_report([folders / "repaired"], statistics=folders / "statistics.safetensors")
    assert file == folders / "repaired" / "report.html"
    html, layers = file.read_text(encoding="utf-8"), read_result(folders / "repaired").layers
    _check(html)
    sums = RoutingStatistics.load(folders / "statistics.safetensors")
    for layer in layers:
        gates = float(sums[layer.name]["gate_entropy"] / sums[layer.name].tokens)
        assert f"{layer.name} {gates:.2f} " in _text(html).partition("How specialised")[2]
        assert f"{layer.name} 8 {len(layer.groups)} {layer.bytes_before:,} {layer.bytes_after:,}" in _text(html)
        assert f"{layer.name} {sum(layer.counts or ()):,} " in _text(html)
        if layer.is_merged:
            assert f"{layer.name} {layer.error_before:.3g} {layer.error_after:.3g}" in _text(html)
            assert f"Similarity of the experts of {layer.name}" in _text(html)
    assert len(_drawings(html)) >= 5 + sum(layer.is_merged for layer in layers)


def test_quality_is_that_of_the_stage_that_the_model_is_in(folders: Path, tmp_path: Path) -> None:
    record = json.loads((folders / "merged" / "mcsmoe_record.json").read_text())
    measures = {"before": {"loss": 1.25, "kl": 0.0}, "merged": {"loss": 1.75, "kl": 0.375}}
    for judged, expected in (("merged", measures["merged"]), ("", {})):
        path = shutil.copytree(folders / "merged", tmp_path / f"judged {judged}")
        (path / "mcsmoe_record.json").write_text(json.dumps(record | {"quality": measures, "judged": judged}))
        assert read_result(path).quality == expected
    text = _text(write_report([tmp_path / "judged merged", tmp_path / "judged "]).read_text("utf-8"))
    assert "Not measured: judged ." in text
    assert all(word in text for word in ("0.375", "1.75", "1.25"))


def test_what_a_folder_does_not_tell_is_a_sentence(folders: Path, tmp_path: Path) -> None:
    path = shutil.copytree(folders / "merged", tmp_path / "bare")
    (path / "mcsmoe_plan.json").unlink()
    (path / "mcsmoe_record.json").unlink()
    html = write_report([path]).read_text("utf-8")
    _check(html)
    for told in (
        "does not tell how alike experts are",
        "does not tell how often each expert was picked",
        "No layer was repaired, or no record lies beside the model.",
        "tells no loss or divergence",
    ):
        assert told in _text(html)
    assert len(_drawings(html)) == 3, "bytes, experts and groups are known from the configuration"


def test_names_are_text_and_nothing_else() -> None:
    names = ["<script>alert(1)</script> & \"co\" 'x'", '"><b>']
    layer = _layer(0, 4, 2)
    html = render([_result([LayerResult(name, layer.expert_map, 8, 4)], name) for name in names])
    _check(html)
    assert all(name in Page(html).text for name in names)


@pytest.mark.parametrize(
    ("layers", "experts", "groups"), [(1, 1, 1), (1, 2, 1), (3, 8, 8), (24, 16, 3), (48, 128, 64), (60, 512, 256)]
)
def test_a_page_of_any_size_stays_small(layers: int, experts: int, groups: int) -> None:
    html = render([_result([_layer(number, experts, groups) for number in range(layers)])])
    _check(html)
    assert len(html) < 400_000
    assert all(float(drawing.get("viewBox", "").split()[3]) < 600 for drawing in _drawings(html))


def test_layers_unlike_each_other_and_values_of_any_kind_are_drawn() -> None:
    odd = [
        _layer(0, 2, 1, similarity=[1.0, None], counts=[0, 0], error_before=None, error_after=None),
        _layer(1, 100, 100, similarity=None, counts=None),
        _layer(2, 7, 3, dominant=None, similarity=[0.5] * 7, error_before=0.0, error_after=0.0),
        _layer(3, 5, 1, similarity=[None] * 5, counts=[0, 0, 9, 0, 0], error_before=3.0, error_after=None),
    ]
    _check(render([_result(odd)]))
    for layer in odd:
        _check(render([_result([layer], kl=None), _result([layer], kl=0.0, held=1)]))


def test_a_page_tells_what_layers_are_stored_as_and_what_that_was_expected_to_cost() -> None:
    names = [f"model.layers.{number}.mlp.experts" for number in range(3)]
    stored = [
        (Stored(16, 16, "", {}, {"gate_up_proj": 4, "down_proj": 3}, 11), 3.5),
        (Stored(16, 8, "prune", {}, {"gate_up_proj": 8, "down_proj": 8}, 12), 8.0),
        (Stored(16, 12, "merge", {"down_proj": 9}, {}, 13), 16.0),
    ]
    layers = [_layer(number, 16, item.after, stored=item, bits=bits) for number, (item, bits) in enumerate(stored)]
    predicted = dict(zip(names, [0.25, 0.125, 0.0625], strict=True))
    ladder = [Predicted("chosen", 400, 0.01), Predicted("chosen", 200, 1.0), Predicted("all at 3 bits", 300, 0.1)]
    choice = SizeChoice(10**9, 250, 249, predicted, checked={"mixture": 0.5, "all at 3 bits": 0.75}, ladder=ladder)
    record = Record(Base("base", "mixtral"), size=choice)
    html = render([replace(_result(layers, kl=0.5), record=record)])
    _check(html)
    text = _text(html)
    told = [
        f"{names[0]} 16 16 4 / 3 11",
        f"{names[1]} 16 8 pruning 8 12",
        f"{names[2]} 16 12 merging 9 13",
        f"{names[0]} 0.25",
        "predicted, all layers 0.438",
        "measured 0.5",
        "on these rows: all at 3 bits 0.75",
        "on rows held out; predicted 0.438",
        "For 250 bytes mixture was taken.",
        "3 all at 3 bits 300 bytes 0.1",
    ]
    for words in told:
        assert words in text, words
    for title, values in (
        ("Bits of the weights of each layer", ["3.5", "8", "16"]),
        ("Predicted KL of each layer", ["0.25"]),
        ("Predicted KL against bytes", ["0.01", "0.1", "1", "3"]),
    ):
        (drawing,) = [found for found in _drawings(html) if found.findtext("title") == title]
        assert set(values) <= {label.text for label in drawing.iter("text")}
    (drawing,) = [found for found in _drawings(html) if found.findtext("title") == "Predicted KL against bytes"]
    heights = {
        label.text: float(label.get("y", 0)) for label in drawing.iter("text") if "cell" in label.get("class", "")
    }
    assert heights["3"] == pytest.approx((heights["1"] + heights["2"]) / 2)  # of .01, .1 and 1
    plain = [_layer(0, 16, 8, stored=Stored(16, 8, "merge"), bits=16.0)]
    titles = {found.findtext("title") for found in _drawings(render([_result(plain)]))}
    assert not {"Bits of the weights of each layer", "Predicted KL of each layer"} & titles


def _pruned(number: int, experts: int, kept: list[int]) -> LayerResult:
    places = {expert: place for place, expert in enumerate(kept)}
    layer = _layer(number, experts, len(kept), dominant=kept, similarity=[None] * experts)
    return replace(layer, expert_map=[places.get(expert, -1) for expert in range(experts)])


def test_experts_that_were_pruned_away_are_drawn_apart() -> None:
    html = render([_result([_pruned(0, 8, [1, 4, 6]), _layer(1, 8, 5)])])
    _check(html)
    text = _text(html)
    assert "The last ones of a layer, without colour, were pruned away." in text
    (cells,) = [found for found in _drawings(html) if "by group" in str(found.findtext("title"))]
    row = [label.text for label in cells.iter("text") if "cell" in label.get("class", "")][:8]
    assert row == ["1", "4", "6", "0", "2", "3", "5", "7"]
    assert "8 of 16, in 2 layers, 2 of them merged" in text.replace("3 of 8", "")
    large = render([_result([_pruned(0, 128, list(range(0, 128, 4))), _layer(1, 128, 100)])])
    _check(large)
    (shares,) = [found for found in _drawings(large) if "picks" in str(found.findtext("title"))]
    weak = next(path for path in shares.iter("path") if path.get("class") == "weak")
    assert weak.get("d"), "the picks of experts that are gone are among all others"


def test_several_results_are_compared_by_size_and_divergence() -> None:
    results = [
        _result([_layer(0, 8, 4)], f"number {kl}", kl, held * 10**9)
        for held, kl in ((4, 0.2), (3, 0.4), (5, 0.3), (2, 0.4))
    ]
    html = render([*results, _result([_layer(0, 8, 4)], "unmeasured", None)])
    _check(html)
    assert "Not measured: unmeasured." in _text(html)
    best = [path for path in _drawings(html)[0].iter("path") if "best" in path.get("class", "").split()]
    assert [path.get("d", "").count("M") for path in best] == [2], "the first and the last: others are beaten"


def _beats(one: Point, other: Point) -> bool:
    return one.x <= other.x and one.y <= other.y and (one.x, one.y) != (other.x, other.y)


def test_the_unbeaten_are_those_that_none_beats() -> None:
    draw = random.Random(0)
    for _ in range(50):
        points = [Point(draw.randrange(5), draw.randrange(5), str(place)) for place in range(8)]
        plain = {(point.x, point.y) for point in points if not any(_beats(other, point) for other in points)}
        assert {(points[place].x, points[place].y) for place in unbeaten(points)} == plain


def test_points_of_nothing_are_drawn() -> None:
    assert "nan" not in scatter("x", [Point(0, 0, "1")], (str, str), ("a", "b"))


BLOCKS = [
    f"{side}.block.{block}.layer.{part}.mlp" for side, part in (("encoder", 1), ("decoder", 2)) for block in "13"
]


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["model.layers.3.mlp.experts"], ["3"]),
        (["experts"], ["experts"]),
        (["model.layers.0.mlp", "model.layers.11.mlp"], ["0", "11"]),
        (BLOCKS, ["encoder 1", "encoder 3", "decoder 1", "decoder 3"]),
        (["a.experts", "a.b.experts"], ["experts", "b"]),
    ],
)
def test_short_names_tell_layers_apart(names: list[str], short: list[str]) -> None:
    assert short_names(names) == short


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0"), (999, "999 bytes"), (1000, "1 kB"), (999_499, "999 kB"), (999_600, "1 MB"), (4.72e6, "4.72 MB")],
)
def test_sizes_are_written_with_three_figures(count: float, words: str) -> None:
    assert size(count) == words


def test_an_axis_ends_at_or_above_the_largest_value() -> None:
    for value, power in product((1, 1.01, 1.3, 2.2, 3.3, 7, 9.99, 10), (1e-9, 0.1, 1e6, 1e12)):
        assert value * power * (1 - 1e-6) <= ceiling(value * power) <= 1.5 * value * power
    assert ceiling(0) == 1
    assert [level(value, 0, 1) for value in (-1, 0, 0.5, 1, 2, None, float("nan"))] == [0, 0, 4, 8, 8, None, None]


def _write(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(content)


def _folder_for_a_file(folder: Path) -> None:
    (folder / "mcsmoe_plan.json").unlink()
    (folder / "mcsmoe_plan.json").mkdir()


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (shutil.rmtree, "is no folder: name one that"),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), "holds no config.json, so no model"),
    "damaged configuration": (_write("config.json", b"{"), "config.json is damaged"),
    "a list": (_write("config.json", b"[]"), "holds a model of type None"),
    "another's": (_write("config.json", b'{"model_type": "llama"}'), "holds a model of type 'llama', which this"),
    "damaged plan": (_write("mcsmoe_plan.json", b"{"), "mcsmoe_plan.json is damaged"),
    "damaged record": (_write("mcsmoe_record.json", b"[]"), "mcsmoe_record.json is damaged"),
    "not text": (_write("mcsmoe_record.json", b"\xff\xfe"), "mcsmoe_record.json is damaged"),
    "a folder": (_folder_for_a_file, "mcsmoe_plan.json is damaged"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_folders_that_are_no_results_are_refused(kind: str, folders: Path, tmp_path: Path) -> None:
    spoil, message = REFUSED[kind]
    path = shutil.copytree(folders / "merged", tmp_path / "result")
    spoil(path)
    with pytest.raises(ValueError, match=message):
        write_report([path])
    assert not (path / "report.html").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quality": {"merged": {"kl": "low"}}}, "mcsmoe_record.json is damaged"),
        ({"quality": []}, "mcsmoe_record.json is damaged"),
        ({"steps": [{"title": "Repair", "figures": {"relative_error": {"a": 1}}}]}, "its errors of layers are none"),
    ],
)
def test_records_that_hold_no_figures_are_refused(change: Any, message: str, folders: Path, tmp_path: Path) -> None:
    path = shutil.copytree(folders / "merged", tmp_path / "result")
    record = json.loads((path / "mcsmoe_record.json").read_text())
    (path / "mcsmoe_record.json").write_text(json.dumps(record | change))
    with pytest.raises(ValueError, match=message):
        read_result(path)


def test_the_plan_of_another_result_is_refused(folders: Path, tmp_path: Path) -> None:
    path = shutil.copytree(folders / "merged", tmp_path / "result")
    plan = json.loads((path / "mcsmoe_plan.json").read_text())
    next(iter(plan["layers"].values())).update(expert_map=[0] * 8, dominant=[0], weights=[0.125] * 8)
    (path / "mcsmoe_plan.json").write_text(json.dumps(plan))
    with pytest.raises(ValueError, match=r"groups the experts of \S+ otherwise than config.json does"):
        read_result(path)


def test_a_result_is_whole_without_its_page(folders: Path, tmp_path: Path) -> None:
    path = shutil.copytree(folders / "merged", tmp_path / "result")
    draw(path)
    (path / "report.html").unlink()
    (path / "report.html").mkdir()
    with pytest.warns(UserWarning, match="is whole, but its page of pictures could not be written"):
        draw(path)


def test_the_command_writes_one_page_and_refuses_in_one_sentence(folders: Path, tmp_path: Path, run: Run) -> None:
    page = tmp_path / "a.html"
    code, out, _ = run("report", folders / "merged", folders / "low_rank", folders / "other", "--output", page)
    assert (code, "".join(out.split())) == (0, f"{page}written")
    _check(page.read_text("utf-8"))
    for arguments, message in (
        ([folders / "merged", folders / "merged"], "A folder is named twice"),
        ([folders / "merged", "--output", tmp_path / "page.txt"], "let it end in .html"),
        ([folders / "merged", "--output", tmp_path / "none" / "page.html"], "none"),
        ([folders / "other", "--scores", folders / "statistics.safetensors"], "taken from another model"),
        ([folders / "merged", "--scores", folders / "merged" / "config.json"], "config.json"),
        ([tmp_path / "nowhere"], "is no folder"),
    ):
        code, _, error = run("report", *arguments)
        assert (code, error.count("Error:")) == (1, 1)
        assert message in error
