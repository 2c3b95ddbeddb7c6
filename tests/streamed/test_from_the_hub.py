"""A checkpoint of the Hub is read shard by shard, and its cache holds no more of it than is asked for."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from families import build
from helpers import Run, batches
from hub import Hub, here, running_hub
from huggingface_hub import constants
from pair import in_two_processes
from transformers import PreTrainedTokenizerFast

from hf_mcsmoe import MergeConfig, collect_statistics, compress_folder, together
from hf_mcsmoe.layers import snapshot
from hf_mcsmoe.layers.checkpoint import tensors_of_file
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.folder import Folder
from hf_mcsmoe.layers.hub import HubFile
from hf_mcsmoe.layers.snapshot import Snapshot
from hf_mcsmoe.layers.stored import stored_bytes
from hf_mcsmoe.search.compress import source_bytes
from hf_mcsmoe.streamed.config import StreamConfig
from hf_mcsmoe.streamed.journal import Journal

pytestmark = pytest.mark.filterwarnings("ignore:Few calibration tokens")
ID, HALF, MOVED = "me/moe", MergeConfig(experts=4), "f" * 40


class Killed(BaseException):
    """Ends a run as a kill does."""


@pytest.fixture
def source(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Save a model in more shards than it has blocks."""
    folder = tmp_path / "source"
    build("mixtral").save_pretrained(folder, max_shard_size="30KB")
    tokenizer.save_pretrained(folder)
    (folder / "LICENSE").write_text("free")
    (folder / "text.txt").write_text("\n".join(f"what is {n} {n % 7}" for n in range(8)))
    return folder


