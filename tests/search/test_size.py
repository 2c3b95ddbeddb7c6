"""Sizes as people write them, and what is refused."""

import math

import pytest

from hf_mcsmoe.search.size import bytes_of, bytes_text, parse_size

SIZES = {
    "20GB": 20_000_000_000,
    "1.5 GB": 1_500_000_000,
    "800MB": 800_000_000,
    "500kB": 500_000,
    "500KB": 500_000,
    "12345678B": 12_345_678,
    "2TB": 2_000_000_000_000,
    "0.25": 0.25,
    ".5": 0.5,
}
REFUSED = {
    "0": "no share between 0 and 1",
    "2": "for 2 bytes write 2B",
    "1.0": "no share between 0 and 1",
    "0GB": "less than one byte",
    "0.5B": "less than one byte",
    "-1GB": "is no size",
    "5 apples": "no known unit",
    "1e30": "is no size",
    "nan": "is no size",
    "inf": "is no size",
    "": "is no size",
    "GB": "is no size",
    "20GiB": "write 21.47GB",
    "20gb": "write 20GB",
    "1Mb": "write 1MB",
    "50%": "write 0.5",
    "200%": "no known unit",
    "1GB2": "is no size",
}


@pytest.mark.parametrize(("text", "meant"), SIZES.items())
def test_sizes_are_read_as_written(text: str, meant: float) -> None:
    size = parse_size(text)
    assert size == meant
    assert type(size) is type(meant)


@pytest.mark.parametrize(("text", "words"), REFUSED.items())
def test_what_is_no_size_is_refused_with_the_way_to_write_it(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        parse_size(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, 1.0, -0.5, 12_345_678, None, True])
def test_a_number_that_is_no_share_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"give bytes, as 20GB"):
        parse_size(value)


def test_a_share_is_one_of_the_source() -> None:
    assert bytes_of("0.25", 1001) == 250
    assert bytes_of(0.25, 1001) == 250
    assert bytes_of("1kB", 1001) == 1000


@pytest.mark.parametrize("size", ["1001B", "5GB"])
def test_with_a_size_that_the_source_has_nothing_is_to_be_done(size: str) -> None:
    with pytest.raises(ValueError, match="nothing is to be done"):
        bytes_of(size, 1001)


@pytest.mark.parametrize(("count", "text"), [(5, "5 B"), (12_345_678, "12.35 MB"), (2 * 10**10, "20 GB")])
def test_bytes_are_told_in_the_unit_that_fits(count: int, text: str) -> None:
    assert bytes_text(count) == text
