"""A tokenizer that goes beside a checkpoint of another class than its own model's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, DataError
from .files import write_text
from .json_files import read_object
from .loading import quiet_transformers
from .tokenizer import has_tokenizer, open_tokenizer, tokenizer_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["transfer_tokenizer"]

_CONFIG_NAME = "tokenizer_config.json"
_SERIALISED_NAME = "tokenizer.json"
# what pre-tokenizers, normalizers and byte fallbacks treat differently: spaces, digits, cases, scripts, bytes
_SAMPLES = (
    "The quick  brown fox\n\n\tjumps over 13 lazy dogs; it's 3.14159 or 12,345 – isn't it?",
    "  leading and trailing spaces \r\n",
    "naïve café e\u0301 Straße ﬁne Ⅳ, 東京は日本の首都です。 Привет 😀👩\u200d🚀 \x01",
    "def f(x):\n    return {'a_b': x**2}  # UPPER camelCase",
    "",
)
# attributes that the class of a tokenizer may have another default for
_ATTRIBUTES = ("padding_side", "truncation_side", "model_max_length", "chat_template")
# takes tokenizer.json as it is; its name in transformers 5, TokenizersBackend, is not known to earlier versions
_ANY_CLASS = "PreTrainedTokenizerFast"


def transfer_tokenizer(source: Path, target: Path, *, name: str) -> str | None:
    """Let the tokenizer that was copied from `source` to `target`, beside another class, do what the source's does.

    Which class opens a tokenizer, and from which files, depends on the `model_type`. Both are opened, and encode and
    decode samples. Where they differ, or where it is the `model_type` alone that says what a tokenizer is, its class,
    its special tokens and, for a tokenizer of the tokenizers library, tokenizer.json are written into `target`.
    Files are replaced, not written to, so that those in `target` may be links to the source's.
    Returns None, or where the source's tokenizer cannot be opened the reason: its files then stay as they were copied.
    Raises CheckpointError, with `name` in place of the directory, where nothing makes the two equal.
    """
    if not has_tokenizer(source):
        return None
    with quiet_transformers():
        try:
            tokenizer = open_tokenizer(source)
            texts = (*_SAMPLES, "".join(f"x{token} {token}y" for token in tokenizer.all_special_tokens[:16]))
            expected = _behaviour(tokenizer, texts)
        except DataError as error:
            return str(error)
        found = ""
        for write in _ways(tokenizer, target):
            write()
            found = _difference(expected, target, texts)
            if not found:
                return None
    raise CheckpointError(
        f"{name}: beside the new class the tokenizer {found.replace(str(target), name)}, unlike that of {source}",
        hint="move the tokenizer's files out of the source to convert without them, and give the result one by hand",
    )


def _ways(tokenizer: PreTrainedTokenizerBase, target: Path) -> Iterator[Callable[[], object]]:
    """What may be written into `target` to get this tokenizer, the way that changes least first."""
    path = target / _CONFIG_NAME
    config = read_object(path) if path.exists() else {}
    if "tokenizer_class" in config:
        yield lambda: None
    backend = tokenizer.backend_tokenizer if tokenizer.is_fast else None
    tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    own_class = type(tokenizer).__name__
    named = tokens | config | {"tokenizer_class": _ANY_CLASS if own_class == "TokenizersBackend" else own_class}

    def name_class() -> None:
        _write_json(path, named)
        if backend is not None and not (target / _SERIALISED_NAME).exists():
            write_text(target / _SERIALISED_NAME, backend.to_str(pretty=True))

    yield name_class
    if backend is None:
        return
    explicit = {name: getattr(tokenizer, name) for name in ("padding_side", "truncation_side", "model_input_names")}
    explicit["additional_special_tokens"] = [str(token) for token in tokenizer.extra_special_tokens]
    explicit["tokenizer_class"] = _ANY_CLASS

    def serialise() -> None:
        _write_json(path, {key: value for key, value in (named | explicit).items() if key != "auto_map"})
        write_text(target / _SERIALISED_NAME, backend.to_str(pretty=True))

    yield serialise


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _difference(expected: Mapping[str, Any], target: Path, texts: tuple[str, ...]) -> str:
    """A clause that says what the tokenizer in `target` does not do as expected, "" where there is nothing."""
    try:
        found = _behaviour(open_tokenizer(target), texts)
    except DataError as error:
        return f"cannot be opened ({error})"
    return next((f"has another {what}" for what, value in expected.items() if found[what] != value), "")


def _behaviour(tokenizer: PreTrainedTokenizerBase, texts: tuple[str, ...]) -> dict[str, Any]:
    """What a tokenizer does, by the name of each part. Raises DataError where it cannot encode."""
    with tokenizer_errors("the tokenizer cannot encode a text"):
        plain = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        encoded = [dict(tokenizer(text)) for text in texts]
        decoded = [tokenizer.decode(ids) for ids in plain]
    return {
        "encoding of text": plain,
        "encoding of text with special tokens": encoded,
        "decoding": decoded,
        "vocabulary": tokenizer.get_vocab(),
        "map of special tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "set of special tokens": set(tokenizer.all_special_ids),
        **{name: getattr(tokenizer, name, None) for name in _ATTRIBUTES},
    }
