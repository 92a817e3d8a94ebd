"""The runs that soak.py ends: tiny conversions and uptrainings. They import torch, which makes forks slow."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from kvconvert.convert import Calibration, Gqa, convert
from kvconvert.convert.algebra.attention_shape import AttentionShape
from kvconvert.convert.calibration import statistics
from kvconvert.convert.calibration.statistics import LayerStatistics, StatisticsOrigin
from kvconvert.uptrain import UptrainSettings, run, uptrain
from kvconvert.uptrain.rundir import publish, workdir

sys.path.append(str(Path(__file__).parents[1] / "tests"))
torch.set_num_threads(1)  # processes are forked after it has been used

__all__ = [
    "OF_PUBLISHING",
    "OF_STATISTICS",
    "conversion",
    "placed",
    "save_statistics",
    "statistics_command",
    "trained_run",
    "uptrain_command",
    "uptraining",
]

OF_STATISTICS = {statistics.__file__}
OF_PUBLISHING = {publish.__file__, workdir.__file__}
_SHAPE = AttentionShape(hidden_size=8, num_attention_heads=2, num_key_value_heads=2, head_dim=4, windows=(None, None))
_TEXT = '{"text": "It was the best of times, it was the worst of times, it was the age of wisdom."}\n'
_MODEL, _DATA = "MODEL", "TEXT"


def save_statistics(path: Path) -> None:
    """Write a small file of statistics."""
    size = _SHAPE.hidden_size + 1
    gram = torch.arange(size * size, dtype=torch.float64).view(size, size)
    statistics.save_statistics(path, LayerStatistics(StatisticsOrigin("model", "text", 1), lambda layer: gram), _SHAPE)


def _sources(folder: Path) -> tuple[Path, Path]:
    """A tiny model with its tokenizer, and a text."""
    from conftest import build_model, build_tokenizer

    model, text = folder / "model", folder / "text.jsonl"
    if not model.exists():
        build_model().save_pretrained(model)
        build_tokenizer().save_pretrained(model)
        text.write_text(_TEXT * 200)
    return model, text


def conversion(folder: Path) -> Callable[[Path], object]:
    """Convert a tiny model on text and keep the statistics, into another folder."""
    model, text = _sources(folder)

    def act(place: Path) -> None:
        measured = Calibration(
            text, num_tokens=256, sequence_length=64, precision="fp32", device="cpu", save_statistics=place / "kept"
        )
        convert(model, Gqa(2, merge="svd"), place / "out", calibration=measured)

    return act


def uptraining(folder: Path) -> Callable[[Path], object]:
    """Uptrain a tiny converted model, into another folder."""
    model, text = _sources(folder)
    student = convert(model, Gqa(2), folder / "student").output
    settings = UptrainSettings(sequence_length=32, global_batch_tokens=128)

    def act(place: Path) -> None:
        uptrain(student, data=text, teacher=model, steps=2, output=place / "out", settings=settings)

    return act


class _TrainedError(Exception):
    """Ends a run before its result is published."""


def trained_run(folder: Path, output: Path) -> Callable[[], object]:
    """Train a tiny run up to its end; what is returned publishes its result and removes its work directory."""
    taken: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def take(*arguments: Any, **options: Any) -> None:
        taken.append((arguments, options))
        raise _TrainedError

    with patch.object(run, "publish", take), suppress(_TrainedError):
        uptraining(folder)(output.parent)
    (arguments, options) = taken[0]

    def publish_and_remove() -> None:
        publish.publish(*arguments, **options)
        workdir.remove_work(arguments[0])

    return publish_and_remove


def statistics_command(model: str, text: str) -> list[str]:
    """A conversion that keeps statistics; where, `placed` says."""
    calibration = ["--calibration", text, "--calibration-tokens", "2048"]
    return ["mha2mqa", model, "--method", "svd", *calibration, "--save-statistics", "STATISTICS"]


def uptrain_command(text: str) -> list[str]:
    """A short uptraining run of a tiny model, which `placed` makes."""
    return ["uptrain", _MODEL, "--data", text, "--steps", "4", "--sequence", "32", "--batch-tokens", "128"]


def placed(arguments: Sequence[str], folder: Path) -> list[str]:
    """A command with the places that it reads and writes in a folder."""
    places = {"STATISTICS": folder / "place" / "statistics"}
    if _MODEL in arguments:
        model, _ = _sources(folder)
        places[_MODEL] = convert(model, Gqa(2), folder / "student").output
    return [str(places.get(argument, argument)) for argument in arguments]
