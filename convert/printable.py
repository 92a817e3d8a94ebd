"""Text that others chose, names above all, as a terminal or a report may show it."""

from __future__ import annotations

import math
import re
from typing import Any

__all__ = ["jsonable", "printable"]

_MAX_CHARACTERS = 2000
_KEPT_AT_THE_END = 500
# what a terminal obeys instead of showing it (C0, C1), what turns the direction of a line or is not seen in it, halves
# of characters, and line breaks, which let a name pretend to be a line of its own
_OBEYED = re.compile(
    "[\x00-\x08\x0a-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e0fff]"
)


def printable(line: str) -> str:
    r"""Return a line with every character that a terminal obeys written as its escape (\x1b, \u202e).

    A line of more than 2000 characters is cut in its middle, and says how many are left out.
    """
    if len(line) > _MAX_CHARACTERS:
        kept = _MAX_CHARACTERS - _KEPT_AT_THE_END
        left_out = len(line) - _MAX_CHARACTERS
        line = f"{line[:kept]} … {left_out} characters … {line[-_KEPT_AT_THE_END:]}"
    return _OBEYED.sub(_escape, line)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def jsonable(value: Any) -> Any:
    """NaN and infinity are not JSON: null stands for "not a number here"."""
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
