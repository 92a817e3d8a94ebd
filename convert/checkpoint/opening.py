"""Opening a checkpoint, a directory or a hub id: its headers are read and checked, and no weight is loaded."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError, KvConvertError, UnsupportedError, first_line, is_out_of_memory
from .hub import hub_refusal
from .tensors import (
    CONFIG_NAME,
    INDEX_NAME,
    PICKLE_INDEX_NAME,
    PICKLE_NAME,
    TORCH_DTYPES,
    WEIGHTS_NAME,
    Checkpoint,
    TensorInfo,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["open_checkpoint", "weight_files"]

_OTHER_DTYPES = {"int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL"}
_MISSING_DIRECTORY_HINT = (
    "give a directory that holds config.json and safetensors files, or a hub id such as org/name "
    "(set HF_HUB_OFFLINE=1 to use only what is in the local cache)"
)


def open_checkpoint(model: str | Path, *, revision: str | None = None, headers_only: bool = False) -> Checkpoint:
    """Open a local directory or a hub id, and return the checkpoint with the headers of all its tensors.

    A hub id is downloaded to the hub cache (HF_HOME, HF_HUB_OFFLINE and HF_TOKEN are honoured); with `headers_only`
    only config.json and the headers of its safetensors files are fetched. `revision` is its branch, tag or commit.
    Raises CheckpointError where a file is missing, truncated or corrupt, where an index names what is not there, and
    where the hub does not give the model: not found, no permission, no network.
    """
    name = str(model)
    path = Path(model).expanduser()
    if path.is_dir():
        return _open_directory(path, name)
    if path.exists():
        raise CheckpointError(f"{name} is a file, not a checkpoint directory", hint=_MISSING_DIRECTORY_HINT)
    if not _looks_like_hub_id(name):
        raise CheckpointError(f"{name}: no such directory", hint=_MISSING_DIRECTORY_HINT)
    return _open_hub(name, revision, headers_only)


def weight_files(directory: Path) -> tuple[list[str], Path | None]:
    """Return the sorted names of the weight files of a directory, and the path of the index that lists them, or None.

    safetensors files are preferred to pytorch_model.bin. Raises CheckpointError where there is neither.
    """
    for name, index_name in ((WEIGHTS_NAME, INDEX_NAME), (PICKLE_NAME, PICKLE_INDEX_NAME)):
        index_path = directory / index_name
        if index_path.exists():
            weight_map = _read_json(index_path).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise CheckpointError(f"{index_path}: weight_map is missing or empty")
            return sorted(set(weight_map.values())), index_path
        if (directory / name).exists():
            return [name], None
    found = sorted(path.name for path in directory.glob("*.safetensors"))
    described = f"has {', '.join(found[:3])} but no {INDEX_NAME}" if found else "holds no weights"
    raise CheckpointError(
        f"{directory}: {described}", hint=f"expected {WEIGHTS_NAME}, shards with {INDEX_NAME}, or {PICKLE_NAME}"
    )


def _open_directory(path: Path, name: str) -> Checkpoint:
    config_path = path / CONFIG_NAME
    if not config_path.exists():
        raise CheckpointError(f"{path}: no {CONFIG_NAME}", hint=_MISSING_DIRECTORY_HINT)
    files, index_path = weight_files(path)
    checkpoint = Checkpoint(name=name, path=path, config=_read_json(config_path), tensors={}, size_on_disk_bytes=0)
    for file in files:
        if not (path / file).exists():
            index_name = index_path.name if index_path else CONFIG_NAME
            raise CheckpointError(
                f"{path}: shard {file} is missing ({index_name} names it)", hint="download the checkpoint again"
            )
        checkpoint.size_on_disk_bytes += (path / file).stat().st_size
        if file.endswith(".safetensors"):
            infos = list(_read_header(path / file))
        else:
            checkpoint.pickled[file] = _load_pickle(path / file)
            infos = [_info(tensor_name, tensor, file) for tensor_name, tensor in checkpoint.pickled[file].items()]
        for info in infos:
            if info.name in checkpoint.tensors:
                raise CheckpointError(
                    f"{path}: {info.name} is in both {checkpoint.tensors[info.name].file} and {info.file}"
                )
            checkpoint.tensors[info.name] = info
    if index_path is not None:
        _check_index(index_path, checkpoint.tensors)
    return checkpoint


def _check_index(index_path: Path, tensors: dict[str, TensorInfo]) -> None:
    for tensor, file in _read_json(index_path)["weight_map"].items():
        if tensor not in tensors or tensors[tensor].file != file:
            raise CheckpointError(
                f"{index_path}: says that {tensor} is in {file}, but it is not there",
                hint="download the checkpoint again",
            )


def _load_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a pytorch_model.bin, mapped, not read. Code in the pickle is refused, never run."""
    import torch

    try:
        is_zip = zipfile.is_zipfile(path)  # torch before 1.6 wrote a format that cannot be mapped
        state = torch.load(path, map_location="cpu", mmap=is_zip, weights_only=True)
    except Exception as error:  # zip, pickle and torch each have errors of their own
        if is_out_of_memory(error):
            raise
        raise CheckpointError(
            f"{path}: not a file of tensors that torch reads without running code ({first_line(error)[:200]})",
            hint="download it again, or save the model as safetensors",
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: holds something else than named tensors")
    return state


def _info(name: str, tensor: Tensor, file: str) -> TensorInfo:
    dtypes = {torch_name: name for name, torch_name in TORCH_DTYPES.items()} | _OTHER_DTYPES
    dtype = dtypes.get(str(tensor.dtype).removeprefix("torch."))
    if dtype is None:
        raise UnsupportedError(f"{name} has dtype {tensor.dtype}, which safetensors cannot hold ({file})")
    return TensorInfo(name, dtype, tuple(tensor.shape), file, 0, tensor.nbytes)


def _read_header(path: Path) -> Iterator[TensorInfo]:
    """Tensor infos of one safetensors file, in file order; safetensors itself validates header and length."""
    try:
        with safe_open(path, framework="numpy"):
            pass
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_bytes))
    except PermissionError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})", hint="check its permissions") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not a valid safetensors file, or truncated ({first_line(error)})",
            hint="download the file again",
        ) from error
    header.pop("__metadata__", None)
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        start = 8 + header_bytes
        yield TensorInfo(name, entry["dtype"], tuple(entry["shape"]), path.name, start + begin, start + end)


