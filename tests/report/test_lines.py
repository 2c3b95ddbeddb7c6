"""Lines of methods: every point and name inside the drawing, names apart and in the order of the lines' ends."""

import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest

from hf_mcsmoe.report.lines import PITCH, Curve, apart, lines
from hf_mcsmoe.report.svg import WIDTH

CASES = {
    "one point": [Curve("reap", [(5e6, 0.1)])],
    "one size": [Curve(name, [(5e6, value)]) for name, value in (("a", 0.1), ("b", 0.1), ("c", 3.0))],
    "nothing lost": [Curve("a", [(1e6, 0.0), (2e6, -1e-9)]), Curve("b", [(1e6, 1e-3), (2e6, 1e-4)])],
    "many": [
        Curve(f"method-of-a-long-name-{n}", [(1e6 * k, 0.01 * (n % 3 + 1) / k) for k in (1, 2, 3)]) for n in range(24)
    ],
}


@pytest.mark.parametrize("case", CASES)
def test_all_is_inside_and_names_are_apart(case: str) -> None:
    curves = CASES[case]
    image = lines("Lines", curves, range(len(curves)), ("{:.0f}".format, "{:g}".format), ("bytes", "KL"))
    drawing = ElementTree.fromstring(str(image))
    height = float(drawing.get("viewBox", "").split()[3])
    for path in drawing.iter("path"):
        numbers = re.findall(r"[ML]([\d.-]+) ([\d.-]+)", path.get("d", ""))
        assert all(0 <= float(x) <= WIDTH and 0 <= float(y) <= height for x, y in numbers)
    names = [item for item in drawing.iter("text") if "name" in item.get("class", "")]
    assert len(names) == len(curves)
    assert all(float(item.get("x", "")) + 5.2 * len(item.text or "") <= WIDTH for item in names)
    places = [float(item.get("y", "")) for item in names]
    assert all(later - earlier >= PITCH - 0.11 for earlier, later in pairwise(places))
    ends = {curve.name[-12:]: max(curve.points)[1] for curve in curves}
    values = [ends[(item.text or "")[-12:]] for item in names]
    assert values == sorted(values, reverse=True) or case == "nothing lost"


def test_places_are_moved_apart_no_further_than_they_must() -> None:
    assert apart([10, 50, 90], 10, 0, 100) == [10, 50, 90]
    assert apart([50, 50, 50], 10, 0, 100) == [50, 60, 70]
    assert apart([95, 96, 97], 10, 0, 100) == [80, 90, 100]
