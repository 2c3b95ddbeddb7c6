"""The scripts of the related systems as a user runs them, in tiny sizes: what their tables say must be possible."""

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from scripts import EXAMPLES, run
from transformers import AutoModelForCausalLM

Table = list[dict[str, str]]
SHORT = ["--steps", "40", "--seeds", "0", "--batch-size", "8"]
# Perplexity per byte of a model that knows nothing.
NOTHING = 256


def tables(output: str) -> list[Table]:
    """Return the tables of an output, a dictionary a row."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", output, re.MULTILINE):
        head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
        found.append([dict(zip(head, row, strict=True)) for row in rows])
    return found


def printed(script: str, *arguments: str | Path) -> str:
    """Return what a script of the folder prints."""
    result = run(f"variants/{script}", *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def text(folder: Path, words: str) -> Path:
    """Write a text of a few words in an order without a period."""
    path = folder / f"{words[:3]}.txt"
    known = words.split()
    path.write_text(" ".join(known[place * place * 7 % 1009 % len(known)] for place in range(6000)))
    return path


def check_smoe_dropout(folder: Path) -> None:
    (found,) = tables(printed("smoe_dropout.py", "--text", text(folder, "one two three four"), *SHORT))
    rows = {row.pop("trained"): row for row in found}
    assert list(rows) == ["dense", "k grows 1 to 8", "k = 2", "k = 8"]
    values = [float(row[f"k = {k}"]) for name, row in rows.items() for k in (1, 2, 4, 8) if name != "dense" or k == 8]
    assert all(1 < value < NOTHING / 4 for value in values)
    assert float(rows["k = 8"]["k = 8"]) == pytest.approx(float(rows["dense"]["k = 8"]), rel=0.01), "the same model"


def check_momentum(folder: Path) -> None:
    trained, patched = tables(printed("momentum.py", "--text", text(folder, "one two three four"), *SHORT))
    assert [row["seed"] for row in trained] == [row["seed"] for row in patched] == ["0"]
    assert all(1 < float(value) < NOTHING / 4 for name, value in trained[0].items() if name != "seed")
    harm = [abs(float(value.rstrip("%"))) for name, value in patched[0].items() if name != "seed"]
    assert harm[0] < harm[2], "more momentum changes a model more"


def check_upcycling(folder: Path) -> None:
    names = [text(folder, "one two three four"), text(folder, "ALPHA BETA GAMMA DELTA")]
    kinds = ["average", "mixture", "shared_kv"]
    (found,) = tables(printed("upcycling.py", "--text", *names, *SHORT, "--attention", *kinds))
    rows = {row["model"]: [float(row[key]) for key in ("one.txt", "ALP.txt", "mean")] for row in found}
    assert len(rows) == 10
    assert all(sum(row[:2]) / 2 == pytest.approx(row[2], abs=2e-3) for row in rows.values())
    assert all(1 < value < NOTHING for row in rows.values() for value in row)
    assert rows["branch 1"][0] < rows["branch 2"][0], "a branch is better on its own text"
    assert rows["branch 2"][1] < rows["branch 1"][1]
    for name in ("mixture", "mixture, attention mixed", "mixture, keys and values shared"):
        assert rows[f"{name}, trained"][2] < rows[f"{name}, untrained"][2]
    assert len({rows[name][2] for name in rows if name.endswith("untrained")}) == 3, "three models"


def check_similarity_routing(folder: Path) -> None:
    (found,) = tables(printed("similarity_routing.py", "--text", text(folder, "one two three four"), *SHORT))
    assert [row["routers"].split(",")[0] for row in found] == ["plain", "similarity", "attention"]
    for row in found:
        assert 1 < float(row["perplexity"]) < NOTHING / 4
        assert 0 <= float(row["changed"].rstrip("%")) <= 100
        assert 100 / 8 - 1 <= float(row["most chosen"].rstrip("%")) <= 100, "of 8 experts"
        assert all(0 <= float(row[f"entropy of {name}"]) <= math.log(8) + 1e-3 for name in "pr")
    assert found[0]["entropy of p"] == found[0]["entropy of r"], "a plain router picks by its own probabilities"


def check_lory(folder: Path) -> None:
    names = [text(folder, "one two three four"), text(folder, "ALPHA BETA GAMMA DELTA")]
    trained, halves = tables(printed("lory.py", "--text", *names, *SHORT))
    assert all(1 < float(row["perplexity"]) < NOTHING for row in trained)
    rows = {row["second halves"]: [float(cell) for cell in list(row.values())[2:] if cell] for row in halves}
    assert [len(row) for row in rows.values()] == [1, 4, 4]
    soft = rows["merged softly"]
    assert soft[1] == pytest.approx(soft[0], rel=0.02), "a prompt says what a segment does"


def check_peer(folder: Path) -> None:
    (found,) = tables(printed("peer.py", "--text", text(folder, "one two three four"), *SHORT))
    assert [row["trained"] for row in found] == ["dense", "PEER", "PEER, no query BatchNorm"]
    assert all(1 < float(row["perplexity"]) < NOTHING / 4 for row in found)
    for row in found[1:]:
        entropy, share = (float(cell.rstrip("%")) for cell in list(row.values())[4:])
        count = share / 100 * 4096
        assert 16 <= count + 3 <= 4099, "of 4096 experts, no fewer than a head picks for a token"
        assert 0 < entropy <= math.log(count) + 0.02, "no more even than all that are used"


def check_specialization(folder: Path) -> None:
    (found,) = tables(printed("specialization.py", "--steps", "150", "--seeds", "2"))
    assert len(found) == 5
    for row in found:
        accuracy, sample, used, known = (float(row[name].split(" ± ")[0]) for name in list(row)[1:])
        assert 0.3 < accuracy < 1, "of ten clusters"
        assert 0 <= sample <= used <= math.log(5) + 1e-3, "a mean's entropy is no less than the mean entropy"
        assert 0 <= known <= used + 1e-3, "a pick cannot tell more than it holds"


def check_train_small_moe(folder: Path) -> None:
    output, given = folder / "model", text(folder, "one two three four five six seven")
    sizes = ["--steps", "30", "--length", "32", "--vocab-size", "280"]
    told = printed("train_small_moe.py", "--text", given, "--output", output, *sizes)
    model = AutoModelForCausalLM.from_pretrained(output)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert f"{count:,} parameters, 30 steps of 8 x 32 tokens" in told
    assert len((output / "validation.txt").read_text()) == pytest.approx(len(given.read_text()) / 20, abs=1)
    assert given.read_text().endswith((output / "validation.txt").read_text())


def check_mixed_precision(folder: Path) -> None:
    check_train_small_moe(folder)
    model = folder / "model"
    told = printed("mixed_precision.py", model, "--text", model / "validation.txt", "--rows", "4", "--length", "32")
    before = float(re.match(r"Perplexity ([\d.]+)", told)[1])
    assert 1 < before < 280 / 4, "of 280 tokens"
    choices, loaded = tables(told)
    assert [row["picks beyond T1"] for row in choices] == ["8 bits", "4 bits", "2 bits", "skipped"]
    assert float(choices[0]["perplexity"]) == pytest.approx(before, rel=0.01)
    for row in choices:
        change = float(row["change"].rstrip("%")) / 100
        assert float(row["perplexity"]) / before - 1 == pytest.approx(change, abs=1e-3)
    assert len(loaded) == 6
    for row in loaded:
        high, mixed = float(row["high precision alone"]), float(row["T1 0.6, T2 0.9"])
        assert 0 < mixed < high <= 8, "at most two experts in each of four layers"
    for less, more in zip(loaded[:3], loaded[3:], strict=True):
        assert float(more["high precision alone"]) <= float(less["high precision alone"]), "a larger cache"
    assert all(0 <= float(share) <= 1 for share in re.findall(r" (\d\.\d\d)(?=,|$)", told, re.MULTILINE))


CHECKS: dict[str, Callable[[Path], None]] = {
    "smoe_dropout.py": check_smoe_dropout,
    "momentum.py": check_momentum,
    "upcycling.py": check_upcycling,
    "similarity_routing.py": check_similarity_routing,
    "lory.py": check_lory,
    "peer.py": check_peer,
    "specialization.py": check_specialization,
    "train_small_moe.py": check_train_small_moe,
    "mixed_precision.py": check_mixed_precision,
}


def test_every_script_is_tried() -> None:
    scripts = {path.name for path in (EXAMPLES / "variants").glob("*.py")} - {"common.py"}
    assert scripts == CHECKS.keys(), "write a check of its table"


@pytest.mark.slow
@pytest.mark.parametrize("script", CHECKS)
def test_figures_of_a_script_are_possible(script: str, tmp_path: Path) -> None:
    CHECKS[script](tmp_path)
