"""How what people type becomes a number: sizes, counts, durations and percentages."""

from __future__ import annotations

import re
from decimal import Decimal

from ..convert.errors import InputError

__all__ = ["parse_count", "parse_duration", "parse_memory", "parse_percentage", "parse_size"]

_SIZE_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_COUNT_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_SECONDS = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}


def parse_size(text: str) -> int:
    """ "5GB" as bytes; powers of 1000 (GB) or 1024 (GiB). Raises InputError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if not match or match[2].upper() not in _SIZE_UNITS or float(match[1]) <= 0:
        raise InputError(f"{text!r} is not a size; write for example 5GB or 500MB")
    return max(1, int(float(match[1]) * _SIZE_UNITS[match[2].upper()]))


def parse_memory(text: str) -> int:
    """ "80GB" as bytes, as `parse_size` does, but for a number without a unit. Raises InputError."""
    size = parse_size(text)
    if text.strip()[-1].isdigit():  # who means gigabytes would be told that nothing fits
        raise InputError(f"{text!r} has no unit; write for example 80GB or 80GiB")
    return size


def parse_count(text: str) -> int:
    """ "300M", "1B", "2T", "1.5e9" or "299_892_736_000" as a positive whole number. Raises InputError."""
    match = re.fullmatch(r"(\d+(?:_\d+)*(?:\.\d+)?(?:[eE]\+?\d{1,2})?)\s*([KMBTkmbt]?)", text.strip())
    # decimal, not float: 0.3B is 300 000 000 and 299_892_736_000_001 keeps its last digit
    count = Decimal(match[1].replace("_", "")) * _COUNT_UNITS[match[2].upper()] if match else Decimal(0)
    if count <= 0 or count != int(count):
        raise InputError(f"{text!r} is not a count; write for example 300M, 1B or 1.5e9")
    return int(count)


def parse_duration(text: str) -> int:
    """ "5h45m", "90s", "1d" or "30m" as seconds. Raises InputError."""
    match = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text.strip().lower())
    parts = match.groups(default="0") if match else ()
    seconds = sum(int(part) * unit for part, unit in zip(parts, _SECONDS.values(), strict=False))
    if seconds == 0:
        raise InputError(f"{text!r} is not a duration; write for example 5h45m, 30m or 90s")
    return seconds


def parse_percentage(text: str) -> float:
    """ "5%" or "0.05" as 0.05. Raises InputError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%?)", text.strip())
    if not match or (float(match[1]) >= 1 and not match[2]):  # 5 could mean 5 % or 500 %
        raise InputError(f"{text!r} is not a percentage; write for example 5% or 0.05")
    return float(match[1]) / (100 if match[2] else 1)
