"""Configuration of CrossLayerDecoder. This file stands alone: it is copied beside converted weights."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

__all__ = ["CrossLayerDecoderConfig"]

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@strict
class CrossLayerDecoderConfig(PreTrainedConfig):
    """A Llama-shaped decoder whose layers may share keys and values (Brandon et al. 2024, arXiv 2405.12981).

    Layer i attends to the keys and values that layer `kv_source_layers[i]` computes: itself or an earlier one. A layer
    that is not its own source has only q_proj and o_proj, and no cache. `attention_bias` lists the projections that
    have a bias, which Llama's class refuses, so that it does not open the weights by mistake. `qk_norm` is an RMSNorm
    of each head's queries and keys, as Qwen3 has. Layers whose `layer_types` entry is "sliding_attention" see
    `sliding_window` tokens.
    """

    model_type = "cross_layer_decoder"
    keys_to_ignore_at_inference = ("past_key_values", "cache")
    base_model_tp_plan = {  # noqa: RUF012
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {  # noqa: RUF012
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    kv_source_layers: list[int] | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_parameters: dict[str, Any] | None = None
    attention_bias: list[str] | None = None
    attention_dropout: float = 0.0
    mlp_bias: bool = False
    qk_norm: bool = False
    layer_types: list[str] | None = None
    sliding_window: int | None = None
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.layer_types is None:
            self.layer_types = ["full_attention"] * self.num_hidden_layers
        if self.kv_source_layers is None:
            self.kv_source_layers = list(range(self.num_hidden_layers))
        if self.attention_bias is None:
            self.attention_bias = []
        super().__post_init__(**kwargs)

    @property
    def kv_sharing_modes(self) -> list[str | None]:
        """For each layer what transformers' caches ask for: "reuse" allocates nothing."""
        sources = self.kv_source_layers or []
        shared = {source for layer, source in enumerate(sources) if source != layer}
        return [
            "reuse" if source != layer else "store" if layer in shared else None for layer, source in enumerate(sources)
        ]

    def validate_attention(self) -> None:
        """Part of the validation that `strict` runs. Raises ValueError for what no attention could be built from."""
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads = {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads = {self.num_key_value_heads}"
            )
        sources, kinds = self.kv_source_layers or [], self.layer_types or []
        if len(sources) != self.num_hidden_layers:
            raise ValueError(f"kv_source_layers must name a layer for each of {self.num_hidden_layers} layers")
        for layer, source in enumerate(sources):
            if not 0 <= source <= layer or sources[source] != source:
                raise ValueError(f"kv_source_layers[{layer}] = {source} is no layer up to it with keys of its own")
            if kinds[source] != kinds[layer]:
                raise ValueError(f"layers {source} and {layer} share keys, and are {kinds[source]} and {kinds[layer]}")
        if unknown := set(self.attention_bias or []) - set(_PROJECTIONS):
            raise ValueError(f"attention_bias: {', '.join(sorted(unknown))} is none of {', '.join(_PROJECTIONS)}")
