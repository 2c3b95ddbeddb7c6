"""Recipe files: a run written down, and done again bit for bit; what is no recipe costs one sentence."""

import hashlib
import json
from pathlib import Path

import pytest
import yaml
from families import build
from helpers import Run
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

ROWS = [f"what is {number} {other} {(number * other) % 10}" for number in range(6) for other in range(8)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipe")


@pytest.fixture
def folder(models: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    if not (models / "source").exists():
        build("mixtral").save_pretrained(models / "source" / "moe")
        tokenizer.save_pretrained(models / "source" / "moe")
        (models / "source" / "text.txt").write_text("\n".join(ROWS))
    return models


def _hash(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


OPTIONS = ["--experts", "4", "--skip", "*.0.*", "--num-samples", "40", "--max-length", "8", "--rank", "2"]


@pytest.mark.filterwarnings("ignore:The repair left", "ignore:Few calibration tokens", "ignore:keep=")
def test_a_run_is_done_again_bit_for_bit_by_its_recipe(
    folder: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder / "source"
    given = ["--data", source / "text.txt", "--output", tmp_path / "out", "--scores", tmp_path / "sums"]
    code, _, err = run("compress", source / "moe", *given, *OPTIONS, "--keep", "0.3")
    assert code == 0, err
    recipe = tmp_path / "out" / "mcsmoe_recipe.yaml"
    told = yaml.safe_load(recipe.read_text())
    assert (told["command"], told["model"], told["data"], told["repair"]) == ("compress", "moe", ["text.txt"], "refit")
    assert (told["experts"], told["skip"], told["keep"]) == (4, ["*.0.*"], 0.3)
    assert not {"output", "overwrite", "push_to_hub", "scores", "config"} & set(told)
    assert str(folder) not in recipe.read_text() + str(tmp_path)[:0]
    monkeypatch.chdir(source)  # where the names of the recipe are
    code, _, err = run("compress", "--config", recipe, "--output", tmp_path / "again")
    assert code == 0, err
    assert _hash(tmp_path / "again") == _hash(tmp_path / "out")
    assert (tmp_path / "again" / "mcsmoe_recipe.yaml").read_text() == recipe.read_text()
    # Saved again it goes along; the flags of a command line come first.
    AutoModelForCausalLM.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "mcsmoe_recipe.yaml").read_text() == recipe.read_text()
    code, _, err = run("compress", "--config", recipe, "--output", tmp_path / "other", "--seed", "5", "--keep", "0.2")
    assert code == 0, err
    changed = yaml.safe_load((tmp_path / "other" / "mcsmoe_recipe.yaml").read_text())
    assert {key for key in told if told[key] != changed[key]} == {"seed", "keep"}


def test_a_recipe_of_ones_own_may_name_all_that_a_command_needs(folder: Path, tmp_path: Path, run: Run) -> None:
    source, file = folder / "source", tmp_path / "recipe.yaml"
    file.write_text(f"model: {source / 'moe'}\nexperts: 0.5\n")
    code, out, err = run("inspect", "--config", file)
    assert code == 0, err
    assert "with --experts 0.5" in out
    code, out, err = run("inspect", "--config", file, "--experts", "2")
    assert "with --experts 2" in out
    figures = tmp_path / "figures.json"
    values = {"models": [str(source / "moe")], "data": str(source / "text.txt"), "limit": 9, "json": str(figures)}
    file.write_text(yaml.safe_dump(values))
    code, _, err = run("evaluate", "--config", file)
    assert code == 0, err
    assert list(json.loads(figures.read_text())) == [str(source / "moe")]


def test_a_flag_of_the_command_line_turns_off_what_a_recipe_turns_on(tmp_path: Path, run: Run) -> None:
    file, kept = tmp_path / "recipe.yaml", tmp_path / "demo" / "mine.txt"
    kept.parent.mkdir()
    kept.write_text("mine")
    file.write_text(f"files: {tmp_path / 'demo'}\noverwrite: true\n")
    code, _, err = run("demo", "--config", file, "--no-overwrite")
    assert code == 1
    assert "--overwrite" in err
    assert [path.name for path in kept.parent.iterdir()] == ["mine.txt"]
    code, _, err = run("demo", "--config", file)
    assert code == 0, err
    assert kept.read_text() == "mine"


WRONG = {
    "unknown": ("num_sample: 3\n", "Unknown option of compress 'num_sample'. Did you mean 'num_samples'?"),
    "no option of this command": ("kd_weight: 3\n", "Unknown option of compress 'kd_weight'"),
    "called otherwise": ("statistics: sums\n", "statistics is called scores now"),
    "the file itself": ("config: a\n", "Unknown option of compress 'config'"),
    "text": ("batch_size: eight\n", "batch_size is 'eight', and must be a whole number"),
    "truth": ("seed: true\n", "seed is True, and must be a whole number"),
    "number": ("column: 3\n", "column is 3, and must be text"),
    "one text": ("skip: a\n", "skip is 'a', and must be a list, each text"),
    "flag": ("overwrite: 'yes'\n", "overwrite is 'yes', and must be true or false"),
    "mapping": ("data: {a: 1}\n", "data is {'a': 1}, and must be"),
    "range": ("batch_size: 0\n", "batch_size is 0"),
    "seed": ("seed: 4294967296\n", "seed is 4294967296: "),
    "none of a list": ("data: []\n", "data is []: name at least one"),
    "not whole": ("experts: [1]\n", "experts is [1]"),
    "twice": ("seed: 1\nseed: 2\n", "'seed' is given twice"),
    "damaged": ("seed: [1\n", "is no YAML"),
    "tabs": ("\tseed: 1\n", "is no YAML"),
    "python": ("seed: !!python/object/apply:os.getcwd []\n", "is no YAML"),
    "deep": ("[" * 1500, "is no YAML"),
    "list": ("- a\n- b\n", "is no recipe"),
    "empty": ("", "is no recipe"),
    "sentence": ("hello\n", "is no recipe"),
    "other format": ("format: mcsmoe-plan\n", "its format is 'mcsmoe-plan'"),
    "later version": ("format_version: 2\n", "format_version is 2, and this version reads 1"),
    "version as text": ("format_version: '1'\n", "format_version is '1'"),
    "another command": ("command: distill\n", "is a recipe for hf-mcsmoe distill, and this is hf-mcsmoe compress"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_recipe_is_refused_in_one_sentence(case: str, tmp_path: Path, run: Run) -> None:
    text, message = WRONG[case]
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    options = ["--data", tmp_path / "none.txt", "--output", tmp_path / "out"]
    code, out, err = run("compress", tmp_path / "none", "--config", file, *options)
    assert (code, out) == (1, "")
    assert message in err
    assert str(file) in err
    assert err.count("Error:") == 1
    assert "Traceback" not in err


def test_files_that_cannot_be_read_are_told(tmp_path: Path, run: Run) -> None:
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    for file, message in (
        (tmp_path / "none", "No such file"),
        (tmp_path, "Is a directory"),
        (tmp_path / "binary", "no"),
    ):
        code, _, err = run("inspect", tmp_path / "model", "--config", file)
        assert code == 1
        assert f"--config {file} " in err
        assert message in err
