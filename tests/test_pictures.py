"""Pictures are read back: the texts of an SVG, what its lines go through, the pixels of a PNG."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Command
from kvconvert.convert.calibration.fitting import FitOutcome
from kvconvert.convert.errors import InputError, OutputError
from kvconvert.convert.methods.prepared import LayerReport
from kvconvert.measure import pictures
from kvconvert.measure.pictures import (
    Curve,
    DecodeTime,
    Point,
    RecipeRun,
    draw_decode,
    draw_quality,
    draw_recipes,
    draw_recovery,
    draw_retention,
    pareto_front,
)

ROOT = Path(__file__).parents[1]
ORIGINAL = Point("original", 4096, 0.0)
GQA = Point("gqa:2", 1024, 0.024, after=0.008, error=0.001)
MQA = Point("mqa", 512, 0.08)
WORSE = Point("mqa, mean", 1024, 1.9, after=0.2)
RUNS = (
    RecipeRun("mqa", "distill, lr 0.001", [0, 500_000, 1_000_000], [0.2, 0.06, 0.03], compute=1.3),
    RecipeRun("mqa", "the paper", [0, 500_000, 1_000_000], [1.9, 0.4, 0.2], compute=1.0, of_the_paper=True),
    RecipeRun("cla2", "distill, lr 0.001", [0, 500_000, 1_000_000], [0.13, 0.06, 0.04], compute=1.3),
)
REPORTS = (
    LayerReport((0,), ((0, 1), (2, 3)), (0.95, 0.9), (0.8, 0.701), (FitOutcome(10, 0.075, 0.0471),)),
    LayerReport((1,), ((0, 1), (2, 3)), (0.96, 0.91), (0.81, 0.71)),
)
TIMES = (
    DecodeTime("MHA", 1024, 30.0, 25.0),
    DecodeTime("MHA", 4096, 90.0, 70.0),
    DecodeTime("MQA", 1024, 13.0, 9.0),
    DecodeTime("MQA", 4096, 15.0, 10.0),
)


def recovery(path: Path, **changes: Any) -> None:
    """The picture of the demo, with one curve."""
    curves = [Curve("gqa:2", [0, 131072, 262144], [21.6, 21.4, 21.2])]
    known: dict[str, Any] = {"original": ORIGINAL, "original_perplexity": 21.1, "curves": curves, "points": [GQA, MQA]}
    draw_recovery(path, **known | changes)


DRAWINGS: dict[str, Callable[[Path], None]] = {
    "recovery": recovery,
    "quality": lambda path: draw_quality(path, ORIGINAL, [GQA, MQA]),
    "recipes": lambda path: draw_recipes(path, RUNS),
    "retention": lambda path: draw_retention(path, REPORTS),
    "decode": lambda path: draw_decode(path, TIMES),
}


def texts(path: Path) -> list[str]:
    """All that is written in an SVG."""
    return ["".join(node.itertext()) for node in ElementTree.parse(path).iter() if node.tag.endswith("}text")]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are written, as they are once they are."""
    from matplotlib.figure import Figure

    written: list[Any] = []
    save = Figure.savefig

    def keep(figure: Figure, *arguments: Any, **options: Any) -> None:
        save(figure, *arguments, **options)
        written.append(figure)

    monkeypatch.setattr(Figure, "savefig", keep)
    return written


