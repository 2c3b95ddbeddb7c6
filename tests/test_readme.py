"""What the README shows is what happens."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """Return the fenced blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def run(code: str, folder: Path) -> str:
    """Return what a piece of Python prints."""
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


def test_the_example_prints_what_it_says_and_loads(tmp_path: Path) -> None:
    first, second = blocks("python")[:2]
    _, printed = blocks("text")[:2]
    assert run(first, tmp_path) == printed
    parameters = printed.split(" -> ")[1].split()[0].replace(",", "")
    assert run(second + "\nprint(loaded.num_parameters())", tmp_path).strip() == parameters


def test_the_steps_one_by_one_run(tmp_path: Path) -> None:
    first, _, third = blocks("python")[:3]
    out = run(first + third + "\nprint(small.num_parameters() < model.num_parameters(), small is model)", tmp_path)
    assert out.splitlines()[-1] == "False True"
    assert (tmp_path / "plan.json").is_file()


ROWS = """
from hf_mcsmoe.demo import demo_examples
from hf_mcsmoe.data.features import pair_features

pairs = [(item.source, item.targets[0]) for item in demo_examples("calibration")[:16]]
dataset = pair_features(pairs, tokenizer, 32, 32)
sizes = [one.num_parameters() for one in (model, small, tiny)]
"""


def test_repair_storage_and_distillation_run(tmp_path: Path) -> None:
    first, _, _, repair, distillation = blocks("python")[:5]
    short = distillation.replace("max_steps=1000", 'max_steps=2, use_cpu=True, report_to="none"')
    assert short != distillation
    sizes = "print(*sizes, load_model('switch-tiny').num_parameters())"
    out = run("\n".join([first, repair, ROWS, short, sizes]), tmp_path)
    model, small, tiny, distilled = map(int, out.splitlines()[-1].split())
    assert max(tiny, distilled) < small < model


@pytest.mark.parametrize("given", ["argument", "environment"])
def test_make_installs_the_build_of_torch_that_one_asks_for(given: str, tmp_path: Path) -> None:
    wanted = "torch==2.13.0 --index-url https://example.org/cpu"
    command = ["make", "--dry-run", "--always-make", f"VENV={tmp_path}", f"{tmp_path}/.ready"]
    command += [f"TORCH={wanted}"] if given == "argument" else []
    options = {"env": {**os.environ, "TORCH": wanted}, "cwd": ROOT, "capture_output": True, "text": True}
    assert f"pip install --quiet {wanted}\n" in subprocess.run(command, check=True, **options).stdout


def test_commands_and_files_that_it_names_exist() -> None:
    for target in re.findall(r"`?make ([a-z]+)", README):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
    for path in re.findall(r"(?:examples|tests)/[a-z_/0-9]+\.py", README):
        assert (ROOT / path).is_file(), path
