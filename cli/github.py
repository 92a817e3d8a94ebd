"""What GitHub Actions shows of a command: a summary of the step, its outputs, and annotations of what failed.

Written where the runner asks for them (GITHUB_STEP_SUMMARY, GITHUB_OUTPUT, GITHUB_ACTIONS), and nothing elsewhere. Of
several processes that a launcher started, only the first writes. https://docs.github.com/actions/reference/workflows
has the formats.
"""

from __future__ import annotations

import html
import math
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..convert.printable import printable
from .console import say

__all__ = [
    "annotate",
    "evaluation_outputs",
    "evaluation_summary",
    "publish_evaluation",
    "write_outputs",
    "write_summary",
]

_SUMMARY_BYTES = 2**20 - 2**10  # the runner drops a whole summary of more than 1 MiB
_FIGURES = (
    ("perplexity", "perplexity", "{:.4g}"),
    ("original_perplexity", "perplexity of the original", "{:.4g}"),
    ("excess", "loss above the original, nats per token", "{:.4f}"),
    ("kl", "KL to the original, nats per token", "{:.4f}"),
    ("top1", "tokens on which both agree", "{:.1%}"),
    ("recovered", "came back since before uptraining", "{:.1%}"),
)
_SHARES = ("max_ppl_increase", "min_recovery")


def publish_evaluation(evaluation: Mapping[str, Any], failures: Sequence[tuple[str, str]], **outputs: object) -> None:
    """Tell GitHub of an evaluation: a table in the step's summary, its figures as outputs, an error for each failure.

    evaluation: what `evaluate --json` prints. failures: the name of each gate that failed, and a sentence about it.
    `outputs` are further outputs of the step, as the directory that was written.
    """
    write_summary(evaluation_summary(evaluation))
    write_outputs({**evaluation_outputs(evaluation), **outputs})
    for name, sentence in failures:
        annotate(sentence, title=f"quality gate {name}")


def write_summary(markdown: str) -> None:
    """Append Markdown to the summary of the step, if there is one; what is beyond 1 MiB is left out, and said to be."""
    path = _place("GITHUB_STEP_SUMMARY")
    if path is None:
        return
    room = _SUMMARY_BYTES - (path.stat().st_size if path.exists() else 0)
    data = f"{markdown.rstrip()}\n\n".encode()
    if len(data) > room:
        data = data[: max(room, 0)].decode(errors="ignore").encode() + "\n\n… the rest is left out\n".encode()
    _append(path, data)


def write_outputs(values: Mapping[str, object]) -> None:
    """Append outputs of the step, if it has them; None is left out. Values may have any characters, and many lines."""
    path = _place("GITHUB_OUTPUT")
    if path is not None:
        _append(path, "".join(_output(name, value) for name, value in values.items() if value is not None).encode())


def annotate(message: str, *, title: str, level: str = "error") -> None:
    """Print an annotation, "error", "warning" or "notice", on stderr, which the runner reads too; nothing elsewhere."""
    if os.environ.get("GITHUB_ACTIONS") == "true" and _is_first_process():
        say(f"::{level} title={_property(title)}::{_data(message)}")


def evaluation_outputs(evaluation: Mapping[str, Any]) -> dict[str, object]:
    """The figures of an evaluation as outputs of a step: those that it has, and whether its gates passed."""
    against, recovery = evaluation.get("against") or {}, evaluation.get("recovery") or {}
    found = {
        "perplexity": evaluation.get("perplexity"),
        "original_perplexity": against.get("original_perplexity"),
        "excess": against.get("excess_nats_per_token"),
        "kl": against.get("kl_nats_per_token"),
        "top1": against.get("top1_agreement"),
        "recovered": recovery.get("recovered"),
    }
    gates = evaluation.get("gates") or ()
    verdict = ("passed" if all(gate["passed"] for gate in gates) else "failed") if gates else None
    return {**{name: value for name, value in found.items() if _is_number(value)}, "gates": verdict}


def evaluation_summary(evaluation: Mapping[str, Any]) -> str:
    """An evaluation as Markdown: what was evaluated on what, a table of figures, and one of gates."""
    outputs = evaluation_outputs(evaluation)
    data = evaluation.get("data")
    texts = [data] if isinstance(data, str) else list(data or ())
    lines = [f"### {_text(evaluation.get('model'))}", "", f"On {', '.join(map(_text, texts))}.", ""]
    lines += _table(
        ("figure", "value"),
        [(title, form.format(outputs[name])) for name, title, form in _FIGURES if name in outputs],
    )
    scores = [
        (_text(score["task"]), score["metric"], f"{score['metrics'][score['metric']]:.4f}")
        for score in evaluation.get("tasks") or ()
    ]
    lines += _table(("task", "metric", "score"), scores)
    lines += _table(("gate", "value", "limit", "verdict"), map(_gate_row, evaluation.get("gates") or ()))
    return "\n".join(lines)


def _gate_row(gate: Mapping[str, Any]) -> tuple[str, ...]:
    form = "{:.1%}" if gate["name"] in _SHARES else "{:.4f}"
    name = gate["name"] if gate.get("task") is None else f"{gate['name']}, {gate['task']}"
    limit = f"at {'least' if gate['name'] == 'min_recovery' else 'most'} {form.format(gate['threshold'])}"
    return _text(name), form.format(gate["value"]), limit, "passed" if gate["passed"] else "**failed**"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table, and an empty one; nothing for no rows."""
    found = [f"| {' | '.join(row)} |" for row in rows]
    rule = f"|{'---|' * len(header)}"
    return [f"| {' | '.join(header)} |", rule, *found, ""] if found else []


def _text(name: object) -> str:
    """A name that others chose, as Markdown shows it."""
    shown = html.escape(printable(str(name)), quote=False)
    return "".join(f"\\{character}" if character in "\\`*_[]|#" else character for character in shown)


def _is_number(value: object) -> bool:
    return isinstance(value, float | int) and math.isfinite(value)


def _output(name: str, value: object) -> str:
    """An output between two lines that no value holds, so that none can pretend to be another output."""
    end = f"end-{secrets.token_hex(16)}"
    return f"{name}<<{end}\n{value}\n{end}\n"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def _place(variable: str) -> Path | None:
    """The file that the runner names, in the first process."""
    path = os.environ.get(variable)
    return Path(path) if path and _is_first_process() else None


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _append(path: Path, data: bytes) -> None:
    """Append to a file of the runner; no evaluation is lost for one that cannot be written."""
    try:
        with path.open("ab") as file:
            file.write(data)
    except OSError as error:
        say(f"{path} could not be written ({error.strerror})")
