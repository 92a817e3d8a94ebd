"""The tokenizer that lies beside a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, DataError, in_one_line, is_out_of_memory
from .input_files import NotRegularError, open_regular, require_regular
from .json_files import read_object
from .remote_code import remote_code_allowed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "TOKENIZER_FILES",
    "TokenIdCheck",
    "has_tokenizer",
    "load_tokenizer",
    "open_tokenizer",
    "tokenizer_errors",
    "vocabulary_size",
]

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "tiktoken.model",
    "tokenizer.tiktoken",
    "qwen.tiktoken",
)
# with what else transformers reads of one
TOKENIZER_FILES = frozenset(
    {*_TOKENIZER_FILES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"}
    | {"chat_template.jinja", "chat_template.json", "processor_config.json"}
)
_MAX_ID = 2**24
_VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json")
_LARGE_NUMBER = re.compile(rb":\s*\d{8,}\s*[,}]")
_READ_SUFFIXES = (".json", ".jinja", ".model", ".py", ".tiktoken", ".txt")


@dataclass(frozen=True)
class TokenIdCheck:
    """Whether a model's embedding has a row for every token id of a text.

    A tokenizer may have tokens that were added without resizing the embedding, or be another model's. `beyond` maps
    the ids without a row to their tokens. It is empty for nearly every model, and then a check costs nothing.
    """

    model: str
    vocab_size: int
    beyond: Mapping[int, str]

    @classmethod
    def of(cls, model: str | Path, tokenizer: PreTrainedTokenizerBase) -> TokenIdCheck:
        """Return the check for a checkpoint, a directory or a hub id, and its tokenizer."""
        vocab_size = vocabulary_size(model)
        if vocab_size is None:  # of a class whose code may not run; then the model does not run either
            return cls(str(model), 0, {})
        beyond = {number: token for token, number in tokenizer.get_vocab().items() if number >= vocab_size}
        return cls(str(model), vocab_size, dict(sorted(beyond.items())))

    def __call__(self, ids: Sequence[int], text: str) -> None:
        """Raise DataError for the first of `ids`, which `text` became, that the embedding has no row for."""
        if not self.beyond:
            return
        wrong = next((number for number in ids if number >= self.vocab_size), None)
        if wrong is not None:
            raise DataError(
                f"{text}: needs the token {self.beyond.get(wrong, '')!r}, whose id {wrong} is beyond the vocab_size "
                f"{self.vocab_size} of {self.model}; its tokenizer has ids up to {max(self.beyond)}",
                hint="use the tokenizer that the model was trained with, or enlarge the model's embedding "
                "(resize_token_embeddings in transformers)",
            )

    @property
    def remark(self) -> str | None:
        """A sentence about the tokens without a row, None where there are none."""
        if not self.beyond:
            return None
        tokens = [f"{token} ({number})" for number, token in self.beyond.items()]
        more = f" and {len(tokens) - 3} more" if len(tokens) > 3 else ""
        return (
            f"the tokenizer has tokens beyond the vocab_size {self.vocab_size} of {self.model}, "
            f"{', '.join(tokens[:3])}{more}: text that needs one of them is refused"
        )


def has_tokenizer(directory: Path) -> bool:
    """Return whether a directory holds the files of a tokenizer."""
    return any((directory / name).exists() for name in _TOKENIZER_FILES)


def load_tokenizer(model: str | Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer beside a checkpoint, a directory or a hub id, with the EOS and BOS that the model has.

    A tokenizer.json alone does not say which of its tokens are EOS and BOS. Where the tokenizer has no EOS, it is given
    the first token that config.json, else generation_config.json, names by its id. BOS is named in the same way, but
    only if the tokenizer puts this very token before a text. Raises DataError as `open_tokenizer` does.
    """
    tokenizer = open_tokenizer(model)
    with tokenizer_errors(f"{model}: the tokenizer is of no use"):
        if tokenizer.special_tokens_map.get("eos_token") is None:
            tokens = tokenizer.convert_ids_to_tokens(_configured_ids(model, "eos_token_id"))
            tokenizer.eos_token = next((token for token in tokens if token is not None), None)
        if tokenizer.special_tokens_map.get("bos_token") is None:
            begins = tokenizer("a")["input_ids"][:1]
            if begins and begins[0] in _configured_ids(model, "bos_token_id"):
                tokenizer.bos_token = tokenizer.convert_ids_to_tokens(begins[0])
    return tokenizer


