"""Measure the speed and memory of uptrain against a bare transformers.Trainer, and of forward KL against cross-entropy.

    python benchmarks/measure_training.py MODEL DATA [--teacher MODEL] [--rounds 5] [--steps 24] [--warm-up 4]
        [--compile]

The same model, packed blocks, batch, optimizer, schedule and precision in each run: `bare` is what a user writes, a
Trainer that gets labels and position_ids and takes the model's own loss, with use_cache off; `CE` and `KL` are uptrain
with cross-entropy and with forward KL to a teacher, MODEL itself unless another is named; `light` is forward KL that
trains attention alone and shares the rest with the teacher. Every run has a process of its own. Rounds run all of them,
one after another, forwards and backwards in turn, so that a ratio is of neighbours on a machine that others use too.
The first --warm-up steps are not counted. Checkpoints and evaluation are left out.

Prints tokens/s of each over the rounds, and its peak memory: the largest resident set of its process, libraries
included, beside what was resident when its first step began; with CUDA what torch allocated at most, and MFU by the
arithmetic of kvconvert.uptrain.estimate. --compile adds every run under torch.compile. Then the ratios of the rounds:
median, least and largest, of tokens/s; of those of a run's median step, which a burst of other load does not move; and
of tokens per second of processor time, which on a CPU hardly depends on other load.
Exits with 1 if CE is below 0.97 of bare, KL below 0.72 of CE (3 forwards to 4: at most 0.75), or if the losses of bare
and CE show that they did not train the same.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

# torch is imported in the runs' processes only: their peak memory begins with that of the process that starts them
_LEAST_CE, _LEAST_KL = 0.97, 0.72
_LEARNING_RATE = 1e-4
_LOG_STEPS = 10
_SAME_LOSS = 1e-3  # relative; in bfloat16 the two losses round elsewhere


@dataclass(frozen=True)
class Run:
    """One run's steps after the warm-up, in seconds, and its memory in bytes; `allocated` is that of a GPU.

    `processor_seconds` are those of all its threads in all these steps.
    """

    tokens_per_step: int
    seconds: tuple[float, ...]
    processor_seconds: float
    first_loss: float
    resident_before: int
    resident_peak: int
    allocated: int | None
    utilisation: float | None

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_per_step * len(self.seconds) / sum(self.seconds)

    @property
    def median_tokens_per_second(self) -> float:
        """Of its median step."""
        return self.tokens_per_step / median(self.seconds)

    @property
    def tokens_per_processor_second(self) -> float:
        return self.tokens_per_step * len(self.seconds) / self.processor_seconds


@dataclass(frozen=True)
class Ratio:
    median: float
    least: float
    largest: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.least:.3f} to {self.largest:.3f})"


def ratio(ones: Sequence[float], others: Sequence[float]) -> Ratio:
    """Of rates round by round: a round's runs are neighbours in time."""
    ratios = [one / other for one, other in zip(ones, others, strict=True)]
    return Ratio(median(ratios), min(ratios), max(ratios))


class Clock:
    """When steps end. A GPU is waited for only where the measured steps begin and end, since waiting costs time."""

    def __init__(self, *, warm_up: int, steps: int) -> None:
        self._warm_up, self._steps = warm_up, steps
        self._count = 0
        self._at: list[float] = []
        self._processor_at = 0.0
        self.processor_seconds = 0.0
        self.resident_before = 0
        self.resident_peak = 0
        self.allocated: int | None = None

    @property
    def seconds(self) -> tuple[float, ...]:
        return tuple(end - begin for begin, end in zip(self._at, self._at[1:], strict=False))

    def begin(self) -> None:
        import psutil

        self.resident_before = psutil.Process().memory_info().rss

    def step_ended(self) -> None:
        import torch

        self._count += 1
        if self._count in (self._warm_up, self._steps) and torch.cuda.is_available():
            torch.cuda.synchronize()
        if self._count >= self._warm_up:
            self._at.append(time.perf_counter())
        if self._count == self._warm_up:
            self._processor_at = time.process_time()
        if self._count == self._steps:
            self.processor_seconds = time.process_time() - self._processor_at
            self.resident_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            self.allocated = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def main() -> None:
    arguments = _parse()
    if arguments.run is not None:
        _work(arguments)
        return
    names = ["bare", "CE", "KL", "light"]
    names += [f"{name}, compiled" for name in names] if arguments.compile else []
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for number in range(arguments.rounds):
        for name in names if number % 2 == 0 else reversed(names):
            runs[name].append(_in_a_process(name))
    _show(runs, compiled=arguments.compile)


def _in_a_process(name: str) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, *sys.argv[1:], "--run", name, "--folder", folder]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"the run {name!r} ended with {done.returncode}:\n{done.stderr[-4000:]}")
        result = json.loads((Path(folder) / "result.json").read_text())
    return Run(**result | {"seconds": tuple(result["seconds"])})


