"""Bytes of weight files: of a folder, of an index without its shards, of a repository."""

import json
from pathlib import Path

import pytest
from families import build
from hub import running_hub
from merged import run_python
from transformers import PreTrainedModel

from hf_mcsmoe.layers.stored import BY_INDEX, FILES, Stored, configured_bytes, stored_bytes

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build("mixtral")


def test_an_index_tells_of_shards_that_are_not_there(model: PreTrainedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    shards = list(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    assert stored_bytes(str(tmp_path)) == Stored(sum(shard.stat().st_size for shard in shards), FILES)
    shards[0].unlink()
    total = sum(parameter.nbytes for parameter in model.parameters())
    assert stored_bytes(str(tmp_path)) == Stored(total, BY_INDEX)
    assert configured_bytes(model, model.config).bytes == total
    index = json.loads((tmp_path / INDEX).read_text())
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": index["weight_map"]}))
    assert stored_bytes(str(tmp_path)) is None


@pytest.mark.slow
def test_a_repository_tells_by_its_index_or_its_file(model: PreTrainedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    model.config.save_pretrained(tmp_path / "bare")
    names = ("me/one", "me/shards", "me/bare")
    code = (
        "import json, sys\n"
        "from hf_mcsmoe.layers.stored import stored_bytes\n"
        "found = [stored_bytes(name) for name in sys.argv[1:]]\n"
        "print(json.dumps([item and [item.bytes, item.known_by] for item in found]))\n"
    )
    with running_hub() as hub:
        for name in names:
            folder = tmp_path / name.rpartition("/")[2]
            hub.files[name] = {file.name: file.read_bytes() for file in folder.iterdir()}
        environment = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        done = run_python(["-c", code, *names], tmp_path, package=True, **environment)
    assert done.returncode == 0, done.stderr
    total = sum(parameter.nbytes for parameter in model.parameters())
    whole = (tmp_path / "one" / "model.safetensors").stat().st_size
    assert json.loads(done.stdout) == [[whole, FILES], [total, BY_INDEX], None]
    sent = [path for path in hub.sent if path.endswith(".safetensors")]
    assert not sent, "no weights are fetched"