def places(lines: Iterable[Any]) -> list[list[tuple[float, float]]]:
    """What each line goes through."""
    return [list(zip(*(map(float, axis) for axis in line.get_data()), strict=True)) for line in lines]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("recovery", {"uptraining tokens (thousands)", "held-out perplexity", "original", "gqa:2", "mqa"}),
        (
            "quality",
            {"K/V cache per token (bytes, log₂ scale)", "excess loss (nats per token)", "512 B", "4 KiB"}
            | {"original", "gqa:2", "mqa", "converted", "uptrained", "best for its cache", "± standard error"},
        ),
        (
            "recipes",
            {"uptraining tokens (millions)", "compute (cross-entropy for a run's tokens = 1)", "mqa", "cla2"}
            | {"excess loss (nats per token)", "distill, lr 0.001", "the paper"},
        ),
        (
            "retention",
            {"layer", "keys", "values", "group of heads", "energy kept (%)", "gradient steps", "relative squared error"}
            | {"95.0", "90.0", "80.0", "70.1", "0.075", "0.047", "before", "after"},
        ),
        (
            "decode",
            {
                "context length (tokens, log₂ scale)",
                "decode time (ms per step, a token of each sequence)",
                "bound from bytes moved",
            }
            | {"1k", "4k", "MHA", "MQA"},
        ),
    ],
)
def test_what_is_drawn_is_labelled_with_units(name: str, expected: set[str], tmp_path: Path) -> None:
    DRAWINGS[name](tmp_path / "picture.svg")
    assert expected - set(texts(tmp_path / "picture.svg")) == set()


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_png_is_opaque_white_and_wide_enough(name: str, tmp_path: Path) -> None:
    """Also where the user's own settings are for dark slides."""
    import matplotlib as mpl
    from matplotlib.image import imread

    with mpl.rc_context({"figure.facecolor": "black", "axes.facecolor": "none", "savefig.transparent": True}):
        DRAWINGS[name](tmp_path / "picture.png")
    pixels = imread(tmp_path / "picture.png")
    assert pixels.shape[1] >= 800
    assert (pixels[..., 3] == 1).all()
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    assert (edge[:, :3] == 1).all()
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]


def test_equal_pictures_have_equal_bytes(tmp_path: Path) -> None:
    for copy in ("one.svg", "two.svg"):
        DRAWINGS["quality"](tmp_path / copy)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_the_front_is_what_nothing_smaller_beats() -> None:
    better_and_smaller = Point("mla", 512, 0.07)
    equal = Point("as good, and larger", 2048, 0.008)
    everything = [ORIGINAL, GQA, MQA, WORSE, better_and_smaller, equal]
    assert [point.label for point in pareto_front(everything)] == ["mla", "gqa:2", "original"]
    assert pareto_front(everything[::-1]) == pareto_front(everything)


def test_the_front_and_the_marks_are_where_the_figures_are(figures: list[Any], tmp_path: Path) -> None:
    draw_quality(tmp_path / "picture.svg", ORIGINAL, [GQA, MQA, WORSE])
    lines = figures[0].axes[0].lines
    (front,) = places(line for line in lines if line.get_drawstyle() == "steps-post")
    assert front == [(512, 0.08), (1024, 0.008), (4096, 0), (8192, 0)]
    marks = [line for line in lines if line.get_marker() in ("*", "o", "s", "^")]
    filled = {place[0] for line, place in zip(marks, places(marks), strict=True) if place and is_filled(line)}
    assert filled == {(4096, 0), (1024, 0.008), (1024, 0.2)}
    empty = {place[0] for line, place in zip(marks, places(marks), strict=True) if place and not is_filled(line)}
    assert empty == {(512, 0.08), (1024, 0.024), (1024, 1.9)}
    (bars,) = figures[0].axes[0].containers
    assert bars.lines[2][0].get_segments()[0] == pytest.approx(np.array([[1024, 0.007], [1024, 0.009]]))
    arrows = [text for text in figures[0].axes[0].texts if getattr(text, "arrowprops", None)]
    assert [(arrow.xyann, arrow.xy) for arrow in arrows[:2]] == [
        ((1024, 0.024), (1024, 0.008)),
        ((1024, 1.9), (1024, 0.2)),
    ]


def is_filled(line: Any) -> bool:
    return bool(line.get_markerfacecolor() != "white")


def test_every_curve_is_drawn_and_looks_like_its_point(figures: list[Any], tmp_path: Path) -> None:
    curves = [Curve("mqa", [0, 1000], [23.0, 22.0]), Curve("gqa:2", [0, 2000], [21.6, 21.2])]
    recovery(tmp_path / "picture.svg", curves=curves)
    left, right = figures[0].axes
    assert places(left.lines[:2]) == [[(0, 23), (1, 22)], [(0, 21.6), (2, 21.2)]]
    looks = {
        place[0]: (line.get_color(), line.get_marker())
        for line, place in zip(right.lines, places(right.lines), strict=True)
        if place and line.get_marker() in ("o", "s")
    }
    assert [(line.get_color(), line.get_marker()) for line in left.lines[:2]] == [looks[512, 0.08], looks[1024, 0.008]]
    assert list(left.lines[2].get_ydata()) == [21.1, 21.1]