def _work(arguments: argparse.Namespace) -> None:
    """One run, in this process."""
    from kvconvert.convert.device import default_precision

    name, _, compiled = arguments.run.partition(", ")
    precision = default_precision() if arguments.precision == "auto" else arguments.precision
    clock = Clock(warm_up=arguments.warm_up, steps=arguments.steps)
    settings = _settings(arguments, name, precision)
    train = _bare if name == "bare" else _uptrain
    losses = train(arguments, settings, clock, compiled=bool(compiled))
    result = Run(
        tokens_per_step=settings.tokens_per_step,
        seconds=clock.seconds,
        processor_seconds=clock.processor_seconds,
        first_loss=losses[0],
        resident_before=clock.resident_before,
        resident_peak=clock.resident_peak,
        allocated=clock.allocated,
        utilisation=_utilisation(arguments, settings, clock),
    )
    (arguments.folder / "result.json").write_text(json.dumps(asdict(result)))


def _settings(arguments: argparse.Namespace, name: str, precision: str) -> Any:
    from kvconvert.uptrain.recipe import LossWeights, Recipe
    from kvconvert.uptrain.settings import RunSettings

    recipes = {"KL": Recipe.distill, "light": Recipe.light}
    with_teacher: dict[str, Any] = {"recipe": recipes[name], "weights": LossWeights()} if name in recipes else {}
    return RunSettings(
        steps=arguments.steps,
        sequence_length=arguments.sequence_length,
        sequences_per_step=arguments.sequences_per_step,
        learning_rate=_LEARNING_RATE,
        warmup_fraction=0.0,  # transformers' own begins at the rate 0, uptrain's does not
        precision=precision,
        **with_teacher,
    )


def _uptrain(arguments: argparse.Namespace, settings: Any, clock: Clock, *, compiled: bool) -> list[float]:
    """The losses that were logged."""
    from kvconvert.uptrain import Machine, Monitoring, TextSettings, UptrainSettings, uptrain

    losses: list[float] = []

    def step_ended(num_steps: int) -> None:
        if num_steps:
            clock.step_ended()
        else:
            clock.begin()

    @contextmanager
    def progress(what: str, total: int) -> Iterator[Callable[[int], object]]:
        yield step_ended

    uptrain(
        arguments.model,
        data=arguments.data,
        output=arguments.folder / "out",
        teacher=(arguments.teacher or arguments.model) if settings.recipe.needs_teacher else None,
        steps=settings.steps,
        settings=UptrainSettings(
            recipe=settings.recipe,
            lr=settings.learning_rate,
            sequence_length=settings.sequence_length,
            global_batch_tokens=settings.tokens_per_step,
            warmup_fraction=settings.warmup_fraction,
            precision=settings.precision,
        ),
        text=TextSettings(validation_fraction=0.0),
        machine=Machine(micro_batch=arguments.micro_batch, compile=compiled),
        monitoring=Monitoring(save_steps=10**9, log_steps=min(_LOG_STEPS, settings.steps)),
        progress=progress,
        show=lambda record: losses.append(record["loss"]),
    )
    return losses


