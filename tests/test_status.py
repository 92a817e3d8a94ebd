from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import KilledError, Train
from kvconvert.convert.errors import DataError, DivergedError, InputError, OutputError, PreemptedError
from kvconvert.convert.text.tokens import encode_batch
from kvconvert.uptrain.data import documents, packing
from kvconvert.uptrain.losses import prediction
from kvconvert.uptrain.observation import Observation
from kvconvert.uptrain.rundir import status as status_room
from kvconvert.uptrain.rundir.status import STATUS_NAME, RunStatus, read_status, status_of_error, write_status

STATUS = RunStatus(
    state="running",
    exit_code=None,
    step=3,
    steps=6,
    tokens=384,
    reason=None,
    last_checkpoint="out.uptraining/checkpoints/main/checkpoint-2",
    resume_command="kvconvert uptrain model",
    process_id=7,
)


@pytest.mark.parametrize(
    ("error", "state", "exit_code", "reason"),
    [
        (PreemptedError("stopped at\n step 3"), "preempted", 75, "stopped at step 3"),
        (DivergedError("loss is nan"), "diverged", 4, "loss is nan"),
        (OutputError("the disk is full"), "failed", 2, "the disk is full"),
        (KeyboardInterrupt(), "interrupted", 130, "KeyboardInterrupt"),
        (SystemExit(1), "interrupted", 143, "SystemExit: 1"),
        (RuntimeError("CUDA out of memory"), "failed", 1, "RuntimeError: CUDA out of memory"),
        (MemoryError(), "failed", 2, "MemoryError"),
    ],
)
def test_the_status_of_an_error(error: BaseException, state: str, exit_code: int, reason: str) -> None:
    found = status_of_error(STATUS, error)
    assert found == replace(STATUS, state=state, exit_code=exit_code, reason=reason)


def test_a_status_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_status(tmp_path) is None
    write_status(tmp_path, STATUS)
    assert read_status(tmp_path) == STATUS
    assert json.loads((tmp_path / STATUS_NAME).read_text())["exit_code"] is None
    assert [path.name for path in tmp_path.iterdir()] == [STATUS_NAME]


def status(folder: Path) -> RunStatus:
    found = read_status(folder)
    assert found is not None
    return found


def watch(**fields: Any) -> Observation:
    return Observation(**{"save_steps": 2, "log_steps": 1, "command": "kvconvert uptrain m", **fields})


def stop_after(steps: int, error: BaseException) -> Any:
    done = 0

    def progress(num_steps: int) -> None:
        nonlocal done
        done += num_steps
        if done == steps:
            raise error

    return progress


def test_a_finished_run(train: Train) -> None:
    found = status(train("out", watch=watch()))
    assert (found.state, found.exit_code, found.step, found.steps, found.tokens) == ("finished", 0, 6, 6, 6 * 4 * 32)
    assert (found.reason, found.last_checkpoint, found.resume_command) == (None, None, "kvconvert uptrain m")


def test_a_run_that_is_stopped_while_packing_and_goes_on(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "out.uptraining"
    monkeypatch.setattr(documents, "_ENCODE_BATCH", 2)  # it may stop after each batch
    packed: list[str] = []
    encode = encode_batch

    def spy(*args: Any, **kwargs: Any) -> Any:
        packed.append(status(work).state)
        return encode(*args, **kwargs)

    monkeypatch.setattr(packing, "encode_batch", spy)
    with pytest.raises(PreemptedError, match="stopped while packing; what is done is in "):
        train("out", watch=watch(deadline=0.0))
    found = status(work)
    assert (found.state, found.exit_code, found.step, found.last_checkpoint) == ("preempted", 75, 0, None)
    assert packed == ["running"]
    seen: list[RunStatus] = []
    train("out", watch=watch(progress=lambda num_steps: seen.append(status(work))))
    assert set(packed) == {"running"}  # again, not as the one before has ended
    assert {(row.state, row.exit_code, row.reason) for row in seen} == {("running", None, None)}
    assert [row.step for row in seen] == [0, 0, 1, 2, 3, 4, 5]  # as of the record before


def test_a_preempted_run(train: Train, tmp_path: Path) -> None:
    def terminate(num_steps: int) -> None:
        if num_steps:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(PreemptedError) as raised:
        train("out", watch=watch(progress=terminate))
    work = tmp_path / "out.uptraining"
    assert str(raised.value) == f"stopped at step 1 of 6 (received SIGTERM); saved in {work}"
    assert status(work) == RunStatus(
        state="preempted",
        exit_code=75,
        step=1,
        steps=6,
        tokens=128,
        reason=str(raised.value),
        last_checkpoint=str(work / "checkpoints/main/checkpoint-1"),
        resume_command="kvconvert uptrain m",
        process_id=os.getpid(),
    )


def test_a_failed_run(train: Train, tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        train("out", watch=watch(progress=stop_after(5, KilledError("power"))))
    found = status(tmp_path / "out.uptraining")
    assert (found.state, found.exit_code, found.reason) == ("failed", 1, "KilledError: power")
    assert (found.step, found.tokens) == (4, 4 * 4 * 32)
    assert found.last_checkpoint == str(tmp_path / "out.uptraining/checkpoints/main/checkpoint-4")


def test_a_diverged_run_names_the_last_good_checkpoint(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, loss_sum = 0, prediction.prediction_loss_sum

    def poisoned(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return loss_sum(*args) * (float("nan") if calls > 3 else 1.0)

    monkeypatch.setattr(prediction, "prediction_loss_sum", poisoned)
    checkpoint = tmp_path / "out.uptraining/checkpoints/main/checkpoint-2"
    with pytest.raises(DivergedError, match=f"the last good checkpoint is {checkpoint}$"):
        train("out", watch=watch())
    found = status(tmp_path / "out.uptraining")
    assert (found.state, found.exit_code, found.step, found.last_checkpoint) == ("diverged", 4, 3, str(checkpoint))


def test_a_full_disk_is_noted_over_the_status_that_is_there(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path, status: RunStatus) -> None:
        if status.state != "running":
            raise OSError(28, "No space left on device")
        write_status(folder, status)

    monkeypatch.setattr(status_room, "write_status", fail)
    full = OSError(28, "No space left on device", str(tmp_path / "out.uptraining" / ".a.partial-7"))
    with pytest.raises(OutputError) as raised:
        train("out", watch=watch(progress=stop_after(1, full)))
    found = status(tmp_path / "out.uptraining")
    assert (found.state, found.exit_code) == ("failed", 2)
    assert (
        found.reason
        == str(raised.value)
        == f"{tmp_path / 'out'}.uptraining: the disk is full (No space left on device)"
    )
    monkeypatch.setattr(status_room, "_overwrite_status", fail)
    with pytest.raises(KilledError):  # the control: what cannot be written at all hides no error
        train("other", watch=watch(progress=stop_after(1, KilledError())))
    assert status(tmp_path / "other.uptraining").state == "running"


def test_text_that_cannot_be_packed_leaves_no_status(train: Train, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("It was.")
    with pytest.raises(DataError):
        train("out", data=tmp_path / "short.txt")
    with pytest.raises(InputError):
        train("out", data=tmp_path / "absent.txt")
    assert not list(tmp_path.glob("out*"))
