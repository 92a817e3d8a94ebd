"""The report of a run: Markdown, and one HTML page with everything in it."""

from __future__ import annotations

import base64
import json
import re
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..convert.checkpoint.files import write_text
from ..convert.describe.card import add_recipe
from ..convert.methods.prepared import LayerReport
from ..convert.printable import printable
from ..measure.card_results import add_results
from .recipe_file import recipe_text
from .recipe_schema import Recipe
from .run_records import RunStatus
from .run_stages import EVALUATION_NAME, PICTURES, UPTRAINED
from .story import Story, story_of

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["render_report", "write_report"]

MARKDOWN_NAME, PAGE_NAME = "report.md", "report.html"
_METRICS_NAME = "metrics.jsonl"


def write_report(place: Path, recipe: Recipe, status: RunStatus, resolved: str, model: Path) -> tuple[Path, ...]:
    """Write the report of a run whose stages are done, with its pictures, and return the files.

    The model card of what the run has made gets the figures and the recipe, which is written beside the weights too.
    """
    story = story_of(place, recipe, status, resolved, model)
    pictures = _draw(place, status) if recipe.report.pictures else {}
    for name, text in render_report(story, pictures).items():
        write_text(place / name, text)
    if model.absolute().parent == place.absolute():  # which this run has made
        if "evaluate" in status.stages:
            add_results(model, json.loads((place / EVALUATION_NAME).read_text()))
        heading = resolved.partition("model:")[0].replace("# ", "").strip()
        add_recipe(model, recipe_text(recipe.model_copy(update={"output": None}), model, heading))
    return tuple(place / name for name in (MARKDOWN_NAME, PAGE_NAME))


def render_report(story: Story, pictures: dict[str, Path]) -> dict[str, str]:
    """The two texts of a report, by the names of their files; `pictures` are PNG files by their names in the story.

    The page holds its pictures and asks for nothing: no network, no script. A picture that is not there is left out.
    """
    embedded = {name: base64.b64encode(path.read_bytes()).decode() for name, path in pictures.items()}
    about = {"story": story, "version": version("kvconvert"), "pictures": set(pictures), "folder": PICTURES}
    return {
        MARKDOWN_NAME: _templates(escapes=False).get_template("report.md.j2").render(about),
        PAGE_NAME: _templates(escapes=True).get_template("report.html.j2").render(about | {"embedded": embedded}),
    }


def _templates(*, escapes: bool) -> Environment:
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    folder = files(__package__) / "templates"
    found = Environment(
        loader=FunctionLoader(lambda name: (folder / name).read_text(encoding="utf-8")),
        autoescape=escapes,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    found.filters |= {"cell": _cell, "shown": _shown, "fence": _fence, "is_number": _is_number}
    return found


def _shown(text: str) -> str:
    """A text from a file as it may be shown, line by line: what would steer a terminal is escaped."""
    return "\n".join(map(printable, text.split("\n")))


def _cell(text: str) -> str:
    """A text as Markdown takes it in a cell or a line, none of its signs being one of Markdown."""
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", printable(text.replace("\n", " ⏎ ")))


def _fence(text: str) -> str:
    """What encloses a block of code, longer than any of its own runs of backticks."""
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    return "`" * max(3, longest + 1)


def _is_number(cell: str) -> bool:
    return re.match(r"[+-]?\d", cell) is not None


def _draw(place: Path, status: RunStatus) -> dict[str, Path]:
    """Draw what the stages measured; the picture of decoding is there since it was timed."""
    from ..measure.pictures import draw_quality, draw_retention, draw_training

    folder = place / PICTURES
    folder.mkdir(exist_ok=True)
    found: dict[str, Path] = {}
    conversion: Any = status.stages["convert"].summary if "convert" in status.stages else None
    evaluation = json.loads((place / EVALUATION_NAME).read_text()) if "evaluate" in status.stages else None
    if conversion and evaluation and evaluation["against"]:
        found["quality.png"] = folder / "quality.png"
        draw_quality(found["quality.png"], *_points(conversion, evaluation))
    if conversion and conversion["layers"]:
        found["layers.png"] = folder / "layers.png"
        draw_retention(found["layers.png"], [LayerReport.from_json(layer) for layer in conversion["layers"]])
    if "uptrain" in status.stages:
        losses, held_out = _curves(place / UPTRAINED / _METRICS_NAME)
        if losses:
            found["training.png"] = folder / "training.png"
            draw_training(found["training.png"], status.stages["uptrain"].summary["objective"], losses, held_out)
    if "benchmark" in status.stages and (folder / "decode.png").exists():
        found["decode.png"] = folder / "decode.png"
    return found


def _points(conversion: Any, evaluation: Any) -> tuple[Any, list[Any]]:
    from ..measure.pictures import Point

    cache, against, recovery = conversion["cache_bytes_per_token"], evaluation["against"], evaluation["recovery"]
    now, error = against["excess_nats_per_token"], against["excess_standard_error"]
    before, after = (recovery["before_excess_nats_per_token"], now) if recovery else (now, None)
    label = f"{conversion['target'].upper()}, {conversion['method']}"
    return Point("original", cache["source"], 0.0), [Point(label, cache["result"], before, after, error)]


def _curves(metrics: Path) -> tuple[list[tuple[int, float]], Any]:
    """The training loss over tokens, and the perplexity of held-out text where it was scored."""
    import math

    from ..measure.pictures import Curve

    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    losses = [(each["tokens"], each["loss"]) for each in records if each.get("loss") is not None]
    scored = [each for each in records if each.get("eval_nats_per_token") is not None]
    if len(scored) < 2:
        return losses, None
    perplexities = [math.exp(each["eval_nats_per_token"]) for each in scored]
    return losses, Curve("Text held out of the training", [each["tokens"] for each in scored], perplexities)
