"""Pictures of conversions: recovery, quality against cache, recipes, what merges kept, decode time.

The only module that imports matplotlib, which the extra `plot` installs. Each picture is opaque and white with dark
lines, legible on light and dark pages; colours are those of Okabe and Ito, which colour-blind people tell apart, and
never the only difference between two lines. A picture is PNG or SVG, as the suffix of its path says.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..convert.checkpoint.files import replaced_file
from ..convert.errors import InputError, OutputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    from ..convert.methods.prepared import LayerReport
    from .speed import Benchmark

__all__ = [
    "Curve",
    "DecodeTime",
    "Point",
    "RecipeRun",
    "UptrainedRow",
    "check_picture",
    "decode_times",
    "draw_decode",
    "draw_quality",
    "draw_recipes",
    "draw_recovery",
    "draw_retention",
    "draw_training",
    "draw_uptrained",
    "pareto_front",
    "require_matplotlib",
]

# Okabe and Ito, with grey for yellow, which is too light on white; black is for what the rest is compared with
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#777777")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
_DASHES = ("-", (0, (6, 2)), (0, (3, 1, 1, 1)), (0, (1, 1)))
_GREY, _PALE = "#555555", "#bbbbbb"
_FADED = 0.45  # of what another point beats
_SETTINGS = {
    "figure.dpi": 150,
    "savefig.dpi": "figure",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "lines.markersize": 5,
    "svg.fonttype": "none",  # text stays text, which can be searched and read aloud
    "svg.hashsalt": "kvconvert",  # equal pictures have equal bytes
}
_DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))
_DISTANCES = (9, 14, 24, 36, 52)  # points from a mark to its label, in the order tried
_BESIDE = 14  # a label farther than this from its mark is led to by a line
_LINEAR_RANGE = 8  # values with a larger ratio between them are drawn on a logarithmic scale
_MAX_NUMBERED_ROWS, _MAX_NUMBERED_COLUMNS = 40, 8
_WIDTH = 10.0  # inches: shown 800 pixels wide, letters of 10 points are 11 pixels high
_EXCESS = "excess loss (nats per token)"
_OURS = "kvconvert: svd, then KL to the original"


@dataclass(frozen=True)
class Curve:
    """Held-out perplexity after so many uptraining tokens."""

    label: str
    tokens: Sequence[int]
    perplexities: Sequence[float]


@dataclass(frozen=True)
class Point:
    """A model at its cache size, with its excess loss over the original in nats per held-out token.

    `before` is that of the converted model, `after` that after uptraining, None if it was not uptrained. `error` is the
    standard error of the last of them. Raises InputError for numbers that have no place in a picture.
    """

    label: str
    cache_bytes_per_token: float
    before: float
    after: float | None = None
    error: float | None = None

    def __post_init__(self) -> None:
        for loss in (self.before, self.after, self.error):
            if loss is not None and not math.isfinite(loss):
                raise InputError(f"{self.label}: cannot be drawn, its loss is {loss}")
        if not 0 < self.cache_bytes_per_token < math.inf:
            raise InputError(
                f"{self.label}: cannot be drawn, its cache is {self.cache_bytes_per_token} bytes per token"
            )

    @property
    def last(self) -> float:
        """The excess after uptraining, or without it that of the converted model."""
        return self.before if self.after is None else self.after


@dataclass(frozen=True)
class RecipeRun:
    """A model's excess loss, in nats per held-out token, after so many tokens of uptraining by a recipe.

    `compute` is what all tokens cost, cross-entropy for a fixed number of tokens being 1. `of_the_paper` marks the
    recipe that the others are compared with: cross-entropy on the next token, from the mean of the heads.
    """

    model: str
    label: str
    tokens: Sequence[int]
    excess: Sequence[float]
    compute: float
    of_the_paper: bool = False


@dataclass(frozen=True)
class UptrainedRow:
    """A result and its cache in parts of the original's, with its excess before and after uptraining by two recipes.

    The first is the GQA paper's, the second ours; None where it was not measured. Nats per held-out token.
    """

    result: str
    cache: str
    excesses: tuple[tuple[float, float] | None, tuple[float, float] | None]


@dataclass(frozen=True)
class DecodeTime:
    """Milliseconds for one token of each sequence at a context length, and the least that moving its bytes takes."""

    label: str
    context: int
    milliseconds: float
    bound_milliseconds: float | None = None


def require_matplotlib() -> None:
    """Raise InputError where matplotlib is not installed. Commands call this before any work begins."""
    if find_spec("matplotlib") is None:
        raise InputError(
            "pictures are drawn by matplotlib, which is not installed", hint="pip install 'kvconvert[plot]'"
        )


def check_picture(path: Path) -> None:
    """Raise InputError where a picture cannot be drawn there. Commands call this before any work begins."""
    require_matplotlib()
    if path.suffix.lower() not in (".png", ".svg"):
        raise InputError(f"{path}: cannot be a picture", hint="end its name in .png or .svg")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"{path}: there is no such directory", hint="make it, or name another")


def decode_times(timed: Benchmark) -> list[DecodeTime]:
    """What a benchmark measured, as lines of `draw_decode`: of each batch one for the result and one for its original.

    The bound of the result is the original's time over the ratio of the bytes that a step has to read.
    """
    rows: list[DecodeTime] = []
    for point in timed.points:
        batch, bound = f"batch {point.batch}", None
        if point.original is not None:
            before = 1e3 * point.original.decode.median
            rows.append(DecodeTime(f"original, {batch}", point.context, before))
            gain = point.decode_gain
            bound = None if gain is None or gain.bound is None else before / gain.bound
        if point.result is not None:
            rows.append(DecodeTime(f"result, {batch}", point.context, 1e3 * point.result.decode.median, bound))
    return rows


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other beats, by cache size: each has less excess than all with as small a cache."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.cache_bytes_per_token, point.last)):
        if not front or point.last < front[-1].last:
            front.append(point)
    return front


def draw_recovery(
    path: Path, *, original: Point, original_perplexity: float, curves: Sequence[Curve], points: Sequence[Point]
) -> None:
    """Draw perplexity against uptraining tokens, and beside it what `draw_quality` draws.

    A curve has the label of its point, and its colour and marker. Raises InputError as `draw_quality` does.
    """
    place = {point.label: index for index, point in enumerate(points)}
    with _picture(path, "Recovery of a converted model, and its quality against cache", height=4.8) as figure:
        recovery, quality = figure.subplots(1, 2)
        for curve in curves:
            thousands = [tokens / 1000 for tokens in curve.tokens]
            recovery.plot(thousands, curve.perplexities, label=_plain(curve.label), **_look(place[curve.label]))
        recovery.axhline(original_perplexity, color="black", linestyle="--", label=_plain(original.label))
        recovery.set(xlabel="uptraining tokens (thousands)", ylabel="held-out perplexity", title="Recovery")
        _set_scale(recovery, [original_perplexity, *(value for curve in curves for value in curve.perplexities)])
        recovery.legend()
        _draw_quality(figure, quality, original, points)


def draw_quality(path: Path, original: Point, points: Sequence[Point]) -> None:
    """Draw excess loss against cache bytes per token: each model, and the front of those that no other beats.

    An arrow leads from a model before uptraining to the same after it; bars are one standard error to either side.
    Raises InputError where matplotlib is missing, or the path ends in neither .png nor .svg, and OutputError where it
    cannot be written.
    """
    with _picture(path, "Quality against cache", height=6.0) as figure:
        _draw_quality(figure, figure.subplots(), original, points)


def draw_training(path: Path, objective: str, losses: Sequence[tuple[int, float]], held_out: Curve | None) -> None:
    """Draw the loss that was minimised over tokens, and beside it the perplexity of held-out text where it was scored.

    `losses` are pairs of tokens and nats per token. Raises InputError as `draw_quality` does, and where there is none.
    """
    if not losses:
        raise InputError("there is no loss to draw")
    with _picture(path, "Loss while training", height=4.5) as figure:
        panels = list(figure.subplots(1, 1 if held_out is None else 2, squeeze=False)[0])
        unit, name = (1e6, "millions") if losses[-1][0] >= 1e6 else (1e3, "thousands")
        panels[0].plot([tokens / unit for tokens, _ in losses], [loss for _, loss in losses], **_look(0))
        _set_scale(panels[0], [loss for _, loss in losses])
        panels[0].set(title=_plain(f"What was minimised: {objective}"), ylabel="nats per token of the batch")
        if held_out is not None:
            panels[1].plot([tokens / unit for tokens in held_out.tokens], held_out.perplexities, **_look(1))
            _set_scale(panels[1], held_out.perplexities)
            panels[1].set(title=_plain(held_out.label), ylabel="perplexity")
        for axes in panels:
            axes.set(xlabel=f"uptraining tokens ({name})")


def draw_uptrained(path: Path, rows: Sequence[UptrainedRow]) -> None:
    """Draw excess loss before and after uptraining by two recipes: an arrow from hollow to full for each result.

    Raises InputError as `draw_quality` does, and where there is no row.
    """
    if not rows:
        raise InputError("there is no result to draw")
    recipes = (("the GQA paper: mean, then cross-entropy", _COLOURS[6], 0.16), (_OURS, _COLOURS[1], -0.16))
    with _picture(path, "Before and after uptraining", height=4.2) as figure:
        axes, handles = figure.subplots(), []
        for index, (label, colour, above) in enumerate(recipes):
            for place, row in enumerate(reversed(rows)):
                pair = row.excesses[index]
                if pair is None:
                    continue
                y, (before, after) = place + above, pair
                arrow = {"arrowstyle": "->", "color": colour, "linewidth": 1.5, "shrinkA": 4, "shrinkB": 4}
                axes.annotate("", (after, y), (before, y), arrowprops=arrow)
                axes.plot(before, y, "o", color=colour, markerfacecolor="white", markersize=8)
                axes.plot(after, y, "o", color=colour, markersize=8)
                axes.annotate(f"{after:.4f}", (after, y), (-8, 0), textcoords="offset points", ha="right", va="center")
            handles += axes.plot([], [], "o", color=colour, label=label)
        handles += axes.plot([], [], "o", color="black", markerfacecolor="white", label="converted, nothing trained")
        handles += axes.plot([], [], "o", color="black", label="uptrained")
        found = [excess for row in rows for pair in row.excesses if pair is not None for excess in pair]
        axes.set_xscale("log")
        axes.set_xlim(min(found) / 2.5, 1.5 * max(found))  # room for the figures, to the left
        axes.xaxis.set_major_formatter(lambda excess, _: f"{excess:g}")
        names = [f"{_plain(row.result)}\n{row.cache} of the cache" for row in reversed(rows)]
        axes.set_yticks(range(len(rows)), names)
        axes.set(xlabel=f"{_EXCESS}, log scale", title="Before and after uptraining for 5 % of the pretraining tokens")
        axes.grid(axis="y", visible=False)
        figure.legend(handles=handles, loc="outside lower center", ncols=2)


def draw_recipes(path: Path, runs: Sequence[RecipeRun]) -> None:
    """Draw excess loss over tokens and over compute: a row of panels for each model, a line for each recipe.

    Raises InputError as `draw_quality` does, and where there is no run.
    """
    if not runs:
        raise InputError("there is no run to draw")
    models = list(dict.fromkeys(run.model for run in runs))
    labels = list(dict.fromkeys(run.label for run in sorted(runs, key=lambda run: run.of_the_paper)))
    with _picture(path, "Excess loss by recipe", height=1.4 + 2.4 * len(models)) as figure:
        handles: dict[str, Any] = {}
        for model, panels in zip(
            models, figure.subplots(len(models), 2, squeeze=False, sharex="col", sharey="row"), strict=True
        ):
            shown = [run for run in runs if run.model == model]
            for run in shown:
                place = labels.index(run.label)
                look = _look(place) | {"linestyle": _DASHES[place % len(_DASHES)]}
                if run.of_the_paper:
                    look |= {"color": "black", "linewidth": 2.5}
                spent = [run.compute * tokens / run.tokens[-1] for tokens in run.tokens]
                for axes, places in zip(panels, ([tokens / 1e6 for tokens in run.tokens], spent), strict=True):
                    (handles[run.label],) = axes.plot(places, run.excess, **look)
            _set_scale(panels[0], [excess for run in runs for excess in run.excess])
            panels[0].set(title=_plain(model), ylabel=_EXCESS)
            panels[1].set(title=_plain(model))
        panels[0].set_xlabel("uptraining tokens (millions)")
        panels[1].set_xlabel("compute (cross-entropy for a run's tokens = 1)")
        figure.legend(
            [handles[label] for label in labels], list(map(_plain, labels)), loc="outside lower center", ncols=3
        )


def draw_retention(path: Path, reports: Sequence[LayerReport]) -> None:
    """Draw heat maps, a row for each merge of layers: what it kept of keys and values, and its error around the fit.

    Energies kept are in per cent, for each group of heads. The error is the squared one of hidden states once attention
    is added, relative to them, before and after gradient steps. Raises InputError as `draw_quality` does, and where
    there is no report, as after a merge that measures nothing.
    """
    if not reports:
        raise InputError(
            "there is no layer to draw: this merge measured nothing", hint="--method svd says what each layer keeps"
        )
    keys = _table([[100 * kept for kept in report.keys_retained] for report in reports])
    values = _table([[100 * kept for kept in report.values_retained] for report in reports])
    errors = _table(
        [[error for fit in report.fits[:1] for error in (fit.loss_before, fit.loss_after)] for report in reports]
    )
    num_groups = len(keys[0])
    maps: list[Any] = ["keys", "values"]
    widths = [num_groups, num_groups]
    if errors[0]:
        maps, widths = [*maps, "errors"], [*widths, max(2, num_groups // 2)]
    rows_height = min(10.0, 0.32 * len(reports))
    size = {"height": 1.8 + rows_height, "width": min(_WIDTH, 4.5 + 0.7 * sum(widths))}
    with _picture(path, "What each layer kept", **size) as figure:
        figure.set_layout_engine("constrained", wspace=0.06)  # so that the ends of the two scales stay apart
        scales: list[Any] = ["energy", "energy", "scale of errors"][: len(maps)]
        panels = figure.subplot_mosaic([maps, scales], width_ratios=widths, height_ratios=[rows_height, 0.15])
        least = min(kept for row in keys + values for kept in row if math.isfinite(kept))
        for name, grid in (("keys", keys), ("values", values)):
            image = _draw_map(panels[name], grid, "{:.1f}", "cividis", (min(99.0, math.floor(least)), 100.0))
            panels[name].set(title=name, xlabel="group of heads")
            panels[name].set_xticks(range(0, num_groups, math.ceil(num_groups / 16)))
        figure.colorbar(image, cax=panels["energy"], orientation="horizontal", label="energy kept (%)")
        if errors[0]:
            worst = max(error for row in errors for error in row if math.isfinite(error))
            image = _draw_map(panels["errors"], errors, "{:#.2g}", "cividis_r", (0.0, worst))
            panels["errors"].set(title="error of the layer", xlabel="gradient steps")
            panels["errors"].set_xticks(range(2), ["before", "after"])
            scale, label = panels["scale of errors"], "relative squared error"
            figure.colorbar(image, cax=scale, orientation="horizontal", label=label)
        every = math.ceil(len(reports) / 40)
        panels["keys"].set_ylabel("layer")
        panels["keys"].set_yticks(range(0, len(reports), every), [_layers(report) for report in reports[::every]])
        for name in maps[1:]:
            panels[name].tick_params(left=False, labelleft=False)


def draw_decode(path: Path, rows: Sequence[DecodeTime]) -> None:
    """Draw decode time per token against context length: a line for each model, dashed where its bytes set the bound.

    Raises InputError as `draw_quality` does, where there is no row, and where a model has two at one context length.
    """
    if not rows:
        raise InputError("there is no decode time to draw")
    seen = set[tuple[str, int]]()
    for row in rows:
        if (row.label, row.context) in seen:
            raise InputError(f"{row.label}: two decode times at a context of {row.context} tokens, expected one")
        seen.add((row.label, row.context))
    with _picture(path, "Decode time against context length", height=6.0) as figure:
        axes = figure.subplots()
        handles = []
        for index, label in enumerate(dict.fromkeys(row.label for row in rows)):
            line = sorted((row for row in rows if row.label == label), key=lambda row: row.context)
            look, times = _look(index), [row.milliseconds for row in line]
            handles += axes.plot([row.context for row in line], times, label=_plain(label), **look)
            bounded = [(row.context, row.bound_milliseconds) for row in line if row.bound_milliseconds is not None]
            if bounded:
                axes.plot(*zip(*bounded, strict=True), color=look["color"], linestyle="--", linewidth=1)
        if any(row.bound_milliseconds is not None for row in rows):
            handles += axes.plot([], [], color="black", linestyle="--", linewidth=1, label="bound from bytes moved")
        bounds = [row.bound_milliseconds for row in rows if row.bound_milliseconds is not None]
        _set_scale(axes, [*(row.milliseconds for row in rows), *bounds])
        axes.set(
            xlabel="context length (tokens, log₂ scale)", ylabel="decode time (ms per step, a token of each sequence)"
        )
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1024:g}k" if tokens >= 1024 else f"{tokens:g}")
        figure.legend(handles=handles, loc="outside lower center", ncols=4)


def _draw_quality(figure: Figure, axes: Axes, original: Point, points: Sequence[Point]) -> None:
    """Fill the panel of `draw_quality`. The rest of the figure is finished, since labels find their places in it."""
    everything = (original, *points)
    front, sizes = pareto_front(everything), [point.cache_bytes_per_token for point in everything]
    steps = [*((point.cache_bytes_per_token, point.last) for point in front), (2 * max(sizes), front[-1].last)]
    axes.plot(*zip(*steps, strict=True), drawstyle="steps-post", color=_PALE, linewidth=3, zorder=1)
    marks = axes.plot(original.cache_bytes_per_token, original.last, color="black", marker="*", markersize=12)
    for index, point in enumerate(points):
        x, look = point.cache_bytes_per_token, _look(index) | {"alpha": 1 if point in front else _FADED}
        spot: dict[str, Any] = {**look, "linestyle": "none", "markersize": 7}
        marks += axes.plot(x, point.before, markerfacecolor="white", **spot)
        if point.after is not None:
            arrow = {"arrowstyle": "->", "shrinkA": 4, "shrinkB": 4} | {name: look[name] for name in ("color", "alpha")}
            axes.annotate("", (x, point.after), (x, point.before), arrowprops=arrow).set_in_layout(False)
            marks[-1:] = axes.plot(x, point.after, **spot)
        if point.error is not None:
            bar = {name: look[name] for name in ("color", "alpha")}
            axes.errorbar(x, point.last, yerr=point.error, capsize=4, linestyle="none", zorder=1.5, **bar)
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(sizes) / 2, 2 * max(sizes))
    axes.xaxis.set_major_formatter(lambda size, _: _binary(size))
    axes.set(xlabel="K/V cache per token (bytes, log₂ scale)", ylabel=_EXCESS, title="Quality against cache")
    _set_scale(axes, [loss for point in everything for loss in (point.before, point.last)])
    axes.margins(y=0.12)
    _explain_marks(figure, axes, points)
    figure.draw_without_rendering()  # the layout is final from here on, unless the labels do not fit
    if not _label_points(axes, everything, _occupied(axes, everything, steps)):
        figure.legend(marks, [_plain(point.label) for point in everything], loc="outside right upper")


def _explain_marks(figure: Figure, axes: Axes, points: Sequence[Point]) -> None:
    """Say below the figure what the marks mean, of those that it has."""
    spot: dict[str, Any] = {"color": _GREY, "marker": "o", "linestyle": "none", "markersize": 7}
    handles = axes.plot([], [], markerfacecolor="white", label="converted", **spot)
    if any(point.after is not None for point in points):
        handles += axes.plot([], [], label="uptrained", **spot)
    handles += axes.plot([], [], color="black", marker="*", markersize=12, linestyle="none", label="original")
    handles += axes.plot([], [], color=_PALE, linewidth=3, label="best for its cache")
    if len(pareto_front(points)) < len(points):
        handles += axes.plot([], [], markerfacecolor="white", label="beaten by another", **(spot | {"alpha": _FADED}))
    if any(point.error is not None for point in points):
        handles += axes.plot([], [], color=_GREY, marker="|", markersize=12, linestyle="none", label="± standard error")
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))


def _occupied(axes: Axes, points: Sequence[Point], steps: Sequence[tuple[float, float]]) -> list[Bbox]:
    """Return where marks, arrows, bars and the front are, as boxes in pixels that no label may touch."""
    half = 5 * axes.figure.dpi / 72  # of a mark, from points
    corners = [(first, (second[0], first[1])) for first, second in pairwise(steps)]
    corners += [((second[0], first[1]), second) for first, second in pairwise(steps)]
    boxes = [_box(axes, start, end, 1) for start, end in corners]
    for point in points:
        x, error = point.cache_bytes_per_token, point.error or 0.0
        ends = [point.before, point.last - error, point.last + error]
        boxes.append(_box(axes, (x, min(ends)), (x, max(ends)), half))
    return boxes


def _box(axes: Axes, start: tuple[float, float], end: tuple[float, float], padding: float) -> Bbox:
    """Return the box between two places of the axes, in pixels, with so many pixels around it."""
    from matplotlib.transforms import Bbox

    corners = axes.transData.transform([start, end])
    return Bbox([corners.min(axis=0), corners.max(axis=0)]).padded(padding)


def _label_points(axes: Axes, points: Sequence[Point], taken: list[Bbox]) -> bool:
    """Put each point's label beside it, where nothing is; return whether all found a place, else leave none."""
    placed: list[Text] = []
    for point in points:
        at = (point.cache_bytes_per_token, point.last)
        text = axes.annotate(_plain(point.label), at, (0, 0), textcoords="offset points", fontsize=9)
        text.set_in_layout(False)
        placed.append(text)
        for distance, (right, up) in product(_DISTANCES, _DIRECTIONS):
            text.set(ha={-1: "right", 0: "center", 1: "left"}[right], va={-1: "top", 0: "center", 1: "bottom"}[up])
            text.xyann = (right * distance, up * distance)
            boxes = [text.get_window_extent().padded(2)]
            if distance > _BESIDE:
                boxes += _leader(axes, at, text.xyann)
            inside = axes.bbox.fully_containsx(boxes[0].x0) and axes.bbox.fully_containsx(boxes[0].x1)
            inside = inside and axes.bbox.fully_containsy(boxes[0].y0) and axes.bbox.fully_containsy(boxes[0].y1)
            if inside and not any(box.overlaps(other) for box in boxes for other in taken):
                break
        else:
            for artist in placed:
                artist.remove()
            return False
        taken += boxes
        if distance > _BESIDE:
            line = {"arrowstyle": "-", "color": _GREY, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 6}
            leader = axes.annotate("", at, text.xyann, textcoords="offset points", arrowprops=line)
            leader.set_in_layout(False)
            placed.append(leader)
    return True