@pytest.fixture
def hub(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Serve the model for the time of the test, to this process; routers and norms are small, blocks are not."""
    monkeypatch.setattr(snapshot, "SMALL", 10_000)
    with running_hub() as served, here(served, tmp_path / "cache", monkeypatch):
        served.files[ID] = {file.name: file.read_bytes() for file in source.iterdir()}
        yield served


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def cached(folder: Path) -> set[str]:
    """Return the names of the shards in a cache, of which as many contents lie beside the links."""
    return {file.name for file in folder.rglob("*.safetensors") if file.is_file()}


def fetches(hub: Hub) -> dict[str, int]:
    """Return how many times each shard was sent as a whole."""
    sizes = {name: len(content) for name, content in hub.files[ID].items() if name.endswith(".safetensors")}
    sent = {path.rpartition("/")[2]: answers for path, answers in hub.sent.items()}
    return {name: sent.get(name, []).count(size) for name, size in sizes.items()}


@pytest.mark.slow
def test_shards_are_fetched_as_blocks_need_them(
    hub: Hub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, most, cache = batches("mixtral", build("mixtral")), [0], tmp_path / "cache"
    folder = Folder(ID, drops=True)
    assert not cached(cache), "only headers have been read"
    fetched = Snapshot.fetched

    def watched(self: Snapshot, name: str) -> Path:
        file = fetched(self, name)
        most[0] = max(most[0], len(cached(cache)))
        return file

    monkeypatch.setattr(Snapshot, "fetched", watched)
    compress_folder(folder, tmp_path / "ours", rows, HALF)
    assert not cached(cache)
    assert not [file for file in cache.rglob("blobs/*") if file.stat().st_size > 25_000]
    assert most[0] < len(fetches(hub))
    assert set(fetches(hub).values()) <= {1, 2}, "those outside of the blocks once, others once a sweep"
    compress_folder(ID, tmp_path / "kept", rows, HALF, stream=StreamConfig())
    assert cached(cache) == fetches(hub).keys()
    compress_folder(source, tmp_path / "theirs", rows, HALF)
    results = [contents(tmp_path / name) for name in ("ours", "kept", "theirs")]
    for result in results:
        result.pop("README.md"), result.pop("mcsmoe_record.json")  # which name the source
        result.pop("mcsmoe_plan.json")
    assert results[0] == results[1] == results[2]
    assert "LICENSE" in results[0]
    assert ID in (tmp_path / "ours" / "README.md").read_text()


def _killed(output: Path, rows: list[Any], monkeypatch: pytest.MonkeyPatch, stream: StreamConfig) -> None:
    """Begin a run that ends after its first block."""
    saves, write = iter(range(9)), Journal.save

    def save(self: Journal) -> None:
        write(self)
        if next(saves) == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "save", save)
        with pytest.raises(Killed):
            compress_folder(ID, output, rows, HALF, stream=stream)


@pytest.mark.slow
def test_a_run_goes_on_with_its_commit_and_drops_what_it_has_fetched(
    hub: Hub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, cache, drops = batches("mixtral", build("mixtral")), tmp_path / "cache", StreamConfig(drop_source_cache=True)
    one = min(fetches(hub))
    Snapshot(ID).fetched(one)  # which was there before
    _killed(tmp_path / "out", rows, monkeypatch, drops)
    assert len(cached(cache)) > 1
    other = max(fetches(hub).keys() - cached(cache))
    Snapshot(ID).fetched(other)  # while the run does not work
    shards = dict.fromkeys(fetches(hub), b"")
    hub.move(MOVED, {ID: {**shards, "config.json": source.joinpath("config.json").read_bytes() + b" "}})
    compress_folder(ID, tmp_path / "out", rows, HALF, stream=drops)
    assert cached(cache) == {one, other}
    compress_folder(source, tmp_path / "theirs", rows, HALF)
    results = [contents(tmp_path / name) for name in ("out", "theirs")]
    weights = [name for name in results[0] if name.endswith(".safetensors")]
    assert len(weights) > 2
    assert all(results[0][name] == results[1][name] for name in weights)


def test_only_what_a_run_has_fetched_itself_is_dropped(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, ours, anew, theirs, late, *_ = sorted(fetches(hub))
    Snapshot(ID).fetched(before)
    begun = Snapshot(ID)
    begun.fetched(ours)  # before there is a journal
    Journal(tmp_path, {}).follow(begun)
    for name in (before, anew):
        begun.fetched(name)
    # The run is killed, and others fetch: what nobody had, what was dropped by hand, and to another cache.
    Path(os.path.realpath(begun.fetched(anew))).unlink()
    for name in (theirs, anew):
        Snapshot(ID).fetched(name)
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "elsewhere"))
        elsewhere = Snapshot(ID)
        Snapshot(ID).fetched(ours)
        Journal(tmp_path, {}).follow(elsewhere)
        elsewhere.drop([ours])
        assert cached(tmp_path / "elsewhere") == {ours}
    again = Snapshot(ID)
    Journal(tmp_path, {"other": 1}, restart=True).follow(again)
    again.fetched(late)
    assert cached(tmp_path / "cache") == {before, ours, anew, theirs, late}
    again.drop_all()
    assert cached(tmp_path / "cache") == {before, anew, theirs}


@pytest.mark.parametrize("ends", [False, True])
def test_what_is_fetched_ahead_is_dropped_when_it_comes_too_late(
    ends: bool, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, *_ = sorted(fetches(hub))
    asked, free, download = threading.Event(), threading.Event(), snapshot._download

    def slow(repo_id: str, name: str, commit: str | None) -> Path:
        asked.set()
        assert free.wait(60)
        return download(repo_id, name, commit)

    begun = Snapshot(ID)
    monkeypatch.setattr(snapshot, "_download", slow)
    begun.fetch_ahead([first, second])
    assert asked.wait(60)
    threading.Timer(0.2, free.set).start()
    if ends:
        begun.drop_all()
    else:
        begun.drop([first, second])
        begun._threads[0].join(60)
    assert not cached(tmp_path / "cache")
    assert [fetches(hub)[name] for name in (first, second)] == [1, 0], "nothing more was begun"


def test_what_a_block_fetches_itself_is_not_fetched_ahead_as_well(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, begun, download = min(fetches(hub)), Snapshot(ID), snapshot._download
    asked: list[threading.Thread] = []

    def slow(*arguments: Any) -> Path:
        asked.append(threading.current_thread())
        if len(asked) == 1:
            begun.fetch_ahead([name])
            begun._threads[0].join(0.3)  # it asks for the file now, if it does not wait
        return download(*arguments)

    monkeypatch.setattr(snapshot, "_download", slow)
    begun.fetched(name)
    begun.drop([name])
    begun._threads[0].join(60)
    assert asked == [threading.current_thread()]
    assert fetches(hub)[name] == 1
    assert not cached(tmp_path / "cache")


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_share_of_a_model_is_of_its_files_wherever_they_are(dtype: str, hub: Hub, source: Path) -> None:
    files = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    assert [source_bytes(Layers.of(Folder(name, dtype=dtype))) for name in (ID, source)] == [files, files]


def test_shards_that_are_not_the_runs_to_drop_are_refused(hub: Hub, source: Path, tmp_path: Path) -> None:
    drops, folder = StreamConfig(drop_source_cache=True), Folder(ID)
    with pytest.raises(ValueError, match="open it with drops=True"):
        compress_folder(folder, tmp_path / "out", batches("mixtral", folder.model), HALF, stream=drops)
    for given in (source, Folder(source)):
        with pytest.raises(ValueError, match="is a folder, of which nothing is fetched"):
            compress_folder(given, tmp_path / "out", batches("mixtral", folder.model), HALF, stream=drops)


@pytest.mark.parametrize("command", ["compress", "calibrate"])
def test_a_folder_has_no_shards_to_drop(command: str, run: Run, tmp_path: Path) -> None:
    options = ["--data", tmp_path, "--stream", "--drop-source-cache", "--output", tmp_path / "out.safetensors"]
    build("mixtral").config.save_pretrained(tmp_path)
    code, _, err = run(command, tmp_path, *options)
    assert (code, "is a folder, of which nothing is fetched" in " ".join(err.split())) == (1, True)


DAMAGES: dict[str, tuple[Any, str]] = {
    "a shard that is not there": (lambda files, name: files.pop(name), "Cannot read .*safetensors of me/moe"),
    "a shard that is cut off": (
        lambda files, name: files.update({name: files[name][:-8]}),
        "is no whole safetensors file .*download it again",
    ),
    "a shard of another checkpoint": (
        lambda files, name: files.update({name: files[max(n for n in files if n.endswith(".safetensors"))]}),
        "lacks .* of the tensors that model.safetensors.index.json says it holds",
    ),
    "no safetensors": (
        lambda files, name: [files.pop(key) for key in [*files] if "safetensors" in key],
        r"me/moe on the Hub holds no model\.safetensors\.index\.json .*save_pretrained",
    ),
    "an index that points elsewhere": (
        lambda files, name: files.update(
            {key: content.replace(b"model-00001", b"../odel-001") for key, content in files.items() if "index" in key}
        ),
        "names the shard .* which is no safetensors file in its folder",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damages(damage: str, hub: Hub) -> None:
    change, told = DAMAGES[damage]
    change(hub.files[ID], min(fetches(hub)))
    with pytest.raises(ValueError, match=told):
        Folder(ID)


def test_a_hub_that_goes_away(hub: Hub, tmp_path: Path) -> None:
    folder = Folder(ID)
    hub.files[ID] = {}
    with pytest.raises(ValueError, match=r"Cannot read model-.*\.safetensors of me/moe"):
        compress_folder(folder, tmp_path / "out", batches("mixtral", folder.model), HALF)
    with (
        pytest.raises(ValueError, match=r"holds no model-.*\.safetensors at commit 0123"),
        folder.loaded("model.layers.0"),
    ):
        pass
    with pytest.raises(ValueError, match="me/none on the Hub holds no"):
        Folder("me/none")


def test_a_hub_that_fails_is_told_from_a_checkpoint_that_is_damaged(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    name = min(fetches(hub))
    file, nobody = HubFile(ID, name), HubFile(ID, "none.safetensors")
    assert (file.exists(), nobody.exists()) == (True, False)
    with pytest.raises(ValueError, match="is no whole safetensors file"):
        tensors_of_file(nobody)
    monkeypatch.setattr(hub, "is_failing", True)
    for ask in (file.exists, lambda: file.size, lambda: file.open().read(8), lambda: tensors_of_file(file)):
        with pytest.raises(OSError, match=f"Cannot .*{name} of me/moe"):
            ask()
    assert stored_bytes(ID) is None


@pytest.mark.slow
def test_on_the_command_line(hub: Hub, source: Path, run: Run, tmp_path: Path) -> None:
    data = ["--data", source / "text.txt", "--max-length", 8, "--stream", "--drop-source-cache"]
    code, _, err = run("calibrate", ID, *data, "--output", tmp_path / "sums.safetensors")
    assert code == 0, err
    assert not cached(tmp_path / "cache")
    options = ["--experts", 0.5, "--repair", "none", "--output", tmp_path / "out"]
    code, _, err = run("compress", ID, *data, *options)
    assert code == 0, err
    assert not cached(tmp_path / "cache")
    code, _, err = run("calibrate", ID, *data[:4], "--drop-source-cache", "--output", tmp_path / "more.safetensors")
    assert (code, "goes with --stream" in err) == (1, True)


def _together(hub: Hub, folder: Path, drops: StreamConfig, killed: tuple[int, int] | None = None) -> list[Any]:
    """Compress in two processes that share a cache, one of which may be killed right after a save of its own part.

    Returns of each the most shards that it saw in the cache; None of the killed one, and what the other was told.
    """
    rows, cache = batches("mixtral", build("mixtral"), 4, batch_size=4), folder.parent / "cache"

    def work(rank: int) -> Any:
        saves, write, most, fetched = [0], Journal.save, [0], Snapshot.fetched

        def save(self: Journal) -> None:
            write(self)
            saves[0] += "rank-" in str(self.folder)
            if killed == (rank, saves[0]):
                wait()
                os._exit(9)

        def wait() -> None:
            """Wait for what is being fetched ahead: between its end and the note of it nobody knows whose it is."""
            for one in seen:
                for thread in one._threads:
                    thread.join(60)

        def watched(self: Snapshot, name: str) -> Path:
            file = fetched(self, name)
            most[0] = max(most[0], len(cached(cache)))
            seen.append(self)
            return file

        seen = list[Snapshot]()
        Journal.save, Snapshot.fetched = save, watched
        try:
            with together(patience=60):
                compress_folder(ID, folder / "out", rows, HALF, stream=drops)
        except RuntimeError as error:
            wait()
            return str(error)
        return most[0]

    folder.mkdir(exist_ok=True)
    return in_two_processes(work, folder)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [None, (0, 3), (1, 3)])
def test_two_processes_fetch_each_shard_once_a_sweep(
    killed: tuple[int, int] | None, hub: Hub, source: Path, tmp_path: Path
) -> None:
    drops, cache = StreamConfig(drop_source_cache=True), tmp_path / "cache"
    rows = batches("mixtral", build("mixtral"), 4, batch_size=4)
    compress_folder(ID, tmp_path / "alone", rows, HALF, stream=drops)
    alone = fetches(hub)
    assert set(alone.values()) == {1, 2}
    before = min(alone)
    Snapshot(ID).fetched(before)  # which is nobody's to drop
    hub.sent.clear()
    if killed:
        found = _together(hub, tmp_path / "shared", drops, killed)
        assert found[killed[0]] is None
        assert "ended without a word" in found[1 - killed[0]]
    most = _together(hub, tmp_path / "shared", drops)
    assert cached(cache) == {before}
    if not killed:
        assert fetches(hub) == alone | {before: 0}
        assert max(most) < len(alone)
    assert not list((tmp_path / "shared").glob(".*"))
    assert (tmp_path / "shared" / "out" / "model.safetensors.index.json").is_file()


@pytest.mark.slow
def test_two_processes_that_calibrate_share_a_cache(hub: Hub, tmp_path: Path) -> None:
    rows = batches("mixtral", build("mixtral"), 4, batch_size=4)

    def work(rank: int) -> bool:
        with together(patience=60):
            folder = Folder(ID, drops=True)
            collect_statistics(Layers.of(folder), rows)
            folder.drop_fetched()
        return True

    assert in_two_processes(work, tmp_path) == [True, True]
    assert set(fetches(hub).values()) == {1}
    assert not cached(tmp_path / "cache")
