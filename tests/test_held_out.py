"""Held-out text, from files to windows."""

from __future__ import annotations

import json
import re
import resource
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import build_number_tokenizer, build_tokenizer, write_numbers
from kvconvert.convert.calibration.text import read_calibration_text
from kvconvert.convert.checkpoint.tensors import Checkpoint
from kvconvert.convert.errors import DataError, InputError
from kvconvert.convert.text.sources import TextSource
from kvconvert.measure import EvaluationSettings
from kvconvert.measure.held_out import load_windows


@pytest.fixture
def numbers(tmp_path: Path) -> Path:
    """A place with the tokenizer whose words are numbers."""
    build_number_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def directory_of(tmp_path: Path, sizes: Sequence[int]) -> TextSource:
    """A directory whose file n holds the numbers from 100·n on, as many as its size says, in documents of three."""
    for file, size in enumerate(sizes):
        row = list(range(100 * file, 100 * file + size))
        (tmp_path / "texts").mkdir(exist_ok=True)
        write_numbers(tmp_path / "texts" / f"{file:03}.jsonl", [row[i : i + 3] for i in range(0, size, 3)])
    return TextSource(str(tmp_path / "texts"))


@pytest.mark.parametrize(
    ("sizes", "max_windows", "begins"),
    [
        ((20, 20, 20), 3, [0, 100, 200]),
        ((20, 20, 20), 5, [0, 4, 100, 104, 200]),
        ((8, 20, 20), 9, [0, 4, 100, 104, 108, 112, 200, 204, 208]),
        ((20, 20, 20, 20), 2, [0, 200]),
        ((3, 3, 3, 3, 3, 3), 3, [0, 200, 400]),  # each place is two files: windows of 0, 1, 2, 100 and so on
        ((3, 3, 3), 2, [0, 101]),  # files too short for places: from the beginning
        ((20, 20), None, [0, 4, 8, 12, 16, 100, 104, 108, 112, 116]),
        ((20,), 2, [0, 4]),
    ],
)
def test_some_windows_are_taken_from_all_files(
    sizes: tuple[int, ...], max_windows: int | None, begins: list[int], numbers: Path, tmp_path: Path
) -> None:
    windows = load_windows(numbers, directory_of(tmp_path, sizes), window=4, max_windows=max_windows)
    assert windows.input_ids[:, 0].tolist() == begins
    assert windows.scored_from == (1,) * len(begins)


def test_overlapping_windows_of_several_files_score_each_token_once(numbers: Path, tmp_path: Path) -> None:
    windows = load_windows(numbers, directory_of(tmp_path, (20, 20)), window=4, stride=2, max_windows=4)
    assert windows.input_ids.tolist() == [[0, 1, 2, 3], [2, 3, 4, 5], [100, 101, 102, 103], [102, 103, 104, 105]]
    assert windows.scored_from == (1, 2, 1, 2)


def test_text_that_is_too_short_is_refused(numbers: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the text has 6 tokens, fewer than one window of 8"):
        load_windows(numbers, directory_of(tmp_path, (3, 3)), window=8, max_windows=4)


def test_calibration_and_windows_hold_few_of_many_files_open(numbers: Path, tmp_path: Path) -> None:
    """Each file has a second document, so that one that is left in between would stay open."""
    source = directory_of(tmp_path, (6,) * 200)
    checkpoint = Checkpoint("model", numbers, {}, {}, 0)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 80, limits[1]))
    try:
        text = read_calibration_text(checkpoint, source, num_tokens=600, sequence_length=3)
        windows = load_windows(numbers, source, window=4, max_windows=100)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert text.token_ids[:3].tolist() == [[0, 1, 2], [300, 301, 302], [600, 601, 602]]  # 200 files at 64 places
    assert text.num_tokens == 600
    assert len(windows.input_ids) == 100


def test_how_documents_became_one_text_is_stated(tmp_path: Path, numbers: Path) -> None:
    build_tokenizer().save_pretrained(tmp_path / "prose")
    (tmp_path / "a.txt").write_text("some words and<|endoftext|>other words</s>")
    remarks: list[str] = []
    source = TextSource(str(tmp_path / "a.txt"))
    method = load_windows(tmp_path / "prose", source, window=4, remark=remarks.append).method
    assert method.startswith("documents split at '</s>', '<|endoftext|>' and joined by EOS, non-overlapping windows")
    assert remarks == [f"{source.location}: split into documents at '</s>', '<|endoftext|>'"]
    method = load_windows(numbers, directory_of(tmp_path, (9, 9)), window=4, max_windows=2).method
    joined = "documents from 2 places of the text in turn joined without EOS, as the tokenizer has none, "
    assert method.startswith(joined)


def test_tokens_that_the_model_has_no_row_for_are_a_remark(numbers: Path, tmp_path: Path) -> None:
    """In evaluation and in calibration alike, and text that needs one of them is refused."""
    (numbers / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 100}))
    within, beyond = TextSource(str(tmp_path / "within.jsonl")), TextSource(str(tmp_path / "beyond.jsonl"))
    write_numbers(within.path, [range(20)])
    write_numbers(beyond.path, [range(90, 110)])
    remarks: list[str] = []
    checkpoint = Checkpoint("model", numbers, {}, {}, 0)
    readers = (
        partial(load_windows, numbers, window=4, remark=remarks.append),
        partial(read_calibration_text, checkpoint, num_tokens=20, sequence_length=4, remark=remarks.append),
    )
    for read in readers:
        read(within)
        assert [text.partition(", ")[0] for text in remarks] == [
            f"the tokenizer has tokens beyond the vocab_size 100 of {numbers}"
        ]
        with pytest.raises(DataError, match=r"needs the token '10\d', whose id 10\d is beyond the vocab_size 100"):
            read(beyond)
        remarks.clear()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "fp32"}, "dtype is 'fp32', expected one of auto, float32, bfloat16, float16"),
        ({"bos": "yes"}, "bos is 'yes', expected one of auto, always, never"),
        ({"window": 1}, "window is 1, expected 2 or more"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        EvaluationSettings(**settings)
