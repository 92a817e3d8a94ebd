"""Every option of `evaluate` and `inspect` changes what it should: the result, or what is asked of other libraries.

Of the conversions it is the options that say which text and which revision are read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
import torch
from conftest import PROSE, CheckpointFactory, Command, Outcome
from kvconvert.cli.main import app
from kvconvert.convert.checkpoint.remote_code import remote_code_allowed
from torch.nn.modules.module import register_module_forward_pre_hook
from typer.main import get_command

Arguments = dict[str, object]  # values by option; "" is the argument that has no name, None the value of a flag
ANOTHER = object()  # stands for any value but that of the run without the option


@dataclass
class Seen:
    """A run, and what it asked of other libraries."""

    outcome: Outcome = field(default_factory=lambda: Outcome(-1, "", ""))
    downloads_are_shown: bool = True
    dataset: tuple[object, ...] = ()
    batch_sizes: list[int] = field(default_factory=list)
    first_tokens: set[int] = field(default_factory=set)
    dtypes: set[torch.dtype] = field(default_factory=set)
    remote_code: bool = False

    def __getitem__(self, name: str) -> Any:
        return self.outcome.printed[name]


@dataclass(frozen=True)
class Effect:
    """What `look` finds in a run with these arguments; in one without them, but with those `beside`, it does not."""

    arguments: Arguments
    look: Callable[[Seen], object]
    expected: object = ANOTHER
    beside: Arguments = field(default_factory=dict)


def dataset(seen: Seen) -> object:
    return seen.dataset


def weights_written(seen: Seen) -> str:
    return sha256((Path(seen["output"]) / "model.safetensors").read_bytes()).hexdigest()


RunSeen = Callable[[str, Arguments], Seen]
BASIS: dict[str, Arguments] = {
    "evaluate": {"": "org/tiny", "--data": "{prose}", "--window": 16, "--max-windows": 8, "--json": None},
    "inspect": {"": "org/tiny", "--json": None},
}
CALIBRATED: Arguments = {"": "org/tiny", "--calibration": "{prose}", "--calibration-tokens": 512, "--precision": "fp32"}
CALIBRATED |= {"--output": "{out}", "--force": None, "--json": None}
BASIS |= {
    "mha2gqa": CALIBRATED | {"--groups": 2, "--method": "svd"},
    "mha2mqa": CALIBRATED | {"--method": "svd"},
    "mha2cla": CALIBRATED | {"--share": 2, "--method": "svd"},
    "mha2mla": CALIBRATED | {"--kv-lora-rank": 24, "--qk-rope-head-dim": 4},
}
NAMED: Arguments = {"--data": "org/texts"}
LINES: Arguments = {"--data": "{lines}"}
EFFECTS: dict[str, dict[str, Effect]] = {
    "evaluate": {
        "model": Effect({"": "org/other"}, lambda seen: seen["nats_per_token"]),
        "data": Effect({"--data": "{verse}"}, lambda seen: seen["nats_per_token"]),
        "against": Effect({"--against": "org/other"}, lambda seen: seen["against"]),
        "max_ppl_increase": Effect(
            {"--max-ppl-increase": "900%"},
            lambda seen: seen["gates"] and seen["gates"][0]["threshold"],
            9.0,
            beside={"--against": "org/other"},
        ),
        "min_recovery": Effect(
            {"--min-recovery": "0%"},
            lambda seen: seen["gates"] and seen["gates"][0]["threshold"],
            0.0,
            beside={"--against": "org/other", "--before": "org/tiny"},
        ),
        "max_kl": Effect(
            {"--max-kl": 900},
            lambda seen: seen["gates"] and seen["gates"][0]["threshold"],
            900.0,
            beside={"--against": "org/other"},
        ),
        "before": Effect({"--before": "org/tiny"}, lambda seen: seen["recovery"], beside={"--against": "org/other"}),
        "context": Effect({"--context": 32}, lambda seen: seen["num_tokens"], 31 + 7 * 16),
        "samples": Effect({"--samples": 2}, lambda seen: len(seen["samples"]), 2),
        "output": Effect({"--output": "{out}"}, lambda seen: seen.outcome.stderr.count("wrote "), 1),
        "window": Effect({"--window": 32}, lambda seen: seen["num_tokens"], 8 * 31),
        "stride": Effect({"--stride": 8}, lambda seen: seen["num_tokens"], 15 + 7 * 8),
        "bos": Effect({"--bos": "always"}, lambda seen: seen.first_tokens, {1}),
        "max_windows": Effect({"--max-windows": 3}, lambda seen: seen["num_windows"], 3),
        "text_field": Effect({"--text-field": "verse"}, lambda seen: seen["nats_per_token"]),
        "split": Effect({"--split": "train"}, dataset, ("org/texts", None, "train"), beside=NAMED),
        "config": Effect({"--data-config": "old"}, dataset, ("org/texts", "old", "test"), beside=NAMED),
        "document_separator": Effect({"--document-separator": "the"}, lambda seen: seen["nats_per_token"]),
        "line_documents": Effect({"--line-documents": None}, lambda seen: seen["nats_per_token"], beside=LINES),
        "batch_size": Effect({"--batch-size": 3}, lambda seen: seen.batch_sizes, [3, 3, 2]),
        "dtype": Effect(
            {"--dtype": "bfloat16"}, lambda seen: (seen["dtype"], seen.dtypes), ("bfloat16", {torch.bfloat16})
        ),
        "revision": Effect({"--revision": "v2"}, lambda seen: seen["nats_per_token"]),
        "trust_remote_code": Effect({"--trust-remote-code": None}, lambda seen: seen.remote_code, True),
        "as_json": Effect({"--json": None}, lambda seen: is_json(seen.outcome.stdout), True),
        "quiet": Effect({"--quiet": None}, lambda seen: seen.outcome.stderr, ""),
    },
    "inspect": {
        "model": Effect({"": "org/other"}, lambda seen: seen["num_key_value_heads"], 2),
        "context": Effect(
            {"--context": 1000},
            lambda seen: (seen["context_length"], seen["cache_bytes_for_context"]),
            (1000, 1000 * 512),
        ),
        "batch": Effect(
            {"--batch": 3},
            lambda seen: seen["cache_plan"]["batch"],
            3,
            beside={"--gpu-memory": "1GB"},
        ),
        "gpu_memory": Effect(
            {"--gpu-memory": "1GB"},
            lambda seen: seen["cache_plan"]["usable_bytes"],
            900_000_000,
            beside={"--batch": 3},
        ),
        "revision": Effect({"--revision": "v2"}, lambda seen: seen["num_key_value_heads"], 4),
        "as_json": Effect({"--json": None}, lambda seen: is_json(seen.outcome.stdout), True),
        "quiet": Effect({"--quiet": None}, lambda seen: seen.downloads_are_shown, False),
    },
}
COMPLETE = tuple(EFFECTS)
CALIBRATED_ON_NAMED: Arguments = {"--calibration": "org/texts"}
EFFECTS |= {
    command: {
        "text_field": Effect({"--text-field": "verse"}, weights_written),
        "split": Effect({"--split": "test"}, dataset, ("org/texts", None, "test"), beside=CALIBRATED_ON_NAMED),
        "config": Effect({"--data-config": "old"}, dataset, ("org/texts", "old", "train"), beside=CALIBRATED_ON_NAMED),
        "revision": Effect({"--revision": "v2"}, weights_written),
    }
    for command in ("mha2gqa", "mha2mqa", "mha2cla", "mha2mla")
}


def is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


@pytest.fixture
def run_seen(
    make_checkpoint: CheckpointFactory, invoke: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> RunSeen:
    """Run a command with a hub of three checkpoints and a dataset, and watch what it asks of them and of the models."""
    checkpoints = {
        ("org/tiny", None): make_checkpoint(with_tokenizer=True),
        ("org/tiny", "v2"): make_checkpoint(name="v2", seed=1, num_key_value_heads=4, with_tokenizer=True),
        ("org/other", None): make_checkpoint(name="other", seed=2, num_key_value_heads=2, with_tokenizer=True),
    }
    rows = [{"text": PROSE, "verse": " ".join(reversed(PROSE.split()))}] * 4
    (tmp_path / "prose.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "verse.jsonl").write_text("".join(json.dumps({"text": row["verse"]}) + "\n" for row in rows))
    (tmp_path / "lines.txt").write_text("\n".join(PROSE.split(", ")))
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)

    def run(command: str, arguments: Arguments) -> Seen:
        seen = Seen()

        def download(repo_id: str, filename: str, *, revision: str | None = None, **options: object) -> str:
            seen.downloads_are_shown = "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ
            return str(checkpoints[repo_id, revision] / filename)

        def load_dataset(name: str, config: str | None, *, split: str, **options: object) -> list[dict[str, str]]:
            seen.dataset = (name, config, split)
            return rows

        def watch(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
            if isinstance(module, torch.nn.Embedding):
                (token_ids,) = inputs  # (B, T)
                seen.batch_sizes.append(len(token_ids))
                seen.first_tokens |= set(token_ids[:, 0].tolist())
                seen.dtypes.add(module.weight.dtype)
                seen.remote_code = remote_code_allowed()

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)  # offline, as all tests are
        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        monkeypatch.setattr("kvconvert.convert.text.hub._is_cached", lambda name: True)
        words = [word for pair in arguments.items() for word in pair if word not in ("", None)]
        texts = {"{prose}": tmp_path / "prose.jsonl", "{verse}": tmp_path / "verse.jsonl"}
        places = texts | {"{lines}": tmp_path / "lines.txt", "{out}": tmp_path / "out"}
        with register_module_forward_pre_hook(watch):
            seen.outcome = invoke(command, *(places.get(str(word), word) for word in words))
        assert seen.outcome.returncode == 0, seen.outcome.stderr
        return seen

    return run


@pytest.mark.parametrize("command", COMPLETE)
def test_every_option_is_in_the_table(command: str) -> None:
    parameters = get_command(app).commands[command].params  # type: ignore[attr-defined]
    # without --skip-bad-lines the run that would show its effect is refused (test_text_formats.py); the others need
    # what an earlier run wrote, or a package of an extra (test_evaluation.py)
    elsewhere = {"help", "skip_bad_lines", "baseline", "tasks", "task_directory", "task_limit", "num_fewshot"}
    elsewhere |= {"hub_results", "no_against"} if command == "evaluate" else set()  # also tests/test_defaults.py
    assert {parameter.name for parameter in parameters} - elsewhere == set(EFFECTS[command])


@pytest.mark.parametrize(
    ("command", "name"), [(command, name) for command, effects in EFFECTS.items() for name in effects]
)
def test_an_option_changes_what_it_should(command: str, name: str, run_seen: RunSeen) -> None:
    effect = EFFECTS[command][name]
    others = BASIS[command] | effect.beside
    without = {option: value for option, value in others.items() if value is not None or option not in effect.arguments}
    before, after = (effect.look(run_seen(command, arguments)) for arguments in (without, without | effect.arguments))
    assert after != before
    if effect.expected is not ANOTHER:
        assert after == effect.expected
