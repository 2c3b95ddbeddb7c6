"""Imports go downward through five levels, and what travels with a checkpoint depends on nothing of the package."""

import ast
from pathlib import Path

import pytest

import hf_mcsmoe

ROOT = Path(hf_mcsmoe.__file__).parent
LEVELS = [
    "modeling registry experts low_rank",
    "adapters choices denoising data loading offloading tasks",
    "statistics saliency similarity grouping alignment merging decomposition refit losses metrics",
    "config calibration plan model_card compress activations layer_outputs layer_repair repair ranks decompose "
    "refinement distillation importance sparsification evaluation accounting task_data",
    "demo cli",
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names.split()}
FILES = [path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py"]


def imports(path: Path) -> set[str]:
    """Return the parts of the package that a file imports absolutely."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    return {node.module.split(".")[1] for node in nodes if (node.module or "").startswith("hf_mcsmoe.")}


def part(path: Path) -> str:
    """Return the file or folder of the package that a path belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_its_own_level_or_below(path: Path) -> None:
    assert all(LEVEL[other] <= LEVEL[part(path)] for other in imports(path))


def test_there_is_no_cycle() -> None:
    needs: dict[str, set[str]] = {name: set() for name in LEVEL}
    for path in FILES:
        needs[part(path)] |= imports(path) - {part(path)}
    while needs:
        free = {name for name, others in needs.items() if not others & needs.keys()}
        assert free, f"a cycle among {sorted(needs)}"
        needs = {name: others for name, others in needs.items() if name not in free}


@pytest.mark.parametrize("path", sorted(ROOT.glob("modeling/*_mcsmoe.py")), ids=lambda path: path.name)
def test_what_travels_imports_nothing_of_the_package(path: Path) -> None:
    assert "hf_mcsmoe" not in path.read_text().replace("Upgrade hf_mcsmoe", "")


@pytest.mark.parametrize("level", [2])
def test_the_numeric_core_imports_no_model_code(level: int) -> None:
    for name in LEVELS[level].split():
        nodes = [node for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())) if hasattr(node, "module")]
        assert not any((node.module or "").startswith(("transformers", "accelerate")) for node in nodes), name
