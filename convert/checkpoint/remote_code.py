"""Whether code that lies beside a checkpoint may run: only after the user allowed it with `allow_remote_code`."""

from __future__ import annotations

from contextvars import ContextVar

__all__ = ["allow_remote_code", "remote_code_allowed"]

_ALLOWED: ContextVar[bool] = ContextVar("kvconvert_remote_code_allowed", default=False)


def allow_remote_code(allowed: bool = True) -> bool:
    """Allow such code, or forbid it again, for the rest of this context (`contextvars`); returns `allowed`."""
    _ALLOWED.set(allowed)
    return allowed


def remote_code_allowed() -> bool:
    """Return whether `allow_remote_code` was called in this context."""
    return _ALLOWED.get()
