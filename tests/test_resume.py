"""Runs that end early and go on: the same weights, or a refusal."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    SETTINGS,
    CheckpointFactory,
    KilledError,
    Train,
    build_tokenizer,
    same_weights,
    settings_with,
    weights,
)
from kvconvert.convert.checkpoint.files import write_text
from kvconvert.convert.errors import InputError, OutputError, PreemptedError, UnsupportedError
from kvconvert.convert.text.sources import TextSource
from kvconvert.convert.text.tokens import tokenizer_hash
from kvconvert.uptrain import models as models_room
from kvconvert.uptrain import run
from kvconvert.uptrain.checks import check_job
from kvconvert.uptrain.data import identity, shards
from kvconvert.uptrain.data.blocks import PackedBlocks
from kvconvert.uptrain.data.corpus import Corpus
from kvconvert.uptrain.data.identity import content_digest
from kvconvert.uptrain.data.packing import build
from kvconvert.uptrain.data.shards import SourceIndex
from kvconvert.uptrain.data.sources import WeightedSource
from kvconvert.uptrain.data.writer import SourcePacker
from kvconvert.uptrain.job import UptrainJob
from kvconvert.uptrain.models import load_for_training
from kvconvert.uptrain.observation import Observation
from kvconvert.uptrain.recipe import LossWeights, Recipe, Trained
from kvconvert.uptrain.rundir import record
from kvconvert.uptrain.rundir.directories import sole_run_in
from kvconvert.uptrain.settings import Execution
from kvconvert.uptrain.training import context
from safetensors.torch import load_file, save_file

TWO_STAGES = settings_with(recipe=Recipe.distill, weights=LossWeights(), layerwise_fraction=0.5)


@pytest.fixture
def teacher(make_checkpoint: CheckpointFactory) -> Path:
    return make_checkpoint(name="teacher", with_tokenizer=True)


def die_after(num_steps: int) -> Callable[[int], None]:
    """For `progress`: dies when so many steps of the run are done, 0 being before the first."""
    done = 0

    def progress(more: int) -> None:
        nonlocal done
        done += more
        if done == num_steps:
            raise KilledError

    return progress


def watch(**fields: Any) -> Observation:
    return Observation(**{"save_steps": 2, "log_steps": 1, **fields})


def records(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    timed = ("seconds", "tokens_per_second", "eta_seconds", "mfu")
    return [{key: value for key, value in json.loads(line).items() if key not in timed} for line in lines]


def test_a_run_of_two_stages_that_is_killed_everywhere(
    train: Train, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 1 to 3 fit attention, 4 to 6 the whole; checkpoints after 2, 5 and 6."""
    whole = train("whole", settings=TWO_STAGES, teacher=teacher, watch=watch())
    work, stage = tmp_path / "parts.uptraining", tmp_path / "parts.uptraining/stages/layerwise"
    checkpoints = work / "checkpoints"

    def killed(**fields: Any) -> None:
        with pytest.raises(KilledError):
            train("parts", settings=TWO_STAGES, teacher=teacher, watch=watch(**fields))

    def killed_in(name: str, *, after: bool, **fields: Any) -> None:
        function = getattr(run, name)

        def dying(*args: Any, **kwargs: Any) -> Any:
            if after:
                function(*args, **kwargs)
            raise KilledError

        with monkeypatch.context() as patch:
            patch.setattr(run, name, dying)
            killed(**fields)

    killed(progress=die_after(0))
    killed(progress=die_after(1))  # before the first checkpoint
    assert not list(checkpoints.glob("*/checkpoint-*"))
    killed(progress=die_after(3))  # at the end of the first stage
    assert (checkpoints / "layerwise/checkpoint-2/COMPLETE.json").exists()
    killed_in("write_weights", after=False)
    killed_in("write_weights", after=True)  # its weights are written, and have no name yet
    assert not stage.exists()
    (work / "stages" / ".layerwise.partial-1").mkdir(parents=True)  # as a machine that goes away leaves it
    before = shutil.copytree(checkpoints / "layerwise", tmp_path / "before")
    begun = iter([False, False, True])  # resumed, the third step, the second stage
    killed(progress=lambda more: die_if(next(begun)))
    assert stage.exists()
    assert not (checkpoints / "layerwise").exists()
    shutil.copytree(before, checkpoints / "layerwise")  # died before these were removed
    killed(progress=die_after(1))  # the first step of the second stage
    killed(progress=die_after(2))
    killed(progress=die_after(3))  # the last step of all
    assert (checkpoints / "main/checkpoint-2/COMPLETE.json").exists()
    killed_in("publish", after=False)
    assert not (tmp_path / "parts").exists()
    assert (checkpoints / "main/checkpoint-3/COMPLETE.json").exists()
    done: list[int] = []
    killed_in("remove_work", after=False, progress=done.append)  # the result is there, and so is the work
    assert done == [3]  # no step was done again for it
    assert work.exists()
    assert same_weights(whole, tmp_path / "parts")
    train("parts", settings=TWO_STAGES, teacher=teacher)
    assert not work.exists()
    assert records(tmp_path / "parts") == records(whole)


