"""What is fuzzed: readers of kvconvert, each as a function of bytes in an empty room. The tests replay them too."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvconvert.convert.checkpoint import companions
from kvconvert.convert.checkpoint.headers import load_pickle, pickled_info, read_header
from kvconvert.convert.checkpoint.opening import open_checkpoint
from kvconvert.convert.checkpoint.tokenizer import load_tokenizer
from kvconvert.convert.checkpoint.tokenizer_transfer import transfer_tokenizer
from kvconvert.convert.describe import card
from kvconvert.convert.describe.inspection import inspect_checkpoint
from kvconvert.convert.errors import KvConvertError
from kvconvert.convert.printable import printable
from kvconvert.convert.text.documents import read_parts
from kvconvert.convert.text.formats import file_kind
from kvconvert.convert.text.sources import TextSource

__all__ = ["SEPARATOR", "TARGETS", "check", "prepare", "seeds_below", "writes_inside"]

SEPARATOR = b"\x00\xff\x00"  # between the files of an input that is several
_CLASSES = ("llama", "deepseek_v3", "gpt2", "gpt_neox", "falcon", "mixtral", "gemma2", "phi3")
_MAX_TOKENIZED = 2**14
_MAX_SEED_BYTES = 2**16
_SEED_NAMES = {
    "pickle": (".bin", ".pt"),
    "index": (".index.json",),
    "config": ("config.json",),
    "beside": ("README.md", ".yaml", "modules.json"),
}


def prepare(room: Path) -> None:
    """Put into an empty directory what targets open: tiny checkpoints of several classes, and a tokenizer's model."""
    from conftest import LATENT, build_model

    for model_type in _CLASSES:
        overrides: dict[str, Any] = LATENT if model_type == "deepseek_v3" else {}
        build_model(model_type, vocab_size=64, **overrides).save_pretrained(room / model_type)
    for name in ("files", "index", "tokenizer", "transferred", "text", "beside"):
        (room / name).mkdir()
    (room / "index/config.json").write_bytes((room / "llama/config.json").read_bytes())
    (room / "index/a.safetensors").write_bytes((room / "llama/model.safetensors").read_bytes())
    (room / "tokenizer/config.json").write_text('{"model_type": "llama", "eos_token_id": 2, "bos_token_id": 1}')
    (room / "beside/model.safetensors").touch()


def _header(data: bytes, room: Path) -> None:
    path = room / "files/model.safetensors"
    path.write_bytes(data)
    for info in read_header(path, path.name):
        assert info.num_bytes >= 0


def _pickle(data: bytes, room: Path) -> None:
    path = room / "files/pytorch_model.bin"
    path.write_bytes(data)
    for name, tensor in load_pickle(path).items():
        assert pickled_info(name, tensor, path.name).num_bytes <= len(data)


def _index(data: bytes, room: Path) -> None:
    (room / "index/model.safetensors.index.json").write_bytes(data)
    with open_checkpoint(room / "index") as checkpoint:
        assert {info.file for info in checkpoint.tensors.values()} == {"a.safetensors"}


def _config(data: bytes, room: Path) -> None:
    try:
        model_type = json.loads(data)["model_type"]
    except (ValueError, TypeError, KeyError, RecursionError):
        model_type = None
    directory = room / (model_type if model_type in _CLASSES else "llama")
    (directory / "config.json").write_bytes(data)
    with open_checkpoint(directory) as checkpoint:
        inspect_checkpoint(checkpoint)


def _tokenizer(data: bytes, room: Path) -> str:
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    for name, content in zip(names, (*data.split(SEPARATOR, 2), b"{}", b"{}"), strict=False):
        (room / "tokenizer" / name).write_bytes(content[:_MAX_TOKENIZED])
        (room / "transferred" / name).unlink(missing_ok=True)
        (room / "transferred" / name).write_bytes(content[:_MAX_TOKENIZED])
    load_tokenizer(room / "tokenizer")
    return transfer_tokenizer(room / "tokenizer", room / "transferred", name="result") or "read"


_TEXTS = ("a.jsonl", "a.json", "a.txt", "a.jsonl.gz", "a.parquet", "a.arrow")


def _text(data: bytes, room: Path) -> str:
    """The first byte says which kind of file the others are, and how it is read."""
    first = data[0] if data else 0
    path = room / "text" / _TEXTS[first % len(_TEXTS)]
    path.write_bytes(data[1:])
    skips, by_line = first & 64 != 0, first & 128 != 0 and path.suffix == ".txt"
    source = TextSource(str(path), text_field="a.text", skip_bad_lines=skips, line_documents=by_line)
    parts = list(read_parts(source))
    for part in parts:
        part.text.encode()
    return f"read {len(parts)}"


