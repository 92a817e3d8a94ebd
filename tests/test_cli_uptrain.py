"""kvconvert uptrain: its options, what it refuses, what it prints."""

from __future__ import annotations

import gzip
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import CheckpointFactory
from kvconvert.cli.main import app
from kvconvert.convert.errors import OutputError, PreemptedError
from kvconvert.uptrain import TextSettings, UptrainSettings, sweep
from kvconvert.uptrain import uptrain as library_uptrain
from kvconvert.uptrain.run import run_checked as uptrain_job
from kvconvert.uptrain.settings import rate_for_start
from torch._inductor import config as inductor
from typer.testing import CliRunner

Invoke = Callable[..., Any]


@pytest.fixture
def uptrain(make_checkpoint: CheckpointFactory, prose_file: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Invoke the command in this process on a tiny model; `data` None leaves --data to the arguments."""
    model = make_checkpoint(num_key_value_heads=2, with_tokenizer=True)
    monkeypatch.setenv("COLUMNS", "200")

    def invoke(*arguments: object, data: Path | None = prose_file) -> Any:
        given = [] if data is None else ["--data", str(data)]
        return CliRunner().invoke(app, ["uptrain", str(model), *given, *map(str, arguments)])

    return invoke


def dry_run(uptrain: Invoke, *arguments: object, **options: Any) -> Any:
    outcome = uptrain(*arguments, "--dry-run", "--json", "--quiet", **options)
    assert outcome.exit_code == 0, outcome.output
    return json.loads(outcome.stdout)


@pytest.mark.parametrize(
    ("arguments", "steps", "fraction"),
    [
        (["--steps", 7], 7, None),
        (["--tokens", "4k"], 8, None),
        (["--fraction", "10%", "--pretraining-tokens", "100k"], 20, 0.1),
        (["--fraction", "0.01", "--pretraining-tokens", "100k"], 2, 0.01),
        (["--pretraining-tokens", "102400"], 10, 0.05),
    ],
)
def test_budgets(arguments: list[object], steps: int, fraction: float | None, uptrain: Invoke) -> None:
    plan = dry_run(uptrain, *arguments, "--global-batch-tokens", 512)
    assert plan["budget"]["steps"] == steps
    assert plan["budget"]["fraction"] == fraction
    assert plan["tokens"] == steps * 512


@pytest.mark.parametrize(
    ("method", "arguments", "rate"),
    [
        ("svd", [], 2.5e-4),
        ("mean", [], 1e-3),
        (None, [], 1e-3),
        ("svd", ["--recipe", "distill"], 1e-3),
        ("svd", ["--lr", 0.5], 0.5),
    ],
)
def test_the_default_learning_rate(
    method: str | None, arguments: list[object], rate: float, uptrain: Invoke, tmp_path: Path
) -> None:
    if method is not None:
        (tmp_path / "model" / "kvconvert.json").write_text(json.dumps({"method": method}))
    teacher = ["--teacher", tmp_path / "model"] if "distill" in arguments else []
    plan = dry_run(uptrain, "--steps", 1, "--global-batch-tokens", 512, *arguments, *teacher)
    assert plan["settings"]["learning_rate"] == rate


@pytest.mark.parametrize(
    ("fraction", "message"),
    [
        ("1e-9", "error: a validation fraction of 1e-09 holds out no document of this text\n"),
        ("0.02", "holds out 10 tokens of this text, fewer than one block of 32\n"),
        ("0.999999", "a validation fraction of 0.999999 holds out every document, so that nothing is left to train on"),
    ],
)
def test_a_held_out_fraction_that_takes_nothing_or_everything(
    fraction: str, message: str, uptrain: Invoke, tmp_path: Path
) -> None:
    text = tmp_path / "short.jsonl"
    text.write_text("".join(json.dumps({"text": f"Chapter {number}."}) + "\n" for number in range(40)))
    length = ["--steps", 1, "--global-batch-tokens", 32, "--sequence-length", 32]
    outcome = uptrain(*length, "--validation-fraction", fraction, data=text)
    assert outcome.exit_code == 2
    assert message in outcome.stderr
    assert not list(tmp_path.glob("model-uptrained*"))


def test_a_default_that_holds_out_nothing_is_said(uptrain: Invoke, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("It was the best of times. " * 20)
    length = ["--steps", 1, "--global-batch-tokens", 32, "--sequence-length", 32]
    nothing = "a validation fraction of 0.01 holds out no document of this text"
    outcome = uptrain(*length, "--keep-best", data=text)
    assert outcome.exit_code == 2
    assert f"error: --keep-best compares held-out loss, and {nothing}\n" in outcome.stderr
    outcome = uptrain(*length, data=text)
    assert outcome.exit_code == 0
    assert f"no held-out score: {nothing}" in outcome.stderr


def test_the_best_cannot_be_kept_without_a_score(uptrain: Invoke, prose_file: Path, tmp_path: Path) -> None:
    length = ["--steps", 1, "--global-batch-tokens", 32, "--sequence-length", 32]
    outcome = uptrain(*length, "--keep-best", "--validation-fraction", 0, "--dry-run")
    assert outcome.exit_code == 2
    assert "error: --keep-best compares held-out loss, and there is no held-out text\n" in outcome.stderr
    library_uptrain(  # the control: a score of the caller's own, between no two steps but after the last
        tmp_path / "model",
        data=prose_file,
        steps=1,
        output=tmp_path / "scored",
        settings=UptrainSettings(global_batch_tokens=32, sequence_length=32, keep_best=True),
        text=TextSettings(validation_fraction=0.0),
        score=lambda model: 1.0,
    )
    assert json.loads((tmp_path / "scored" / "kvconvert.json").read_text())["uptraining"]["kept_step"] == 1


def test_a_default_batch_takes_what_is_nearest(uptrain: Invoke) -> None:
    length = ["--steps", 1, "--sequence-length", 100, "--dry-run"]
    assert dry_run(uptrain, *length)["tokens"] == 16_400
    outcome = uptrain(*length, "--global-batch-tokens", 90)
    assert (outcome.exit_code, outcome.stdout) == (2, "")
    assert "error: --global-batch-tokens 90 cannot be met" in outcome.stderr
    assert "a step takes 500 tokens, 5 sequences" in uptrain(*length, "--global-batch-tokens", 505).stderr


def test_fewer_tokens_than_a_step_are_one_step(uptrain: Invoke) -> None:
    outcome = uptrain("--tokens", 10, "--global-batch-tokens", 512, "--dry-run")
    assert "10 tokens are less than one step of 512: the run takes one step" in outcome.stderr
    assert "less than one step" not in uptrain("--tokens", 512, "--global-batch-tokens", 512, "--dry-run").stderr


def test_pretraining_tokens_beside_the_model_give_the_default(uptrain: Invoke, tmp_path: Path) -> None:
    (tmp_path / "model" / "pretraining.json").write_text('{"pretraining_tokens": 102400}')
    budget = dry_run(uptrain, "--global-batch-tokens", 512)["budget"]
    assert (budget["steps"], budget["fraction"], budget["explicit"]) == (10, 0.05, False)
    assert budget["source"].startswith("pretraining.json beside ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "on how many tokens the model was pretrained is not known, so that 0.05 of them is no number"),
        (["--steps", 1, "--tokens", "1M"], "--steps and --tokens both say how long the run is"),
        (["--steps", 1, "--fraction", "5%"], "--steps and --fraction both say how long the run is"),
        (["--steps", 1, "--micro-batch", 3], "8 sequences of 128 tokens per step cannot be split evenly"),
        (["--steps", 1, "--recipe", "distill"], "recipe distill needs the original model"),
        (["--steps", 1, "--recipe", "pretraining", "--kl-weight", 1], "recipe pretraining has no KL"),
        (["--steps", 1, "--ce-weight", 0], "the weights of KL and cross-entropy are both 0"),
        (["--steps", 1, "--layerwise-fraction", 0.2], "recipe pretraining has one stage only"),
        (["--steps", 1, "--temperature", 0], "temperature is 0.0, expected a positive number"),
        (["--steps", 1, "--lr", "inf"], "learning rate is inf, expected a positive number"),
        (["--steps", 1, "--sequence-length", 512], "sequence length 512 does not fit"),
        (["--steps", 1, "--seed", -1], "seed is -1, expected a number from 0 to 2**32 - 1"),
        (["--steps", 1, "--seed", 2**32], "seed is 4294967296, expected"),
        (["--steps", 1, "--validation-fraction", 1], "validation fraction is 1, expected 0 or more and less than 1"),
        (["--steps", 1, "--data", "/no/such.jsonl"], "/no/such.jsonl: no such file"),
        (["--steps", 1, "--eval-data", "./no-such"], "./no-such: no such file"),
        (["--steps", 1, "--output", "."], ". is no place for a new directory"),
        (["--steps", 1, "--output", "/"], "/ is no place for a new directory"),
        (["--steps", 1, "--gpu", "A6000"], "--gpu A6000: the peak of this GPU is not known"),
    ],
)
@pytest.mark.parametrize("more", [(), ("--dry-run",)], ids=["run", "dry-run"])
def test_refusals(
    arguments: list[object], message: str, more: tuple[str, ...], uptrain: Invoke, tmp_path: Path
) -> None:
    outcome = uptrain(*arguments, "--global-batch-tokens", 1024, *more)
    assert outcome.exit_code == 2
    assert outcome.stdout == ""
    assert outcome.stderr.splitlines()[-1].startswith(("error: ", "hint: "))
    assert message in outcome.stderr
    assert not list(tmp_path.glob("model-uptrained*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--micro-batch", "many"], "'many' is not a number of sequences, nor auto"),
        (["--micro-batch", "0"], "'0' is not a number of sequences, nor auto"),
        (["--max-time", "5"], "'5' is not a duration; write for example 5h45m, 30m or 90s"),
        (["--max-time", "0s"], "'0s' is not a duration"),
        (["--tokens", "some"], "'some' is not a count; write for example 300M, 1B"),
        (["--fraction", "5"], "'5' is not a percentage; write for example 5% or 0.05"),
        (["--recipe", "best"], "'best' is not one of"),
        (["--report-to", "nowhere"], "'nowhere' is not one of"),
        (["--data", "a.jsonl:0"], "'a.jsonl:0' has the weight 0; write a positive number"),
    ],
)
def test_options_that_cannot_be_read(arguments: list[str], message: str, uptrain: Invoke) -> None:
    length = [] if arguments[0] in ("--tokens", "--fraction") else ["--steps", "1"]
    outcome = uptrain(*arguments, *length)
    assert outcome.exit_code == 2
    assert message in " ".join(outcome.stderr.replace("│", " ").split())


@pytest.mark.parametrize("more", [(), ("--dry-run",)], ids=["run", "dry-run"])
def test_a_compiler_that_is_missing_is_found_before_packing(
    more: tuple[str, ...], uptrain: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/no/such/g++")
    with inductor.patch({"cpp.cxx": (None, "/no/such/g++")}):  # which read the variable when it was imported
        outcome = uptrain("--steps", 1, "--global-batch-tokens", 512, "--compile", *more)
    assert (outcome.exit_code, outcome.stdout) == (2, "")
    assert outcome.stderr == (
        "error: --compile cannot be used: no C++ compiler works here (CXX is /no/such/g++)\n"
        "hint: install one, such as g++, or leave --compile out\n"
    )
    assert not list(tmp_path.glob("model-uptrained*"))


def test_the_folder_that_a_tracker_leaves_is_no_tracker(
    uptrain: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "trackio").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    outcome = uptrain("--steps", 1, "--global-batch-tokens", 512, "--report-to", "trackio", "--dry-run")
    assert outcome.exit_code == 2
    assert "error: --report-to trackio: trackio is not installed\nhint: pip install trackio\n" in outcome.stderr


def test_the_memory_of_zero_is_that_of_its_stage(uptrain: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr("kvconvert.uptrain.checks._is_installed", lambda package: True)
    found = []
    for stage in ("0", "2", "3"):
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", stage)
        found.append(dry_run(uptrain, "--steps", 1, "--global-batch-tokens", 4096)["cost"]["memory_bytes"])
    assert found[0] > found[1] > found[2]


@pytest.mark.parametrize(("num_processes", "expected"), [(1, "kvconvert"), (2, "LAUNCHER --nproc 2 program")])
def test_the_command_to_go_on_has_its_launcher(num_processes: int, expected: str) -> None:
    worker = "from kvconvert.cli.uptrain import resume_command; print(resume_command())"
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {worker!r}, *sys.argv[4:]], check=True)"
    told = subprocess.run(
        [sys.executable, "-c", launcher, "--nproc", "2", "program", "uptrain", "a model", "--force", "--steps", "1"],
        env=os.environ | {"WORLD_SIZE": str(num_processes)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    expected = expected.replace("LAUNCHER", shlex.join([sys.executable, "-c", launcher]))
    assert told == f"{expected} uptrain 'a model' --steps 1\n"


def test_weights_in_data(uptrain: Invoke, prose_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_bytes(prose_file.read_bytes())
    outcome = uptrain(
        "--data", f"{prose_file}:0.75", "--data", f"{other}:0.25", "--steps", 2, "--global-batch-tokens", 512,
        "--sequence-length", 32, "--quiet", "--validation-fraction", 0, data=None,
    )  # fmt: skip
    assert outcome.exit_code == 0, outcome.output
    record = json.loads((tmp_path / "model-uptrained" / "kvconvert.json").read_text())["uptraining"]
    assert [(Path(row["text"]["location"]).name, row["weight"]) for row in record["data"]] == [
        ("prose.jsonl", 0.75),
        ("other.jsonl", 0.25),
    ]


def test_what_a_dry_run_says(uptrain: Invoke, make_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    teacher = make_checkpoint(name="teacher", with_tokenizer=True)
    before = sorted(tmp_path.rglob("*"))
    arguments = ["--steps", 10, "--teacher", teacher, "--layerwise-fraction", "0.25", "--global-batch-tokens", 1024]
    plan = dry_run(uptrain, *arguments, "--micro-batch", "auto", "--lr", "1e-4")
    assert sorted(tmp_path.rglob("*")) == before
    assert plan["dry_run"] is True
    assert (plan["objective"], plan["tokens"]) == ("attention regression, then forward KL", 10 * 1024)
    assert [(stage["name"], stage["steps"], stage["trained"]) for stage in plan["stages"]] == [
        ("layerwise", 3, "attention"),
        ("main", 7, "all"),
    ]
    assert plan["execution"]["micro_batch"] is None
    assert plan["settings"]["learning_rate"] == 1e-4
    assert plan["teacher"] == str(teacher)
    assert plan["output"] == str(tmp_path / "model-uptrained")
    assert min(plan["cost"][name] for name in ("flops", "memory_bytes", "disk_bytes", "h100_hours")) > 0
    shown = uptrain(*arguments, "--dry-run").stdout
    for words in ("10 steps", "stage        layerwise: 3 steps", "compute", "memory", "disk", "would write"):
        assert words in shown


def test_an_unknown_gpu_is_answered_with_those_that_are_known(uptrain: Invoke) -> None:
    stderr = uptrain("--steps", 1, "--gpu", "A6000", "--dry-run").stderr
    assert "hint: known are H100 PCIE, H100, H200, B200, A100, A10, A40, L4, L40S, RTX 4090, MI300X" in stderr


@pytest.mark.parametrize(
    "arguments",
    [["--recipe", "pretraining"], ["--kl-weight", 0, "--ce-weight", 1], ["--recipe", "light", "--kl-weight", 0]],
)
def test_a_teacher_that_no_loss_compares_with_is_not_counted(
    arguments: list[object], uptrain: Invoke, make_checkpoint: CheckpointFactory
) -> None:
    teacher = make_checkpoint(name="teacher", with_tokenizer=True)
    length = ["--steps", 1, "--global-batch-tokens", 512]
    arguments = [*arguments, "--ce-weight", 1]
    plan = dry_run(uptrain, *length, *arguments, "--teacher", teacher)
    recipe = arguments if "--recipe" in arguments else ["--recipe", "pretraining", *arguments]
    assert plan["cost"] == dry_run(uptrain, *length, *recipe)["cost"]
    assert (plan["objective"], plan["teacher"]) == ("cross-entropy", None)
    shown = uptrain(*length, *arguments, "--teacher", teacher, "--dry-run")
    assert "objective    cross-entropy\n" in shown.stdout
    assert f"--teacher {teacher} is not used: cross-entropy compares with no teacher" in shown.stderr
    used = dry_run(uptrain, *length, "--teacher", teacher)
    assert used["teacher"] == str(teacher)
    assert used["cost"]["flops"] > plan["cost"]["flops"]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--train-only", "attention", "--with-teacher"],
        ["--layerwise-fraction", 0.5, "--with-teacher"],
        ["--recipe", "light", "--with-teacher", "--precision", "bf16"],
        ["--recipe", "light", "--with-teacher", "--precision", "fp32"],
    ],
)
def test_a_run_asks_for_the_disk_that_its_dry_run_says(
    arguments: list[object], uptrain: Invoke, make_checkpoint: CheckpointFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = make_checkpoint(name="teacher", with_tokenizer=True)
    given = [["--teacher", teacher] if word == "--with-teacher" else [word] for word in arguments]
    words = [word for words in given for word in words]
    asked: list[int] = []

    def refuse(output: Path, num_bytes: int) -> None:
        asked.append(num_bytes)
        raise OutputError("the disk is full")

    monkeypatch.setattr("kvconvert.uptrain.rundir.prepare.check_free_space", refuse)
    length = ["--steps", 10**4, "--global-batch-tokens", 4096]  # more than the text holds
    outcome = uptrain(*length, *words)
    assert "the disk is full" in outcome.stderr
    assert asked == [dry_run(uptrain, *length, *words)["cost"]["disk_bytes"]]


def test_a_mixture_is_packed_until_each_source_has_its_share(uptrain: Invoke, tmp_path: Path, prose_file: Path) -> None:
    """A short source that ends first leaves the other to go on."""
    short = tmp_path / "short.jsonl"
    short.write_text(prose_file.read_text().partition("\n")[0])
    arguments = ["--steps", 4, "--global-batch-tokens", 1024]
    mixed = ["--data", f"{prose_file}:0.5", "--data", f"{short}:0.5"]
    costs = [dry_run(uptrain, *arguments, data=path)["cost"] for path in (prose_file, short)]
    mixture = dry_run(uptrain, *arguments, *mixed, data=None)["cost"]
    assert mixture["passes"] == costs[1]["passes"] / 2 > 1
    num_short = round(4096 / costs[1]["passes"])
    # 2048 tokens of the long one and all of the short one; alone, 4096 of the long one
    assert costs[0]["disk_bytes"] - mixture["disk_bytes"] == 2 * (2048 - num_short)


def test_passes_are_those_over_the_text(uptrain: Invoke, tmp_path: Path, prose_file: Path) -> None:
    """Of which 256 tokens are read and packed: the run says what its dry run says, not that it has seen all of it."""
    arguments = ["--steps", 2, "--global-batch-tokens", 128, "--sequence-length", 32]
    planned = dry_run(uptrain, *arguments)["cost"]["passes"]
    assert 0 < planned < 0.1
    shown = uptrain(*arguments)
    assert shown.exit_code == 0, shown.output
    assert f"about {planned:.2g} passes over the text" in shown.stdout
    record = json.loads((tmp_path / "model-uptrained" / "kvconvert.json").read_text())["uptraining"]
    assert record["passes"] == planned
    compressed = tmp_path / "prose.jsonl.gz"
    compressed.write_bytes(gzip.compress(prose_file.read_bytes()))
    arguments += ["--output", tmp_path / "compressed"]
    unknown = uptrain(*arguments, data=compressed)
    assert "at most one pass over the text" in unknown.stdout
    again = uptrain(*arguments, "--json", data=compressed)
    assert json.loads(again.stdout)["passes"] is None


def test_the_summary_has_the_held_out_score_before_and_after(uptrain: Invoke, tmp_path: Path) -> None:
    length = ["--steps", 2, "--global-batch-tokens", 32, "--sequence-length", 32, "--validation-fraction", 0.3]
    shown = uptrain(*length, "--output", tmp_path / "out")
    assert shown.exit_code == 0, shown.output
    rows = map(json.loads, (tmp_path / "out" / "metrics.jsonl").read_text().splitlines())
    scores = {row["step"]: row["eval_nats_per_token"] for row in rows if "eval_nats_per_token" in row}
    assert list(scores) == [0, 2]
    assert f"  held-out {scores[0]:.4f} before, {scores[2]:.4f} nats/token after\n" in shown.stdout
    again = json.loads(uptrain(*length, "--output", tmp_path / "out", "--json").stdout)  # which is finished
    assert again["held_out_nats_per_token"] == {"before": scores[0], "after": scores[2]}


def test_a_long_run_is_not_started_without_yes(uptrain: Invoke, tmp_path: Path) -> None:
    outcome = uptrain("--tokens", "500000T")
    assert outcome.exit_code == 2
    assert "--yes" in outcome.stderr
    assert not list(tmp_path.glob("model-uptrained*"))
    dry_run(uptrain, "--tokens", "500000T")  # saying what it costs needs no consent


def test_a_finished_run_exits_with_0_and_does_nothing(uptrain: Invoke, tmp_path: Path) -> None:
    arguments = ["--steps", 2, "--global-batch-tokens", 128, "--sequence-length", 32, "--json", "--quiet"]
    first = uptrain(*arguments)
    assert first.exit_code == 0, first.output
    output = tmp_path / "model-uptrained"
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in output.iterdir()}
    again = uptrain(*arguments)
    assert again.exit_code == 0, again.output
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in output.iterdir()} == before
    left_out = ("seconds",)
    results = [{k: v for k, v in json.loads(o.stdout).items() if k not in left_out} for o in (first, again)]
    assert results[0] == results[1]


def test_a_sweep_and_its_rerun(uptrain: Invoke, tmp_path: Path) -> None:
    arguments = ["--steps", 2, "--global-batch-tokens", 128, "--sequence-length", 32, "--lr-sweep", 2]
    arguments += ["--validation-fraction", 0.3, "--json"]
    first = uptrain(*arguments)
    assert first.exit_code == 0, first.output
    assert first.stderr.count("nats/token after 2 steps") == 2
    table = json.loads((tmp_path / "model-uptrained" / "lr_sweep.json").read_text())
    best = min(table["trials"], key=lambda row: row["nats_per_token"])["learning_rate"]
    assert json.loads(first.stdout)["settings"]["learning_rate"] == best
    again = uptrain(*arguments)
    assert again.exit_code == 0, again.output
    assert "nats/token after 2 steps" not in again.stderr
    assert json.loads(again.stdout)["settings"]["learning_rate"] == best
    assert not (tmp_path / "model-uptrained.lr-sweep").exists()


def test_a_sweep_without_a_rate_tries_those_that_follow_from_the_start(uptrain: Invoke, tmp_path: Path) -> None:
    """The student as its own teacher has nothing to recover: both trials are at the least rate."""
    arguments = ["--steps", 2, "--global-batch-tokens", 128, "--sequence-length", 32, "--lr-sweep", 2]
    arguments += ["--validation-fraction", 0.3, "--teacher", tmp_path / "model"]
    shown = uptrain(*arguments, "--dry-run").stdout
    assert "trials       2 steps at each learning rate of at most 0.0005, 0.001" in shown
    assert "peak at most 0.001," in shown
    outcome = uptrain(*arguments, "--json")
    assert outcome.exit_code == 0, outcome.output
    trials = json.loads((tmp_path / "model-uptrained" / "lr_sweep.json").read_text())["trials"]
    assert [trial["learning_rate"] for trial in trials] == [5e-4, 1e-3]
    for trial in trials:
        assert trial["peak_learning_rate"] == rate_for_start(trial["learning_rate"], 0.0)
        assert f"lr {trial['peak_learning_rate']:.2e}: held-out" in outcome.stderr
    start = json.loads(outcome.stdout)["start"]
    assert start["kl_nats_per_token"] == pytest.approx(0, abs=1e-6)
    best = min(trials, key=lambda trial: trial["nats_per_token"])["peak_learning_rate"]
    assert start["peak_learning_rate"] == best
    assert f"learning rate {best:.2e}\n" in outcome.stderr


SWEPT = ["--global-batch-tokens", 128, "--sequence-length", 32, "--validation-fraction", 0.3, "--lr-sweep", 2]


@pytest.fixture
def trials_begun(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of trials that are begun."""
    names: list[str] = []

    def spy(job: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(job.output.name)
        return uptrain_job(job, *args, **kwargs)

    monkeypatch.setattr(sweep, "run_checked", spy)
    return names


@pytest.mark.parametrize("again", [[], ["--force"]])
def test_a_forced_sweep_that_was_stopped_goes_on_and_replaces_the_output(
    again: list[str], uptrain: Invoke, tmp_path: Path, trials_begun: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "model-uptrained"
    assert uptrain("--steps", 1, *SWEPT[:6]).exit_code == 0

    def stopped(job: Any, *args: Any, **kwargs: Any) -> Any:
        if job.output.name == "trial-1":
            raise PreemptedError("stopped")
        return uptrain_job(job, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(sweep, "run_checked", stopped)
        outcome = uptrain("--steps", 2, *SWEPT, "--force")
    assert outcome.exit_code == 75, outcome.output
    assert f"their status is in {output}.lr-sweep/run_status.json" in " ".join(outcome.stderr.split())
    assert json.loads((output / "kvconvert.json").read_text())["uptraining"]["steps"] == 1
    outcome = uptrain("--steps", 2, *SWEPT, *again)
    assert outcome.exit_code == 0, outcome.output
    assert trials_begun == ["trial-1"]
    assert json.loads((output / "kvconvert.json").read_text())["uptraining"]["steps"] == 2
    assert (output / "lr_sweep.json").exists()
    assert {path.name for path in tmp_path.glob("*model-uptrained*")} == {"model-uptrained"}
    before = (output / "model.safetensors").stat().st_mtime_ns
    outcome = uptrain("--steps", 2, *SWEPT)  # which replaces nothing, since it is finished
    assert outcome.exit_code == 0, outcome.output
    assert trials_begun == ["trial-1"]
    assert (output / "model.safetensors").stat().st_mtime_ns == before
    assert uptrain("--steps", 3, *SWEPT).exit_code == 2


def test_what_a_sweep_costs(uptrain: Invoke, trials_begun: list[str]) -> None:
    arguments = ["--global-batch-tokens", 1024, "--steps"]
    alone, with_trials = dry_run(uptrain, *arguments, 100), dry_run(uptrain, *arguments, 100, "--lr-sweep", 3)
    assert alone["trials"] == []
    assert with_trials["trials"] == [{"learning_rate": rate, "steps": 20} for rate in (5e-4, 1e-3, 2e-3)]
    for name in ("flops", "h100_hours"):
        assert with_trials["cost"][name] == pytest.approx(1.6 * alone["cost"][name], rel=1e-12)
    for name in ("steps", "tokens", "memory_bytes", "disk_bytes"):
        assert with_trials["cost"][name] == alone["cost"][name]
    shown = uptrain(*arguments, 100, "--lr-sweep", 3, "--dry-run").stdout
    assert "trials       20 steps at each learning rate of 0.0005, 0.001, 0.002" in shown
    assert "trials included" in shown

    long = round(100 * 900 / alone["cost"]["h100_hours"])  # 900 hours, and 15 % in trials
    assert dry_run(uptrain, *arguments, long)["cost"]["h100_hours"] < 1000
    outcome = uptrain(*arguments, long, "--lr-sweep", 5)
    assert outcome.exit_code == 2
    assert "hint: pass --yes if you mean it" in outcome.stderr
    assert trials_begun == []


@pytest.mark.parametrize("how", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("run", "message"),
    [
        (["--validation-fraction", 0], "--lr-sweep compares held-out loss, and there is no held-out text"),
        (["--output", "done"], "done already exists"),
        (["--output", "stopped"], "holds an unfinished run that began without --lr-sweep"),
        (["--output", "strange"], "strange.lr-sweep is in the way and not a sweep's"),
    ],
)
def test_sweeps_that_are_refused_before_they_begin(
    run: list[object], message: str, how: list[str], uptrain: Invoke, tmp_path: Path, trials_begun: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "strange.lr-sweep").mkdir()
    arguments = ["--steps", 2, *SWEPT[:6]]
    if run[-1] in ("done", "stopped"):
        assert uptrain(*arguments, *run).exit_code == 0
    if run[-1] == "stopped":
        begin_again(tmp_path / "stopped")
    before = sorted(tmp_path.rglob("*"))
    outcome = uptrain(*arguments, "--lr-sweep", 2, *run, *how)
    assert outcome.exit_code == 2, outcome.output
    assert message in outcome.stderr
    assert sorted(tmp_path.rglob("*")) == before
    assert trials_begun == []


def begin_again(output: Path) -> None:
    """Leave a finished run as one that has just begun."""
    work = output.with_name(f"{output.name}.uptraining")
    work.mkdir()
    record = json.loads((output / "kvconvert.json").read_text())["uptraining"]
    (work / "settings.json").write_text(json.dumps(record))
    shutil.rmtree(output)
