"""The archive of the sources and the wheel are complete: tests run from the one, the demo from the other."""

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from house import ROOT as PACKAGE
from merged import run_python

ROOT = Path(__file__).parents[1]
# What need not be in the archive: what a checkout holds for itself, and what tools leave behind.
ASIDE = re.compile(
    r"(^|/)(\.git|\.github|\.ci|\.venv|\.\w+_cache|__pycache__|build|dist|.*\.egg-info|\.gitignore)(/|$)"
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build both, the wheel from the unpacked archive as an installer would."""
    path = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    with tarfile.open(next(path.glob("*.tar.gz"))) as archive:
        archive.extractall(path / "sources", filter="data")
    with zipfile.ZipFile(next(path.glob("*.whl"))) as archive:
        archive.extractall(path / "wheel")
    return path


def _files(folder: Path) -> set[str]:
    names = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return {name for name in names if not ASIDE.search(name)}


def _sources(built: Path) -> Path:
    return next((built / "sources").iterdir())


def test_the_archive_holds_what_a_checkout_holds(built: Path) -> None:
    assert _files(ROOT) - _files(_sources(built)) == set()
    assert _files(_sources(built)) - _files(ROOT) == {"PKG-INFO", "setup.cfg"}


def test_the_wheel_holds_the_package_alone(built: Path) -> None:
    wheel = built / "wheel"
    assert _files(wheel / "hf_mcsmoe") == _files(PACKAGE)
    (information,) = (path for path in wheel.iterdir() if path.name != "hf_mcsmoe")
    assert information.suffix == ".dist-info"
    assert "hf-mcsmoe = hf_mcsmoe.cli:main" in (information / "entry_points.txt").read_text()
    metadata = (information / "METADATA").read_text(encoding="utf-8")
    assert "Project-URL: Paper, https://arxiv.org/abs/2310.01334" in metadata
    assert "License-Expression: Apache-2.0" in metadata


def test_tests_run_from_the_archive(built: Path) -> None:
    sources = _sources(built)
    script = f"import hf_mcsmoe; assert hf_mcsmoe.__file__.startswith({str(sources)!r}), hf_mcsmoe.__file__"
    done = run_python(["-c", script], sources, package=True, PYTHONPATH=str(sources))
    assert done.returncode == 0, done.stderr
    tests = ["tests/methods", "tests/test_record.py", "tests/test_structure.py", "tests/test_project.py"]
    command = ["-m", "pytest", "-p", "no:cacheprovider", *tests]
    done = run_python(command, sources, package=True, PYTHONPATH=str(sources))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def test_the_demo_runs_from_the_wheel_alone(built: Path, tmp_path: Path) -> None:
    wheel = str(built / "wheel")
    script = f"import sys, hf_mcsmoe.cli as cli; assert cli.__file__.startswith({wheel!r}); cli.main()"
    done = run_python(
        ["-c", script, "demo", "--output", "small"], tmp_path, package=True, PYTHONPATH=wheel, COLUMNS="120"
    )
    assert done.returncode == 0, done.stderr
    assert "M-SMoE, refit" in done.stdout
    done = run_python(["-c", script, "report", "small"], tmp_path, package=True, PYTHONPATH=wheel)
    assert done.returncode == 0, done.stderr
    assert "<svg" in (tmp_path / "small" / "report.html").read_text(encoding="utf-8")