def _beside(data: bytes, room: Path) -> str:
    """A card, and files whose content decides whether they go with the weights."""
    directory = room / "beside"
    for name in ("README.md", "a.yaml", "a.json", "modules.json", "modeling_a.py", "a.index.json"):
        (directory / name).write_bytes(data)
    inherited, problem = card._inherited(directory / "README.md")
    found = (
        *(json.dumps(inherited), problem, len(companions._module_directories(directory))),
        *(companions._code_of_the_class(directory), companions._is_index_of(directory / "a.index.json", {"a"})),
        *(companions._describes_attention(directory / name) for name in ("a.yaml", "a.json")),
    )
    return f"read {found}"


TARGETS: Mapping[str, Callable[[bytes, Path], str | None]] = {
    "header": _header,
    "pickle": _pickle,
    "index": _index,
    "config": _config,
    "tokenizer": _tokenizer,
    "text": _text,
    "beside": _beside,
}


def check(target: str, data: bytes, room: Path) -> str:
    """Read an input, and return what a person would be told; raises whatever comes out that is no error for people."""
    try:
        outcome = TARGETS[target](data, room) or "read"
    except KvConvertError as error:
        outcome = str(error)
    shown = printable(outcome)
    shown.encode()
    return shown


def seeds_below(directory: Path, target: str) -> Iterator[bytes]:
    """Yield the inputs of a target that the files below a directory make, of real checkpoints and text for example.

    A file of weights that is too large for an input gives its header, and one of anything else none.
    """
    for path in sorted(path for path in directory.rglob("*") if path.is_file() and path.stat().st_size):
        for found in _seed(path, target):
            if len(found) <= _MAX_SEED_BYTES:
                yield found


def _seed(path: Path, target: str) -> Iterator[bytes]:
    """The input that a file makes, if it is of the target's kind."""
    if target == "header" and path.suffix == ".safetensors":
        with path.open("rb") as file:
            length = file.read(8)
            yield (
                path.read_bytes()
                if path.stat().st_size <= _MAX_SEED_BYTES
                else length + file.read(_MAX_SEED_BYTES)[: int.from_bytes(length, "little")]
            )
    elif target == "tokenizer" and path.name == "tokenizer.json":
        beside = [path.with_name(name) for name in ("tokenizer_config.json", "special_tokens_map.json")]
        yield SEPARATOR.join(file.read_bytes() for file in (path, *beside) if file.is_file())
    elif target == "text" and file_kind(path) is not None:
        yield from _text_seed(path)
    elif path.name.endswith(_SEED_NAMES.get(target, ())):
        yield path.read_bytes()


def _text_seed(path: Path) -> Iterator[bytes]:
    ending = "".join(path.suffixes[-2:] if path.suffix.lower() == ".gz" else path.suffixes[-1:]).lower()
    kinds = [number for number, name in enumerate(_TEXTS) if name == f"a{ending}"]
    for number in kinds:
        yield bytes([number]) + path.read_bytes().replace(b'"text":', b'"a.text":')


@contextmanager
def writes_inside(room: Path, *, allowed: tuple[str, ...] = ()) -> Iterator[None]:
    """Raise AssertionError for a file that is written, made, moved or removed outside of a directory, in the block.

    `allowed` are directories beside it, of the fuzzer itself.

    Python has no way to take such a hook back: it does nothing behind the block.
    """
    homes = tuple(os.path.realpath(place) for place in (str(room), *allowed))
    active = True

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if not active:
            return
        if event == "open":
            path, _, flags = arguments
            touched = (path,) if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else ()
        elif event in ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link"):
            touched = arguments[:2] if event in ("os.rename", "os.link") else arguments[:1]
        elif event in ("subprocess.Popen", "os.system", "os.exec", "socket.connect"):
            raise AssertionError(f"{event} {arguments!r}")
        else:
            return
        for path in touched:
            if isinstance(path, str | bytes | os.PathLike) and not _is_inside(os.fsdecode(path), homes):
                raise AssertionError(f"{event} {path!r}, outside of {homes[0]}")

    sys.addaudithook(hook)
    try:
        yield
    finally:
        active = False


def _is_inside(path: str, homes: tuple[str, ...]) -> bool:
    real = os.path.realpath(path)
    return path == os.devnull or any(real.startswith(f"{home}{os.sep}") for home in homes)
