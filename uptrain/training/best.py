"""The weights with the best held-out score of a run, kept while it goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from ...convert.checkpoint.files import write_text
from ...convert.checkpoint.staging import replaced_directory

__all__ = ["Best", "keep_weights", "read_best", "read_weights"]

_RECORD_NAME = "best.json"


@dataclass(frozen=True)
class Best:
    """A step, and the held-out nats per token after it."""

    step: int
    nats_per_token: float

    @property
    def name(self) -> str:
        """The name of the directory of its weights."""
        return f"step-{self.step}"


def read_best(folder: Path) -> Best | None:
    """Read whose weights a folder holds; None where none are kept yet."""
    path = folder / _RECORD_NAME
    return Best(**json.loads(path.read_text())) if path.exists() else None


def keep_weights(folder: Path, best: Best, write: Callable[[Path], object]) -> None:
    """Keep weights, which `write` writes into a directory, in place of those in the folder, which stay until then."""
    with replaced_directory(folder / best.name) as staging:
        write(staging)
    write_text(folder / _RECORD_NAME, json.dumps(asdict(best)) + "\n")
    for other in folder.glob("step-*"):
        if other.name != best.name:
            shutil.rmtree(other)


def read_weights(folder: Path, best: Best) -> dict[str, Tensor]:
    """Read the weights that are kept in a folder."""
    files = sorted((folder / best.name).glob("*.safetensors"))
    return {name: tensor for path in files for name, tensor in load_file(path).items()}
