"""The models of a run: loaded whole or sharded, frozen in part, the teacher's weights shared where they are equal."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..convert.architectures.architecture import Architecture
from ..convert.architectures.table import find_architecture
from ..convert.checkpoint.loading import load_model
from ..convert.checkpoint.opening import open_checkpoint
from ..convert.checkpoint.tensors import torch_dtype
from ..convert.errors import UnsupportedError
from ..measure.finiteness import non_finite_logits
from .job import UptrainJob
from .recipe import Stage, trained_names

__all__ = [
    "compile_in_place",
    "freeze_except",
    "full_state",
    "load_for_training",
    "load_models",
    "load_whole_models",
    "require_separation",
    "reshard",
    "share_equal_parameters",
    "train_in",
]

_PROBE_TOKENS = 16


def load_for_training(
    directory: Path, architecture: Architecture, *, dtype: Any, device: torch.device, num_shards: int = 1
) -> Any:
    """Load a model onto `device`, or into each of `num_shards` processes its share of every parameter (FSDP2).

    Each decoder layer of the class is a unit that is gathered for its forward and backward pass alone.
    """
    if num_shards == 1:
        return load_model(directory, dtype=dtype, device=device)
    from transformers.distributed.configuration_utils import DistributedConfig

    layers = architecture.attention.partition(".{layer}")[0]
    config = DistributedConfig(fsdp_size=num_shards, fsdp_plan={f"{layers}.*": "free_full_weight"})
    return load_model(directory, dtype=dtype, device=None, distributed_config=config)


def load_models(
    job: UptrainJob, stage: Stage, source: Path, teacher: Path | None, device: torch.device
) -> tuple[Any, Any | None]:
    """Load the student from `source` and the teacher of a stage, checked and partly frozen.

    What is trained is in float32, or in float64 where the job's precision is that, and so is the teacher. Under bf16,
    which is autocast, the teacher is as it is stored, but for float16: its activations would not be bfloat16's. Without
    a teacher None stands for it. Raises UnsupportedError for a class that does not tell packed documents apart.
    """
    bf16, fp64 = job.settings.precision == "bf16", job.settings.precision == "fp64"
    trained_dtype = torch.float64 if fp64 else torch.float32
    num_shards = job.execution.num_processes if job.execution.fsdp else 1
    architecture = find_architecture(job.checkpoint)
    shared_dtype = "auto" if bf16 else trained_dtype
    student_dtype = shared_dtype if job.shares_frozen else trained_dtype
    student = load_for_training(source, architecture, dtype=student_dtype, device=device, num_shards=num_shards)
    freeze_except(student, trained_names([name for name, _ in student.named_parameters()], architecture, stage.trained))
    train_in(student, trained_dtype)
    require_separation(student, name=job.checkpoint.name, bf16=bf16)
    if teacher is None:
        return student, None
    with open_checkpoint(teacher) as opened:
        architecture, is_half = find_architecture(opened), torch_dtype(opened.dtype) == torch.float16
    teacher_dtype = torch.bfloat16 if bf16 and is_half and not job.shares_frozen else shared_dtype
    original = load_for_training(teacher, architecture, dtype=teacher_dtype, device=device, num_shards=num_shards)
    original.requires_grad_(False)
    require_separation(original, name=str(job.teacher), bf16=bf16)
    if job.shares_frozen:
        share_equal_parameters(student, original)
    return student, original


def freeze_except(model: Any, names: frozenset[str]) -> None:
    """Let gradients reach the named parameters only."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)


def train_in(model: Any, dtype: torch.dtype = torch.float32) -> None:
    """Put what is trained into a dtype: in bfloat16 most updates at usual learning rates are lost in rounding."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def share_equal_parameters(student: Any, teacher: Any) -> int:
    """Let frozen parameters of the student be the teacher's where they are equal; returns the bytes that this saves.

    Two classes may call the same weight by two names, so weights are found by their values.
    """
    theirs: dict[tuple[Any, ...], list[Tensor]] = {}
    for parameter in teacher.parameters():
        theirs.setdefault(_fingerprint(parameter, parameter.dtype), []).append(parameter)
    dtype = next(iter(teacher.parameters())).dtype
    saved = 0
    for parameter in student.parameters():
        if parameter.requires_grad:
            continue
        for candidate in theirs.get(_fingerprint(parameter, dtype), []):
            if torch.equal(parameter, candidate.to(parameter.dtype)):  # exactly: a rounded one would change the result
                saved += parameter.numel() * parameter.element_size()
                parameter.data = candidate.data
                break
    return saved


def require_separation(model: Any, *, name: str, bf16: bool) -> None:
    """Raise UnsupportedError if documents that share a sequence see each other in `model`, as it is trained.

    Some tokens of the first of two documents are exchanged: the second one's logits must not move. All processes of a
    sharded model have to call it. Raises CheckpointError if its logits are not finite.
    """
    config = model.config.get_text_config()
    device = next(model.parameters()).device
    ids = torch.arange(2 * _PROBE_TOKENS, device=device) % config.vocab_size
    positions = torch.arange(2 * _PROBE_TOKENS, device=device) % _PROBE_TOKENS
    perturbed = ids.clone()
    perturbed[: _PROBE_TOKENS // 2] = perturbed[: _PROBE_TOKENS // 2].flip(0)
    was_training = model.training
    model.eval()
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        # one after the other, as a batch of one each: kernels may choose another order of sums for another batch
        logits = [
            model(input_ids=row[None], position_ids=positions[None], use_cache=False).logits[0].float()
            for row in (ids, perturbed)
        ]
    model.train(was_training)
    reshard(model)
    if not all((found < math.inf).all() for found in logits):  # -inf rules a token out
        raise non_finite_logits(name, model, "before the first step")
    moved = (logits[0] - logits[1]).abs()
    if moved[_PROBE_TOKENS:].max() > 1e-3 * moved[:_PROBE_TOKENS].max():
        raise UnsupportedError(
            f"{name}: documents that share a sequence see each other in {type(model).__name__}, so that uptrain, which "
            "packs them, would teach it nonsense",
            hint="the class does not tell packed documents apart by their position_ids; another attention "
            "implementation may",
        )


def compile_in_place(student: Any, teacher: Any | None) -> None:
    """Compile both models (torch.compile) without a wrapper, which would change the names of weights."""
    student.compile()
    if teacher is not None:
        teacher.compile()


def load_whole_models() -> None:
    """Let models be opened whole again, after a trainer has set up DeepSpeed's ZeRO-3, which shards them itself."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def reshard(model: Any) -> None:
    """Give up what a forward pass without a backward left gathered: FSDP2 keeps the last layers' weights for it.

    Until then the model's parameters are not those that an optimizer has or a checkpoint holds.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def full_state(model: Any, accelerator: Any, wrapped: Any) -> dict[str, Tensor]:
    """Gather all weights of a trained model in the main process, whatever sharded them; elsewhere it may be empty."""
    if getattr(model, "is_distributed_loading_by_transformers", False):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return dict(get_model_state_dict(model, options=options))  # type: ignore[arg-type]
    return dict(accelerator.get_state_dict(wrapped) or {})


def _fingerprint(parameter: Tensor, dtype: torch.dtype) -> tuple[Any, ...]:
    """Equal for equal weights: the shape and a few values, in `dtype`."""
    flat = parameter.detach().reshape(-1)
    sample = flat[:: max(len(flat) // 16, 1)][:16].to(dtype)
    return tuple(parameter.shape), tuple(sample.tolist())
