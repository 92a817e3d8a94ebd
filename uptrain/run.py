"""One uptraining run, from a converted checkpoint and text to a recovered checkpoint."""

from __future__ import annotations

import gc
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import (
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from transformers.integrations.integration_utils import TensorBoardCallback

from ..convert.architectures.table import find_architecture
from ..convert.checkpoint.loading import quiet_transformers
from ..convert.checkpoint.opening import open_checkpoint
from ..convert.checkpoint.output import disk_errors, read_provenance, staged_directory, write_text
from ..convert.checkpoint.tensors import CONFIG_NAME
from ..convert.errors import DivergedError, InputError, PreemptedError, UnsupportedError
from ..convert.runtime.transformers_interface import ACTIVATION_CHECKPOINTING, checkpoint_activations
from .checks import check_job
from .data.blocks import PackedBlocks
from .data.corpus import most_passes
from .data.packing import CorpusPacker
from .estimate.cost import warn_of_passes
from .job import UptrainJob, batch_of
from .launcher import uses_deepspeed
from .losses.attention_regression import AttentionRegression
from .losses.prediction import Loss, PredictionLoss
from .models import (
    compile_in_place,
    freeze_except,
    full_state,
    load_for_training,
    load_whole_models,
    require_separation,
    share_equal_parameters,
    train_in_float32,
)
from .recipe import Objective, Stage, attention_names, trained_names
from .rundir.checkpoints import last_complete, remove_torn, step_of
from .rundir.prepare import prepare
from .rundir.publish import METRICS_NAME, TRACKS_NAME, publish, write_weights
from .rundir.record import finished_before, replaces_output
from .rundir.status import RunStatus, status_of_error, write_status
from .rundir.workdir import checkpoints_folder, data_folder, last_saved, remove_work, stage_folder, teacher_folder
from .settings import UptrainSettings
from .training.evaluation import PeriodicEvaluation, under_autocast, validation_score
from .training.metrics import MetricsLog, StepProgress, Throughput
from .training.micro_batch import largest_micro_batch
from .training.packing_ahead import PackAhead
from .training.saving import Checkpoints
from .training.stopping import StopRequests
from .training.trainer import SHARDS_NAME, UptrainTrainer

__all__ = ["Observation", "UptrainResult", "joined_processes", "process_state", "uptrain"]

_SCALES_NAME = "attention_scales.json"
_MICRO_BATCH_NAME = "micro_batch.{stage}.json"
_OPTIMIZER = "adamw_torch_fused"
_NUM_SCALE_SAMPLES = 8
_LONGEST_WAIT = timedelta(days=7)
_LONGEST_COLLECTIVE = timedelta(hours=2)  # in which the first process may be writing a checkpoint
_DISK_BYTES_PER_SECOND = 200e6  # a slow one's, before a checkpoint was written


@dataclass(frozen=True)
class UptrainResult:
    """`passes` is how often the text was seen, `held_out` the last score in nats per token, if any was taken.

    Of several sources it is the one that was seen most often. None: at most once, of text whose size is not known.
    Time and rate are those since the start or the last resume.
    """

    output: Path
    passes: float | None
    steps: int
    tokens: int
    objective: str
    settings: UptrainSettings
    seconds: float
    tokens_per_second: float
    held_out: float | None


@dataclass(frozen=True)
class Observation:
    """What is watched during a run; none of it changes the result.

    `score(model)` gives held-out nats per token every `eval_steps`. `show` receives each metrics record, `progress`
    the number of steps done since it was last called, `note` each status, in the first process, `remark` what a person
    should know. `deadline` is on time.monotonic()'s clock. `flops_per_token`, by a stage's name, and `peak_flops` of
    one device are there where they are known. `command` is what a person types to go on. Without `keep` no result is
    written: the run is there for its last score, and raises InputError before training where there is no held-out text.
    """

    save_steps: int = 500
    log_steps: int = 10
    eval_steps: int = 100
    deadline: float | None = None
    score: Callable[[Any], float] | None = None
    progress: Callable[[int], object] = lambda num_steps: None
    show: Callable[[dict[str, Any]], object] = lambda record: None
    note: Callable[[RunStatus], object] = lambda status: None
    remark: Callable[[str], object] = lambda text: None
    flops_per_token: dict[str, float] = field(default_factory=dict)
    peak_flops: float | None = None
    command: str = ""
    keep: bool = True


def uptrain(job: UptrainJob, watch: Observation, *, force: bool = False) -> UptrainResult:
    """Train a converted checkpoint and write the result, in the source's dtypes, to `job.output`.

    What is trained is in float32. Until the end everything is in `job.work`, from where a run that was stopped goes on
    by itself, bit-exactly if it is carried out in the same way; `force` starts over. A run that is finished is not run
    again.
    Raises InputError for unusable input, DivergedError on a non-finite loss or gradient (before the optimizer step),
    PreemptedError after SIGTERM, SIGINT or SIGUSR1 and before `watch.deadline`, once a checkpoint is saved.
    """
    state = process_state()
    stop = StopRequests(deadline=watch.deadline, save_seconds=_checkpoint_bytes(job) / _DISK_BYTES_PER_SECOND)
    with disk_errors(job.work), stop, ExitStack() as held:
        check_job(job, force=force)  # in every process, to the same end
        finished = finished_before(job) and not force
        state.wait_for_everyone()
        if finished:
            if state.is_main_process:  # what a kill after the last rename has left
                remove_work(job)
            return _result(job, read_provenance(job.output)["uptraining"]["passes"])
        run = _Run(job, watch, state, stop, held)
        try:
            return run.train(force=force)
        except BaseException as error:
            run.record(error)
            raise


def process_state() -> PartialState:
    """The processes of this run; accelerate takes the settings of the first call."""
    # without cpu=True accelerate takes the processes of a launcher on a CPU for one each
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=_LONGEST_COLLECTIVE)


