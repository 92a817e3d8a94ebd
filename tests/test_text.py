from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pyarrow as pa
import pytest
from conftest import build_number_tokenizer, build_tokenizer
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled
from kvconvert.convert.checkpoint.tokenizer import TokenIdCheck, load_tokenizer
from kvconvert.convert.errors import DataError
from kvconvert.convert.text import estimate, parts
from kvconvert.convert.text.documents import check_text, read_documents, read_interleaved
from kvconvert.convert.text.estimate import estimate_tokens
from kvconvert.convert.text.hub import pin_revision
from kvconvert.convert.text.parts import TextPart
from kvconvert.convert.text.sources import TextSource
from kvconvert.convert.text.tokens import adds_bos, check_tokenizers, encode_documents, tokenizer_hash
from pyarrow import parquet
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing

DOCUMENTS = ["one – ünicode", "two\nlines", "three"]


def read(location: Path, **options: Any) -> list[str]:
    return list(read_documents(TextSource(str(location), **options)))


def interleaved(source: TextSource, *, seed: int) -> list[str]:
    return [part.text for part in read_interleaved(source, seed=seed)]


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
    monkeypatch.setattr("kvconvert.convert.text.hub._is_cached", lambda name: True)
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
        ("a.txt", b"ab\xff", r"a\.txt, line 1: not UTF-8 \(byte 2 of the file\)"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}', mtime=0)[:-9], r"a\.jsonl\.gz: cannot be read"),
        ("a.parquet", b"PAR1", r"a\.parquet: cannot be read \("),
        ("a.csv", b"x", r"a\.csv: unknown kind of file"),
    ],
)
def test_unusable_files(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


def test_a_missing_field_asks_for_its_name(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x"}')
    with pytest.raises(DataError) as raised:
        read(tmp_path / "a.jsonl")
    assert (raised.value.hint, raised.value.settings) == ("name the column that holds the text", ("text_field",))


def test_a_column_of_numbers_is_not_text(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="field 'text' is int, not text"):
        read(tmp_path / "a.parquet")


def test_unusable_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for constants in (huggingface_hub.constants, datasets.config):  # the variable is read when they are imported
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="no text in this directory"):
        read(tmp_path)
    for missing in (
        tmp_path / "missing.jsonl",
        Path("missing.txt"),
        Path("a/b/c"),
        Path("~missing"),
        tmp_path / "data",
    ):
        with pytest.raises(DataError, match=f"{missing}: no such file$"):
            read(missing)
    for name in ("org/data-set.v2", "data_set"):
        with pytest.raises(DataError, match=f"{name}: no such file here, and not a readable dataset"):
            list(read_documents(TextSource(name)))


@pytest.mark.parametrize("name", ["data/trian.json", "a.JSONL", "x/b.jsonl.zst", "corpus.csv", "c.txt.gz"])
def test_a_name_with_the_ending_of_a_file_is_not_asked_of_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *args, **options: pytest.fail("it was asked"))
    with pytest.raises(DataError, match=f"^{name}: no such file$"):
        check_text(TextSource(name))


def test_a_weight_where_there_is_one_text_is_explained() -> None:
    with pytest.raises(DataError, match=r"^a\.jsonl:0\.5: no such file$") as raised:
        check_text(TextSource("a.jsonl:0.5"))
    assert raised.value.hint == "one text has no weight: give a.jsonl"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ConnectionError("no route to host"), r"the hub cannot be reached \(no route to host\)"),
        (OfflineModeIsEnabled("offline"), "it is not in the cache of this machine, and HF_HUB_OFFLINE forbids"),
        (HFValidationError("a name"), r"this is no name of a dataset on the hub \(a name\)"),
    ],
)
def test_a_mistyped_path_is_refused_without_trying_again(
    error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", refuse)
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **options: pytest.fail("it was tried"))
    with pytest.raises(
        DataError, match=f"^data/trian: no such file here, and not a readable dataset: {reason}"
    ) as raised:
        list(read_documents(TextSource("data/trian")))
    assert (raised.value.hint or "").startswith("if it is a path, check its spelling")


def test_what_the_hub_does_not_explain_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise OSError("an answer of another kind")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", fail)
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **options: [{"text": "there"}])
    assert list(read_documents(TextSource("org/name"))) == ["there"]


def test_a_missing_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no tokenizer \(tokenizer\.json, tokenizer\.model, vocab\.json …\)"):
        load_tokenizer(tmp_path)


