"""Whether a directory is what its manifest says: its files, its weights, the class that opens it, and the cache."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..convert.algebra.kv_cache import kv_cache_bytes_per_token
from ..convert.architectures.source import Source
from ..convert.cache_check import check_cache
from ..convert.checkpoint.loading import check_opens, load_model
from ..convert.checkpoint.manifest import (
    PROVENANCE_NAME,
    files_of_the_run,
    listed_files,
    read_provenance,
    unlike_manifest,
)
from ..convert.checkpoint.opening import open_checkpoint
from ..convert.checkpoint.source_files import digest_source_file, weight_files
from ..convert.checkpoint.tensors import Checkpoint, tensor_bytes
from ..convert.checkpoint.tokenizer import load_tokenizer
from ..convert.errors import CheckpointError, DataError, InputError, UnsupportedError
from ..convert.plan import operation_from_json
from ..convert.runtime.transformers_interface import cache_of
from ..convert.translations.routes import translated

__all__ = ["CheckResult", "Verification", "verify"]

_TEXT = "The quick brown fox jumps over the lazy dog. It was the best of times, it was the worst of times."
_NUM_TOKENS = 16
_CACHE_VALUE_BYTES = 2

Found = tuple[str, list[str]]


@dataclass(frozen=True)
class CheckResult:
    """What one check found: `problems` has a line for each file, tensor or number that is not as it should be.

    `what` says what was looked at.
    """

    name: str
    passed: bool
    what: str
    problems: tuple[str, ...] = ()


@dataclass
class Verification:
    """The checks of a directory, in the order in which they were made; none comes after one that failed."""

    directory: Path
    checks: list[CheckResult] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return not self.problems

    @property
    def problems(self) -> list[str]:
        """All that is not as it should be, a line each."""
        return [problem for check in self.checks for problem in check.problems]

    def to_json(self) -> dict[str, Any]:
        """The verification as an object for JSON."""
        return {"directory": str(self.directory), "ok": self.ok, "checks": [asdict(check) for check in self.checks]}


class _Digest:
    """Takes the bytes of a tensor, as a file of weights does, and keeps their SHA-256."""

    def __init__(self) -> None:
        self._sha256 = sha256()

    def write(self, data: bytes) -> None:
        self._sha256.update(data)

    def copy(self, descriptor: int, begin: int, data: memoryview) -> None:
        self._sha256.update(data)

    @classmethod
    def of(cls, checkpoint: Checkpoint, name: str) -> bytes:
        digest = cls()
        checkpoint.copy_bytes(name, digest)
        return digest._sha256.digest()


class _Nowhere:
    """Takes the bytes of a tensor and drops them."""

    def write(self, data: bytes) -> None:
        pass

    def copy(self, descriptor: int, begin: int, data: memoryview) -> None:
        pass


def verify(
    directory: str | Path,
    *,
    against: str | Path | None = None,
    run: bool = True,
    see: Callable[[str], object] = lambda name: None,
) -> Verification:
    """Check a directory that kvconvert wrote; with `against`, its tensors against those of the original too.

    Checked is that its files are those of the manifest, byte for byte, and no others are there; that it opens in its
    class without missing or unexpected tensors; that all weights are finite, but for those that the manifest counts;
    that the cache has the size that the manifest promises; and with `run`, which loads the model, that the logits of a
    short text are finite and that a live cache has this size. The original is known by the digests of its files:
    tensors that were copied have to be identical, and those that an exact method computed are computed again. After a
    check that fails no other is made. `see` is called with the name of each before it is made. Raises CheckpointError
    for a directory without a manifest that lists its files, and InputError for a manifest that says nothing of an
    original.
    """
    place = Path(directory)
    if not place.is_dir():
        raise CheckpointError(f"{directory}: no such directory")
    record = _record(place)
    if against is not None and not {"tensors", "source_files"} <= record.keys():
        raise InputError(
            f"{directory} was trained after it was converted, so that no tensor is the original's",
            hint="verify the converted checkpoint that was trained",
        )
    result = Verification(place)
    with ExitStack() as stack:
        subject = _Subject(place, record, against, stack)
        checks = [subject.files, subject.opens, subject.weights, subject.cache]
        checks += [subject.runs] if run else []
        checks += [subject.source, subject.tensors] if against is not None else []
        for check in checks:
            see(check.__name__)
            try:
                what, problems = check()
            except CheckpointError as error:
                what, problems = "could not be checked", [str(error)]
            result.checks.append(CheckResult(check.__name__, not problems, what, tuple(problems)))
            if problems:
                break
    return result


@dataclass
class _Subject:
    """What is verified: each check returns what it looked at, and a line for each problem."""

    directory: Path
    record: dict[str, Any]
    against: str | Path | None
    stack: ExitStack

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return self._open(self.directory)

    @cached_property
    def original(self) -> Checkpoint:
        assert self.against is not None
        return self._open(self.against)

    def _open(self, model: str | Path) -> Checkpoint:
        checkpoint = self.stack.enter_context(open_checkpoint(model))
        checkpoint.allow_nonfinite = True  # what is not finite is counted
        return checkpoint

    @property
    def promised(self) -> int | None:
        """Bytes of cache per token that the manifest promises; None for what was not converted."""
        promised: int | None = self.record.get("cache_bytes_per_token", {}).get("result")
        return promised

    def files(self) -> Found:
        listed = [*(listed_files(self.record) or ()), *(files_of_the_run(self.directory, self.record) or ())]
        what = f"{len(listed)} files, {sum(file.size for file in listed)} bytes, by SHA-256"
        return what, unlike_manifest(self.directory, digests=True)

    def opens(self) -> Found:
        return f"in {check_opens(self.directory)}, without missing or unexpected tensors", []

    def weights(self) -> Found:
        for name in self.checkpoint.tensors:
            self.checkpoint.copy_bytes(name, _Nowhere())  # which counts what is not finite
        found, expected = self.checkpoint.nonfinite, self.record.get("nonfinite_values", {})
        return f"{len(self.checkpoint.tensors)} tensors, finite" + (" but for those listed" if expected else ""), [
            f"{name} has {found.get(name, 0)} values that are not finite, and the manifest {expected.get(name, 0)}"
            for name in sorted({*found, *expected})
            if found.get(name, 0) != expected.get(name, 0)
        ]

    def cache(self) -> Found:
        shape = Source.of(self.checkpoint).shape
        implied = kv_cache_bytes_per_token(num_layers=shape.num_key_value_layers, values=shape.cached_values)
        problem = f"config.json implies {implied} bytes of cache per token, and {self.promised} were promised"
        agrees = self.promised is None or implied == self.promised
        return f"{implied} bytes per token in 16 bits", [] if agrees else [problem]

    def runs(self) -> Found:
        import torch

        try:
            model = load_model(self.directory, dtype="auto", device="cpu")
        except UnsupportedError:  # no decoder, or another head than one that predicts tokens
            check_cache(self.directory)
            return "a few tokens, with a cache and without", []
        ids = _token_ids(self.checkpoint)
        with torch.inference_mode():
            output = model(input_ids=ids, use_cache=True)
        problems = []
        count = int((~output.logits.isfinite()).sum())
        if count and not self.record.get("nonfinite_values"):
            problems.append(f"{count} of {output.logits.numel()} logits of {ids.shape[1]} tokens are not finite")
        live = None if self.promised is None else _live_cache_bytes(cache_of(output), ids.shape[1])
        latent = Source.of(self.checkpoint).shape.latent  # transformers' class keeps what is expanded from it
        if live is not None and latent is None and live != self.promised:
            problems.append(f"a live cache takes {live:g} bytes per token, and {self.promised} were promised")
        what = "finite logits" if live is None or latent is not None else "finite logits, a live cache of that size"
        return f"{ids.shape[1]} tokens: {what}", problems

    def source(self) -> Found:
        read = {entry["name"]: entry["digest"] for entry in self.record["source_files"]}
        names = weight_files(self.original)
        return f"{len(names)} files, those that this was made from", [
            f"{self.original.directory / name} is not the file that this was made from"
            for name in names
            if read.get(name) != digest_source_file(self.original.directory, name).digest
        ]

    def tensors(self) -> Found:
        source = translated(self.original, self.record["route"])
        operations = [operation_from_json(operation) for operation in self.record["operations"]]
        counts = {"copied": 0, "computed again": 0, "prepared by the method, not computed again": 0}
        made_of: dict[str, Any] = self.record["tensors"]
        strange = sorted(made_of.keys() ^ self.checkpoint.tensors)
        problems = [f"{name} is in one of manifest and weights only" for name in strange]
        for name, made in made_of.items():
            if name in strange:
                continue
            if isinstance(made, dict) and "prepared" in made:
                counts["prepared by the method, not computed again"] += 1
            elif isinstance(made, dict) and "operation" in made:
                counts["computed again"] += 1
                tensor = operations[made["operation"]](*map(source.read, made["computed_from"]))
                if sha256(tensor_bytes(tensor)).digest() != _Digest.of(self.checkpoint, name):
                    problems.append(f"{name} is not what {self.record['method']} makes of the original")
            else:
                counts["copied"] += 1
                original = name if made == "copied" else made["copied_from"]
                if _Digest.of(source, original) != _Digest.of(self.checkpoint, name):
                    problems.append(f"{name} is not the original's, byte for byte")
        return ", ".join(f"{count} {what}" for what, count in counts.items() if count), problems


def _record(directory: Path) -> dict[str, Any]:
    hint = "only what kvconvert wrote can be verified; convert it again if an earlier version did"
    record = read_provenance(directory)
    if listed_files(record) is None:
        what = "lists no files" if record else "there is none"
        raise CheckpointError(f"{directory / PROVENANCE_NAME}: {what}", hint=hint)
    return record


def _live_cache_bytes(cache: Any, num_tokens: int) -> float | None:
    """What a cache of transformers holds, in bytes per token of 16-bit values; None for one of another kind."""
    layers = getattr(cache, "layers", None)
    if layers is None:
        return None
    held = [part for layer in layers for part in (layer.keys, layer.values) if part is not None]
    return float(_CACHE_VALUE_BYTES * sum(part.numel() for part in held) / num_tokens)


def _token_ids(checkpoint: Checkpoint) -> Any:
    """The tokens of a short text, (1, 16), or ids in order where there is no tokenizer."""
    import torch

    size = checkpoint.config_int("vocab_size")
    try:
        ids = load_tokenizer(checkpoint.directory)(_TEXT)["input_ids"][:_NUM_TOKENS]
    except DataError:
        ids = []
    if len(ids) < _NUM_TOKENS or max(ids) >= size:
        ids = [index % size for index in range(_NUM_TOKENS)]
    return torch.tensor([ids])
