"""What an evaluation found, in a result's model card: as a table for people, and as the hub's index of results."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..convert.describe.card import add_to_card
from ..convert.errors import InputError
from ..convert.printable import printable
from ..convert.record import place_name
from ..convert.text.sources import TextSource, parse_text

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

__all__ = ["add_results"]

_HEADING = "Results"
_GENERATION = ("text-generation", "Text Generation")
# of an evaluation, and of its comparison with the original: the name of a figure, how it is written, what it is called
_ALONE = (("perplexity", "{:.4g}", "perplexity"), ("bits_per_byte", "{:.4f}", "bits per byte"))
_COMPARED = (
    ("excess_nats_per_token", "{:.4f}", "loss above the original, nats per token"),
    ("kl_nats_per_token", "{:.4f}", "KL to the original, nats per token"),
    ("top1_agreement", "{:.1%}", "tokens on which both agree"),
)


def add_results(directory: str | Path, evaluation: Mapping[str, Any]) -> None:
    """Write what an evaluation found into the model card of the result that was evaluated.

    evaluation: what `evaluate --json` prints, with `data` as it was typed. The figures go into the card's text and into
    its metadata, as `model-index`, in the place of those of an earlier call; the manifest gets the card's new digest.
    Raises CheckpointError for a directory without a card, and InputError for what is no such evaluation.
    """
    from huggingface_hub.repocard_data import eval_results_to_model_index

    by_text = _by_text(evaluation)
    results = [*_text_results(by_text), *_task_results(evaluation)]
    index = eval_results_to_model_index(Path(directory).resolve().name, results)
    add_to_card(Path(directory), _HEADING, _text(evaluation, by_text), {"model-index": index})


def _by_text(evaluation: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The figures of each text that was scored, by how it was typed."""
    data = evaluation.get("data")
    texts = [data] if isinstance(data, str) else list(data or ())
    alone = evaluation.get("by_source") or {}
    found = dict(alone) if alone else {str(text): evaluation for text in texts[:1]}
    if not found or not all(isinstance(each.get("perplexity"), float | int) for each in found.values()):
        raise InputError("this is no evaluation, with data and perplexity, as evaluate --json prints it")
    return found


def _source(typed: str) -> tuple[TextSource, str]:
    """A text that was scored, and its name wherever it lies."""
    source = parse_text(typed, TextSource(""))
    return source, place_name(source.location)


def _figures(evaluation: Mapping[str, Any]) -> Iterator[tuple[str, float, str, str]]:
    """Name, value, text and title of each figure that is a number."""
    for figures, values in ((_ALONE, evaluation), (_COMPARED, evaluation.get("against") or {})):
        for name, form, title in figures:
            value = values.get(name)
            if isinstance(value, float | int) and math.isfinite(value):
                yield name, float(value), form.format(value), title


def _text_results(by_text: Mapping[str, Mapping[str, Any]]) -> Iterator[EvalResult]:
    from huggingface_hub import EvalResult

    for typed, evaluation in by_text.items():
        source, place = _source(typed)
        for name, value, _, title in _figures(evaluation):
            yield EvalResult(
                _GENERATION[0],
                task_name=_GENERATION[1],
                dataset_type=place,
                dataset_name=place,
                dataset_config=source.config,
                dataset_split=source.split,
                dataset_revision=source.revision,
                metric_type=name,
                metric_name=title,
                metric_value=value,
            )


def _task_results(evaluation: Mapping[str, Any]) -> Iterator[EvalResult]:
    from huggingface_hub import EvalResult

    for score in evaluation.get("tasks") or ():
        value = score["metrics"][score["metric"]]
        if math.isfinite(value):
            yield EvalResult(
                _GENERATION[0],
                task_name=_GENERATION[1],
                dataset_type=score["dataset"] or score["task"],
                dataset_name=score["task"],
                dataset_config=score["dataset_config"],
                metric_type=score["metric"],
                metric_name=f"{score['metric']}, {score['num_fewshot']}-shot",
                metric_value=float(value),
            )


def _text(evaluation: Mapping[str, Any], by_text: Mapping[str, Mapping[str, Any]]) -> str:
    """The section of the card: a table for each text, one of the tasks, and how it was measured."""
    lines = []
    for typed, alone in by_text.items():
        against = alone.get("against") or {}
        lines += [f"On {_cell(_source(typed)[1])}:", "", "| figure | value |", "|---|---|"]
        if against.get("original_perplexity") is not None:
            lines += [f"| perplexity of the original | {against['original_perplexity']:.4g} |"]
        lines += [*(f"| {title} | {text} |" for _, _, text, title in _figures(alone)), ""]
    if evaluation.get("tasks"):
        lines += ["| task | metric | score | original |", "|---|---|---|---|"]
        for score in evaluation["tasks"]:
            metric, originals = score["metric"], score.get("original_metrics") or {}
            original = f"{originals[metric]:.4f}" if metric in originals else ""
            lines += [f"| {_cell(score['task'])} | {metric} | {score['metrics'][metric]:.4f} | {original} |"]
        lines += [""]
    precision = evaluation.get("dtype")
    how = f", in {precision}" if precision not in (None, "auto") else ""
    return "\n".join([*lines, f"By `kvconvert evaluate`{how}: {evaluation.get('method')}."])


def _cell(text: str) -> str:
    """A name as a cell of a table shows it."""
    return printable(text).replace("|", "\\|")
