"""A sweep: targets as they are typed, the front, and what is done, kept and gone on with."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from conftest import CheckpointFactory, Command
from hypothesis import given
from hypothesis import strategies as st
from kvconvert.convert import Calibration, Cla, Gqa, Mla, convert
from kvconvert.convert.errors import InputError, OutputError
from kvconvert.measure import BenchmarkSettings, EvaluationSettings, evaluate
from kvconvert.pipeline import Sweep, SweepRow, Uptraining, parse_target, sweep
from kvconvert.pipeline.sweep_rows import Quality, Speed, as_csv, as_table, front

Run = Callable[..., Sweep]
SCORING = EvaluationSettings(window=32, max_windows=8)


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("gqa:8", Gqa(8, merge="svd")),
        (" MQA ", Gqa(1, merge="svd")),
        ("gqa:2x128", Gqa(2, merge="svd", head_dim=128)),
        ("mqax96", Gqa(1, merge="svd", head_dim=96)),
        ("cla2", Cla(share=2, merge="svd")),
        ("mqa+cla2", Cla(share=2, num_key_value_heads=1, merge="svd")),
        ("gqa:4+cla3", Cla(share=3, num_key_value_heads=4, merge="svd")),
        ("mla:256+64", Mla(256, 64)),
    ],
)
def test_targets_are_conversions(text: str, method: Any) -> None:
    target = parse_target(text)
    assert target.method == method
    assert target.name == text.strip().lower()
    assert set(target.folder) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


@pytest.mark.parametrize(
    "text", ["", "gqa", "gqa:", "gqa:-1", "cla", "mla:256", "mqa+mqa", "cla2+mqa", "mqa+mla:8+8", "x"]
)
def test_what_is_no_target_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="is no target"):
        parse_target(text)


def test_a_target_that_its_merge_cannot_make_is_refused() -> None:
    with pytest.raises(InputError, match="layers that share keep the size of their heads"):
        parse_target("gqa:2x16+cla2")
    with pytest.raises(InputError, match="mean keeps the size of heads"):
        parse_target("gqa:2x16", merge="mean")
    assert parse_target("cla2", merge="mean").method == Cla(share=2, merge="mean")


@given(st.text(alphabet="gqamcl:+x0123456789 ", max_size=14))
def test_any_text_is_a_target_or_refused(text: str) -> None:
    try:
        target = parse_target(text)
    except InputError:
        return
    assert parse_target(target.name) == target


def row(target: str, cache: int, excess: float, after: float | None = None) -> SweepRow:
    def quality(value: float) -> Quality:
        return Quality(20.0, value, 0.001, value, 0.9)

    return SweepRow(target, cache, 8, "llama", 1.5, quality(excess), None if after is None else quality(after), None)


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), max_size=8))
def test_nothing_on_the_front_is_beaten_and_all_else_is(places: list[tuple[int, int]]) -> None:
    rows = [row(f"t{number}", cache, float(excess)) for number, (cache, excess) in enumerate(places)]
    best = front(rows)
    for one in rows:
        rivals = [
            (other.cache_bytes_per_token, other.before.excess_nats_per_token) for other in rows if other is not one
        ]
        mine = (one.cache_bytes_per_token, one.before.excess_nats_per_token)
        is_beaten = any(cache <= mine[0] and excess <= mine[1] and (cache, excess) != mine for cache, excess in rivals)
        if one.target in best:
            assert not is_beaten
        else:
            assert is_beaten or mine in rivals
    assert [next(r for r in rows if r.target == name).cache_bytes_per_token for name in best] == sorted(
        (next(r for r in rows if r.target == name).cache_bytes_per_token for name in best), reverse=True
    )


def test_the_front_is_of_what_is_left_after_uptraining() -> None:
    rows = [row("a", 8, 0.1, after=0.05), row("b", 8, 0.2, after=0.02), row("c", 4, 0.3, after=0.05)]
    assert front(rows) == ("b", "c")


def test_tables_say_what_rows_do() -> None:
    rows = [row("mqa", 64, 0.25, after=0.125), row("gqa:4", 256, 0.5), row("mla:3+2", 100, 0.75)]
    lines = as_table(rows, 512, 19.5).splitlines()
    assert lines[2] == "| original | 512 | 1 | 19.5 | 0 | 0 |  |  |  |"
    assert [line.split(" | ")[1:3] for line in lines[3:]] == [["256", "1/2"], ["100", "0.195"], ["64", "1/8"]]
    assert lines[5] == "| **mqa** | 64 | 1/8 | 20 | 0.2500 ± 0.0010 | 0.2500 | 20 | 0.1250 ± 0.0010 | 0.1250 |"
    timed = replace(rows[0], speed=(Speed(2, 16, 1.0, 1.5, 1.5, 2.0), Speed(2, 32, None, None, None, None)))
    assert as_table([timed], 512, 19.5).splitlines()[3].endswith("| 1.50 (bound 2.00) |  |")
    assert "decode_2x16_gain" in as_csv([timed])
    read = list(csv.DictReader(as_csv(rows).splitlines()))
    assert [(each["target"], each["on_front"]) for each in read] == [
        ("mqa", "True"),
        ("gqa:4", "False"),
        ("mla:3+2", "False"),
    ]
    assert (read[0]["before_excess_nats_per_token"], read[0]["after_excess_nats_per_token"]) == ("0.25", "0.125")
    assert [SweepRow.from_json(json.loads(json.dumps(asdict(each)))) for each in (*rows, timed)] == [*rows, timed]


@pytest.fixture
def model(make_checkpoint: CheckpointFactory) -> Path:
    return make_checkpoint(with_tokenizer=True)


@pytest.fixture
def run(model: Path, prose_file: Path, tmp_path: Path) -> Run:
    def do(*targets: str, place: Path = tmp_path / "out", **options: Any) -> Sweep:
        given: dict[str, Any] = {"merge": "mean", "evaluation": SCORING, "picture": False, "keep": "all"}
        return sweep(model, targets, prose_file, place, **(given | options))

    return do


def test_rows_are_what_the_steps_alone_say(run: Run, model: Path, prose_file: Path, tmp_path: Path) -> None:
    calibration = Calibration(prose_file, 256, 32, precision="fp32", device="cpu")
    found = run("gqa:4", "mqa", "cla2", merge="svd", calibration=calibration)
    assert [each.target for each in found.rows] == ["gqa:4", "mqa", "cla2"]
    assert [each.cache_bytes_per_token for each in found.rows] == [256, 64, 256]
    assert found.original_cache_bytes_per_token == 512
    for each in found.rows:
        assert each.output is not None
        alone = evaluate(each.output, prose_file, against=model, settings=SCORING)
        assert alone.against is not None
        assert each.before.perplexity == alone.perplexity
        assert each.before.excess_nats_per_token == alone.against.excess_nats_per_token
        assert alone.against.original_perplexity == found.original_perplexity
        assert alone.method == found.method
    manifest = json.loads((tmp_path / "out" / "models" / "mqa" / "kvconvert.json").read_text())
    assert (manifest["method"], manifest["calibration"]["num_tokens"]) == ("svd", 256)
    written = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert written == json.loads(json.dumps(found.to_json()))
    assert [Path(each).name for each in written["files"]] == ["sweep.json", "sweep.csv", "sweep.md"]
    assert (tmp_path / "out" / "sweep.md").read_text() == f"{found.report()}\n"


def test_a_second_call_does_what_is_missing_alone(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run("gqa:4", "mqa")
    converted: list[str] = []

    def note(*arguments: Any, **options: Any) -> Any:
        converted.append(arguments[2].name)
        return convert(*arguments, **options)

    monkeypatch.setattr("kvconvert.pipeline.sweeping.convert", note)
    again = run("gqa:4", "mqa", "gqa:2")
    assert converted == ["gqa-2"]
    assert again.rows[:2] == first.rows


def test_a_sweep_that_was_ended_goes_on(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = run("gqa:4", "mqa", place=tmp_path / "whole")
    evaluated = [0]

    def end(*arguments: Any, **options: Any) -> Any:
        evaluated[0] += 1
        if evaluated[0] == 2:
            raise KeyboardInterrupt
        return evaluate(*arguments, **options)

    monkeypatch.setattr("kvconvert.pipeline.sweeping.evaluate", end)
    with pytest.raises(KeyboardInterrupt):
        run("gqa:4", "mqa")
    assert not (tmp_path / "out" / "sweep.json").exists()
    gone_on = run("gqa:4", "mqa")
    assert evaluated == [3]  # the first target was not scored again
    assert [(each.target, each.before) for each in gone_on.rows] == [(each.target, each.before) for each in whole.rows]


def test_models_stay_as_asked(run: Run, tmp_path: Path) -> None:
    def models(place: str) -> set[str]:
        return {path.name for path in (tmp_path / place / "models").iterdir()}

    targets = ("cla2", "gqa:4", "mqa")  # the first two take the same cache, and one of them loses less
    everything = run(*targets, place=tmp_path / "all")
    assert models("all") == {"cla2", "gqa-4", "mqa"}
    best = run(*targets, place=tmp_path / "best", keep="best")
    assert models("best") == {parse_target(name).folder for name in everything.front}
    assert len(models("best")) < 3
    nothing = run(*targets, place=tmp_path / "none", keep="none")
    assert models("none") == set()
    for found in (best, nothing):
        assert [each.before for each in found.rows] == [each.before for each in everything.rows]
        assert {each.target for each in found.rows if each.output} <= set(found.front)


def test_targets_are_uptrained_and_scored_again(run: Run, prose_file: Path, tmp_path: Path) -> None:
    found = run("mqa", uptraining=Uptraining((str(prose_file),), 2048, 32, 256), keep="best")
    (only,) = found.rows
    assert only.after is not None
    assert only.after.kl_nats_per_token < 0.9 * only.before.kl_nats_per_token
    assert only.output == str(tmp_path / "out" / "models" / "mqa-uptrained")
    assert {path.name for path in (tmp_path / "out" / "models").iterdir()} == {"mqa-uptrained"}
    trained = json.loads((tmp_path / "out" / "models" / "mqa-uptrained" / "kvconvert.json").read_text())
    assert "uptraining" in json.dumps(trained)


def test_decoding_is_timed_where_that_is_asked_for(run: Run, model: Path, tmp_path: Path) -> None:
    found = run("mqa", speed=BenchmarkSettings((1,), (16, 32), tokens=2, warm_up=1, repeats=1))
    (only,) = found.rows
    assert [(each.batch, each.context) for each in only.speed] == [(1, 16), (1, 32)]
    for each in only.speed:
        assert each.milliseconds
        assert each.original_milliseconds
        assert each.gain == pytest.approx(each.original_milliseconds / each.milliseconds)
        assert each.bound is not None
        assert each.bound > 1
    assert "times faster, batch 1, context 16" in found.report()
    again = run("mqa", speed=BenchmarkSettings((1,), (16, 32), tokens=2, warm_up=1, repeats=1))
    assert again.rows == found.rows


def test_what_cannot_be_done_is_refused_before_any_work(run: Run, model: Path, tmp_path: Path) -> None:
    for targets, message in (
        (("mqa", "gqa:3"), "gqa:3: "),
        (("mqa", "mla:2+2000"), "mla:2\\+2000: "),
        ((), "no target"),
    ):
        with pytest.raises(InputError, match=message):
            run(*targets)
    with pytest.raises(InputError, match="keep is 'some'"):
        run("mqa", keep="some")
    with pytest.raises(InputError, match=r"missing\.txt"):
        run("mqa", uptraining=Uptraining((str(tmp_path / "missing.txt"),), 2048))
    with pytest.raises(InputError, match="new tokens do not fit"):
        run("mqa", speed=BenchmarkSettings((1,), (2**20,)))
    with pytest.raises(InputError, match="does not fit"):
        run("mqa", evaluation=EvaluationSettings(window=2**20))
    (tmp_path / "empty.txt").touch()
    with pytest.raises(InputError, match=r"empty\.txt"):
        sweep(model, ["mqa"], tmp_path / "empty.txt", tmp_path / "out", merge="mean", picture=False)
    assert not (tmp_path / "out").exists()


def test_another_sweep_in_the_same_place_is_refused(run: Run, tmp_path: Path) -> None:
    run("mqa")
    with pytest.raises(OutputError, match="holds a sweep with another evaluation"):
        run("mqa", evaluation=EvaluationSettings(window=16))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(OutputError, match="is not a sweep's"):
        run("mqa", place=tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["file"]


def test_the_command_end_to_end(model: Path, prose_file: Path, invoke: Command, tmp_path: Path) -> None:
    options = ["--data", prose_file, "--targets", "gqa:4,mqa", "--method", "mean", "--window", 32, "--no-picture"]
    outcome = invoke("sweep", model, *options)
    assert outcome.returncode == 0, outcome.stderr
    assert "| original | 512 | 1 |" in outcome.stdout
    printed = invoke("sweep", model, *options, "--json").printed
    assert [each["target"] for each in printed["rows"]] == ["gqa:4", "mqa"]
    assert Path(printed["files"][0]).parent == model.with_name("model-sweep")
    for wrong, message in (
        (["--uptrain", "1M"], "--uptrain needs --uptrain-data"),
        (["--uptrain-data", "x"], "--uptrain-data needs --uptrain"),
        (["--targets", "gqa"], "is no target"),
        (["--benchmark", "1"], "expected a batch x context"),
        (["--benchmark", "1x16,2x32"], "write 1x16,1x32,2x16,2x32"),
    ):
        refused = invoke("sweep", model, *options, *wrong)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert message in refused.stderr