@contextmanager
def joined_processes() -> Iterator[None]:
    """Close the connections between the processes of a launcher at the end of what runs inside, and of the program.

    Left to the interpreter, they are torn down while their threads still run: a process that had done all its work
    then aborts, rarely. After an error that other processes do not share they stay open, since closing could wait.
    """
    try:
        yield
    except (PreemptedError, DivergedError):
        _leave_processes()
        raise
    _leave_processes()


def _leave_processes() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class _Run:
    """A run that is under way: its stages, its status, and where it stands."""

    def __init__(self, job: UptrainJob, watch: Observation, state: Any, stop: StopRequests, held: ExitStack) -> None:
        self._job, self._watch, self._state, self._stop, self._held = job, watch, state, stop, held
        self._begun = False
        self._packer: CorpusPacker | None = None
        self._patient = (
            torch.distributed.new_group(backend="gloo", timeout=_LONGEST_WAIT) if state.num_processes > 1 else None
        )
        self._architecture = find_architecture(job.checkpoint)
        self._started = time.monotonic()
        self._steps_before = 0
        self._warned_of_passes = False
        self._held_out: float | None = None
        self._status = RunStatus(
            state="running",
            exit_code=None,
            step=0,
            steps=job.settings.steps,
            tokens=0,
            reason=None,
            last_checkpoint=None,
            resume_command=watch.command,
            process_id=os.getpid(),
        )

    def train(self, *, force: bool) -> UptrainResult:
        """Packing, then all stages, from where the run stands; then the result is written."""
        job = self._job
        if self._state.is_main_process:
            self._packer = prepare(
                job,
                self._held,
                should_stop=lambda: self._stop.requested,
                begin=self._begin,
                save_steps=self._watch.save_steps,
                force=force,
                held_out=not self._watch.keep and self._watch.score is None,
            )
        self._wait_long()
        self._blocks = PackedBlocks(data_folder(job), num_samples=job.num_samples)
        self._score = under_autocast(self._watch.score or validation_score(job), job.settings.precision)
        plan = job.settings.stages
        self._warn_of_passes(self._blocks.passes)
        done = [stage for stage in plan if stage_folder(job, stage).joinpath(CONFIG_NAME).exists()]
        source = stage_folder(job, done[-1]) if done else job.checkpoint.directory
        for number, stage in enumerate(plan[len(done) :], start=len(done)):
            first = number == len(done)
            model, weights = self._train_stage(stage, source, resume=first)
            if stage is not plan[-1]:
                source = stage_folder(job, stage)
                if self._state.is_main_process:
                    with staged_directory(source, force=True) as staging:
                        write_weights(model, weights, staging)
                    shutil.rmtree(checkpoints_folder(job, stage), ignore_errors=True)
                self._note(stage.last_step, source)
                self._wait_long()
                del model, weights  # with the teacher, before those of the next stage come
                gc.collect()
        seconds = time.monotonic() - self._started
        passes = most_passes(self._blocks.passes)
        if self._state.is_main_process:
            if self._watch.keep:
                finished = replace(self._status, state="finished", exit_code=0, last_checkpoint=None)
                publish(job, model, weights, passes=passes, status=finished, force=replaces_output(job))
            remove_work(job)
        self._wait_long()
        return _result(
            job,
            passes,
            seconds=seconds,
            steps_done=job.settings.steps - self._steps_before,
            held_out=self._held_out,
        )

    def _begin(self) -> None:
        """The work directory is there, and this run's."""
        self._begun = True
        self._note(*last_saved(self._job))

    def _warn_of_passes(self, passes: Sequence[float | None]) -> None:
        """Once, as soon as it is known: of a streamed text that may be when it has ended for the first time."""
        most = most_passes(passes)
        warning = None if most is None or self._warned_of_passes else warn_of_passes(most)
        if warning is not None:
            self._warned_of_passes = True
            self._watch.remark(warning)

    def _wait_long(self) -> None:
        """Wait for all processes, one of which packs text or writes a model.

        That may take longer than the minutes after which a collective of training is given up as hung.
        """
        if self._state.num_processes > 1:
            torch.distributed.barrier(group=self._patient)

    def record(self, error: BaseException) -> None:
        """Write how the run ended, if it has begun."""
        if self._begun and self._job.work.exists():
            with suppress(OSError):  # a full disk must not hide the error
                write_status(self._job.work, status_of_error(self._status, error))

    def _note(self, step: int, checkpoint: Path | None = None) -> None:
        """Write how far the run is."""
        last = self._status.last_checkpoint if checkpoint is None else str(checkpoint)
        tokens = step * self._job.settings.tokens_per_step
        self._status = replace(self._status, step=step, tokens=tokens, last_checkpoint=last)
        if self._state.is_main_process:
            write_status(self._job.work, self._status)
            self._watch.note(self._status)

    def _train_stage(self, stage: Stage, source: Path, *, resume: bool) -> tuple[Any, dict[str, torch.Tensor]]:
        """Train one stage; returns the model and its weights, which the main process holds whole."""
        job, settings = self._job, self._job.settings
        torch.manual_seed(settings.seed)
        folder = checkpoints_folder(job, stage)
        last = self._last_checkpoint(stage, folder, resume=resume)
        student, teacher = self._load(stage, source)
        loss = self._loss(stage, student, teacher)
        micro_batch = self._micro_batch(stage, student, loss)
        throughput = self._throughput(stage)
        if job.execution.compile and stage.objective is Objective.prediction:
            compile_in_place(student, teacher)
        trainer = UptrainTrainer(
            model=student,
            loss=loss,
            bf16=settings.precision == "bf16",
            in_attention=attention_names(
                [name for name, _ in student.named_parameters()], self._architecture
            ).__contains__,
            body_lr_multiplier=settings.body_lr_multiplier,
            measure=throughput.read,
            args=_training_arguments(job, self._watch, stage, self._state.device, micro_batch=micro_batch),
            train_dataset=self._samples(stage),
            data_collator=default_data_collator,
            callbacks=self._callbacks(stage, folder, throughput),
        )
        plugin = trainer.accelerator.state.deepspeed_plugin if trainer.is_deepspeed_enabled else None
        if plugin is not None and plugin.zero_stage == 3 and stage.objective is Objective.attention_regression:
            raise UnsupportedError(
                "ZeRO-3 gathers a layer's weights for its whole pass only, not for its attention alone",
                hint="use --fsdp or ZeRO-2, or leave the layer-wise stage out with --layerwise-fraction 0",
            )
        trainer.remove_callback(PrinterCallback)
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, PeriodicEvaluation):
                callback.report = trainer.log
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                callback.logging_dir = str(job.work / TRACKS_NAME / stage.name)
        with quiet_transformers():
            try:
                trainer.train(resume_from_checkpoint=str(last) if last else None)
            except DivergedError as error:
                _, good = last_saved(job)
                note = f"; the last good checkpoint is {good}" if good else "; no checkpoint was saved before it"
                raise DivergedError(f"{error}{note}", hint=error.hint) from error
        step = stage.first_step + trainer.state.global_step
        self._note(step, last_complete(folder))
        if trainer.state.global_step < stage.steps:
            raise PreemptedError(
                f"stopped at step {step} of {settings.steps} ({self._stop.reason}); saved in {job.work}",
                hint="run the same command again to go on",
            )
        weights = full_state(student, trainer.accelerator, trainer.model_wrapped)
        load_whole_models()
        trainer.accelerator.free_memory()
        return student, weights

    def _last_checkpoint(self, stage: Stage, folder: Path, *, resume: bool) -> Path | None:
        """What the stage goes on from, if anything; torn checkpoints are removed."""
        if self._state.is_main_process:
            for torn in remove_torn(folder):
                self._watch.remark(f"{torn} is not complete and was removed")
        self._state.wait_for_everyone()
        last = last_complete(folder)
        step = stage.first_step + (step_of(last) if last else 0)
        if resume:
            self._steps_before = step
        self._note(step, last)
        if last is not None:
            _check_sharding(self._job, last)
        return last

    def _samples(self, stage: Stage) -> PackedBlocks:
        per_step = self._job.settings.sequences_per_step
        return PackedBlocks(
            data_folder(self._job), num_samples=stage.steps * per_step, first_sample=stage.first_step * per_step
        )

    def _load(self, stage: Stage, source: Path) -> tuple[Any, Any]:
        """Student and teacher, checked and partly frozen; the teacher is None where the stage has none."""
        job, settings = self._job, self._job.settings
        bf16 = settings.precision == "bf16"
        num_shards = job.execution.num_processes if job.execution.fsdp else 1
        device = self._state.device
        shares = job.shares_frozen
        shared_dtype = "auto" if bf16 else torch.float32
        student = load_for_training(
            source,
            self._architecture,
            dtype=shared_dtype if shares else torch.float32,
            device=device,
            num_shards=num_shards,
        )
        freeze_except(
            student,
            trained_names([name for name, _ in student.named_parameters()], self._architecture, stage.trained),
        )
        train_in_float32(student)
        require_separation(student, name=job.checkpoint.name, bf16=bf16)
        if job.teacher is None or not stage.uses_teacher(settings.weights):
            return student, None
        directory = teacher_folder(job)
        with open_checkpoint(directory) as opened:
            architecture = find_architecture(opened)
        teacher = load_for_training(
            directory,
            architecture,
            dtype=shared_dtype if shares else "auto",
            device=device,
            num_shards=num_shards,
        ).requires_grad_(False)
        require_separation(teacher, name=job.teacher, bf16=bf16)
        if shares:
            share_equal_parameters(student, teacher)
        return student, teacher

    def _loss(self, stage: Stage, student: Any, teacher: Any) -> Loss:
        settings = self._job.settings
        if stage.objective is Objective.prediction:
            return PredictionLoss(teacher, settings.weights)
        with open_checkpoint(teacher_folder(self._job)) as opened:
            architecture = find_architecture(opened)
        path = self._job.work / _SCALES_NAME
        scales = json.loads(path.read_text()) if path.exists() else ()
        self._state.wait_for_everyone()  # all have looked before one writes
        loss = AttentionRegression(student, teacher, self._architecture, architecture, scales=scales)
        if not scales:
            samples = range(min(_NUM_SCALE_SAMPLES, len(self._blocks)))
            feeds = (default_data_collator([self._blocks[index]]) for index in samples)
            device = self._state.device
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
                scales = loss.measure_scales(
                    {name: tensor.to(device) for name, tensor in feed.items() if name != "labels"} for feed in feeds
                )
            if self._state.is_main_process:
                write_text(path, json.dumps(scales) + "\n")
            self._state.wait_for_everyone()
        return loss

    def _micro_batch(self, stage: Stage, student: Any, loss: Loss) -> int:
        """The micro-batch that was asked for; or what fits, which is not measured again on the same machines."""
        job = self._job
        if job.execution.micro_batch is not None:
            return job.execution.micro_batch
        device, length = self._state.device, job.settings.sequence_length
        machine = {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "num_processes": job.execution.num_processes,
            "fsdp": job.execution.fsdp,
        }
        path = job.work / _MICRO_BATCH_NAME.format(stage=stage.name)
        known = json.loads(path.read_text()) if path.exists() else {}
        if self._everywhere(known.get("machine") == machine):
            return int(known["micro_batch"])

        def step(num_sequences: int) -> torch.Tensor:
            ids = torch.arange(num_sequences * length, device=device).view(num_sequences, length)
            ids = ids % student.config.get_text_config().vocab_size
            positions = torch.arange(length, device=device).expand_as(ids)
            with torch.autocast(device.type, torch.bfloat16, enabled=job.settings.precision == "bf16"):
                return loss(student, {"input_ids": ids, "position_ids": positions}, ids)

        student.train()
        if _checkpoints_activations(job, stage):
            checkpoint_activations(student, use_reentrant=False)
        own = largest_micro_batch(
            student,
            step,
            sequences_per_process=batch_of(job, 1).gradient_accumulation_steps,
            device=device,
            num_local=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
            everywhere=self._everywhere,
        )
        fitting = min(gather_object([own])) if job.execution.num_processes > 1 else own
        if self._state.is_main_process:
            write_text(path, json.dumps({"micro_batch": fitting, "machine": machine}) + "\n")
        self._state.wait_for_everyone()
        return fitting

    def _everywhere(self, holds: bool) -> bool:
        return all(gather_object([holds])) if self._state.num_processes > 1 else holds

    def _throughput(self, stage: Stage) -> Throughput:
        job, watch = self._job, self._watch
        return Throughput(
            tokens_per_step=job.settings.tokens_per_step,
            last_step=stage.steps,
            flops_per_token=watch.flops_per_token.get(stage.name),
            peak_flops=None if watch.peak_flops is None else watch.peak_flops * job.execution.num_processes,
        )

    def _callbacks(self, stage: Stage, folder: Path, throughput: Throughput) -> list[TrainerCallback]:
        job, watch = self._job, self._watch
        log = MetricsLog(
            job.work / METRICS_NAME,
            stage,
            tokens_per_step=job.settings.tokens_per_step,
            throughput=throughput,
            show=self._show,
        )
        callbacks: list[TrainerCallback] = [log, StepProgress(watch.progress)]
        if self._score is not None:
            callbacks.append(
                PeriodicEvaluation(self._held_out_score, stage, every=watch.eval_steps, throughput=throughput)
            )
        packer = self._packer
        if packer is not None and job.stream:
            look = lambda: self._warn_of_passes(packer.passes)  # noqa: E731
            callbacks.append(PackAhead(packer, stage, job.settings.sequences_per_step, on_packed=look))
        saved = lambda step: self._note(stage.first_step + step, folder / f"checkpoint-{step}")  # noqa: E731
        # a result that cannot be written, on a full disk say, must not cost the steps before it
        at_end = watch.keep and stage == job.settings.stages[-1]
        return [*callbacks, Checkpoints(watch.save_steps, at_end=at_end, on_save=saved), self._stop]

    def _held_out_score(self, model: Any) -> float:
        """In every process: all of them compare trials of learning rates by it."""
        assert self._score is not None
        self._held_out = self._score(model)
        return self._held_out

    def _show(self, record: dict[str, Any]) -> None:
        if "loss" in record:
            self._note(record["step"])
        self._watch.show(record)


