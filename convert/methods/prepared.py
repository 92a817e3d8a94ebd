"""What a method is given, and what it makes, before its plan can be carried out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..calibration.fitting import FitOutcome
from ..calibration.statistics import LayerStatistics
from ..calibration.streams import CPU, Hardware
from ..calibration.text import CalibrationText
from ..checkpoint.overlay import Overlay
from ..checkpoint.work_directory import WorkDirectory

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CPU", "Hardware", "LayerReport", "Measurements", "Preparation", "Prepared"]

Measurements = CalibrationText | LayerStatistics | None
"""What a merge knows of the inputs: text, statistics that were measured on one, or nothing, so that they are taken for
white."""


@dataclass(frozen=True)
class Preparation:
    """What a method prepares tensors from, where, and on what hardware.

    The tensors lie in files in `scratch`, a directory that exists. With `keep_gram` the Gram matrices of what each
    layer's attention reads are kept there too, where they are measured. `progress` is called with 1 after each layer.
    With `work`, a work directory that is `scratch`, layers that an earlier run has finished there are taken from it.
    """

    scratch: Path
    measurements: Measurements = None
    hardware: Hardware = CPU
    keep_gram: bool = False
    progress: Callable[[int], object] = lambda num_layers: None
    work: WorkDirectory | None = None


@dataclass(frozen=True)
class LayerReport:
    """The groups of heads that were merged, and the fraction of energy that keys and values of each kept.

    `layers` share keys and values, which the first computes. Heads are numbered through all of them. `fits` says of
    each layer what gradient steps did to its error on text kept aside, `relative_error` of hidden states once attention
    is added; of the first one to the sum over all. It is empty where there were no steps.
    """

    layers: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]
    keys_retained: tuple[float, ...]
    values_retained: tuple[float, ...]
    fits: tuple[FitOutcome, ...] = ()

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> LayerReport:
        """The report that `asdict` made into an object."""
        return cls(
            layers=tuple(content["layers"]),
            groups=tuple(map(tuple, content["groups"])),
            keys_retained=tuple(content["keys_retained"]),
            values_retained=tuple(content["values_retained"]),
            fits=tuple(FitOutcome(**fit) for fit in content["fits"]),
        )


@dataclass(frozen=True)
class Prepared:
    """The tensors that a plan reads beside the source's, and a report of how they were made for each merge of heads.

    `gram` gives the Gram matrix of a layer's attention input, (hidden_size + 1, hidden_size + 1), if it was kept.
    """

    overlay: Overlay | None = None
    reports: tuple[LayerReport, ...] = ()
    gram: Callable[[int], Tensor] | None = None
