from __future__ import annotations

import gzip
import json
import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PROSE, build_number_tokenizer, build_tokenizer, pack_numbers, write_numbers
from hypothesis import given
from hypothesis import strategies as st
from kvconvert.convert.errors import DataError, InputError, PreemptedError
from kvconvert.convert.text import cuts, parts, tokens
from kvconvert.convert.text.estimate import estimate_tokens
from kvconvert.convert.text.sources import TextSource
from kvconvert.convert.text.tokens import encode_batch
from kvconvert.uptrain.data import blocks, documents, packing, shards
from kvconvert.uptrain.data.blocks import PackedBlocks, validation_blocks
from kvconvert.uptrain.data.corpus import Corpus, most_passes
from kvconvert.uptrain.data.mixture import WINDOW, Mixture, shuffled, splitmix64
from kvconvert.uptrain.data.packing import build
from kvconvert.uptrain.data.shards import SourceIndex
from kvconvert.uptrain.data.sources import WeightedSource
from torch.utils.data import DataLoader

LENGTH = 4
TOKENIZER = build_number_tokenizer()


class KilledError(Exception):
    """Stands for a machine that goes away without a word."""


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five blocks a shard, three documents a batch."""
    monkeypatch.setattr(shards, "SHARD_TOKENS", 5 * LENGTH)
    monkeypatch.setattr(documents, "_ENCODE_BATCH", 3)


def corpus_of(*paths: Path, num_blocks: int, weights: Sequence[float] = (1.0, 1.0), **options: Any) -> Corpus:
    sources = tuple(WeightedSource(TextSource(str(path)), weight) for path, weight in zip(paths, weights, strict=False))
    return Corpus(
        sources=sources,
        num_blocks=num_blocks,
        **{"sequence_length": LENGTH, "tokenizer_hash": "numbers", "vocab_size": 2001, **options},
    )


def consecutive(num_tokens: int, *, first: int = 0, length: int = 7) -> list[list[int]]:
    """Documents of lengths 1 to `length` in turn, whose tokens count up, so that each token shows its place."""
    documents: list[list[int]] = []
    begin = first
    while begin < first + num_tokens:
        size = min(1 + len(documents) % length, first + num_tokens - begin)
        documents.append(list(range(begin, begin + size)))
        begin += size
    return documents


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def ids(blocks: PackedBlocks) -> list[list[int]]:
    return [blocks[sample]["input_ids"].tolist() for sample in range(len(blocks))]


def test_splitmix64_gives_its_published_numbers() -> None:
    """From the state 1234567, as rosettacode.org and the reference in C print them."""
    assert splitmix64(1234567, 3).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@given(count=st.integers(0, 300), key=st.tuples(st.integers(-3, 3), st.text(max_size=3)))
def test_an_order_holds_each_number_once_and_depends_on_its_key(count: int, key: tuple[int | str, ...]) -> None:
    assert sorted(shuffled(count, *key).tolist()) == list(range(count))
    if count > 20:
        assert shuffled(count, *key).tolist() != shuffled(count, *key, "other").tolist()


WEIGHTS = st.lists(st.integers(1, 60), min_size=1, max_size=8).map(lambda weights: [float(w) for w in weights])


@given(weights=WEIGHTS, seed=st.integers(), first_window=st.integers(0, 10**6))
def test_every_window_is_mixed_exactly(weights: list[float], seed: int, first_window: int) -> None:
    mixture = Mixture.of(weights, seed=seed)
    for window in range(first_window, first_window + 3):
        counts = mixture.counts(window * WINDOW)
        assert sum(counts) == window * WINDOW
        for count, weight in zip(counts, weights, strict=True):
            # shares are rounded to 2**-40, which is a thousandth of a sample after 10**9
            assert abs(count - weight / sum(weights) * window * WINDOW) < 1.001
    drawn = np.random.default_rng(0).choice(len(weights), size=10**6, p=np.array(weights) / sum(weights))
    if len(weights) > 1:  # the control: independent draws are not exact
        assert (
            np.abs(np.bincount(drawn, minlength=len(weights)) - 10**6 * np.array(weights) / sum(weights)).max() > 1.001
        )


@given(weights=WEIGHTS, seed=st.integers(), begin=st.integers(0, 5000))
def test_any_sample_is_found_as_a_loop_from_the_first_finds_it(weights: list[float], seed: int, begin: int) -> None:
    mixture = Mixture.of(weights, seed=seed)
    seen: Counter[int] = Counter()
    for sample in range(begin + 3):
        source, number = mixture.locate(sample)
        if sample >= begin:
            assert mixture.counts(sample) == tuple(seen[source] for source in range(len(weights)))
        assert number == seen[source]
        seen[source] += 1


def test_a_weight_below_one_sample_in_a_window_is_refused(tmp_path: Path) -> None:
    Mixture.of([1023, 1], seed=0)
    with pytest.raises(InputError, match=r"source 2 has 0\.00093 of the weight, less than one sample in 1024"):
        Mixture.of([1080, 1], seed=0)


def test_blocks_hold_the_documents_one_after_the_other(tmp_path: Path) -> None:
    documents = [[10, 11, 12], [20, 21], [30, 31, 32, 33, 34, 35, 36], [40]]
    blocks = pack_numbers(tmp_path, documents, sequence_length=4, num_blocks=3)
    by_first_token = {sample["input_ids"][0].item(): sample for sample in (blocks[i] for i in range(3))}
    assert {key: sample["input_ids"].tolist() for key, sample in by_first_token.items()} == {
        10: [10, 11, 12, 20],
        21: [21, 30, 31, 32],
        33: [33, 34, 35, 36],
    }
    assert by_first_token[10]["position_ids"].tolist() == [0, 1, 2, 0]
    assert by_first_token[10]["labels"].tolist() == [-100, 11, 12, -100]
    assert by_first_token[21]["position_ids"].tolist() == [0, 0, 1, 2]
    assert by_first_token[21]["labels"].tolist() == [21, -100, 31, 32]
    assert by_first_token[33]["position_ids"].tolist() == [0, 1, 2, 3]
    assert by_first_token[33]["labels"].tolist() == [33, 34, 35, 36]
    assert {tensor.dtype for tensor in by_first_token[10].values()} == {torch.int64}
    with pytest.raises(IndexError, match="sample 3 of 3"):
        blocks[3]


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=40))
def test_samples_equal_a_loop_over_the_tokens(lengths: list[int], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Positions and labels across blocks and shards, from documents of any length."""
    tokens = [(token, place) for length in lengths for place, token in enumerate(range(100, 100 + length))]
    tokens = [(100 + n, place) for n, (_, place) in enumerate(tokens)]
    num_blocks = len(tokens) // LENGTH
    if num_blocks == 0:
        return
    documents, begin = [], 100
    for length in lengths:
        documents.append(list(range(begin, begin + length)))
        begin += length
    expected = []
    for first in range(0, num_blocks * LENGTH, LENGTH):
        block = tokens[first : first + LENGTH]
        positions: list[int] = []
        for _, place in block:
            positions.append(0 if place == 0 or not positions else positions[-1] + 1)
        expected.append(
            ([token for token, _ in block], positions, [-100 if place == 0 else token for token, place in block])
        )
    blocks = pack_numbers(tmp_path_factory.mktemp("samples"), documents, sequence_length=LENGTH, num_blocks=num_blocks)
    found = [
        tuple(blocks[n][name].tolist() for name in ("input_ids", "position_ids", "labels")) for n in range(num_blocks)
    ]
    assert sorted(found) == expected


