"""What lies beside a checkpoint's weights: what goes with them to a result, and what stays behind, and why."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import CheckpointError
from ..runtime import RUNTIME_CLASSES
from .files import copy_file
from .input_files import is_file, leads_outside, open_regular
from .json_files import read_json
from .layout import WEIGHT_SUFFIXES
from .manifest import PROVENANCE_NAME, FileDigest, digest_file
from .output import CARD_NAME, RECIPE_NAME
from .tensors import CONFIG_NAME, Checkpoint

__all__ = ["Companions", "copy_companions", "find_companions", "link_companions"]

_ADAPTER = "an adapter, which is not merged into the weights"
_ATTENTION = "says how many heads the source has"
_CODE = "code of the source's class"
_HIDDEN = "hidden, of the repository"
_LINK = "a link that leads out of the checkpoint"
_MISSING = "named by modules.json, and not there"
_TRAINING = "of a training run"
_UNKNOWN = "not known to belong to the model"
_UNREADABLE = "neither a file nor a directory that can be read"
_WEIGHTS = "other weights than the model's"

# a result has its own, and the code of kvconvert's classes where it is in one
_REPLACED = frozenset(
    {CONFIG_NAME, CARD_NAME, PROVENANCE_NAME}
    | {file.name for entry in RUNTIME_CLASSES.values() for file in entry.files}
)
_ADAPTER_NAMES = ("adapter_config.json", "adapter_model*")
_TRAINING_NAMES = (
    *(
        "trainer_state.json",
        "training_args.*",
        "training_params.*",
        "training_config.*",
        "optimizer*",
        "scheduler.*",
        "scaler.pt",
        "rng_state*",
    ),
    *("random_states_*", "global_step*", "latest", "zero_to_fp32.py", "pytorch_model_fsdp*", "checkpoint-*"),
    *("*_results.json", "trainer_log.jsonl", "training_loss.*", "training_eval_loss.*", "events.out.tfevents.*"),
    *("runs", "wandb", "mlruns"),
    *("metrics.jsonl", "run_status.json", "run_files.json", "lr_sweep.json", RECIPE_NAME),  # of kvconvert uptrain
)
_WEIGHT_NAMES = ("*.ckpt.*", "*.safetensors.index*.json", "*.bin.index*.json", *(f"*{end}" for end in WEIGHT_SUFFIXES))
_CODE_NAMES = ("configuration_*.py", "modeling_*.py")
_ATTENTION_KEYS = frozenset(
    {"num_attention_heads", "num_key_value_heads", "num_kv_heads", "multi_query", "num_query_groups", "n_query_groups"}
    | {"n_head", "n_heads", "n_head_kv", "n_kv_heads", "num_heads"}
)
# of one line each: white space that may hold line breaks would be searched again from every line
_YAML_KEY = re.compile(r"^[ \t]*(\w+)[ \t]*:", re.MULTILINE)
_RELATIVE_IMPORT = re.compile(r"^[ \t]*(?:import[ \t]+\.(\S+)[ \t]*$|from[ \t]+\.(\S+)[ \t]+import)", re.MULTILINE)
_LARGEST_CONFIG_BYTES = 2**20
_LARGEST_CONFIG_KEYS = 500  # an object with more is a vocabulary
_LOOKED_AT = 1000  # files of a directory, which may hold a data set
_DIRECTORIES = ("additional_chat_templates", "custom_generate")


@dataclass(frozen=True)
class Companions:
    """The entries of a checkpoint's directory that go with its weights, and those that do not.

    `copied` are files, and directories with all that is in them. `left_behind` maps the name of each other entry to the
    reason, in words; the name of a directory ends in "/".
    """

    source: Path
    copied: tuple[str, ...]
    left_behind: Mapping[str, str]

    @property
    def num_bytes(self) -> int:
        """The size of what is copied."""
        entries = [self.source / name for name in self.copied]
        files = [file for entry in entries for file in ([entry] if entry.is_file() else entry.rglob("*"))]
        return sum(file.stat().st_size for file in files if file.is_file())

    def missing_from(self, result: Path) -> dict[str, str]:
        """Return of `left_behind` what `result`, which may have files of its own by these names, lacks."""
        return {name: reason for name, reason in self.left_behind.items() if not (result / name).exists()}


def find_companions(checkpoint: Checkpoint, *, same_attention: bool = False) -> Companions:
    """Sort what lies in a checkpoint's directory; its weights, config.json, card and kvconvert.json are neither.

    Left behind is what is untrue of a result: other weights, adapters, the state of a training run, the code of the
    source's class, and, unless the result has the `same_attention`, files that say how many heads the source has. So is
    what kvconvert does not know to belong to the model, and what a link leads to outside of it. Raises CheckpointError
    where only headers were fetched.
    """
    source = checkpoint.directory
    weights = {info.file for info in checkpoint.tensors.values()}
    modules = _module_directories(source)
    code = _code_of_the_class(source)
    copied: list[str] = []
    left: dict[str, str] = {f"{name}/": _MISSING for name in modules if not (source / name).exists()}
    for path in sorted(source.iterdir()):
        if path.name in weights | _REPLACED or _is_index_of(path, weights):
            continue
        is_module = any(PurePosixPath(name).parts[0] == path.name for name in modules)
        reason = _unsafe(path, source)
        if reason is None and not is_module:
            reason = _reason(path, code, same_attention=same_attention)
        if reason is None and path.is_dir():
            reason = _holds_unsafe(path, source)
        if reason is None:
            copied.append(path.name)
        else:
            left[f"{path.name}/" if path.is_dir() else path.name] = reason
    return Companions(source, tuple(copied), left)


def copy_companions(companions: Companions, target: Path) -> list[FileDigest]:
    """Copy what goes with the weights to the directory `target`, byte for byte; return the digests of its files."""
    for name in companions.copied:
        path = companions.source / name
        if path.is_dir():
            shutil.copytree(path, target / name, copy_function=lambda one, other: copy_file(Path(one), Path(other)))
        else:
            copy_file(path, target / name)
    copied = (target / name for name in companions.copied)
    files = [path for entry in copied for path in ([entry] if entry.is_file() else sorted(entry.rglob("*")))]
    return [digest_file(target, path.relative_to(target).as_posix()) for path in files if path.is_file()]


def link_companions(companions: Companions, target: Path) -> None:
    """Put links to what goes with the weights into the directory `target`, in place of copies."""
    for name in companions.copied:
        (target / name).symlink_to((companions.source / name).absolute())


def _unsafe(path: Path, source: Path) -> str | None:
    """Why a file or directory must not be copied, whatever it is called: it is not the checkpoint's, or never ends."""
    if leads_outside(path, source) is not None:
        return _LINK
    return None if path.is_dir() or is_file(path) else _UNREADABLE