def _check_sharding(job: UptrainJob, checkpoint: Path) -> None:
    """Raise InputError unless the checkpoint was saved as this run will read it.

    The Trainer would take weights from one of another kind, and begin optimizer and schedule anew without a word.
    """
    kinds = {"fsdp": "with --fsdp in several processes", "deepspeed": "with DeepSpeed", "whole": "without sharding"}
    saved = "whole"
    if (checkpoint / SHARDS_NAME).exists():
        saved = "fsdp"
    elif any(checkpoint.glob("global_step*")):
        saved = "deepspeed"
    own = "fsdp" if job.execution.fsdp and job.execution.num_processes > 1 else "whole"
    if uses_deepspeed():
        own = "deepspeed"
    if saved != own:
        raise InputError(f"{checkpoint} was saved {kinds[saved]}", hint=f"go on {kinds[saved]}, not {kinds[own]}")


def _result(
    job: UptrainJob, passes: float | None, *, seconds: float = 0.0, steps_done: int = 0, held_out: float | None = None
) -> UptrainResult:
    settings = job.settings
    return UptrainResult(
        output=job.output,
        passes=passes,
        steps=settings.steps,
        tokens=settings.steps * settings.tokens_per_step,
        objective=job.objective,
        settings=settings,
        seconds=seconds,
        tokens_per_second=steps_done * settings.tokens_per_step / max(seconds, 1e-9),
        held_out=held_out,
    )


