"""Groups of layers that are finished: in files, which a later run of the same conversion takes up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..calibration.fitting import FitOutcome
from .prepared import LayerReport, Preparation

__all__ = ["finished_layers", "gram_file", "layer_file", "note_finished"]


def layer_file(layer: int) -> str:
    """Name the file of the tensors that were made of a layer."""
    return f"layer-{layer:05d}.safetensors"


def gram_file(layer: int) -> str:
    """Name the file of the Gram matrix of what the attention of a layer reads."""
    return f"gram-{layer:05d}.safetensors"


def finished_layers(preparation: Preparation, groups: Sequence[tuple[int, ...]]) -> list[LayerReport]:
    """Return the reports of the first groups of layers, as many as an earlier run has finished."""
    work, reports = preparation.work, list[LayerReport]()
    if work is None:
        return reports
    for layers in groups:
        content = work.kept(_part(layers))
        if content is None:
            break
        reports.append(_report(content))
    if reports:
        num_finished = sum(len(report.layers) for report in reports)
        num_layers = sum(len(layers) for layers in groups)
        work.remark(f"{work.path} holds {num_finished} of {num_layers} layers: going on from there")
    return reports


def note_finished(preparation: Preparation, report: LayerReport) -> None:
    """Note that the files of a group of layers are whole, where a later run may take them up."""
    if preparation.work is None:
        return
    files = [layer_file(layer) for layer in report.layers]
    if preparation.keep_gram:
        files += [gram_file(layer) for layer in report.layers]
    preparation.work.keep(_part(report.layers), asdict(report), files)


def _part(layers: tuple[int, ...]) -> str:
    return f"layers-{layers[0]:05d}"


def _report(content: Any) -> LayerReport:
    groups = tuple(tuple(group) for group in content["groups"])
    return LayerReport(
        tuple(content["layers"]),
        groups,
        tuple(content["keys_retained"]),
        tuple(content["values_retained"]),
        tuple(FitOutcome(**fit) for fit in content["fits"]),
    )