def _leader(axes: Axes, at: tuple[float, float], offset: tuple[float, float]) -> list[Bbox]:
    """Return small boxes along the line from near a point to its label, `offset` points away, in pixels."""
    from matplotlib.transforms import Bbox

    x, y = axes.transData.transform(at)
    across, up = (part * axes.figure.dpi / 72 for part in offset)
    near = 0.5  # closer to the point are its own mark and arrow
    shares = [near + (1 - near) * step / 8 for step in range(8)]
    return [Bbox.from_bounds(x + share * across - 1, y + share * up - 1, 2, 2) for share in shares]


def _draw_map(
    axes: Axes, grid: Sequence[Sequence[float]], form: str, colours: str, limits: tuple[float, float]
) -> AxesImage:
    """Draw a heat map of rows, with its numbers where there is room for them; of colour maps lightest is best."""
    image = axes.imshow(grid, aspect="auto", cmap=colours, vmin=limits[0], vmax=limits[1])
    axes.grid(visible=False)
    if len(grid) > _MAX_NUMBERED_ROWS or len(grid[0]) > _MAX_NUMBERED_COLUMNS:
        return image
    colours_there = image.to_rgba(np.asarray(grid))
    for row, values in enumerate(grid):
        for column, value in enumerate(values):
            if math.isfinite(value):
                red, green, blue, _ = colours_there[row, column]
                is_light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5
                colour = "black" if is_light else "white"
                axes.text(column, row, form.format(value), ha="center", va="center", color=colour, fontsize=9)
    return image


