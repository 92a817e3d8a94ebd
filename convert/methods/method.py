"""What every way of converting a checkpoint does, step by step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Self

from ..architectures.source import Source
from ..checkpoint.tensors import Checkpoint
from ..plan import ConversionPlan
from .prepared import CPU, Hardware, Measurements, Preparation, Prepared

__all__ = ["Method"]


class Method(ABC):
    """Frozen settings of a conversion, and its steps: `check`, `resolve`, `plan` and `prepare`, in this order.

    A plan needs no tensor, so that what it will take of the disk is known before anything is measured; what has to be
    chosen by measurement (`needs_choice`) is chosen before the plan is made, and the tensors that the plan reads beside
    the source's are prepared after it.
    """

    @property
    def needs_measurements(self) -> bool:
        """Whether the result depends on what is measured on a text."""
        return False

    @property
    def text_need(self) -> str | None:
        """Why statistics of a text, or the weights alone, do not do in place of the text, if they do not."""
        return None

    @property
    def needs_choice(self) -> bool:
        """Whether something has to be chosen by measurement before there can be a plan."""
        return False

    @property
    def takes_statistics(self) -> bool:
        """Whether statistics of a text do as well as the text itself."""
        return False

    @abstractmethod
    def source(self, checkpoint: Checkpoint) -> Source:
        """The checkpoint in a class that can become the result. Raises UnsupportedError where there is none."""

    @abstractmethod
    def suffix(self, source: Source) -> str:
        """What the name of a result ends with."""

    @abstractmethod
    def check(self, source: Source) -> None:
        """Raise an InputError for what cannot be done, before anything is measured."""

    def resolve(
        self,
        source: Source,
        measurements: Measurements = None,
        hardware: Hardware = CPU,
        progress: Callable[[int], object] = lambda num_layers: None,
    ) -> Self:
        """The settings with nothing left open; what `needs_choice` leaves open is chosen on the measurements."""
        return self

    @property
    def choice(self) -> Any:
        """What `resolve` has chosen by measurement, as a value of JSON; None where there is nothing to choose."""
        return None

    def with_choice(self, choice: Any) -> Self:
        """The settings with what `resolve` has chosen for them before, in a run that was ended."""
        raise ValueError(f"{type(self).__name__} chooses nothing by measurement")

    @abstractmethod
    def plan(self, source: Source) -> ConversionPlan:
        """The plan for this source. Raises as `check` does, and ValueError before what is open is resolved."""

    @abstractmethod
    def prepare(self, source: Source, preparation: Preparation) -> Prepared:
        """Make the tensors that the plan reads beside the source's, if any, layer by layer."""

    @abstractmethod
    def record(self, measurements: Measurements, hardware: Hardware) -> dict[str, Any]:
        """How the tensors were made, for the manifest."""
