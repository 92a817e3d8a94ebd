"""What a checkpoint is and what it can become, from its headers alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..algebra.attention_shape import AttentionShape, LatentSizes
from ..algebra.kv_cache import kv_cache_bytes, kv_cache_bytes_per_token
from ..architectures.source import Source
from ..checkpoint.loading import check_accepts, check_source, other_head
from ..checkpoint.opening import open_checkpoint
from ..checkpoint.tensors import Checkpoint
from ..errors import InputError, UnsupportedError
from ..methods.cla import Cla
from ..methods.gqa import Gqa
from ..methods.method import Method
from ..methods.mla import Mla
from ..translations.routes import as_cross_layer, targets
from .engines import KERNEL_RANKS, Serving, latent_kernels, serving

__all__ = ["Inspection", "Target", "inspect", "inspect_checkpoint"]

_CACHE_VALUE_BYTES = 2
_UNLIMITED_CONTEXT = 2048  # tokens that the cache is shown for, of a model that takes any number


@dataclass(frozen=True)
class Target:
    """Whether a checkpoint can be converted by a command of kvconvert.

    `reason` says why not, or what becomes of the model. Where it is possible, `groups` lists the numbers of K/V heads
    that the result can have, `share` the least and the largest number of layers that can share, and `latent_below` what
    kv_lora_rank + qk_rope_head_dim has to stay below for a smaller cache; `model_type` is that of the result.
    `kernel_sizes` are the kv_lora_rank, qk_rope_head_dim and, where values are padded for it, v_head_dim of latents
    with fast kernels, smaller than the cache is. `latent_norm` has to be asked for, where only one works.
    """

    command: str
    possible: bool
    reason: str
    groups: tuple[int, ...] = ()
    model_type: str | None = None
    share: tuple[int, int] | None = None
    latent_below: int | None = None
    kernel_sizes: tuple[tuple[int, int, int | None], ...] = ()
    latent_norm: str | None = None


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint is, what its cache costs, and what it can become.

    Cache figures are bytes for keys and values in 16 bits; a layer with a sliding window keeps no more tokens than
    that. With `cross_attention` the cache takes as much again for each token of the encoder. `serving` says which
    engines serve each `model_type` that a conversion leads to. `approximation` says why the mean of heads' weights is
    not the mean of what they compute, or is None. `notes` are what a person should know of the files, and `head`
    is what the model was saved with in place of, or beside, a head that predicts tokens (`other_head`).
    """

    model: str
    model_type: str
    attention: str
    cross_attention: bool
    num_hidden_layers: int
    num_key_value_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_size: int
    num_parameters: int
    dtype: str
    size_on_disk_bytes: int
    cache_bytes_per_token: int
    context_length: int
    cache_bytes_for_context: int
    targets: tuple[Target, ...]
    latent: LatentSizes | None
    approximation: str | None
    serving: dict[str, tuple[Serving, ...]]
    notes: tuple[str, ...] = ()
    head: str | None = None


def inspect(model: str | Path, *, context_length: int | None = None, revision: str | None = None) -> Inspection:
    """Inspect the checkpoint in a directory or of a hub id, of which only config.json and headers are fetched.

    Arguments and errors are those of `open_checkpoint` and `inspect_checkpoint`.
    """
    with open_checkpoint(model, revision=revision, headers_only=True) as checkpoint:
        return inspect_checkpoint(checkpoint, context_length=context_length)


def inspect_checkpoint(checkpoint: Checkpoint, *, context_length: int | None = None) -> Inspection:
    """Inspect a checkpoint by its headers and config, without reading a weight.

    context_length: in tokens, for the cache figure; by default the longest context of the model, 2048 where nothing
    limits it. A checkpoint whose class has no grouped attention is described as the class that it can become. What a
    conversion would check by headers is checked: its class accepts the source, and so does that of each result. Raises
    UnsupportedError for an unknown architecture, CheckpointError where config and tensors disagree.
    """
    views = list(targets(checkpoint))
    usable = [view for view in views if not isinstance(view, UnsupportedError)]
    if not usable:
        raise next(view for view in reversed(views) if isinstance(view, UnsupportedError))
    source, chosen = checkpoint, usable[0]
    checkpoint, architecture, shape = chosen.checkpoint, chosen.architecture, chosen.shape
    if not source.quantised:
        check_source(source)
    cross_layer, shared = _cross_layer_target(source)
    conversions = (*_targets(source, shape), cross_layer, _latent_target(source))
    configs = {view.architecture.model_type: view.checkpoint.full_config for view in (*shared, *reversed(usable))}
    pooled = [target.model_type for target in conversions[:2] if target.model_type]
    others = (*(() if pooled else usable), *shared)
    classes = dict.fromkeys([*pooled, *(view.architecture.model_type for view in others)])
    context = context_length or chosen.longest_context or _UNLIMITED_CONTEXT
    return Inspection(
        model=checkpoint.name,
        model_type=str(source.config["model_type"]),
        attention=shape.kind,
        cross_attention=shape.cross_attention,
        num_hidden_layers=shape.num_hidden_layers,
        num_key_value_layers=shape.num_key_value_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        hidden_size=shape.hidden_size,
        num_parameters=checkpoint.num_parameters,
        dtype=checkpoint.dtype,
        size_on_disk_bytes=source.size_on_disk_bytes,
        cache_bytes_per_token=kv_cache_bytes_per_token(
            num_layers=shape.num_key_value_layers,
            values=shape.cached_values,
            bytes_per_value=_CACHE_VALUE_BYTES,
        ),
        context_length=context,
        cache_bytes_for_context=kv_cache_bytes(
            context,
            windows=shape.key_value_windows,
            values=shape.cached_values,
            bytes_per_value=_CACHE_VALUE_BYTES,
        ),
        targets=conversions,
        latent=shape.latent,
        approximation=architecture.approximation(checkpoint),
        serving={model_type: serving(model_type, configs[model_type]) for model_type in classes},
        notes=source.notes,
        head=other_head(source.config, source.tensors),
    )


