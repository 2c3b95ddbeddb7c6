"""What `config.json` says of merged layers: format 1 is still read, and values that mean nothing are refused."""

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import batches, logits
from merged import example, run_python
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from hf_mcsmoe import LoSparseConfig, compact, decompose_experts
from hf_mcsmoe.modeling.convert import describe

FORMAT_1 = Path(__file__).parents[1] / "data" / "format1"


@pytest.mark.parametrize("name", ["mixtral", "mixtral_low_rank", "switch_transformers"])
def test_a_checkpoint_of_format_1_gives_the_logits_that_it_was_saved_with(name: str, tmp_path: Path) -> None:
    written = json.loads((FORMAT_1 / name / "config.json").read_text())["mcsmoe"]
    assert written["format_version"] == 1
    auto_class = AutoModelForSeq2SeqLM if name == "switch_transformers" else AutoModelForCausalLM
    expected = load_file(FORMAT_1 / name / "expected.safetensors")
    batch = {key: expected[key] for key in expected if key != "logits"}
    model, info = auto_class.from_pretrained(FORMAT_1 / name, output_loading_info=True)
    assert not any(info.values()), info
    torch.testing.assert_close(logits(model, batch), expected["logits"], atol=1e-6, rtol=1e-6)
    model.save_pretrained(tmp_path)
    again = json.loads((tmp_path / "config.json").read_text())["mcsmoe"]
    assert again == written | {"format_version": 2}
    torch.testing.assert_close(
        logits(auto_class.from_pretrained(tmp_path), batch), expected["logits"], atol=1e-6, rtol=1e-6
    )


def test_the_configuration_is_what_the_modules_hold() -> None:
    case = example("mixtral")
    model = decompose_experts(copy.deepcopy(case.merged), LoSparseConfig(rank=3, keep=0.25))
    layers = [
        {
            "num_experts": len(item.expert_map),
            "expert_map": item.expert_map,
            "low_rank": {weight: {"rank": 3, "kept_rows": None} for weight in ("gate_up_proj", "down_proj")},
        }
        for item in case.plan.layers.values()
    ]
    expected = {
        "format_version": 2,
        "whole": [],
        "keep": 0.25,
        "layers": dict(zip(case.plan.layers, layers, strict=True)),
    }
    assert describe(model) == model.config.mcsmoe == expected
    with pytest.warns(UserWarning, match="rows of S are still kept"):
        compact(model)
    kept = [entry["kept_rows"] for layer in describe(model)["layers"].values() for entry in layer["low_rank"].values()]
    assert [len(rows) for rows in kept] == [max(m.expert_map) + 1 for m in case.plan.layers.values() for _ in range(2)]
    assert model.config.mcsmoe == describe(model)


def _first(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], object]:
    return lambda mcsmoe: change(next(iter(mcsmoe["layers"].values())))


def _low_rank(**values: Any) -> Callable[[dict[str, Any]], object]:
    return _first(lambda layer: layer["low_rank"]["down_proj"].update(values))


def _map(change: Callable[[list[Any]], object]) -> Callable[[dict[str, Any]], object]:
    return _first(lambda layer: change(layer["expert_map"]))


def _renamed(name: str) -> Callable[[dict[str, Any]], object]:
    """Give the first layer another name."""
    return lambda mcsmoe: mcsmoe["layers"].update({name: mcsmoe["layers"].pop(next(iter(mcsmoe["layers"])))})


