from __future__ import annotations

import gzip
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partialmethod
from hashlib import sha256
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import (
    OVERRIDES,
    SETTINGS,
    VOCAB_SIZE,
    CheckpointFactory,
    KilledError,
    Train,
    build_model,
    load,
    pack_numbers,
    same_weights,
    settings_with,
    weights,
)
from kvconvert import configs
from kvconvert.convert import ARCHITECTURES, Gqa, as_target, convert, execute, open_checkpoint
from kvconvert.convert.architectures.source import Source
from kvconvert.convert.checkpoint.manifest import unlike_manifest
from kvconvert.convert.device import default_precision
from kvconvert.convert.errors import (
    CheckpointError,
    DataError,
    DivergedError,
    InputError,
    OutputError,
    PreemptedError,
    UnsupportedError,
)
from kvconvert.convert.runtime.transformers_interface import RELIED_ON
from kvconvert.convert.text.sources import TextSource
from kvconvert.measure.held_out import evaluate_checkpoint, load_windows
from kvconvert.uptrain import run
from kvconvert.uptrain.data.blocks import PackedBlocks, validation_blocks
from kvconvert.uptrain.data.sources import WeightedSource
from kvconvert.uptrain.job import UptrainJob
from kvconvert.uptrain.losses import prediction
from kvconvert.uptrain.models import load_for_training
from kvconvert.uptrain.observation import Observation
from kvconvert.uptrain.recipe import LossWeights, Recipe, Trained
from kvconvert.uptrain.settings import Execution, RunSettings
from kvconvert.uptrain.training import evaluation
from kvconvert.uptrain.training.arguments import training_arguments
from kvconvert.uptrain.training.trainer import UptrainTrainer
from safetensors.torch import save_file
from torch._dynamo.utils import counters
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments
from transformers.integrations import integration_utils


@pytest.mark.parametrize(
    "model_type",
    [name for name, entry in ARCHITECTURES.items() if entry.separates_documents and not entry.cross_attention],
)
def test_packed_documents_do_not_see_each_other(model_type: str, tmp_path: Path) -> None:
    """Trap 2: what the trainer feeds isolates documents; the same with an attention mask, the control, does not."""
    first, second = list(range(10, 20)), list(range(30, 46))
    sample = pack_numbers(tmp_path, [first, second], sequence_length=26, num_blocks=1)[0]
    feed = {k: v[None] for k, v in sample.items() if k != "labels"}
    perturbed = {**feed, "input_ids": feed["input_ids"].clone()}
    perturbed["input_ids"][0, :10] += 100
    model = build_model(model_type, **OVERRIDES.get(model_type, {}))
    mask = torch.ones_like(feed["input_ids"])
    with torch.inference_mode():
        alone, other = (model(**f, use_cache=False).logits[0, 10:] for f in (feed, perturbed))
        leaking = [model(**f, attention_mask=mask, use_cache=False).logits[0, 10:] for f in (feed, perturbed)]
    torch.testing.assert_close(alone, other, rtol=0, atol=1e-5 * alone.abs().max().item())
    assert (leaking[0] - leaking[1]).abs().max() > 1e-3


