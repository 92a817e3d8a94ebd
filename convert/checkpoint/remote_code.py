"""Whether code that lies beside a checkpoint may run: never, unless the user said so with --trust-remote-code."""

from __future__ import annotations

from contextvars import ContextVar

__all__ = ["allow_remote_code", "remote_code_allowed"]

_ALLOWED: ContextVar[bool] = ContextVar("kvconvert_remote_code_allowed", default=False)


def allow_remote_code(allowed: bool = True) -> bool:
    """For the rest of this context; returns `allowed`, as a callback of an option does."""
    _ALLOWED.set(allowed)
    return allowed


def remote_code_allowed() -> bool:
    return _ALLOWED.get()