def die_if(condition: bool) -> None:
    if condition:
        raise KilledError


def test_the_best_weights_are_the_result_of_a_run_that_went_on_too(make_job: Callable[..., UptrainJob]) -> None:
    seen: list[dict[str, torch.Tensor]] = []

    def scores(*values: float) -> Callable[[Any], float]:
        left = iter(values)

        def score(model: Any) -> float:
            seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
            return next(left)

        return score

    job = make_job(settings=settings_with(steps=4, keep_best=True))
    scored = scores(1.0, 3.0, 2.0)  # the first is that of the source, whose weights would be no result
    with pytest.raises(KilledError):
        run.uptrain(job, watch(score=scored, eval_steps=1, progress=die_after(3)))
    result = run.uptrain(job, watch(score=scores(2.0, 5.0), eval_steps=1))  # of the third step, and the fourth
    assert (result.held_out_before, result.held_out, result.kept_step) == (1.0, 2.0, 2)
    found = weights(job.output)
    assert all(torch.equal(tensor, found[name]) for name, tensor in seen[2].items())
    assert not all(torch.equal(tensor, found[name]) for name, tensor in seen[3].items())
    again = run.uptrain(job, watch())
    assert (again.held_out_before, again.held_out, again.kept_step) == (1.0, 2.0, 2)
    assert not job.work.exists()


def test_a_finished_run_is_not_run_again(
    train: Train, make_job: Callable[..., UptrainJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job()
    first = run.uptrain(job, watch())
    before = {path.name: path.read_bytes() for path in job.output.iterdir()}

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(models_room, "load_for_training", refuse)
    monkeypatch.setattr(run, "prepare", refuse)
    again = run.uptrain(make_job(), watch())
    assert again == replace(first, seconds=0.0, tokens_per_second=0.0)
    assert {path.name: path.read_bytes() for path in job.output.iterdir()} == before


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"settings": settings_with(sequences_per_step=8)}, "sequences_per_step was 4, now 8"),
        ({"settings": settings_with(sequence_length=16)}, "sequence_length was 32, now 16"),
        ({"settings": settings_with(steps=7)}, "steps was 6, now 7"),
        ({"settings": settings_with(seed=1)}, "seed was 0, now 1"),
        ({"settings": settings_with(trained=Trained.kv)}, "trained was 'all', now 'kv'"),
        ({"data": "other"}, r"data 1 text location was '.*prose\.jsonl', now '.*other\.jsonl'"),
        ({"teacher": "teacher"}, "teacher was None, now 'teacher'"),
        ({"validation_fraction": 0.5}, r"validation_fraction was 0\.0, now 0\.5"),
        ({"settings": settings_with(weights=LossWeights(0.0, 0.5))}, r"weights cross_entropy was 1\.0, now 0\.5"),
    ],
)
def test_another_run_is_refused_by_name(
    changes: dict[str, Any],
    name: str,
    make_job: Callable[..., UptrainJob],
    teacher: Path,
    prose_file: Path,
    tmp_path: Path,
) -> None:
    job = make_job()
    job.work.mkdir()
    (job.work / record.SETTINGS_NAME).write_text(json.dumps(job.description))
    check_job(make_job())  # the control
    (tmp_path / "other.jsonl").write_text(prose_file.read_text().replace("times", "tides"))
    places = {"other": tmp_path / "other.jsonl", "teacher": teacher}
    fields = {key: places[value] if isinstance(value, str) else value for key, value in changes.items()}
    with pytest.raises(InputError, match=f"holds an unfinished run with other settings: .*{name}"):
        check_job(make_job(**fields))


