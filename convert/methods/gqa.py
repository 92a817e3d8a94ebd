"""Grouped-query attention: fewer K/V heads (Ainslie et al. 2023, arXiv 2305.13245). One head is MQA."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from typing_extensions import Doc

from ..algebra.heads import POOLING_METHODS, HeadGrouping
from ..architectures.architecture import HeadTensor
from ..architectures.projections import projection_names
from ..architectures.source import Source
from ..checkpoint.tensors import Checkpoint
from ..checkpoint.writer import TensorSpec
from ..errors import UnsupportedError
from ..plan import ConversionPlan, PoolHeads, Step
from ..runtime import RUNTIME_CLASSES
from ..translations.routes import as_target
from .choices import FitSteps, Grouping, require_choice, require_fit, require_ridge, text_of_fit
from .head_size import RopeSelection, check_head_size, resized_config
from .method import Method
from .prepared import Hardware, Measurements, Preparation, Prepared

if TYPE_CHECKING:
    from .merging import HeadMerge

__all__ = ["Gqa"]

_DEFAULT_INITIALIZER_RANGE = 0.02


@dataclass(frozen=True)
class Gqa(Method):
    """Reduce a checkpoint to `num_key_value_heads` K/V heads per layer. Raises UnsupportedError for unknown choices."""

    num_key_value_heads: Annotated[int, Doc("K/V heads of the result.")]
    merge: Annotated[
        Literal["mean", "first", "random", "svd"],
        Doc(
            "What a group's heads become: their mean, the first of them, random ones, or the merge that changes the "
            "model's outputs least on a text (svd)."
        ),
    ] = "mean"
    grouping: Annotated[
        Grouping, Doc("svd: which heads form a group, those that lose least together (similarity) or neighbours.")
    ] = "similarity"
    refit: Annotated[bool, Doc("svd: fit each layer's attention to the original's on the text.")] = True
    refit_ridge: Annotated[
        float, Doc("svd: how strongly that fit is pulled to the closed form, in parts of the mean squared head output.")
    ] = 0.2
    fit_steps: FitSteps = None
    head_dim: Annotated[
        int | None,
        Doc("svd: dims of each K/V head of the result. Few wide heads hold more than as many numbers in more heads."),
    ] = None
    rope_selection: Annotated[
        RopeSelection,
        Doc(
            "Frequencies of heads of another size: those of the source, each as often as there is room (source), or "
            "its kind of RoPE over more or fewer pairs (default), which llama.cpp needs."
        ),
    ] = "source"
    seed: Annotated[int, Doc("Seed of random heads.")] = 0
    allow_same: Annotated[bool, Doc("Accept the number of heads that the source has: none is pooled then.")] = False

    def __post_init__(self) -> None:
        require_choice("method", self.merge, (*POOLING_METHODS, "svd"))
        require_choice("grouping", self.grouping, get_args(Grouping))
        require_ridge(self.refit_ridge)
        require_fit(self.fit_steps, refit=self.refit)
        require_choice("RoPE selection", self.rope_selection, get_args(RopeSelection))
        if self.head_dim is not None and self.merge != "svd":
            raise UnsupportedError(
                f"head_dim = {self.head_dim}, and {self.merge} keeps the size of heads",
                hint="svd merges heads into larger or smaller ones",
                settings=("head_dim", "merge"),
            )

    @property
    def needs_measurements(self) -> bool:
        """Whether the result depends on what is measured on a text."""
        return self.merge == "svd"

    @property
    def text_need(self) -> str | None:
        """Why statistics of a text, or the weights alone, do not do, if they do not."""
        return text_of_fit(self.fit_steps)

    @property
    def takes_statistics(self) -> bool:
        """Whether statistics of a text do as well as the text itself."""
        return True

    def source(self, checkpoint: Checkpoint) -> Source:
        """The checkpoint in the class that can have such heads. Raises UnsupportedError where there is none."""
        return as_target(checkpoint, self.num_key_value_heads, self.head_dim)

    def suffix(self, source: Source) -> str:
        """What the name of a result ends with."""
        size = "" if self._head_dim(source) == source.shape.head_dim else f"x{self.head_dim}"
        return "mqa" if self.num_key_value_heads == 1 and not size else f"gqa{self.num_key_value_heads}{size}"

    def check(self, source: Source) -> None:
        """Raise UnsupportedError or CheckpointError for what cannot be done, before anything is measured."""
        source.require_convertible()
        self._grouping(source)
        checkpoint, architecture = source.checkpoint, source.architecture
        reason = architecture.heads_refusal(checkpoint.full_config, self.num_key_value_heads)
        if reason:
            raise UnsupportedError(f"{source.name}: {reason}")
        if self._keeps_heads(source) and not self.allow_same:
            raise UnsupportedError(
                f"{source.name} already has {source.shape.num_key_value_heads} K/V heads",
                hint="ask for fewer, or allow as many: no head is pooled then",
                settings=("num_key_value_heads", "allow_same"),
            )
        if self._merges(source):
            from .merging import check_mergeable

            check_mergeable(source)
        if self._resizes(source):
            check_head_size(source, self.num_key_value_heads, self._head_dim(source))
        elif self.rope_selection != "source":
            raise UnsupportedError(
                f"{source.name}: heads stay at head_dim = {source.shape.head_dim}, and so do their frequencies",
                hint="leave the selection out, or ask for heads of another size",
                settings=("rope_selection", "head_dim"),
            )

    def prepare(self, source: Source, preparation: Preparation) -> Prepared:
        """Merge heads, where the method does that, into files in the preparation's `scratch`."""
        if not self._merges(source):
            return Prepared()
        from .merging import merge_heads

        merge = self._head_merge(preparation.measurements)
        return merge_heads(source, merge, preparation, self.result_config(source))

    def record(self, measurements: Measurements, hardware: Hardware) -> dict[str, Any]:
        """How the merge was made, for the manifest."""
        from .merging import merge_record

        return merge_record(self._head_merge(measurements), hardware)

    def plan(self, source: Source) -> ConversionPlan:
        """The plan for this source. Raises UnsupportedError or CheckpointError as `check` does."""
        self.check(source)
        checkpoint, architecture, shape = source.checkpoint, source.architecture, source.shape
        steps = {name: Step.copy(checkpoint.tensors[name]) for name in checkpoint.tensors}
        keeps_heads = self._keeps_heads(source)
        if not keeps_heads:
            change = self._resize_layer if self._resizes(source) else self._pool_layer
            for layer in range(shape.num_hidden_layers):
                change(steps, source, layer)
        return ConversionPlan(
            target="mqa" if self.num_key_value_heads == 1 else "gqa",
            method=self.merge,
            model_type=architecture.model_type,
            route=checkpoint.route,
            source=shape,
            result=replace(shape, num_key_value_heads=self.num_key_value_heads, head_dim=self._head_dim(source)),
            config=checkpoint.config if keeps_heads else self.result_config(source),
            steps=tuple(steps.values()),
            bytes_in=sum(info.num_bytes for info in checkpoint.tensors.values()),
        )

    def result_config(self, source: Source) -> dict[str, Any]:
        """config.json of the result."""
        architecture = source.architecture
        size = self.num_key_value_heads, self._head_dim(source)
        if self._resizes(source):
            config = resized_config(source, *size, self.rope_selection)
        else:
            config = architecture.result_config(source.checkpoint, *size)
        if architecture.model_type not in RUNTIME_CLASSES:
            config.pop("auto_map", None)  # the result opens in the stock class; the source's own code knows no grouping
        return config

    def _grouping(self, source: Source) -> HeadGrouping:
        return HeadGrouping.contiguous(source.shape.num_key_value_heads, self.num_key_value_heads)

    def _head_dim(self, source: Source) -> int:
        return source.shape.head_dim if self.head_dim is None else self.head_dim

    def _resizes(self, source: Source) -> bool:
        return self._head_dim(source) != source.shape.head_dim

    def _keeps_heads(self, source: Source) -> bool:
        return self.num_key_value_heads == source.shape.num_key_value_heads and not self._resizes(source)

    def _merges(self, source: Source) -> bool:
        return self.merge == "svd" and not self._keeps_heads(source)

    def _head_merge(self, measurements: Measurements) -> HeadMerge:
        from ..calibration.fitting import Fit
        from ..calibration.text import CalibrationText
        from .merging import HeadMerge

        refit = self.refit and isinstance(measurements, CalibrationText)
        fit = Fit(self.fit_steps)
        return HeadMerge(
            self.num_key_value_heads, None, self.grouping, refit, self.refit_ridge, fit, head_dim=self.head_dim
        )

    def _resize_layer(self, steps: dict[str, Step], source: Source, layer: int) -> None:
        """Replace the copy steps of a layer's projections, whose heads get another size."""
        shape, head_dim = source.shape, self._head_dim(source)
        rows = {"q_proj": shape.num_attention_heads, "k_proj": self.num_key_value_heads}
        rows |= {"v_proj": rows["k_proj"], "qkv_proj": rows["q_proj"] + 2 * rows["k_proj"]}
        for part, name in projection_names(source, layer).items():
            info, projection = source.checkpoint.tensors[name], part.partition(".")[0]
            if projection == "o_proj":
                new_shape: tuple[int, ...] = (info.shape[0], rows["q_proj"] * head_dim)
            else:
                new_shape = (rows[projection] * head_dim, *info.shape[1:])
            steps[name] = Step((name,), TensorSpec(name, info.dtype, new_shape), overlay=True)

    def _pool_layer(self, steps: dict[str, Step], source: Source, layer: int) -> None:
        """Replace the copy steps of a layer's K/V heads, and of the norms that belong to them."""
        checkpoint, architecture, shape = source.checkpoint, source.architecture, source.shape
        grouping = self._grouping(source)
        merged = set(projection_names(source, layer).values()) if self._merges(source) else set()
        for tensor in architecture.key_value_tensors(checkpoint, shape, layer):
            info = checkpoint.tensors[tensor.name]
            num_heads = tensor.num_query_heads + tensor.num_runs * shape.num_key_value_heads
            num_kept = tensor.num_query_heads + tensor.num_runs * self.num_key_value_heads
            spec = TensorSpec(tensor.name, info.dtype, (info.shape[0] // num_heads * num_kept, *info.shape[1:]))
            if tensor.name in merged:
                steps[tensor.name] = Step((tensor.name,), spec, overlay=True)
            else:
                steps[tensor.name] = Step((tensor.name,), spec, self._pooling(source, tensor, grouping))
        for name in merged:  # queries and outputs, which read the merged heads through the free transformations
            if not steps[name].overlay:
                steps[name] = replace(steps[name], overlay=True)
        for names in architecture.key_norms_per_head(checkpoint, shape, layer):
            for name in names:
                del steps[name]
            for group, name in zip(grouping.groups, names, strict=False):
                info = checkpoint.tensors[name]
                whole = HeadGrouping((tuple(range(len(group))),))
                op = self._pooling(source, HeadTensor(name, is_norm=True), whole)
                spec = TensorSpec(name, info.dtype, info.shape)
                steps[name] = Step(tuple(names[head] for head in group), spec, op)

    def _pooling(self, source: Source, tensor: HeadTensor, grouping: HeadGrouping) -> PoolHeads:
        method, std, seed = self.merge, None, None
        if method == "svd" or (method == "random" and tensor.is_norm):
            method = "mean"  # of norms' gains: near zero, they would switch fresh keys off
        if method == "random":
            std = float(source.checkpoint.full_config.get("initializer_range") or _DEFAULT_INITIALIZER_RANGE)
            seed = _tensor_seed(self.seed, tensor.name)
        return PoolHeads(
            method,
            grouping,
            num_query_heads=tensor.num_query_heads,
            num_runs=tensor.num_runs,
            qkv_interleaved=tensor.qkv_interleaved,
            std=std,
            seed=seed,
        )


def _tensor_seed(seed: int, name: str) -> int:
    """A seed per tensor, so that the values do not depend on the order in which tensors are written."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1
