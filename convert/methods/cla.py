"""Cross-layer attention: neighbouring layers share keys and values (Brandon et al. 2024, arXiv 2405.12981)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from typing_extensions import Doc

from ..algebra.heads import HeadGrouping
from ..algebra.layer_grouping import LayerGrouping
from ..architectures.projections import projection_names
from ..architectures.source import Source
from ..checkpoint.tensors import Checkpoint
from ..checkpoint.writer import TensorSpec
from ..errors import InputError, UnsupportedError
from ..plan import AverageLayers, ConversionPlan, KeepSilent, MoveGain, PoolHeads, Step
from ..translations.routes import as_cross_layer
from .choices import FitSteps, Grouping, require_choice, require_fit, require_ridge
from .method import Method
from .prepared import CPU, Hardware, Measurements, Preparation, Prepared

if TYPE_CHECKING:
    from .merging import HeadMerge

__all__ = ["Cla"]

_METHODS = ("mean", "first", "svd")
_PAIRS = ("uniform", "auto")


@dataclass(frozen=True)
class Cla(Method):
    """Let neighbouring layers share the keys and values that the first of them computes, perhaps with fewer heads.

    Which layers share is said by one of `layers`, `share` and, where `pairs` is "auto", `num_key_value_layers`. Raises
    UnsupportedError for unknown choices, InputError for contradictory ones.
    """

    layers: LayerGrouping | None = None
    num_key_value_heads: Annotated[int | None, Doc("K/V heads of the result. Default: as many as the source.")] = None
    merge: Annotated[
        Literal["mean", "first", "svd"],
        Doc(
            "What the keys and values of layers that share become: the layers' mean, the first layer's, or the merge "
            "that changes the model's outputs least on a text (svd)."
        ),
    ] = "mean"
    share: Annotated[int | None, Doc("Layers that share: 2 for CLA2, 3 for CLA3 …")] = None
    keep_first: Annotated[int, Doc("So many first layers keep keys and values of their own.")] = 0
    keep_last: Annotated[int, Doc("So many last layers keep keys and values of their own.")] = 0
    pairs: Annotated[
        Literal["uniform", "auto"],
        Doc(
            "Which layers share: equally many in each group (uniform), or the groups whose sharing changes the model "
            "least on a text, for the same cache (auto)."
        ),
    ] = "uniform"
    num_key_value_layers: Annotated[int | None, Doc("auto: so many layers keep keys and values.")] = None
    grouping: Annotated[
        Grouping, Doc("svd: which heads form a group, those that lose least together (similarity) or in order.")
    ] = "similarity"
    refit: Annotated[bool, Doc("svd: fit each layer's attention to the original's on the text.")] = True
    refit_ridge: Annotated[
        float, Doc("svd: how strongly that fit is pulled to the closed form, in parts of the mean squared head output.")
    ] = 0.2
    fit_steps: FitSteps = None

    def __post_init__(self) -> None:
        require_choice("method", self.merge, _METHODS)
        require_choice("grouping", self.grouping, get_args(Grouping))
        require_choice("choice of pairs", self.pairs, _PAIRS)
        require_ridge(self.refit_ridge)
        require_fit(self.fit_steps, refit=self.refit)
        if sum(given is not None for given in (self.layers, self.share, self.num_key_value_layers)) != 1:
            raise InputError(
                "say which layers share, by one of layers, share and, where pairs is auto, num_key_value_layers",
                hint="share=2 lets every two neighbours share",
            )
        if self.num_key_value_layers is not None and self.pairs != "auto":
            raise InputError("num_key_value_layers is used where pairs is auto only")
        if self.layers is not None and (self.keep_first or self.keep_last or self.pairs == "auto"):
            raise InputError("layers says which layers share: keep_first, keep_last and pairs have no part in it")

    @property
    def needs_measurements(self) -> bool:
        """Whether the result depends on what is measured on a text."""
        return self.merge == "svd" or self.needs_choice

    @property
    def text_need(self) -> str | None:
        """Why statistics of a text, or the weights alone, do not do: a layer's input is predicted on the text."""
        return "layers that share keys and values are merged on a text" if self.needs_measurements else None

    @property
    def needs_choice(self) -> bool:
        """Whether the layers that share are still to be chosen on a text."""
        return self.layers is None and self.pairs == "auto"

    def source(self, checkpoint: Checkpoint) -> Source:
        """The checkpoint in the class that can share layers. Raises UnsupportedError where it cannot be held by it."""
        return as_cross_layer(checkpoint)

    def suffix(self, source: Source) -> str:
        """What the name of a result ends with."""
        number = self.num_key_value_heads
        heads = {1: "mqa-", None: "", source.shape.num_key_value_heads: ""}.get(number, f"gqa{number}-")
        return f"{heads}cla{self.share or ''}"

    def check(self, source: Source) -> None:
        """Raise UnsupportedError, InputError or CheckpointError for what cannot be done, before text is read."""
        source.require_convertible()
        self._grouping(source)
        if self.needs_choice:
            self._candidates(source)
        else:
            _check_shareable(source, self._layers(source))
        if self.merge == "svd":
            from .merging import check_mergeable

            check_mergeable(source)

    def resolve(
        self,
        source: Source,
        measurements: Measurements = None,
        hardware: Hardware = CPU,
        progress: Callable[[int], object] = lambda num_layers: None,
    ) -> Cla:
        """The same with the layers that share, chosen on the text where that was asked for, and the number of heads."""
        if self.needs_choice:
            from ..calibration.text import CalibrationText
            from .layer_choice import best_layers, measure_damages

            if not isinstance(measurements, CalibrationText):
                raise ValueError("layers that share are chosen on text")
            budget, pairs = self._candidates(source)
            damages = measure_damages(source, measurements, pairs, hardware=hardware, progress=progress)
            return self._with_layers(best_layers(source.shape.num_hidden_layers, budget, damages)).resolve(source)
        settled = self._with_layers(self._layers(source))
        return replace(settled, num_key_value_heads=self.num_key_value_heads or source.shape.num_key_value_heads)

    @property
    def choice(self) -> list[int] | None:
        """For each layer the one whose keys and values it reads, once that is known."""
        return None if self.layers is None else list(self.layers.sources)

    def with_choice(self, choice: Any) -> Cla:
        """The same with layers that share as an earlier run has chosen them."""
        return self._with_layers(LayerGrouping(tuple(choice)))

    def _with_layers(self, layers: LayerGrouping) -> Cla:
        return replace(
            self, layers=layers, share=None, keep_first=0, keep_last=0, num_key_value_layers=None, pairs="uniform"
        )

    def prepare(self, source: Source, preparation: Preparation) -> Prepared:
        """Merge layers and heads, where the method does that, into files in the preparation's `scratch`."""
        if self.merge != "svd":
            return Prepared()
        from .merging import merge_heads

        return merge_heads(source, self._head_merge(source), preparation, self.result_config(source))

    def record(self, measurements: Measurements, hardware: Hardware) -> dict[str, Any]:
        """How the merge was made, for the manifest: nothing, where a text only chose the layers."""
        if self.merge != "svd" or self.layers is None or self.num_key_value_heads is None:
            return {}
        from .merging import merge_record

        return merge_record(self._head_merge_of(self.layers, self.num_key_value_heads), hardware)

    def plan(self, source: Source) -> ConversionPlan:
        """The plan for a source as CrossLayerDecoder. Raises UnsupportedError as `check` does.

        Raises ValueError where the layers are still to be chosen (`resolve`).
        """
        if self.needs_choice:
            raise ValueError("the layers that share are chosen on text first")
        self.check(source)
        checkpoint, shape, layers = source.checkpoint, source.shape, self._layers(source)
        grouping = self._grouping(source)
        number = len(grouping.groups)
        steps = {name: Step.copy(info) for name, info in checkpoint.tensors.items()}
        for group in layers.groups:
            self._share(steps, source, grouping, group)
        heads = {1: "mqa+", shape.num_key_value_heads: ""}.get(number, "gqa+")
        return ConversionPlan(
            target=f"{heads}cla",
            method=self.merge,
            model_type=source.architecture.model_type,
            route=checkpoint.route,
            source=shape,
            result=replace(shape, num_key_value_heads=number, layer_grouping=layers),
            config=self.result_config(source),
            steps=tuple(steps.values()),
            bytes_in=sum(info.num_bytes for info in checkpoint.tensors.values()),
        )

    def result_config(self, source: Source) -> dict[str, Any]:
        """config.json of the result."""
        return {
            **source.checkpoint.config,
            "num_key_value_heads": self.num_key_value_heads or source.shape.num_key_value_heads,
            "kv_source_layers": list(self._layers(source).sources),
        }

    def _grouping(self, source: Source) -> HeadGrouping:
        """How heads are pooled within a layer."""
        heads = source.shape.num_key_value_heads
        return HeadGrouping.contiguous(heads, self.num_key_value_heads or heads)

    def _layers(self, source: Source) -> LayerGrouping:
        return self.layers if self.layers is not None else self._uniform(source)

    def _uniform(self, source: Source) -> LayerGrouping:
        return LayerGrouping.uniform(
            source.shape.num_hidden_layers, self.share or 2, keep_first=self.keep_first, keep_last=self.keep_last
        )

    def _candidates(self, source: Source) -> tuple[int, list[tuple[int, int]]]:
        """How many layers keep keys and values, and the pairs to try: groups of at most one layer more than the mean.

        Raises InputError or UnsupportedError for a number of layers with keys and values that no groups have.
        """
        from .layer_choice import best_layers, permitted_pairs

        shape, ends = source.shape, self.keep_first + self.keep_last
        budget = self.num_key_value_layers or len(self._uniform(source).groups)
        between = shape.num_hidden_layers - ends
        if not ends < budget < shape.num_hidden_layers:
            raise InputError(
                f"{shape.num_hidden_layers} layers cannot share so that {budget} keep keys and values",
                hint=f"possible here: {ends + 1} to {shape.num_hidden_layers - 1}" if between > 1 else None,
            )
        reach = -(-between // (budget - ends))
        pairs = permitted_pairs(shape, reach, keep_first=self.keep_first, keep_last=self.keep_last)
        best_layers(shape.num_hidden_layers, budget, dict.fromkeys(pairs, 0.0))  # whether there are such groups
        return budget, pairs

    def _head_merge(self, source: Source) -> HeadMerge:
        return self._head_merge_of(self._layers(source), self.num_key_value_heads or source.shape.num_key_value_heads)

    def _head_merge_of(self, layers: LayerGrouping, number: int) -> HeadMerge:
        from ..calibration.fitting import Fit
        from .merging import HeadMerge

        return HeadMerge(number, layers, self.grouping, self.refit, self.refit_ridge, Fit(self.fit_steps))

    def _share(self, steps: dict[str, Step], source: Source, grouping: HeadGrouping, group: tuple[int, ...]) -> None:
        """Replace the copies of the keys and values of the group's layers, and of norms of queries and keys."""
        checkpoint, architecture = source.checkpoint, source.architecture
        if len(group) > 1:
            self._move_gains(steps, source, group)
        tensors = [architecture.key_value_tensors(checkpoint, source.shape, layer) for layer in group]
        for same in zip(*tensors, strict=True):
            names = [tensor.name for tensor in same]
            steps[names[0]] = self._step(source, grouping, group, names)
            for name in names[1:]:
                del steps[name]
        if self.merge == "svd":
            for layer in group:
                for name in projection_names(source, layer).values():
                    if name in steps:
                        steps[name] = replace(steps[name], op=None, overlay=True)
        elif len(group) > 1:
            for layer in group:
                self._keep_silent(steps, source, layer)

    def _keep_silent(self, steps: dict[str, Step], source: Source, layer: int) -> None:
        """Let heads of the layer whose own values are zero add nothing, whatever values they come to read."""
        architecture = source.architecture
        output = architecture.tensor_name(layer, "o_proj")
        values = [architecture.tensor_name(layer, "v_proj", kind) for kind in ("weight", "bias")]
        reads = [
            output,
            architecture.input_norm_name(layer),
            *(name for name in values if name in source.checkpoint.tensors),
        ]
        steps[output] = Step(tuple(reads), steps[output].writes, KeepSilent(source.shape.num_key_value_heads))

    def _move_gains(self, steps: dict[str, Step], source: Source, group: tuple[int, ...]) -> None:
        """Where keys are normalised, with the mean or the first one's gain: the rest goes to each layer's queries."""
        architecture = source.architecture
        if architecture.key_norm is None or architecture.query_norm is None:
            return
        keys, queries = (
            [architecture.tensor_name(layer, norm) for layer in group] for norm in ("key_norm", "query_norm")
        )
        if keys[0] not in steps:
            return
        shared = keys if self.merge == "mean" else keys[:1]
        for key, query in zip(keys, queries, strict=True):
            steps[query] = Step((query, key, *shared), steps[query].writes, MoveGain())
        if self.merge == "mean":
            steps[keys[0]] = Step(tuple(keys), steps[keys[0]].writes, AverageLayers(len(group)))
        for key in keys[1:]:
            del steps[key]

    def _step(self, source: Source, grouping: HeadGrouping, group: Sequence[int], names: Sequence[str]) -> Step:
        """How the group's one projection is made of the layers' projections `names`."""
        info = source.checkpoint.tensors[names[0]]
        number = len(grouping.groups)
        spec = TensorSpec(info.name, info.dtype, (info.shape[0] // grouping.num_heads * number, *info.shape[1:]))
        if self.merge == "svd":
            return Step((info.name,), spec, overlay=True)
        pool = None if number == grouping.num_heads else PoolHeads(self.merge, grouping)
        if self.merge == "first" or len(group) == 1:
            return Step((info.name,), spec, pool)
        gains = [source.architecture.input_norm_name(layer) for layer in group] if len(info.shape) == 2 else []
        return Step((*names, *gains), spec, AverageLayers(len(group), pool))


def _check_shareable(source: Source, layers: LayerGrouping) -> None:
    """Raise UnsupportedError unless the layers are the checkpoint's, and those that share are neighbours that see as
    much."""
    shape, name = source.shape, source.name
    if len(layers.sources) != shape.num_hidden_layers:
        raise UnsupportedError(
            f"{name} has {shape.num_hidden_layers} layers, and {len(layers.sources)} were given a source"
        )
    if layers.sources == tuple(range(shape.num_hidden_layers)):
        raise UnsupportedError(f"{name}: no layer would share keys and values")
    for layer, first in enumerate(layers.sources):
        if layers.sources[first:layer].count(first) != layer - first:
            raise UnsupportedError(f"{name}: layers {first} and {layer} share, and one between them does not")
        if shape.windows[layer] != shape.windows[first]:
            seen = [f"{window} tokens" if window else "all" for window in (shape.windows[first], shape.windows[layer])]
            raise UnsupportedError(
                f"{name}: layers {first} and {layer} cannot share keys and values, one sees {seen[0]}, the other "
                f"{seen[1]}",
                hint="say for each layer whose keys and values it reads",
                settings=("kv_source_layers",),
            )
