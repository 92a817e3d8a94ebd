"""What is done beside training: records, evaluation, checkpoints, and stopping in time."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..convert.checkpoint.output import write_text
from ..convert.errors import PreemptedError
from .data import CorpusPacker
from .models import reshard
from .recipe import Stage

__all__ = ["Checkpoints", "MetricsLog", "PackAhead", "PeriodicEvaluation", "StepProgress", "StopRequests", "Throughput"]

_LEAST_MARGIN_SECONDS = 5.0
_SAME_REQUEST_SECONDS = 3.0


class Throughput:
    """Tokens per second, model FLOPs utilisation and remaining time, from the steps between two readings.

    `peak_flops` is that of all devices together; without it, or without `flops_per_token`, the utilisation is None,
    never a guess. The first reading covers the steps since it was made, with what compiles or warms up in them.
    """

    def __init__(
        self, *, tokens_per_step: int, last_step: int, flops_per_token: float | None, peak_flops: float | None
    ) -> None:
        self._tokens_per_step = tokens_per_step
        self._last_step = last_step
        self._flops_per_token = flops_per_token
        self._peak_flops = peak_flops
        self._at: tuple[int, float] | None = None

    def start(self, step: int) -> None:
        self._at = (step, time.monotonic())

    def leave_out(self, seconds: float) -> None:
        """Do not count time that was not training."""
        if self._at is not None:
            self._at = (self._at[0], self._at[1] + seconds)

    def read(self, step: int) -> dict[str, float | None]:
        now = time.monotonic()
        if self._at is None or step <= self._at[0]:
            return {}
        seconds_per_step = max(now - self._at[1], 1e-9) / (step - self._at[0])
        self._at = (step, now)
        tokens_per_second = self._tokens_per_step / seconds_per_step
        used = None
        if self._flops_per_token is not None and self._peak_flops is not None:
            used = tokens_per_second * self._flops_per_token / self._peak_flops
        return {
            "tokens_per_second": round(tokens_per_second, 1),
            "mfu": None if used is None else round(used, 4),
            "eta_seconds": round((self._last_step - step) * seconds_per_step, 1),
        }


class MetricsLog(TrainerCallback):
    """Appends a stage's records to a JSONL file, with the step counted over the whole run, and hands them to `show`.

    A resumed run first drops the records after the checkpoint that it starts from.
    """

    def __init__(
        self,
        path: Path,
        stage: Stage,
        *,
        tokens_per_step: int,
        throughput: Throughput,
        show: Callable[[dict[str, Any]], object],
    ) -> None:
        self._path = path
        self._stage = stage
        self._tokens_per_step = tokens_per_step
        self._throughput = throughput
        self._show = show
        self._start = time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._throughput.start(state.global_step)
        if not state.is_world_process_zero:
            return
        step = self._stage.first_step + state.global_step
        text = self._path.read_text() if self._path.exists() and step > 0 else ""
        whole_lines = text[: text.rfind("\n") + 1].splitlines()  # a killed run may have torn the last one
        kept = [line for line in whole_lines if json.loads(line)["step"] <= step]
        write_text(self._path, "".join(line + "\n" for line in kept))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == state.max_steps:
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or not ("loss" in logs or "eval_nats_per_token" in logs):
            return
        if state.is_world_process_zero:
            step = self._stage.first_step + state.global_step
            record = {"step": step, "tokens": step * self._tokens_per_step, "stage": self._stage.name, **logs}
            record["seconds"] = round(time.monotonic() - self._start, 1)
            with self._path.open("a") as file:
                file.write(json.dumps(record) + "\n")
            self._show(record)


class StepProgress(TrainerCallback):
    """Tells `progress` how many more steps are done, those before a resume included."""

    def __init__(self, progress: Callable[[int], object]) -> None:
        self._progress = progress

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._progress(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._progress(1)


class PeriodicEvaluation(TrainerCallback):
    """Scores held-out text every `every` steps of the run, before its first and after a stage's last.

    `report`, which receives the record, is the trainer's log. Every process scores the same text, since a sharded model
    runs only in all of them at once.
    """

    def __init__(self, score: Callable[[Any], float], stage: Stage, *, every: int, throughput: Throughput) -> None:
        self.report: Callable[[dict[str, float]], object] = lambda record: None
        self._score = score
        self._stage = stage
        self._every = every
        self._throughput = throughput

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == self._stage.first_step == 0:
            self._run(kwargs["model"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        step = self._stage.first_step + state.global_step
        if step % self._every == 0 or state.global_step == state.max_steps:
            self._run(kwargs["model"])

    def _run(self, model: Any) -> None:
        start = time.monotonic()
        model.eval()
        nats = self._score(model)
        reshard(model)
        model.train()
        self._throughput.leave_out(time.monotonic() - start)
        self.report({"eval_nats_per_token": nats})


class Checkpoints(TrainerCallback):
    """Asks for a checkpoint every `every` steps; after the last one only `at_end`."""

    def __init__(self, every: int, *, at_end: bool, on_save: Callable[[int], object] = lambda step: None) -> None:
        self._every = every
        self._at_end = at_end
        self._on_save = on_save

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        is_last = state.global_step == state.max_steps
        if self._at_end if is_last else state.global_step % self._every == 0:
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._on_save(state.global_step)


class PackAhead(TrainerCallback):
    """Packs a streamed corpus ahead of training, beside it, and deletes what no checkpoint can ask for again.

    Runs in the process that packs. A failure to pack ends training in the step after it. `on_packed` is called when
    packing has come as far as it should for now.
    """

    def __init__(
        self,
        packer: CorpusPacker,
        stage: Stage,
        sequences_per_step: int,
        *,
        on_packed: Callable[[], object] = lambda: None,
    ) -> None:
        self._packer = packer
        self._on_packed = on_packed
        self._first_step = stage.first_step
        self._per_step = sequences_per_step
        self._executor = ThreadPoolExecutor(max_workers=1)
        self._pending: Future[None] | None = None
        self._saved = [stage.first_step]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._saved = [self._first_step + state.global_step]

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._pending is not None and self._pending.done():
            self._pending.result()
            self._pending = None
            self._on_packed()
        if self._pending is None:
            sample = (self._first_step + state.global_step) * self._per_step
            self._pending = self._executor.submit(self._packer.ensure, sample)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._saved = [*self._saved[-1:], self._first_step + state.global_step]
        if self._pending is not None and not self._pending.done():
            return  # the other processes wait; what can be deleted is still there at the next checkpoint
        if self._pending is not None:
            with suppress(PreemptedError):  # told to stop, as training is
                self._pending.result()
            self._pending = None
        self._packer.release(self._saved[0] * self._per_step)  # of the two checkpoints that are kept, the older

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._executor.shutdown()
        self._on_packed()


class StopRequests(TrainerCallback):
    """Ends training with a checkpoint after the step in which a signal came or the time ran out.

    SIGTERM, SIGINT and SIGUSR1 (which Slurm sends ahead of the end) count; another one, some seconds later, ends at
    once. Sooner ones are the same request: launchers pass on what the terminal has sent to every process. Processes
    agree after every step, so that one signal to one of them stops all at the same step. `deadline` is on
    time.monotonic()'s clock; until a checkpoint was saved, one is taken to need `save_seconds`.
    """

    _SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self, *, deadline: float | None = None, save_seconds: float = 0.0) -> None:
        self.reason: str | None = None
        self._received: int | None = None
        self._received_at = 0.0
        self._deadline = deadline
        self._training = False
        self._longest_step = 0.0
        self._save_seconds = save_seconds
        self._saved = False
        self._step_began = self._step_ended = 0.0
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether what is done beside training shall stop: with it, or at once where it has not begun.

        A step may be waiting for text that is packed beside it.
        """
        if self._training:
            return self.reason is not None
        return self._received is not None or self._out_of_time()

    def __enter__(self) -> StopRequests:
        for number in self._SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._received is None:
            self._received, self._received_at = number, now
        elif now - self._received_at > _SAME_REQUEST_SECONDS:
            raise KeyboardInterrupt

    def _out_of_time(self) -> bool:
        if self._deadline is None:
            return False
        # one more step and a checkpoint have to fit
        needed = 2 * (self._longest_step + self._save_seconds)
        return time.monotonic() + max(needed, _LEAST_MARGIN_SECONDS) >= self._deadline

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._training = True

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._step_began = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._step_ended = time.monotonic()
        self._longest_step = max(self._longest_step, self._step_ended - self._step_began)
        own = self._received if self._received is not None else -1 if self._out_of_time() else 0
        told = _agreed(own, args)
        if told and state.global_step < state.max_steps:
            self.reason = "out of time" if told < 0 else f"received {signal.Signals(told).name}"
            control.should_save = True
            control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        seconds = time.monotonic() - self._step_ended
        self._save_seconds = max(self._save_seconds, seconds) if self._saved else seconds
        self._saved = True


def _agreed(own: int, args: TrainingArguments) -> int:
    """The same number in all processes: a signal that any received, else -1 if any is out of time, else 0."""
    if args.world_size == 1:
        return own
    told = torch.tensor([max(own, 0), int(own < 0)], device=args.device)
    torch.distributed.all_reduce(told, op=torch.distributed.ReduceOp.MAX)
    received, out_of_time = told.tolist()
    return int(received) or -int(out_of_time)