def _holds_unsafe(folder: Path, source: Path) -> str | None:
    """Why a directory must not be copied with all that is in it."""
    for path in folder.rglob("*"):
        is_loop = path.is_symlink() and path.is_dir()  # or might be one: copying would follow it
        reason = "a link to a directory" if is_loop else _unsafe(path, source)
        if reason is not None:
            return f"holds {path.relative_to(folder)}, {reason}"
    return None


def _reason(path: Path, code: set[str], *, same_attention: bool) -> str | None:
    """Why a file or directory does not go with the weights, None if it does."""
    name = path.name
    if name.startswith("."):
        return _HIDDEN
    if _matches(name, _ADAPTER_NAMES):
        return _ADAPTER
    if _matches(name, _TRAINING_NAMES):
        return _TRAINING
    if _matches(name, _WEIGHT_NAMES):
        return _WEIGHTS
    if path.is_dir():
        if name in _DIRECTORIES:
            return None
        first = islice(path.rglob("*"), _LOOKED_AT)
        return _WEIGHTS if any(_matches(file.name, _WEIGHT_NAMES) for file in first) else _UNKNOWN
    if name in code:
        return _CODE
    return _ATTENTION if not same_attention and _describes_attention(path) else None


def _is_index_of(path: Path, files: set[str]) -> bool:
    """Whether a file is an index that lists no other files than these."""
    index = _read_json(path) if path.name.endswith(".index.json") else None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    return isinstance(weight_map, dict) and set(map(str, weight_map.values())) <= files


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _describes_attention(path: Path) -> bool:
    """Whether a file says of the model what is untrue of a result, as the params.json of Meta and Mistral does."""
    if path.name == "params.json":  # also without a number of K/V heads, which are then as many as heads
        return True
    if path.suffix not in (".json", ".yaml", ".yml") or path.stat().st_size > _LARGEST_CONFIG_BYTES:
        return False
    if path.suffix == ".json":
        return not _ATTENTION_KEYS.isdisjoint(_keys(_read_json(path)))
    return not _ATTENTION_KEYS.isdisjoint(_YAML_KEY.findall(_read_text(path)))


