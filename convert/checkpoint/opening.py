"""Opening a checkpoint, a directory or a hub id: its headers are read and checked, and no weight is loaded."""

from __future__ import annotations

import glob
import math
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, InputError, KvConvertError, is_out_of_memory
from .config_classes import MOST_POSITIONS
from .foreign import cached_repository, explanation, file_explanation, wrapped_names
from .headers import checked_info, load_pickle, pickled_info, read_header, require_fetched
from .hub import ANSWER_SECONDS, hub_refusal, is_unreachable, quiet_hub
from .input_files import is_file, leads_outside, require_regular
from .json_files import DEPTH_KEYS, check_provenance, check_values, read_object
from .layout import WEIGHT_SUFFIXES, Listing, WeightFiles, choose_weights, goes_with_weights, read_config
from .manifest import PROVENANCE_NAME
from .quantisation import BITSANDBYTES, declared_method, quantised_refusal
from .tensors import (
    CONFIG_NAME,
    INDEX_NAME,
    PICKLE_INDEX_NAME,
    PICKLE_NAME,
    WEIGHTS_NAME,
    Checkpoint,
    TensorInfo,
)
from .tokenizer import TOKENIZER_FILES

__all__ = ["open_checkpoint"]

_NUM_CONNECTIONS = 8
_QUANTISATION_KEYS = ("quantization_config", "_pre_quantization_dtype")
_MISSING_DIRECTORY_HINT = (
    "give a directory that holds config.json and safetensors files, or a hub id such as org/name "
    "(set HF_HUB_OFFLINE=1 to use only what is in the local cache)"
)

_POSITION_KEYS = ("max_position_embeddings", "n_positions")
_PUT_THE_FILE = (
    "give the directory in which the files really are, or put the file itself, or a hard link to it, there; a "
    "directory that is a link is read, and so are links within it and into the hub's cache"
)
# what is read of a directory whenever it is there; transformers would wait for a named pipe
_READ_NAMES = frozenset(
    {CONFIG_NAME, WEIGHTS_NAME, INDEX_NAME, PICKLE_NAME, PICKLE_INDEX_NAME}
    | {"generation_config.json", "adapter_config.json", "modules.json", PROVENANCE_NAME, *TOKENIZER_FILES}
)


def open_checkpoint(model: str | Path, *, revision: str | None = None, headers_only: bool = False) -> Checkpoint:
    """Open a local directory or a hub id, and return the checkpoint with the headers of all its tensors.

    A hub id is downloaded to the hub cache (HF_HOME, HF_HUB_OFFLINE and HF_TOKEN are honoured); with `headers_only`
    only config.json and the headers of its safetensors files are fetched. `revision` is its branch, tag or commit.
    Which files are the weights is decided as in transformers (`choose_weights`). Raises InputError for a revision of a
    directory, which has none, and CheckpointError where a file is missing, truncated or corrupt, where two files hold
    one tensor, and where the hub does not give the model: not found, no permission, no network.
    """
    name = str(model)
    path = _path(model)
    if os.path.isdir(path):  # noqa: PTH112, as Path.is_dir raises OSError for a name that is too long
        if revision is not None:
            raise InputError(
                f"{name} is a directory, which has no revisions, and {revision!r} was asked for",
                hint="give a hub id, or leave the revision out",
                settings=("revision",),
            )
        repository, commit = cached_repository(path) or (None, None)
        if repository is not None and commit is None:
            raise CheckpointError(
                f"{name}: a folder of the hub's cache, not a checkpoint",
                hint=f"give {repository}, which comes from the cache with HF_HUB_OFFLINE=1, or one of its snapshots",
            )
        return _open_directory(path, name)
    if os.path.exists(path):  # noqa: PTH110, as above
        known = file_explanation(path.name)
        if known is not None:
            raise CheckpointError(f"{name}: {known[0]}", hint=known[1])
        raise CheckpointError(f"{name} is a file, not a checkpoint directory", hint=_MISSING_DIRECTORY_HINT)
    if not _looks_like_hub_id(name):
        raise CheckpointError(f"{name}: no such directory", hint=_MISSING_DIRECTORY_HINT)
    with quiet_hub():
        return _open_hub(name, revision, headers_only)


def _path(model: str | Path) -> Path:
    try:
        return Path(model).expanduser()
    except RuntimeError:  # there is no such user
        return Path(model)


def _open_directory(path: Path, name: str) -> Checkpoint:
    listing, folders = _local_listing(path)
    config = _config(listing, folders)
    weights = _weights(listing, config, folders)
    if listing.has(PROVENANCE_NAME):
        check_provenance(listing.read_json(PROVENANCE_NAME), str(path / PROVENANCE_NAME))
    checkpoint = _checkpoint(name, path, config, weights)
    adapters = sorted(file for file in listing.names if file.startswith("adapter_model."))
    if adapters and listing.has("adapter_config.json"):
        checkpoint.notes += (f"{adapters[0]} in {path}: an adapter that is not merged, and no part of what is read",)
    for file in weights.files:
        _require_inside(path / file, path)
        checkpoint.size_on_disk_bytes += (path / file).stat().st_size
        if file.endswith(".safetensors"):
            infos = list(read_header(path / file, file))
        else:
            checkpoint.pickled[file] = load_pickle(path / file)
            infos = [
                pickled_info(tensor_name, tensor, file) for tensor_name, tensor in checkpoint.pickled[file].items()
            ]
        for info in infos:
            _add(checkpoint, info)
    _check(checkpoint, weights, listing)
    return checkpoint


def _config(listing: Listing, folders: Iterable[str]) -> dict[str, Any]:
    if listing.has(CONFIG_NAME):
        config = read_config(listing)
        check_values(config, f"{listing.place}: {CONFIG_NAME}")
        return config
    what, hint = explanation(listing, folders) or (f"no {CONFIG_NAME}", _MISSING_DIRECTORY_HINT)
    raise CheckpointError(f"{listing.place}: {what}", hint=hint)


def _weights(listing: Listing, config: Mapping[str, Any], folders: Iterable[str]) -> WeightFiles:
    weights = choose_weights(listing, config)
    if weights is not None:
        return weights
    known = explanation(listing, folders)
    if known is not None:
        raise CheckpointError(f"{listing.place}: {known[0]}", hint=known[1])
    found = sorted(name for name in listing.names if name.endswith(".safetensors"))
    described = f"has {', '.join(found[:3])} but no {INDEX_NAME}" if found else "holds no weights"
    raise CheckpointError(
        f"{listing.place}: {described}", hint=f"expected {WEIGHTS_NAME}, shards with {INDEX_NAME}, or {PICKLE_NAME}"
    )


def _checkpoint(name: str, path: Path | None, config: dict[str, Any], weights: WeightFiles) -> Checkpoint:
    """The checkpoint, still without tensors, with a note on weights that are not read."""
    chosen = weights.index or weights.files[0]
    notes = []
    if weights.unread and path is not None:
        others = " and ".join(weights.unread)
        notes.append(f"{others} in {path}: not read, since transformers opens {chosen}")
    # true of the files' names, which a result has of its own
    kept = {key: value for key, value in config.items() if key != "transformers_weights"}
    return Checkpoint(name, path, kept, {}, 0, notes=tuple(notes))


def _add(checkpoint: Checkpoint, info: TensorInfo) -> None:
    known = checkpoint.tensors.setdefault(info.name, info)
    if known is not info:
        raise CheckpointError(
            f"{checkpoint.name}: {info.name} is in both {known.file} and {info.file}",
            hint="remove the file that does not belong to it, or download the checkpoint again",
        )


def _check(checkpoint: Checkpoint, weights: WeightFiles, listing: Listing) -> None:
    """Say of the headers what a person should know. Raises CheckpointError for names that no class has."""
    if not checkpoint.tensors:
        raise CheckpointError(f"{checkpoint.name}: no tensor is in {', '.join(weights.files[:3])}")
    wrapped = wrapped_names(checkpoint.tensors)
    if wrapped is not None:
        raise CheckpointError(f"{checkpoint.name}: {wrapped[0]}", hint=wrapped[1])
    _require_gathered(checkpoint)
    _require_buildable(checkpoint)
    _compare(checkpoint, weights)
    _judge_dtype(checkpoint, listing)