def _bare(arguments: argparse.Namespace, settings: Any, clock: Clock, *, compiled: bool) -> list[float]:
    """The losses that a Trainer logs, which knows nothing of kvconvert but the dataset."""
    import torch
    from kvconvert.convert.checkpoint.loading import load_model
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    losses: list[float] = []

    class Watch(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            clock.begin()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.step_ended()

        def on_log(self, *args: Any, **kwargs: Any) -> None:
            losses.extend([kwargs["logs"]["loss"]] if "loss" in kwargs["logs"] else [])

    cuda = torch.cuda.is_available()
    model = load_model(arguments.model, dtype=torch.float32, device="cuda" if cuda else "cpu")
    model.config.use_cache = False
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(arguments.folder / "bare"),
            max_steps=settings.steps,
            per_device_train_batch_size=arguments.micro_batch,
            gradient_accumulation_steps=settings.sequences_per_step // arguments.micro_batch,
            learning_rate=settings.learning_rate,
            lr_scheduler_type=settings.lr_scheduler,
            warmup_steps=settings.warmup_fraction,
            optim="adamw_torch_fused",
            weight_decay=settings.weight_decay,
            adam_beta2=0.95,
            max_grad_norm=settings.max_grad_norm,
            bf16=settings.precision == "bf16",
            use_cpu=not cuda,
            logging_steps=min(_LOG_STEPS, settings.steps),
            save_strategy="no",
            train_sampling_strategy="sequential",
            disable_tqdm=True,
            report_to="none",
            torch_compile=compiled,
        ),
        train_dataset=_blocks(arguments, settings),
        callbacks=[Watch()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return losses


def _blocks(arguments: argparse.Namespace, settings: Any) -> Any:
    """The blocks that uptrain packs for these settings."""
    from kvconvert.convert.checkpoint.tokenizer import load_tokenizer
    from kvconvert.convert.text.sources import TextSource
    from kvconvert.convert.text.tokens import tokenizer_hash
    from kvconvert.uptrain.data.blocks import PackedBlocks
    from kvconvert.uptrain.data.corpus import Corpus
    from kvconvert.uptrain.data.packing import build
    from kvconvert.uptrain.data.sources import WeightedSource

    tokenizer = load_tokenizer(arguments.model)
    num_samples = settings.steps * settings.sequences_per_step
    corpus = Corpus(
        sources=(WeightedSource(TextSource(arguments.data)),),
        sequence_length=settings.sequence_length,
        num_blocks=num_samples,
        tokenizer_hash=tokenizer_hash(tokenizer),
        vocab_size=1 + max(tokenizer.get_vocab().values()),
        seed=settings.seed,
    )
    build(corpus, arguments.folder / "data", tokenizer)
    return PackedBlocks(arguments.folder / "data", num_samples=num_samples)


def _utilisation(arguments: argparse.Namespace, settings: Any, clock: Clock) -> float | None:
    """Model FLOPs over those of the GPU at its peak, None where that is not known."""
    import torch
    from kvconvert.convert import open_checkpoint
    from kvconvert.uptrain.estimate.flops import flops_per_token
    from kvconvert.uptrain.estimate.gpu import peak_flops
    from kvconvert.uptrain.estimate.size import measure_size
    from kvconvert.uptrain.recipe import Objective, Recipe, Trained

    peak = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    if peak is None:
        return None
    with open_checkpoint(arguments.model) as student, open_checkpoint(arguments.teacher or arguments.model) as teacher:
        original = measure_size(teacher) if settings.recipe.needs_teacher else None
        trained = Trained.attention if settings.recipe is Recipe.light else Trained.all
        per_token = flops_per_token(
            measure_size(student), original, Objective.prediction, trained, settings.sequence_length
        )
    num_tokens: int = settings.tokens_per_step * len(clock.seconds)
    return per_token * num_tokens / sum(clock.seconds) / peak


def _show(runs: dict[str, list[Run]], *, compiled: bool) -> None:
    print("| run | tokens/s: median (least to largest) | peak RSS | when training began | allocated on GPU | MFU |")
    print("|---|---|---|---|---|---|")
    for name, rounds in runs.items():
        rates = [run.tokens_per_second for run in rounds]
        allocated = [run.allocated for run in rounds if run.allocated is not None]
        used = [run.utilisation for run in rounds if run.utilisation is not None]
        cells = [
            name,
            f"{median(rates):.0f} ({min(rates):.0f} to {max(rates):.0f})",
            _megabytes(median(run.resident_peak for run in rounds)),
            _megabytes(median(run.resident_before for run in rounds)),
            _megabytes(median(allocated)) if allocated else "–",
            f"{median(used):.1%}" if used else "–",
        ]
        print(f"| {' | '.join(cells)} |")
    passed = True
    for suffix in ("", ", compiled") if compiled else ("",):
        bare, cross_entropy, divergence = (runs[f"{name}{suffix}"] for name in ("bare", "CE", "KL"))
        passed &= _compare(f"CE / bare{suffix}", cross_entropy, bare, least=_LEAST_CE)
        passed &= _compare(f"KL / CE{suffix}", divergence, cross_entropy, least=_LEAST_KL)
        passed &= _same_loss(f"first logged loss{suffix}", bare[0].first_loss, cross_entropy[0].first_loss)
    sys.exit(0 if passed else 1)


def _compare(name: str, ones: Sequence[Run], others: Sequence[Run], *, least: float) -> bool:
    found = {}
    for figure in ("tokens_per_second", "median_tokens_per_second", "tokens_per_processor_second"):
        found[figure] = ratio([getattr(run, figure) for run in ones], [getattr(run, figure) for run in others])
    whole, steps, processor = found.values()
    enough = whole.median >= least
    print(f"{name}: {whole}; {'at least' if enough else 'LESS THAN'} {least}")
    print(f"{name}, of median steps: {steps}; by processor time: {processor}")
    return enough


def _same_loss(name: str, bare: float, ours: float) -> bool:
    same = abs(bare - ours) <= _SAME_LOSS * abs(bare)
    print(f"{name}: bare {bare:.6f}, CE {ours:.6f}; {'the same' if same else 'NOT THE SAME'}")
    return same


def _megabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:.0f} MB"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--teacher", help="MODEL unless given")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--warm-up", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--sequences-per-step", type=int, default=8)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto")
    parser.add_argument("--compile", action="store_true", help="every run under torch.compile too")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not 1 <= arguments.warm_up < arguments.steps:
        parser.error("--warm-up has to be at least 1 and less than --steps")
    return arguments


if __name__ == "__main__":
    main()