def test_the_trainer_feeds_neither_mask_nor_cache(train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    fed: list[dict[str, Any]] = []
    compute_loss = UptrainTrainer.compute_loss

    def spy(self: UptrainTrainer, model: Any, *args: Any, **kwargs: Any) -> Any:
        model.register_forward_pre_hook(lambda module, positional, named: fed.append(named), with_kwargs=True)
        monkeypatch.setattr(UptrainTrainer, "compute_loss", compute_loss)
        return compute_loss(self, model, *args, **kwargs)

    monkeypatch.setattr(UptrainTrainer, "compute_loss", spy)
    train("out", settings=settings_with(steps=1))
    assert [sorted(named) for named in fed] == [["input_ids", "position_ids", "use_cache"]]
    assert fed[0]["use_cache"] is False


def test_alibi_does_not_mix_packed_documents(tmp_path: Path) -> None:
    documents = [list(range(10, 20)), list(range(30, 46))]
    sample = pack_numbers(tmp_path, documents, sequence_length=26, num_blocks=1)[0]
    feed = {k: v[None] for k, v in sample.items() if k != "labels"}
    for rounded in (False, True):
        slopes = [2.0**-head for head in range(8)]
        alibi: dict[str, Any] = {"position_embedding_type": "alibi", "alibi_slopes": slopes, "alibi_bfloat16": rounded}
        model = build_model("grouped_decoder", **alibi)
        alone = {name: tensor[:, 10:] for name, tensor in feed.items()}
        with torch.inference_mode():
            packed, apart = (model(**inputs, use_cache=False).logits for inputs in (feed, alone))
        torch.testing.assert_close(packed[:, 10:], apart, rtol=0, atol=1e-5 * apart.abs().max().item())


def broken_row(directory: Path, row: int) -> Path:
    """Make the embedding of one token nan."""
    tensors = weights(directory)
    tensors["model.embed_tokens.weight"][row] = float("nan")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize(
    ("culprit", "recipe", "row", "where"),
    [
        ("teacher", Recipe.distill, 5, "before the first step"),  # a token that the first look at a model has
        ("teacher", Recipe.distill, 266, "(step 1: loss is nan; the weights were not updated)"),  # of the text only
        ("teacher", Recipe.layerwise, 266, "from the attention of layer 0 on"),
        ("model", Recipe.distill, 266, "(step 1: loss is nan; the weights were not updated)"),
    ],
)
def test_whose_logits_are_not_finite(
    culprit: str, recipe: Recipe, row: int, where: str, train: Train, make_checkpoint: CheckpointFactory
) -> None:
    models = {name: make_checkpoint(name=name, with_tokenizer=True) for name in ("teacher", "model")}
    broken = broken_row(models[culprit], row)
    said = f"{broken}: logits are not finite {where}: 64 values of its model.embed_tokens.weight are not finite"
    with pytest.raises(CheckpointError, match=f"^{re.escape(said)}$") as raised:
        train("out", settings=settings_with(steps=1, recipe=recipe, weights=LossWeights()), **models)
    assert raised.value.exit_code == 2


def test_a_source_whose_held_out_loss_is_not_finite(train: Train, make_checkpoint: CheckpointFactory) -> None:
    broken = Observation(score=lambda model: math.inf, eval_steps=2)
    sound = make_checkpoint(name="sound", with_tokenizer=True)
    with pytest.raises(
        CheckpointError, match=r"sound: logits are not finite before the first step \(held-out loss inf"
    ):
        train("out", model=sound, watch=broken)
    late = iter([1.0, math.nan])
    with pytest.raises(DivergedError, match="step 2: held-out loss is nan after it; no checkpoint was saved before it"):
        train("late", model=sound, watch=replace(broken, score=lambda model: next(late)))


def test_a_last_step_that_breaks_the_weights_is_not_published(train: Train, tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"step 1: \d+ tensors are not finite after it, first .*weight"):
        train("out", settings=settings_with(steps=1, learning_rate=1e39))
    assert not (tmp_path / "out").exists()


def test_weights_beyond_the_range_of_the_sources_dtype_are_not_published(
    train: Train, make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    half = make_checkpoint(name="half", dtype=torch.float16, with_tokenizer=True)
    with pytest.raises(DivergedError, match="weight: trained to values that are beyond the range of float16, the sou"):
        train("out", model=half, settings=settings_with(steps=1, learning_rate=1e6))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("with_teacher", [False, True])
def test_gradient_accumulation_changes_nothing(
    with_teacher: bool, train: Callable[..., Path], make_checkpoint: CheckpointFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap 1: 4 sequences at once, or 1 at a time. The control lets the Trainer scale the loss a second time."""
    teacher = str(make_checkpoint(name="teacher", seed=1, with_tokenizer=True)) if with_teacher else None
    # plain gradient steps without clipping: AdamW and clipping would hide a wrong scale of the gradient
    settings = settings_with(max_grad_norm=0.0, optimizer="sgd")
    one_by_one = Execution(micro_batch=1)
    whole = weights(train("whole", teacher=teacher, settings=settings))
    parts = weights(train("parts", teacher=teacher, settings=settings, execution=one_by_one))
    name = "model.layers.0.self_attn.k_proj.weight"
    # float32, six steps: sums in another order
    torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-5)
    if not hasattr(Trainer, "loss_is_scaled_for_ga"):  # which is read from 5.19 on
        return
    monkeypatch.setattr(UptrainTrainer, "loss_is_scaled_for_ga", False)
    scaled_twice = weights(train("scaled-twice", teacher=teacher, settings=settings, execution=one_by_one))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(scaled_twice[name], whole[name], rtol=1e-4, atol=1e-5)


def test_master_weights_are_float32_and_the_result_has_the_sources_dtype(
    train: Callable[..., Path], make_checkpoint: CheckpointFactory
) -> None:
    """Trap 3: at this learning rate one bfloat16 step changes almost nothing; float32 weights move everywhere."""
    source = make_checkpoint(name="half", dtype=torch.bfloat16, with_tokenizer=True)
    seen: list[tuple[set[torch.dtype], torch.Tensor]] = []

    def score(model: Any) -> float:
        dtypes = {parameter.dtype for parameter in model.parameters()}
        seen.append((dtypes, model.model.layers[0].mlp.up_proj.weight.detach().clone()))
        return 0.0

    watch = Observation(score=score, eval_steps=1)
    settings = settings_with(steps=3, learning_rate=1e-5, warmup_fraction=0.0, lr_scheduler="constant_with_warmup")
    output = train("out", model=source, watch=watch, settings=settings)
    assert [dtypes for dtypes, _ in seen] == [{torch.float32}] * 4
    moved = (seen[-1][1] != seen[0][1]).double().mean().item()
    moved_in_half = (seen[-1][1].bfloat16() != seen[0][1].bfloat16()).double().mean().item()
    assert moved > 0.99
    assert moved_in_half < 0.5
    assert {tensor.dtype for tensor in weights(output).values()} == {torch.bfloat16}


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
@pytest.mark.parametrize(
    ("culprit", "factor", "offset"),
    [("loss", float("nan"), 0.0), ("loss", 1.0, float("inf")), ("gradient norm", 1.0, 0.0)],
    ids=["both", "loss", "gradient"],
)
def test_a_non_finite_step_is_not_taken(
    culprit: str,
    factor: float,
    offset: float,
    max_grad_norm: float,
    train: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Trap 5: the third step is poisoned; the weights stay those after the second."""
    states: list[tuple[Any, dict[str, torch.Tensor]]] = []
    calls = 0
    prediction_loss_sum = prediction.prediction_loss_sum

    def poisoned(logits: torch.Tensor, labels: torch.Tensor, weights: LossWeights) -> torch.Tensor:
        nonlocal calls
        calls += 1
        loss = prediction_loss_sum(logits, labels, weights)
        if calls < 3:
            return loss
        if culprit == "loss":
            return loss * factor + offset
        logits.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    def score(model: Any) -> float:
        states.append((model, {name: tensor.clone() for name, tensor in model.state_dict().items()}))
        return 0.0

    monkeypatch.setattr(prediction, "prediction_loss_sum", poisoned)
    with pytest.raises(DivergedError, match=f"step 3: {culprit} is (nan|inf); the weights were not updated") as raised:
        watch = Observation(score=score, eval_steps=1, log_steps=1)
        train("out", watch=watch, settings=settings_with(max_grad_norm=max_grad_norm))
    assert raised.value.exit_code == 4
    model, after_second = states[-1]
    assert len(states) == 3
    assert all(torch.equal(tensor, after_second[name]) for name, tensor in model.state_dict().items())
    assert not (tmp_path / "out").exists()
    records = [json.loads(line) for line in (tmp_path / "out.uptraining" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == [1, 2]


@pytest.mark.parametrize("with_teacher", [False, True])
def test_interrupted_and_resumed_equals_uninterrupted(
    with_teacher: bool, train: Callable[..., Path], make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    teacher = str(make_checkpoint(name="teacher", seed=1, with_tokenizer=True)) if with_teacher else None
    settings = settings_with(sequences_per_step=8)
    whole = train("whole", teacher=teacher, settings=settings)

    done = 0

    def stop_after_three(num_steps: int) -> None:
        nonlocal done
        done += num_steps
        if num_steps and done == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(PreemptedError, match="stopped at step 3 of 6") as raised:
        train("parts", teacher=teacher, settings=settings, watch=Observation(progress=stop_after_three))
    assert raised.value.exit_code == 75
    assert not (tmp_path / "parts").exists()
    parts = train("parts", teacher=teacher, settings=settings)
    assert same_weights(whole, parts)
    assert not (tmp_path / "parts.uptraining").exists()


def test_a_killed_run_goes_on_from_its_last_checkpoint(train: Callable[..., Path]) -> None:
    """No warning at step 5, checkpoints at 2 and 4: records and weights are as if nothing had happened."""
    watch = Observation(save_steps=2, log_steps=1)
    whole = train("whole", watch=watch)

    done = 0

    def die_at_five(num_steps: int) -> None:
        nonlocal done
        done += num_steps
        if done == 5:
            raise KilledError

    with pytest.raises(KilledError):
        train("parts", watch=Observation(save_steps=2, log_steps=1, progress=die_at_five))
    parts = train("parts", watch=watch)
    assert same_weights(whole, parts)
    records = [[json.loads(line) for line in (d / "metrics.jsonl").read_text().splitlines()] for d in (whole, parts)]
    assert [[record["step"] for record in run_records] for run_records in records] == [list(range(1, 7))] * 2
    assert [record["loss"] for record in records[0]] == [record["loss"] for record in records[1]]


def test_resuming_something_else_is_refused(train: Callable[..., Path], tmp_path: Path) -> None:
    def die(num_steps: int) -> None:
        if num_steps:
            raise KilledError

    with pytest.raises(KilledError):
        train("out", watch=Observation(progress=die))
    with pytest.raises(InputError, match=r"unfinished run with other settings: learning_rate was 0\.01, now 0\.02"):
        train("out", settings=settings_with(learning_rate=2e-2))
    assert (tmp_path / "out.uptraining").exists()
    (tmp_path / "out.uptraining" / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    train("out")  # a torn last line is no obstacle
    assert not (tmp_path / "out.uptraining").exists()
    (tmp_path / "other.uptraining").mkdir()
    with pytest.raises(OutputError, match="is in the way and not a run's"):
        train("other", force=True)


def test_a_run_that_died_while_packing_is_resumed(train: Callable[..., Path], tmp_path: Path) -> None:
    def die(num_steps: int) -> None:
        raise KilledError

    with pytest.raises(KilledError):
        train("out", watch=Observation(progress=die))
    (tmp_path / "out.uptraining" / "data" / "index.json").unlink()
    assert same_weights(train("out"), train("whole"))


def test_force_starts_over(train: Callable[..., Path]) -> None:
    first = train("out", settings=settings_with(learning_rate=1e-3))
    before = weights(first)
    second = train("out", force=True)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in weights(second).items())
    assert same_weights(second, train("whole"))


def test_what_is_read_is_never_replaced(
    train: Callable[..., Path], make_checkpoint: CheckpointFactory, prose_file: Path, tmp_path: Path
) -> None:
    teacher = make_checkpoint(name="teacher", with_tokenizer=True)
    (teacher / "kvconvert.json").write_text("{}")
    with pytest.raises(OutputError, match=f"is {teacher}, which is read"):
        train("teacher", teacher=str(teacher), force=True)
    (tmp_path / "data").mkdir()
    prose_file.rename(tmp_path / "data" / "prose.jsonl")
    with pytest.raises(OutputError, match=r"holds .*prose\.jsonl, which is read"):
        train("data", data=tmp_path / "data" / "prose.jsonl", force=True)


@pytest.mark.parametrize(
    ("model_type", "message"),
    [("opt", "a conversion to GQA or MQA gives it one that has"), ("falcon", "documents that share a sequence see")],
)
def test_classes_that_mix_packed_documents_are_refused(
    model_type: str, message: str, train: Callable[..., Path], make_checkpoint: CheckpointFactory
) -> None:
    model = make_checkpoint(model_type, name="other", with_tokenizer=True, word_embed_proj_dim=64, ffn_dim=64)
    with pytest.raises(UnsupportedError, match=message):
        train("out", model=model)


def test_a_class_of_ours_is_trained_and_keeps_its_code(
    train: Callable[..., Path], make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = make_checkpoint("bloom", name="bloom", with_tokenizer=True, n_layer=2)
    with as_target(open_checkpoint(source), 2) as view:
        execute(Gqa(2).plan(view), view.checkpoint, tmp_path / "gqa2")
    output = train("out", model=tmp_path / "gqa2")
    for name in ("config.json", "modeling_grouped_decoder.py", "configuration_grouped_decoder.py"):
        assert (output / name).read_bytes() == (tmp_path / "gqa2" / name).read_bytes()
    trained, before = weights(output), weights(tmp_path / "gqa2")
    assert trained.keys() == before.keys()
    keys = "model.layers.0.self_attn.k_proj.weight"
    assert not torch.equal(trained[keys], before[keys])


def test_one_process_uses_one_gpu(
    make_checkpoint: CheckpointFactory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without a launcher the Trainer would wrap several GPUs in DataParallel and eat the data twice as fast."""
    post_init = TrainingArguments.__post_init__

    def find_four_gpus(arguments: TrainingArguments) -> None:
        post_init(arguments)
        arguments._n_gpu = 4

    monkeypatch.setattr(TrainingArguments, "__post_init__", find_four_gpus)
    with open_checkpoint(make_checkpoint()) as checkpoint:
        job = UptrainJob(checkpoint, SETTINGS, (WeightedSource(TextSource("text")),), tmp_path / "out")
        (stage,) = SETTINGS.stages
        device = torch.device("cpu")
        assert training_arguments(job, Observation(), stage, device, micro_batch=4, peak_rate=1e-3).n_gpu == 1


class SummaryWriter:
    """tensorboard's writer, which is no dependency: each record is a line."""

    def __init__(self, log_dir: str) -> None:
        Path(log_dir).mkdir(parents=True)
        self._path = Path(log_dir) / "records.jsonl"

    def add_scalar(self, name: str, value: float, step: int) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps([step, name, value]) + "\n")

    def add_text(self, *args: Any) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


def test_what_a_tracker_gets_stays_with_the_result(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("tensorboard")
    module.__spec__ = ModuleSpec("tensorboard", None, origin="tensorboard/__init__.py")
    monkeypatch.setitem(sys.modules, "tensorboard", module)
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    stub = ModuleType("torch.utils.tensorboard")
    stub.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stub)
    execution = Execution(micro_batch=4, report_to=("tensorboard",))
    output = train("out", execution=execution, watch=Observation(log_steps=2))
    lines = [json.loads(line) for line in (output / "runs/main/records.jsonl").read_text().splitlines()]
    assert [step for step, name, _ in lines if name == "train/tokens_per_second"] == [2, 4, 6]
    assert [step for step, name, _ in lines if name == "train/loss"] == [2, 4, 6]


def test_the_result_keeps_config_and_companions_of_the_source(train: Callable[..., Path], tmp_path: Path) -> None:
    output = train("out")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (output / name).read_bytes() == (tmp_path / "model" / name).read_bytes()
    assert weights(output).keys() == weights(tmp_path / "model").keys()
    record = json.loads((output / "kvconvert.json").read_text())["uptraining"]
    assert record["tokens"] == 6 * 4 * 32
    assert record["objective"] == "cross-entropy"
    assert {path.name for path in output.iterdir()} == {path.name for path in (tmp_path / "model").iterdir()} | {
        "README.md",
        "kvconvert.json",
        "metrics.jsonl",
        "run_files.json",
        "run_status.json",
    }
    assert "Uptrained on 768 tokens, objective: cross-entropy." in (output / "README.md").read_text()


def test_the_manifest_of_a_run_says_nothing_of_where_when_and_how_fast(
    train: Train,
    make_checkpoint: CheckpointFactory,
    prose_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In another directory and process, by relative paths; the control: what the run says of itself differs."""
    monkeypatch.chdir(tmp_path)
    teacher = make_checkpoint(name="teacher", with_tokenizer=True)
    one = train("one", teacher=teacher, data=prose_file)
    (tmp_path / "other").mkdir()
    for path in (tmp_path / "model", teacher, prose_file):
        target = tmp_path / "other" / path.name
        shutil.copytree(path, target) if path.is_dir() else shutil.copy(path, target)
    monkeypatch.chdir(tmp_path / "other")
    monkeypatch.setattr(os, "getpid", lambda: 4242)
    places = {"model": Path("model"), "teacher": "../other/teacher/", "data": Path("../other") / prose_file.name}
    watch = Observation(command="kvconvert uptrain model")
    other = train("other/deeper/two", watch=watch, **places)
    names = {path.name for path in one.iterdir()}
    differ = {name for name in names if (one / name).read_bytes() != (other / name).read_bytes()}
    assert differ == {"metrics.jsonl", "run_status.json", "run_files.json"}
    assert names == {path.name for path in other.iterdir()}


def test_every_file_of_a_run_is_in_its_manifest(train: Train) -> None:
    output = train("out", settings=settings_with(steps=1))
    assert unlike_manifest(output, digests=True) == []
    for name in ("metrics.jsonl", "run_status.json", "config.json"):
        content = (output / name).read_bytes()
        (output / name).write_bytes(bytes([content[0] ^ 1]) + content[1:])
        assert unlike_manifest(output, digests=True) == [f"{name} has other bytes than were written"]
        (output / name).write_bytes(content)
    listed = (output / "run_files.json").read_bytes()
    (output / "run_files.json").write_text("{}")
    assert unlike_manifest(output, digests=False) == ["run_files.json does not list its files"]
    (output / "run_files.json").unlink()
    assert unlike_manifest(output, digests=False) == ["run_files.json is missing"]
    (output / "run_files.json").write_bytes(listed)
    train("out", settings=settings_with(steps=2), force=True)  # which replaces what is as it was written
    assert unlike_manifest(output, digests=True) == []


@pytest.mark.parametrize("role", ["model", "teacher"])
def test_a_damaged_model_or_teacher_is_not_trained_with(
    role: str, train: Train, make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    made = convert(make_checkpoint(name="source", with_tokenizer=True), Gqa(2), tmp_path / "made").output
    settings = settings_with(steps=1)
    others: dict[str, Any] = {} if role == "model" else {"model": make_checkpoint(name="other", with_tokenizer=True)}
    record = json.loads((train("whole", settings=settings, **{role: made}, **others) / "kvconvert.json").read_text())
    weights_entry = next(entry for entry in record["uptraining"][f"{role}_files"] if "model" in entry["name"])
    content = bytearray((made / "model.safetensors").read_bytes())
    assert weights_entry["digest"] == sha256(content).hexdigest()
    content[-1] ^= 1
    (made / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: has other bytes than kvconvert wrote"):
        train("out", settings=settings, **{role: made}, **others)
    assert not list(tmp_path.glob("out*"))


def test_tied_embeddings_stay_tied(train: Callable[..., Path], make_checkpoint: CheckpointFactory) -> None:
    source = make_checkpoint(name="tied", tie_word_embeddings=True, with_tokenizer=True)
    assert "lm_head.weight" not in weights(train("out", model=source))


def test_a_teacher_with_another_vocabulary_is_refused(
    train: Callable[..., Path], make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    other = make_checkpoint(name="other", with_tokenizer=True)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[5:7]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(DataError, match="its tokenizer differs"):
        train("out", teacher=str(other))
    smaller = make_checkpoint(name="smaller", vocab_size=300, with_tokenizer=True)
    with pytest.raises(DataError, match=r"needs the token .* beyond the vocab_size 300 of .*smaller"):
        train("out", teacher=str(smaller))
    assert not list(tmp_path.glob("out*"))


def test_a_teacher_may_have_rows_of_padding(train: Train, make_checkpoint: CheckpointFactory) -> None:
    plain = make_checkpoint(name="plain", with_tokenizer=True)
    padded = make_checkpoint(name="padded", vocab_size=VOCAB_SIZE + 8, with_tokenizer=True)
    tensors = weights(plain)
    rows = {name: F.pad(tensors[name], (0, 0, 0, 8)) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    save_file(tensors | rows, padded / "model.safetensors", metadata={"format": "pt"})
    settings = settings_with(steps=1)
    assert same_weights(
        *(train(teacher.name + "-out", teacher=teacher, settings=settings) for teacher in (plain, padded))
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_length": 4096}, r"sequence length 4096 does not fit .* \(it takes 128 tokens\)"),
        ({"sequence_length": 1}, "sequence length is 1, expected at least 2"),
        ({"learning_rate": float("nan")}, "learning rate is nan, expected a positive number"),
        ({"steps": 0}, "steps is 0, expected at least 1"),
    ],
)
def test_unusable_settings(changes: dict[str, Any], message: str, train: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=message):
        train("out", settings=settings_with(**changes))
    assert not (tmp_path / "out.uptraining").exists()


def test_unusable_text_leaves_nothing_behind(train: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("It was.")
    with pytest.raises(DataError, match="no text in it"):
        train("out", data=tmp_path / "empty.txt")
    with pytest.raises(DataError, match="fewer than one block of 32"):
        train("out", data=tmp_path / "short.txt")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_light_shares_what_it_does_not_train_and_leaves_it(
    precision: str, train: Train, make_checkpoint: CheckpointFactory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of a bfloat16 original, whose pooled copy has all but the attention of it."""
    original = make_checkpoint(name="original", dtype=torch.bfloat16, with_tokenizer=True)
    with open_checkpoint(original) as checkpoint:
        execute(Gqa(2).plan(Source.of(checkpoint)), checkpoint, tmp_path / "gqa2")
    models: list[Any] = []
    loaded: list[set[torch.dtype]] = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        models.append(load_for_training(*args, **kwargs))
        loaded.append({parameter.dtype for parameter in models[-1].parameters()})
        return models[-1]

    monkeypatch.setattr("kvconvert.uptrain.models.load_for_training", spy)
    settings = settings_with(
        recipe=Recipe.light, weights=LossWeights(), layerwise_fraction=0.5, precision=precision, weight_decay=0.5
    )
    output = train("out", model=tmp_path / "gqa2", teacher=original, settings=settings)
    student, teacher = (dict(model.named_parameters()) for model in models[2:])
    trained = {name for name in student if ".self_attn." in name}
    assert {name for name in student if student[name].data_ptr() == teacher[name].data_ptr()} == set(student) - trained
    kept = torch.float32 if precision == "fp32" else torch.bfloat16
    assert loaded == [{kept}] * 4  # two models of two stages, and none in float32 first
    assert {student[name].dtype for name in set(student) - trained} == {kept}
    assert {student[name].dtype for name in trained} == {torch.float32}
    before, after = weights(tmp_path / "gqa2"), weights(output)
    assert {name for name in after if not torch.equal(after[name], before[name])} == trained


@pytest.mark.parametrize(
    ("changes", "moved"),
    [
        ({"trained": Trained.kv}, ("k_proj", "v_proj")),
        ({"trained": Trained.attention}, ("k_proj", "v_proj", "q_proj", "o_proj")),
        ({"body_lr_multiplier": 0.0}, ("k_proj", "v_proj", "q_proj", "o_proj")),
    ],
)
def test_only_what_is_trained_moves(
    changes: dict[str, Any], moved: tuple[str, ...], train: Train, tmp_path: Path
) -> None:
    after, before = weights(train("out", settings=settings_with(**changes))), weights(tmp_path / "model")
    found = {name.split(".")[-2] for name in after if not torch.equal(after[name], before[name])}
    assert found == set(moved)


def test_the_body_learns_at_a_part_of_the_rate(train: Train, tmp_path: Path) -> None:
    """AdamW's first step is as long as the learning rate, whatever the gradient."""
    settings = settings_with(
        steps=1, warmup_fraction=0.0, lr_scheduler="constant_with_warmup", weight_decay=0.0, body_lr_multiplier=0.25
    )
    after, before = weights(train("out", settings=settings)), weights(tmp_path / "model")
    for kind, rate in (("self_attn.q_proj", 1e-2), ("mlp.up_proj", 0.25e-2), ("input_layernorm", 0.25e-2)):
        name = f"model.layers.0.{kind}.weight"
        assert (after[name] - before[name]).abs().max().item() == pytest.approx(rate, rel=1e-3)


@pytest.mark.parametrize(
    "loss_weights", [LossWeights(), LossWeights(0.5, 2.0), LossWeights(1.0, 0.0, 3.0)], ids=["kl", "mixed", "warm"]
)
def test_weights_and_temperature_reach_the_loss(
    loss_weights: LossWeights, train: Train, make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    """The first record against torch's own functions on the run's first samples."""
    original = make_checkpoint(name="original", seed=1, with_tokenizer=True)
    settings = settings_with(steps=1, recipe=Recipe.distill, weights=loss_weights)
    seen: list[dict[str, torch.Tensor]] = []

    def look(sample: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.append(sample)
        return sample

    with pytest.MonkeyPatch.context() as patch:
        get = PackedBlocks.__getitem__
        patch.setattr(PackedBlocks, "__getitem__", lambda self, index: look(get(self, index)))
        output = train("out", teacher=original, settings=settings, watch=Observation(log_steps=1))
    record = json.loads((output / "metrics.jsonl").read_text().splitlines()[0])
    batch = {name: torch.stack([sample[name] for sample in seen[:4]]) for name in seen[0]}
    labels = batch.pop("labels")[:, 1:].flatten()
    predicted = labels != -100
    with torch.no_grad():
        student, teacher = (
            load(place)(**batch, use_cache=False).logits[:, :-1].flatten(0, 1)[predicted]
            for place in (tmp_path / "model", original)
        )
    heat = loss_weights.temperature
    log_p, log_q = (student / heat).log_softmax(-1), (teacher / heat).log_softmax(-1)
    divergence = F.kl_div(log_p, log_q, log_target=True, reduction="batchmean") * heat**2
    expected = loss_weights.kl * divergence + loss_weights.cross_entropy * F.cross_entropy(student, labels[predicted])
    assert record["loss"] == pytest.approx(expected.item(), rel=1e-4)


def test_the_validation_slice_is_scored(train: Train, tmp_path: Path) -> None:
    held_out: list[Any] = []
    score = evaluation.validation_score

    def spy(job: Any) -> Any:
        held_out.append(validation_blocks(job.work / "data"))
        return score(job)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "validation_score", spy)
        output = train("out", validation_fraction=0.5, watch=Observation(log_steps=1, eval_steps=4))
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    scores = {row["step"]: row["eval_nats_per_token"] for row in records if "eval_nats_per_token" in row}
    assert list(scores) == [0, 4, 6]
    for step, place in ((0, tmp_path / "model"), (6, output)):
        feed = {name: tensor for name, tensor in held_out[0].items() if name != "labels"}
        with torch.no_grad():
            predictions = load(place)(**feed, use_cache=False).logits[:, :-1].flatten(0, 1)
        expected = F.cross_entropy(predictions, held_out[0]["labels"][:, 1:].flatten(), ignore_index=-100)
        assert scores[step] == pytest.approx(expected.item(), rel=1e-4)


def test_compiled_trains_as_eager(
    train: Train, make_checkpoint: CheckpointFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced as by default, but without the compiler of C++ that the default needs on a CPU."""
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    teacher = str(make_checkpoint(name="teacher", seed=1, with_tokenizer=True))
    settings = settings_with(steps=2, recipe=Recipe.distill, weights=LossWeights())
    eager = weights(train("eager", teacher=teacher, settings=settings))
    execution = Execution(micro_batch=4, compile=True)
    counters.clear()
    compiled = weights(train("compiled", teacher=teacher, settings=settings, execution=execution))
    assert counters["frames"]["ok"] >= 2  # student and teacher
    assert compiled.keys() == eager.keys()
    for name, tensor in eager.items():
        # AdamW's first steps magnify what float32 sums in another order leave where a gradient is nearly zero
        torch.testing.assert_close(compiled[name], tensor, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_two_processes_train_as_one_with_the_whole_batch(
    make_checkpoint: CheckpointFactory, prose_file: Path, tmp_path: Path
) -> None:
    model = make_checkpoint(with_tokenizer=True)
    program = Path(sys.executable).with_name("kvconvert")
    arguments = f"{program} uptrain {model} --steps 4 --data {prose_file} --precision fp32 --log-steps 1 --json"
    arguments += f" --global-batch-tokens {4 * 128}"
    torchrun = f"{Path(sys.executable).with_name('torchrun')} --nproc_per_node 2"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for command in (
        f"{arguments} --output {tmp_path / 'one'}",
        f"{torchrun} {arguments} --output {tmp_path / 'two'}",
    ):
        outcome = subprocess.run(command.split(), capture_output=True, text=True, check=False, env=environment)
        assert outcome.returncode == 0, outcome.stderr
        assert json.loads(outcome.stdout)["tokens"] == 4 * 4 * 128  # the first process speaks, and only it
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, tensor in weights(tmp_path / "one").items():
        # float32 sums in another order, magnified by AdamW's first steps where a gradient is nearly zero
        torch.testing.assert_close(weights(tmp_path / "two")[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("with_teacher", [False, True])
def test_the_demo_model_recovers(with_teacher: bool, tmp_path: Path) -> None:
    """A fifth of the demo's steps, or fewer: held-out loss of the pooled model goes most of the way back."""
    original = configs.DEMO / "model"
    with open_checkpoint(original) as checkpoint:
        execute(Gqa(2).plan(Source.of(checkpoint)), checkpoint, tmp_path / "gqa2")
    held_out = TextSource(str(configs.DEMO / "heldout.jsonl"))
    windows = load_windows(original, held_out, window=256, max_windows=32)
    before = evaluate_checkpoint(tmp_path / "gqa2", windows, against=original)
    settings = RunSettings(
        steps=32 if with_teacher else 48,
        sequence_length=256,
        sequences_per_step=8,
        learning_rate=2e-3,
        recipe=Recipe.distill if with_teacher else Recipe.pretraining,
        weights=LossWeights(kl=1.0, cross_entropy=0.0) if with_teacher else LossWeights(kl=0.0, cross_entropy=1.0),
        precision=default_precision(),
    )
    with open_checkpoint(tmp_path / "gqa2") as checkpoint:
        source = WeightedSource(TextSource(str(configs.DEMO / "uptrain.jsonl")))
        job = UptrainJob(
            checkpoint, settings, (source,), tmp_path / "out", teacher=str(original) if with_teacher else None
        )
        run.uptrain(job, Observation())
    after = evaluate_checkpoint(tmp_path / "out", windows, against=original)
    assert before.against is not None
    assert after.against is not None
    assert after.against.excess_nats_per_token < 0.4 * before.against.excess_nats_per_token
    assert after.nats_per_token + 10 * after.standard_error < before.nats_per_token
    assert after.against.kl_nats_per_token < 0.4 * before.against.kl_nats_per_token


def test_text_that_is_read_often_is_told_of_once_it_was_packed(train: Train, tmp_path: Path) -> None:
    """A dry run cannot say so of compressed text, whose size nobody knows."""
    text = tmp_path / "a.jsonl.gz"
    text.write_bytes(gzip.compress((json.dumps({"text": "A sentence. " * 65}) + "\n").encode()))
    told: list[str] = []
    watch = Observation(remark=told.append, progress=lambda steps: told.append("step"))
    train("out", data=text, settings=settings_with(steps=30), watch=watch)
    warnings = [number for number, line in enumerate(told) if "times; beyond 4 it learns it by heart" in line]
    assert warnings == [0]


def test_every_method_of_the_trainer_that_is_overridden_is_checked_at_import() -> None:
    """Another version of transformers that renames one would call its own, and train otherwise without a word."""
    overridden = {name for name, value in vars(UptrainTrainer).items() if callable(value) and hasattr(Trainer, name)}
    assert "_get_grad_norm" in overridden
    assert {f"trainer:Trainer.{name}" for name in overridden - {"__init__"}} <= RELIED_ON["training"].keys()
