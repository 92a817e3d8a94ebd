"""When checkpoints are saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

__all__ = ["Checkpoints"]


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