def test_each_pass_sees_every_block_once_in_another_order(tmp_path: Path) -> None:
    path = write_numbers(tmp_path / "a.jsonl", consecutive(80))
    orders = []
    for seed in (0, 1):
        build(corpus_of(path, num_blocks=60, seed=seed), tmp_path / f"seed-{seed}", TOKENIZER)
        orders.append(ids(PackedBlocks(tmp_path / f"seed-{seed}", num_samples=60)))
    passes = [[block[0] for block in orders[0][begin : begin + 20]] for begin in (0, 20, 40)]
    assert all(sorted(order) == list(range(0, 80, 4)) for order in passes)
    assert passes[0] != passes[1] != passes[2]
    assert orders[0][:20] != orders[1][:20]


def test_a_dataset_without_a_fixed_commit_is_remarked_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(api: object, name: str, **options: object) -> None:
        raise ConnectionError("no route to host")

    rows = [{"text": " ".join(map(str, document))} for document in consecutive(80)]
    monkeypatch.setattr("datasets.load_dataset", lambda *names, **options: rows)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    monkeypatch.setattr("kvconvert.convert.text.hub._is_cached", lambda name: True)
    remarks: list[str] = []
    local = write_numbers(tmp_path / "a.jsonl", consecutive(80))
    build(corpus_of(local, num_blocks=5), tmp_path / "local", TOKENIZER, remark=remarks.append)
    assert remarks == []
    build(corpus_of(Path("hub/name"), num_blocks=5), tmp_path / "dataset", TOKENIZER, remark=remarks.append)
    assert remarks == [
        "hub/name is read without a fixed commit, so it may change between runs: the hub cannot be reached "
        "(no route to host)"
    ]


