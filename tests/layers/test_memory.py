"""Blocks of a folder take what their weights take, and give it back; weights lie where Torch places its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import build, construct
from helpers import batches
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeForCausalLM

from hf_mcsmoe import MergeConfig, compress
from hf_mcsmoe.layers.loading import load_model
from hf_mcsmoe.layers.memory import ALIGNED

PROCESS = """
import json, sys
from pathlib import Path
import torch
from hf_mcsmoe.layers.folder import Folder

torch.set_num_threads(1)

def held():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))

folder = Folder(sys.argv[1])
before, found = held(), []
for number in (0, 1, 0):
    with folder.loaded(f"model.layers.{number}"):
        found.append(held() - before)
    found.append(held() - before)
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the system tells of memory otherwise")
def test_a_block_takes_what_its_weights_take_and_gives_it_back(tmp_path: Path) -> None:
    config = construct("qwen3_moe").config
    config.hidden_size, config.moe_intermediate_size, config.num_experts = 256, 512, 64
    config.num_hidden_layers, config.layer_types = 2, None
    model = Qwen3MoeForCausalLM(config)
    model.save_pretrained(tmp_path)
    block = sum(tensor.nbytes for tensor in model.model.layers[0].parameters())
    assert block > 90e6
    command = [sys.executable, "-c", PROCESS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for loaded, freed in zip(*[iter(json.loads(done.stdout))] * 2, strict=True):
        assert 0.95 * block <= loaded <= 1.1 * block
        assert freed <= 0.1 * block


@pytest.mark.parametrize("way", ["command", "compress"])
def test_weights_that_lie_unaligned_in_their_file_are_copied(way: str, tmp_path: Path) -> None:
    name, file = "switch_transformers", tmp_path / "model.safetensors"
    model = build(name)
    model.save_pretrained(tmp_path)
    tensors = load_file(file)
    for spaces in range(8):  # of which the header has seven that leave the first tensor unaligned
        save_file(tensors, file, metadata={"format": "pt", "spaces": "12345678" * spaces})
        loaded = type(model).from_pretrained(tmp_path)
        if all(parameter.data_ptr() % ALIGNED for parameter in loaded.parameters()):
            break
    assert any(parameter.data_ptr() % ALIGNED for parameter in loaded.parameters())
    if way == "command":
        loaded = load_model(str(tmp_path))
    else:
        compress(loaded, batches(name, model), MergeConfig(experts=1.0))
    assert not any(parameter.data_ptr() % ALIGNED for parameter in loaded.parameters())
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())


PRODUCTS = """
import sys
from pathlib import Path
import torch
from hf_mcsmoe.layers.folder import Folder

torch.set_num_threads(1)

def held():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))

Folder(sys.argv[1])
rows, weight = torch.randn(400, 1024).bfloat16(), torch.randn(512, 1024).bfloat16()
for number in range(1, 100):
    rows[:number] @ weight.T
    torch.nn.functional.linear(rows[:number], weight)
before = held()
for number in range(100, 400):
    torch.nn.functional.linear(rows[:number], weight)
print(held() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the system tells of memory otherwise")
def test_kernels_of_each_number_of_rows_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    construct("qwen3_moe").save_pretrained(tmp_path)
    found = {}
    for kept in (None, "1024"):  # what torch does by itself
        for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
            monkeypatch.delenv(name, raising=False)
            if kept is not None:
                monkeypatch.setenv(name, kept)
        command = [sys.executable, "-c", PRODUCTS, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        found[kept] = int(done.stdout)
    if found["1024"] < 50e6:
        pytest.skip("this CPU makes no kernels of its own for bfloat16")
    assert found[None] < found["1024"] / 3
