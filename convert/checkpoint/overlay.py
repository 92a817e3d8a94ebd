"""Tensors that a method computed in advance, in files of their own, which a plan reads beside those of the source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open

from .output import disk_errors

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Overlay"]


@dataclass(frozen=True)
class Overlay:
    """The tensors in the safetensors files of `directory`; `files` maps the name of each to its file."""

    directory: Path
    files: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, directory: Path) -> Overlay:
        """Return the overlay that lies in a directory, for example one that another process wrote."""
        files: dict[str, str] = {}
        for path in sorted(directory.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                files |= dict.fromkeys(file.keys(), path.name)
        return cls(directory, files)

    def store(self, tensors: Mapping[str, Tensor], file: str) -> None:
        """Write tensors to a new file of the directory. Raises OutputError where the disk is full."""
        from safetensors.torch import save_file

        with disk_errors(self.directory / file):
            save_file(dict(tensors), self.directory / file)
        self.files.update(dict.fromkeys(tensors, file))

    def read(self, name: str) -> Tensor:
        """Return one tensor on the CPU, in its own dtype. Raises KeyError for a name that no file has."""
        with safe_open(self.directory / self.files[name], "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor
