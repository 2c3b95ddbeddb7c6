"""Layouts of two processes by Transformers' `DistributedConfig`: tensor, data and expert parallelism, without us."""

import copy
import json
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from families import build, inputs
from helpers import batches
from merged import TESTS, Example, example, merge, run_python, save

from hf_mcsmoe import LoSparseConfig, MergeConfig, compact, decompose_experts

NAMES = ["mixtral", "qwen3_moe", "deepseek_v3"]
# Whose experts no plan of the family splits: they are whole in each process.
DECOMPOSED = "mixtral_low_rank"
LAYOUTS = ["plain", "tp", "fsdp", "tp and ep", "fsdp and ep"]


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def distances(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """How far the logits of two processes are from those of one, by family and layout."""
    folder, folders = tmp_path_factory.mktemp("parallel"), []
    for name in NAMES:
        base = build(name)
        # Two or four of eight experts, by turns: as many in each process.
        plan, merged = merge(
            base, name, MergeConfig(budget=lambda scores, *_: [2 + 2 * (i % 2) for i in range(len(scores))])
        )
        assert {len(layer.dominant) for layer in plan.layers.values()} == {2, 4}
        folders.append(str(save(Example(name, base, inputs(name, base), plan, merged), folder)))
    case = example("mixtral")
    data, config = batches("mixtral", case.base), LoSparseConfig(rank=3, keep=0.25)
    small = compact(decompose_experts(copy.deepcopy(case.merged), config, data, prune=True))
    folders.append(str(save(replace(case, name=DECOMPOSED, merged=small), folder)))
    script, report, port = TESTS / "parallel_without_package.py", folder / "report.json", str(_free_port())

    def run(rank: int) -> tuple[int, str]:
        where = folder / str(rank)
        where.mkdir()
        done = run_python([str(script), str(rank), port, str(report), *folders], where)
        return done.returncode, done.stderr

    with ThreadPoolExecutor(2) as pool:
        for code, errors in pool.map(run, range(2)):
            assert code == 0, errors
    return json.loads(report.read_text())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [*NAMES, DECOMPOSED])
def test_two_processes_give_the_logits_of_one(name: str, layout: str, distances: dict[str, float]) -> None:
    assert distances[f"{name}, {layout}"] < 1e-5
