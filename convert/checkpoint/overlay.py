"""Tensors that a method computed in advance, in files of their own, which a plan reads beside those of the source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open

from .files import replaced_file
from .headers import safetensors_dtype
from .output import disk_errors
from .tensors import tensor_bytes
from .writer import TensorSpec, write_safetensors

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
        overlay = cls(directory)
        overlay.adopt(*sorted(path.name for path in directory.glob("*.safetensors")))
        return overlay

    def store(self, tensors: Mapping[str, Tensor], file: str) -> None:
        """Write tensors to a file of the directory, which is whole or not there.

        Raises OutputError where the disk is full.
        """
        # wider dtypes first, so that every tensor is aligned
        ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
        specs = [TensorSpec(name, _dtype(tensor), tuple(tensor.shape)) for name, tensor in ordered.items()]
        with disk_errors(self.directory / file), replaced_file(self.directory / file) as written:
            for spec in write_safetensors(written, specs, {}):
                written.write(tensor_bytes(ordered[spec.name].cpu()))
        self.adopt(file)

    def adopt(self, *files: str) -> None:
        """Count files that lie in the directory among those of the overlay."""
        for file in files:
            with safe_open(self.directory / file, "pt") as opened:
                self.files.update(dict.fromkeys(opened.keys(), file))

    def read_file(self, file: str) -> dict[str, Tensor]:
        """Return all tensors of a file, on the CPU, each in its own dtype."""
        with safe_open(self.directory / file, "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118, it is no dict

    def read(self, name: str) -> Tensor:
        """Return one tensor on the CPU, in its own dtype. Raises KeyError for a name that no file has."""
        with safe_open(self.directory / self.files[name], "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


def _dtype(tensor: Tensor) -> str:
    dtype = safetensors_dtype(tensor)
    assert dtype is not None, tensor.dtype
    return dtype
