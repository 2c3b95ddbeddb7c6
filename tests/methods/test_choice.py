"""What is asked of one layer."""

from collections.abc import Callable

import pytest

from hf_mcsmoe.methods.choice import Choice, Grid


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Grid(5), "bits=5 must be one of 8, 4, 3, 2"),
        (lambda: Grid(4, 0), "group_size=0 must be"),
        (lambda: Choice(0), "experts=0 must be"),
        (lambda: Choice(True), "experts=True must be"),
        (lambda: Choice(4, "drop"), "reduce='drop' must be one of 'merge', 'prune'"),
    ],
)
def test_what_cannot_be_asked_of_a_layer_is_refused(make: Callable[[], object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make()
