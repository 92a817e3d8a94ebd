"""Which files of a directory are text: its splits and its card's configurations, as `datasets` reads them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

from ..checkpoint.json_files import read_object, shortened
from ..errors import CheckpointError, DataError, first_line
from .formats import ENDINGS, file_kind
from .sources import TextSource

__all__ = ["FoundFiles", "find_files"]

# what stands beside data and is none, by the name before its ending
_COMPANION = re.compile(
    r"(readme|licen[cs]e|copying|notice|changelog|changes|contributing|code_of_conduct|security|citation|authors"
    r"|requirements)([-_.].*)?",
    re.IGNORECASE,
)
_SAVED_DICT, _SAVED_STATE, _SAVED_INFO = "dataset_dict.json", "state.json", "dataset_info.json"
_MAX_NAMES = 5


@dataclass(frozen=True)
class FoundFiles:
    """The files of a text in the order of their names, and what else lies in its directory, each with the reason."""

    files: tuple[Path, ...]
    left_out: tuple[tuple[str, str], ...] = ()
    split: str | None = None

    def sentence(self, location: str) -> str | None:
        """Say what is read of a directory and what is not; None where every file is read, or the only one."""
        if not self.left_out and len(self.files) == 1:
            return None
        split = "" if self.split is None else f"split {self.split!r}, "
        said = f"{location}: {split}{_files(len(self.files))} ({_listed([file.name for file in self.files])})"
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left_out:
            reasons.setdefault(reason, []).append(name)
        left = [f"{_listed(names)} ({reason})" for reason, names in reasons.items()]
        return f"{said}, not {'; '.join(left)}" if left else said


def find_files(directory: Path, source: TextSource) -> FoundFiles:
    """Find the files of a directory that hold the text of a source.

    A directory that `save_to_disk` wrote is read as it says; else the card's configurations and their data_files count,
    else the splits that the names of files and folders tell of, and where they tell of none every file is read. Links
    to folders are followed. Raises DataError where no file, split or configuration is what was asked for.
    """
    if (directory / _SAVED_DICT).is_file():
        names = _saved_json(directory / _SAVED_DICT).get("splits")
        if not isinstance(names, list) or not all(_is_plain_name(name) for name in names):
            raise DataError(f"{directory / _SAVED_DICT}: not what save_to_disk writes (splits = {shortened(names)})")
        chosen = _choose(source, {name: [name] for name in names})[0]
        return _saved(directory / chosen, chosen)
    if (directory / _SAVED_STATE).is_file() and (directory / _SAVED_INFO).is_file():
        found = _saved(directory, None)
        _refuse_split(source, found.split or "train")
        return found
    names, left_out = _walk(directory)
    of_split, split, others = _of_split(directory, source, names)
    texts, beside = _of_one_kind(of_split)
    left_out += others + beside
    if not texts:
        hint = f"text has the endings {ENDINGS}"
        raise DataError(f"{directory}: no text in this directory{_instead(left_out)}", hint=hint)
    return FoundFiles(tuple(sorted(directory / name for name in texts)), tuple(sorted(left_out)), split)


def _walk(directory: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """The files that may be text, by their names in the directory, and the others with the reason."""
    from datasets.data_files import FILES_TO_IGNORE

    found: list[tuple[bool, str, str]] = []  # whether it is a link, which name it has, and what it really is
    left_out: list[tuple[str, str]] = []
    seen: set[str] = set()
    for place, folders, files in os.walk(directory, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link to a folder that is read would give its files again, or for ever
            folders.clear()
            continue
        seen.add(real)
        inside = PurePosixPath(Path(place).relative_to(directory).as_posix())
        left_out += [(f"{inside / folder}/", "hidden") for folder in folders if _is_hidden(folder)]
        folders[:] = sorted(folder for folder in folders if not _is_hidden(folder))
        for file in files:
            name, path = str(inside / file), Path(place) / file
            if _is_hidden(file):
                left_out.append((name, "hidden"))
            elif file_kind(path) is None or not path.is_file():
                left_out.append((name, "no text"))
            elif file in (*FILES_TO_IGNORE, _SAVED_STATE) or _is_companion(file):
                left_out.append((name, "about the data"))
            else:
                is_link = path.is_symlink()  # realpath asks after every folder above, for each of a million files
                found.append((is_link, name, os.path.realpath(path) if is_link else f"{real}/{file}"))
    names: dict[str, str] = {}
    for _, name, real in sorted(found):
        known = names.setdefault(real, name)
        if known != name:
            left_out.append((name, f"a link to {known}"))
    return sorted(names.values()), left_out


def _of_one_kind(names: Sequence[str]) -> tuple[Sequence[str], list[tuple[str, str]]]:
    """Files of rows or files of plain text, which are not mixed: of which there are more, as `datasets` chooses."""
    plain: list[str] = []
    rows: list[str] = []
    for name in names:
        (plain if file_kind(Path(name)) == "plain" else rows).append(name)
    if not plain or not rows:
        return names, []
    if len(plain) > len(rows):
        return plain, [(name, "rows beside more files of plain text") for name in rows]
    return rows, [(name, "plain text beside rows") for name in plain]


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "__"))


def _is_companion(name: str) -> bool:
    return file_kind(Path(name)) == "plain" and _COMPANION.fullmatch(name.partition(".")[0]) is not None


def _of_split(
    directory: Path, source: TextSource, names: Sequence[str]
) -> tuple[list[str], str | None, list[tuple[str, str]]]:
    """The files of the source's split and configuration, the split if there are several, and the other files."""
    config, parameters = _configuration(directory, source)
    patterns, within = parameters.get("data_files"), parameters.get("data_dir")
    inside = [name for name in names if not within or PurePosixPath(name).is_relative_to(within)]
    if patterns is not None:
        from datasets.data_files import sanitize_patterns

        by_split = {split: _matching(inside, globs, within) for split, globs in sanitize_patterns(patterns).items()}
    else:
        by_split = _told_by_names(inside)
    if not by_split:
        _refuse_split(source, "train")
        beyond = set(names).difference(inside)
        return list(inside), None, [(name, "of another configuration") for name in names if name in beyond]
    split, chosen = _choose(source, by_split)
    of = {name: f"split {other!r}" for other, found in by_split.items() for name in found}
    elsewhere = f"not in configuration {config!r}" if config else "of no split"
    beyond = set(names).difference(chosen)
    return chosen, split, [(name, of.get(name, elsewhere)) for name in names if name in beyond]


