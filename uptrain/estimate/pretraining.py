"""On how many tokens a model was pretrained: from a file beside it, or from the table that ships with kvconvert."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from ...configs import PRETRAINING_TOKENS
from ...convert.checkpoint.json_files import read_json
from ...convert.checkpoint.manifest import PROVENANCE_NAME
from ...convert.checkpoint.tensors import Checkpoint
from ...convert.errors import CheckpointError

__all__ = ["PRETRAINING_NAME", "KnownModel", "PretrainingTokens", "known_models", "lookup_pretraining_tokens"]


PRETRAINING_NAME = "pretraining.json"

_TABLE = f"configs/{PRETRAINING_TOKENS.name}"
_TUNED = re.compile(r"[-_](instruct|chat|it|sft|dpo)(?=[-_]|$)", re.IGNORECASE)
_HUB_CACHE = re.compile(r"models--([^/]+)--([^/]+)/snapshots/")
# what older classes call the numbers of a fingerprint
_OTHER_NAMES = {
    "hidden_size": ("n_embd", "d_model"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "max_position_embeddings": ("n_positions", "max_seq_len"),
    "num_key_value_heads": ("num_kv_heads",),
}


@dataclass(frozen=True)
class PretrainingTokens:
    """On how many tokens a model was pretrained, and who says so.

    `tokens` is None where it is not known; `source` then says why, else where the number is from."""

    tokens: int | None
    source: str
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class KnownModel:
    """A row of the table. `ids` may hold globs; `fingerprints` name fields of config.json and their values.

    `tokens` is None where they are not published, with the reason in `source`.
    """

    ids: tuple[str, ...]
    tokens: int | None
    source: str
    exact: bool
    fingerprints: tuple[Mapping[str, Any], ...]

    @property
    def described(self) -> str:
        """The source, with a note where the number is rounded."""
        return self.source if self.exact or self.tokens is None else f"{self.source}; rounded"


@cache
def known_models() -> tuple[KnownModel, ...]:
    """Read the rows of configs/pretraining_tokens.json."""
    table = json.loads(PRETRAINING_TOKENS.read_text(encoding="utf-8"))
    return tuple(
        KnownModel(
            ids=tuple(row["ids"]),
            tokens=row["tokens"],
            source=row["source"],
            exact=row.get("exact", False),
            fingerprints=tuple(
                # the last field is left out where nothing hangs on it
                dict(zip(table["fingerprint"], values, strict=False))
                for values in row.get("fingerprints", ())
            ),
        )
        for row in table["models"]
    )


def lookup_pretraining_tokens(checkpoint: Checkpoint, teacher: Checkpoint | None = None) -> PretrainingTokens:
    """Look up the pretraining tokens of the model that `checkpoint` was converted from.

    In this order: pretraining.json beside it; its id or name in the table, then that of its source in kvconvert.json;
    the shape in its config. A teacher of the same shape is taken for the original, and asked after the checkpoint in
    each of these. A shape alone decides only where all models of that shape agree.
    Raises CheckpointError for a pretraining.json whose number is none.
    """
    origins = [checkpoint]
    if teacher is not None and _size(teacher) == _size(checkpoint):
        origins.append(teacher)
    for origin in origins:
        stated = _beside(origin)
        if stated is not None:
            return stated
    for origin in origins:
        for name in _names(origin):
            found = _by_name(name, origin)
            if found is not None:
                return found
    for origin in reversed(origins):  # the teacher's config is the original's
        found = _by_shape(origin)
        if found is not None:
            return found
    return PretrainingTokens(None, f"{next(_names(checkpoint))} is not in {_TABLE}")


def _beside(checkpoint: Checkpoint) -> PretrainingTokens | None:
    content = _json_beside(checkpoint, PRETRAINING_NAME)
    if "pretraining_tokens" not in content:
        return None
    tokens = content["pretraining_tokens"]
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise CheckpointError(
            f"{checkpoint.directory / PRETRAINING_NAME}: pretraining_tokens is {tokens!r}, expected a positive integer"
        )
    return PretrainingTokens(tokens, f"{PRETRAINING_NAME} beside {checkpoint.name}")


def _json_beside(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    if checkpoint.path is None or not (checkpoint.path / name).is_file():
        return {}
    content = read_json(checkpoint.path / name)
    return content if isinstance(content, dict) else {}


def _names(checkpoint: Checkpoint) -> Iterator[str]:
    """The hub id or the directory's name, then what kvconvert.json and config.json say that it comes from."""
    local = Path(checkpoint.name).expanduser()
    if local.is_dir():
        resolved = local.resolve()
        cached = _HUB_CACHE.search(resolved.as_posix())
        yield f"{cached[1]}/{cached[2]}" if cached else resolved.name
    else:
        yield checkpoint.name
    sources = (_json_beside(checkpoint, PROVENANCE_NAME).get("source"), checkpoint.config.get("_name_or_path"))
    yield from (source for source in sources if isinstance(source, str) and source)


def _by_name(name: str, checkpoint: Checkpoint) -> PretrainingTokens | None:
    """A hub id decides alone; the bare name of a directory only where the shape does not contradict it."""
    base = _TUNED.sub("", name)
    for model in known_models():
        patterns = model.ids if "/" in name else [pattern.rpartition("/")[2] for pattern in model.ids]
        matched = [given for given in (name, base) if any(fnmatchcase(given.lower(), p.lower()) for p in patterns)]
        contradicted = "/" not in name and model.fingerprints and not _has_shape(checkpoint, model)
        if matched and not contradicted:
            remarks = () if base == name else (f"{name} is a tuned model: these are the tokens of its base model",)
            return PretrainingTokens(model.tokens, f"{_TABLE}, by the name {name}: {model.described}", remarks)
    return None


def _by_shape(checkpoint: Checkpoint) -> PretrainingTokens | None:
    provenance = _json_beside(checkpoint, PROVENANCE_NAME)
    heads = _number(checkpoint, "num_attention_heads")
    kept = _number(checkpoint, "num_key_value_heads") or heads
    original = provenance.get("num_key_value_heads", {"source": kept})["source"]
    if original != heads:
        return None  # every model of the table has as many K/V heads as query heads
    # a conversion may change the class, and nothing else of a fingerprint
    ignored = ("model_type",) if "target" in provenance else ()
    models = [model for model in known_models() if _has_shape(checkpoint, model, ignored)]
    if not models:
        return None
    ids = " or ".join(", ".join(model.ids) for model in models)
    if len({model.tokens for model in models}) > 1:
        return PretrainingTokens(None, f"its shape is that of {ids}, which were pretrained on different numbers")
    return PretrainingTokens(models[0].tokens, f"{_TABLE}, by the shape of {ids}: {models[0].described}")


def _has_shape(checkpoint: Checkpoint, model: KnownModel, ignored: tuple[str, ...] = ("model_type",)) -> bool:
    return any(
        all(_number(checkpoint, field) == value for field, value in fingerprint.items() if field not in ignored)
        for fingerprint in model.fingerprints
    )


def _size(checkpoint: Checkpoint) -> tuple[Any, ...]:
    return tuple(_number(checkpoint, name) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"))


def _number(checkpoint: Checkpoint, field: str) -> Any:
    """A field of config.json, whatever the class calls it; None if it is absent."""
    for name in (field, *_OTHER_NAMES.get(field, ())):
        if checkpoint.config.get(name) is not None:
            return checkpoint.config[name]
    return None
