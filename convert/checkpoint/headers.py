"""What tensors a file of weights holds: the headers of safetensors, and the mapped tensors of a pickle."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError, UnsupportedError, first_line, is_out_of_memory
from .input_files import open_regular
from .json_files import parse_json, shortened
from .pickle_check import is_zip_of_torch, problem_of_pickles, problem_of_zip
from .tensors import DTYPE_BYTES, TORCH_DTYPES, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["checked_info", "load_pickle", "pickled_info", "read_header", "require_fetched", "safetensors_dtype"]

_LFS_BEGINNING = b"version https://git-lfs.github.com/spec/"
_MAX_HEADER_BYTES = 100_000_000  # of safetensors itself
_OTHER_DTYPES = {
    "bool": "BOOL",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2": "F8_E5M2",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
    **{f"int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": f"U{bits}" for bits in (8, 16, 32, 64)},
}
_PACKED_DTYPES = ("F4", "F6_E2M3", "F6_E3M2")  # of less than a byte
_PICKLE_HINT = "download it again, or save the model as safetensors"


def require_fetched(path: Path) -> None:
    """Raise CheckpointError for what cannot be read, and what Git leaves in place of a large file not yet fetched."""
    try:
        with open_regular(path) as file:
            is_pointer = file.read(len(_LFS_BEGINNING)) == _LFS_BEGINNING
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})", hint="check its permissions") from error
    if is_pointer:
        raise CheckpointError(
            f"{path}: a pointer of Git LFS ({path.stat().st_size} bytes), not the file itself",
            hint=f"fetch the files with `git lfs pull` in {path.parent}, or download the model with `hf download`",
        )


def read_header(path: Path, name: str) -> Iterator[TensorInfo]:
    """Yield the header of each tensor of one safetensors file, in file order.

    safetensors itself checks that the tensors fill the file, without a hole and with nothing behind the last, and that
    shapes and dtypes go with the number of bytes. Raises CheckpointError for what it refuses, and for a name that is in
    the header twice, of which it would take the last.
    """
    require_fetched(path)
    raw = b""
    try:
        with open_regular(path) as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            raw = file.read(min(header_bytes, _MAX_HEADER_BYTES))
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        strange = _strange_dtype(raw, str(path))
        if strange is not None:
            raise CheckpointError(
                f"{path}: {strange[0]} has dtype {shortened(strange[1])}, which safetensors does not have",
                hint="save the model again without it, or with a newer version of what wrote it",
            ) from error
        raise CheckpointError(
            f"{path}: not a valid safetensors file, or truncated ({first_line(error)})",
            hint="download the file again",
        ) from error
    header = parse_json(raw, f"{path}: its header", unique=True)
    header.pop("__metadata__", None)
    start = 8 + header_bytes
    for tensor, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        yield TensorInfo(tensor, entry["dtype"], tuple(entry["shape"]), name, start + begin, start + end)


def _strange_dtype(raw: bytes, where: str) -> tuple[str, object] | None:
    """A tensor in the header of a file that safetensors refused, and its dtype, if that is none of safetensors'."""
    try:
        header = parse_json(raw, where)
    except CheckpointError:
        return None
    entries = header.items() if isinstance(header, dict) else ()
    dtypes = {name: entry["dtype"] for name, entry in entries if isinstance(entry, dict) and "dtype" in entry}
    known = {*DTYPE_BYTES, *_PACKED_DTYPES}
    return next((item for item in dtypes.items() if not isinstance(item[1], str) or item[1] not in known), None)


def checked_info(name: str, dtype: Any, shape: Any, offsets: Any, file: str) -> TensorInfo:
    """Return the header of a tensor that nobody has checked. Raises CheckpointError where it contradicts itself."""
    numbers = (*shape, *offsets) if isinstance(shape, list | tuple) and isinstance(offsets, list | tuple) else ("",)
    if all(isinstance(number, int) and number >= 0 for number in numbers) and len(offsets) == 2:
        info = TensorInfo(name, str(dtype), tuple(shape), file, *offsets)
        size = DTYPE_BYTES.get(info.dtype)
        if info.dtype in _PACKED_DTYPES or (size is not None and info.num_bytes == size * info.num_elements):
            return info
    raise CheckpointError(
        f"{file}: {name} has shape {shortened(shape)}, dtype {shortened(dtype)} and bytes {shortened(offsets)}, which "
        "do not go together",
        hint="the file on the hub is damaged",
    )


def load_pickle(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a pytorch_model.bin, mapped, not read. Code in the pickle is refused, never run.

    Raises CheckpointError also for a pickle that says it holds more than is in the file, or would make more of it.
    """
    import torch

    require_fetched(path)
    try:
        is_zip = is_zip_of_torch(path)  # torch before 1.6 wrote a format that cannot be mapped
        problem = problem_of_zip(path) if is_zip else problem_of_pickles(path)
        if problem is not None:
            raise CheckpointError(f"{path}: {problem}", hint=_PICKLE_HINT)
        with warnings.catch_warnings(action="ignore"):  # of a protocol that the file claims, for example
            state = torch.load(path, map_location="cpu", mmap=is_zip, weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # zip, pickle and torch each have errors of their own
        if is_out_of_memory(error):
            raise
        raise CheckpointError(
            f"{path}: not a file of tensors that torch reads without running code ({first_line(error)[:200]})",
            hint=_PICKLE_HINT,
        ) from error
    if not isinstance(state, dict) or not all(_is_named_tensor(*item) for item in state.items()):
        raise CheckpointError(f"{path}: holds something else than named tensors")
    for name, tensor in state.items():
        stored = tensor.untyped_storage().nbytes()
        if tensor.nbytes > stored:
            raise CheckpointError(
                f"{path}: {name} is {tensor.nbytes} bytes, and the file has {stored} of them",
                hint="save the model again with every tensor made contiguous",
            )
    return state


def _is_named_tensor(name: object, tensor: object) -> bool:
    """Whether an entry is a name that a file can hold, and a tensor with values."""
    import torch

    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
        return False
    is_plain = tensor.layout is torch.strided and not tensor.is_quantized and tensor.device.type == "cpu"
    return is_plain and not any("\ud800" <= character <= "\udfff" for character in name)


def safetensors_dtype(tensor: Tensor) -> str | None:
    """Return what safetensors calls the dtype of a tensor; None for one that it cannot hold."""
    dtypes = {torch_name: name for name, torch_name in TORCH_DTYPES.items()} | _OTHER_DTYPES
    return dtypes.get(str(tensor.dtype).removeprefix("torch."))


def pickled_info(name: str, tensor: Tensor, file: str) -> TensorInfo:
    """Return the header of a tensor of a pickle. Raises UnsupportedError for a dtype that safetensors cannot hold."""
    dtype = safetensors_dtype(tensor)
    if dtype is None:
        raise UnsupportedError(f"{name} has dtype {tensor.dtype}, which safetensors cannot hold ({file})")
    return TensorInfo(name, dtype, tuple(tensor.shape), file, 0, tensor.nbytes)
