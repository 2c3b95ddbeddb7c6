"""Imports go down the floors of the house, and what travels with a checkpoint depends on nothing of the package."""

import sys
from pathlib import Path

import pytest
from house import FILES, FLOOR, FLOORS, PAGE, ROOT, imported, page, room, rooms_below

TESTS = Path(__file__).parent
# What the numeric core may import besides itself and the standard library.
NUMERIC = {"torch", "scipy", "lap"}
# What a file that travels finds wherever Transformers is.
TRAVELS_WITH = {"torch", "transformers", "huggingface_hub"}


def test_the_picture_shows_the_house_as_it_is() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "write it with: python tests/house.py > docs/structure.md"


def test_every_room_stands_on_one_floor() -> None:
    assert sorted(FLOOR) == sorted({room(path) for path in FILES})
    assert sum(map(len, FLOORS)) == len(FLOOR)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_from_floors_below_alone(path: Path) -> None:
    upward = {other for other in rooms_below(path) if FLOOR[other] >= FLOOR[room(path)]}
    assert not upward


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_imported_from_the_public_front(path: Path) -> None:
    assert "hf_mcsmoe" not in imported(path)


@pytest.mark.parametrize("folder", sorted({path.parent for path in FILES} - {ROOT}), ids=lambda path: path.name)
def test_there_is_no_cycle_within_a_room(folder: Path) -> None:
    name = f"hf_mcsmoe.{folder.name}."
    files = {path.stem: path for path in folder.glob("*.py") if path.stem != "__init__"}
    needs = {
        stem: {m.removeprefix(name) for m in imported(path) if m.startswith(name)} for stem, path in files.items()
    }
    while needs:
        free = {stem for stem, others in needs.items() if not (others - {stem}) & needs.keys()}
        assert free, f"a cycle among {sorted(needs)}"
        needs = {stem: others for stem, others in needs.items() if stem not in free}


@pytest.mark.parametrize("path", sorted(ROOT.glob("modeling/*_mcsmoe.py")), ids=lambda path: path.name)
def test_what_travels_imports_nothing_of_the_package(path: Path) -> None:
    names = {name.split(".")[0] for name in imported(path)}
    assert "hf_mcsmoe" not in names
    known = names & TRAVELS_WITH
    standard = {name for name in names if name in sys.stdlib_module_names}
    assert names == known | standard


@pytest.mark.parametrize("path", sorted(ROOT.glob("variants/*_mcsmoe.py")), ids=lambda path: path.name)
def test_a_variant_that_travels_imports_what_travels_with_it(path: Path) -> None:
    own = {name for name in imported(path) if name.startswith("hf_mcsmoe")}
    assert all(name.split(".")[1] in ("modeling", "variants") and name.endswith("_mcsmoe") for name in own)
    others = {name.split(".")[0] for name in imported(path) - own}
    assert all(name in TRAVELS_WITH or name in sys.stdlib_module_names for name in others)


def test_nothing_else_knows_of_the_variants() -> None:
    assert not [path for path in FILES if "variants" in rooms_below(path)]


@pytest.mark.parametrize("path", sorted(ROOT.glob("methods/*.py")), ids=lambda path: path.name)
def test_the_numeric_core_imports_tensors_alone(path: Path) -> None:
    names = {name.split(".")[0] for name in imported(path)} - {"hf_mcsmoe"}
    assert all(name in NUMERIC or name in sys.stdlib_module_names for name in names)


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: str(path.relative_to(TESTS)))
def test_no_file_imports_from_a_test_file_or_a_conftest(path: Path) -> None:
    files = {name.rpartition(".")[2] for name in imported(path)}
    assert not {name for name in files if name.startswith("test_") or name == "conftest"}


def test_no_two_test_files_have_one_name() -> None:
    names = sorted(path.name for path in TESTS.rglob("test_*.py"))
    assert names == sorted(set(names)), "the second would not be collected"
