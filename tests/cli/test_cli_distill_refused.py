"""What `hf-mcsmoe distill` refuses: one sentence each, before weights are loaded, and nothing is left behind."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
from commands import command, write_models
from families import build
from helpers import Run
from merged import example
from merged import tokenizer as word_tokenizer

from hf_mcsmoe import LoSparseConfig, QuantizationConfig, compact, decompose_experts, quantize_experts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_models(tmp_path_factory.mktemp("distill"))
    _quantized(path)
    return path


def _decomposed(folder: Path) -> Path:
    if not (folder / "compact").exists():
        model = decompose_experts(
            copy.deepcopy(example("mixtral").merged), LoSparseConfig(rank=2, factorisation="svd")
        )
        with pytest.warns(UserWarning, match="pruned by magnitude"):
            compact(model).save_pretrained(folder / "compact")
        word_tokenizer().save_pretrained(folder / "compact")
    return folder / "compact"


def _larger(folder: Path) -> Path:
    if not (folder / "larger").exists():
        model = build("mixtral")
        model.resize_token_embeddings(140)
        model.save_pretrained(folder / "larger")
    return folder / "larger"


def _reordered(folder: Path) -> Path:
    if not (folder / "reordered").exists():
        shutil.copytree(folder / "mixtral", folder / "reordered")
        text = (folder / "reordered" / "tokenizer.json").read_text()
        (folder / "reordered" / "tokenizer.json").write_text(text.replace('"w7"', '"seven"'))
    return folder / "reordered"


# What a later option says holds, so these go behind a request that is right.
WRONG: dict[str, tuple[list[str], str]] = {
    "teacher": (["--teacher", "./missing"], "is no folder with a model"),
    "another kind": (["--teacher", "{switch}"], "must be the original model of the student"),
    "vocabulary": (["--teacher", "{larger}"], "has 140 tokens in its vocabulary"),
    "tokenizers": (["--teacher", "{reordered}"], "has another tokenizer"),
    "parts": (["--train-parts", "expert"], "Did you mean 'experts'?"),
    "temperature": (["--kd-temperature", "0"], "must be positive"),
    "no data": (["--data", "missing.txt"], "no file missing.txt"),
    "a teacher's dtype": (["--teacher-dtype", "int8"], "--teacher-dtype 'int8' is no floating-point dtype"),
    "a teacher's device": (["--teacher-device-map", "gpu"], "--teacher-device-map 'gpu' is no device of torch"),
    "both": (["--task", "copa"], "either --task or --data"),
    "lengths": (["--epochs", "2"], "give one"),
    "no training": (["--warmup-steps", "4"], "all of the 4 steps"),
    "rank": (["--rank", "1000"], "larger than W_in of"),
    "rank that saves nothing": (["--rank", "8", "--keep", "0.9"], "larger than it is"),
    "keep": (["--rank", "2", "--keep", "1.5"], "share in [0, 1]"),
    "keep of nothing": (["--keep", "0.5"], "--keep 0.5 would do nothing to"),
    "importance of nothing": (["--importance", "nonsense"], "--importance nonsense would do nothing to"),
    "factors of nothing": (["--factorisation", "nonsense"], "give --rank as well"),
    "schedule of nothing": (["--start", "0.99", "--end", "0.9"], "--start 0.99 and --end 0.9 would do nothing to"),
    "infinite rate": (["--learning-rate", "nan"], "give a finite one"),
    "importance": (["--rank", "2", "--importance", "size"], "Unknown importance"),
    "schedule": (["--rank", "2", "--start", "0.5", "--end", "0.5"], "none of the 4 steps"),
    "adapters and pruning": (["--rank", "2", "--train-parts", "lora"], "leaves S frozen"),
    "routers and pruning": (["--rank", "2", "--train-parts", "routers"], "leaves S frozen"),
    "no rate": (["--learning-rate", "0"], "must be more than 0"),
    "factorisation": (["--rank", "2", "--factorisation", "svt"], "Did you mean 'svd'?"),
    "dtype": (["--dtype", "float7"], "no floating-point dtype"),
    "a file": (["--output", "{text}"], "is a file"),
    "not empty": (["--output", "{switch}"], "pass --overwrite"),
    "the teacher": (["--output", "{mixtral}", "--overwrite"], "is the folder of the teacher"),
}
STUDENTS = {
    "dense": ("{mixtral}", [], "is not compressed"),
    "in few bits": ("{quantized}", [], "train adapters beside them with train_parts='lora'"),
    "experts in few bits": ("{quantized}", ["--train-parts", "experts"], "quantize last"),
    "missing": ("./missing", [], "is no folder with a model"),
    "compact": ("{compact}", ["--rank", "2"], "is decomposed already"),
    "compact, pruned": ("{compact}", ["--importance", "magnitude"], "--importance magnitude would do nothing to"),
}


def check_refused(case: list[Any], message: str, folder: Path, tmp_path: Path, run: Run) -> None:
    places = {"mixtral": folder / "mixtral", "switch": folder / "switch_transformers", "text": folder / "text.txt"}
    made = {"compact": _decomposed, "quantized": _quantized, "larger": _larger, "reordered": _reordered}
    used = {name: make(folder) for name, make in made.items() if any(f"{{{name}}}" in str(item) for item in case)}
    code, _, err = run(*(str(item).format(**places, **used) for item in case))
    assert code == 1
    assert message in err
    assert err.startswith("Error: ")
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def _quantized(folder: Path) -> Path:
    if not (folder / "quantized").exists():
        model = quantize_experts(copy.deepcopy(example("mixtral").merged), config=QuantizationConfig(bits=8))
        model.save_pretrained(folder / "quantized")
        word_tokenizer().save_pretrained(folder / "quantized")
    return folder / "quantized"


@pytest.fixture(autouse=True)
def weights_stay_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hf_mcsmoe.cli.distill.load_model", lambda *_, **__: pytest.fail("weights were loaded"))


@pytest.mark.parametrize("case", WRONG)
def test_wrong_requests_are_one_sentence_before_weights_are_loaded(
    case: str, folder: Path, tmp_path: Path, run: Run
) -> None:
    more, message = WRONG[case]
    check_refused([*command(folder, tmp_path / "out"), *more], message, folder, tmp_path, run)


@pytest.mark.parametrize("case", STUDENTS)
def test_wrong_students(case: str, folder: Path, tmp_path: Path, run: Run) -> None:
    student, more, message = STUDENTS[case]
    arguments = [*command(folder, tmp_path / "out"), *more]
    arguments[1] = student
    check_refused(arguments, message, folder, tmp_path, run)
