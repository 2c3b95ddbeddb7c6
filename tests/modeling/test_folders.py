"""A folder is whole whatever kills the process that writes it, belongs to one process, and follows the umask."""

import fcntl
import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from families import build
from helpers import logits
from merged import Example, example, merge, run_python, tokenizer
from transformers import AutoModelForCausalLM

from hf_mcsmoe.modeling import folders_mcsmoe
from hf_mcsmoe.modeling.companions_mcsmoe import remember_source
from hf_mcsmoe.modeling.folders_mcsmoe import completed_folder, work_place, working_folder

# Saves the model of one folder over copies of another, and is killed before each change of a file, one after another.
KILLED = """
import itertools, os, shutil, signal, sys, transformers
new, old, scratch, name = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(new, trust_remote_code=True)
moves = {move: getattr(os, move) for move in ("replace", "rename", "unlink", "rmdir")}
code = -getattr(signal, name)
for number in itertools.count():
    target = f"{scratch}/{number}"
    if old:
        shutil.copytree(old, target)
    if not os.fork():
        left = [number]
        def killing(move):
            def run(*arguments, **keywords):
                if not keywords:  # rmtree's own
                    if left[0] == 0:
                        os.kill(os.getpid(), getattr(signal, name))
                    left[0] -= 1
                return moves[move](*arguments, **keywords)
            return run
        for move in moves:
            setattr(os, move, killing(move))
        model.save_pretrained(target)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.wait()[1]) == 0:
        break
print(number)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An old and a new merged model, each once in one file and once in several."""
    root, case = tmp_path_factory.mktemp("folders"), example("mixtral")
    models = {"old": merge(build("mixtral", seed=1), "mixtral")[1], "new": case.merged}
    for name, model in models.items():
        for size in ("5GB", "100KB"):
            model.save_pretrained(root / name / size, max_shard_size=size)
            tokenizer().save_pretrained(root / name / size)
            (root / name / size / "notes.txt").write_text("mine")
    return {f"{name}, {size}": root / name / size for name in models for size in ("5GB", "100KB")}


def _found(folder: Path, answers: dict[str, torch.Tensor]) -> str:
    """Return which of the models a folder holds; "none" where it does not load."""
    if not (folder / "config.json").exists():
        with pytest.raises((OSError, ValueError), match=r"config\.json"):
            AutoModelForCausalLM.from_pretrained(folder)
        return "none"
    found = logits(AutoModelForCausalLM.from_pretrained(folder), example("mixtral").batch)
    return next((name for name, answer in answers.items() if torch.equal(found, answer)), "mixed")


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("old, 100KB", "new, 5GB", "SIGKILL"),
        ("old, 5GB", "new, 100KB", "SIGTERM"),
        ("", "new, 5GB", "SIGKILL"),
    ],
)
@pytest.mark.slow
def test_a_kill_at_any_move_leaves_the_old_model_the_new_one_or_none(
    old: str, new: str, name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "runs").mkdir()
    arguments = [str(folders[new]), str(folders[old]) if old else "", str(tmp_path / "runs"), name]
    done = run_python(["-c", KILLED, *arguments], tmp_path)
    assert done.returncode == 0, done.stderr
    moves = int(done.stdout.split()[-1])
    assert moves > (10 if old else 1)
    answers = {
        key: logits(AutoModelForCausalLM.from_pretrained(folders[key]), example("mixtral").batch)
        for key in (old, new)
        if key
    }
    model = AutoModelForCausalLM.from_pretrained(folders[new])
    found = []
    for number in range(moves + 1):
        target = tmp_path / "runs" / str(number)
        found.append(_found(target, answers) if target.exists() else "none")
        if old:
            assert (target / "notes.txt").read_text() == "mine"
        model.save_pretrained(target)
        assert _found(target, answers) == new
        assert not work_place(target).exists()
    assert "mixed" not in found
    # In this order: all of the one, then a moment without, then all of the other.
    assert found == sorted(found, key=[old or "none", "none", new].index)
    assert {found[0], found[-1]} == {old or "none", new}


def test_a_folder_has_one_writer_at_a_time(tmp_path: Path) -> None:
    target = tmp_path / "result"
    place = work_place(target)
    place.mkdir()
    with (place / "lock").open("w") as held:  # as another process would
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=f"Another run is writing to {target}"), completed_folder(target):
            pass
    with completed_folder(target) as folder:
        (folder / "file").write_text("new")
        with working_folder(target) as again:
            assert again == place
    assert [*tmp_path.rglob("*")] == [target, target / "file"]


