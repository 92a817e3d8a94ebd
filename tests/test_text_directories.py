"""Which files of a directory are text: splits, configurations, and what lies beside data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kvconvert.convert.errors import DataError
from kvconvert.convert.text.directory import find_files
from kvconvert.convert.text.documents import describe_files, read_documents
from kvconvert.convert.text.sources import TextSource


def write(directory: Path, *names: str) -> Path:
    """Files that hold their own names, as a row or as plain text."""
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": name}) if path.suffix in (".jsonl", ".json", ".JSONL") else name)
    return directory


def found(directory: Path, **options: Any) -> list[str]:
    files = find_files(directory, TextSource(str(directory), **options)).files
    return [file.relative_to(directory).as_posix() for file in files]


BESIDE = (
    *("README.md", "LICENSE.txt", "CHANGELOG.md", "requirements.txt", "requirements-dev.txt", "notes.pdf"),
    *("config.json", "dataset_info.json", "._a.jsonl"),
    *(".ipynb_checkpoints/a-checkpoint.jsonl", ".git/x.jsonl", "__pycache__/y.jsonl"),
)


def test_what_lies_beside_data_is_not_read_and_named(tmp_path: Path) -> None:
    directory = write(tmp_path, "a.jsonl", "b/c.JSONL", *BESIDE)
    assert found(directory) == ["a.jsonl", "b/c.JSONL"]
    assert describe_files(TextSource(str(directory))) == (
        f"{directory}: 2 files (a.jsonl, c.JSONL), not ._a.jsonl, .git/, .ipynb_checkpoints/, __pycache__/ (hidden); "
        "CHANGELOG.md, LICENSE.txt, README.md, config.json, dataset_info.json and 2 more (about the data); "
        "notes.pdf (no text)"
    )


@pytest.mark.parametrize(
    ("names", "read"),
    [
        (("a.jsonl", "notes.txt"), ["a.jsonl"]),
        (("a.jsonl", "one.txt", "two.txt"), ["one.txt", "two.txt"]),
        (("one.txt", "two.md"), ["one.txt", "two.md"]),
        (("a.jsonl", "b.json", "c.json.gz"), ["a.jsonl", "b.json", "c.json.gz"]),
    ],
)
def test_rows_and_plain_text_are_not_mixed(names: tuple[str, ...], read: list[str], tmp_path: Path) -> None:
    assert found(write(tmp_path, *names)) == read


def test_links_are_followed_and_nothing_is_read_twice(tmp_path: Path) -> None:
    elsewhere = write(tmp_path / "elsewhere", "b.jsonl", "deep/c.jsonl")
    directory = write(tmp_path / "data", "a.jsonl")
    (directory / "more").symlink_to(elsewhere)
    (directory / "again").symlink_to(elsewhere)
    (directory / "loop").symlink_to(directory)
    (directory / "latest.jsonl").symlink_to(directory / "a.jsonl")
    (directory / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    source = TextSource(str(directory))
    assert sorted(read_documents(source)) == ["a.jsonl", "b.jsonl", "deep/c.jsonl"]
    assert "latest.jsonl (a link to a.jsonl)" in (describe_files(source) or "")


SHARDS = ("data/train-00000-of-00002.json", "data/train-00001-of-00002.json", "data/test-00000-of-00001.json")


@pytest.mark.parametrize(
    ("names", "split", "read"),
    [
        (SHARDS, None, list(SHARDS[:2])),
        (SHARDS, "test", list(SHARDS[2:])),
        (("train.jsonl", "dev.jsonl"), "validation", ["dev.jsonl"]),
        (("train/a.jsonl", "test/a.jsonl"), "test", ["test/a.jsonl"]),
        (("a.jsonl", "uptrain.jsonl"), None, ["a.jsonl", "uptrain.jsonl"]),
        (("a.jsonl", "b.jsonl"), "train", ["a.jsonl", "b.jsonl"]),
        (("a.jsonl", "test.pdf"), None, ["a.jsonl"]),
    ],
)
def test_splits_are_told_by_names(names: tuple[str, ...], split: str | None, read: list[str], tmp_path: Path) -> None:
    assert found(write(tmp_path, *names), split=split) == read


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (SHARDS, {"split": "dev"}, r"no split 'dev' \(there is train, test\)"),
        (("train.jsonl",), {"usual_split": "test"}, r"no split 'test' \(there is train\)"),
        (("a.jsonl",), {"split": "test"}, "no split 'test': it has none, only all of it"),
        (("a.jsonl",), {"config": "en"}, "no configuration 'en': it has none"),
        (("README.md", "notes.pdf"), {}, "no text in this directory, only README.md, notes.pdf"),
        ((), {}, "no text in this directory$"),
    ],
)
def test_what_is_not_there_is_refused(
    names: tuple[str, ...], options: dict[str, str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        found(write(tmp_path, *names), **options)


def test_a_file_has_no_split(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl") / "a.jsonl"
    assert list(read_documents(TextSource(str(path), usual_split="test"))) == ["a.jsonl"]
    with pytest.raises(DataError, match="no split 'test': a file has none") as raised:
        list(read_documents(TextSource(str(path), split="test")))
    assert raised.value.settings == ("split",)


CARD = """---
license: mit
configs:
- config_name: prose
  data_files:
  - split: train
    path: p/*.jsonl
  - split: held_out
    path: [p/x/*.jsonl, q.jsonl]
- config_name: verse
  data_dir: v
---
# A card
"""


def test_a_card_says_what_belongs_to_a_configuration_and_a_split(tmp_path: Path) -> None:
    directory = write(tmp_path, "p/a.jsonl", "p/b.jsonl", "p/x/c.jsonl", "q.jsonl", "v/d.jsonl", "v/test/e.jsonl")
    (directory / "README.md").write_text(CARD)
    assert found(directory, config="prose") == ["p/a.jsonl", "p/b.jsonl"]
    assert found(directory, config="prose", split="held_out") == ["p/x/c.jsonl", "q.jsonl"]
    assert found(directory, config="verse", split="test") == ["v/test/e.jsonl"]
    with pytest.raises(DataError, match=r"several configurations \(there is prose, verse\)") as raised:
        found(directory)
    assert raised.value.settings == ("config", "data_config")
    with pytest.raises(DataError, match=r"no configuration 'music' \(there is prose, verse\)"):
        found(directory, config="music")
    with pytest.raises(DataError, match=r"no split 'test' \(there is train, held_out\)"):
        found(directory, config="prose", split="test")


def test_a_card_without_configurations_and_one_that_is_broken(tmp_path: Path) -> None:
    directory = write(tmp_path, "a.jsonl")
    (directory / "README.md").write_text("---\nlicense: mit\n---\n")
    assert found(directory) == ["a.jsonl"]
    (directory / "README.md").write_text("---\nconfigs: [prose]\n---\n")
    with pytest.raises(DataError, match=r"README\.md: its configurations cannot be read"):
        found(directory)


SHARD = "data/train-00000-of-00001"
NAMES = st.sampled_from(["a", "train", "test", "dev", "x-train", "valid_1", SHARD, "test/b", "eval"])


@settings(max_examples=20)  # `datasets` takes a quarter of a second for each
@given(
    names=st.lists(NAMES, min_size=1, max_size=6, unique=True), split=st.sampled_from(["train", "validation", "test"])
)
def test_splits_are_those_of_datasets(names: list[str], split: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The oracle: what `datasets` itself makes of the directory."""
    directory = write(tmp_path_factory.mktemp("data"), *(f"{name}.jsonl" for name in names))
    patterns = datasets.data_files.get_data_patterns(str(directory))
    files = datasets.data_files.DataFilesDict.from_patterns(patterns, base_path=str(directory))
    expected = sorted(Path(file).relative_to(directory).as_posix() for file in files.get(split, []))
    if expected:
        assert found(directory, split=split) == expected
    else:
        with pytest.raises(DataError, match=f"no split '{split}'"):
            found(directory, split=split)


def test_what_save_to_disk_wrote_is_read(tmp_path: Path) -> None:
    datasets.disable_progress_bars()
    parts = {name: datasets.Dataset.from_dict({"text": [f"{name} 1", f"{name} 2"]}) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "several")
    parts["test"].save_to_disk(tmp_path / "one", num_shards=2)

    def read(name: str, **options: str) -> list[str]:
        return list(read_documents(TextSource(str(tmp_path / name), **options)))  # type: ignore[arg-type]

    assert read("several") == ["train 1", "train 2"]
    assert read("several", split="test") == ["test 1", "test 2"]
    assert read("one") == ["test 1", "test 2"]
    with pytest.raises(DataError, match=r"no split 'dev' \(there is train, test\)"):
        read("several", split="dev")
    with pytest.raises(DataError, match="no split 'dev': it has none"):
        read("one", split="dev")