def open_tokenizer(model: str | Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer beside a checkpoint as transformers opens it.

    Raises DataError where there is none or it cannot be loaded.
    """
    from transformers import AutoTokenizer

    directory = Path(model)
    if directory.is_dir():
        if not has_tokenizer(directory):
            raise DataError(
                f"{model}: no tokenizer ({', '.join(_TOKENIZER_FILES[:3])} …) beside the weights",
                hint="copy the tokenizer files of the original model into this directory",
            )
        _require_regular(directory)
        _require_ids(directory)
    with tokenizer_errors(f"{model}: the tokenizer cannot be loaded"):
        place = directory if directory.is_dir() else str(model)
        opened: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(place, trust_remote_code=remote_code_allowed())
    return opened


@contextmanager
def tokenizer_errors(what: str) -> Iterator[None]:
    """Raise DataError for whatever a tokenizer's library raises: files are wrong in more ways than it has words for.

    A panic of the tokenizers library, which Python does not count among its exceptions, is one of these errors.
    """
    try:
        yield
    except DataError:
        raise
    except BaseException as error:
        is_panic = type(error).__name__ == "PanicException"
        if is_out_of_memory(error) or not (is_panic or isinstance(error, Exception)):
            raise
        raise DataError(f"{what} ({in_one_line(error)})") from error


def _require_regular(directory: Path) -> None:
    """Raise DataError where what a tokenizer may be read from is no regular file, which transformers would wait for."""
    for path in sorted(directory.iterdir()):
        try:
            if not path.is_dir() and path.suffix in _READ_SUFFIXES:
                require_regular(path)
        except NotRegularError as error:
            raise DataError(f"{path}: {error.strerror}", hint="put the file itself there, or remove it") from error
        except OSError:  # a link that leads nowhere, which transformers does not find either
            continue


def _require_ids(directory: Path) -> None:
    """Raise DataError for a token id so large that the list of all tokens, which the library makes, takes all memory.

    A vocabulary without a large number is not parsed here a second time.
    """
    for name in _VOCABULARIES:
        path = directory / name
        if not path.is_file():
            continue
        try:
            with open_regular(path) as file:
                large = _LARGE_NUMBER.search(file.read())
            content = read_object(path) if large else {}
        except (OSError, CheckpointError):
            continue  # the library says what is wrong
        model = content.get("model")
        vocabulary = model.get("vocab") if isinstance(model, dict) else content
        added = content.get("added_tokens")
        ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
        ids += [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
        largest = max((number for number in ids if isinstance(number, int)), default=0)
        if largest > _MAX_ID:
            raise DataError(f"{path}: has the token id {largest}, expected at most {_MAX_ID}", hint="download it again")


def _configured_ids(model: str | Path, key: str) -> list[int]:
    """The token ids that config.json and generation_config.json name under a key, those of config.json first."""
    found: list[int] = []
    for name in ("config.json", "generation_config.json"):
        config = _read_config(model, name)
        section = config.get("text_config")
        value = config.get(key, section.get(key) if isinstance(section, dict) else None)
        ids = value if isinstance(value, list) else [value]
        found += [number for number in ids if type(number) is int and 0 <= number < _MAX_ID]
    return found


def vocabulary_size(model: str | Path) -> int | None:
    """Return how many token ids a model takes, by its config or the default of its class; None where nobody knows."""
    from transformers import AutoConfig

    config = _read_config(model, "config.json")
    for section in (config, config.get("text_config")):
        if isinstance(section, dict) and type(section.get("vocab_size")) is int:
            return int(section["vocab_size"])
    try:
        loaded = AutoConfig.from_pretrained(model, trust_remote_code=remote_code_allowed())
        return int(loaded.get_text_config().vocab_size)
    except Exception as error:  # a config can be wrong in more ways than transformers has words for
        if is_out_of_memory(error):
            raise
        return None


def _read_config(model: str | Path, name: str) -> dict[str, Any]:
    """A JSON file beside a checkpoint, a directory or a hub id; {} where there is none that can be read."""
    from transformers.utils.hub import cached_file

    try:
        path = cached_file(str(model), name, _raise_exceptions_for_missing_entries=False)
        return {} if path is None else read_object(Path(path))
    except (CheckpointError, OSError, ValueError):
        return {}
