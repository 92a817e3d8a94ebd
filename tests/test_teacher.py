from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CheckpointFactory, Train, load, logits, weights
from kvconvert.convert import Gqa, as_target, execute, open_checkpoint
from kvconvert.convert.errors import UnsupportedError
from kvconvert.uptrain.models import require_separation
from kvconvert.uptrain.teacher import as_teacher, write_teacher

OPT: dict[str, Any] = {"word_embed_proj_dim": 64, "ffn_dim": 64}


@pytest.mark.parametrize(("model_type", "overrides"), [("gpt_neox", {}), ("opt", OPT)])
def test_a_teacher_of_a_class_without_grouped_attention_computes_the_same(
    model_type: str, overrides: dict[str, Any], make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = make_checkpoint(model_type, **overrides)
    with open_checkpoint(source) as checkpoint:
        write_teacher(checkpoint, tmp_path / "teacher")
    written = load(tmp_path / "teacher")
    assert written.config.num_key_value_heads == 8
    expected = logits(load(source))
    torch.testing.assert_close(logits(written), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    require_separation(written, name="teacher", bf16=False)


def test_a_class_that_is_trained_stays_as_it_is(make_checkpoint: CheckpointFactory) -> None:
    with open_checkpoint(make_checkpoint()) as checkpoint:
        assert as_teacher(checkpoint) is checkpoint


def test_a_class_that_nothing_holds_is_refused(make_checkpoint: CheckpointFactory) -> None:
    source = make_checkpoint()
    config = json.loads((source / "config.json").read_text()) | {"model_type": "nonesuch"}
    (source / "config.json").write_text(json.dumps(config))
    with (
        open_checkpoint(source) as checkpoint,
        pytest.raises(UnsupportedError, match="model_type 'nonesuch' is not supported"),
    ):
        as_teacher(checkpoint)


@pytest.mark.parametrize(("model_type", "overrides"), [("gpt_neox", {}), ("opt", OPT)])
def test_a_converted_model_learns_from_its_original(
    model_type: str, overrides: dict[str, Any], train: Train, make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    """OPT itself mixes packed documents: its logits on them would be no target."""
    original = make_checkpoint(model_type, name="original", with_tokenizer=True, **overrides)
    with as_target(open_checkpoint(original), 2) as view:
        execute(Gqa(2).plan(view), view.checkpoint, tmp_path / "gqa2")
    output = train("out", model=tmp_path / "gqa2", teacher=original)
    key = "model.layers.0.self_attn.k_proj.weight"
    assert not torch.equal(weights(output)[key], weights(tmp_path / "gqa2")[key])
    assert {path.name for path in tmp_path.glob("out*")} == {"out"}