def _require_gathered(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError for parameters without a value, which DeepSpeed ZeRO-3 leaves of those it has sharded."""
    empty = sorted(name for name, info in checkpoint.tensors.items() if info.num_elements == 0)
    if empty:
        raise CheckpointError(
            f"{checkpoint.name}: {len(empty)} of {len(checkpoint.tensors)} tensors are empty, first {empty[0]}, whose "
            f"shape is {list(checkpoint.tensors[empty[0]].shape)}",
            hint="DeepSpeed ZeRO-3 leaves sharded weights so: gather them with its zero_to_fp32.py, or save them with "
            "stage3_gather_16bit_weights_on_model_save",
        )


def _require_buildable(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError where building what config.json says would take all time or memory.

    Every layer has a tensor at least, and some classes compute a table of all positions.
    """
    sections = (checkpoint.config, checkpoint.config.get("text_config"))
    num_tensors = len(checkpoint.tensors)
    model_type = checkpoint.config.get("model_type")
    most_positions = MOST_POSITIONS.get(model_type, math.inf) if isinstance(model_type, str) else math.inf
    for key, number in (item for section in sections if isinstance(section, dict) for item in section.items()):
        said = f"{checkpoint.name}: {CONFIG_NAME} has {key} = {number}"
        if not isinstance(number, int):
            continue
        if re.fullmatch(DEPTH_KEYS, key) and number > num_tensors:
            raise CheckpointError(
                f"{said}, and there are {num_tensors} tensors, of which every layer needs one at least",
                hint="config.json and the weights belong to different models, or one of them was edited",
            )
        if key in _POSITION_KEYS and number > most_positions:
            raise CheckpointError(f"{said}, expected at most {most_positions}, since {model_type} has a table of them")


def _compare(checkpoint: Checkpoint, weights: WeightFiles) -> None:
    """Note what an index lists otherwise than the files hold it: transformers reads the files, whatever it says."""
    wrong = [
        name
        for name, file in weights.weight_map.items()
        if name in checkpoint.tensors and checkpoint.tensors[name].file != file
    ]
    if wrong:
        info = checkpoint.tensors[wrong[0]]
        checkpoint.notes += (
            f"{weights.index} says that {info.name} is in {weights.weight_map[info.name]}; it is read from {info.file}",
        )
    checkpoint.unsaved = {name: file for name, file in weights.weight_map.items() if name not in checkpoint.tensors}


def _judge_dtype(checkpoint: Checkpoint, listing: Listing) -> None:
    """Say whether the weights are quantised, and leave out of config what is not true of them.

    bitsandbytes quantises a model when it is loaded, and its entry stays in config.json when the weights that were
    merged or trained are saved as floats.
    """
    checkpoint.quantised = quantised_refusal(checkpoint.config, checkpoint.tensors, listing.names)
    if checkpoint.quantised is None and declared_method(checkpoint.config) == BITSANDBYTES:
        config = checkpoint.config
        checkpoint.config = {key: value for key, value in config.items() if key not in _QUANTISATION_KEYS}
        checkpoint.notes += (
            f"{CONFIG_NAME} says that bitsandbytes quantises the weights, and they are {checkpoint.dtype}: "
            "they are taken as they are, and quantization_config is left out",
        )


def _local_listing(path: Path) -> tuple[Listing, list[str]]:
    """The files of a directory, and the names of its folders. Raises CheckpointError where it cannot be read."""
    try:
        entries = list(path.iterdir())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})", hint="check its permissions") from error

    def read(name: str) -> dict[str, Any]:
        _require_inside(path / name, path)
        return _read_json(path / name)

    names = frozenset(entry.name for entry in entries if entry.is_file())
    _require_readable(path, entries)
    return Listing(str(path), names, lambda name: is_file(path / name), read), [
        entry.name for entry in entries if entry.is_dir()
    ]


def _require_readable(path: Path, entries: Iterable[Path]) -> None:
    """Raise CheckpointError where a name that is always read is no regular file, or leads out of the checkpoint."""
    for entry in sorted(entries):
        if entry.name in _READ_NAMES and not entry.is_dir():
            _require_inside(entry, path)
            try:
                require_regular(entry)
            except OSError as error:
                raise CheckpointError(f"{entry}: cannot be read ({error.strerror})", hint=_PUT_THE_FILE) from error


