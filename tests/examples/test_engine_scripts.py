"""The scripts that run a plain checkpoint in an engine, where the engine is installed."""

import importlib.util
import json
import os
import socket
from pathlib import Path

import pytest
from scripts import run
from transformers.utils.import_utils import is_serve_available

from hf_mcsmoe import MergeConfig, compress
from hf_mcsmoe.layers.loading import load_model, load_tokenizer

MODEL = Path(__file__).parents[3] / "shared" / "data" / "models" / "qwen3moe-mini-16e"
# Where llama.cpp's source lies, which has the converter.
LLAMA_CPP = os.environ.get("LLAMA_CPP_SOURCE", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MODEL.is_dir(), reason="needs the trained models of ../shared/data/models"),
]


def lacking(module: str) -> bool:
    """Whether a module cannot be imported."""
    return importlib.util.find_spec(module) is None


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half of a trained model's experts, as a checkpoint of its family."""
    folder = tmp_path_factory.mktemp("plain")
    model, tokenizer = load_model(str(MODEL)), load_tokenizer(str(MODEL))
    lines = (MODEL / "validation.txt").read_text().splitlines()[:8]
    batches = [tokenizer(line, return_tensors="pt", truncation=True, max_length=64) for line in lines if line]
    config = MergeConfig(experts=0.5, budget="uniform", reduce="prune", saliency="frequency")
    compress(model, batches, config).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    assert json.loads((folder / "config.json").read_text())["model_type"] == "qwen3_moe"
    return folder


@pytest.mark.skipif(lacking("mlx_lm"), reason="needs mlx-lm")
def test_mlx_says_the_same(plain: Path) -> None:
    result = run("serving/with_mlx.py", plain, "--tokens", "8")
    assert result.stdout == "mlx: the same 8 greedy tokens\n", result.stderr


@pytest.mark.skipif(lacking("llama_cpp") or not LLAMA_CPP, reason="needs llama-cpp-python, and LLAMA_CPP_SOURCE")
def test_llama_cpp_says_the_same(plain: Path, tmp_path: Path) -> None:
    options = ["--converter", LLAMA_CPP, "--pre", "gpt-2", "--types", "f16", "--output", tmp_path, "--tokens", "8"]
    result = run("serving/with_llama_cpp.py", plain, *options)
    assert "prompt split alike, the same 8 greedy tokens" in result.stdout, result.stderr


@pytest.mark.skipif(not is_serve_available(), reason="needs transformers[serving]")
def test_transformers_serves_it(plain: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    prompt = "Once upon a time there was a little girl who"
    options = ["--prompt", prompt, "--tokens", "8", "--port", str(port)]
    result = run("serving/with_transformers_serve.py", plain, *options)
    tokenizer, model = load_tokenizer(str(plain)), load_model(str(plain))
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    expected = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    answer = tokenizer.decode(expected, skip_special_tokens=True).strip()
    assert result.stdout.strip().endswith(answer), result.stderr


def test_a_model_with_code_of_its_own_is_to_be_exported(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mcsmoe", "auto_map": {}}))
    result = run("serving/with_transformers_serve.py", tmp_path)
    assert result.returncode == 1
    assert f"hf-mcsmoe export {tmp_path} --output PLAIN" in result.stderr