def test_sources_are_mixed_by_weight_and_each_goes_round_by_itself(tmp_path: Path) -> None:
    one = write_numbers(tmp_path / "one.jsonl", consecutive(400))
    other = write_numbers(tmp_path / "other.jsonl", consecutive(82, first=1000))
    corpus = corpus_of(one, other, num_blocks=2 * WINDOW, weights=[3, 1])
    assert corpus.shares == (0.75, 0.25)
    build(corpus, tmp_path / "packed", TOKENIZER)
    blocks = PackedBlocks(tmp_path / "packed", num_samples=2 * WINDOW)
    seen = ids(blocks)
    for window in (seen[:WINDOW], seen[WINDOW:]):
        assert sum(block[0] < 1000 for block in window) == 768
    for values, num_blocks in ((range(0, 400, 4), 100), (range(1000, 1080, 4), 20)):
        firsts = [block[0] for block in seen if block[0] in values]
        for begin in range(0, len(firsts) - num_blocks, num_blocks):
            assert sorted(firsts[begin : begin + num_blocks]) == list(values)
    assert blocks.passes == (1536 / 100, 512 / 20)


def test_a_second_stage_continues_where_the_first_ended(tmp_path: Path) -> None:
    path = write_numbers(tmp_path / "a.jsonl", consecutive(80))
    build(corpus_of(path, num_blocks=30), tmp_path / "packed", TOKENIZER)
    whole = ids(PackedBlocks(tmp_path / "packed", num_samples=30))
    first = PackedBlocks(tmp_path / "packed", num_samples=13)
    second = PackedBlocks(tmp_path / "packed", num_samples=17, first_sample=13)
    assert ids(first) + ids(second) == whole
    assert (first.passes, second.passes) == ((13 / 20,), (30 / 20,))
    with pytest.raises(InputError, match="packed for 30 samples, not for 31"):
        PackedBlocks(tmp_path / "packed", num_samples=18, first_sample=13)


def write_compressed(path: Path, documents: list[list[int]]) -> Path:
    """Text whose size in tokens is not known before it is read."""
    plain = write_numbers(path.with_suffix(".plain"), documents)
    path.write_bytes(gzip.compress(plain.read_bytes()))
    return path


def test_a_part_of_a_text_is_a_part_of_a_pass(tmp_path: Path) -> None:
    """One block of a hundred, where only the blocks that are needed are packed: by the estimate of a dry run."""
    path = write_numbers(tmp_path / "a.jsonl", consecutive(1600))
    build(corpus_of(path, num_blocks=40), tmp_path / "packed", TOKENIZER)
    estimate = estimate_tokens(TextSource(str(path)), TOKENIZER)
    assert estimate is not None
    assert PackedBlocks(tmp_path / "packed", num_samples=4).passes == (4 * LENGTH / estimate,)
    assert 0.02 < 40 * LENGTH / estimate <= 0.1


def test_a_part_of_a_text_of_unknown_size(tmp_path: Path) -> None:
    path = write_compressed(tmp_path / "a.jsonl.gz", consecutive(1600))
    build(corpus_of(path, num_blocks=10), tmp_path / "packed", TOKENIZER)
    assert PackedBlocks(tmp_path / "packed", num_samples=10).passes == (None,)


def test_text_of_unknown_size_that_has_ended(tmp_path: Path) -> None:
    path = write_compressed(tmp_path / "a.jsonl.gz", consecutive(80))
    build(corpus_of(path, num_blocks=50), tmp_path / "packed", TOKENIZER)
    assert PackedBlocks(tmp_path / "packed", num_samples=50).passes == (50 / 20,)


def test_text_that_has_not_ended_is_seen_once_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "estimate_tokens", lambda source, tokenizer: 10)
    path = write_numbers(tmp_path / "a.jsonl", consecutive(1600))
    build(corpus_of(path, num_blocks=40), tmp_path / "packed", TOKENIZER)
    assert PackedBlocks(tmp_path / "packed", num_samples=40).passes == (1.0,)


@pytest.mark.parametrize(
    ("passes", "most"),
    [
        ((0.5,), 0.5),
        ((0.5, 2.5), 2.5),
        ((None,), None),
        ((0.5, None), None),
        ((2.5, None), 2.5),
        ((None, 1.0), 1.0),
    ],
)
def test_passes_over_the_source_that_is_seen_most(passes: tuple[float | None, ...], most: float | None) -> None:
    assert most_passes(passes) == most


