"""Runs of recipes: each stage once, gone on with after an end to the same bytes, and told truly."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conftest import PROSE, CheckpointFactory, Command, KilledError
from filelock import FileLock
from kvconvert.convert.errors import InputError, OutputError
from kvconvert.measure import verify
from kvconvert.pipeline import FailedGatesError, Run, plan_run, run

RECIPE = """\
model: model_dir
convert:
  target: gqa
  groups: 2
  method: svd
  calibration: text.jsonl
  calibration_tokens: 512
  calibration_sequence_length: 32
uptrain:
  data: text.jsonl
  steps: 4
  sequence_length: 16
  global_batch_tokens: 32
  validation_fraction: 0
  eval_data: held_out.jsonl
  eval_steps: 2
  save_steps: 2
  log_steps: 1
evaluate:
  data: held_out.jsonl
  window: 16
  max_windows: 8
  samples: 2
benchmark:
  context: [8, 16]
  tokens: 2
  warm_up: 1
  repeats: 2
gates:
  max_kl: 100
"""
FAST = {"benchmark": "null", "report.pictures": "false"}
STAGES = ("convert", "uptrain", "evaluate", "benchmark")


@pytest.fixture
def home(make_checkpoint: CheckpointFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a model, texts and a recipe; the current one."""
    make_checkpoint(name="model_dir", with_tokenizer=True)
    for name, numbers in (("text.jsonl", range(40)), ("held_out.jsonl", range(100, 110))):
        lines = [json.dumps({"text": f"Chapter {number}. {PROSE}"}) for number in numbers]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def carry_out(output: str, *, quickly: bool = True, remarks: list[str] | None = None, **options: Any) -> Run:
    overrides = [f"{key}={value}" for key, value in FAST.items()] if quickly else []
    overrides += options.pop("overrides", [])
    kept = remarks if remarks is not None else []
    return run("recipe.yaml", overrides=overrides, output=output, remark=kept.append, **options)


def results(output: Path) -> dict[str, bytes]:
    """What a run promises the bytes of: the evaluation, and the checkpoints but for when and how fast they came."""
    timed = ("metrics.jsonl", "run_status.json", "run_files.json")
    files = [path for folder in ("converted", "uptrained") for path in (output / folder).iterdir()]
    found = [*(path for path in files if path.name not in timed), output / "evaluation.json", output / "recipe.yaml"]
    return {str(path.relative_to(output)): path.read_bytes() for path in found}


def killed_after(count: int, what: str) -> Callable[[str, int], Any]:
    """Progress that ends the run as SIGKILL would, when a part of it that is called `what` has come so far."""

    @contextmanager
    def progress(name: str, total: int) -> Iterator[Callable[[int], object]]:
        done = 0

        def advance(number: int) -> None:
            nonlocal done
            done += number
            if name == what and done >= count:
                raise KilledError

        yield advance

    return progress


@pytest.mark.slow
def test_a_run_that_is_killed_in_each_stage_ends_with_the_same_bytes(home: Path) -> None:
    whole = carry_out("whole")
    expected = results(whole.output)
    assert {"converted/model.safetensors", "uptrained/model.safetensors", "evaluation.json"} <= expected.keys()
    for place, count in (("merging", 1), ("uptraining", 3), ("evaluating", 1)):
        with pytest.raises(KilledError):
            carry_out("ended", progress=killed_after(count, place))
        status = json.loads((home / "ended" / "run_status.json").read_text())
        assert status["state"] == "failed"
    remarks: list[str] = []
    ended = carry_out("ended", remarks=remarks)
    assert [line for line in remarks if line.endswith("done before")] == [
        "convert: done before",
        "uptrain: done before",
    ]
    assert results(ended.output) == expected
    assert json.loads((home / "ended" / "run_status.json").read_text())["state"] == "finished"
    assert verify(ended.model).ok


