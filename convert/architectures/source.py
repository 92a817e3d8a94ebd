"""A checkpoint together with its architecture, attention sizes and RoPE."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..algebra.attention_shape import AttentionShape
from ..algebra.rotations import Rotary
from ..checkpoint.known_classes import known_frequencies
from ..checkpoint.loading import empty_model
from ..checkpoint.tensors import Checkpoint
from ..errors import CheckpointError, UnsupportedError
from .architecture import Architecture, every_layer_rotates
from .attention import read_attention
from .context import context_of
from .rotary import read_rotary
from .table import find_architecture

__all__ = ["Source"]


@dataclass(frozen=True)
class Source:
    """A checkpoint to convert and its architecture; the sizes of its attention and its RoPE are read once, on demand.

    Reading them raises CheckpointError where config and tensors disagree.
    """

    checkpoint: Checkpoint
    architecture: Architecture

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Source:
        """Return a checkpoint with its architecture. Raises UnsupportedError for one that is not in the table."""
        return cls(checkpoint, find_architecture(checkpoint))

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.checkpoint.close()

    @property
    def name(self) -> str:
        """The directory or hub id that the checkpoint was opened with."""
        return self.checkpoint.name

    @cached_property
    def shape(self) -> AttentionShape:
        """The sizes of its attention, with every layer's tensors checked against config.json.

        Raises UnsupportedError for quantised weights that do not show them.
        """
        try:
            return read_attention(self.checkpoint, self.architecture)
        except CheckpointError as error:
            if self.checkpoint.original.quantised:
                raise UnsupportedError(f"{self.name}: {self.checkpoint.original.quantised}") from error
            raise

    @cached_property
    def rotary(self) -> tuple[Rotary, ...]:
        """How the keys of each layer rotate, with the frequencies that its class computes."""
        return tuple(read_rotary(self.checkpoint, self.architecture, self.shape, self.empty_model))

    @cached_property
    def nominal_frequencies(self) -> tuple[float, ...] | None:
        """The frequencies of `rotary` to about six digits, where they are known without its class; otherwise None.

        They do for what is decided before anything is computed.
        """
        every_layer = self.architecture.rotates is every_layer_rotates
        return known_frequencies(self.checkpoint.config) if every_layer else None

    @cached_property
    def rotary_dims(self) -> int:
        """The number of dims of a head that rotate, in the first layer."""
        frequencies = self.nominal_frequencies
        return self.rotary[0].dims if frequencies is None else 2 * len(frequencies)

    @cached_property
    def empty_model(self) -> Any:
        """Its class in float32, parameters on the meta device; built once, so that who fills it takes a copy."""
        return empty_model(self.checkpoint.config)

    @property
    def longest_context(self) -> int | None:
        """How many tokens a sequence may have, stretched RoPE included; None where nothing limits it."""
        return context_of(self.checkpoint.full_config)

    def require_convertible(self) -> None:
        """Raise UnsupportedError for a quantised checkpoint, and for one whose cache holds a latent."""
        refusal = self.architecture.refusal(self.checkpoint)
        if refusal:
            raise UnsupportedError(f"{self.name}: {refusal}")
