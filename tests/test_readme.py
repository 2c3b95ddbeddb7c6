"""What the README shows is what happens."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from merged import run_python

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """Return the fenced blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


# Block 3 uses up the model that block 4 needs, and block 5's rows are the reader's own.
KEPT = "import copy\nwhole = copy.deepcopy(model)\n"
ROWS = """
from hf_mcsmoe.demo import demo_examples
from hf_mcsmoe.data.features import pair_features

pairs = [(f"<{item.task}>{item.source}", item.target) for item in demo_examples("calibration")[:16]]
dataset = pair_features(pairs, tokenizer, 32, 32)
sizes = [one.num_parameters() for one in (model, small, tiny)]
"""
SIZES = "print(*sizes, load_model('switch-tiny').num_parameters())\n"
AFTER = "print(small.num_parameters() < model.num_parameters(), small is model)\nmodel = whole\n"
END = "end of a block"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readme")


@pytest.fixture(scope="module")
def printed(folder: Path) -> list[str]:
    """Run the blocks in order in one process; returns what each of them prints."""
    first, _, third, repair, distillation = blocks("python")[:5]
    short = distillation.replace("max_steps=1000", 'max_steps=2, use_cpu=True, report_to="none"')
    assert short != distillation
    code = [first, KEPT + third + AFTER, repair, ROWS + short + SIZES]
    done = run_python(["-W", "ignore", "-c", f"\nprint('{END}')\n".join(code)], folder, package=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split(f"{END}\n")


def test_the_example_prints_what_it_says_and_loads(folder: Path, printed: list[str]) -> None:
    second, said = blocks("python")[1], blocks("text")[1]
    assert printed[0] == said
    parameters = said.split(" -> ")[1].split()[0].replace(",", "")
    done = run_python(["-c", second + "\nprint(loaded.num_parameters())"], folder)
    assert done.stdout.strip() == parameters, done.stderr


def test_the_steps_one_by_one_run(folder: Path, printed: list[str]) -> None:
    assert printed[1].splitlines()[-1] == "False True"
    assert (folder / "plan.json").is_file()


def test_repair_storage_and_distillation_run(printed: list[str]) -> None:
    model, small, tiny, distilled = map(int, printed[3].splitlines()[-1].split())
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
