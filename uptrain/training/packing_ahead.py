"""Text that is packed beside training, ahead of it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...convert.errors import PreemptedError
from ..data.packing import CorpusPacker
from ..recipe import Stage

__all__ = ["PackAhead"]


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
