"""What a conversion would refuse by headers, `inspect` and a dry run refuse too, with the same line."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import CheckpointFactory, Command
from kvconvert.convert import Calibration, Cla, Gqa, convert, inspect, open_checkpoint
from kvconvert.convert.checkpoint.loading import check_language_model, load_model
from kvconvert.convert.errors import CheckpointError, InputError, OutputError
from safetensors.torch import load_file, save_file

KEYS = "model.layers.1.self_attn.k_proj.weight"


def edit_config(**changes: object) -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        config = json.loads((model / "config.json").read_text()) | changes
        (model / "config.json").write_text(json.dumps(config))

    return edit


def edit_weights(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        edit(tensors)
        save_file(tensors, model / "model.safetensors")

    return apply


DAMAGES = {
    "mismatched": edit_config(intermediate_size=100),
    "no such class": edit_config(hidden_act="nonesuch"),
    "missing": edit_weights(lambda tensors: tensors.pop("model.norm.weight")),
    "unexpected": edit_weights(lambda tensors: tensors.update({"stray.weight": torch.ones(2)})),
    "heads": edit_config(num_key_value_heads=4),
}


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(InputError) as raised:
        action()
    return str(raised.value)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_source_that_its_class_refuses(
    damage: Callable[[Path], None], make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = make_checkpoint()
    damage(source)
    said = refusal(lambda: convert(source, Gqa(2), tmp_path / "out"))
    assert refusal(lambda: convert(source, Gqa(2), tmp_path / "out", dry_run=True)) == said
    assert refusal(lambda: inspect(source)) == said


def test_a_result_that_its_class_refuses(
    make_checkpoint: CheckpointFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is written; the refusal of one target leaves the others."""

    def wrong(self: Gqa, source: Any) -> dict[str, Any]:
        return {**source.checkpoint.config, "num_key_value_heads": 1}

    monkeypatch.setattr(Gqa, "result_config", wrong)
    source = make_checkpoint()
    said = refusal(lambda: convert(source, Gqa(2), tmp_path / "out"))
    assert said == (
        f"{tmp_path / 'out'}: LlamaForCausalLM does not accept its weights: 4 mismatched keys, "
        "first model.layers.0.self_attn.k_proj.weight, whose shape is [16, 64] and by config.json [8, 64]"
    )
    assert refusal(lambda: convert(source, Gqa(2), tmp_path / "out", dry_run=True)) == said
    targets = {target.command: target for target in inspect(source).targets}
    assert targets["mha2gqa"].reason.startswith("LlamaForCausalLM does not accept its weights: 4 mismatched keys")
    assert [command for command, target in targets.items() if target.possible] == ["mha2mqa", "mha2cla", "mha2mla"]


@pytest.mark.parametrize(
    ("method", "calibration"),
    [(Gqa(2), None), (Gqa(2, merge="svd"), Calibration(weights_only=True))],
    ids=["mean", "svd"],
)
def test_a_disk_that_is_too_small(
    method: Any,
    calibration: Calibration | None,
    make_checkpoint: CheckpointFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = make_checkpoint()

    def run(dry_run: bool) -> Any:
        return convert(source, method, tmp_path / "out", calibration=calibration, dry_run=dry_run)

    run(True)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=64 * 2**20))
    for dry_run in (True, False):
        with pytest.raises(OutputError, match=r"needs 0.07 GB, but its disk has 0.07 GB free"):
            run(dry_run)