def _configuration(directory: Path, source: TextSource) -> tuple[str | None, Mapping[str, Any]]:
    """The configuration of the directory's card that is meant, and what it says; none without a card."""
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCardData
    from huggingface_hub.repocard import metadata_load

    card = directory / "README.md"
    try:
        configs = MetadataConfigs()
        if card.is_file():
            # DatasetCard would print a warning where a README has no metadata
            configs = MetadataConfigs.from_dataset_card_data(DatasetCardData(**(metadata_load(card) or {})))
        usual = configs.get_default_config_name() if configs else None
    except Exception as error:  # a card is YAML that people write; its libraries raise what they like
        raise DataError(f"{card}: its configurations cannot be read ({first_line(error)})") from error
    there = ", ".join(configs)
    if not configs:
        if source.config not in (None, "default"):
            raise DataError(
                f"{source.location}: no configuration {source.config!r}: it has none",
                hint="leave the configuration out",
                settings=("config", "data_config"),
            )
        return None, {}
    name = source.config or usual or (next(iter(configs)) if len(configs) == 1 else None)
    if name not in configs:
        asked = "several configurations" if name is None else f"no configuration {name!r}"
        raise DataError(
            f"{source.location}: {asked} (there is {there})", hint="name one", settings=("config", "data_config")
        )
    return name, configs[name]


def _matching(names: Iterable[str], patterns: Iterable[str], within: str | None) -> list[str]:
    from fsspec.utils import glob_translate

    prefix = f"{within.strip('/')}/" if within else ""
    globs = [re.compile(glob_translate(prefix + pattern.removeprefix("./"))) for pattern in patterns]
    return [name for name in names if any(glob.match(name) for glob in globs)]


def _told_by_names(names: Sequence[str]) -> dict[str, list[str]]:
    """The splits that names tell of, as `datasets` finds them: data/train-00000-of-00001.parquet, test/, dev.jsonl."""
    from datasets import data_files

    def resolve(pattern: str) -> list[str]:
        return _matching(names, [pattern], None)

    if not names:
        return {}
    infer: Callable[[Callable[[str], list[str]]], dict[str, list[str]]] = data_files._get_data_files_patterns
    patterns = {str(split): globs for split, globs in infer(resolve).items()}
    if patterns == {str(split): globs for split, globs in data_files.DEFAULT_PATTERNS_ALL.items()}:
        return {}
    return {split: _matching(names, globs, None) for split, globs in patterns.items()}


def _choose(source: TextSource, by_split: Mapping[str, list[str]]) -> tuple[str, list[str]]:
    split = source.chosen_split
    if not by_split.get(split):
        there = ", ".join(name for name, found in by_split.items() if found) or "none"
        raise DataError(
            f"{source.location}: no split {split!r} (there is {there})",
            hint="name the split to read",
            settings=("split",),
        )
    return split, by_split[split]


def _refuse_split(source: TextSource, only: str) -> None:
    """Raise DataError where a split is asked for of a text that has none; `datasets` calls the whole of it train."""
    if source.split not in (None, only):
        raise DataError(
            f"{source.location}: no split {source.split!r}: it has none, only all of it",
            hint="leave the split out",
            settings=("split",),
        )


def _saved(directory: Path, split: str | None) -> FoundFiles:
    """What `save_to_disk` wrote into a directory."""
    state = directory / _SAVED_STATE
    content = _saved_json(state)
    listed = content.get("_data_files")
    names = [each.get("filename") for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []
    files = tuple(directory / name for name in names if _is_plain_name(name))
    if not isinstance(listed, list) or len(files) < len(listed):
        raise DataError(f"{state}: not what save_to_disk writes (_data_files = {shortened(listed)})")
    kept = content.get("_split")
    return FoundFiles(files, split=split or (kept if _is_plain_name(kept) else None))


def _saved_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of save_to_disk's. Raises DataError where there is none."""
    try:
        return read_object(path)
    except CheckpointError as error:
        raise DataError(str(error)) from error


def _is_plain_name(name: object) -> TypeGuard[str]:
    """Whether a name is that of an entry of the directory itself."""
    return isinstance(name, str) and name not in ("", ".", "..") and "/" not in name


def _instead(left_out: Sequence[tuple[str, str]]) -> str:
    return f", only {_listed([name for name, _ in left_out])}" if left_out else ""


def _files(number: int) -> str:
    return "1 file" if number == 1 else f"{number} files"


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _MAX_NAMES
    return ", ".join(names[:_MAX_NAMES]) + (f" and {more} more" if more > 0 else "")