def test_no_more_than_the_blocks_needed_are_packed(tmp_path: Path) -> None:
    pack_numbers(tmp_path, [list(range(10))] * 1000, sequence_length=4, num_blocks=7)
    files = sorted((tmp_path / "packed").rglob("tokens-*"))
    assert [path.stat().st_size for path in files] == [5 * 4 * 2, 2 * 4 * 2]


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    path = write_numbers(tmp_path / "a.jsonl", consecutive(80))
    for vocab_size, width in ((2**16, 2), (2**16 + 1, 4)):
        folder = tmp_path / str(vocab_size)
        build(corpus_of(path, num_blocks=5, vocab_size=vocab_size), folder, TOKENIZER)
        assert (folder / "source-0" / "tokens-00000.bin").stat().st_size == 5 * LENGTH * width
        assert sorted(chain.from_iterable(ids(PackedBlocks(folder, num_samples=5)))) == list(range(20))


def test_text_shorter_than_a_block(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"numbers\.jsonl: 3 tokens, fewer than one block of 4"):
        pack_numbers(tmp_path, [[1, 2], [3]], sequence_length=4, num_blocks=1)


def test_documents_get_bos_where_the_tokenizer_puts_one(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    (tmp_path / "a.jsonl").write_text((json.dumps({"text": PROSE[:60]}) + "\n") * 3)
    for name in ("plain", "bos"):
        tokenizer = build_tokenizer()
        if name == "bos":
            template = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
            tokenizer.backend_tokenizer.post_processor = template
        build(corpus_of(tmp_path / "a.jsonl", num_blocks=100, vocab_size=384), tmp_path / name, tokenizer)
        source = SourceIndex.read(tmp_path / name / "source-0")
        blocks = PackedBlocks(tmp_path / name, num_samples=source.num_blocks)
        assert list(chain.from_iterable(ids(blocks))).count(1) == (3 if name == "bos" else 0)


def test_worker_processes_give_the_same_samples(tmp_path: Path) -> None:
    path = write_numbers(tmp_path / "a.jsonl", consecutive(80))
    build(corpus_of(path, num_blocks=60), tmp_path / "packed", TOKENIZER)
    blocks = PackedBlocks(tmp_path / "packed", num_samples=60)
    expected = ids(blocks)  # this process has its files open now
    assert ids(pickle.loads(pickle.dumps(blocks))) == expected
    assert len(pickle.dumps(blocks)) < 20_000
    loader = DataLoader(blocks, batch_size=7, num_workers=2)
    assert torch.cat([batch["input_ids"] for batch in loader]).tolist() == expected


@pytest.fixture(scope="module")
def whole_build(tmp_path_factory: pytest.TempPathFactory) -> tuple[Corpus, dict[str, bytes]]:
    """A corpus of two sources with a validation slice, and the files of its build without interruption."""
    directory = tmp_path_factory.mktemp("whole")
    one = write_numbers(directory / "one.jsonl", consecutive(400, length=30))
    other = write_numbers(directory / "other.jsonl", consecutive(150, first=1000))
    corpus = corpus_of(one, other, num_blocks=100, weights=[2, 1], validation_fraction=0.3, max_validation_blocks=9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_TOKENS", 5 * LENGTH)
        patch.setattr(documents, "_ENCODE_BATCH", 3)
        build(corpus, directory / "packed", TOKENIZER)
    return corpus, contents(directory / "packed")


def stops_after(num_polls: int, *, kill: bool) -> Callable[[], bool]:
    polls = iter(range(num_polls))

    def should_stop() -> bool:
        if next(polls, None) is not None:
            return False
        if kill:
            raise KilledError
        return True

    return should_stop


@given(
    interruptions=st.lists(
        st.tuples(st.integers(0, 25), st.booleans(), st.sampled_from(["", "cut", "longer"])), max_size=6
    )
)
def test_interrupted_anywhere_the_files_are_the_same(
    interruptions: list[tuple[int, bool, str]],
    whole_build: tuple[Corpus, dict[str, bytes]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Stopped with a word or killed without one, and with the file that was being written torn or longer than known."""
    corpus, expected = whole_build
    folder = tmp_path_factory.mktemp("interrupted") / "packed"
    for num_polls, kill, damage in interruptions:
        try:
            build(corpus, folder, TOKENIZER, should_stop=stops_after(num_polls, kill=kill))
        except (PreemptedError, KilledError):
            for path in folder.rglob("*.partial"):
                content = path.read_bytes()
                path.write_bytes(
                    {"": content, "cut": content[: len(content) // 2], "longer": content + b"\1\2\3"}[damage]
                )
    build(corpus, folder, TOKENIZER)
    assert contents(folder) == expected


def test_the_whole_build_of_these_tests_has_several_shards_and_validation(
    whole_build: tuple[Corpus, dict[str, bytes]],
) -> None:
    names = set(whole_build[1])
    assert {"source-0/tokens-00002.bin", "source-1/tokens-00001.bin", "validation/source-1/tokens-00000.bin"} <= names


def test_resuming_tokenises_only_what_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_numbers(tmp_path / "a.jsonl", consecutive(400))
    corpus = corpus_of(path, num_blocks=100)
    encoded: list[str] = []

    def spy(texts: Sequence[str], *args: Any, **kwargs: Any) -> list[list[int]]:
        encoded.extend(texts)
        return encode_batch(texts, *args, **kwargs)

    monkeypatch.setattr(packing, "encode_batch", spy)
    with pytest.raises(PreemptedError, match=r"a\.jsonl: stopped while packing; what is done is in .*source-0"):
        build(corpus, tmp_path / "packed", TOKENIZER, should_stop=stops_after(20, kill=False))
    before = len(encoded)
    assert before == 21 * 3
    build(corpus, tmp_path / "packed", TOKENIZER)
    assert len(encoded) == len(consecutive(400))  # none twice
    build(corpus, tmp_path / "packed", TOKENIZER)
    assert len(encoded) == len(consecutive(400))


def test_progress_counts_the_training_blocks(whole_build: tuple[Corpus, dict[str, bytes]], tmp_path: Path) -> None:
    counted: list[int] = []
    corpus, expected = whole_build
    build(corpus, tmp_path / "packed", TOKENIZER, progress=counted.append)
    files = {name: content for name, content in expected.items() if "/tokens-" in name and "validation" not in name}
    assert sum(counted) == sum(map(len, files.values())) // (LENGTH * 2)


@pytest.mark.parametrize("name", ["tokens-00001.bin", "starts-00001.bin"])
@pytest.mark.parametrize("damage", ["flipped bit", "shorter", "missing"])
def test_a_damaged_shard_is_found_and_a_missing_one_packed_again(name: str, damage: str, tmp_path: Path) -> None:
    text = write_numbers(tmp_path / "a.jsonl", consecutive(400))
    corpus, folder = corpus_of(text, num_blocks=100), tmp_path / "packed"
    build(corpus, folder, TOKENIZER)
    expected = contents(folder)
    path = folder / "source-0" / name
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    else:
        content[5] ^= 4
        path.write_bytes(content if damage == "flipped bit" else content[:-2])
        message = "damaged, its checksum" if damage == "flipped bit" else f"{len(content) - 2} bytes, index.json says"
        with pytest.raises(DataError, match=f"{name}: {message}"):
            build(corpus, folder, TOKENIZER)
        if damage == "shorter":
            with pytest.raises(DataError, match=f"{name}: {len(content) - 2} bytes"):
                ids(PackedBlocks(folder, num_samples=100))
        path.unlink()
    build(corpus, folder, TOKENIZER)
    assert contents(folder) == expected


def test_text_that_changed_while_it_was_packed_is_noticed(tmp_path: Path) -> None:
    text = write_numbers(tmp_path / "a.jsonl", consecutive(400))
    corpus, folder = corpus_of(text, num_blocks=100), tmp_path / "packed"
    build(corpus, folder, TOKENIZER)
    (folder / "source-0" / "tokens-00001.bin").unlink()
    original = text.read_text()
    text.write_text(original.replace(" 25 ", " 26 "))  # in shard 1
    with pytest.raises(DataError, match=r"a\.jsonl: shard 1 came out otherwise than the first time"):
        build(corpus, folder, TOKENIZER)
    text.write_text(original.replace(" 4 ", " 9 "))  # before shard 1
    with pytest.raises(DataError, match=r"a\.jsonl: the text that was packed is another now"):
        build(corpus, folder, TOKENIZER)


def test_a_document_that_became_shorter_than_what_was_packed_of_it_is_noticed(tmp_path: Path) -> None:
    path = write_numbers(tmp_path / "a.jsonl", [range(100), range(100, 200)])
    corpus, folder = corpus_of(path, num_blocks=40), tmp_path / "packed"
    build(corpus, folder, TOKENIZER)
    (folder / "source-0" / "tokens-00001.bin").unlink()  # begins inside the first document
    write_numbers(path, [range(12), range(100, 200)])
    with pytest.raises(DataError, match=r"a\.jsonl: the text that was packed is another now"):
        build(corpus, folder, TOKENIZER)


def unknown(text: TextSource) -> None:
    """Stands for an estimate, whose sample would find a bad line before packing begins."""


def bad_line_after(path: Path, documents: int) -> str:
    """Put a line that is no JSON behind so many documents; returns the text as it was."""
    original = path.read_text()
    lines = original.splitlines(keepends=True)
    path.write_text("".join([*lines[:documents], '{"text": "1 2\n', *lines[documents:]]))
    return original


@pytest.mark.parametrize("mended", ["corrected", "left out"])
def test_packing_goes_on_where_a_bad_line_was(mended: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second shard: what was packed before stays, and nothing of it is tokenised again."""
    path = write_numbers(tmp_path / "a.jsonl", consecutive(400))
    corpus = corpus_of(path, num_blocks=100)
    build(corpus, tmp_path / "expected", TOKENIZER)
    encoded: list[str] = []

    def spy(texts: Sequence[str], *args: Any, **kwargs: Any) -> list[list[int]]:
        encoded.extend(texts)
        return encode_batch(texts, *args, **kwargs)

    monkeypatch.setattr(packing, "encode_batch", spy)
    original = bad_line_after(path, 9)
    with pytest.raises(DataError, match=r"a\.jsonl, line 10: not JSON"):
        build(corpus, tmp_path / "packed", TOKENIZER, num_tokens=unknown)
    assert len(encoded) == 9
    assert blocks.holds_shards(tmp_path / "packed")
    remarks: list[str] = []
    if mended == "corrected":
        path.write_text(original)
    else:
        (source,) = corpus.sources
        corpus = replace(corpus, sources=(replace(source, text=replace(source.text, skip_bad_lines=True)),))
    build(corpus, tmp_path / "packed", TOKENIZER, num_tokens=unknown, remark=remarks.append)
    assert len(encoded) == len(consecutive(400))
    packed = contents(tmp_path / "packed")
    assert {name: packed[name] for name in packed if name.endswith(".bin")} == {
        name: content for name, content in contents(tmp_path / "expected").items() if name.endswith(".bin")
    }
    assert [" ".join(remark.split()[1:5]) for remark in remarks] == ["left out 1 row"] * (mended == "left out")


def test_text_that_was_packed_must_not_change_while_a_line_is_corrected(tmp_path: Path) -> None:
    path = write_numbers(tmp_path / "a.jsonl", consecutive(400))
    corpus = corpus_of(path, num_blocks=100)
    original = bad_line_after(path, 9)
    with pytest.raises(DataError, match="line 10: not JSON"):
        build(corpus, tmp_path / "packed", TOKENIZER, num_tokens=unknown)
    path.write_text(original.replace(" 4 ", " 9 "))
    with pytest.raises(DataError, match=r"a\.jsonl: the text that was packed is another now"):
        build(corpus, tmp_path / "packed", TOKENIZER, num_tokens=unknown)
    path.write_text("".join(original.splitlines(keepends=True)[:5]))
    with pytest.raises(DataError, match=r"a\.jsonl: the text that was packed is another now"):
        build(corpus, tmp_path / "packed", TOKENIZER, num_tokens=unknown)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents of more than forty characters come in parts, and are encoded in pieces."""
    monkeypatch.setattr(parts, "_PART_CHARACTERS", 40)
    monkeypatch.setattr(parts, "PART_BYTES", 16)
    monkeypatch.setattr(tokens, "PIECE_CHARACTERS", 32)
    monkeypatch.setattr(cuts, "_LOOKAHEAD_CHARACTERS", 8)


def test_a_long_document_is_packed_in_pieces_and_gone_on_with_inside(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = tmp_path / "a.txt"
    path.write_text(" ".join(map(str, range(400))))
    corpus = corpus_of(path, num_blocks=60)
    build(corpus, tmp_path / "expected", TOKENIZER)  # whole: it is shorter than a piece
    expected = contents(tmp_path / "expected")
    request.getfixturevalue("small_parts")
    stops = 0
    while True:
        try:
            build(corpus, tmp_path / "packed", TOKENIZER, should_stop=stops_after(4 + 4 * stops, kill=False))
            break
        except PreemptedError:
            stops += 1
            assert stops < 40
    assert stops > 3
    packed = contents(tmp_path / "packed")
    assert [packed[name] for name in expected if "tokens-" in name] == [
        expected[name] for name in expected if "tokens-" in name
    ]
    assert ids(PackedBlocks(tmp_path / "packed", num_samples=60)) == ids(
        PackedBlocks(tmp_path / "expected", num_samples=60)
    )


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("polls", [1, 5, 20])
def test_a_stop_while_a_long_document_is_read_again_loses_and_repeats_nothing(polls: int, tmp_path: Path) -> None:
    """A run goes on inside the document, and is stopped again before it comes to what is new, or just behind."""
    path = tmp_path / "a.txt"
    path.write_text(" ".join(map(str, range(400))))
    corpus = corpus_of(path, num_blocks=60)
    build(corpus, tmp_path / "expected", TOKENIZER)
    for number in (20, polls):
        with pytest.raises(PreemptedError):
            build(corpus, tmp_path / "packed", TOKENIZER, should_stop=stops_after(number, kill=False))
    build(corpus, tmp_path / "packed", TOKENIZER)
    assert contents(tmp_path / "packed") == contents(tmp_path / "expected")


@pytest.mark.usefixtures("small_parts")
def test_a_stop_is_heard_while_a_long_document_is_passed_by(tmp_path: Path) -> None:
    """Which is held out, behind one that is packed: it is gone on with at its beginning."""
    long, short = " ".join(map(str, range(400))), "7 8 9 10 11 12 13 14"
    path = tmp_path / "a.txt"
    path.write_text(f"{short}<|endoftext|>{long}<|endoftext|>{short}")
    corpora = (corpus_of(path, num_blocks=4, validation_fraction=0.5, seed=seed) for seed in range(100))
    corpus = next(each for each in corpora if each.is_validation(long[:40]) and not each.is_validation(short))
    build(corpus, tmp_path / "expected", TOKENIZER)
    stops = 0
    while True:
        try:
            build(corpus, tmp_path / "packed", TOKENIZER, should_stop=stops_after(20 * stops, kill=False))
            break
        except PreemptedError:
            stops += 1
            assert stops < 40
    assert stops > 3
    assert contents(tmp_path / "packed") == contents(tmp_path / "expected")


@pytest.mark.usefixtures("small_parts")
def test_what_was_packed_of_a_long_document_must_not_change(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    text = " ".join(map(str, range(400)))
    path.write_text(text)
    corpus = corpus_of(path, num_blocks=60)
    with pytest.raises(PreemptedError):
        build(corpus, tmp_path / "packed", TOKENIZER, should_stop=stops_after(20, kill=False))
    path.write_text(text.replace(" 21 ", " 22 "))
    with pytest.raises(DataError, match=r"a\.txt: the text that was packed is another now"):
        build(corpus, tmp_path / "packed", TOKENIZER)
    path.write_text(text.replace(" 390 ", " 391 "))  # what comes later may be corrected
    build(corpus, tmp_path / "packed", TOKENIZER)


def test_another_corpus_in_the_folder_is_refused(tmp_path: Path) -> None:
    text = write_numbers(tmp_path / "a.jsonl", consecutive(400))
    build(corpus_of(text, num_blocks=10), tmp_path / "packed", TOKENIZER)
    with pytest.raises(InputError, match=r"the packed text is another: num_blocks was 10, now 11; seed was 0, now 1$"):
        build(corpus_of(text, num_blocks=11, seed=1), tmp_path / "packed", TOKENIZER)
    with pytest.raises(InputError, match=r"sources 1 weight was 1\.0, now 2\.0$"):
        build(corpus_of(text, num_blocks=10, weights=[2.0]), tmp_path / "packed", TOKENIZER)
    with pytest.raises(InputError, match="tokenizer_hash was 'numbers', now 'others'"):
        build(corpus_of(text, num_blocks=10, tokenizer_hash="others"), tmp_path / "packed", TOKENIZER)


def test_what_is_no_index_is_refused(tmp_path: Path) -> None:
    text = write_numbers(tmp_path / "a.jsonl", consecutive(400))
    corpus, folder = corpus_of(text, num_blocks=10), tmp_path / "packed"
    with pytest.raises(DataError, match="packed: no packed text in it"):
        PackedBlocks(folder, num_samples=1)
    with pytest.raises(PreemptedError):
        build(corpus, folder, TOKENIZER, should_stop=lambda: True)
    with pytest.raises(DataError, match="source-0: packing has not come to its end"):
        PackedBlocks(folder, num_samples=1)
    for path in (folder / "source-0" / "index.json", folder / "index.json"):
        for content in ("{", '{"num_blocks": 3}', "[]"):
            path.write_text(content)
            with pytest.raises(DataError, match=r"index\.json: not an index of packed blocks"):
                build(corpus, folder, TOKENIZER)
    (folder / "index.json").unlink()  # without it, nothing is known of the rest
    build(corpus, folder, TOKENIZER)
    assert len(ids(PackedBlocks(folder, num_samples=10))) == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [0.0]}, r"a\.jsonl: weight is 0, expected a positive number"),
        ({"weights": [float("nan")]}, "weight is nan, expected"),
        ({"num_blocks": 0}, "num_blocks is 0, expected at least 1"),
        ({"sequence_length": 0}, "sequence_length is 0, expected at least 1"),
        ({"validation_fraction": 1.0}, "validation fraction is 1, expected 0 or more and less than 1"),
        ({"max_validation_blocks": -1}, "max_validation_blocks is -1, expected 0 or more"),
    ],
)
def test_unusable_corpora(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        corpus_of(Path("a.jsonl"), **{"num_blocks": 1, **options})
    with pytest.raises(InputError, match="there is no text to train on"):
        corpus_of(num_blocks=1)


def documents_in(blocks: Any) -> set[int]:
    return {int(token) for token in torch.as_tensor(blocks).flatten()}


def test_validation_documents_are_never_trained_on(tmp_path: Path) -> None:
    """One-token documents, each twice in each of two sources: every document is on one side, whole and always."""
    documents = [[number] for number in range(100, 600)] * 2
    one, other = (write_numbers(tmp_path / f"{name}.jsonl", documents) for name in "ab")
    options: dict[str, Any] = {"num_blocks": 900, "validation_fraction": 0.2, "max_validation_blocks": 400}
    corpus = corpus_of(one, other, **options)
    build(corpus, tmp_path / "packed", TOKENIZER)
    held_out = validation_blocks(tmp_path / "packed")
    assert held_out is not None
    trained = documents_in(ids(PackedBlocks(tmp_path / "packed", num_samples=900)))
    validated = documents_in(held_out["input_ids"])
    assert trained & validated == set()
    assert trained | validated == set(range(100, 600))
    assert 70 < len(validated) < 130  # 100 expected, standard deviation 9
    expected = {number for number in range(100, 600) if corpus.is_validation(str(number))}
    assert validated == expected
    # the same documents in the same sources under another seed: another slice
    assert {n for n in range(100, 600) if corpus_of(one, seed=1, **options).is_validation(str(n))} != expected


def test_validation_blocks_have_the_form_of_samples(tmp_path: Path) -> None:
    path = write_numbers(tmp_path / "a.jsonl", consecutive(600))
    corpus = corpus_of(path, num_blocks=10, validation_fraction=0.5, max_validation_blocks=12)
    build(corpus, tmp_path / "packed", TOKENIZER)
    held_out = validation_blocks(tmp_path / "packed")
    assert held_out is not None
    stream = [document for document in consecutive(600) if corpus.is_validation(" ".join(map(str, document)))]
    tokens = [(token, place) for document in stream for place, token in enumerate(document)][: 12 * LENGTH]
    assert held_out["input_ids"].flatten().tolist() == [token for token, _ in tokens]
    assert held_out["labels"].flatten().tolist() == [-100 if place == 0 else token for token, place in tokens]
    assert held_out["position_ids"].shape == (12, LENGTH)
    assert (held_out["position_ids"][:, 0] == 0).all()
    assert {tensor.dtype for tensor in held_out.values()} == {torch.int64}


def test_validation_beyond_its_cap_is_not_trained_on_either(tmp_path: Path) -> None:
    path = write_numbers(tmp_path / "a.jsonl", [[number] for number in range(100, 1100)])
    corpus = corpus_of(path, num_blocks=1000, validation_fraction=0.2, max_validation_blocks=3)
    build(corpus, tmp_path / "packed", TOKENIZER)
    num_trained = SourceIndex.read(tmp_path / "packed" / "source-0").num_blocks
    trained = documents_in(ids(PackedBlocks(tmp_path / "packed", num_samples=num_trained)))
    held_out = validation_blocks(tmp_path / "packed")
    assert held_out is not None
    assert len(held_out["input_ids"]) == 3
    assert not any(corpus.is_validation(str(number)) for number in trained)
    assert len(trained) < 900


def test_validation_is_taken_from_the_sources_by_weight(tmp_path: Path) -> None:
    one, other = (write_numbers(tmp_path / f"{first}.jsonl", consecutive(900, first=first)) for first in (0, 1000))
    corpus = corpus_of(one, other, num_blocks=10, weights=[3, 1], validation_fraction=0.5, max_validation_blocks=20)
    build(corpus, tmp_path / "packed", TOKENIZER)
    held_out = validation_blocks(tmp_path / "packed")
    assert held_out is not None
    assert (held_out["input_ids"] < 1000).all(dim=1).tolist() == [True] * 15 + [False] * 5


def test_no_validation(tmp_path: Path) -> None:
    path = write_numbers(tmp_path / "a.jsonl", consecutive(80))
    for name, fraction in {"off": 0.0, "tiny": 1e-6}.items():
        build(corpus_of(path, num_blocks=10, validation_fraction=fraction), tmp_path / name, TOKENIZER)
        assert validation_blocks(tmp_path / name) is None
