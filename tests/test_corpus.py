"""Inputs that the fuzzer made (scripts/fuzz), replayed: each is read, or refused in words, and nothing else happens."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import fuzz_targets
from fuzz_targets import TARGETS, check, prepare, writes_inside

CORPUS = Path(__file__).parent / "corpus"


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("room")
    prepare(directory)
    return directory


@pytest.mark.parametrize("target", TARGETS)
def test_what_was_found_once_is_refused_in_words(target: str, room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(room))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # of modules that are imported on the way
    inputs = sorted((CORPUS / target).iterdir())
    assert inputs
    with writes_inside(room):
        outcomes = [check(target, path.read_bytes(), room) for path in inputs]
    assert len(set(outcomes)) > 1


def test_the_corpus_is_small() -> None:
    files = [path for path in CORPUS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 200_000
    assert {path.parent.name for path in files} == set(TARGETS)


def test_what_is_no_error_for_people_comes_out(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(data: bytes, room: Path) -> None:
        raise KeyError("a")

    monkeypatch.setattr(fuzz_targets, "TARGETS", {"broken": broken})
    with pytest.raises(KeyError):
        check("broken", b"", room)


def test_what_is_written_outside_comes_out(room: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    with writes_inside(room):
        (room / "inside").write_text("a")
        with pytest.raises(AssertionError, match=r"open .*outside"):
            outside.write_text("a")
        with pytest.raises(AssertionError, match=r"os\.rename"):
            shutil.move(room / "inside", outside)
    outside.write_text("a")  # the hook is silent again