def test_a_run_goes_on_with_model_teacher_and_text_at_other_places(
    train: Train, make_checkpoint: CheckpointFactory, teacher: Path, prose_file: Path, tmp_path: Path
) -> None:
    model = make_checkpoint(with_tokenizer=True)
    whole = train("whole", model=model, teacher=teacher, watch=watch())
    with pytest.raises(KilledError):
        train("parts", model=model, teacher=teacher, watch=watch(progress=die_after(3)))
    (tmp_path / "moved").mkdir()
    moved = {
        name: path.rename(tmp_path / "moved" / f"{name}{path.suffix}")
        for name, path in {"model": model, "teacher": teacher, "data": prose_file}.items()
    }
    begun: list[int] = []
    assert same_weights(whole, train("parts", watch=watch(progress=begun.append), **moved))
    assert begun[0] == 2
    again: list[int] = []
    train("parts", watch=watch(progress=again.append), **moved)  # which is finished
    assert again == []


def test_the_result_of_a_text_that_was_changed_is_another(
    train: Train, make_job: Callable[..., UptrainJob], prose_file: Path
) -> None:
    train("out", settings=settings_with(steps=1))
    job = make_job(settings=settings_with(steps=1))
    check_job(job)  # the control: it is finished
    prose_file.write_text(prose_file.read_text().replace("times", "tides"))
    changed = make_job(settings=settings_with(steps=1))
    assert not record.finished_before(changed)
    with pytest.raises(OutputError, match=r"other settings: the text of .*prose\.jsonl has changed since$"):
        check_job(changed)