def test_a_dry_run_copies_no_file(
    make_checkpoint: CheckpointFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies beside the weights can be larger than the disk of temporary files."""
    source = make_checkpoint(with_tokenizer=True)
    brought: dict[str, bool] = {}

    def look(source: Path, target: Path, *, name: str) -> None:
        brought.update({path.name: (target / path.name).is_symlink() for path in source.iterdir()})

    monkeypatch.setattr(sys.modules["kvconvert.convert.execute"], "transfer_tokenizer", look)
    convert(source, Cla(share=2), tmp_path / "out", dry_run=True)
    links = {name for name, is_link in brought.items() if is_link}
    assert links == {"generation_config.json", "tokenizer.json", "tokenizer_config.json"}


def test_what_is_to_be_averaged_and_cannot_be_read(make_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source = make_checkpoint(attention_bias=True)
    name = KEYS.replace("weight", "bias")
    edit_weights(lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))(source)
    said = refusal(lambda: convert(source, Gqa(2), tmp_path / "out"))
    assert said.startswith(f"{name} has dtype I8, which cannot be averaged")
    assert refusal(lambda: convert(source, Gqa(2), tmp_path / "out", dry_run=True)) == said
    assert inspect(source).targets[0].reason == said


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.norm.weight", "its index says that model.norm.weight is in {shard}, but it is not there"),
        (KEYS, rf"layer 1: {KEYS} is missing from .*model \(its index says: {{shard}}\)"),
    ],
)
def test_a_tensor_that_an_index_lists_and_the_class_needs(
    name: str, message: str, make_checkpoint: CheckpointFactory
) -> None:
    source = make_checkpoint(max_shard_size="60KB")
    shard = next(path for path in source.glob("*.safetensors") if name in load_file(path))
    save_file({other: tensor for other, tensor in load_file(shard).items() if other != name}, shard)
    with pytest.raises(CheckpointError, match=message.format(shard=shard.name)):
        inspect(source)


def to_classifier(model: Path) -> None:
    edit_config(architectures=["LlamaForSequenceClassification"], num_labels=2)(model)
    edit_weights(lambda tensors: tensors.pop("lm_head.weight"))(model)
    edit_weights(lambda tensors: tensors.update({"score.weight": torch.ones(2, 64)}))(model)


TO_TRAIN = {
    "missing": DAMAGES["missing"],
    "mismatched": DAMAGES["mismatched"],
    "value head": edit_weights(lambda tensors: tensors.update({"v_head.summary.weight": torch.ones(1, 64)})),
    "classifier": to_classifier,
}


@pytest.mark.parametrize("damage", TO_TRAIN.values(), ids=TO_TRAIN)
def test_training_checks_by_headers_what_loading_would_refuse(
    damage: Callable[[Path], None], make_checkpoint: CheckpointFactory
) -> None:
    source = make_checkpoint()
    with open_checkpoint(source) as checkpoint:
        check_language_model(checkpoint)
    damage(source)
    with open_checkpoint(source) as checkpoint:
        said = refusal(lambda: check_language_model(checkpoint))
    assert refusal(lambda: load_model(source, dtype=torch.float32, device="cpu")) == said


def test_quantised_weights_that_config_does_not_admit_are_not_trained(make_checkpoint: CheckpointFactory) -> None:
    source = make_checkpoint()
    edit_weights(lambda tensors: tensors.update({KEYS: tensors[KEYS].to(torch.float8_e4m3fn)}))(source)
    with open_checkpoint(source) as checkpoint:
        assert "the checkpoint is quantised" in refusal(lambda: check_language_model(checkpoint))


@pytest.mark.parametrize("damaged", ["student", "teacher"])
@pytest.mark.parametrize("more", [(), ("--dry-run",)], ids=["run", "dry-run"])
def test_uptrain_refuses_before_it_packs(
    damaged: str, more: tuple[str, ...], make_checkpoint: CheckpointFactory, invoke: Command, prose_file: Path
) -> None:
    make_checkpoint(name="teacher", with_tokenizer=True)
    student = make_checkpoint(name="student", with_tokenizer=True)
    DAMAGES["missing"](student.with_name(damaged))
    outcome = invoke(
        *("uptrain", student, "--teacher", student.with_name("teacher"), "--data", prose_file),
        *("--steps", 1, "--sequence-length", 32, *more),
    )
    assert outcome.returncode == 2
    message = f"error: {student.with_name(damaged)}: LlamaForCausalLM does not accept its weights: 1 missing keys"
    assert message in outcome.stderr
    assert not list(student.parent.glob("*uptrain*"))
