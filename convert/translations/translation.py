"""A checkpoint translated to another class that computes the same function and, unlike its own, has grouped attention.

The translated checkpoint is a Checkpoint: methods plan on it and `execute` reads from it as from any other, one tensor
at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..checkpoint.finite import check_computed
from ..checkpoint.loading import other_head
from ..checkpoint.tensors import OLD_BUFFERS, Checkpoint, TensorInfo, tensor_bytes
from ..errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

    from ..checkpoint.weights_file import Sink

__all__ = ["Derived", "TranslatedCheckpoint", "Translation"]


@dataclass(frozen=True)
class Derived:
    """How a tensor of the target class is made: by `compute`, in float64, from the source tensors named in `reads`.

    Without `compute` it is a copy of the only source tensor, byte for byte. `shape` is that of the result.
    """

    reads: tuple[str, ...]
    shape: tuple[int, ...]
    compute: Callable[..., Tensor] | None = None


@dataclass(frozen=True)
class Translation:
    """How a checkpoint of one `model_type` becomes one of the `model_type` `target` that computes the same function.

    `make_config` makes the target's config.json. `make_tensors` says for each of its tensors how it is made. `refusal`
    gives the reason why a checkpoint cannot be translated exactly, or None. All three go by the checkpoint's full
    config, with the values of its class where config.json says nothing: the target's class may have others.
    """

    model_type: str
    target: str
    make_config: Callable[[Checkpoint], dict[str, Any]]
    make_tensors: Callable[[Checkpoint], Mapping[str, Derived]]
    refusal: Callable[[Checkpoint], str | None] = lambda checkpoint: None


@dataclass
class TranslatedCheckpoint(Checkpoint):
    """A checkpoint made from `source` by a translation, without a file: each tensor is computed when it is read.

    A tensor has the dtype of the first source tensor that it is made of.
    """

    source: Checkpoint = field(kw_only=True)
    derived: Mapping[str, Derived] = field(kw_only=True)

    @classmethod
    def of(cls, source: Checkpoint, translation: Translation) -> TranslatedCheckpoint:
        """Translate a checkpoint; only headers are read.

        Raises UnsupportedError where the translation would not be exact, or for a head that the target lacks, and
        CheckpointError where a tensor is missing or would be left out.
        """
        refusal = source.original.quantised or translation.refusal(source)
        if refusal:
            raise UnsupportedError(f"{source.name}: {refusal}")
        head = other_head(source.config, source.tensors)
        if head is not None:
            raise UnsupportedError(
                f"{source.name}: it has another head than a language model's ({head}), and {translation.target}, the "
                "class that it would become, has no such head",
                hint="convert the language model that it was trained from, and train the head on the result",
            )
        derived = translation.make_tensors(source)
        _check_complete(source, derived)
        tensors = {name: _info(source, name, tensor) for name, tensor in derived.items()}
        return cls(
            source.name,
            source.path,
            _completed(translation, source, derived),
            tensors,
            source.size_on_disk_bytes,
            source=source,
            derived=derived,
        )

    @property
    def route(self) -> tuple[str, ...]:
        """Each `model_type` that the source and this checkpoint were translated to, in order."""
        return (*self.source.route, str(self.config["model_type"]))

    @property
    def original(self) -> Checkpoint:
        """The checkpoint that the first translation started from."""
        return self.source.original

    def close(self) -> None:
        """Close the source."""
        self.source.close()

    def counted_tensors(self, names: Iterable[str] | None = None) -> list[TensorInfo]:
        """Return the source's tensors that the named ones, or all, are made of: not the masks among its weights."""
        chosen = self.derived if names is None else names
        return self.source.counted_tensors({read for name in chosen for read in self.derived[name].reads})

    def read(self, name: str) -> Tensor:
        """Compute one tensor in float64, and return it in the dtype of the first source tensor that it is made of.

        Raises UnsupportedError where a computed value is not finite in that dtype, and errors of the source's `read`.
        """
        derived = self.derived[name]
        tensors = [self.source.read(source_name) for source_name in derived.reads]
        if derived.compute is None:
            return tensors[0]
        made = derived.compute(*(tensor.double() for tensor in tensors)).to(tensors[0].dtype)
        check_computed(name, made, tensors)
        return made

    def check_readable(self, name: str) -> None:
        """Raise UnsupportedError where one of the source's tensors that it is made of cannot be read."""
        for source_name in self.derived[name].reads:
            self.source.check_readable(source_name)

    def position(self, name: str) -> int | None:
        """Where the bytes of a tensor begin in the source's file; None where they are computed."""
        derived = self.derived[name]
        return self.source.position(derived.reads[0]) if derived.compute is None else None

    def copy_bytes(self, name: str, target: Sink) -> None:
        """Append the tensor's bytes to `target`, those of the source where nothing is computed."""
        derived = self.derived[name]
        if derived.compute is None:
            self.source.copy_bytes(derived.reads[0], target)
        else:
            target.write(tensor_bytes(self.read(name)))


def _check_complete(source: Checkpoint, derived: Mapping[str, Derived]) -> None:
    """Raise CheckpointError where a tensor of the source is part of no tensor of the target."""
    read = {name for tensor in derived.values() for name in tensor.reads}
    dropped = [name for name in source.tensors if name not in read and not OLD_BUFFERS.search(name)]
    if dropped:
        raise CheckpointError(
            f"{source.name}: config.json implies no tensor {dropped[0]} ({len(dropped)} in all)",
            hint="remove what the class does not have from a copy of the checkpoint, or correct config.json",
        )


def _completed(translation: Translation, source: Checkpoint, derived: Mapping[str, Derived]) -> dict[str, Any]:
    """The target's config, with the ids of special tokens that the source's class has by default.

    Its `architectures` name the target's base class where the source was saved by a base class, without a head.
    """
    config = translation.make_config(source)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        config[name] = source.full_config.get(name)
    if "lm_head.weight" not in derived and not config.get("tie_word_embeddings"):
        config["architectures"] = [name.replace("ForCausalLM", "Model") for name in config["architectures"]]
    return config


def _info(source: Checkpoint, name: str, derived: Derived) -> TensorInfo:
    """The header of a tensor of the target.

    Raises CheckpointError where the source lacks what it is made of, UnsupportedError where it cannot be computed with.
    """
    for source_name in derived.reads:
        if source_name not in source.tensors:
            raise CheckpointError(
                f"{source_name} is missing from {source.name}",
                hint="the checkpoint is incomplete, or config.json's model_type is wrong",
            )
        if derived.compute is not None:
            source.check_readable(source_name)
    origin = source.tensors[derived.reads[0]]
    num_bytes = origin.num_bytes // max(origin.num_elements, 1)
    for size in derived.shape:
        num_bytes *= size
    return replace(origin, name=name, shape=derived.shape, begin=0, end=num_bytes)
