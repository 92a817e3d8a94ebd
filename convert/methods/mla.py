"""Multi-head latent attention: keys and values of all heads in one latent (DeepSeek-V2, arXiv 2405.04434)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal

from typing_extensions import Doc

from ..algebra.attention_shape import AttentionShape, LatentSizes
from ..algebra.merge import RopePair
from ..architectures.source import Source
from ..checkpoint.tensors import Checkpoint
from ..errors import UnsupportedError
from ..plan import ConversionPlan, Step
from ..translations.routes import as_latent_source
from .choices import FitSteps, require_choice, require_fit, require_ridge, text_of_fit
from .deepseek import LatentLayout, attention_shapes, class_refusal, result_config
from .method import Method
from .prepared import CPU, Hardware, Measurements, Preparation, Prepared

__all__ = ["Mla"]


@dataclass(frozen=True)
class Mla(Method):
    """Cache `kv_lora_rank` numbers of keys and values together, and a rotary key of `qk_rope_head_dim` for all heads.

    `rope_pairs` are the pairs of the rotary key, which `resolve` chooses. Raises UnsupportedError for unknown choices.
    """

    kv_lora_rank: Annotated[int, Doc("Size of the latent.")]
    qk_rope_head_dim: Annotated[int, Doc("Size of the rotary key.")]
    latent_norm: Annotated[
        Literal["calibrated", "exact"],
        Doc(
            "How the norm of DeepSeek's latent is met: fitted to (calibrated), which needs nothing of an engine, or "
            "made harmless by biases (exact), which transformers and vLLM's Transformers backend serve."
        ),
    ] = "calibrated"
    rope_selection: Annotated[
        Literal["high", "gain"],
        Doc(
            "Frequencies of the rotary key: the highest (high), as a RoPE that every engine has, or those that gain "
            "most (gain), perhaps one of them twice, which transformers and vLLM's Transformers backend serve."
        ),
    ] = "high"
    rope_interleave: Annotated[
        bool,
        Doc(
            "Order of rotary pairs: (2i, 2i + 1), which engines other than transformers take for granted, or "
            "(i, i + half)."
        ),
    ] = True
    v_head_dim: Annotated[int | None, Doc("Pad values with zeros to a size that kernels take.")] = None
    refit: Annotated[bool, Doc("Fit each layer's attention to the original's on the text.")] = True
    refit_ridge: Annotated[
        float, Doc("How strongly that fit is pulled to the closed form, in parts of the mean squared head output.")
    ] = 0.2
    fit_steps: FitSteps = None
    rope_pairs: tuple[RopePair, ...] | None = None

    def __post_init__(self) -> None:
        require_choice("latent norm", self.latent_norm, ("calibrated", "exact"))
        require_choice("RoPE selection", self.rope_selection, ("high", "gain"))
        require_ridge(self.refit_ridge)
        require_fit(self.fit_steps, refit=self.refit)

    @property
    def constant(self) -> bool:
        """Whether a channel of the latent is constant."""
        return self.latent_norm == "exact"

    @property
    def num_rope_pairs(self) -> int:
        """Pairs of the rotary key."""
        return self.qk_rope_head_dim // 2

    @property
    def needs_measurements(self) -> bool:
        """Whether the result depends on what is measured on a text: always."""
        return True

    @property
    def text_need(self) -> str | None:
        """Why the weights alone do not do, if they do not."""
        return text_of_fit(self.fit_steps)

    @property
    def needs_choice(self) -> bool:
        """Whether the frequencies of the rotary key are still to be chosen by what the model reads."""
        return self.rope_pairs is None and self.rope_selection == "gain"

    def source(self, checkpoint: Checkpoint) -> Source:
        """The checkpoint in a class whose function a latent can hold. Raises UnsupportedError where it is another."""
        return as_latent_source(checkpoint)

    def suffix(self, source: Source) -> str:
        """What the name of a result ends with."""
        return f"mla{self.kv_lora_rank}-{self.qk_rope_head_dim}"

    def check(self, source: Source) -> None:
        """Raise UnsupportedError, with what would work, where the source cannot become this."""
        reason = class_refusal(source) or self._bias_refusal(source)
        if reason:
            raise UnsupportedError(f"{source.name}: {reason}")
        self._check_sizes(source)

    def resolve(
        self,
        source: Source,
        measurements: Measurements = None,
        hardware: Hardware = CPU,
        progress: Callable[[int], object] = lambda num_layers: None,
    ) -> Mla:
        """The same with the pairs of the rotary key, chosen on the text, or the weights, where that was asked for."""
        if not self.needs_choice:
            highest = tuple((frequency, 0) for frequency in range(self.num_rope_pairs))
            return replace(self, rope_pairs=self.rope_pairs or highest)
        from .compression import choose_rope_pairs

        return replace(
            self, rope_pairs=choose_rope_pairs(source, self.num_rope_pairs, measurements, hardware, progress)
        )

    @property
    def choice(self) -> list[RopePair] | None:
        """The pairs of the rotary key, once they are known."""
        return None if self.rope_pairs is None else list(self.rope_pairs)

    def with_choice(self, choice: Any) -> Mla:
        """The same with pairs of the rotary key as an earlier run has chosen them."""
        return replace(self, rope_pairs=tuple((frequency, head) for frequency, head in choice))

    def prepare(self, source: Source, preparation: Preparation) -> Prepared:
        """Compress keys and values, layer by layer, into files in the preparation's `scratch`."""
        from ..calibration.fitting import Fit
        from .compression import Compression, compress_layers

        if self.rope_pairs is None:
            raise ValueError("the pairs of the rotary key are chosen first")
        fit = Fit(self.fit_steps)
        compression = Compression(self.layout(source), self.rope_pairs, self.refit, self.refit_ridge, fit)
        return compress_layers(source, compression, preparation)

    def record(self, measurements: Measurements, hardware: Hardware) -> dict[str, Any]:
        """How the latent was made, for the manifest."""
        from ..calibration.fitting import Fit

        settings = asdict(self)
        del settings["rope_pairs"], settings["fit_steps"]
        is_refit = self.refit and measurements is not None
        refit = {
            "refit": is_refit,
            "refit_ridge": settings.pop("refit_ridge"),
            **(Fit(self.fit_steps).record if is_refit else {"fit_steps": 0}),
            "precision": hardware.precision,
            "device": hardware.device,
        }
        del settings["refit"]
        return refit | settings

    def plan(self, source: Source) -> ConversionPlan:
        """The plan for this source. Raises UnsupportedError as `check` does, ValueError before `resolve`."""
        if self.rope_pairs is None:
            raise ValueError("the pairs of the rotary key are chosen first")
        self.check(source)
        checkpoint, shape = source.checkpoint, source.shape
        latent = self.latent_sizes(shape)
        return ConversionPlan(
            target="mla",
            method="svd",
            model_type="deepseek_v3",
            route=checkpoint.route,
            source=shape,
            result=AttentionShape(
                hidden_size=shape.hidden_size,
                num_attention_heads=shape.num_attention_heads,
                num_key_value_heads=shape.num_attention_heads,
                head_dim=latent.v_head_dim,
                windows=(None,) * shape.num_hidden_layers,
                latent=latent,
            ),
            config=result_config(source, self.layout(source), self.rope_pairs),
            steps=self._steps(source),
            bytes_in=sum(info.num_bytes for info in checkpoint.tensors.values()),
        )

    def latent_sizes(self, shape: AttentionShape) -> LatentSizes:
        """The sizes of the result. Each head's part without position is as large as its key was."""
        return LatentSizes(self.kv_lora_rank, self.qk_rope_head_dim, shape.head_dim, self.v_head_dim or shape.head_dim)

    def layout(self, source: Source) -> LatentLayout:
        """How the result lies in its class. Queries have no bias there but through a latent of their own."""
        has_query_bias = source.architecture.tensor_name(0, "q_proj", "bias") in source.checkpoint.tensors
        return LatentLayout(
            self.latent_sizes(source.shape),
            constant=self.constant,
            query_bias=self.constant and has_query_bias,
            rope_interleave=self.rope_interleave,
        )

    def _steps(self, source: Source) -> tuple[Step, ...]:
        """The tensors of the attention in place of the source's, all others as they are."""
        checkpoint, architecture = source.checkpoint, source.architecture
        layers = range(source.shape.num_hidden_layers)
        attentions = {architecture.attention.format(layer=layer): layer for layer in layers}
        shapes = attention_shapes(source, self.layout(source))
        steps: dict[str, Step] = {}
        for name, info in checkpoint.tensors.items():
            prefix = name.rpartition(".")[0].rpartition(".")[0]
            if prefix not in attentions:
                steps[name] = Step.copy(info)
            elif f"{prefix}.o_proj.weight" not in steps:
                dtype = checkpoint.tensors[architecture.tensor_name(attentions[prefix], "o_proj")].dtype
                steps |= {f"{prefix}.{local}": Step.made(f"{prefix}.{local}", dtype, shapes[local]) for local in shapes}
        return tuple(steps.values())

    def _bias_refusal(self, source: Source) -> str | None:
        if self.constant or source.architecture.tensor_name(0, "o_proj", "bias") not in source.checkpoint.tensors:
            return None
        return "o_proj has a bias, which deepseek_v3 holds only where latent_norm is exact"

    def _check_sizes(self, source: Source) -> None:
        name, shape, rotary_dims = source.name, source.shape, source.rotary_dims
        rank, rope_dim = self.kv_lora_rank, self.qk_rope_head_dim
        if self.v_head_dim is not None and self.v_head_dim < shape.head_dim:
            raise UnsupportedError(
                f"{name}: v_head_dim = {self.v_head_dim}, and its values have {shape.head_dim} dims",
                hint=f"use {shape.head_dim} or more",
            )
        if rope_dim < 2 or rope_dim % 2:
            raise UnsupportedError(
                f"qk_rope_head_dim = {rope_dim}: rotary positions turn pairs of dims",
                hint=f"use an even number, for example {max(2, rope_dim - rope_dim % 2)}",
            )
        per_frequency = 1 if self.rope_selection == "high" else shape.num_key_value_heads
        if rope_dim > rotary_dims * per_frequency:
            most = rotary_dims * shape.num_key_value_heads
            more = f", or {most} with a selection of gain" if per_frequency < shape.num_key_value_heads else ""
            raise UnsupportedError(
                f"{name}: qk_rope_head_dim = {rope_dim}, and its heads have {rotary_dims} rotary dims",
                hint=f"use up to {rotary_dims * per_frequency}{more}",
                settings=("qk_rope_head_dim", "rope_selection"),
            )
        most = min(shape.hidden_size, 2 * shape.num_key_value_heads * shape.head_dim) + self.constant
        least = 1 + self.constant
        if not least <= rank <= most:
            raise UnsupportedError(
                f"{name}: kv_lora_rank = {rank}; its keys and values have {most - self.constant} "
                f"independent directions{', and one more is constant' if self.constant else ''}",
                hint=f"use {least} to {most}; below {2 * shape.num_key_value_heads * shape.head_dim - rope_dim} the "
                "cache gets smaller",
            )
