"""What an uptraining run costs, from headers, configs and a sample of the text: FLOPs, GPU hours, memory, disk.

N counts parameters that multiply every token: matrices with the output head, without the lookup of embeddings, and of
experts as many as a token is sent to. S is the sequence length.
"""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ..convert.architectures.source import Source
from ..convert.checkpoint.loading import OLD_BUFFERS
from ..convert.checkpoint.tensors import Checkpoint, TensorInfo
from ..convert.errors import InputError, UnsupportedError
from ..convert.translations.routes import targets
from .budget import Batch, Budget
from .recipe import LossWeights, Objective, Stage, Trained, trained_names

__all__ = [
    "H100_PEAK_FLOPS",
    "MAX_PASSES",
    "ModelSize",
    "RunCost",
    "Sharding",
    "SourceSize",
    "detect_gpu",
    "disk_bytes",
    "flops_per_token",
    "gpu_hours",
    "measure_size",
    "memory_bytes",
    "packed_tokens",
    "passes_over",
    "peak_flops",
    "require_consent",
    "require_known_gpu",
    "run_cost",
    "warn_of_passes",
    "weight_bytes",
]

Sharding = Literal["none", "zero2", "zero3", "fsdp"]

MAX_PASSES = 4
"""More passes over the same text teach less and overfit, which a warning says."""

H100_PEAK_FLOPS = 989e12
_MFU = 0.4

_MAX_HOURS = 1000.0  # H100 hours that a run of a chosen length may take without --yes
_MAX_DEFAULT_HOURS = 100.0  # the same, where nobody chose the length

_TOKEN_EMBEDDINGS = frozenset({"embed_tokens", "wte", "word_embeddings"})
_POSITION_EMBEDDINGS = frozenset({"embed_positions", "wpe"})
_OF_ONE_EXPERT = re.compile(r"\.experts\.\d+\.")
_NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "ffn_config.moe_num_experts")
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "ffn_config.moe_top_k")

_CHUNK_TOKENS = 1024  # of which objectives hold float32 probabilities at a time
_CHECKPOINTS = 3  # two are kept while a third is written, or the result, which is no larger


@dataclass(frozen=True)
class ModelSize:
    """A model in numbers. Parameters that are tied count once, as the head.

    `num_matmul_parameters` is N of the module's docstring, and `num_head_parameters` the part of it that is the head.
    `num_attention_parameters` are those in attention modules, `num_key_value_parameters` those of keys and values, a
    fused projection whole; `_matmul_` leaves out norms and biases. `linear_features` sums inputs and outputs of the
    matrices that a token meets, but for the head.
    """

    num_parameters: int
    num_bytes: int
    num_matmul_parameters: int
    num_head_parameters: int
    num_attention_parameters: int
    num_attention_matmul_parameters: int
    num_key_value_parameters: int
    num_key_value_matmul_parameters: int
    linear_features: int
    hidden_size: int
    vocab_size: int
    num_attention_heads: int
    qk_head_dim: int
    v_head_dim: int
    windows: tuple[int | None, ...]

    @property
    def num_hidden_layers(self) -> int:
        return len(self.windows)

    def num_trained(self, trained: Trained) -> int:
        """Parameters that an optimizer updates."""
        return {
            Trained.all: self.num_parameters,
            Trained.attention: self.num_attention_parameters,
            Trained.kv: self.num_key_value_parameters,
        }[trained]

    def score_flops(self, sequence_length: int) -> float:
        """Forward FLOPs per token of scores and of their product with the values, under a causal mask.

        2·H·(qk + v)·(mean attended tokens) per layer, which are S/2, or w − w²/2S with a window of w < S tokens.
        """
        attended = 0.0
        for window in self.windows:
            width = min(window or sequence_length, sequence_length)
            attended += width - width**2 / (2 * sequence_length)
        return 2 * self.num_attention_heads * (self.qk_head_dim + self.v_head_dim) * attended

    def forward_flops(self, sequence_length: int) -> float:
        """Per token: 2N for the matrices, and the attention's scores."""
        return 2 * self.num_matmul_parameters + self.score_flops(sequence_length)


