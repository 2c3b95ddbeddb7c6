"""Why a choice is what it is: sums over made curves, in a sentence."""

import pytest

from hf_mcsmoe.calibration.curves import LayerCurves, Part
from hf_mcsmoe.methods.choice import Choice, Grid
from hf_mcsmoe.search.reason import reason

GRIDS = {bits: Grid(bits) for bits in (8, 4, 2)}
HALVED = {"merge": (0.25, 0.125), "prune": (0.5, 0.0625)}  # of two layers
AT_4_BITS = (0.03125, 0.0625)  # of each matrix, of two layers


def curves(bits: tuple[int, ...] = (8, 4, 2)) -> dict[str, LayerCurves]:
    made = {}
    for number, name in enumerate("ab"):
        reduced = {reduce: {4: Part(1.0, costs[number])} for reduce, costs in HALVED.items()}
        parts = {GRIDS[one]: Part(1.0, AT_4_BITS[number] * 4.0 ** (4 - one)) for one in bits}
        made[name] = LayerCurves(8, reduced, parts, parts)
    return made


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"a": Choice(6, "merge", GRIDS[4], GRIDS[8]), "b": Choice(8)}, "6 to 8 of 8 experts a layer, in 4 to 8 bits"),
        ({"a": Choice(4), "b": Choice(4)}, "4 of 8 experts a layer, in the values they have."),
    ],
    ids=["mixed", "merged"],
)
def test_the_sentence_tells_what_was_measured_and_what_was_chosen(choices: dict[str, Choice], words: str) -> None:
    told = reason(curves(), choices, 100, 99)
    least = min(sum(costs) for costs in HALVED.values())
    assert least == sum(HALVED["merge"])
    assert f"halving the experts by merging would cost {least:.2g} of KL" in told
    assert f"and 4 bits {2 * sum(AT_4_BITS):.2g}; therefore {words}" in told
    assert ("some layers as they are" in told) == (choices["a"].w_in is not None)


def test_what_was_not_measured_is_not_told_and_missing_bytes_are() -> None:
    choices = {name: Choice(8, "merge", GRIDS[8], GRIDS[8]) for name in "ab"}
    told = reason(curves((8, 2)), choices, 10_000, 5_000)
    assert "4 bits" not in told
    assert told.endswith("in 8 bits. No candidate comes nearer to 10 kB than 5 kB.")