def _open_hub(repo_id: str, revision: str | None, headers_only: bool) -> Checkpoint:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import NotASafetensorsRepoError

    skipped = ["*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.ot", "original/*", "onnx/*"]
    try:
        if not headers_only or os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}:
            snapshot = Path(snapshot_download(repo_id, revision=revision, ignore_patterns=skipped))
            if not any(snapshot.glob("*.safetensors")):
                snapshot_download(repo_id, revision=revision, allow_patterns=["pytorch_model*"])
            return _open_directory(snapshot, repo_id)
        config_path = hf_hub_download(repo_id, CONFIG_NAME, revision=revision)
        metadata = HfApi().get_safetensors_metadata(repo_id, revision=revision)
    except KvConvertError:
        raise
    except NotASafetensorsRepoError:
        return _open_hub(repo_id, revision, headers_only=False)  # pickles have no headers that could be read alone
    except Exception as error:  # the HTTP library behind the hub has errors of its own
        if is_out_of_memory(error):
            raise
        reason, hint = hub_refusal(error, "model", revision)
        raise CheckpointError(
            f"{repo_id}: {reason}; there is no directory of this name either", hint=hint or _MISSING_DIRECTORY_HINT
        ) from error
    tensors = {
        name: TensorInfo(name, info.dtype, tuple(info.shape), file, *info.data_offsets)
        for file, file_metadata in metadata.files_metadata.items()
        for name, info in file_metadata.tensors.items()
    }
    size = sum(info.num_bytes for info in tensors.values())
    return Checkpoint(repo_id, None, _read_json(Path(config_path)), tensors, size)


def _looks_like_hub_id(name: str) -> bool:
    parts = name.split("/")
    return len(parts) <= 2 and all(parts) and not name.startswith((".", "/", "~")) and "\\" not in name


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({first_line(error)})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return content
