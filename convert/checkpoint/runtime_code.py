"""The code of kvconvert's classes that lies beside converted weights: copied there, recognised, and renewed.

A checkpoint in such a class carries the code that opens it with `trust_remote_code=True`. New versions of transformers
may no longer work with it; `refresh` replaces it by the installed code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..runtime import RUNTIME_CLASSES, RuntimeClass
from .files import replaced_file
from .remote_code import remote_code_allowed

__all__ = ["BesideState", "CodeBeside", "code_beside", "copy_runtime_code", "replace_code"]

# SHA-256 of what earlier versions of kvconvert wrote, with the versions of transformers that it works with. Their code
# is ours, so it runs without `allow_remote_code`. Add the files of a release here before they change.
_EARLIER = "5.23 and earlier"
EARLIER_CODE: Mapping[str, str] = MappingProxyType(
    dict.fromkeys(
        (
            "7aa70af6a65e6ead445fa439f5d3d372052395c38ae84e53a12175030d8a863a",  # configuration_cross_layer_decoder
            "cc18954b94fb128a7dd01618e786bdb88d6d9ec0b34e81f41ec150819fbababb",  # modeling_cross_layer_decoder
            "121127fdc8beb5a76eb3f510e01f4e132aac0faa27cbf1986e5b5778f88726c6",  # configuration_grouped_decoder
            "6ef18f00c39c2a337f5a6be1594f8e28ced4552a285afbc6653ead53f4562448",  # modeling_grouped_decoder
            "cc5cb9231d8ffdc00df70af83100bbdcba653c3437d031d3578155877b3f8b97",
            "c347703f1c55559a28bc2830d03d4ab597bdad26bfd605cef52a71a7c87745cf",  # configuration_grouped_seq2seq
            "3039e7062fca6e4b5dd8bfd6a1ccf5dda324fa0d0ab37642f7334df04df3814d",  # modeling_grouped_seq2seq
        ),
        _EARLIER,
    )
)
_DECLARED = re.compile(r'^TESTED_VERSIONS = \("([\d.]+)", "([\d.]+)"\)', re.MULTILINE)


class BesideState(StrEnum):
    """Whose code lies beside the weights."""

    NONE = "none"  # there is none: only `import kvconvert.convert` opens the checkpoint
    CURRENT = "current"  # the installed files, byte for byte
    EARLIER = "earlier"  # files that an earlier version of kvconvert wrote
    OTHER = "other"  # files that no known version of kvconvert wrote


@dataclass(frozen=True)
class CodeBeside:
    """The code of `entry`, one of kvconvert's classes, in the directory of a checkpoint.

    `works_with` names the versions of transformers that it works with, where that is known.
    """

    directory: Path
    entry: RuntimeClass
    state: BesideState
    works_with: str | None = None

    @property
    def may_run(self) -> bool:
        """Whether it differs from the installed code and may run: an earlier version's, or allowed by the user."""
        return self.state is BesideState.EARLIER or (self.state is BesideState.OTHER and remote_code_allowed())

    def load(self, name: str) -> Any:
        """Run the files beside the weights, and return the class that auto_map names there under the key `name`."""
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        return get_class_from_dynamic_module(self.entry.auto_map[name], str(self.directory))


def code_beside(directory: Path, entry: RuntimeClass) -> CodeBeside:
    """Recognise by their hashes the files of `entry` in a checkpoint's directory, without running them."""
    found = [directory / file.name for file in entry.files if (directory / file.name).exists()]
    if not any(path.name.startswith("modeling_") for path in found):
        return CodeBeside(directory, entry, BesideState.NONE)
    if all((directory / file.name).exists() and _same(directory / file.name, file) for file in entry.files):
        return CodeBeside(directory, entry, BesideState.CURRENT)
    installed = {file.name: file for file in entry.files}
    earlier = {EARLIER_CODE.get(sha256(path.read_bytes()).hexdigest()) for path in found}
    ours = all(
        _same(path, installed[path.name]) or sha256(path.read_bytes()).hexdigest() in EARLIER_CODE for path in found
    )
    if ours:
        return CodeBeside(directory, entry, BesideState.EARLIER, next(filter(None, earlier), None))
    declared = next((match for path in found if (match := _DECLARED.search(path.read_text("utf-8")))), None)
    works_with = f"{declared[1]} to {declared[2]}" if declared else None
    return CodeBeside(directory, entry, BesideState.OTHER, works_with)


def copy_runtime_code(model_type: str, target: Path) -> None:
    """Copy the code of a `model_type` of kvconvert's beside its weights; nothing for any other `model_type`."""
    if model_type in RUNTIME_CLASSES:
        for code in RUNTIME_CLASSES[model_type].files:
            with replaced_file(target / code.name) as file:  # a rehearsal has links there
                file.write(code.read_bytes())


def replace_code(beside: CodeBeside) -> tuple[str, ...]:
    """Replace the files that differ from the installed ones, and return their names.

    Each file is replaced whole or not at all, and after each replacement the files work together: the one that the
    others import comes first, and earlier versions of the others do not import it.
    """
    replaced = []
    for file in reversed(beside.entry.files):  # the interface, the class, its configuration
        target = beside.directory / file.name
        if target.exists() and _same(target, file):
            continue
        with replaced_file(target) as renewed:
            renewed.write(file.read_bytes())
        replaced.append(file.name)
    return tuple(replaced)


def _same(path: Path, other: Path) -> bool:
    return path.read_bytes() == other.read_bytes()