# What is written into the object, and what the refusal says of it.
WRONG: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a fraction": (_map(lambda m: m.__setitem__(0, 0.5)), r"expert map of .* whole numbers from 0 on, not \[0\.5"),
    "a negative entry": (_map(lambda m: m.__setitem__(0, -1)), r"whole numbers from 0 on, not \[-1"),
    "an unused group": (_map(lambda m: m.__setitem__(0, 7)), "goes up to 7 with "),
    "a group beyond all memory": (_map(lambda m: m.__setitem__(0, 10**30)), "goes up to 10{30} with "),
    "too short a map": (_map(lambda m: m.pop()), "has 7 entries for 8 experts"),
    "a family of fewer experts": (
        _first(lambda layer: layer.update(num_experts=9, expert_map=[*layer["expert_map"], 0])),
        "has 9 entries for 8 experts",
    ),
    "no map": (_first(lambda layer: layer.pop("expert_map")), "must be a list of whole numbers from 0 on, not None"),
    "rank 0": (_low_rank(rank=0), "rank of down_proj.* must be a whole number from 1 on, not 0"),
    "too large a rank": (_low_rank(rank=99), "rank of down_proj must be a whole number from 1 to 24, not 99"),
    "too many rows": (
        lambda mcsmoe: [
            layer["low_rank"]["down_proj"].update(kept_rows=[99] * (max(layer["expert_map"]) + 1))
            for layer in mcsmoe["layers"].values()
        ],
        r"`kept_rows` of down_proj must be \d whole numbers from 0 to 24",
    ),
    "rows of too few experts": (_low_rank(kept_rows=[1]), r"`kept_rows` of down_proj of .* must be \d whole numbers"),
    "no layers": (lambda mcsmoe: mcsmoe.pop("layers"), "`mcsmoe.layers` must be an object"),
    "a version that is no number": (
        lambda mcsmoe: mcsmoe.update(format_version="two"),
        "`mcsmoe.format_version` must be a whole number from 1 on, not 'two'",
    ),
    "a later version": (lambda mcsmoe: mcsmoe.update(format_version=99), "has format 99; this code reads up to 2"),
    "a share above one": (lambda mcsmoe: mcsmoe.update(keep=2), "`mcsmoe.keep` must be a share from 0 to 1, not 2"),
    "a low rank weight that is none": (
        _first(lambda layer: layer["low_rank"].update(nonsense=layer["low_rank"].pop("down_proj"))),
        "has no matrix 'nonsense'",
    ),
    "a low rank number": (
        _first(lambda layer: layer["low_rank"].update(num_experts=layer["low_rank"].pop("down_proj"))),
        "has no matrix 'num_experts'",
    ),
    "attention": (_renamed("model.layers.0.self_attn"), "names 'model.layers.0.self_attn' as merged, .* no experts"),
    "a router": (_renamed("model.layers.0.mlp.gate"), "names 'model.layers.0.mlp.gate' as merged, .* no experts"),
    "the head": (_renamed("lm_head"), "names 'lm_head' as merged, .* is no experts but a Linear"),
    "the model": (_renamed(""), "names '' as merged, .* no experts"),
    "one layer by two names": (
        lambda mcsmoe: mcsmoe["layers"].update(
            {name.removeprefix("model."): layer for name, layer in mcsmoe["layers"].items()}
        ),
        "names a merged layer twice",
    ),
    "a share that is a truth": (lambda mcsmoe: mcsmoe.update(keep=True), "`mcsmoe.keep` must be a share from 0 to 1"),
    "rows that are not told": (
        _first(lambda layer: layer["low_rank"]["down_proj"].pop("kept_rows")),
        r"`kept_rows` of down_proj .* must be \d whole numbers from 0 on, or null, not 'missing'",
    ),
    "another rank": (
        _low_rank(rank=2),
        r"another shape than .* config.json says \(.*down_proj_u is \[\d, 32, 3\], not",
    ),
    "the training form": (_low_rank(kept_rows=None), r"another shape than .* config.json says \(.*down_proj_s"),
    "one group": (
        _first(lambda layer: layer.update(expert_map=[0] * 8, low_rank={})),
        r"another shape than its config.json says|lacks \d weights of experts that its config.json describes",
    ),
    "no merged layer": (lambda mcsmoe: mcsmoe.update(layers={}), "lacks 8 weights of experts that its config.json"),
    "a layer that is left out": (
        lambda mcsmoe: mcsmoe["layers"].pop(next(iter(mcsmoe["layers"]))),
        r"lacks 2 weights of experts that its config.json describes \(model.layers.0.mlp.experts",
    ),
    "no low rank": (_first(lambda layer: layer.pop("low_rank")), r"lacks 2 weights of experts .*experts.down_proj\)"),
    "a merged layer as whole": (
        lambda mcsmoe: mcsmoe.update(whole=[next(iter(mcsmoe["layers"]))]),
        "`mcsmoe.whole` names merged layers as unmerged",
    ),
    "an unknown layer as whole": (lambda mcsmoe: mcsmoe.update(whole=["no.such"]), "has no module 'no.such'"),
    "a number of whole layers": (lambda mcsmoe: mcsmoe.update(whole=5), "`mcsmoe.whole` must be a list .*, not 5"),
    "whole layers without names": (lambda mcsmoe: mcsmoe.update(whole=[5]), r"`mcsmoe.whole` must be .*, not \[5\]"),
    "nothing": (lambda mcsmoe: mcsmoe.clear(), "`mcsmoe.format_version` must be a whole number"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compact low rank checkpoint, with the files that travel."""
    case, folder = example("mixtral"), tmp_path_factory.mktemp("format") / "saved"
    model = decompose_experts(
        copy.deepcopy(case.merged), LoSparseConfig(rank=3, keep=0.25), batches("mixtral", case.base), prune=True
    )
    compact(model).save_pretrained(folder)
    return folder


def _changed(saved: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    shutil.copytree(saved, folder)
    config = json.loads((folder / "config.json").read_text())
    change(config["mcsmoe"])
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("case", WRONG)
def test_values_that_mean_nothing_are_refused(case: str, saved: Path, tmp_path: Path) -> None:
    change, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(_changed(saved, tmp_path / "changed", change))


def test_another_head_may_be_begun_anew(saved: Path) -> None:
    kind = AutoModelForSequenceClassification
    model, info = kind.from_pretrained(saved, num_labels=3, output_loading_info=True)
    assert info["missing_keys"] == {"score.weight"}
    assert type(kind.from_pretrained(saved, num_labels=3)) is type(model)


def test_a_head_of_another_shape_is_refused_unless_it_may_be_made_anew(saved: Path, tmp_path: Path) -> None:
    kind = AutoModelForSequenceClassification
    kind.from_pretrained(saved, num_labels=3).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"score\.weight is \[3, 32\], not \[4, 32\].*ignore_mismatched_sizes=True makes"
    ):
        kind.from_pretrained(tmp_path, num_labels=4)
    assert kind.from_pretrained(tmp_path, num_labels=4, ignore_mismatched_sizes=True).score.weight.shape == (4, 32)


def test_an_object_that_is_missing_is_refused(saved: Path, tmp_path: Path) -> None:
    folder = _changed(saved, tmp_path / "changed", lambda mcsmoe: None)
    config = json.loads((folder / "config.json").read_text())
    del config["mcsmoe"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="`mcsmoe`, which says what was merged, is missing"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("name", [5, ["mixtral"], None, "no_family"])
def test_a_family_that_is_none_is_refused(name: Any, saved: Path, tmp_path: Path) -> None:
    folder = _changed(saved, tmp_path / "changed", lambda mcsmoe: None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"base_model_type": name}))
    with pytest.raises(ValueError, match=re.escape(f"knows no model type {name!r}")):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("places", [[0, 0], [0, 99], [-1, 1]])
def test_rows_that_are_none_or_kept_twice_are_refused(places: list[int], saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "changed")
    weights = load_file(tmp_path / "changed" / "model.safetensors")
    key = next(key for key in weights if key.endswith("down_proj_rows"))
    weights[key][:2] = torch.tensor(places)
    save_file(weights, tmp_path / "changed" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"down_proj_rows names rows outside 0 to 23, or one twice"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "changed")


REFUSED_WITHOUT_PACKAGE = """
import sys
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    except ValueError as error:
        print(str(error).replace(chr(10), " "))
    else:
        print("loaded")
"""


@pytest.mark.slow
def test_the_files_that_travel_refuse_them_as_well(saved: Path, tmp_path: Path) -> None:
    folders = [_changed(saved, tmp_path / str(place), change) for place, (change, _) in enumerate(WRONG.values())]
    done = run_python(["-c", REFUSED_WITHOUT_PACKAGE, *map(str, folders)], tmp_path)
    assert done.returncode == 0, done.stderr
    for (_, message), line in zip(WRONG.values(), done.stdout.splitlines(), strict=True):
        assert re.search(message, line), line
