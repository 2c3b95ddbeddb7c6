"""A size on the command line: what is refused before weights are loaded, and what a run for a size tells."""

import json
from pathlib import Path

import pytest
import yaml
from families import build
from helpers import Run, batches
from transformers import PreTrainedTokenizerFast

from hf_mcsmoe import collect_statistics
from hf_mcsmoe.calibration.statistics import RoutingStatistics

ROWS = [f"what is {number} {other} {(number * other) % 10}" for number in range(6) for other in range(8)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sizes")


@pytest.fixture
def source(models: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    path = models / "moe"
    if not path.exists():
        build("mixtral").save_pretrained(path)
        tokenizer.save_pretrained(path)
        (models / "text.txt").write_text("\n".join(ROWS))
    return path


BITS = "none of the bits that weights are stored in, 8, 4, 3, 2"
WRONG: dict[str, tuple[list[str], str]] = {
    "nothing": (["--size", "0"], "size='0' is no share between 0 and 1"),
    "negative": (["--size=-1GB"], "size='-1GB' is no size: give bytes, as 20GB"),
    "apples": (["--size", "5 apples"], "is in no known unit"),
    "an exponent": (["--size", "1e30"], "size='1e30' is no size"),
    "all of it": (["--size", "1.0"], "is no share between 0 and 1"),
    "binary": (["--size", "20GiB"], "write 21.47GB"),
    "per cent": (["--size", "40%"], "write 0.4"),
    "larger than the source": (["--size", "20GB"], "nothing is to be done"),
    "below the smallest": (["--size", "0.001"], "the smallest that can be reached is"),
    "below the smallest of these bits": (["--size", "0.3", "--bits", "8", "--min-experts", "8"], "the smallest that"),
    "five bits": (["--bits", "5"], f"--bits 5: 5 is {BITS}"),
    "one of several": (["--bits", "4,5"], f"--bits 4,5: 5 is {BITS}"),
    "a comma": (["--bits", "4,"], f"nothing is {BITS}"),
    "five bits by hand": (["--bits", "5", "--experts", "1.0"], f"--bits 5: 5 is {BITS}"),
    "groups": (["--bits", "4", "--experts", "1.0", "--group-size", "7"], "divide"),
    "size and experts": (["--size", "0.5", "--experts", "4"], "--size says how large, and --experts how many"),
    "size and rank": (["--size", "0.5", "--rank", "99"], "rank=99 makes the experts of"),
    "rank alone": (["--rank", "99"], "ask for another rank"),
    "share of S": (["--size", "0.5", "--rank", "1", "--keep", "0.2"], "--keep 0.2 is a share of S"),
    "several bits by hand": (["--experts", "4", "--bits", "4,8"], "--bits 4,8 are what --size may choose from"),
    "groups of nothing": (["--experts", "4", "--group-size", "32"], "give --bits as well"),
    "automatic by hand": (["--experts", "4", "--reduce", "auto"], "reduce='auto' is for the measured effect to say"),
    "reduction": (["--reduce", "both"], "--reduce 'both' must be one of auto, merge, prune"),
    "uniform by hand": (["--experts", "4", "--uniform-experts"], "give --budget uniform"),
    "too many experts": (["--min-experts", "9"], "min_experts=9"),
    "pattern": (["--skip", "encoder.*"], "matches no layer"),
    "all skipped": (["--skip", "*"], "leaves no layer"),
    "as it is in a smaller dtype": (["--size", "0.9", "--dtype", "bfloat16"], "nothing is to be done but to save it"),
    "no dtype": (["--dtype", "int4"], "--dtype 'int4' is no floating-point dtype"),
    "trained repair": (["--repair", "local"], "'local' is none that is solved at once"),
    "unreadable scores": (["--scores", "{text}"], "is damaged or no safetensors file"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_size_is_refused_before_weights_are_loaded(
    case: str, source: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, message = WRONG[case]
    text = source.parent / "text.txt"
    monkeypatch.setattr("hf_mcsmoe.cli.compress.load_model", lambda *a, **k: pytest.fail("weights were loaded"))
    given = ["--data", text, "--output", tmp_path / "out", *(option.format(text=text) for option in options)]
    code, _, err = run("compress", source, *given)
    assert code == 1, err
    assert message in err
    assert err.count("Error:") == 1
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_scores_without_a_sum_that_pruning_needs_are_refused(source: Path, tmp_path: Path, run: Run) -> None:
    file = tmp_path / "scores.safetensors"
    collect_statistics(build("mixtral"), batches("mixtral", build("mixtral"))).save(file)
    given = ["--data", source.parent / "text.txt", "--output", tmp_path / "out", "--scores", file]
    code, _, err = run("compress", source, *given)
    assert code == 1
    assert "'contribution' was not collected" in err
    assert "hf-mcsmoe calibrate MODEL --data ... --methods contribution" in err


@pytest.mark.slow
def test_a_rank_beside_a_size_is_the_rank_of_all_layers(source: Path, tmp_path: Path, run: Run) -> None:
    given = [
        "--data",
        source.parent / "text.txt",
        "--group-size",
        "4",
        "--size",
        "0.6",
        "--rank",
        "1",
        "--bits",
        "8,4",
    ]
    code, _, err = run("compress", source, *given, "--output", tmp_path / "out")
    assert code == 0, err
    record = json.loads((tmp_path / "out" / "mcsmoe_record.json").read_text())
    assert {rank for item in record["layers"].values() for rank in item["rank"].values()} == {1}


@pytest.mark.slow
def test_what_was_measured_for_one_size_is_read_for_another(
    source: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "scores.safetensors"
    given = ["--data", source.parent / "text.txt", "--scores", file, "--group-size", "8", "--output"]
    code, _, err = run("compress", source, *given, tmp_path / "one", "--size", "0.6")
    assert code == 0, err
    curves = RoutingStatistics.load(file).curves
    assert curves
    monkeypatch.setattr("hf_mcsmoe.search.compress.measure_curves", lambda *a, **k: pytest.fail("measured anew"))
    code, _, err = run("compress", source, *given, tmp_path / "other", "--size", "0.5", "--repair", "none")
    assert code == 1
    assert "repair's method 'joint', not 'none': ask for the same again, or have it measured anew" in err
    code, _, err = run("compress", source, *given, tmp_path / "other", "--size", "0.5")
    assert code == 0, err
    assert RoutingStatistics.load(file).curves == curves


RECIPES = {
    "bytes": ({"size": "20GB"}, "nothing is to be done"),
    "share": ({"size": 0.001}, "the smallest that can be reached is"),
    "bits": ({"bits": 5}, "--bits 5"),
    "both": ({"size": 0.5, "experts": 4}, "give one of them"),
}


@pytest.mark.parametrize("case", RECIPES)
def test_a_recipe_names_a_size_as_the_command_line_does(case: str, source: Path, tmp_path: Path, run: Run) -> None:
    options, message = RECIPES[case]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(options))
    given = ["--data", source.parent / "text.txt", "--output", tmp_path / "out"]
    code, _, err = run("compress", source, *given, "--config", tmp_path / "recipe.yaml")
    assert code == 1
    assert message in err