def _targets(source: Checkpoint, shape: AttentionShape) -> tuple[Target, Target]:
    heads = shape.num_key_value_heads
    if heads == 1:
        reason = "the model has one K/V head already"
        return Target("mha2gqa", False, reason), Target("mha2mqa", False, "the model is MQA already")
    gqa = Target("mha2gqa", False, f"{heads} K/V heads have no divisor between 1 and {heads}")
    taken: list[int] = []
    for number in (number for number in range(2, heads) if heads % number == 0):
        view, reason = _possible(source, Gqa(number), accepted=gqa.model_type)
        target = view and view.architecture.model_type
        if target and gqa.model_type in (None, target):
            taken.append(number)
            reason = f"{heads} K/V heads become {' or '.join(map(str, taken))}"
            gqa = Target("mha2gqa", True, reason, tuple(taken), target)
        elif not taken:
            gqa = Target("mha2gqa", False, reason)
    view, reason = _possible(source, Gqa(1), accepted=gqa.model_type)
    if view is None:
        return gqa, Target("mha2mqa", False, reason)
    return gqa, Target("mha2mqa", True, f"{heads} K/V heads become 1", (1,), view.architecture.model_type)


def _cross_layer_target(source: Checkpoint) -> tuple[Target, tuple[Source, ...]]:
    """Whether layers can share keys and values, and the checkpoint as the class for it if there is one."""
    try:
        view = as_cross_layer(source)
    except UnsupportedError as error:
        return Target("mha2cla", False, str(error).removeprefix(f"{source.name}: ")), ()
    num_layers = view.shape.num_hidden_layers
    if num_layers == 1:
        return Target("mha2cla", False, "the model has one layer"), (view,)
    most = num_layers
    possible, reason = _possible(source, Cla(share=most))
    if possible is None and len(set(view.shape.windows)) > 1:  # pairs may lie within the layers that see as much
        most = 2
        possible, _ = _possible(source, Cla(share=most))
    if possible is None:
        return Target("mha2cla", False, reason), ()
    share = (2, most)
    number = f"2 to {most}" if most > 2 else "2"
    reason = f"{number} layers share keys and values"
    return Target("mha2cla", True, reason, model_type=view.architecture.model_type, share=share), (view,)


def _latent_target(source: Checkpoint) -> Target:
    """Whether keys and values can become a latent; the sizes that have fast kernels and make the cache smaller."""
    view, reason = _possible(source, Mla(1, 2))
    latent_norm = None
    if view is None:
        view, _ = _possible(source, Mla(2, 2, latent_norm="exact"))
        latent_norm = "exact"
    if view is None:
        return Target("mha2mla", False, reason)
    shape = view.shape
    sizes: list[tuple[int, int, int | None]] = []
    for rank in KERNEL_RANKS:
        for v_head_dim in (None, 128):
            latent = Mla(rank, 64, v_head_dim=v_head_dim).latent_sizes(shape)
            rope_dim = latent.qk_rope_head_dim
            fits = rank <= min(shape.hidden_size, shape.cached_values) and rank + rope_dim < shape.cached_values
            if fits and rope_dim <= view.rotary_dims and latent_kernels(latent) is None:
                sizes.append((rank, rope_dim, v_head_dim))
                break
    return Target(
        "mha2mla",
        True,
        f"{shape.cached_values} cached numbers of a layer and token become a latent and a rotary key",
        model_type="deepseek_v3",
        latent_below=shape.cached_values,
        kernel_sizes=tuple(sizes),
        latent_norm=latent_norm,
    )


def _possible(source: Checkpoint, method: Method, *, accepted: str | None = None) -> tuple[Source | None, str]:
    """The checkpoint in the class that a method starts from, or None and the reason why the method would refuse it.

    The headers of the result are shown to its class, unless that is the one that `accepted` them before.
    """
    try:
        view = method.source(source)
        method.check(view)
        if view.architecture.model_type != accepted:
            plan = method.resolve(view).plan(view)
            plan.check_readable(view.checkpoint)
            check_accepts(plan.config, [step.writes for step in plan.steps], source.name)
    except InputError as error:
        return None, str(error).removeprefix(f"{source.name}: ")
    return view, ""