@pytest.mark.slow
def test_a_stage_is_done_once_and_again_where_something_differs(home: Path) -> None:
    carry_out("out")
    before = results(home / "out")

    def again(**options: Any) -> list[str]:
        remarks: list[str] = []
        carry_out("out", remarks=remarks, **options)
        return [line for line in remarks if line.startswith(("convert", "uptrain", "evaluate"))]

    done = ["convert: done before", "uptrain: done before", "evaluate: done before"]
    assert again() == done
    assert results(home / "out") == before
    # an evaluation is made again where its settings, its text or its result are others
    changed = again(overrides=["evaluate.max_windows=4"])
    assert changed == [*done[:2], "evaluate: again, as evaluate.max_windows was 8, is 4", "evaluate …"]
    (home / "out" / "evaluation.json").write_text("{}")
    assert "evaluate: again, as evaluation.json has other bytes" in again(overrides=["evaluate.max_windows=4"])
    with (home / "held_out.jsonl").open("a") as file:
        file.write(json.dumps({"text": PROSE}) + "\n")
    with pytest.raises(OutputError, match=r"uptrain was carried out otherwise: \S*held_out.jsonl has other bytes"):
        again()
    # but a conversion and a training only where that is asked for
    with pytest.raises(OutputError, match=r"convert was carried out otherwise: options.groups was 2, is 4") as caught:
        again(overrides=["convert.groups=4"])
    assert caught.value.hint is not None
    assert "--from convert" in caught.value.hint
    # what is refused takes nothing away
    for wrong in ("uptrain.global_batch_tokens=40", "uptrain.lr=-1"):
        with pytest.raises(InputError):
            again(first="convert", overrides=["convert.groups=4", wrong])
        assert results(home / "out").keys() == before.keys()
    assert again(first="convert", overrides=["convert.groups=4"]) == ["convert …", "uptrain …", "evaluate …"]
    weights = home / "out" / "uptrained" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(OutputError, match=r"uptrained/model.safetensors has other bytes"):
        again(overrides=["convert.groups=4"])


@pytest.mark.slow
def test_a_run_stops_and_begins_where_it_is_told(home: Path) -> None:
    stopped = carry_out("out", last="convert")
    assert stopped.model == Path("out/converted")
    assert json.loads((home / "out" / "run_status.json").read_text())["state"] == "stopped"
    with pytest.raises(InputError, match="--from evaluate: uptrain is not done yet"):
        carry_out("out", first="evaluate")
    with pytest.raises(InputError, match="--until benchmark: the recipe has no such stage"):
        carry_out("out", last="benchmark")
    whole = carry_out("out")
    # what was written beside the result makes the same again
    again = run("out/recipe.yaml", output="again")
    assert results(again.output)["uptrained/model.safetensors"] == results(whole.output)["uptrained/model.safetensors"]
    assert (home / "again" / "recipe.yaml").read_text() == (home / "out" / "recipe.yaml").read_text()


@pytest.mark.slow
def test_a_failed_gate_ends_with_3_and_keeps_everything(home: Path, invoke: Command) -> None:
    words = ["--set", "gates.max_kl=0", *(word for key, value in FAST.items() for word in ("--set", f"{key}={value}"))]
    words += ["--set", "uptrain=null", "--set", "convert.method=mean", "--set", "convert.calibration=null"]
    words += ["--set", "convert.calibration_tokens=null", "--set", "convert.calibration_sequence_length=null"]
    for _ in range(2):  # and again, of what is done before
        outcome = invoke("run", home / "recipe.yaml", *words, "--output", home / "out")
        assert outcome.returncode == 3
        assert "the KL to the original is" in outcome.stderr
        assert "max_kl" in outcome.stdout
    assert "**1 of 1 gates failed.**" in (home / "out" / "report.md").read_text()
    assert json.loads((home / "out" / "run_status.json").read_text())["state"] == "gates failed"
    with pytest.raises(FailedGatesError) as caught:
        run(home / "recipe.yaml", overrides=[word for word in words if word != "--set"], output=home / "out")
    assert [gate.passed for gate in caught.value.run.gates] == [False]


