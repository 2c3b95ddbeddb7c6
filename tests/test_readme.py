"""What the README shows is what happens: its Python in one process, its commands as typed, the files that it names."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import Run
from merged import tokenizer
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAME = "Qwen/Qwen3-30B-A3B"


def blocks(language: str) -> list[str]:
    """Return the fenced blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a small causal model with a tokenizer, as `model`, and text in the two forms that the README names."""
    path = tmp_path_factory.mktemp("readme")
    config = Qwen3MoeConfig(
        vocab_size=128, hidden_size=64, moe_intermediate_size=64, intermediate_size=64, num_hidden_layers=2
    )
    config.update({"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16})
    config.update({"num_experts": 8, "num_experts_per_tok": 2})
    Qwen3MoeForCausalLM(config).save_pretrained(path / "model")
    tokenizer().save_pretrained(path / "model")
    lines = [" ".join(f"w{3 + (7 * row + step * step) % 120}" for step in range(40)) for row in range(24)]
    (path / "calibration.txt").write_text("\n".join(lines) + "\n")
    (path / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


def test_its_python_runs_in_order_in_one_process(folder: Path) -> None:
    code = "".join(blocks("python"))
    for old, new in {f'"{NAME}"': '"model"', "max_steps=1000": 'max_steps=2, use_cpu=True, report_to="none"'}.items():
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    code += """
from hf_mcsmoe.layers.loading import load_model
print(*(one.num_parameters() for one in (model, loaded, merged, load_model("qwen3-tiny"))))
"""
    command = [sys.executable, "-W", "ignore", "-c", code]
    out = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    model, loaded, merged, tiny = map(int, out.stdout.splitlines()[-1].split())
    assert tiny < merged < loaded < model
    assert f"{model:,} -> {loaded:,} parameters" in out.stdout
    assert json.loads((folder / "plan.json").read_text())["format"] == "mcsmoe-plan"


def test_its_commands_run_as_typed(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("hf-mcsmoe")]
    assert [shlex.split(line, comments=True)[1] for line in lines] == [
        *("inspect", "plan", "compress", "compress", "compress", "calibrate"),
        *("compare", "distill", "evaluate", "report"),
    ]
    for number, line in enumerate(lines):
        words = {"MODEL": "model", "DIR": f"out{min(number, 3)}", "DISTILLED": "distilled"}
        words |= {"PLAIN": "plain", "sst2": "text.jsonl"}
        # A rank and a size that experts like these have; text instead of a task's rows.
        more = {"32": "16", "20GB": "0.6", "--task": "--data"}
        arguments = [(words | more).get(word, word) for word in shlex.split(line, comments=True)[1:]]
        arguments += {"distill": ["--max-steps", "2", "--max-length", "32"]}.get(arguments[0], [])
        code, out, error = run(*arguments)
        assert code == 0, (line, error)
        told = {"report": "report.html", "plan": "predicted KL", "calibrate": "scores.safetensors", "compare": "msmoe"}
        assert told.get(arguments[0], "parameters") in out, line


@pytest.mark.parametrize("given", ["argument", "environment"])
def test_make_installs_the_build_of_torch_that_one_asks_for(given: str, tmp_path: Path) -> None:
    wanted = "torch==2.13.0 --index-url https://example.org/cpu"
    command = ["make", "--dry-run", "--always-make", f"VENV={tmp_path}", f"{tmp_path}/.ready"]
    command += [f"TORCH={wanted}"] if given == "argument" else []
    options = {"env": {**os.environ, "TORCH": wanted}, "cwd": ROOT, "capture_output": True, "text": True}
    assert f"pip install --quiet {wanted}\n" in subprocess.run(command, check=True, **options).stdout


def test_it_is_short() -> None:
    assert (ROOT / "README.md").stat().st_size < 9000


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_and_files_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"`make ([a-z]+)", text):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
    for path in re.findall(r"(?:examples|tests|hf_mcsmoe|docs)/[a-z_/0-9]+\.(?:py|md)", text):
        assert (ROOT / path).is_file(), path
    for link in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (page.parent / link).exists(), link


MERGES_BY_THEM = """
import torch
from families import build
from helpers import batches
from hf_mcsmoe import MergeConfig, collect_statistics, plan_merge

model = build("mixtral")
config = MergeConfig(experts=0.5, similarity="usage", saliency="input_energy")
statistics = collect_statistics(model, batches("mixtral", model), needs=config.needs)
counts = [sums.counts for sums in statistics.layers.values()]
energies = [sums["input_energy"] for sums in statistics.layers.values()]
for count, energy in zip(counts, energies, strict=True):
    assert torch.equal(energy > 0, count > 0)
print(plan_merge(model, statistics, config).config)
"""


@pytest.mark.slow
def test_the_methods_that_the_page_on_extending_shows_work_as_they_are() -> None:
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    code = "".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)) + MERGES_BY_THEM
    command = [sys.executable, "-W", "ignore", "-c", code]
    out = subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert "'usage'" in out.stdout
    assert "'input_energy'" in out.stdout
