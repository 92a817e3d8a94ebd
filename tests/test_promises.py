"""The page of promises names tests that are there."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "promises.md"


def test_every_promise_has_its_test() -> None:
    sources = "\n".join(path.read_text() for path in TESTS.glob("test_*.py"))
    functions = set(re.findall(r"^def (test_\w+)", sources, re.MULTILINE))
    rows = [row for row in PAGE.read_text().splitlines() if row.startswith("| ") and not row.startswith("| promise")]
    assert len(rows) >= 17
    for row in rows:
        named = re.findall(r"`(tests/)?(test_\w+)(\.py)?`", row.split("|")[2])
        assert named, row
        for folder, name, suffix in named:
            assert (TESTS / f"{name}.py").exists() if folder and suffix else name in functions, name