def _table(rows: Sequence[Sequence[float]]) -> list[list[float]]:
    """Return rows of equal length: layers may have fewer groups of heads than others, or no gradient steps."""
    width = max(map(len, rows))
    return [[*row, *[math.nan] * (width - len(row))] for row in rows]


def _layers(report: LayerReport) -> str:
    """Name the layers of a report: 3, or 4–5 where they share keys and values."""
    return "–".join(dict.fromkeys((str(report.layers[0]), str(report.layers[-1]))))


def _set_scale(axes: Axes, values: Sequence[float]) -> None:
    """Choose the scale of y: linear for values that are near each other, else logarithmic, also around zero."""
    sizes = [abs(value) for value in values if value]
    if not sizes or max(sizes) < _LINEAR_RANGE * min(sizes):
        return
    if min(values) > 0:
        from matplotlib.ticker import LogLocator

        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    else:
        threshold = 10.0 ** math.floor(math.log10(max(min(sizes), max(sizes) / 1000)))
        axes.set_yscale("symlog", linthresh=threshold, linscale=0.5, subs=range(2, 10))
        axes.set_ylabel(f"{axes.get_ylabel()}\nlog scale, linear below {threshold:g}; less is better")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")


def _look(index: int) -> dict[str, Any]:
    """Return the colour and the marker of the line or point of that index; both together repeat after 56."""
    return {"color": _COLOURS[index % len(_COLOURS)], "marker": _MARKERS[index % len(_MARKERS)]}


def _plain(label: str) -> str:
    """Return a label that matplotlib takes as it is: no formula between dollars, and not hidden for an underscore."""
    return (" " if label.startswith("_") else "") + label.replace("$", r"\$")


def _binary(size: float) -> str:
    """Write a number of bytes in the largest binary unit that leaves at least 1."""
    power = max(0, min(3, int(math.log2(size)) // 10))
    return f"{size / 2 ** (10 * power):g} {('B', 'KiB', 'MiB', 'GiB')[power]}"


@contextmanager
def _picture(path: Path, title: str, *, height: float, width: float = _WIDTH) -> Iterator[Figure]:
    """Yield a figure of a size in inches to draw in, and write it to `path` at the end, whole or not at all."""
    check_picture(path)
    form = path.suffix.lower().removeprefix(".")
    from matplotlib import style
    from matplotlib.figure import Figure  # not pyplot: no window system is asked for

    metadata = {"Title": title} | ({"Date": None} if form == "svg" else {})
    with style.context(["default", _SETTINGS]):  # whatever a user's own file of settings says
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        try:
            with replaced_file(path) as file:
                figure.savefig(file, format=form, metadata=metadata)
        except OSError as error:
            raise OutputError(f"{path}: cannot be written ({error.strerror})") from error
