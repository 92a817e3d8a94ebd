"""A model in numbers, from its headers and config: what costs are computed from.

N counts parameters that multiply every token: matrices with the output head, without the lookup of embeddings, and of
experts as many as a token is sent to. S is the sequence length.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ...convert.architectures.source import Source
from ...convert.checkpoint.tensors import OLD_BUFFERS, Checkpoint, TensorInfo
from ...convert.errors import UnsupportedError
from ...convert.translations.routes import targets
from ..recipe import Trained, trained_names

__all__ = ["ModelSize", "measure_size"]


_TOKEN_EMBEDDINGS = frozenset({"embed_tokens", "wte", "word_embeddings"})
_POSITION_EMBEDDINGS = frozenset({"embed_positions", "wpe"})
_OF_ONE_EXPERT = re.compile(r"\.experts\.\d+\.")
_NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "ffn_config.moe_num_experts")
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "ffn_config.moe_top_k")


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
        """The number of layers."""
        return len(self.windows)

    def num_trained(self, trained: Trained) -> int:
        """Count the parameters that an optimizer updates."""
        return {
            Trained.all: self.num_parameters,
            Trained.attention: self.num_attention_parameters,
            Trained.kv: self.num_key_value_parameters,
        }[trained]

    def score_flops(self, sequence_length: int) -> float:
        """Compute the forward FLOPs per token of scores and of their product with the values, under a causal mask.

        2·H·(qk + v)·(mean attended tokens) per layer, which are S/2, or w − w²/2S with a window of w < S tokens.
        """
        attended = 0.0
        for window in self.windows:
            width = min(window or sequence_length, sequence_length)
            attended += width - width**2 / (2 * sequence_length)
        return 2 * self.num_attention_heads * (self.qk_head_dim + self.v_head_dim) * attended

    def forward_flops(self, sequence_length: int) -> float:
        """Compute the forward FLOPs per token: 2N for the matrices, and those of the attention's scores."""
        return 2 * self.num_matmul_parameters + self.score_flops(sequence_length)


def measure_size(checkpoint: Checkpoint) -> ModelSize:
    """Measure a decoder from its headers and config; no weight is read.

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
    """Without what older versions saved beside parameters, and without the copy of a tied head.

    Of a tied pair either may be in the files, or both.
    """
    has_embeddings = any(_module(name) in _TOKEN_EMBEDDINGS for name in checkpoint.tensors)
    tied = has_embeddings and checkpoint.full_config.get("tie_word_embeddings") is True
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
