"""Layouts of two processes by Transformers' `DistributedConfig`: tensor, data and expert parallelism, without us."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from families import build, inputs
from merged import TESTS, Example, merge, run_python, save

from hf_mcsmoe import MergeConfig

NAMES = ["mixtral", "qwen3_moe", "deepseek_v3"]
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
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_give_the_logits_of_one(name: str, layout: str, distances: dict[str, float]) -> None:
    assert distances[f"{Path(name).name}, {layout}"] < 1e-5
