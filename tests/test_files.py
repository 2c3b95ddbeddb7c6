"""Files are written whole or not at all, whoever reads, links or kills; half ones are named."""

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_mcsmoe import MergePlan, RoutingStatistics, files
from hf_mcsmoe.methods.view import Sums
from hf_mcsmoe.plan import LayerPlan

STATISTICS = RoutingStatistics("f", {"layer": Sums(counts=torch.ones(4))})
PLAN = MergePlan({"layer": LayerPlan([0, 0], [0], [0.5, 0.5])}, {"fingerprint": "f", "config": {}})
WRITERS: dict[str, Callable[[Path], None]] = {
    "statistics": STATISTICS.save,
    "plan": PLAN.save,
    "text": lambda path: files.write_text(path, "new"),
    "json": lambda path: files.write_json(path, {"new": 1}),
}


@pytest.mark.parametrize("name", WRITERS)
def test_what_fails_leaves_the_old_file_and_nothing_else(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_text("old")

    def fail(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail)
        with pytest.raises(KeyboardInterrupt):
            WRITERS[name](file)
    assert file.read_text() == "old"
    assert [*tmp_path.iterdir()] == [file]
    WRITERS[name](file)
    assert b"old" not in file.read_bytes()
    assert [*tmp_path.iterdir()] == [file]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
@pytest.mark.parametrize("name", WRITERS)
def test_files_follow_the_umask(name: str, umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        WRITERS[name](tmp_path / "file")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~umask


NAMES = ["a" * 255, "é" * 127, "a" * 99 + "é" * 70, ".hidden", "with space.json"]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: f"{name[:8]}{len(name)}")
def test_a_file_may_have_any_name_that_the_disk_takes(name: str, tmp_path: Path) -> None:
    files.write_text(tmp_path / name, "new")
    files.write_text(tmp_path / name, "newer")
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {name: "newer"}


def test_a_link_stays_one_and_what_it_points_to_is_written(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "file")
    files.write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "file").read_text() == "new"


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="is a folder: name a file"):
        files.write_text(tmp_path, "new")
    files.write_text("/dev/null", "new")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(OSError, match="leads back to itself"):
        files.write_text(tmp_path / "loop", "new")


KILLED = """
import os, runpy, signal, sys
replaced = runpy.run_path(sys.argv[1])["replaced"]
with replaced(sys.argv[2]) as new:
    new.write_text("half")
    os.kill(os.getpid(), getattr(signal, sys.argv[3]))
"""


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_a_kill_leaves_the_old_file(name: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    done = subprocess.run([sys.executable, "-c", KILLED, files.__file__, file, name], timeout=60)
    assert done.returncode == -getattr(signal, name)
    assert file.read_text() == "old"
    files.write_text(file, "new")
    assert file.read_text() == "new"


def test_half_a_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    for text in ('{"a": ', "", "[1, 2]", "\0\0"):
        file.write_text(text)
        with pytest.raises(ValueError, match=rf"{file} is cut off or damaged .*: delete it, and start again\."):
            files.read_json(file, "start again")
    for write, load in ((STATISTICS.save, RoutingStatistics.load), (PLAN.save, MergePlan.load)):
        write(file)
        file.write_bytes(file.read_bytes()[:-20])
        with pytest.raises(ValueError, match=rf"{file} is .*delete it"):
            load(file)
    save_file({"other": torch.ones(1)}, file)
    with pytest.raises(ValueError, match="holds no routing statistics"):
        RoutingStatistics.load(file)