def _keys(value: Any) -> Iterator[str]:
    """The keys of an object and of those in it, but for vocabularies."""
    if isinstance(value, dict) and len(value) <= _LARGEST_CONFIG_KEYS:
        yield from value
        for item in value.values():
            yield from _keys(item)


def _module_directories(source: Path) -> list[str]:
    """The directories that modules.json of sentence-transformers names beside the transformer: pooling and the like."""
    modules = _read_json(source / "modules.json")
    found = []
    for module in modules if isinstance(modules, list) else []:
        place, kind = (str(module.get(key, "")) for key in ("path", "type")) if isinstance(module, dict) else ("", "")
        inside = place and not PurePosixPath(place).is_absolute() and ".." not in PurePosixPath(place).parts
        # a Normalize module has no files, so that git keeps no directory for it
        empty = kind.endswith(".Normalize") and not (source / place).exists()
        if inside and not empty and not kind.endswith(".Transformer"):
            found.append(str(PurePosixPath(place)))
    return found


def _code_of_the_class(source: Path) -> set[str]:
    """The Python files of the source's class and what these import, but for those that a tokenizer needs too."""
    files = [path for path in source.glob("*.py") if path.is_file()]
    of_class = {path.name for path in files if _matches(path.name, _CODE_NAMES)} | _auto_map_files(source, CONFIG_NAME)
    others = ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
    needed = {name for config in others for name in _auto_map_files(source, config)}
    return _with_imports(source, of_class) - _with_imports(source, needed)


def _auto_map_files(source: Path, config_name: str) -> set[str]:
    """The Python files that a config names as the code of its classes."""
    config = _read_json(source / config_name)
    auto_map = config.get("auto_map") if isinstance(config, dict) else None
    named = list(auto_map.values()) if isinstance(auto_map, dict) else [auto_map]
    classes = [name for value in named for name in (value if isinstance(value, list) else [value])]
    return {f"{name.rpartition('--')[2].partition('.')[0]}.py" for name in classes if isinstance(name, str)}


def _with_imports(source: Path, names: Iterable[str]) -> set[str]:
    """Files and all that they import from beside them, directly or not."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in found and is_file(source / name) and leads_outside(source / name, source) is None:
            found.add(name)
            waiting += [f"{module}.py" for module in _relative_imports(source / name)]
    return found


def _relative_imports(path: Path) -> set[str]:
    """The modules beside a file of Python that it imports, as transformers looks for them."""
    return {name for names in _RELATIVE_IMPORT.findall(_read_text(path)) for name in names if name}


def _read_json(path: Path) -> Any:
    """The content of a JSON file, None where there is none that can be read, or only behind a link to elsewhere."""
    if leads_outside(path, path.parent) is not None:
        return None
    try:
        return read_json(path)
    except CheckpointError:
        return None


def _read_text(path: Path) -> str:
    """The beginning of a file as text, "" of one that cannot be read: copying it says why."""
    try:
        with open_regular(path) as file:
            return file.read(_LARGEST_CONFIG_BYTES).decode(errors="replace")
    except OSError:
        return ""