def test_recipes_are_over_tokens_and_over_compute(figures: list[Any], tmp_path: Path) -> None:
    draw_recipes(tmp_path / "picture.svg", RUNS)
    over_tokens, over_compute, *others = figures[0].axes
    assert places(over_tokens.lines) == [[(0, 0.2), (0.5, 0.06), (1, 0.03)], [(0, 1.9), (0.5, 0.4), (1, 0.2)]]
    assert places(over_compute.lines) == [[(0, 0.2), (0.65, 0.06), (1.3, 0.03)], [(0, 1.9), (0.5, 0.4), (1, 0.2)]]
    assert [line.get_color() == "black" for line in over_tokens.lines] == [False, True]
    assert [len(axes.lines) for axes in others] == [1, 1]


def test_decode_times_are_solid_and_their_bounds_dashed(figures: list[Any], tmp_path: Path) -> None:
    draw_decode(tmp_path / "picture.svg", [*TIMES[::-1], DecodeTime("no bound", 1024, 11.0)])
    lines = [line for line in figures[0].axes[0].lines if len(line.get_xdata())]
    assert dict(
        zip([(line.get_label(), line.get_linestyle()) for line in lines[::2]], places(lines[::2]), strict=True)
    ) == {
        ("MQA", "-"): [(1024, 13), (4096, 15)],
        ("MHA", "-"): [(1024, 30), (4096, 90)],
        ("no bound", "-"): [(1024, 11)],
    }
    assert places(lines[1::2]) == [[(1024, 9), (4096, 10)], [(1024, 25), (4096, 70)]]
    assert {line.get_linestyle() for line in lines[1::2]} == {"--"}


def test_what_was_kept_is_in_its_cell(figures: list[Any], tmp_path: Path) -> None:
    draw_retention(tmp_path / "picture.svg", REPORTS)
    grids = [axes.images[0].get_array().filled(np.nan).tolist() for axes in figures[0].axes if axes.images]
    assert grids[0] == [[95, 90], [96, 91]]
    assert grids[1] == [[80, pytest.approx(70.1)], [81, 71]]
    assert grids[2][0] == [0.075, 0.0471]
    assert np.isnan(grids[2][1]).all()  # nothing was fitted there


@pytest.mark.parametrize("size", [8, 20])
def test_labels_of_points_touch_no_other_label_or_mark(size: int, figures: list[Any], tmp_path: Path) -> None:
    random = np.random.default_rng(size)
    points = [
        Point(f"target {place}, with a long name", 2.0 ** random.uniform(9, 12), 10 ** random.uniform(-3, 0))
        for place in range(size)
    ]
    draw_quality(tmp_path / "picture.svg", ORIGINAL, points)
    axes = figures[0].axes[0]
    labels = [text.get_window_extent() for text in axes.texts if text.get_text()]
    assert len(labels) == size + 1
    assert not any(one.overlaps(other) for one, other in combinations(labels, 2))
    marks = axes.transData.transform([(point.cache_bytes_per_token, point.last) for point in (ORIGINAL, *points)])
    assert not any(box.contains(*mark) for box in labels for mark in marks)
    assert all(axes.bbox.containsx(box.x0) and axes.bbox.containsx(box.x1) for box in labels)


def test_labels_that_fit_nowhere_are_a_legend(figures: list[Any], tmp_path: Path) -> None:
    points = [Point(f"target {place}", 1024, 0.01) for place in range(40)]
    draw_quality(tmp_path / "picture.svg", ORIGINAL, points)
    assert [text.get_text() for text in figures[0].axes[0].texts] == []
    assert {point.label for point in (ORIGINAL, *points)} <= set(texts(tmp_path / "picture.svg"))


def test_lines_differ_by_more_than_their_colour(tmp_path: Path) -> None:
    looks = [pictures._look(index) for index in range(56)]
    assert len({(look["color"], look["marker"]) for look in looks}) == 56
    assert all(len({look["marker"] for look in looks[first : first + 8]}) == 8 for first in range(48))


def test_a_loss_below_the_originals_is_drawn(tmp_path: Path) -> None:
    """Around zero, where a logarithmic axis has no place for it."""
    draw_quality(tmp_path / "picture.svg", ORIGINAL, [Point("better", 1024, 0.5, after=-0.002), MQA])
    assert {"better", "0", "0.1"} <= set(texts(tmp_path / "picture.svg"))