class Reader(HTMLParser):
    """The cells of a page's tables, its images, and whatever would be fetched or run."""

    def __init__(self) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.images: list[str] = []
        self.foreign: list[str] = []
        self._in_cell = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag == "td":
            self._in_cell = True
            self.cells.append("")
        if tag == "img":
            self.images.append(str(found["src"]))
        if tag in ("script", "link", "iframe") or str(found.get("src", "data:")).partition(":")[0] != "data":
            self.foreign.append(tag)

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag != "td"

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.cells[-1] += data


@pytest.mark.slow
def test_the_report_says_what_was_measured(home: Path) -> None:
    done = carry_out("out", quickly=False)
    evaluation = json.loads((home / "out" / "evaluation.json").read_text())
    timed = json.loads((home / "out" / "benchmark.json").read_text())
    against = evaluation["against"]
    rows = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in (home / "out" / "report.md").read_text().splitlines()
        if line.startswith("| ")
    ]
    excess = f"{against['excess_nats_per_token']:.4f} ± {against['excess_standard_error']:.4f}"
    divergence = f"{against['kl_nats_per_token']:.4f} ± {against['kl_standard_error']:.4f}"
    expected = [
        ["uptrained", f"{evaluation['perplexity']:.4g}", f"{evaluation['nats_per_token']:.4f}", excess, divergence],
        ["original", f"{against['original_perplexity']:.4g}", f"{against['original_nats_per_token']:.4f}", "0", "0"],
    ]
    for found in expected:
        (row,) = [row for row in rows if row[0] == found[0] and len(row) == 6]
        assert [row[0], row[1], row[2].split(" ± ")[0], *row[3:5]] == found
    for point in timed["points"]:
        (row,) = [row for row in rows if row[:2] == ["1", str(point["context"])]]
        assert row[3] == f"{1e3 * point['result']['decode']['median']:.4g}"
        assert row[4] == f"{point['decode_gain']['ratio']:.2f}"
    reader = Reader()
    reader.feed((home / "out" / "report.html").read_text())
    plain = [cell.replace("\\", "") for row in rows for cell in row]
    assert set(reader.cells) <= {*plain, ""}
    assert {excess, divergence, f"{evaluation['perplexity']:.4g}"} <= set(reader.cells)
    assert reader.foreign == []
    assert len(reader.images) == 4
    assert all(image.startswith("data:image/png;base64,") for image in reader.images)
    card = (done.model / "README.md").read_text()
    assert f"value: {evaluation['perplexity']}" in card
    assert "kvconvert run recipe.yaml" in card
    assert (done.model / "recipe.yaml").exists()
    assert verify(done.model).ok


def test_names_from_files_are_shown_and_not_obeyed(home: Path) -> None:
    from kvconvert.pipeline.report import render_report
    from kvconvert.pipeline.story import Fact, SampleText, Section, Story, Table

    hostile = "<script>alert(1)</script> | `x` \x1b[31m"
    table = Table(("model",), ((hostile,),))
    section = Section(
        "Part", text=(hostile,), facts=(Fact("Name", hostile),), tables=(table,), code=f"a: 1\n# {hostile}\n"
    )
    sample = Section("Samples", samples=(SampleText(hostile, hostile, hostile, ""),))
    texts = render_report(Story(hostile, hostile, None, (), (section, sample)), {})
    assert "<script>" not in texts["report.html"]
    assert "\x1b" not in texts["report.html"] + texts["report.md"]
    assert r"\<script\>alert(1)\</script\> \| \`x\`" in texts["report.md"]


def test_two_runs_do_not_work_in_one_place(home: Path) -> None:
    (home / "out").mkdir()
    with FileLock(home / "out" / ".lock"), pytest.raises(OutputError, match="another run is at work there"):
        carry_out("out")