def measure_size(checkpoint: Checkpoint) -> ModelSize:
    """The size of a decoder from its headers and config; no weight is read.

    A class without grouped attention is measured as the one that it can be converted to, with its own parameters.
    Raises UnsupportedError for an architecture that kvconvert does not know and for encoder-decoders, CheckpointError
    where config and tensors disagree.
    """
    known = _known_view(checkpoint)
    view, architecture = known.checkpoint, known.architecture
    if architecture.cross_attention is not None:
        raise UnsupportedError(f"{checkpoint.name}: only decoders are uptrained, not {architecture.model_type}")
    shape = known.shape
    parameters = _parameters(view)
    counted = list(parameters.values()) if view is checkpoint else view.counted_tensors()
    matrices = {name: _num_active(view, info) for name, info in parameters.items() if _is_matrix(info)}
    head = _head(parameters)
    attention, key_values = (trained_names(parameters, architecture, part) for part in (Trained.attention, Trained.kv))
    latent = shape.latent
    return ModelSize(
        num_parameters=_count(counted),
        num_bytes=sum(info.num_bytes for info in counted),
        num_matmul_parameters=sum(matrices.values()) + head.num_elements,
        num_head_parameters=head.num_elements,
        num_attention_parameters=_count(parameters[name] for name in attention),
        num_attention_matmul_parameters=sum(matrices.get(name, 0) for name in attention),
        num_key_value_parameters=_count(parameters[name] for name in key_values),
        num_key_value_matmul_parameters=sum(matrices.get(name, 0) for name in key_values),
        linear_features=sum(_features(view, parameters[name]) for name in matrices),
        hidden_size=shape.hidden_size,
        vocab_size=head.shape[0],
        num_attention_heads=shape.num_attention_heads,
        qk_head_dim=latent.qk_nope_head_dim + latent.qk_rope_head_dim if latent else shape.head_dim,
        v_head_dim=latent.v_head_dim if latent else shape.head_dim,
        windows=shape.windows,
    )


def _known_view(checkpoint: Checkpoint) -> Source:
    """The checkpoint in its own class, or in the first that it can be converted to."""
    views = list(targets(checkpoint))
    usable = [view for view in views if not isinstance(view, UnsupportedError)]
    if not usable:
        raise next(view for view in views if isinstance(view, UnsupportedError))
    return usable[0]


def _parameters(checkpoint: Checkpoint) -> dict[str, TensorInfo]:
    """Without what older versions saved beside parameters, and without the copy of a tied head."""
    tied = checkpoint.config.get("tie_word_embeddings") is True
    return {
        name: info
        for name, info in checkpoint.tensors.items()
        if not OLD_BUFFERS.search(name) and not (tied and name == "lm_head.weight")
    }


def _head(parameters: Mapping[str, TensorInfo]) -> TensorInfo:
    """The output head, or the embeddings that it is tied to."""
    if "lm_head.weight" in parameters:
        return parameters["lm_head.weight"]
    return next(info for name, info in parameters.items() if _module(name) in _TOKEN_EMBEDDINGS)


def _module(name: str) -> str:
    """The innermost module of a tensor: "q_proj" of model.layers.0.self_attn.q_proj.weight."""
    return name.rpartition(".")[0].rpartition(".")[2]


def _is_matrix(info: TensorInfo) -> bool:
    """Whether tokens are multiplied by it, in the layers: no norm (some are two-dimensional), no lookup, no head."""
    module = _module(info.name)
    looked_up = module in _TOKEN_EMBEDDINGS or module in _POSITION_EMBEDDINGS or module == "lm_head"
    return len(info.shape) > 1 and "norm" not in module and not info.name.endswith("bias") and not looked_up


def _is_expert(info: TensorInfo) -> bool:
    return "experts" in info.name.split(".") or len(info.shape) == 3


def _num_active(checkpoint: Checkpoint, info: TensorInfo) -> int:
    """Of a matrix, the elements that one token meets."""
    if not _is_expert(info):
        return info.num_elements
    return (
        info.num_elements * _config_number(checkpoint, _EXPERTS_PER_TOKEN) // _config_number(checkpoint, _NUM_EXPERTS)
    )


def _features(checkpoint: Checkpoint, info: TensorInfo) -> int:
    """Inputs and outputs of a matrix for one token; of experts, those that it is sent to."""
    if not _is_expert(info):
        return sum(info.shape)
    active, num_experts = (_config_number(checkpoint, names) for names in (_EXPERTS_PER_TOKEN, _NUM_EXPERTS))
    rows, columns = info.shape[-2:]
    if len(info.shape) == 2 and _OF_ONE_EXPERT.search(info.name):
        return (rows + columns) * active // num_experts
    rows = info.num_elements // num_experts // columns  # of one expert, whether they are stacked or follow each other
    return (rows + columns) * active


def _config_number(checkpoint: Checkpoint, names: tuple[str, ...]) -> int:
    present = [name for name in names if checkpoint.config_value(name) is not None]
    return checkpoint.config_int((present or list(names))[0])


def _count(infos: Iterable[TensorInfo]) -> int:
    return sum(info.num_elements for info in infos)


def flops_per_token(
    student: ModelSize, teacher: ModelSize | None, objective: Objective, trained: Trained, sequence_length: int
) -> float:
    """FLOPs of one training step, forward and backward, per token.

    Prediction, all parameters: 3 × forward. Only some of the attention: 2N forward, 2N for the gradients of
    activations, which pass every layer down to the first, 2·(trained matrices), and 3 × the scores. The first layer's
    q, k and v need no gradient of their input; that 2·(these) is counted nevertheless. A teacher adds its forward.

    Attention regression: the teacher's forward without its head, and 3 × the forward of the student's attention alone,
    which again counts gradients of inputs that are not asked for.
    Activation checkpointing, which repeats the student's forward, is not counted, as is usual.
    """
    scores = student.score_flops(sequence_length)
    if objective is Objective.attention_regression:
        if teacher is None:
            raise ValueError("attention is fitted to a teacher's")
        attention = 2 * student.num_attention_matmul_parameters + scores
        return teacher.forward_flops(sequence_length) - 2 * teacher.num_head_parameters + 3 * attention
    num_trained = {
        Trained.all: student.num_matmul_parameters,
        Trained.attention: student.num_attention_matmul_parameters,
        Trained.kv: student.num_key_value_matmul_parameters,
    }[trained]
    flops = 4 * student.num_matmul_parameters + 2 * num_trained + 3 * scores
    return flops + (teacher.forward_flops(sequence_length) if teacher is not None else 0)


_VENDOR_WORDS = frozenset({"NVIDIA", "AMD", "INSTINCT", "GEFORCE", "TESLA", "GPU"})
# dense bf16 TFLOPS of data sheets, and which further words of a device's name leave them true
_PEAKS: tuple[tuple[str, float, str], ...] = (
    ("H100 PCIE", 756, "80GB"),
    ("H100", 989, "SXM SXM5 80GB HBM3"),
    ("H200", 989, "SXM SXM5 141GB HBM3E"),
    ("B200", 2250, "SXM 180GB 192GB HBM3E"),
    ("A100", 312, "SXM SXM4 PCIE 40GB 80GB"),
    ("A10", 125, "PCIE 24GB"),
    ("A40", 149.7, "PCIE 48GB"),
    ("L4", 121, "24GB"),
    ("L40S", 362, "48GB"),
    ("RTX 4090", 165, "24GB"),
    ("MI300X", 1307, "OAM 192GB VF"),
)


