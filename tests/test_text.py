from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pytest
from conftest import build_tokenizer
from kvconvert.convert.errors import DataError
from kvconvert.convert.text import TextSource, adds_bos, encode_documents, load_tokenizer, read_documents
from pyarrow import parquet
from tokenizers.processors import TemplateProcessing

DOCUMENTS = ["one – ünicode", "two\nlines", "three"]


def read(location: Path, **options: str) -> list[str]:
    return list(read_documents(TextSource(str(location), **options)))


def test_every_format_gives_the_same_documents(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in [*DOCUMENTS, " "])
    (tmp_path / "a.jsonl").write_text(lines + "\n")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(lines)
    parquet.write_table(pa.table({"text": [*DOCUMENTS, None], "n": [1] * 4}), tmp_path / "c.parquet")
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet"):
        assert read(tmp_path / name) == DOCUMENTS
    assert read(tmp_path) == DOCUMENTS * 3


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert read(tmp_path / "a.txt") == ["one\n\ntwo\n"]


def test_a_named_dataset_is_read_through_the_datasets_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dataset's name that is a local folder with a dataset card is what the library loads without network."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    rows = "".join(json.dumps({"body": text}) + "\n" for text in DOCUMENTS)
    (folder / "data.json").write_text(rows)
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: prose\n  data_files:\n  - split: validation\n    path: data.json\n---\n"
    )
    import datasets

    load = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *args, **kw: load(str(tmp_path / name), *args, **kw))
    found = list(read_documents(TextSource("corpus", text_field="body", split="validation", config="prose")))
    assert found == DOCUMENTS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", r"a\.jsonl: no text in it"),
        ("a.txt", b" \n", r"a\.txt: no text in it"),
        ("a.jsonl", b'{"text": 3}', r"line 1: field 'text' is int, not text"),
        ("a.jsonl", b'{"body": "x"}', r"line 1: no field 'text' \(there is body\)"),
        ("a.jsonl", b'{"text": "x"}\n{', r"line 2: not JSON"),
        ("a.txt", b"ab\xff", r"a\.txt: not UTF-8 \(byte 2\)"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}', mtime=0)[:-9], r"a\.jsonl\.gz: cannot be read"),
        ("a.parquet", b"PAR1", r"a\.parquet: not a parquet file"),
        ("a.csv", b"x", r"a\.csv: unknown kind of file"),
    ],
)
def test_unusable_files(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


def test_a_column_of_numbers_is_not_text(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="field 'text' is int, not text"):
        read(tmp_path / "a.parquet")


def test_unusable_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match=r"no \.txt, \.jsonl or \.parquet file in this directory"):
        read(tmp_path)
    with pytest.raises(DataError, match="no such file here, and not a readable dataset"):
        read(tmp_path / "missing.jsonl")


def test_a_missing_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no tokenizer \(tokenizer\.json, tokenizer\.model, vocab\.json …\)"):
        load_tokenizer(tmp_path)


def test_documents_end_with_eos_and_begin_with_bos_if_asked() -> None:
    tokenizer = build_tokenizer()
    plain = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in DOCUMENTS]
    assert list(encode_documents(DOCUMENTS, tokenizer)) == [[*ids, 2] for ids in plain]
    assert list(encode_documents(DOCUMENTS, tokenizer, bos=True)) == [[1, *ids, 2] for ids in plain]


def test_whether_a_tokenizer_puts_bos_is_found_out() -> None:
    tokenizer = build_tokenizer()
    assert not adds_bos(tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert adds_bos(tokenizer)
