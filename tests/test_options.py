from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kvconvert.convert.errors import InputError
from kvconvert.pipeline.values import parse_count, parse_duration


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("1B", 1_000_000_000),
        ("300M", 300_000_000),
        ("2T", 2_000_000_000_000),
        ("1.5e9", 1_500_000_000),
        ("299_892_736_000", 299_892_736_000),
        ("0.3b", 300_000_000),
        ("64k", 64_000),
        (" 7 ", 7),
        ("2.3B", 2_300_000_000),  # 2.3e9 as a float product is 2299999999.9999995
    ],
)
def test_counts(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "B", "-1B", "0", "1.5", "1,5B", "1_B", "1__0", "1e-3", "1BB", "1G", "5%", "nan"])
def test_what_is_no_count(text: str) -> None:
    with pytest.raises(InputError, match=r"is not a count; write for example 300M, 1B or 1\.5e9"):
        parse_count(text)


@given(st.integers(1, 10**18), st.sampled_from(["", "K", "M", "B", "T"]))
def test_every_count_reads_back(number: int, unit: str) -> None:
    scale = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}[unit]
    assert parse_count(f"{number}{unit}") == number * scale
    assert parse_count(f"{number:_}") == number
    whole, thousandths = divmod(number, 1000)
    if unit:
        assert parse_count(f"{whole}.{thousandths:03d}{unit}") == number * scale // 1000


@pytest.mark.parametrize(
    ("text", "seconds"), [("5h45m", 20_700), ("90s", 90), ("1d", 86_400), ("30m", 1_800), ("1D2h3M4s", 93_784)]
)
def test_durations(text: str, seconds: int) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0s", "90", "45m5h", "1h1h", "-1h", "1.5h", "5 h", "1w"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(InputError, match="is not a duration; write for example 5h45m, 30m or 90s"):
        parse_duration(text)


@given(st.integers(1, 10**8))
def test_every_duration_reads_back(seconds: int) -> None:
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "m"), (rest, "s")]
    assert parse_duration("".join(f"{number}{unit}" for number, unit in parts if number)) == seconds
    assert parse_duration(f"{seconds}s") == seconds
