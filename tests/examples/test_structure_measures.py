"""The measures of a package's structure, on one that is written for it."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "benchmarks"))
import structure

FILES = {
    "__init__.py": "from pack.top import run\n",
    "low/__init__.py": "",
    "low/first.py": "def small(a, *, b):\n    '''Say.'''\n    return a\n",
    "low/second.py": "from . import first\nfrom .first import small\n",
    "middle.py": "from .low.first import small\n\ndef two(self, a):\n    a = getattr(a, 'x')\n    return a\n",
    "layers.py": "from pack import middle\n\nfound = hasattr(middle, 'two')\n",
    "top.py": "def run():\n    import pack.layers\n    from pack.low import second\n",
    "data_mcsmoe.py": "x = 1\n",
}


@pytest.fixture
def package(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / "pack" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "pack"


def test_the_measures_are_those_counted_by_hand(package: Path) -> None:
    found = structure.measures(package)
    assert (found["rooms"], found["floors (longest chain of imports)"]) == ("5", "4")
    assert found["arrows (imports between rooms)"] == "4"
    assert found["rooms that import each other in a circle"] == "none"
    assert found["lines of a body: median/mean/p90/max"] == "2/2/2/2"
    assert found["longest parameter list"] == "2 (low: small)"
    assert found["getattr and hasattr"] == "2, 1 outside layers and modeling"
    assert found["lines that travel with a checkpoint"] == "1 in 1 files"


def test_circles_are_named(package: Path) -> None:
    (package / "low" / "first.py").write_text("import pack.layers\n")
    found = structure.measures(package)
    assert found["rooms that import each other in a circle"] == "layers, low, middle"


def test_a_folder_without_python_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no Python"):
        structure.measures(tmp_path)
