from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from kvconvert.uptrain.rundir.checkpoints import MARKER_NAME, finish_checkpoint, last_complete, remove_torn, step_of


def save(folder: Path, step: int) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    (checkpoint / "shards").mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(b"w" * step)
    (checkpoint / "shards" / "0.distcp").write_bytes(b"s" * 7)
    finish_checkpoint(checkpoint)
    return checkpoint


def lose_marker(checkpoint: Path) -> None:
    (checkpoint / MARKER_NAME).unlink()


def damage_marker(checkpoint: Path) -> None:
    text = (checkpoint / MARKER_NAME).read_text()
    (checkpoint / MARKER_NAME).write_text(text[: len(text) // 2])


def empty_marker(checkpoint: Path) -> None:
    (checkpoint / MARKER_NAME).write_text("[]")


def truncate(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").write_bytes(b"w")


def lose_file(checkpoint: Path) -> None:
    (checkpoint / "shards" / "0.distcp").unlink()


def add_file(checkpoint: Path) -> None:
    (checkpoint / "shards" / "1.distcp").write_bytes(b"s")


@pytest.mark.parametrize("tear", [lose_marker, damage_marker, empty_marker, truncate, lose_file, add_file])
def test_a_torn_checkpoint_is_ignored_and_removed(tear: Callable[[Path], None], tmp_path: Path) -> None:
    before, newest = save(tmp_path, 9), save(tmp_path, 10)
    assert last_complete(tmp_path) == newest
    tear(newest)
    assert last_complete(tmp_path) == before
    assert remove_torn(tmp_path) == [newest]
    assert not newest.exists()
    assert last_complete(tmp_path) == before


def test_without_a_complete_checkpoint_there_is_none(tmp_path: Path) -> None:
    assert last_complete(tmp_path / "absent") is None
    lose_marker(save(tmp_path, 1))
    assert last_complete(tmp_path) is None


def test_the_last_two_are_kept_in_the_order_of_steps(tmp_path: Path) -> None:
    for step in (8, 9, 10, 11):
        save(tmp_path, step)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "checkpoint-10", tmp_path / "checkpoint-11"]
    newest = last_complete(tmp_path)
    assert newest is not None
    assert step_of(newest) == 11


def test_a_torn_one_does_not_push_a_complete_one_out(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    truncate(tmp_path / "checkpoint-2")
    save(tmp_path, 3)
    assert remove_torn(tmp_path) == [tmp_path / "checkpoint-2"]
    assert sorted(tmp_path.iterdir()) == [tmp_path / "checkpoint-1", tmp_path / "checkpoint-3"]


def test_one_that_is_half_removed_is_not_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine dies in the removal, before any file is gone."""
    save(tmp_path, 1)
    save(tmp_path, 2)

    class DiedError(Exception):
        pass

    def die(path: Path) -> None:
        raise DiedError

    monkeypatch.setattr(shutil, "rmtree", die)
    with pytest.raises(DiedError):
        save(tmp_path, 3)
    monkeypatch.undo()
    assert (tmp_path / "checkpoint-1" / "model.safetensors").exists()
    assert remove_torn(tmp_path) == [tmp_path / "checkpoint-1"]
    assert last_complete(tmp_path) == tmp_path / "checkpoint-3"


def test_copies_that_somebody_made_are_left_alone(tmp_path: Path) -> None:
    shutil.copytree(save(tmp_path, 1), tmp_path / "checkpoint-1-copy")
    lose_marker(tmp_path / "checkpoint-1-copy")
    assert last_complete(tmp_path) == tmp_path / "checkpoint-1"
    assert remove_torn(tmp_path) == []
    assert (tmp_path / "checkpoint-1-copy").exists()
