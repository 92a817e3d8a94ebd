from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import launched
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from conftest import LATENT, CheckpointFactory
from kvconvert.cli.uptrain import take_over_fsdp
from kvconvert.configs import ACCELERATE
from kvconvert.convert.checkpoint.manifest import read_provenance
from kvconvert.uptrain.settings import Execution
from kvconvert.uptrain.training import stage
from safetensors.torch import load_file


def torchrun(num_processes: int, stop_at: int, *paths: Path) -> None:
    program = str(Path(sys.executable).with_name("torchrun"))
    outcome = subprocess.run(
        [program, "--nproc_per_node", str(num_processes), launched.__file__, str(stop_at), *map(str, paths)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(launched.__file__).parent)},
    )
    assert outcome.returncode == 0, outcome.stderr[-3000:]


@pytest.mark.slow
def test_sharded_over_processes_equals_one(
    make_checkpoint: CheckpointFactory, prose_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GQA, CLA and MLA, in both stages; over two processes until one is told to stop, then over four."""
    monkeypatch.setattr(stage, "training_arguments", launched.smooth_training_arguments)
    teacher = make_checkpoint(name="teacher", seed=1, with_tokenizer=True)
    models = [
        make_checkpoint(name="gqa", num_key_value_heads=2, tie_word_embeddings=True, with_tokenizer=True),
        make_checkpoint("cross_layer_decoder", name="cla", kv_source_layers=[0, 0], with_tokenizer=True),
        make_checkpoint("deepseek_v3", name="mla", with_tokenizer=True, **LATENT),
    ]
    torchrun(2, 3, teacher, prose_file, *models)
    torchrun(4, 0, teacher, prose_file, *models)
    for model in models:
        sharded_at, alone = (model.with_name(f"{model.name}-{how}") for how in ("sharded", "alone"))
        launched.uptrain(model, teacher, prose_file, alone, Execution(micro_batch=4))
        sharded, whole, before = (load_file(folder / "model.safetensors") for folder in (sharded_at, alone, model))
        assert sharded.keys() == whole.keys()
        for name, tensor in whole.items():
            torch.testing.assert_close(sharded[name], tensor, rtol=1e-4, atol=1e-6)
        starts = [read_provenance(folder)["uptraining"]["start"] for folder in (sharded_at, alone)]
        assert starts[0] == pytest.approx(starts[1], rel=1e-4)
        moved = [name for name, tensor in whole.items() if not torch.equal(tensor, before[name])]
        assert "model.embed_tokens.weight" in moved  # which FSDP2 gathers for longer than a layer


@pytest.mark.parametrize(
    ("name", "distributed_type"),
    [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP"), ("zero2", "DEEPSPEED"), ("zero3", "DEEPSPEED")],
)
def test_accelerate_reads_our_configurations(name: str, distributed_type: str) -> None:
    config = load_config_from_file(str(ACCELERATE / f"{name}.yaml"))
    assert config.distributed_type == distributed_type
    if name.startswith("zero"):
        assert config.deepspeed_config["zero_stage"] == int(name[-1])


def test_fsdp_of_accelerate_is_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert take_over_fsdp()
    assert "ACCELERATE_USE_FSDP" not in os.environ
    assert not take_over_fsdp()
