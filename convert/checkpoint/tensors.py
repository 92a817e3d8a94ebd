"""A read-only checkpoint: its config, the headers of its safetensors files, and single tensors on demand."""

from __future__ import annotations

import mmap
import os
import re
import warnings
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, UnsupportedError, in_one_line
from .config_classes import full_config
from .finite import count_nonfinite

if TYPE_CHECKING:
    from torch import Tensor

    from .weights_file import Sink

__all__ = ["DTYPE_BYTES", "OLD_BUFFERS", "Checkpoint", "TensorInfo", "tensor_bytes", "torch_dtype"]

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
PICKLE_NAME = "pytorch_model.bin"
PICKLE_INDEX_NAME = "pytorch_model.bin.index.json"

DTYPE_BYTES = MappingProxyType(
    {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
    | {"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1}
    | {"C64": 8, "U64": 8, "U32": 4, "U16": 2}
)
TORCH_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_FLOAT_DTYPES = TORCH_DTYPES | {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}


# what older versions saved among the weights and newer ones compute
OLD_BUFFERS = re.compile(
    r"(?<!c_)(attn|attention)\.(bias|masked_bias|causal_mask)$|rotary_emb\.inv_freq$|(^|\.)(decoder|embed_positions)\.(version|_float_tensor)$"
)

_COPY_CHUNK_BYTES = 16 * 2**20


def torch_dtype(dtype: str) -> Any:
    """Return the torch dtype that safetensors calls "BF16", "F16", "F32" or "F64". Raises KeyError for any other."""
    import torch

    return getattr(torch, TORCH_DTYPES[dtype])


def tensor_bytes(tensor: Tensor) -> bytes:
    """Return the values of a CPU tensor as safetensors stores them: row by row, little endian."""
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _lookup(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return config


def _count_in_bytes(chunk: memoryview, dtype: str) -> int:
    """How many values in the bytes of a tensor, whose dtype has safetensors' name, are not finite."""
    import torch

    if dtype not in _FLOAT_DTYPES:
        return 0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*buffer is not writable")  # nobody writes to it
        values = torch.frombuffer(chunk, dtype=getattr(torch, _FLOAT_DTYPES[dtype]))
    return count_nonfinite(values)


@dataclass(frozen=True)
class TensorInfo:
    """The header of a tensor: its dtype by safetensors' name, its shape, and where its bytes lie in `file`.

    `begin` and `end` are positions in the file for safetensors. In a pytorch_model.bin they count from the tensor's
    first byte.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        """The size of the tensor in bytes."""
        return self.end - self.begin

    @property
    def num_elements(self) -> int:
        """The number of values in the tensor."""
        count = 1
        for size in self.shape:
            count *= size
        return count


class _Mapped:
    """A file that is open, and its bytes in memory, which the kernel reads as they are looked at."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        self._close = weakref.finalize(self, os.close, self.descriptor)  # where nobody closes a checkpoint
        self.bytes = mmap.mmap(self.descriptor, 0, access=mmap.ACCESS_READ)
        if hasattr(mmap, "MADV_SEQUENTIAL"):
            self.bytes.madvise(mmap.MADV_SEQUENTIAL)

    def close(self) -> None:
        self.bytes.close()
        self._close()


@dataclass
class Checkpoint:
    """An opened, read-only checkpoint: its config and headers are in memory, and tensors are read one at a time.

    `path` is None where only the headers of a hub repository were fetched, so that no tensor can be read. `pickled`
    holds the tensors of pytorch_model.bin files, mapped from the disk. `config` is what holds of these tensors: an
    entry of the file that does not is left out of it. `notes` are sentences about the files that a person should know.
    `quantised` says why it cannot be converted where its weights are quantised, and is None where they are not.
    `unsaved` maps tensors that an index lists and no file holds to the file that it names. `accepted` says that it was
    opened in its class before, if that class may run, and need not be again.

    Every tensor that is read or copied is checked on the way: one with a value that is infinite or not a number raises
    CheckpointError, unless `allow_nonfinite` is set. `nonfinite` counts these values, for the tensors seen so far that
    have any.
    """

    name: str
    path: Path | None
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    size_on_disk_bytes: int
    pickled: dict[str, dict[str, Tensor]] = field(default_factory=dict, repr=False)
    notes: tuple[str, ...] = ()
    quantised: str | None = None
    unsaved: Mapping[str, str] = field(default_factory=dict)
    accepted: bool = False
    allow_nonfinite: bool = False
    nonfinite: dict[str, int] = field(default_factory=dict, repr=False)
    _maps: dict[str, _Mapped] = field(default_factory=dict, repr=False)
    _mapping: Lock = field(default_factory=Lock, repr=False)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Unmap the files that tensors were read from."""
        for mapped in self._maps.values():
            mapped.close()
        self._maps.clear()

    @property
    def route(self) -> tuple[str, ...]:
        """Each `model_type` that it was translated to, in order; () for a checkpoint as its files hold it."""
        return ()

    @property
    def original(self) -> Checkpoint:
        """The checkpoint as its files hold it: this one, unless it was translated."""
        return self

    @property
    def directory(self) -> Path:
        """The directory that holds the checkpoint. Raises CheckpointError where only headers were fetched."""
        if self.path is None:
            raise CheckpointError(f"{self.name}: only its headers were fetched, its files are not on this machine")
        return self.path

    def counted_tensors(self, names: Iterable[str] | None = None) -> list[TensorInfo]:
        """Return the headers of the tensors that are parameters of the model: all, or those with these names."""
        chosen = self.tensors if names is None else set(names)
        return [info for name, info in self.tensors.items() if name in chosen]

    @cached_property
    def num_parameters(self) -> int:
        """The number of values of all parameters."""
        return sum(info.num_elements for info in self.counted_tensors())

    @cached_property
    def dtype(self) -> str:
        """The safetensors name of the dtype that most parameters have."""
        counts: dict[str, int] = {}
        for info in self.counted_tensors():
            counts[info.dtype] = counts.get(info.dtype, 0) + info.num_elements
        return max(counts, key=lambda dtype: counts[dtype])

    @cached_property
    def full_config(self) -> dict[str, Any]:
        """The config with the values that its class has where config.json says nothing (`config_classes.full_config`).

        Raises CheckpointError where the class cannot hold what config.json says.
        """
        try:
            return full_config(self.config)
        except Exception as error:  # a config can be wrong in more ways than transformers has words for
            named = re.search(r"field '(\w+)'", str(error))  # of its strict dataclasses
            if named is None or named[1] not in self.config:
                reason = f"transformers cannot read its config.json ({in_one_line(error)})"
            else:
                value, model_type = self.config[named[1]], self.config["model_type"]
                reason = f"config.json has {named[1]} = {value!r}, which the class of {model_type} does not take"
            raise CheckpointError(f"{self.name}: {reason}") from error

    def config_value(self, key: str) -> Any:
        """Return a value of the full config, or None if it is absent; a dot in `key` leads into a section."""
        return _lookup(self.full_config, key)

    def stated(self, key: str) -> Any:
        """Return what config.json itself says, or None if it leaves it to its class; dots as in `config_value`."""
        return _lookup(self.config, key)

    def config_int(self, key: str, *, default: int | None = None) -> int:
        """Return a positive integer of the full config, or `default` if it is absent or null.

        Raises CheckpointError for anything else.
        """
        value = self.config_value(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f"{self.name}: config.json has {key} = {value!r}, expected a positive integer")
        return value

    def read(self, name: str) -> Tensor:
        """Return a copy of one tensor on the CPU, in the dtype that it is stored in.

        Raises UnsupportedError for a tensor of integers or of 8-bit floats, and CheckpointError for one with values
        that are not finite, where these are not allowed.
        """
        import torch

        self.check_readable(name)
        info = self.tensors[name]
        if info.file in self.pickled:
            tensor = self.pickled[info.file][name].clone()
        else:
            raw = bytearray(self._map(info.file).bytes[info.begin : info.end])
            self._forget(info)
            tensor = torch.frombuffer(raw, dtype=torch_dtype(info.dtype)).reshape(info.shape)
        self._note_nonfinite(info, count_nonfinite(tensor))
        return tensor

    def check_readable(self, name: str) -> None:
        """Raise UnsupportedError for a tensor of integers or of 8-bit floats, which `read` does not return."""
        info = self.tensors[name]
        if info.dtype not in TORCH_DTYPES:
            raise UnsupportedError(
                f"{name} has dtype {info.dtype}, which cannot be averaged ({info.file})",
                hint="convert a checkpoint whose attention weights are float32, float16 or bfloat16",
            )

    def copy_bytes(self, name: str, target: Sink) -> None:
        """Append the bytes of one tensor, of any dtype, to `target`.

        Raises CheckpointError for one with values that are not finite, where these are not allowed.
        """
        info = self.tensors[name]
        if info.file in self.pickled:
            tensor = self.pickled[info.file][name]
            target.write(tensor_bytes(tensor))
            self._note_nonfinite(info, count_nonfinite(tensor) if info.dtype in TORCH_DTYPES else 0)
            return
        count = 0
        mapped = self._map(info.file)
        with memoryview(mapped.bytes) as view:
            for begin in range(info.begin, info.end, _COPY_CHUNK_BYTES):
                with view[begin : min(begin + _COPY_CHUNK_BYTES, info.end)] as chunk:
                    target.copy(mapped.descriptor, begin, chunk)
                    count += _count_in_bytes(chunk, info.dtype)
        self._forget(info)
        self._note_nonfinite(info, count)

    def position(self, name: str) -> int | None:
        """Where the bytes of a tensor begin in the file that they are copied from; None where they are made."""
        info = self.tensors[name]
        return None if info.file in self.pickled else info.begin

    def _note_nonfinite(self, info: TensorInfo, count: int) -> None:
        if not count or OLD_BUFFERS.search(info.name):
            return
        self.nonfinite[info.name] = count
        if not self.allow_nonfinite:
            raise CheckpointError(
                f"{info.file}: {count} of {info.num_elements} values of {info.name} are infinite or not a number",
                hint="the file is damaged, or the training that wrote it diverged; use another copy, or allow such "
                "values to be kept",
                settings=("allow_nonfinite",),
            )

    def _map(self, file: str) -> _Mapped:
        with self._mapping:
            if file not in self._maps:
                self._maps[file] = _Mapped(self.directory / file)
            return self._maps[file]

    def _forget(self, info: TensorInfo) -> None:
        """Let the kernel drop the tensor's pages, so that memory does not grow with the checkpoint."""
        if hasattr(mmap, "MADV_DONTNEED"):
            begin = info.begin // mmap.PAGESIZE * mmap.PAGESIZE
            self._map(info.file).bytes.madvise(mmap.MADV_DONTNEED, begin, info.end - begin)