def test_what_a_killed_run_left_is_in_nobodys_way(tmp_path: Path) -> None:
    target = tmp_path / "result"
    left = work_place(target) / "result"
    (left / "nested").mkdir(parents=True)
    (left / "model.safetensors").write_text("half")
    (work_place(target) / "lock").touch()
    with completed_folder(target) as folder:
        assert not any(folder.iterdir())
        (folder / "file").write_text("new")
    assert [*tmp_path.rglob("*")] == [target, target / "file"]


def test_what_is_kept_for_a_later_run_stays(tmp_path: Path) -> None:
    with working_folder(tmp_path / "result") as folder:
        (folder / "training").mkdir()
    assert [*folder.iterdir()] == [folder / "training"]
    with completed_folder(tmp_path / "result") as made:
        (made / "file").write_text("new")
    assert [*folder.iterdir()] == [folder / "training"]


def test_a_failure_leaves_not_even_the_folders_above(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), completed_folder(tmp_path / "a" / "b" / "result"):
        raise KeyboardInterrupt
    assert not any(tmp_path.iterdir())


NAMES = ["a" * 255, "é" * 127, "x" * 101, ".hidden", "name.partial"]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: f"{name[:8]}{len(name)}")
def test_any_name_will_do_and_like_ones_are_the_users(name: str, tmp_path: Path) -> None:
    mine = [tmp_path / "result.partial", tmp_path / "result.training", tmp_path / ".result.abc.partial"]
    for folder in mine:
        folder.mkdir()
        (folder / "notes.txt").write_text("mine")
    for target in (tmp_path / name, tmp_path / "result"):
        for text in ("first", "second"):
            with completed_folder(target) as folder:
                (folder / "file").write_text(text)
            assert (target / "file").read_text() == text
    assert all((folder / "notes.txt").read_text() == "mine" for folder in mine)
    assert {path.name for path in tmp_path.iterdir()} == {name, "result", *(folder.name for folder in mine)}


def test_a_mounted_folder_is_written_from_within(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "mounted"
    target.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == target)
    with completed_folder(target) as folder:
        assert target in folder.parents
        (folder / "file").write_text("new")
    assert [*tmp_path.rglob("*")] == [target, target / "file"]


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.fixture
def case(folders: dict[str, Path], tmp_path: Path) -> Iterator[Example]:
    """A merged model that comes from a folder with private files and a nested folder."""
    case, source = example("mixtral"), shutil.copytree(folders["new, 5GB"], tmp_path / "source")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    for file in source.rglob("*"):
        file.chmod(0o700 if file.is_dir() else 0o600)
    remember_source(case.merged, str(source))
    yield case
    case.merged.mcsmoe_source = None


def test_folder_and_files_follow_the_umask(umask: int, case: Example, tmp_path: Path) -> None:
    target = tmp_path / "result"
    case.merged.save_pretrained(target, max_shard_size="100KB")
    (target / "mine").touch()
    (target / "mine").chmod(0o640)
    for size in ("100KB", "5GB"):
        case.merged.save_pretrained(target, max_shard_size=size)
        assert (target / "additional_chat_templates" / "tools.jinja").is_file()
        for path in (target, *target.rglob("*")):
            full = 0o777 if path.is_dir() else 0o666
            mode = 0o640 if path.name == "mine" else full & ~umask
            assert stat.S_IMODE(path.stat().st_mode) == mode, path


def test_a_save_into_the_folder_of_the_original_is_refused(tmp_path: Path) -> None:
    build("mixtral").save_pretrained(tmp_path / "base")
    before = {file.name: file.read_bytes() for file in (tmp_path / "base").iterdir()}
    _, merged = merge(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), "mixtral")
    (tmp_path / "link").symlink_to(tmp_path / "base")
    for target in ("base", "link"):
        with pytest.raises(ValueError, match="holds the original model, which saving here would destroy"):
            merged.save_pretrained(tmp_path / target)
    assert {file.name: file.read_bytes() for file in (tmp_path / "base").iterdir()} == before
    merged.save_pretrained(tmp_path / "merged")
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged").save_pretrained(tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["model_type"] == "mcsmoe"


def test_a_disk_without_locks_is_written_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr(folders_mcsmoe.fcntl, "flock", fail)
    with completed_folder(tmp_path / "result") as folder:
        (folder / "file").write_text("new")
    monkeypatch.setattr(folders_mcsmoe, "fcntl", None)
    with completed_folder(tmp_path / "result") as folder:
        (folder / "file").write_text("newer")
    assert [*tmp_path.rglob("*")] == [tmp_path / "result", tmp_path / "result" / "file"]