def peak_flops(gpu_name: str) -> float | None:
    """Dense bf16 FLOPs per second of a GPU, by its name as torch reports it, or None where it is not known for sure.

    Parts of a GPU (MIG), laptop and NVL variants have other peaks than the name's start suggests; V100 and older have
    no bf16.
    """
    words = {word for word in re.split(r"[\s_-]+", gpu_name.upper()) if word} - _VENDOR_WORDS
    for model, teraflops, variants in _PEAKS:
        required = set(model.split())
        if required <= words <= required | set(variants.split()):
            return teraflops * 1e12
    return None


def require_known_gpu(gpu_name: str) -> None:
    """Raise InputError for a GPU whose peak is not known."""
    if peak_flops(gpu_name) is None:
        known = ", ".join(model for model, _, _ in _PEAKS)
        raise InputError(f"--gpu {gpu_name}: the peak of this GPU is not known", hint=f"known are {known}")


def detect_gpu() -> str | None:
    """The name of this machine's first NVIDIA GPU, which torch reports too; None if there is none."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    try:
        output = subprocess.run(
            [command, "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return output.strip().partition("\n")[0] or None


def gpu_hours(flops: float, peak: float, mfu: float = _MFU) -> float:
    """Hours of one GPU. `mfu` is the part of its peak that training is assumed to reach."""
    return flops / (peak * mfu * 3600)


def weight_bytes(
    student: ModelSize, teacher: ModelSize | None, *, trained: Trained, shares: bool = False, bf16: bool = True
) -> int:
    """The weights of both models as a run loads them: the student in float32, the teacher in the dtype it is stored in.

    `shares`: what is frozen is the teacher's own, if that is of the same size, and counts once; it is as it is stored
    under `bf16`, else float32, as the whole teacher then is.
    """
    frozen = _frozen_bytes(student, trained, as_stored=shares and bf16)
    if teacher is None:
        return 4 * student.num_trained(trained) + frozen
    if shares and _has_size_of(student, teacher):
        frozen = 0
    whole_teacher = 4 * teacher.num_parameters if shares and not bf16 else teacher.num_bytes
    return 4 * student.num_trained(trained) + frozen + whole_teacher


def _frozen_bytes(student: ModelSize, trained: Trained, *, as_stored: bool) -> int:
    num_frozen = student.num_parameters - student.num_trained(trained)
    return student.num_bytes * num_frozen // student.num_parameters if as_stored else 4 * num_frozen


def _has_size_of(student: ModelSize, teacher: ModelSize) -> bool:
    """Whether weights outside attention can be equal; their number may differ, as classes differ in biases."""
    return all(
        getattr(student, name) == getattr(teacher, name) for name in ("hidden_size", "num_hidden_layers", "vocab_size")
    )


def memory_bytes(
    student: ModelSize,
    teacher: ModelSize | None,
    *,
    trained: Trained,
    objective: Objective = Objective.prediction,
    shares: bool = False,
    micro_batch: int,
    sequence_length: int,
    num_processes: int = 1,
    sharding: Sharding = "none",
    bf16: bool = True,
    activation_checkpointing: bool = False,
) -> int:
    """An estimate of the memory that one process needs on its GPU at most.

    - States: the weights of `weight_bytes`; of trained parameters gradient and two AdamW moments in float32, 12 bytes.
      "fsdp" divides all by the processes, "zero3" all but the teacher, "zero2" gradients and moments.
    - Logits: the student's with their gradient and the teacher's, in the autocast dtype, and in float32 those of one
      chunk of 1024 tokens. Attention regression has none.
    - Activations: what is kept for the backward, see `_activation_bytes`; less of it by attention regression.
    - Autocast's copies of the student's float32 weights, trained or not: gradients pass through both.

    Fragmentation, communication buffers and the CUDA context (about 1 GB) come on top.
    """
    num_trained = student.num_trained(trained)
    weights = weight_bytes(student, teacher, trained=trained, shares=shares, bf16=bf16)
    optimizer = 12 * num_trained
    if sharding in ("fsdp", "zero3"):
        own = weights if sharding == "fsdp" else weight_bytes(student, None, trained=trained, shares=shares, bf16=bf16)
        weights += -(-own // num_processes) - own
    if sharding != "none":
        optimizer = -(-optimizer // num_processes)
    value_bytes = 2 if bf16 else 4
    tokens = micro_batch * sequence_length
    logits = (2 + (teacher is not None)) * tokens * student.vocab_size * value_bytes
    logits += min(tokens, _CHUNK_TOKENS) * student.vocab_size * 4
    in_float32 = not shares or student.num_bytes == 4 * student.num_parameters
    num_float32 = student.num_parameters if in_float32 else num_trained
    if objective is Objective.attention_regression:  # which runs attention alone
        logits, num_float32 = 0, min(num_float32, student.num_attention_parameters)
    activations = tokens * _activation_bytes(student, value_bytes, checkpointing=activation_checkpointing)
    # the copies stay until the backward, unless layers are run again then
    copies = 2 * num_float32 if bf16 and not activation_checkpointing else 0
    return weights + optimizer + logits + activations + copies


def _activation_bytes(size: ModelSize, value_bytes: int, *, checkpointing: bool) -> int:
    """Per token. Every matrix keeps its input and what follows keeps its output; each layer's two norms keep their
    float32 input and its normalised copy, 16 bytes per channel. With checkpointing, that of one layer, and each
    layer's float32 input. Scores are not kept: sdpa recomputes them.

    Of what autograd saves this is 0.8 to 1.4 in most dense decoders, and in bf16 about half with a latent or experts
    and in Falcon, whose classes copy more, and a third in GPTBigCode.
    """
    layers = size.num_hidden_layers
    whole = value_bytes * size.linear_features + 16 * size.hidden_size * layers
    return whole // layers + 4 * size.hidden_size * layers if checkpointing else whole


@dataclass(frozen=True)
class SourceSize:
    """A source of text in numbers: its part of the samples, and about how many tokens it holds, None if not known."""

    share: float
    num_tokens: int | None


def passes_over(tokens: int, sources: Sequence[SourceSize]) -> float | None:
    """How often the source that is read most often is read in a run of so many tokens; None if a size is not known."""
    passes = [tokens * source.share / source.num_tokens for source in sources if source.num_tokens]
    return max(passes) if passes and len(passes) == len(sources) else None


def packed_tokens(tokens: int, sources: Sequence[SourceSize], *, window_tokens: int | None = None) -> int:
    """Tokens of text that a run of `tokens` has on its disk at most: of each source its share, or all that it holds.

    Of a streamed text, `window_tokens` are kept to fall back to: of each source its share, and what three shards hold.
    """
    needed = [math.ceil(tokens * source.share) for source in sources]
    if window_tokens is None:
        return sum(
            min(count, count if source.num_tokens is None else source.num_tokens)
            for count, source in zip(needed, sources, strict=True)
        )
    from .packing import SHARD_TOKENS

    windows = [math.ceil(window_tokens * source.share) + 3 * SHARD_TOKENS for source in sources]
    return sum(map(min, needed, windows))


def disk_bytes(
    student: ModelSize,
    *,
    trained: Trained,
    num_packed_tokens: int,
    shares: bool = False,
    bf16: bool = True,
    after_stage: bool = False,
    teacher_copy_bytes: int = 0,
) -> int:
    """Disk that a run takes at most, beside its model, teacher and text.

    Packed text in 2 bytes per token (4 if the vocabulary has more than 65 536); the teacher where it is copied into
    another class; weights, as they are held, of the stage before the last; three checkpoints, with weights and the two
    moments of what is trained.
    """
    blocks = num_packed_tokens * (2 if student.vocab_size <= 2**16 else 4)
    weights = weight_bytes(student, None, trained=trained, shares=shares, bf16=bf16)
    checkpoint = weights + 8 * student.num_trained(trained)
    of_stages = weights if after_stage else 0
    return blocks + teacher_copy_bytes + of_stages + _CHECKPOINTS * checkpoint


@dataclass(frozen=True)
class RunCost:
    """What a dry run prints. `flops` are those of all GPUs; hours are at 40 % of a GPU's dense bf16 peak.

    `passes` over the text is None where its size is not known, `gpu_hours` where the GPU's peak is not known.
    `memory_bytes` is an estimate per process.
    """

    tokens: int
    steps: int
    passes: float | None
    flops: float
    gpu_name: str | None
    gpu_hours: float | None
    h100_hours: float
    memory_bytes: int
    disk_bytes: int

    @property
    def warning(self) -> str | None:
        """What a user should know before starting, or None."""
        return None if self.passes is None else warn_of_passes(self.passes)


def warn_of_passes(passes: float) -> str | None:
    """What to say of a run that reads its text so often, or None."""
    if passes <= MAX_PASSES:
        return None
    return f"the run reads the text {passes:.1f} times; beyond {MAX_PASSES} it learns it by heart: use more text"


def run_cost(
    budget: Budget,
    batch: Batch,
    stages: Sequence[Stage],
    student: ModelSize,
    teacher: ModelSize | None = None,
    *,
    weights: LossWeights,
    sources: Sequence[SourceSize],
    window_tokens: int | None = None,
    teacher_copy_bytes: int = 0,
    shares: bool = False,
    gpu_name: str | None = None,
    sharding: Sharding = "none",
    bf16: bool = True,
    activation_checkpointing: bool = False,
) -> RunCost:
    """The cost of a run in these stages, towards the teacher where a stage uses one.

    `sources` and `window_tokens` are as in `packed_tokens`, `shares` as in `weight_bytes`. Memory is that of the stage
    that needs the most.
    """
    length = batch.sequence_length
    teachers = [teacher if stage.uses_teacher(weights) else None for stage in stages]
    flops = sum(
        stage.steps * batch.tokens_per_step * flops_per_token(student, used, stage.objective, stage.trained, length)
        for stage, used in zip(stages, teachers, strict=True)
    )
    peak = None if gpu_name is None else peak_flops(gpu_name)
    return RunCost(
        tokens=budget.tokens,
        steps=budget.steps,
        passes=passes_over(budget.tokens, sources),
        flops=flops,
        gpu_name=gpu_name,
        gpu_hours=None if peak is None else gpu_hours(flops, peak),
        h100_hours=gpu_hours(flops, H100_PEAK_FLOPS),
        memory_bytes=max(
            memory_bytes(
                student,
                used,
                trained=stage.trained,
                objective=stage.objective,
                shares=shares,
                micro_batch=batch.micro_batch,
                sequence_length=length,
                num_processes=batch.num_processes,
                sharding=sharding,
                bf16=bf16,
                activation_checkpointing=activation_checkpointing,
            )
            for stage, used in zip(stages, teachers, strict=True)
        ),
        disk_bytes=disk_bytes(
            student,
            trained=stages[-1].trained,
            num_packed_tokens=packed_tokens(budget.tokens, sources, window_tokens=window_tokens),
            shares=shares,
            bf16=bf16,
            after_stage=stages[-1].first_step > 0,
            teacher_copy_bytes=teacher_copy_bytes,
        ),
    )


def require_consent(cost: RunCost, explicit: bool, yes: bool) -> None:
    """Raise InputError for a run of more than 1000 H100 hours, or 100 if nobody chose its length, unless `yes`."""
    limit = _MAX_HOURS if explicit else _MAX_DEFAULT_HOURS
    if yes or cost.h100_hours <= limit:
        return
    chosen = "" if explicit else " by default"
    raise InputError(
        f"this run{chosen} is {cost.tokens / 1e9:.4g}B tokens, {cost.flops:.2e} FLOPs, about {cost.h100_hours:,.0f} "
        f"hours of an H100",
        hint="pass --yes if you mean it; published conversions recover with 0.3 to 10B tokens, so try --tokens 1B",
    )
