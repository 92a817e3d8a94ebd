"""A sequence that is longer than a model takes is refused wherever one is chosen, and no default is longer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import CheckpointFactory, Command, RunHere
from kvconvert.convert import Calibration, Gqa, convert, inspect
from kvconvert.convert.architectures.context import context_of, longest_context
from kvconvert.convert.errors import UnsupportedError
from kvconvert.measure.held_out import default_window, evaluate_checkpoint
from kvconvert.measure.windows import Windows


def rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **values}}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"max_position_embeddings": 512}, 512),
        ({"n_positions": 256, "n_ctx": 128}, 256),
        ({"max_seq_len": 64}, 64),
        ({"seq_length": 8192}, 8192),
        ({"hidden_size": 64}, None),  # relative positions, or a state
        ({"max_position_embeddings": None}, None),
        ({"max_position_embeddings": 512, **rope("default")}, 512),
        ({"max_position_embeddings": 4096, **rope("linear", factor=4.0)}, 16384),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, 8192),
        ({"max_position_embeddings": 32768, **rope("yarn", factor=4.0)}, 131072),
        # the length in the config is the stretched one already
        ({"max_position_embeddings": 131072, **rope("yarn", factor=32, original_max_position_embeddings=4096)}, 131072),
        (
            {"max_position_embeddings": 131072, **rope("llama3", factor=8, original_max_position_embeddings=8192)},
            131072,
        ),
        ({"max_position_embeddings": 131072, **rope("longrope", original_max_position_embeddings=4096)}, 131072),
        # layers that differ: nobody stretches all of them
        ({"max_position_embeddings": 1024, "rope_parameters": {"full_attention": rope("linear", factor=8)}}, 1024),
    ],
)
def test_how_long_a_context_a_config_gives(config: dict[str, Any], expected: int | None) -> None:
    assert context_of(config) == expected


def test_what_config_json_leaves_out_is_the_default_of_the_class(make_checkpoint: CheckpointFactory) -> None:
    model = make_checkpoint("gpt2", num_hidden_layers=1, max_position_embeddings=96)
    assert longest_context(model) == 96
    config = json.loads((model / "config.json").read_text())
    del config["n_positions"]
    (model / "config.json").write_text(json.dumps(config))
    assert longest_context(model) == 1024


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_evaluate_takes_windows_up_to_the_context(
    model_type: str, make_checkpoint: CheckpointFactory, invoke: Command, run_here: RunHere, prose_file: Path
) -> None:
    """Rotary positions would only get worse without a word, and a table of positions ends."""
    model = make_checkpoint(model_type, num_hidden_layers=1, max_position_embeddings=48, with_tokenizer=True)
    longer = make_checkpoint(model_type, name="longer", num_hidden_layers=1, with_tokenizer=True)
    arguments = ("--data", prose_file, "--max-windows", 1)
    chosen = [
        run_here("evaluate", one, *arguments, "--against", other)["method"]
        for one, other in ((model, model), (longer, model), (longer, longer))
    ]
    assert ["windows of 48 tokens" in chosen[0], "of 48 tokens" in chosen[1], "of 128 tokens" in chosen[2]] == [
        True
    ] * 3
    for one, other in ((model, model), (longer, model), (model, longer)):
        outcome = invoke("evaluate", one, *arguments, "--against", other, "--window", 49)
        assert outcome.returncode == 2
        assert outcome.stderr == (
            f"error: window 49 does not fit {model} (it takes 48 tokens)\nhint: use 48 or less (--window)\n"
        )
    assert invoke("evaluate", model, *arguments, "--window", 48).returncode == 0


def test_windows_that_a_caller_has_cut_are_checked_too(make_checkpoint: CheckpointFactory) -> None:
    import torch

    model = make_checkpoint(max_position_embeddings=48, with_tokenizer=True)
    windows = Windows(torch.zeros(1, 49, dtype=torch.long), (1,), "")
    with pytest.raises(UnsupportedError, match=r"window 49 does not fit .*model \(it takes 48 tokens\)"):
        evaluate_checkpoint(model, windows)


def test_uptrain_and_calibration_take_sequences_up_to_the_context(
    make_checkpoint: CheckpointFactory, invoke: Command, run_here: RunHere, prose_file: Path, tmp_path: Path
) -> None:
    student = make_checkpoint(with_tokenizer=True)
    teacher = make_checkpoint(name="teacher", max_position_embeddings=48, with_tokenizer=True)
    run = ("uptrain", student, "--data", prose_file, "--steps", 1, "--teacher", teacher, "--dry-run")
    assert run_here(*run)["settings"]["sequence_length"] == 48
    outcome = invoke(*run, "--sequence-length", 64)
    assert outcome.returncode == 2
    assert f"error: sequence length 64 does not fit {teacher} (it takes 48 tokens)" in outcome.stderr
    convert = (
        "mha2gqa",
        teacher,
        "--groups",
        2,
        "--method",
        "svd",
        "--calibration",
        prose_file,
        "--output",
        tmp_path / "out",
    )
    outcome = invoke(*convert, "--calibration-sequence-length", 49)
    assert outcome.returncode == 2
    assert outcome.stderr == (
        f"error: sequence length 49 does not fit {teacher} (it takes 48 tokens)\n"
        "hint: use 48 or less (--calibration-sequence-length)\n"
    )


def test_the_context_of_stretched_rope_is_one_number_everywhere(
    make_checkpoint: CheckpointFactory, tmp_path: Path, prose_file: Path
) -> None:
    model = make_checkpoint(max_position_embeddings=32, with_tokenizer=True)
    config = json.loads((model / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    (model / "config.json").write_text(json.dumps(config))
    assert inspect(model).context_length == longest_context(model) == default_window(model, None) == 64
    gqa = Gqa(2, merge="svd")
    calibration = Calibration(prose_file, num_tokens=256, sequence_length=64)
    convert(model, gqa, tmp_path / "out", calibration=calibration, dry_run=True)
    with pytest.raises(UnsupportedError, match=r"sequence length 65 does not fit .*model \(it takes 64 tokens\)"):
        convert(model, gqa, tmp_path / "out", calibration=replace(calibration, sequence_length=65), dry_run=True)