@pytest.mark.parametrize("whole_bytes", [2**30, 2**20])
def test_text_that_was_changed_has_another_digest(
    whole_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above the size that is read whole, a change of the same length between samples is not seen, as is documented."""
    monkeypatch.setattr(identity, "_WHOLE_BYTES", whole_bytes)
    content = bytearray(b"word " * 2**19)
    (tmp_path / "text.txt").write_bytes(content)
    content[40_000] ^= 1
    (tmp_path / "other.txt").write_bytes(content)
    one, other = (content_digest(TextSource(str(tmp_path / name))) for name in ("text.txt", "other.txt"))
    assert (one == other) == (whole_bytes < len(content))
    (tmp_path / "other.txt").write_bytes(content + b"!")
    assert one != content_digest(TextSource(str(tmp_path / "other.txt")))


def test_packing_goes_on_where_the_text_lies_now(tmp_path: Path, prose_file: Path) -> None:
    tokenizer = build_tokenizer()
    hashed = tokenizer_hash(tokenizer)

    def corpus(path: Path) -> Corpus:
        return Corpus((WeightedSource(TextSource(str(path))),), 32, 999, hashed, vocab_size=len(tokenizer))

    with pytest.raises(PreemptedError):
        build(corpus(prose_file), tmp_path / "packed", tokenizer, should_stop=lambda: True)
    moved = prose_file.rename(tmp_path / "moved.jsonl")
    changed = tmp_path / "changed.jsonl"
    changed.write_text(moved.read_text().replace("times", "tides"))
    with pytest.raises(InputError, match=r"the packed text is another: sources 1 text location was '.*prose"):
        build(corpus(changed), tmp_path / "packed", tokenizer)
    build(corpus(moved), tmp_path / "packed", tokenizer)
    assert len(PackedBlocks(tmp_path / "packed", num_samples=8)) == 8


def test_why_a_finished_run_does_not_go_on(train: Train, make_job: Callable[..., UptrainJob]) -> None:
    output = train("out", settings=settings_with(steps=1))
    with pytest.raises(OutputError) as raised:
        check_job(make_job(settings=settings_with(steps=8)))
    assert str(raised.value) == (
        f"{output} holds a finished run, which cannot go on (steps was 1, now 8): its learning rate goes down over its "
        "steps, and its optimizer is gone"
    )
    assert raised.value.hint == f"uptrain {output} into another --output, or begin anew with --force"
    with pytest.raises(OutputError, match=r"holds the result of a run with other settings: seed was 0, now 1$"):
        check_job(make_job(settings=settings_with(steps=1, seed=1)))
    check_job(make_job(settings=settings_with(steps=8)), force=True)


def test_another_recipe_is_refused(make_job: Callable[..., UptrainJob], teacher: Path) -> None:
    job = make_job(settings=TWO_STAGES, teacher=teacher)
    job.work.mkdir()
    (job.work / record.SETTINGS_NAME).write_text(json.dumps(job.description))
    light = replace(TWO_STAGES, recipe=Recipe.light)
    with pytest.raises(InputError, match="recipe was 'distill', now 'light'"):
        check_job(make_job(settings=light, teacher=teacher))


def test_a_torn_checkpoint_costs_steps_and_is_told(train: Train, tmp_path: Path) -> None:
    whole = train("whole", watch=watch())
    with pytest.raises(KilledError):
        train("parts", watch=watch(progress=die_after(5)))
    newest = tmp_path / "parts.uptraining/checkpoints/main/checkpoint-4"
    optimizer = (newest / "optimizer.pt").read_bytes()
    (newest / "optimizer.pt").write_bytes(optimizer[:-1])
    remarks: list[str] = []
    begun: list[int] = []
    parts = train("parts", watch=watch(remark=remarks.append, progress=begun.append))
    torn = f"{newest} is not complete and was removed"
    assert remarks == ["resuming from the checkpoint of step 2 of 6", torn]
    assert begun[0] == 2
    assert same_weights(whole, parts)


def test_a_teacher_of_another_size_cannot_be_fitted_to(
    make_job: Callable[..., UptrainJob], make_checkpoint: CheckpointFactory
) -> None:
    other = make_checkpoint(name="other", num_hidden_layers=3, with_tokenizer=True)
    with pytest.raises(UnsupportedError, match="the student has 2 layers of 64, the teacher 3 of 64"):
        check_job(make_job(settings=TWO_STAGES, teacher=other))
    check_job(make_job(settings=replace(TWO_STAGES, layerwise_fraction=0.0), teacher=other))


def test_another_micro_batch_goes_on(train: Train) -> None:
    whole = weights(train("whole", watch=watch()))
    with pytest.raises(KilledError):
        train("parts", watch=watch(progress=die_after(5)))
    parts = weights(train("parts", watch=watch(), execution=Execution(micro_batch=1)))
    for name, tensor in whole.items():
        # two steps of at most 1e-2: sums in another order, magnified where a gradient is nearly zero
        torch.testing.assert_close(parts[name], tensor, rtol=1e-3, atol=1e-4)


def test_a_forced_run_that_was_stopped_goes_on_without_force(train: Train) -> None:
    train("out", settings=settings_with(learning_rate=1e-3))
    with pytest.raises(KilledError):
        train("out", watch=watch(progress=die_after(5)), force=True)
    assert same_weights(train("out", watch=watch()), train("whole"))


def test_the_second_stage_does_not_find_the_models_of_the_first(
    train: Train, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[int] = []
    models: list[weakref.ref[Any]] = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        alive.append(sum(model() is not None for model in models))
        model = load_for_training(*args, **kwargs)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(models_room, "load_for_training", spy)
    gc.collect()
    train("out", settings=TWO_STAGES, teacher=teacher)
    assert alive == [0, 1, 0, 1]  # student and teacher, twice


def test_the_second_stage_reads_on(train: Train, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[int, int]] = []

    class Samples(PackedBlocks):
        def __init__(self, folder: Path, *, num_samples: int, first_sample: int = 0) -> None:
            super().__init__(folder, num_samples=num_samples, first_sample=first_sample)
            read.append((first_sample, num_samples))

    for module in (run, context):
        monkeypatch.setattr(module, "PackedBlocks", Samples)
    train("out", settings=TWO_STAGES, teacher=teacher)
    assert read == [(0, 24), (0, 12), (12, 12)]  # the run, and each of its stages


def test_a_status_names_the_weights_of_a_finished_stage(train: Train, teacher: Path, tmp_path: Path) -> None:
    seen: list[str] = []

    def look(more: int) -> None:
        status = json.loads((tmp_path / "out.uptraining/run_status.json").read_text())
        if status["step"] == 3:
            seen.append(status["last_checkpoint"])

    train("out", settings=TWO_STAGES, teacher=teacher, watch=watch(progress=look))
    assert seen
    assert seen[-1] == str(tmp_path / "out.uptraining/stages/layerwise")


def test_a_sharded_checkpoint_is_gone_on_with_sharded(train: Train, tmp_path: Path) -> None:
    watching = watch(progress=die_after(3))
    with pytest.raises(KilledError):
        train("out", watch=watching)
    checkpoint = tmp_path / "out.uptraining/checkpoints/main/checkpoint-2"
    (checkpoint / "shards").mkdir()
    with pytest.raises(InputError, match=r"checkpoint-2 was saved with --fsdp in several processes"):
        train("out")
    (checkpoint / "shards").rmdir()
    train("out")


def test_a_checkpoint_of_deepspeed_is_refused_without_it(train: Train, tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        train("out", watch=watch(progress=die_after(3)))
    (tmp_path / "out.uptraining/checkpoints/main/checkpoint-2/global_step2").mkdir()
    with pytest.raises(InputError, match=r"checkpoint-2 was saved with DeepSpeed"):
        train("out")


def test_packed_shards_survive_a_failure(train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shards, "SHARD_TOKENS", 4 * 2 * 32)
    save = SourcePacker._save

    def fail_after_a_shard(packer: SourcePacker, index: SourceIndex) -> None:
        save(packer, index)
        if index.shards:
            raise ConnectionError

    with monkeypatch.context() as patch:
        patch.setattr(SourcePacker, "_save", fail_after_a_shard)
        with pytest.raises(ConnectionError):
            train("out")
    packed = next((tmp_path / "out.uptraining/data").rglob("tokens-00000.bin"))
    before = packed.stat().st_mtime_ns
    seen: list[int] = []
    train("out", watch=watch(progress=lambda steps: seen.append(packed.stat().st_mtime_ns)))
    assert set(seen) == {before}


def test_other_weights_under_the_same_name_are_another_model(make_job: Callable[..., UptrainJob]) -> None:
    job = make_job()
    before = job.description
    path = job.checkpoint.directory / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.self_attn.k_proj.weight"] += 1.0
    save_file(tensors, path, metadata={"format": "pt"})
    changed = [key for key, value in make_job().description.items() if value != before[key]]
    assert changed == ["model_fingerprint"]


def test_other_weights_of_the_teacher_are_another_teacher(make_job: Callable[..., UptrainJob], teacher: Path) -> None:
    before = make_job(settings=TWO_STAGES, teacher=teacher).description
    path = teacher / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"] += 1.0
    save_file(tensors, path, metadata={"format": "pt"})
    after = make_job(settings=TWO_STAGES, teacher=teacher).description
    assert [key for key, value in after.items() if value != before[key]] == ["teacher_fingerprint"]


def test_one_process_at_a_run(train: Train, tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        train("out", watch=watch(progress=die_after(3)))
    work = tmp_path / "out.uptraining"
    before = {path.name: path.read_bytes() for path in work.iterdir() if path.is_file()}
    with sole_run_in(work):
        for force in (False, True):
            with pytest.raises(OutputError, match=r"out\.uptraining: another process is at this run"):
                train("out", watch=watch(), force=force)
    assert {path.name: path.read_bytes() for path in work.iterdir() if path.is_file()} == before
    train("out", watch=watch())


@pytest.mark.parametrize("place", ["out", "out.uptraining", "out.lr-sweep"])
def test_what_is_read_is_not_replaced(
    place: str, make_job: Callable[..., UptrainJob], prose_file: Path, tmp_path: Path
) -> None:
    (tmp_path / place).mkdir()
    (tmp_path / place / "kvconvert.json").write_text("{}")
    held_out = tmp_path / place / "held_out.jsonl"
    shutil.copy(prose_file, held_out)
    with pytest.raises(OutputError, match=rf"{place} holds .*held_out\.jsonl, which is read"):
        check_job(make_job(), held_out=TextSource(str(held_out)), force=True)


def test_settings_are_there_as_soon_as_the_work_directory(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A directory without them would be in the way for ever."""

    def dying(path: Path, text: str) -> None:
        if path.name == record.SETTINGS_NAME:
            assert not (tmp_path / "out.uptraining").exists()
            raise KilledError
        write_text(path, text)

    with monkeypatch.context() as patch:
        patch.setattr("kvconvert.uptrain.rundir.prepare.write_text", dying)
        with pytest.raises(KilledError):
            train("out")
    train("out", settings=replace(SETTINGS, steps=1))


def test_force_waits_for_nobody_and_leaves_a_running_run_alone(train: Train, tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        train("out", watch=watch(progress=die_after(3)))
    work = tmp_path / "out.uptraining"
    before = sorted(work.rglob("*"))
    with sole_run_in(work), pytest.raises(OutputError, match=r"out\.uptraining: another process is at this run$"):
        train("out", watch=watch(), force=True)
    assert sorted(work.rglob("*")) == before
    assert not list(tmp_path.glob(".out.uptraining.*"))


def test_force_starts_in_a_new_directory_where_the_old_one_cannot_be_deleted(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As on NFS, where files that another process has open stay."""
    with pytest.raises(KilledError):
        train("out", watch=watch(progress=die_after(3)))
    work = tmp_path / "out.uptraining"
    assert list(work.glob("checkpoints/main/checkpoint-*"))
    with monkeypatch.context() as patch:
        patch.setattr("kvconvert.convert.checkpoint.staging.shutil.rmtree", lambda place, ignore_errors: None)
        with pytest.raises(KilledError):
            train("out", watch=watch(progress=die_after(1)), force=True)
    assert not list(work.glob("checkpoints/main/checkpoint-*"))
    assert same_weights(train("out"), train("whole"))
