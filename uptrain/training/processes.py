"""The processes of a run, and how they wait for each other and agree."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from ...convert.errors import DivergedError, PreemptedError

__all__ = ["Processes", "joined_processes"]

_LONGEST_WAIT = timedelta(days=7)
_LONGEST_COLLECTIVE = timedelta(hours=2)  # in which the first process may be writing a checkpoint


class Processes:
    """The processes that a launcher started for a run, or this one alone."""

    def __init__(self) -> None:
        # without cpu=True accelerate takes the processes of a launcher on a CPU for one each; it keeps the first call's
        self._state = PartialState(cpu=not torch.accelerator.is_available(), timeout=_LONGEST_COLLECTIVE)
        several = self.count > 1
        self._patient = torch.distributed.new_group(backend="gloo", timeout=_LONGEST_WAIT) if several else None

    @property
    def count(self) -> int:
        """The number of processes."""
        return int(self._state.num_processes)

    @property
    def is_first(self) -> bool:
        """Whether this one packs, writes and reports."""
        return bool(self._state.is_main_process)

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return torch.device(self._state.device)

    def wait(self) -> None:
        """Wait until all processes are here."""
        self._state.wait_for_everyone()

    def wait_long(self) -> None:
        """Wait for all processes, one of which packs text or writes a model.

        That may take longer than the time after which a collective of training is given up as hung.
        """
        if self.count > 1:
            torch.distributed.barrier(group=self._patient)

    def everywhere(self, holds: bool) -> bool:
        """Tell whether something holds in all processes."""
        return all(gather_object([holds])) if self.count > 1 else holds

    def least(self, number: int) -> int:
        """Return the smallest of the processes' numbers."""
        return min(gather_object([number])) if self.count > 1 else number


@contextmanager
def joined_processes() -> Iterator[None]:
    """Close the connections between the processes of a launcher at the end of what runs inside, and of the program.

    Left to the interpreter, they are torn down while their threads still run: a process that had done all its work
    then aborts, rarely. After an error that other processes do not share they stay open, since closing could wait.
    """
    try:
        yield
    except (PreemptedError, DivergedError):
        _leave_processes()
        raise
    _leave_processes()


def _leave_processes() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
