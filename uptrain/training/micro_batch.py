"""The largest micro-batch that fits into a device's memory, from one measured step."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from torch import Tensor

from ...convert.checkpoint.files import write_text
from ...convert.errors import UnsupportedError
from ...convert.runtime.transformers_interface import checkpoint_activations
from ..launcher import count_local_processes
from ..losses.prediction import Loss
from ..recipe import Stage
from .arguments import checkpoints_activations
from .context import RunContext

__all__ = ["largest_micro_batch", "stage_micro_batch"]

_MICRO_BATCH_NAME = "micro_batch.{stage}.json"


_USABLE = 0.9  # of the free memory: allocators leave gaps, and other processes grow
_MAX_MICRO_BATCH = 64  # more gains no speed
_MOMENT_BYTES = 8  # of AdamW's two moments, which a first step does not have yet


def largest_micro_batch(
    model: Any,
    loss: Callable[[int], Tensor],
    *,
    sequences_per_process: int,
    device: torch.device,
    num_local: int,
    everywhere: Callable[[bool], bool] = lambda holds: holds,
) -> int:
    """Find the largest divisor of `sequences_per_process` up to 64 whose step fits beside gradients and moments.

    `loss(n)` is that of n sequences. One and, where it fits, two sequences are run forward and backward while gradients
    are allocated; each further sequence is taken to need the difference of the two. `num_local` processes share the
    memory of a CPU. `everywhere` tells whether something holds in all processes, which run the steps of a sharded model
    together.
    Raises UnsupportedError where one sequence does not fit.
    """
    divisors = [n for n in range(1, min(sequences_per_process, _MAX_MICRO_BATCH) + 1) if sequences_per_process % n == 0]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    states = sum(_local(parameter).numel() * (parameter.element_size() + _MOMENT_BYTES) for parameter in trained)
    free = _free_bytes(device, num_local)
    usable = (free - states) * _USABLE
    # gradients that come while activations go would hide how a peak grows with the number of sequences
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    first = _step_bytes(model, loss, 1, device)
    if not everywhere(first <= usable):
        model.zero_grad(set_to_none=True)
        raise UnsupportedError(
            f"one sequence needs {(first + states) / 1e9:.1f} GB beside the weights, and {free / 1e9:.1f} GB are free",
            hint="use a smaller --sequence-length, --activation-checkpointing, --recipe light or --fsdp on more GPUs",
        )
    slope = first
    if everywhere(len(divisors) > 1 and 2 * first <= usable):
        slope = max(_step_bytes(model, loss, 2, device) - first, 1)
    model.zero_grad(set_to_none=True)
    return max(n for n in divisors if first + (n - 1) * slope <= usable)


def _step_bytes(model: Any, loss: Callable[[int], Tensor], num_sequences: int, device: torch.device) -> int:
    """Memory that a forward and backward pass take beside what was there."""
    if device.type != "cpu":
        module = torch.get_device_module(device)
        before = module.memory_allocated(device)
        module.reset_peak_memory_stats(device)
        loss(num_sequences).backward()
        return int(module.max_memory_allocated(device) - before)
    with _saved_bytes() as saved:
        loss(num_sequences).backward()
    weights = {parameter.untyped_storage().data_ptr() for parameter in map(_local, model.parameters())}
    return sum(num_bytes for place, num_bytes in saved.items() if place not in weights)


@contextmanager
def _saved_bytes() -> Iterator[dict[int, int]]:
    """Bytes, by storage, that autograd keeps: a CPU has no record of its peak."""
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield saved


def _free_bytes(device: torch.device, num_local: int) -> int:
    if device.type == "cpu":
        return int(psutil.virtual_memory().available) // num_local
    free, _ = torch.get_device_module(device).mem_get_info(device)
    return int(free)


def _local(parameter: Tensor) -> Tensor:
    """What this process holds of a parameter."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def stage_micro_batch(context: RunContext, stage: Stage, student: Any, loss: Loss) -> int:
    """Return the micro-batch that was asked for, or what fits, which is not measured again on the same machines."""
    job, processes = context.job, context.processes
    if job.execution.micro_batch is not None:
        return job.execution.micro_batch
    device, length = processes.device, job.settings.sequence_length
    machine = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "num_processes": job.execution.num_processes,
        "fsdp": job.execution.fsdp,
    }
    path = job.work / _MICRO_BATCH_NAME.format(stage=stage.name)
    known = json.loads(path.read_text()) if path.exists() else {}
    if processes.everywhere(known.get("machine") == machine):
        return int(known["micro_batch"])

    def step(num_sequences: int) -> Tensor:
        ids = torch.arange(num_sequences * length, device=device).view(num_sequences, length)
        ids = ids % student.config.get_text_config().vocab_size
        positions = torch.arange(length, device=device).expand_as(ids)
        with torch.autocast(device.type, torch.bfloat16, enabled=job.settings.precision == "bf16"):
            return loss(student, {"input_ids": ids, "position_ids": positions}, ids)

    student.train()
    if checkpoints_activations(job, stage):
        checkpoint_activations(student, use_reentrant=False)
    own = largest_micro_batch(
        student,
        step,
        sequences_per_process=job.batch(1).gradient_accumulation_steps,
        device=device,
        num_local=count_local_processes(),
        everywhere=processes.everywhere,
    )
    fitting = processes.least(own)
    if processes.is_first:
        write_text(path, json.dumps({"micro_batch": fitting, "machine": machine}) + "\n")
    processes.wait()
    return fitting