def test_labels_are_taken_as_they_are(tmp_path: Path) -> None:
    """Neither as formulas, nor as what matplotlib hides."""
    labels = ["$HOME/$x_{", "_hidden", "a & b <c>"]
    draw_decode(tmp_path / "picture.svg", [DecodeTime(label, 1024, 3.0) for label in labels])
    assert set(labels) <= {text.strip() for text in texts(tmp_path / "picture.svg")}


def test_layers_that_share_are_a_row_and_no_steps_no_panel(tmp_path: Path) -> None:
    report = LayerReport((2, 3), ((0,),), (0.9,), (0.8,))
    draw_retention(tmp_path / "picture.svg", [report])
    written = texts(tmp_path / "picture.svg")
    assert "2–3" in written
    assert "relative squared error" not in written


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda path: draw_decode(path, []), "there is no decode time to draw"),
        (
            lambda path: draw_decode(path, [*TIMES, TIMES[0]]),
            "MHA: two decode times at a context of 1024 tokens, expected one",
        ),
        (lambda path: draw_recipes(path, []), "there is no run to draw"),
        (lambda path: draw_retention(path, []), "there is no layer to draw: this merge measured nothing"),
        (lambda path: draw_quality(path.with_suffix(".pdf"), ORIGINAL, [MQA]), r"picture\.pdf: cannot be a picture"),
    ],
)
def test_what_cannot_be_drawn_is_refused(draw: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        draw(tmp_path / "picture.png")
    assert list(tmp_path.iterdir()) == []


def test_a_point_without_a_place_is_refused() -> None:
    with pytest.raises(InputError, match="mqa: cannot be drawn, its loss is nan"):
        Point("mqa", 512, float("nan"))
    with pytest.raises(InputError, match="mqa: cannot be drawn, its cache is 0 bytes per token"):
        Point("mqa", 0, 0.1)


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"missing/picture\.png: there is no such directory"):
        draw_decode(tmp_path / "missing" / "picture.png", TIMES)


def test_one_module_imports_matplotlib() -> None:
    importing = set()
    for folder in ("cli", "configs", "convert", "measure", "uptrain", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text()
            nodes = list(ast.walk(ast.parse(text))) if "matplotlib" in text else []
            names = [name.name for node in nodes if isinstance(node, ast.Import) for name in node.names]
            names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
            if any(name.split(".")[0] == "matplotlib" for name in names):
                importing.add(str(path.relative_to(ROOT)))
    assert importing == {"measure/pictures.py"}


def test_importing_pictures_does_not_import_matplotlib() -> None:
    program = "import sys, kvconvert.measure.pictures; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize("options", [[], ["--dry-run"], ["--force"]])
def test_the_demo_asks_for_matplotlib_by_name(
    options: list[str], invoke: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pictures, "find_spec", lambda name: None)
    outcome = invoke("demo", "--output", tmp_path / "demo", *options)
    assert outcome.returncode == 2
    assert outcome.stderr.endswith(
        "demo.yaml:30: report: pictures are drawn by matplotlib, which is not installed\n"
        "hint: pip install 'kvconvert[plot]'\n"
    )
    assert outcome.stdout == ""
    assert not (tmp_path / "demo").exists()


def test_the_scripts_draw_what_they_read(tmp_path: Path) -> None:
    row = {"model": "mqa", "recipe": "distill", "lr": 0.001, "tokens": 1000, "compute": 1.3}
    row |= {"excess": 0.03, "standard_error": 0.001, "curve": [[0, 0.2], [1000, 0.03]]}
    mean = row | {"model": "mqa-mean", "recipe": "pretraining", "curve": [[0, 1.9], [1000, 0.2]]}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps(mean)}\n")
    fit = {"steps": 10, "loss_before": 0.075, "loss_after": 0.0471}
    layer = {"layers": [3], "groups": [[0, 1]], "keys_retained": [0.951], "values_retained": [0.8], "fits": [fit]}
    (tmp_path / "conversion.json").write_text(json.dumps({"layers": [layer]}))
    for script, source in (("draw_recipes", "rows.jsonl"), ("draw_retention", "conversion.json")):
        command = [sys.executable, str(ROOT / f"benchmarks/{script}.py"), source, f"{script}.svg"]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    written = texts(tmp_path / "draw_recipes.svg")
    assert {"mqa", "distill, lr 0.001", "the paper: pretraining from the mean, lr 0.001"} <= set(written)
    assert "mqa-mean" not in written
    assert {"3", "95.1", "0.075", "0.047"} <= set(texts(tmp_path / "draw_retention.svg"))
