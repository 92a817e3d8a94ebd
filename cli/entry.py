"""Where the `kvconvert` program begins: the command is imported here, so that Ctrl-C is told in one line then too."""

from __future__ import annotations

import gc
import sys

__all__ = ["main"]

_INTERRUPTED = 130


def main() -> None:
    """Import the command and run it. Exits with 130 where Ctrl-C comes while it is imported."""
    try:
        gc.disable()  # imports make objects by the ten thousand, and no garbage
        from .main import app

        gc.enable()
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted\n")
        sys.exit(_INTERRUPTED)
    app()
