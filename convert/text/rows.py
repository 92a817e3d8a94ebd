"""The text in a row of a JSON, parquet or arrow file, or of a dataset."""

from __future__ import annotations

import re
from typing import Any

from ..errors import DataError, in_one_line
from .reading import Reading

__all__ = ["no_field", "text_of"]

_SURROGATES = re.compile("[\ud800-\udfff]")


def text_of(record: Any, text_field: str, where: str, reading: Reading) -> str:
    """Return the text in a field of a row, "" where it is null.

    Bytes are UTF-8, a list of messages goes through the tokenizer's chat template, and half a character, as JSON can
    hold it, becomes U+FFFD. Raises DataError, which names the row, where there is no such field or no text in it.
    """
    text = _value(record, text_field, where)
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: field {text_field!r} is not UTF-8 (its byte {error.start})") from error
    if isinstance(text, list) and text and all(isinstance(each, dict) and "role" in each for each in text):
        text = _conversation(text, where, reading)
    if text is not None and not isinstance(text, str):
        raise DataError(f"{where}: field {text_field!r} is {type(text).__name__}, not text")
    if text and _SURROGATES.search(text):
        reading.notes.replace_surrogate(where)
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text or ""


def _value(record: Any, text_field: str, where: str) -> Any:
    """The value of a field; "doc.text" is a field of that name, else the field "text" of the object in "doc"."""
    if not isinstance(record, dict):
        raise DataError(f"{where}: {type(record).__name__}, not an object with fields")
    if text_field in record:
        return record[text_field]
    outer, dot, inner = text_field.partition(".")
    if dot and isinstance(record.get(outer), dict):
        return _value(record[outer], inner, f"{where}, in {outer!r}")
    raise no_field(where, text_field, list(record))


def no_field(where: str, text_field: str, fields: list[str]) -> DataError:
    """Make the error for rows without the field of the text."""
    return DataError(
        f"{where}: no field {text_field!r} (there is {', '.join(fields) or 'none'})",
        hint="name the column that holds the text",
        settings=("text_field",),
    )


def _conversation(messages: list[dict[str, Any]], where: str, reading: Reading) -> str:
    if reading.tokenizer is None or not reading.tokenizer.chat_template:
        raise DataError(f"{where}: a conversation, and the tokenizer has no chat template to write it with")
    try:
        return str(reading.tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # a template is a program, which says in its own words what it does not take
        raise DataError(f"{where}: the chat template does not take this conversation ({in_one_line(error)})") from error
