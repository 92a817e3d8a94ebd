"""Configs of encoder-decoder models whose decoder has fewer K/V heads than query heads.

Annotations are evaluated here (no `from __future__ import annotations`): `strict` reads the types of the fields.
"""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import BartConfig, T5Config, WhisperConfig

__all__ = ["GroupedBartConfig", "GroupedT5Config", "GroupedWhisperConfig"]


def divisor_of_heads(num_key_value_heads: int | None, num_attention_heads: int | None) -> int | None:
    """The number of K/V heads of a decoder with so many query heads: as many where none is given.

    A plain ValueError, raised in `__post_init__`: a validator's would arrive as an error of huggingface_hub.
    """
    if num_key_value_heads is None:
        return num_attention_heads
    if num_attention_heads is None or num_key_value_heads < 1 or num_attention_heads % num_key_value_heads:
        raise ValueError(
            f"num_key_value_heads = {num_key_value_heads} does not divide "
            f"the {num_attention_heads} query heads of the decoder"
        )
    return num_key_value_heads


@strict
class GroupedT5Config(T5Config):
    """A T5 whose decoder has `num_key_value_heads` K/V heads, in self- and cross-attention; None: `num_heads`."""

    model_type = "grouped_t5"
    # the name that the other two have, for the code they share
    attribute_map: ClassVar = T5Config.attribute_map | {"decoder_attention_heads": "num_heads"}

    num_key_value_heads: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.num_key_value_heads = divisor_of_heads(self.num_key_value_heads, self.num_heads)


@strict
class GroupedBartConfig(BartConfig):
    """A BART whose decoder has `num_key_value_heads` K/V heads; None: `decoder_attention_heads`."""

    model_type = "grouped_bart"

    num_key_value_heads: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.num_key_value_heads = divisor_of_heads(self.num_key_value_heads, self.decoder_attention_heads)


@strict
class GroupedWhisperConfig(WhisperConfig):
    """A Whisper whose decoder has `num_key_value_heads` K/V heads; None: `decoder_attention_heads`."""

    model_type = "grouped_whisper"
    # the stock map makes num_key_value_heads a second name of encoder_attention_heads
    attribute_map: ClassVar = {
        key: name for key, name in WhisperConfig.attribute_map.items() if key != "num_key_value_heads"
    }

    num_key_value_heads: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.num_key_value_heads = divisor_of_heads(self.num_key_value_heads, self.decoder_attention_heads)
