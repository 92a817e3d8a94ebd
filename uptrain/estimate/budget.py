"""How long an uptraining run is, and how its batch is split over processes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from ...convert.errors import InputError, UnsupportedError
from .pretraining import PretrainingTokens

__all__ = [
    "DEFAULT_FRACTION",
    "Batch",
    "Budget",
    "check_asked_batch",
    "default_global_batch_tokens",
    "default_micro_batch",
    "derive_batch",
    "plan_budget",
]


DEFAULT_FRACTION = 0.05
"""α of the GQA paper: mean-pooled MQA needs it, and 10 % gain little more (Ainslie et al. 2023)."""

_MAX_DEFAULT_MICRO_BATCH = 8
_NEAR = Fraction(1, 20)  # of the tokens that were asked for: 128k is 62.5 sequences of 2048, and 62 of them will do


@dataclass(frozen=True)
class Budget:
    """The length of a run: `steps` optimizer steps of `tokens_per_step` tokens.

    `fraction` is what was asked for (None where steps or tokens were), of `pretraining_tokens`, whose origin `source`
    tells; where they are not known it says why. `explicit` is False where nobody chose a length.
    """

    steps: int
    tokens_per_step: int
    pretraining_tokens: int | None
    source: str
    fraction: float | None = None
    explicit: bool = True

    @property
    def tokens(self) -> int:
        """The tokens of the whole run."""
        return self.steps * self.tokens_per_step

    @property
    def fraction_of_pretraining(self) -> float | None:
        """The part of the pretraining tokens that the steps come to; None if those tokens are not known."""
        return None if self.pretraining_tokens is None else self.tokens / self.pretraining_tokens


def plan_budget(
    *,
    steps: int | None,
    tokens: int | None,
    fraction: float | None,
    pretraining_tokens: int | None,
    lookup: PretrainingTokens,
    tokens_per_step: int,
) -> Budget:
    """Make the budget that one of `steps`, `tokens` and `fraction` sets; without any, DEFAULT_FRACTION does.

    `pretraining_tokens` is what the user says, `lookup` what is known otherwise. Steps are rounded up.
    Raises UnsupportedError for two lengths or one that is not positive, InputError for a fraction of an unknown number.
    """
    given = {"--steps": steps, "--tokens": tokens, "--fraction": fraction}
    chosen = [name for name, value in given.items() if value is not None]
    if len(chosen) > 1:
        raise UnsupportedError(
            f"{' and '.join(chosen)} both say how long the run is", hint=f"pass only one of {', '.join(given)}"
        )
    for name, value in {**given, "--pretraining-tokens": pretraining_tokens}.items():
        if value is not None and not 0 < value < math.inf:
            raise UnsupportedError(f"{name} is {value}, expected a positive number")
    known, source = lookup.tokens, lookup.source
    if pretraining_tokens is not None:
        known, source = pretraining_tokens, "--pretraining-tokens"
    if steps is None and tokens is None:
        fraction = DEFAULT_FRACTION if fraction is None else fraction
        if known is None:
            raise InputError(
                f"on how many tokens the model was pretrained is not known, so that {fraction:.4g} of them is no "
                f"number: {source}",
                hint="pass --pretraining-tokens, --tokens or --steps",
            )
        # exact: 0.05 · 2e12 in floats may come out a little above a whole number of steps
        steps = math.ceil(Fraction(str(fraction)) * known / tokens_per_step)
    elif tokens is not None:
        steps = -(-tokens // tokens_per_step)
    assert steps is not None
    return Budget(
        steps=steps,
        tokens_per_step=tokens_per_step,
        pretraining_tokens=known,
        source=source,
        fraction=fraction,
        explicit=bool(chosen),
    )


def default_global_batch_tokens(num_parameters: int) -> int:
    """Choose the tokens per optimizer step: 16 384 below 1e8 parameters, 131 072 below 1e9, 524 288 above.

    The largest is what MHA2MLA (SmolLM) and TransMLA (128 × 4096) uptrain with. Smaller models are given smaller
    budgets, which should still be thousands of steps: 1B tokens are 1908 steps of the largest batch.
    """
    return 2**14 if num_parameters < 1e8 else 2**17 if num_parameters < 1e9 else 2**19


@dataclass(frozen=True)
class Batch:
    """The sequences of one optimizer step, and how `num_processes` take them: `micro_batch` at a time, accumulated.

    Raises UnsupportedError, with what would work, unless the sequences divide evenly.
    """

    sequences_per_step: int
    sequence_length: int
    num_processes: int
    micro_batch: int

    def __post_init__(self) -> None:
        for name in ("sequences_per_step", "sequence_length", "num_processes", "micro_batch"):
            if getattr(self, name) < 1:
                raise UnsupportedError(f"{name.replace('_', ' ')} is {getattr(self, name)}, expected at least 1")
        _check_divides(self.sequences_per_step, self.sequence_length, self.num_processes, self.micro_batch)

    @property
    def gradient_accumulation_steps(self) -> int:
        """The micro-batches that each process takes before the optimizer steps."""
        return self.sequences_per_step // (self.num_processes * self.micro_batch)

    @property
    def tokens_per_step(self) -> int:
        """The tokens of an optimizer step, over all processes."""
        return self.sequences_per_step * self.sequence_length


def derive_batch(
    *, global_batch_tokens: int, sequence_length: int, num_processes: int, micro_batch: int | None = None
) -> Batch:
    """Find the batch nearest to `global_batch_tokens`, whatever the number of processes: accumulation follows.

    Without `micro_batch`, the largest up to 8 that divides a process's share. Raises UnsupportedError, with the nearest
    batch and the largest micro-batch that work, where the sequences cannot be shared out evenly.
    """
    for name, value in {
        "--global-batch-tokens": global_batch_tokens,
        "--sequence-length": sequence_length,
        "the number of processes": num_processes,
        "the micro-batch": 1 if micro_batch is None else micro_batch,
    }.items():
        if value < 1:
            raise UnsupportedError(f"{name} is {value}, expected at least 1")
    sequences = max(1, round(Fraction(global_batch_tokens, sequence_length)))
    micro_batch = micro_batch or default_micro_batch(sequences, sequence_length, num_processes)
    return Batch(sequences, sequence_length, num_processes, micro_batch)


def check_asked_batch(asked: int, batch: Batch) -> str | None:
    """Say what a step takes where it is not quite the `asked` number of tokens; None where it is just that.

    Raises UnsupportedError where no whole number of sequences comes within 5 % of it.
    """
    taken, length = batch.tokens_per_step, batch.sequence_length
    if taken == asked:
        return None
    if abs(taken - asked) > _NEAR * asked:
        below = asked // length * length
        sizes = f"{below} or {below + length}" if below else str(length)
        raise UnsupportedError(
            f"--global-batch-tokens {asked} cannot be met: a step takes whole sequences of {length} tokens",
            hint=f"pass --global-batch-tokens {sizes}, or a smaller --sequence-length",
        )
    return f"a step takes {taken} tokens, {batch.sequences_per_step} sequences, which is nearest to {asked}"


def default_micro_batch(sequences: int, sequence_length: int, num_processes: int) -> int:
    """Find the largest micro-batch up to 8 that divides a process's share of the sequences of a step.

    Raises UnsupportedError where they cannot be shared out evenly.
    """
    _check_divides(sequences, sequence_length, num_processes, 1)
    return _largest_divisor(sequences // num_processes, _MAX_DEFAULT_MICRO_BATCH)


def _largest_divisor(number: int, limit: int) -> int:
    return next(divisor for divisor in range(min(number, limit), 0, -1) if number % divisor == 0)


def _check_divides(sequences: int, sequence_length: int, num_processes: int, micro_batch: int) -> None:
    unit = num_processes * micro_batch
    if sequences % unit == 0:
        return
    nearest = max(unit, round(Fraction(sequences, unit)) * unit)
    hint = f"pass --global-batch-tokens {nearest * sequence_length} ({nearest} sequences)"
    per_process, rest = divmod(sequences, num_processes)
    if rest == 0:
        hint += f", or a micro-batch of {_largest_divisor(per_process, micro_batch)}"
    raise UnsupportedError(
        f"{sequences} sequences of {sequence_length} tokens per step cannot be split evenly over {num_processes} "
        f"processes that take {micro_batch} at a time",
        hint=hint,
    )
