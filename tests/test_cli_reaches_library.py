"""Every option of a conversion reaches the library's call, in the field that it is named after."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from kvconvert.cli import conversion
from kvconvert.cli.main import app
from kvconvert.convert import Calibration, Cla, Gqa, LayerGrouping, Mla
from kvconvert.convert.checkpoint.remote_code import remote_code_allowed
from typer.main import get_command
from typer.testing import CliRunner


class StoppedError(Exception):
    """Ends a command where the library would begin."""


Look = Callable[[dict[str, Any]], object]
Row = tuple[list[str], Look, object]

TEXT: dict[str, Row] = {
    "data": (["--calibration", "a.txt"], lambda call: call["calibration"].data, "a.txt"),
    "num_tokens": (["--calibration-tokens", "9"], lambda call: call["calibration"].num_tokens, 9),
    "sequence_length": (["--calibration-sequence-length", "7"], lambda call: call["calibration"].sequence_length, 7),
    "text_field": (["--text-field", "verse"], lambda call: call["calibration"].text_field, "verse"),
    "split": (["--split", "test"], lambda call: call["calibration"].split, "test"),
    "config": (["--data-config", "en"], lambda call: call["calibration"].config, "en"),
    "line_documents": (["--line-documents"], lambda call: call["calibration"].line_documents, True),
    "document_separator": (["--document-separator", "--"], lambda call: call["calibration"].document_separator, "--"),
    "skip_bad_lines": (["--skip-bad-lines"], lambda call: call["calibration"].skip_bad_lines, True),
    "writing_seed": (
        ["--calibration-seed", "5", "--calibration", "self"],
        lambda call: call["calibration"].writing_seed,
        5,
    ),
    "precision": (["--precision", "bf16"], lambda call: call["calibration"].precision, "bf16"),
    "device": (["--device", "cuda:1"], lambda call: call["calibration"].device, "cuda:1"),
}
STATISTICS: dict[str, Row] = {
    "statistics": (["--statistics", "f"], lambda call: call["calibration"].statistics, Path("f")),
    "save_statistics": (
        ["--save-statistics", "f", "--calibration", "a.txt"],
        lambda call: call["calibration"].save_statistics,
        Path("f"),
    ),
}
WEIGHTS_ONLY: dict[str, Row] = {
    "weights_only": (["--no-calibration"], lambda call: call["calibration"].weights_only, True),
}
EVERY: dict[str, Row] = {
    "model": ([], lambda call: call["model"], "a-model"),
    "output": (["--output", "out"], lambda call: call["output"], Path("out")),
    "max_shard_size": (["--max-shard-size", "2MB"], lambda call: call["max_shard_bytes"], 2_000_000),
    "jobs": (["--jobs", "3"], lambda call: call["jobs"], 3),
    "allow_nonfinite": (["--allow-nonfinite"], lambda call: call["allow_nonfinite"], True),
    "revision": (["--revision", "v2"], lambda call: call["revision"], "v2"),
    "trust_remote_code": (["--trust-remote-code"], lambda call: call["trusted"], True),
    "dry_run": (["--dry-run"], lambda call: call["dry_run"], True),
    "force": (["--force"], lambda call: call["force"], True),
    "work_dir": (["--work-dir", "w"], lambda call: call["work_dir"], Path("w")),
    # how the command talks is not the library's: tests/test_cli.py
    "as_json": (["--json"], lambda call: None, None),
    "quiet": (["--quiet"], lambda call: None, None),
}


def of(name: str) -> Look:
    return lambda call: getattr(call["method"], name)


MHA2GQA: dict[str, Row] = {
    "merge": (["--method", "first"], of("merge"), "first"),
    "refit": (["--method", "svd", "--no-refit"], of("refit"), False),
    "fit_steps": (["--method", "svd", "--fit-steps", "3"], of("fit_steps"), 3),
    "head_dim": (["--method", "svd", "--head-dim", "12"], of("head_dim"), 12),
    "rope_selection": (
        ["--method", "svd", "--head-dim", "12", "--rope-selection", "default"],
        of("rope_selection"),
        "default",
    ),
    "seed": (["--method", "random", "--seed", "5"], of("seed"), 5),
    "allow_same": (["--allow-same"], of("allow_same"), True),
}
COMMANDS: dict[str, tuple[list[str], list[str], type, dict[str, Row]]] = {
    "mha2gqa": (
        ["--groups", "2"],
        ["--method", "svd"],
        Gqa,
        MHA2GQA
        | STATISTICS
        | WEIGHTS_ONLY
        | {
            "num_key_value_heads": ([], of("num_key_value_heads"), 2),
            "grouping": (["--method", "svd", "--grouping", "contiguous"], of("grouping"), "contiguous"),
        },
    ),
    "mha2mqa": ([], ["--method", "svd"], Gqa, MHA2GQA | STATISTICS | WEIGHTS_ONLY),
    "mha2cla": (
        ["--share", "3"],
        ["--method", "svd"],
        Cla,
        {
            "merge": (["--method", "first"], of("merge"), "first"),
            "refit": (["--method", "svd", "--no-refit"], of("refit"), False),
            "fit_steps": (["--method", "svd", "--fit-steps", "3"], of("fit_steps"), 3),
            "grouping": (["--method", "svd", "--grouping", "contiguous"], of("grouping"), "contiguous"),
            "share": ([], of("share"), 3),
            "num_key_value_heads": (["--groups", "2"], of("num_key_value_heads"), 2),
            "keep_first": (["--keep-first", "1"], of("keep_first"), 1),
            "keep_last": (["--keep-last", "1"], of("keep_last"), 1),
            "pairs": (["--pairs", "auto"], of("pairs"), "auto"),
            "num_key_value_layers": (["-SHARE", "--pairs", "auto", "--kv-layers", "2"], of("num_key_value_layers"), 2),
            "kv_source_layers": (["-SHARE", "--kv-source-layers", "0,0"], of("layers"), LayerGrouping((0, 0))),
        },
    ),
    "mha2mla": (
        ["--kv-lora-rank", "24", "--qk-rope-head-dim", "4"],
        [],
        Mla,
        WEIGHTS_ONLY
        | {
            "kv_lora_rank": ([], of("kv_lora_rank"), 24),
            "qk_rope_head_dim": ([], of("qk_rope_head_dim"), 4),
            "latent_norm": (["--latent-norm", "exact"], of("latent_norm"), "exact"),
            "rope_selection": (["--rope-selection", "gain"], of("rope_selection"), "gain"),
            "rope_interleave": (["--rope-layout", "half-split"], of("rope_interleave"), False),
            "v_head_dim": (["--v-head-dim", "16"], of("v_head_dim"), 16),
            "refit": (["--no-refit"], of("refit"), False),
            "fit_steps": (["--fit-steps", "3"], of("fit_steps"), 3),
        },
    ),
}
CASES = [(command, name) for command, (_, _, _, own) in COMMANDS.items() for name in (*EVERY, *TEXT, *own)]


def call_of(monkeypatch: pytest.MonkeyPatch, command: str, options: list[str]) -> dict[str, Any]:
    """What the command hands to `convert`, which is not run."""
    seen: dict[str, Any] = {}

    def stop(model: str, method: object, output: object, **named: Any) -> None:
        seen.update(named, model=model, method=method, output=output, trusted=remote_code_allowed())
        raise StoppedError

    monkeypatch.setattr(conversion, "convert", stop)
    outcome = CliRunner().invoke(app, [command, "a-model", *options])
    assert seen, outcome.output
    return seen


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_row(command: str) -> None:
    parameters = {parameter.name for parameter in get_command(app).commands[command].params}  # type: ignore[attr-defined]
    assert parameters - {"help"} == {*EVERY, *TEXT, *COMMANDS[command][3]}


@pytest.mark.parametrize(("command", "name"), CASES)
def test_an_option_reaches_the_library(command: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    basis, with_text, settings, own = COMMANDS[command]
    options, look, expected = (EVERY | TEXT | own)[name]
    if name in (*TEXT, *STATISTICS, *WEIGHTS_ONLY):
        options = with_text + options
    if "-SHARE" in options:
        basis, options = [], options[1:]
    call = call_of(monkeypatch, command, basis + options)
    assert isinstance(call["method"], settings)
    assert call["calibration"] is None or isinstance(call["calibration"], Calibration)
    assert look(call) == expected
    if options:  # the control: without the option it is something else
        without = call_of(
            monkeypatch, command, ["--share", "3", *with_text] if command == "mha2cla" else basis + with_text
        )
        assert expected is None or look({"calibration": Calibration("b"), **without}) != expected


UPTRAIN: dict[str, tuple[list[str], str, object]] = {
    "model": ([], "model", "a-model"),
    "data": (["--data", "b.txt:0.5"], "data", ("a.txt", "b.txt:0.5")),
    "teacher": (["--teacher", "t"], "teacher", "t"),
    "output": (["--output", "out"], "output", Path("out")),
    "revision": (["--revision", "v2"], "revision", "v2"),
    "force": (["--force"], "force", True),
    "steps": (["--steps", "5"], "length.steps", 5),
    "tokens": (["--tokens", "1B"], "length.tokens", 10**9),
    "fraction": (["--fraction", "5%"], "length.fraction", 0.05),
    "pretraining_tokens": (["--pretraining-tokens", "2T"], "length.pretraining_tokens", 2 * 10**12),
    "yes": (["--yes"], "length.yes", True),
    "text_field": (["--text-field", "verse"], "text.text_field", "verse"),
    "split": (["--split", "test"], "text.split", "test"),
    "data_config": (["--data-config", "en"], "text.data_config", "en"),
    "data_revision": (["--data-revision", "v3"], "text.data_revision", "v3"),
    "line_documents": (["--line-documents"], "text.line_documents", True),
    "document_separator": (["--document-separator", "--"], "text.document_separator", "--"),
    "skip_bad_lines": (["--skip-bad-lines"], "text.skip_bad_lines", True),
    "validation_fraction": (["--validation-fraction", "0.2"], "text.validation_fraction", 0.2),
    "eval_data": (["--eval-data", "e.txt"], "text.eval_data", "e.txt"),
    "eval_split": (["--eval-split", "validation"], "text.eval_split", "validation"),
    "recipe": (["--recipe", "light"], "settings.recipe", "light"),
    "train_only": (["--train-only", "kv"], "settings.train_only", "kv"),
    "kl_weight": (["--kl-weight", "0.5"], "settings.kl_weight", 0.5),
    "ce_weight": (["--ce-weight", "0.5"], "settings.ce_weight", 0.5),
    "temperature": (["--temperature", "2"], "settings.temperature", 2.0),
    "layerwise_fraction": (["--layerwise-fraction", "0.2"], "settings.layerwise_fraction", 0.2),
    "lr": (["--lr", "2e-4"], "settings.lr", 2e-4),
    "lr_sweep": (["--lr-sweep", "3"], "settings.lr_sweep", 3),
    "layerwise_lr": (["--layerwise-lr", "3e-4"], "settings.layerwise_lr", 3e-4),
    "body_lr_multiplier": (["--body-lr-multiplier", "0.2"], "settings.body_lr_multiplier", 0.2),
    "lr_scheduler": (["--lr-scheduler", "linear"], "settings.lr_scheduler", "linear"),
    "warmup_fraction": (["--warmup-fraction", "0.1"], "settings.warmup_fraction", 0.1),
    "weight_decay": (["--weight-decay", "0.2"], "settings.weight_decay", 0.2),
    "max_grad_norm": (["--max-grad-norm", "0.5"], "settings.max_grad_norm", 0.5),
    "seed": (["--seed", "7"], "settings.seed", 7),
    "sequence_length": (["--sequence-length", "64"], "settings.sequence_length", 64),
    "global_batch_tokens": (["--global-batch-tokens", "16K"], "settings.global_batch_tokens", 16_000),
    "micro_batch": (["--micro-batch", "4"], "machine.micro_batch", 4),
    "precision": (["--precision", "bf16"], "settings.precision", "bf16"),
    "keep_best": (["--keep-best"], "settings.keep_best", True),
    "compile": (["--compile"], "machine.compile", True),
    "activation_checkpointing": (["--activation-checkpointing"], "machine.activation_checkpointing", True),
    "fsdp": (["--fsdp"], "machine.fsdp", True),
    "gpu": (["--gpu", "NVIDIA H100 80GB HBM3"], "machine.gpu", "NVIDIA H100 80GB HBM3"),
    "report_to": (["--report-to", "wandb"], "machine.report_to", ("wandb",)),
    "eval_steps": (["--eval-steps", "9"], "monitoring.eval_steps", 9),
    "save_steps": (["--save-steps", "9"], "monitoring.save_steps", 9),
    "log_steps": (["--log-steps", "9"], "monitoring.log_steps", 9),
    "max_time": (["--max-time", "5h45m"], "monitoring.max_time", 5 * 3600 + 45 * 60),
}
TALK = {"trust_remote_code", "dry_run", "as_json", "quiet"}  # tests/test_cli_uptrain.py and tests/test_cli.py
NOT_TYPED = {"config", "no_teacher"}  # tests/test_defaults.py


def asked(monkeypatch: pytest.MonkeyPatch, options: list[str]) -> object:
    """The request that the command makes, which is not planned."""
    seen: list[object] = []

    def stop(request: object, **named: Any) -> None:
        seen.append(request)
        raise StoppedError

    monkeypatch.setattr("kvconvert.uptrain.plan.plan_uptraining", stop)
    outcome = CliRunner().invoke(app, ["uptrain", "a-model", "--data", "a.txt", *options])
    assert seen, outcome.output
    return seen[0]


def test_every_option_of_uptrain_has_a_row() -> None:
    parameters = {parameter.name for parameter in get_command(app).commands["uptrain"].params}  # type: ignore[attr-defined]
    assert parameters - {"help"} == {*UPTRAIN, *TALK, *NOT_TYPED}


@pytest.mark.parametrize("name", UPTRAIN)
def test_an_option_of_uptrain_reaches_the_library(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options, place, expected = UPTRAIN[name]
    field = attrgetter(place)
    assert field(asked(monkeypatch, options)) == expected
    if options:
        assert field(asked(monkeypatch, [])) != expected


BENCHMARK: dict[str, tuple[list[str], str, object]] = {
    "model": ([], "model", "a-model"),
    "against": (["--against", "b"], "against", "b"),
    "revision": (["--revision", "v2"], "revision", "v2"),
    "batches": (["--batch", "1,8", "--batch", "64"], "settings.batches", (1, 8, 64)),
    "contexts": (["--context", "8", "--context", "9, 10"], "settings.contexts", (8, 9, 10)),
    "tokens": (["--tokens", "7"], "settings.tokens", 7),
    "warm_up": (["--warm-up", "0"], "settings.warm_up", 0),
    "repeats": (["--repeats", "9"], "settings.repeats", 9),
    "prefill": (["--no-prefill"], "settings.prefill", False),
    "compile": (["--compile"], "settings.compile", True),
    "engine": (["--engine", "vllm"], "settings.engine", "vllm"),
    "dtype": (["--dtype", "bfloat16"], "settings.dtype", "bfloat16"),
    "memory_bytes": (["--memory", "80GB"], "settings.memory_bytes", 80 * 10**9),
    "trust_remote_code": (["--trust-remote-code"], "trusted", True),
}


def timed(monkeypatch: pytest.MonkeyPatch, options: list[str]) -> object:
    """What the command hands to `benchmark`, which is not run."""
    seen: list[object] = []

    def stop(model: str, **named: Any) -> None:
        seen.append(SimpleNamespace(model=model, trusted=remote_code_allowed(), **named))
        raise StoppedError

    monkeypatch.setattr("kvconvert.measure.benchmarking.benchmark", stop)
    outcome = CliRunner().invoke(app, ["benchmark", "a-model", *options])
    assert seen, outcome.output
    return seen[0]


def test_every_option_of_benchmark_has_a_row() -> None:
    parameters = {parameter.name for parameter in get_command(app).commands["benchmark"].params}  # type: ignore[attr-defined]
    # how it talks and draws is in tests/test_benchmark.py, and its default original in tests/test_defaults.py
    assert parameters - {"help"} == {*BENCHMARK, "as_json", "quiet", "picture", "no_against"}


@pytest.mark.parametrize("name", BENCHMARK)
def test_an_option_of_benchmark_reaches_the_library(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options, place, expected = BENCHMARK[name]
    field = attrgetter(place)
    assert field(timed(monkeypatch, options)) == expected
    if options:
        assert field(timed(monkeypatch, [])) != expected
