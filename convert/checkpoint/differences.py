"""How two records differ, in words for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["differences"]


def differences(name: str, was: Any, now: Any) -> Iterator[str]:
    """Yield how two values of JSON differ, in words for people, such as "weights kl was 1.0, now 0.5"."""
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        for key in now:
            yield from differences(f"{name} {key}".strip(), was.get(key), now[key])
    elif _is_list(was) and _is_list(now) and len(was) == len(now):
        for number, (one, other) in enumerate(zip(was, now, strict=True), start=1):
            yield from differences(f"{name} {number}", one, other)
    elif _is_list(was) and _is_list(now):
        yield f"{name} were {len(was)}, now {len(now)}"
    elif was != now:
        yield f"{name} was {was!r}, now {now!r}"


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