def test_documents_end_with_eos_and_begin_with_bos_if_asked() -> None:
    tokenizer = build_tokenizer()
    plain = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in DOCUMENTS]
    parts = [TextPart(text, ends=True) for text in DOCUMENTS]
    assert list(encode_documents(parts, tokenizer)) == [[*ids, 2] for ids in plain]
    assert list(encode_documents(parts, tokenizer, bos=True)) == [[1, *ids, 2] for ids in plain]


def test_whether_a_tokenizer_puts_bos_is_found_out() -> None:
    tokenizer = build_tokenizer()
    assert not adds_bos(tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert adds_bos(tokenizer)


def test_the_beginning_of_a_directory_is_a_sample_of_it(tmp_path: Path) -> None:
    """Forty files of ten documents: sixteen are read in turn, in an order that the seed draws."""
    for file in range(40):
        rows = [json.dumps({"text": f"{file} {number}"}) for number in range(10 if file else 3)]
        (tmp_path / f"{file:02}.jsonl").write_text("\n".join(rows) + "\n")
    source = TextSource(str(tmp_path))
    documents = interleaved(source, seed=0)
    assert sorted(documents) == sorted(read_documents(source))
    assert len({text.split()[0] for text in documents[:16]}) == 16
    assert {text.split()[1] for text in documents[:16]} == {"0"}
    assert {text.split()[1] for text in documents[16:32]} == {"1"}
    assert len({text.split()[0] for text in documents[:48]}) == 16
    assert documents == interleaved(source, seed=0)
    assert documents != interleaved(source, seed=1)
    assert sorted(documents) == sorted(interleaved(source, seed=1))


def test_a_directory_of_empty_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" ")
    (tmp_path / "b.txt").write_text("")
    with pytest.raises(DataError, match="no text in it"):
        list(read_interleaved(TextSource(str(tmp_path)), seed=0))


class TransportError(Exception):
    """Stands for the class of that name in the HTTP library behind the hub, which is no OSError."""


def test_a_dataset_is_pinned_to_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Api:
        def dataset_info(self, name: str, *, revision: str | None, timeout: float) -> SimpleNamespace:
            if name == "unreachable":
                raise TransportError("no route to host")
            if name == "hub/none":
                raise ValueError("unexpected")
            return SimpleNamespace(sha=f"commit of {revision} of {name}")

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    remarks: list[str] = []

    def pinned(location: str, revision: str | None = None) -> str | None:
        return pin_revision(TextSource(location, revision=revision), remark=remarks.append).revision

    assert pinned("hub/name", "v1") == "commit of v1 of hub/name"
    assert pinned(str(tmp_path)) is None
    assert remarks == []
    assert pinned("unreachable", "v1") == "v1"
    assert pinned("hub/none") is None
    unpinned = "is read without a fixed commit, so it may change between runs"
    assert remarks == [
        f"unreachable {unpinned}: the hub cannot be reached (no route to host)",
        f"hub/none {unpinned}: the hub did not give it (unexpected)",
    ]
    assert pin_revision(TextSource("unreachable", revision="v1")).revision == "v1"


def test_a_dataset_is_read_at_its_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr("kvconvert.convert.text.hub._is_cached", lambda name: True)
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, revision, **options: [{"text": f"at {revision}"}])
    assert list(read_documents(TextSource("hub/name", revision="v1"))) == ["at v1"]


def test_tokenizers_that_give_other_ids_have_another_hash() -> None:
    tokenizer = build_tokenizer()
    plain = tokenizer_hash(tokenizer)
    tokenizer(["some text", "and more"], padding=True, truncation=True, max_length=4)  # use leaves no trace
    assert tokenizer_hash(tokenizer) == plain == tokenizer_hash(build_tokenizer())
    other = build_tokenizer()
    other.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=True)
    with_bos = build_tokenizer()
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    no_eos = build_tokenizer()
    no_eos.eos_token = "<pad>"
    word = build_tokenizer()
    word.add_tokens(["foolishness"])
    assert len({plain, *map(tokenizer_hash, (other, with_bos, no_eos, word))}) == 5


class BytesTokenizer:
    """A token a character; it notes the lengths that it is given."""

    eos_token = eos_token_id = None

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def __call__(self, texts: list[str], **options: object) -> dict[str, list[list[int]]]:
        self.lengths += map(len, texts)
        return {"input_ids": [list(range(len(text))) for text in texts]}


