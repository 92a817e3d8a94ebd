"""The calibration text that ships: what it is made of, and what it must not hold."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Iterable

import pytest
from kvconvert.configs import CALIBRATION_TEXT, DEMO

WORDS = 13


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    with gzip.open(CALIBRATION_TEXT, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def runs_of_words(texts: Iterable[str]) -> set[tuple[str, ...]]:
    found: set[tuple[str, ...]] = set()
    for text in texts:
        words = re.findall(r"\w+", text.lower())
        found.update(tuple(words[at : at + WORDS]) for at in range(len(words) - WORDS + 1))
    return found


def test_nothing_of_it_is_in_the_demos_held_out_text(rows: list[dict[str, str]]) -> None:
    held_out = [json.loads(line)["text"] for line in (DEMO / "heldout.jsonl").read_text().splitlines()]
    forbidden = runs_of_words(held_out)
    assert not any(runs_of_words([row["text"]]) & forbidden for row in rows)
    assert runs_of_words([held_out[0][:2000].rpartition(" ")[0]]) & forbidden  # the control


def test_its_page_names_every_source_with_its_licence(rows: list[dict[str, str]]) -> None:
    page = (CALIBRATION_TEXT.parent / "README.md").read_text()
    sizes: Counter[tuple[str, str, str]] = Counter()
    for row in rows:
        sizes[row["kind"], row["source"].partition(",")[0], row["licence"]] += len(row["text"])
    table = {f"| {kind} | {source} | {licence} | {size} |" for (kind, source, licence), size in sizes.items()}
    assert table == {line for line in page.splitlines() if re.fullmatch(r"\|.*\| \d+ \|", line)}
    assert f"{len(rows)} passages, {sum(sizes.values())} characters" in page


def test_every_beginning_has_each_kind(rows: list[dict[str, str]]) -> None:
    """A run reads from the beginning as much as it needs, 16 thousand tokens or 131."""
    shares = Counter(row["kind"] for row in rows)
    for length in (100, 200, 400):
        beginning = Counter(row["kind"] for row in rows[:length])
        assert all(abs(beginning[kind] - length * number / len(rows)) <= 1 for kind, number in shares.items())
    assert len(shares) >= 20


def test_it_stays_small(rows: list[dict[str, str]]) -> None:
    assert CALIBRATION_TEXT.stat().st_size <= 1e6
    assert 1e6 <= sum(len(row["text"]) for row in rows) <= 2e6