def _checkpoint_bytes(job: UptrainJob) -> float:
    """What one process writes for a checkpoint: float32 weights and two moments."""
    num_shards = job.execution.num_processes if job.execution.fsdp else 1
    return 12 * job.checkpoint.num_parameters / num_shards


def _training_arguments(
    job: UptrainJob, watch: Observation, stage: Stage, device: torch.device, *, micro_batch: int
) -> TrainingArguments:
    settings, execution = job.settings, job.execution
    checkpointing: dict[str, Any] = {
        ACTIVATION_CHECKPOINTING: _checkpoints_activations(job, stage),
        f"{ACTIVATION_CHECKPOINTING}_kwargs": {"use_reentrant": False},
    }
    arguments = TrainingArguments(
        output_dir=str(checkpoints_folder(job, stage)),
        max_steps=stage.steps,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=batch_of(job, micro_batch).gradient_accumulation_steps,
        learning_rate=stage.learning_rate,
        lr_scheduler_type=settings.lr_scheduler,
        warmup_steps=math.ceil(settings.warmup_fraction * stage.steps),
        optim=_OPTIMIZER,
        weight_decay=settings.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=settings.max_grad_norm,
        use_cpu=device.type == "cpu",
        seed=settings.seed,
        logging_steps=watch.log_steps,
        logging_nan_inf_filter=False,  # it would hide a NaN and go on
        save_strategy="no",  # the Checkpoints callback asks for them
        train_sampling_strategy="sequential",  # the blocks are in their drawn order already
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=list(execution.report_to) or "none",
        run_name=job.output.name,
        ddp_find_unused_parameters=False,
        **checkpointing,
    )
    arguments.mixed_precision = "no"  # the trainer opens autocast itself, whatever a launcher says
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs need a launcher; the Trainer would wrap in DataParallel
    return arguments


def _checkpoints_activations(job: UptrainJob, stage: Stage) -> bool:
    """Attention regression keeps no feed-forward activations anyway, and its hooks are not there in a second pass."""
    return job.execution.activation_checkpointing and stage.objective is Objective.prediction