def test_tokens_are_estimated_from_the_beginning_of_a_book(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("".join(map(str, range(40_000))))
    tokenizer: Any = BytesTokenizer()
    assert estimate_tokens(TextSource(str(book)), tokenizer) == book.stat().st_size
    assert tokenizer.lengths == [2**14]


def test_no_more_is_read_of_a_very_long_text_than_its_estimate_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "_PART_CHARACTERS", 2**14)
    monkeypatch.setattr(parts, "PART_BYTES", 2**14)
    monkeypatch.setattr(estimate, "_MAX_READ_CHARACTERS", 2**15)
    (tmp_path / "book.txt").write_bytes(b"a" * 2**17 + b"\xff")  # what is not UTF-8 is not reached
    tokenizer: Any = BytesTokenizer()
    assert estimate_tokens(TextSource(str(tmp_path / "book.txt")), tokenizer) == 2**17 + 1


@pytest.mark.parametrize(
    ("config", "generation_config", "eos"),
    [
        ({}, {}, None),
        ({"eos_token_id": 2}, {}, "</s>"),
        ({"eos_token_id": [0, 2]}, {}, "<pad>"),
        ({"eos_token_id": [9999, 2]}, {}, "</s>"),
        ({"eos_token_id": -1}, {"eos_token_id": [2, 0]}, "</s>"),
        ({"text_config": {"eos_token_id": 2}}, {}, "</s>"),
        ({"eos_token_id": None}, {"eos_token_id": 2}, "</s>"),
    ],
)
def test_a_bare_tokenizer_has_the_eos_that_the_model_names(
    config: dict[str, Any], generation_config: dict[str, Any], eos: str | None, tmp_path: Path
) -> None:
    """A tokenizer.json without tokenizer_config.json."""
    build_tokenizer().backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    (tmp_path / "generation_config.json").write_text(json.dumps(generation_config))
    assert load_tokenizer(tmp_path).special_tokens_map.get("eos_token") == eos


def test_a_tokenizers_own_eos_comes_before_the_models(tmp_path: Path) -> None:
    build_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 0}))
    assert load_tokenizer(tmp_path).eos_token == "</s>"


@pytest.mark.parametrize("template", ["<s> $A", "$A"])
def test_a_bare_tokenizer_that_puts_bos_is_known_to(template: str, tmp_path: Path) -> None:
    tokenizer = build_tokenizer().backend_tokenizer
    tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=[("<s>", 1)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "bos_token_id": 1}))
    loaded = load_tokenizer(tmp_path)
    assert adds_bos(loaded) == (template == "<s> $A")
    assert list(encode_documents([TextPart("a", ends=True)], loaded, bos=adds_bos(loaded))) == [
        loaded("a")["input_ids"]
    ]


@pytest.mark.parametrize("config", [{"vocab_size": 2}, {"text_config": {"vocab_size": 2}}])
def test_ids_beyond_the_embedding_are_named(config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    check = TokenIdCheck.of(tmp_path, build_number_tokenizer())
    check([0, 1], "a.txt")
    with pytest.raises(DataError) as raised:
        check([0, 3, 5], "a.txt")
    assert str(raised.value) == (
        f"a.txt: needs the token '3', whose id 3 is beyond the vocab_size 2 of {tmp_path}; "
        "its tokenizer has ids up to 2000"
    )
    assert check.remark is not None
    assert f"vocab_size 2 of {tmp_path}, 2 (2), 3 (3), 4 (4) and 1996 more:" in check.remark


@pytest.mark.parametrize("config", [{"vocab_size": 2001}, {"model_type": "llama"}, {"model_type": "unknown"}])
def test_an_embedding_that_holds_every_id_is_not_looked_at_again(config: dict[str, Any], tmp_path: Path) -> None:
    """The default of Llama's class is 32000; of a class that nobody knows nothing is said."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    check = TokenIdCheck.of(tmp_path, build_number_tokenizer())
    assert (dict(check.beyond), check.remark) == ({}, None)


def test_tokenizers_may_differ_where_no_model_has_a_logit(tmp_path: Path) -> None:
    """A [PAD] that was added without resizing the embedding; within it, the same token is another meaning."""
    plain, padded = tmp_path / "plain", tmp_path / "padded"
    tokenizer = build_tokenizer()
    size = len(tokenizer)
    tokenizer.save_pretrained(plain)
    tokenizer.add_tokens(["[PAD]"])
    tokenizer.save_pretrained(padded)
    for vocab_size in (size, size + 1):
        for place in (plain, padded):
            (place / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": vocab_size}))
        for model, original in ((plain, padded), (padded, plain)):
            if vocab_size == size:
                check_tokenizers(model, original)
            else:
                with pytest.raises(DataError, match="its tokenizer differs from that of"):
                    check_tokenizers(model, original)