def _require_inside(file: Path, directory: Path) -> None:
    """Raise CheckpointError for a link that leads out of the checkpoint: what a result holds is in its source."""
    outside = leads_outside(file, directory)
    if outside is not None:
        raise CheckpointError(f"{file}: a link to {outside}, outside of the checkpoint", hint=_PUT_THE_FILE)


def _open_hub(repo_id: str, revision: str | None, headers_only: bool) -> Checkpoint:
    from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download, try_to_load_from_cache

    def read_json(name: str) -> dict[str, Any]:
        return _read_json(Path(hf_hub_download(repo_id, name, revision=revision)))

    try:
        if constants.HF_HUB_OFFLINE:  # where snapshot_download would miss the files that nobody wanted
            return _open_cached(Path(hf_hub_download(repo_id, CONFIG_NAME, revision=revision)).parent, repo_id)
        info = HfApi().model_info(repo_id, revision=revision, timeout=ANSWER_SECONDS)
        names = frozenset(file.rfilename for file in info.siblings or [])
        listing = Listing(repo_id, names, names.__contains__, read_json)
        folders = {name.partition("/")[0] for name in names if "/" in name}
        config = _config(listing, folders)
        weights = _weights(listing, config, folders)
        if headers_only and weights.files[0].endswith(".safetensors"):  # pickles have none that could be read alone
            checkpoint = _read_remote_headers(_checkpoint(repo_id, None, config, weights), weights, revision)
            _check(checkpoint, weights, listing)
            return checkpoint
        wanted = [glob.escape(name) for name in names if name in weights.files or goes_with_weights(name)]
        return _open_directory(Path(snapshot_download(repo_id, revision=revision, allow_patterns=wanted)), repo_id)
    except KvConvertError:
        raise
    except Exception as error:  # the HTTP library behind the hub has errors of its own
        if is_out_of_memory(error):
            raise
        cached = try_to_load_from_cache(repo_id, CONFIG_NAME, revision=revision) if is_unreachable(error) else None
        if isinstance(cached, str):
            checkpoint = _open_cached(Path(cached).parent, repo_id)
            checkpoint.notes += (
                f"the hub cannot be reached: {repo_id} is commit {Path(cached).parent.name}, from this machine's cache",
            )
            return checkpoint
        reason, hint = hub_refusal(error, "model", revision)
        raise CheckpointError(
            f"{repo_id}: {reason}; there is no directory of this name either", hint=hint or _MISSING_DIRECTORY_HINT
        ) from error


def _open_cached(snapshot: Path, repo_id: str) -> Checkpoint:
    """The checkpoint in a snapshot of the hub's cache. Raises CheckpointError where only headers were fetched."""
    if not any(path.name.endswith(WEIGHT_SUFFIXES) for path in snapshot.rglob("*")):
        raise CheckpointError(
            f"{repo_id}: the cache of this machine has its {CONFIG_NAME}, but no weights",
            hint=f"download it where there is a network, with `hf download {repo_id}`, and copy the cache",
        )
    return _open_directory(snapshot, repo_id)


def _read_remote_headers(checkpoint: Checkpoint, weights: WeightFiles, revision: str | None) -> Checkpoint:
    """The checkpoint with the headers of its safetensors files, of which nothing else is fetched."""
    from huggingface_hub import HfApi

    def header(file: str) -> Any:
        return HfApi().parse_safetensors_file_metadata(checkpoint.name, file, revision=revision)

    with ThreadPoolExecutor(max_workers=_NUM_CONNECTIONS) as pool:
        for file, metadata in zip(weights.files, pool.map(header, weights.files), strict=True):
            for name, info in metadata.tensors.items():
                _add(checkpoint, checked_info(name, info.dtype, info.shape, info.data_offsets, file))
    checkpoint.size_on_disk_bytes = sum(info.num_bytes for info in checkpoint.tensors.values())
    return checkpoint


def _looks_like_hub_id(name: str) -> bool:
    parts = name.split("/")
    return len(parts) <= 2 and all(parts) and not name.startswith((".", "/", "~")) and "\\" not in name


def _read_json(path: Path) -> dict[str, Any]:
    require_fetched(path)
    return read_object(path)
