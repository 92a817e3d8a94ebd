"""Configuration of GroupedDecoder. This file stands alone: it is copied beside converted weights."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

__all__ = ["GroupedDecoderConfig"]


@strict
class GroupedDecoderConfig(PreTrainedConfig):
    """A decoder with LayerNorm before each branch, biases everywhere, and fewer K/V heads than query heads.

    `position_embedding_type` is "learned", "rotary" (with `rope_parameters`) or "alibi" (Press et al. 2021, arXiv
    2108.12409), whose `alibi_slopes` are those of the query heads; `alibi_bfloat16` computes slope · position in
    bfloat16, as Falcon does. `embedding_norm` is a LayerNorm of the embeddings, as Bloom has, `qk_norm` one of each
    head's queries and keys, as Persimmon has. Layers whose `layer_types` entry is "sliding_attention" see
    `sliding_window` tokens, as GPT-Neo's local ones do.
    """

    model_type = "grouped_decoder"
    keys_to_ignore_at_inference = ("past_key_values", "cache")
    base_model_tp_plan = {  # noqa: RUF012
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {  # noqa: RUF012
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 50257
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int = 12
    head_dim: int = 64
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    max_position_embeddings: int = 1024
    position_embedding_type: str = "learned"
    rope_parameters: dict[str, Any] | None = None
    alibi_slopes: list[float] | None = None
    alibi_bfloat16: bool = False
    embedding_multiplier: float = 1.0
    embedding_norm: bool = False
    qk_norm: bool = False
    clip_qkv: float | None = None
    layer_types: list[str] | None = None
    sliding_window: int | None = None
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        if self.layer_types is None:
            self.layer_types = ["full_attention"] * self.num_hidden_layers
        super().__post_init__(**kwargs)

    def validate_attention(self) -> None:
        """Part of the validation that `strict` runs. Raises ValueError for what no attention could be built from."""
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads = {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads = {self.num_key_value_heads}"
            )
        if self.position_embedding_type not in ("learned", "rotary", "alibi"):
            raise ValueError(f"position_embedding_type = {self.position_embedding_type!r}: learned, rotary or alibi")
        if self.position_embedding_type == "alibi" and len(self.alibi_slopes or ()) != self.num_attention_heads:
            raise ValueError(f"alibi_slopes must hold num_attention_heads = {self.num_attention_heads} numbers")
