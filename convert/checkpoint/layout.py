"""Which files of a directory or repository are the model: its config and its weights, as transformers chooses them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import Any

from ..errors import CheckpointError
from .json_files import shortened
from .tensors import CONFIG_NAME, INDEX_NAME, PICKLE_INDEX_NAME, PICKLE_NAME, WEIGHTS_NAME

__all__ = ["WEIGHT_SUFFIXES", "Listing", "WeightFiles", "choose_weights", "goes_with_weights", "read_config"]

# transformers.modeling_utils._get_resolved_checkpoint_files, in its order
_ORDER = (WEIGHTS_NAME, INDEX_NAME, PICKLE_NAME, PICKLE_INDEX_NAME)
# transformers.distributed.checkpoint: files of this name come before all others
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
WEIGHT_SUFFIXES = tuple(
    f".{ending}"
    for ending in (
        *("safetensors", "bin", "pt", "pth", "ckpt", "h5", "msgpack", "ot", "npz", "pkl", "distcp"),
        *("gguf", "ggml", "onnx", "onnx_data", "tflite", "nemo", "engine", "mlmodel", "mlpackage"),
    )
)
_OTHER_FORMATS = ("original/", "onnx/", "metal/")  # the same model for other programs
_MODULE_FOLDER = re.compile(r"\d+_\w+/")  # a module of sentence-transformers, such as 2_Dense, has small weights
_DOWNLOAD_AGAIN = "download the checkpoint again"


@dataclass(frozen=True)
class Listing:
    """The files of a directory or hub repository.

    `place` is what messages call it, and `names` are those of its files, without those in its folders. `has` says
    whether there is a file of a name, which may lead into a folder. `read_json` gives the JSON object in a file, and
    raises CheckpointError where there is none.
    """

    place: str
    names: frozenset[str]
    has: Callable[[str], bool]
    read_json: Callable[[str], dict[str, Any]]


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold the tensors of a model, in order, and the index that lists them, where there is one.

    `weight_map` is that of the index: the file of each tensor. `unread` names other weights that lie beside them.
    """

    files: tuple[str, ...]
    index: str | None = None
    weight_map: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    unread: tuple[str, ...] = ()


def read_config(listing: Listing) -> dict[str, Any]:
    """Return the config that transformers reads: that of config.json, or of the file that it names for this version.

    Raises CheckpointError where a file is missing or holds no JSON object.
    """
    config = listing.read_json(CONFIG_NAME)
    versions = config.get("configuration_files")
    if versions is None:
        return config
    if not isinstance(versions, list) or not all(isinstance(name, str) for name in versions):
        raise CheckpointError(
            f"{listing.place}: {CONFIG_NAME} has configuration_files = {shortened(versions)}, expected a list of names"
        )
    from transformers.configuration_utils import get_configuration_file

    name = get_configuration_file(versions)
    if name == CONFIG_NAME:
        return {key: value for key, value in config.items() if key != "configuration_files"}
    if not _is_below(name):
        raise CheckpointError(f"{listing.place}: {CONFIG_NAME} names {shortened(name)}, which is not in that directory")
    if not listing.has(name):
        raise CheckpointError(f"{listing.place}: {name} is missing ({CONFIG_NAME} names it)", hint=_DOWNLOAD_AGAIN)
    return listing.read_json(name)


def choose_weights(listing: Listing, config: Mapping[str, Any]) -> WeightFiles | None:
    """Return the files that transformers reads the weights from, or None where there is none that it reads.

    That is the file that config.json names as its `transformers_weights`, or else the first of model.safetensors, its
    index, pytorch_model.bin and its index. Raises CheckpointError where what is named is not there or is no such file,
    and for the distributed checkpoints that transformers prefers to all of these.
    """
    distributed = sorted(name for name in listing.names if _DISTRIBUTED.fullmatch(name))
    if distributed:
        raise CheckpointError(
            f"{listing.place}: {distributed[0]} is part of a distributed checkpoint, which transformers opens first",
            hint="open it with transformers and save it whole with save_pretrained, or move those files away",
        )
    found = [name for name in _ORDER if name in listing.names]
    named = config.get("transformers_weights")
    if named is not None:
        found = [_named(listing, named), *(name for name in found if name != named)]
    if not found:
        return None
    chosen = _files_of(listing, found[0])
    for file in chosen.files:
        if not listing.has(file):
            raise CheckpointError(
                f"{listing.place}: shard {file} is missing ({chosen.index} names it)", hint=_DOWNLOAD_AGAIN
            )
    return replace(chosen, unread=tuple(name for name in found[1:] if not _is_part_of(listing, name, chosen)))


def _files_of(listing: Listing, name: str) -> WeightFiles:
    """The files that one of the usual names stands for: itself, or the shards of an index."""
    if not name.endswith(".index.json"):
        return WeightFiles((name,))
    weight_map = listing.read_json(name).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        found = "" if weight_map is None else f" ({shortened(weight_map)})"
        raise CheckpointError(f"{listing.place}/{name}: weight_map is missing or empty{found}")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not _is_below(file):
            raise CheckpointError(
                f"{listing.place}/{name}: weight_map has {shortened(tensor)} in {shortened(file)}, expected the name "
                "of a file of that directory",
                hint=_DOWNLOAD_AGAIN,
            )
    return WeightFiles(tuple(sorted(set(weight_map.values()))), name, weight_map)


def _is_below(name: str) -> bool:
    """Whether a name leads to a file of the directory, or of a folder in it, where transformers takes them too."""
    parts = PurePosixPath(name).parts
    return bool(parts) and not PurePosixPath(name).is_absolute() and ".." not in parts and "\\" not in name


def _is_part_of(listing: Listing, name: str, chosen: WeightFiles) -> bool:
    """Whether a name stands for files that are read anyway: an index can list the one file that there is."""
    try:
        return set(_files_of(listing, name).files) <= set(chosen.files)
    except CheckpointError:
        return False


def _named(listing: Listing, name: object) -> str:
    """The file that config.json names. Raises CheckpointError for what transformers would not take."""
    said = f"{listing.place}: {CONFIG_NAME} has transformers_weights = {shortened(name)}"
    if not isinstance(name, str) or not name.endswith((".safetensors", ".safetensors.index.json")):
        raise CheckpointError(f"{said}, which is no safetensors file and no index of some")
    if not _is_below(name):
        raise CheckpointError(f"{said}, which is not in that directory")
    if not listing.has(name):
        raise CheckpointError(f"{said}, and there is no such file", hint=_DOWNLOAD_AGAIN)
    return name


def goes_with_weights(name: str) -> bool:
    """Return whether a file of a hub repository is of use beside the weights: not other weights, in no other format."""
    if _MODULE_FOLDER.match(name):
        return not name.endswith(".onnx")
    return not name.startswith(_OTHER_FORMATS) and not name.endswith(WEIGHT_SUFFIXES)
