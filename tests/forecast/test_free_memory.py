"""Free memory, read from folders laid out as systems and containers lay them out."""

from pathlib import Path

import pytest

from hf_mcsmoe.forecast.memory import free_memory

MEMINFO = {"proc/meminfo": "MemTotal: 2000 kB\nMemFree: 10 kB\nMemAvailable: 1000 kB\n"}
NONE_IN_V1 = "9223372036854771712\n"


def _group(path: str, limit: str, used: int, idle: int, version: int = 2) -> dict[str, str]:
    """Return the files of one control group; a group of version 1 tells its own pages beside those of all below."""
    if version == 2:
        files = {"memory.max": limit, "memory.current": f"{used}\n", "memory.stat": f"anon 5\ninactive_file {idle}\n"}
    else:
        stat = f"inactive_file 1\ntotal_inactive_file {idle}\n"
        files = {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": f"{used}\n", "memory.stat": stat}
    return {f"sys/fs/cgroup/{path}/{name}": text for name, text in files.items()}


CASES = {
    "no group": ({}, 1_024_000),
    "the least of all levels": (
        {
            "proc/self/cgroup": "0::/a/b\n",
            **_group("a/b", "max", 100, 0),
            **_group("a", "5000\n", 4500, 300),
            **_group("", "9000\n", 8000, 0),
        },
        800,
    ),
    "version 1": (
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/a\n4:memory:/a/b\n",
            **_group("memory/a/b", NONE_IN_V1, 100, 0, 1),
            **_group("memory/a", "7000", 6500, 250, 1),
            **_group("a", "1", 1, 0),  # of another controller
        },
        750,
    ),
    "named by the host": (
        {"proc/self/cgroup": "4:memory:/docker/x\n0::/\n", **_group("memory", "6000", 1000, 0, 1)},
        5000,
    ),
    "outside of the namespace": ({"proc/self/cgroup": "0::/../x\n", **_group("", "6000\n", 7000, 0)}, 0),
    "the system has less": ({"proc/self/cgroup": "0::/\n", **_group("", "9999999\n", 0, 0)}, 1_024_000),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_free_is_the_least_that_anyone_leaves(case: str, tmp_path: Path) -> None:
    files, free = CASES[case]
    for name, text in (MEMINFO | files).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert free_memory(tmp_path) == free


def test_where_nobody_says_it_is_what_there_is(tmp_path: Path) -> None:
    assert free_memory(tmp_path) > 10**8