def test_a_place_that_is_not_a_runs_is_refused(home: Path) -> None:
    shutil.copytree(home / "model_dir", home / "out")
    with pytest.raises(OutputError, match="out exists and is not a run's"):
        carry_out("out")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("convert.method=mean", "recipe.yaml:2: convert: calibration belongs to method: svd"),
        ("convert.groups=3", "convert: 8 K/V heads cannot form 3 equal groups"),
        ("uptrain.teacher=nobody/nothing", "nobody/nothing"),
        ("uptrain.kl_weight=-1", "--set uptrain.kl_weight=-1: uptrain.kl_weight is -1, expected 0 or more"),
        ("evaluate.stride=4", None),
        ("evaluate.hub_results=true", "evaluate: hub_results is about tasks, and none is named"),
        ("gates.min_recovery=50%", None),
        ("evaluate=null", "recipe.yaml:29: gates are of an evaluation"),
        ("uptrain.no_teacher=true", None),
        ("uptrain.tokens=1M", "recipe.yaml:9: uptrain: steps and tokens each say how long it is"),
        ("convert.share=2", "--set convert.share=2: convert.share belongs to target: cla"),
        ("benchmark.context=[100000]", "a context of 100000 and 3 new tokens do not fit the model"),
        ("push.repo=org/name", "push: no token for the hub"),
    ],
)
def test_what_is_wrong_is_found_before_any_work(
    override: str, message: str | None, home: Path, invoke: Command
) -> None:
    words = ["--set", override, "--output", home / "out", "--dry-run", "--quiet"]
    outcome = invoke("run", home / "recipe.yaml", *words)
    assert outcome.returncode == (0 if message is None else 2), outcome.stderr
    if message is not None:
        assert message in outcome.stderr
    assert not (home / "out").exists()


def test_what_would_be_refused_hours_later_is_refused_before_any_work(home: Path) -> None:
    with pytest.raises(InputError, match=r"recipe.yaml:9: uptrain: .*40"):
        carry_out("out", overrides=["uptrain.global_batch_tokens=40"])
    assert not (home / "out" / "converted").exists()


@pytest.mark.slow
def test_a_plan_says_what_a_run_would_do(home: Path) -> None:
    """Also what it would refuse, and what is made again because something before it is."""

    def planned(**options: Any) -> dict[str, bool]:
        changes = [f"{key}={value}" for key, value in FAST.items()] + options.pop("overrides", [])
        plan = plan_run("recipe.yaml", overrides=changes, output="out", **options)
        return {stage.name: stage.done_before for stage in plan.stages}

    assert planned() == {"convert": False, "uptrain": False, "evaluate": False, "report": False}
    carry_out("out")
    assert planned() == {"convert": True, "uptrain": True, "evaluate": True, "report": False}
    with pytest.raises(OutputError, match=r"convert was carried out otherwise") as refused:
        planned(overrides=["convert.groups=4"])
    with pytest.raises(OutputError) as also_refused:
        carry_out("out", overrides=["convert.groups=4"])
    assert str(refused.value) == str(also_refused.value)
    with pytest.raises(OutputError, match=r"uptrain was carried out otherwise: steps was 4, is 6") as refused:
        planned(overrides=["uptrain.steps=6"])
    assert "--from uptrain" in str(refused.value.hint)
    again = planned(overrides=["uptrain.steps=6"], first="uptrain")
    assert again == {"convert": True, "uptrain": False, "evaluate": False, "report": False}
    assert planned(first="convert", last="uptrain") == {"convert": False, "uptrain": False}
    # what the recipe does not have any more is not told
    carry_out("out", overrides=["evaluate=null", "gates=null"])
    assert "Perplexity" not in (home / "out" / "report.md").read_text()


def test_a_launcher_is_told_how_to_go_about_it(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="a run of a recipe is one process"):
        carry_out("out")
