"""Text as people have it: endings, compressions, encodings, JSON of several forms, and what stands in a row."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from conftest import build_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from kvconvert.convert.errors import DataError, InputError
from kvconvert.convert.text import json_rows, parts
from kvconvert.convert.text.documents import read_documents, read_parts
from kvconvert.convert.text.json_rows import read_json_rows
from kvconvert.convert.text.reading import Reading, separators
from kvconvert.convert.text.sources import TextSource
from pyarrow import parquet

DOCUMENTS = ["one – ünicode", "two\nlines", "three 🙂"]
ROWS = [{"text": text} for text in DOCUMENTS]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def read(path: Path, reading: Reading | None = None, **options: Any) -> list[str]:
    return list(read_documents(TextSource(str(path), **options), reading))


def gz(content: bytes) -> bytes:
    """Without the time of day, which would give a test another name in every process."""
    return gzip.compress(content, mtime=0)


def zstd(content: bytes) -> bytes:
    return bytes(pa.compress(content, codec="zstd", asbytes=True))


def arrow_file(stream: bool) -> bytes:
    sink, table = io.BytesIO(), pa.table({"text": DOCUMENTS})
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def parquet_file() -> bytes:
    sink = io.BytesIO()
    parquet.write_table(pa.table({"text": DOCUMENTS}), sink)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.JSONL", LINES),
        ("a.ndjson", LINES),
        ("a.json", LINES),
        ("a.json.gz", gz(LINES)),
        ("a.JSONL.GZ", gz(LINES)),
        ("a.jsonl.zst", zstd(LINES)),
        ("a.jsonl.zst", zstd(LINES[:40]) + zstd(LINES[40:])),
        ("a.jsonl.xz", lzma.compress(LINES)),
        ("a.jsonl.bz2", bz2.compress(LINES)),
        ("a.jsonl", b"\xef\xbb\xbf" + LINES),
        ("a.jsonl", b"\r\n" + LINES.replace(b"\n", b"\r\n\r\n")),
        ("a.json", json.dumps(ROWS).encode()),
        ("a.jsonl", json.dumps(ROWS).encode()),
        ("a.json", b"\xef\xbb\xbf" + json.dumps(ROWS, indent=2).encode()),
        ("a.json.gz", gz(json.dumps(ROWS, indent=2).encode())),
        ("a.json", "\n".join(json.dumps(row | {"n": [1]}, indent=1) for row in ROWS).encode()),
        ("a.json", b"".join(b'{"n": 1,\n "text": ' + json.dumps(text).encode() + b"}\n" for text in DOCUMENTS)),
        ("a.arrow", arrow_file(stream=False)),
        ("a.arrow", arrow_file(stream=True)),
        ("a.parquet", parquet_file()),
    ],
)
def test_rows_of_every_form_are_the_same(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name) == DOCUMENTS


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b"one\n\ntwo"),
        ("a.TXT", b"\xef\xbb\xbfone\r\n\r\ntwo"),
        ("a.txt.gz", gz(b"one\n\ntwo")),
        ("a.txt.xz", lzma.compress(b"one\r\rtwo")),
        ("a.md.zst", zstd(b"one\n\ntwo")),
    ],
)
def test_plain_text_is_read_without_mark_and_with_line_feeds(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name) == ["one\n\ntwo"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", LINES + b'{"text": "caf\xe9"}', f"line 4: not UTF-8 (byte {len(LINES) + 13} of the file)"),
        ("a.jsonl", b"\xef\xbb\xbf" + LINES + b"\xff", f"line 4: not UTF-8 (byte {len(LINES) + 3} of the file)"),
        ("a.jsonl.gz", gz(LINES + b"\xff"), f"line 4: not UTF-8 (byte {len(LINES)} of the file)"),
        ("a.json", b'[\n{"text": "caf\xe9"}]', "line 2: not UTF-8 (byte 15 of the file)"),
        ("a.txt", b"x\n" * 700_000 + b"caf\xe9 noir", "line 700001: not UTF-8 (byte 1400003 of the file)"),
        ("a.txt", b"x" * (2**20 - 1) + "é".encode() + b"\xe9", "line 1: not UTF-8 (byte 1048577 of the file)"),
        ("a.txt", "größe".encode("utf-16"), "UTF-16, not UTF-8"),
        ("a.jsonl", LINES.decode().encode("utf-16"), "UTF-16, not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n["x"]\n', "line 2: list, not an object with fields"),
        ("a.json", b'[{"text": "x"},\n {"text": }]', "line 2: not JSON (Expecting value)"),
        ("a.json", b'[{"text": "x"}\n {"text": "y"}]', "line 2: not JSON (expected , or ] after an element)"),
        ("a.json", b'[{"text": "x"}', "line 1: not JSON (the array does not end)"),
        ("a.json", b'[{"text": "x"}]\n{', "line 2: not JSON (something stands behind the end)"),
        ("a.json", b'["x"]', "row 1 (line 1): str, not an object with fields"),
        ("a.jsonl.zst", zstd(LINES)[:-4], "cannot be read (Truncated compressed stream)"),
        ("a.jsonl.xz", lzma.compress(LINES)[:-4], "cannot be read (Compressed file ended before"),
        ("a.arrow", b"ARROW1xx", "cannot be read ("),
    ],
)
def test_what_cannot_be_read_is_named_with_its_true_place(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match="^" + re.escape(str(path)) + "(, |: )" + re.escape(message)):
        read(path)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(
    rows=st.lists(st.dictionaries(st.text(max_size=4), VALUES, min_size=1, max_size=3), max_size=5),
    indent=st.sampled_from([None, 0, 2]),
    as_array=st.booleans(),
    size=st.integers(1, 40),
)
def test_any_json_is_read_as_the_library_reads_it(
    rows: list[dict[str, Any]], indent: int | None, as_array: bool, size: int
) -> None:
    dump: Callable[[Any], str] = lambda value: json.dumps(value, indent=indent, ensure_ascii=False)  # noqa: E731
    text = dump(rows) if as_array else "\n".join(map(dump, rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "PART_BYTES", size)
        content = io.BufferedReader(io.BytesIO(text.encode(errors="surrogatepass")))
        assert [value for _, value in read_json_rows(content, "a.json")] == rows


def test_a_value_is_not_looked_for_behind_what_is_wrong() -> None:
    """A file of another kind is refused at its beginning, without being held whole."""
    taken: list[str] = []

    def texts() -> Any:
        for number in range(100):
            taken.append(f"[x{number}" + " " * 100)
            yield taken[-1]

    with pytest.raises(DataError, match="line 1: not JSON"):
        list(json_rows._values(texts(), "a.json"))
    assert len(taken) == 1


def test_half_a_character_is_read_as_a_replacement_and_said(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "whole \\ud83d\\ude42"}\n{"text": "cut \\ud83d here"}\n{"text": "\\ude42"}\n')
    reading = Reading()
    assert read(path, reading) == ["whole 🙂", "cut \ufffd here", "\ufffd"]
    assert list(reading.notes.sentences("a.jsonl")) == [
        f"a.jsonl: half a character (a lone surrogate) is read as U+FFFD in 2 rows, the first: {path}, line 2"
    ]


def test_bad_lines_are_left_out_and_counted_where_that_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    bad = [b"{", b'{"body": 1}', b'{"text": 3}', b'{"text": "caf\xe9"}', b'"x"']
    path.write_bytes(b'{"text": "one"}\n' + b"\n".join(bad) + b'\n{"text": "two"}\n')
    with pytest.raises(DataError, match="line 2: not JSON"):
        read(path)
    reading = Reading()
    assert read(path, reading, skip_bad_lines=True) == ["one", "two"]
    (said,) = reading.notes.sentences("a.jsonl")
    assert said.startswith(f"a.jsonl: left out 5 rows without readable text, the first: {path}, line 2: not JSON")


def test_text_stands_in_nested_fields_and_in_bytes(tmp_path: Path) -> None:
    rows = [{"doc": {"text": text}, "doc.title": "a title", "raw": text.encode()} for text in DOCUMENTS]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({**row, "raw": ""}) + "\n" for row in rows))
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        assert read(tmp_path / name, text_field="doc.text") == DOCUMENTS
    assert read(tmp_path / "a.jsonl", text_field="doc.title") == ["a title"] * 3
    assert read(tmp_path / "a.parquet", text_field="raw") == DOCUMENTS
    with pytest.raises(DataError, match=r"line 1, in 'doc': no field 'body' \(there is text\)"):
        read(tmp_path / "a.jsonl", text_field="doc.body")


def test_messages_become_text_by_the_chat_template(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}) + "\n")
    tokenizer = build_tokenizer()
    with pytest.raises(DataError, match="line 1: a conversation, and the tokenizer has no chat template"):
        read(path, Reading(tokenizer), text_field="messages")
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    assert read(path, Reading(tokenizer), text_field="messages") == ["<user>hi</s>"]


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("one\n<|endoftext|>\ntwo<|endoftext|>three", {}, ["one", "two", "three"]),
        ("one</s>two\n</s>\n", {}, ["one", "two"]),
        ("one\n\n</s>\n\ntwo", {}, ["one\n", "\ntwo"]),
        ("one</s>two", {"document_separator": ""}, ["one</s>two"]),
        ("one</s>two\n---\nthree", {"document_separator": "---"}, ["one</s>two", "three"]),
        ("one\ntwo</s>\n\n three\n", {"line_documents": True}, ["one", "two</s>", " three"]),
    ],
)
@pytest.mark.parametrize("part_bytes", [3, 2**20])
def test_plain_text_is_divided(
    text: str, options: dict[str, Any], expected: list[str], part_bytes: int,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(parts, "PART_BYTES", part_bytes)
    (tmp_path / "a.txt").write_text(text)
    assert read(tmp_path / "a.txt", Reading(build_tokenizer()), **options) == expected


def test_lines_and_a_separator_contradict_each_other() -> None:
    with pytest.raises(InputError, match="a document is a line, or ends at a separator, not both"):
        TextSource("a.txt", line_documents=True, document_separator="---")


def test_text_is_divided_at_empty_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n\n\nthree\n\nfour\n")
    assert read(tmp_path / "a.txt", document_separator="\n\n") == ["one\ntwo", "three", "four\n"]


def test_what_text_was_divided_at_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one</s>two")
    reading = Reading(build_tokenizer())
    read(tmp_path / "a.txt", reading)
    assert list(reading.notes.sentences("a.txt")) == ["a.txt: split into documents at '</s>'"]


def test_rows_are_divided_only_where_that_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one</s>two"}\n')
    reading = Reading(build_tokenizer())
    assert read(tmp_path / "a.jsonl", reading) == ["one</s>two"]
    assert read(tmp_path / "a.jsonl", reading, document_separator="</s>") == ["one", "two"]


def test_an_eos_that_ends_turns_divides_no_documents() -> None:
    tokenizer = build_tokenizer()
    assert separators(TextSource("a.txt"), tokenizer, plain=True) == ("<|endoftext|>", "</s>")
    tokenizer.chat_template = "{{ messages[0].content }}</s>"
    assert separators(TextSource("a.txt"), tokenizer, plain=True) == ("<|endoftext|>",)


@given(text=st.text("ab\n<|>", max_size=60), part=st.integers(1, 9), piece=st.integers(1, 7))
def test_text_in_pieces_is_divided_as_the_whole(text: str, part: int, piece: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "_PART_CHARACTERS", part)
        found, document = [], ""
        for each in parts.divide((text[i : i + piece] for i in range(0, len(text), piece)), ["<|>"], set()):
            assert len(each.text) <= part
            document += each.text
            if each.ends:
                found.append(document)
                document = ""
    assert document == ""
    assert found == re.split(r"\n?<\|>\n?", text)


def test_a_long_text_comes_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PART_BYTES", 4)
    monkeypatch.setattr(parts, "_PART_CHARACTERS", 8)
    (tmp_path / "a.txt").write_text("x" * 50)
    found = list(read_parts(TextSource(str(tmp_path / "a.txt"))))
    assert "".join(part.text for part in found) == "x" * 50
    assert [part.ends for part in found] == [False] * (len(found) - 1) + [True]
    assert max(len(part.text) for part in found) == 8


def test_a_row_that_is_too_long_is_one_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "_MAX_ROW", 40)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"text": "{text}"}}\n' for text in ("a", "b" * 200, "c")))
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: longer than the 40 bytes"):
        list(read_documents(TextSource(str(path))))
    assert list(read_documents(TextSource(str(path), skip_bad_lines=True))) == ["a", "c"]
    num_bytes = path.stat().st_size
    with path.open("ab") as file:
        file.write(b"\xff\n")
    with path.open("rb") as file:
        *_, (_, error) = read_json_rows(file, "a.jsonl")
    assert str(error) == f"a.jsonl, line 4: not UTF-8 (byte {num_bytes} of the file)"


def test_a_value_over_several_lines_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "_MAX_ROW", 2**21)
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"}, {"text": "' + "b" * 2**23 + '"}]')
    with pytest.raises(DataError, match=r"a\.json, line 1: not JSON \(a value of more than 2097152 characters\)"):
        list(read_documents(TextSource(str(path))))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "a.arrow", "a.txt.gz"])
def test_a_named_pipe_is_no_text(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match=f"{name}: cannot be read \\(a named pipe, not a regular file\\)"):
        list(read_documents(TextSource(str(tmp_path / name))))


def test_a_name_that_is_too_long_is_no_text() -> None:
    with pytest.raises(DataError, match="no such file"):
        list(read_documents(TextSource("/" + "a" * 5000 + ".txt")))


@pytest.mark.parametrize("content", ["[" * 10**5, "3", '{"_data_files": 3}', '{"_data_files": [{"filename": "../a"}]}'])
def test_what_save_to_disk_does_not_write(content: str, tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(DataError, match=r"state\.json: "):
        list(read_documents(TextSource(str(tmp_path))))
    (tmp_path / "dataset_dict.json").write_text(content.replace("_data_files", "splits"))
    with pytest.raises(DataError, match=r"dataset_dict\.json: "):
        list(read_documents(TextSource(str(tmp_path))))
