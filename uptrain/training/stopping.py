"""Signals and deadlines: a run that is stopped saves a checkpoint first."""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

__all__ = ["StopRequests"]


_LEAST_MARGIN_SECONDS = 5.0
_SAME_REQUEST_SECONDS = 3.0


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
        """Whether work outside the training loop, packing say, should stop now."""
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
