"""Manifests, and whether a directory is what its manifest says."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TOKENS, CheckpointFactory, Command
from kvconvert.convert import Calibration, Cla, Gqa, convert
from kvconvert.convert.checkpoint.manifest import unlike_manifest, write_manifest
from kvconvert.convert.errors import CheckpointError
from kvconvert.convert.record import text_record
from kvconvert.convert.runtime.transformers_interface import cache_of
from kvconvert.convert.text.sources import TextSource
from kvconvert.measure import verify
from safetensors.torch import load_file, save_file
from test_seq2seq import T5
from test_seq2seq import make as make_seq2seq
from test_translations import GPTJ

SOURCE_TENSORS = 2 * 9 + 3


@pytest.fixture
def source(make_checkpoint: CheckpointFactory) -> Path:
    return make_checkpoint(with_tokenizer=True)


@pytest.fixture
def result(source: Path, tmp_path: Path) -> Path:
    return convert(source, Gqa(2), tmp_path / "result", max_shard_bytes=200_000).output


def failed(result: Path, **options: Any) -> tuple[str, list[str]]:
    """The check that failed, which is the last, and its problems."""
    found = verify(result, **options)
    assert not found.ok
    assert all(check.passed for check in found.checks[:-1])
    return found.checks[-1].name, found.problems


def rewrite(result: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest itself."""
    path = result / "kvconvert.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def test_the_manifest_has_the_digest_of_every_file_read_and_written(source: Path, result: Path) -> None:
    """By sha256 of the whole files, as `sha256sum` has it."""
    record = json.loads((result / "kvconvert.json").read_text())
    for directory, entries in ((result, record["files"]), (source, record["source_files"])):
        for entry in entries:
            content = (directory / entry["name"]).read_bytes()
            expected = hashlib.sha256(content).hexdigest(), len(content), "sha256"
            assert (entry["digest"], entry["size"], entry["algorithm"]) == expected
    names = {entry["name"] for entry in record["files"]}
    assert names == {path.name for path in result.iterdir()} - {"kvconvert.json"}
    assert len([name for name in names if name.endswith(".safetensors")]) > 1
    assert {entry["name"] for entry in record["source_files"]} == {path.name for path in source.iterdir()}


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_manifest_says_nothing_of_where_and_how_fast(jobs: int, source: Path, result: Path, tmp_path: Path) -> None:
    again = convert(source, Gqa(2), tmp_path / "elsewhere", max_shard_bytes=200_000, jobs=jobs).output
    assert {path.name: path.read_bytes() for path in again.iterdir()} == {
        path.name: path.read_bytes() for path in result.iterdir()
    }


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside", "sub/../../outside"])
def test_a_manifest_lists_no_file_of_elsewhere(name: str, result: Path) -> None:
    """Which `push` would send, from the machine of whoever pushes a directory of somebody else's."""
    entry = {"name": name, "algorithm": "sha256", "digest": hashlib.sha256(b"").hexdigest(), "size": 0}
    rewrite(result, lambda record: record["files"].append(entry))
    assert unlike_manifest(result, digests=True) == ["kvconvert.json does not list its files"]


def test_a_manifest_has_every_option(source: Path, tmp_path: Path) -> None:
    output = convert(source, Gqa(2, merge="random", seed=7), tmp_path / "out").output
    options = json.loads((output / "kvconvert.json").read_text())["options"]
    assert options["seed"] == 7
    assert options["merge"] == "random"
    assert options["max_shard_bytes"] == 5_000_000_000


@pytest.mark.parametrize(
    "method",
    [Gqa(2), Gqa(1, merge="first"), Gqa(2, merge="random"), Cla(share=2, merge="mean")],
    ids=["mean", "first", "random", "cla"],
)
def test_what_was_made_is_verified(method: Gqa | Cla, source: Path, tmp_path: Path) -> None:
    output = convert(source, method, tmp_path / "out").output
    found = verify(output, against=source)
    assert found.ok
    assert [check.name for check in found.checks] == ["files", "opens", "weights", "cache", "runs", "source", "tensors"]


@pytest.mark.parametrize("model_type", ["t5", "gptj"])
def test_other_classes_are_verified(model_type: str, make_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    """An encoder-decoder in a class of ours, and a source that was translated."""
    t5 = model_type == "t5"
    source = make_seq2seq(tmp_path / "model", "t5", T5) if t5 else make_checkpoint("gptj", **GPTJ)
    found = verify(convert(source, Gqa(1), tmp_path / "out").output, against=source)
    assert found.ok, found.problems


def test_weights_that_may_be_infinite_are_counted(source: Path, tmp_path: Path) -> None:
    (path,) = source.glob("*.safetensors")
    tensors = load_file(path)
    tensors["model.norm.weight"][0] = float("inf")
    save_file(tensors, path, metadata={"format": "pt"})
    output = convert(source, Gqa(2), tmp_path / "out", allow_nonfinite=True).output
    assert verify(output).ok
    rewrite(output, lambda record: record.pop("nonfinite_values"))
    assert failed(output) == ("weights", ["model.norm.weight has 1 values that are not finite, and the manifest 0"])


def test_tensors_are_counted_by_what_they_are(source: Path, result: Path) -> None:
    """The mean makes the keys and values of two layers."""
    assert verify(result, against=source).checks[-1].what == f"{SOURCE_TENSORS - 4} copied, 4 computed again"


def test_every_flipped_bit_is_found(source: Path, result: Path) -> None:
    places = random.Random(0)
    files = sorted(path for path in result.iterdir() if path.name != "kvconvert.json")
    for number in range(16):
        path = files[number % len(files)]
        content = bytearray(path.read_bytes())
        position = places.randrange(len(content))
        content[position] ^= 1 << places.randrange(8)
        original = path.read_bytes()
        path.write_bytes(content)
        assert failed(result) == ("files", [f"{path.name} has other bytes than were written"])
        path.write_bytes(original)
    assert verify(result).ok


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda result: (result / "notes.txt").touch(), "notes.txt is not in the manifest"),
        (lambda result: (result / "config.json").unlink(), "config.json is missing"),
        (lambda result: (result / "more" / "deep").mkdir(parents=True), None),
        (lambda result: (result / "config.json").rename(result / "x"), "config.json is missing"),
    ],
)
def test_files_are_those_of_the_manifest_no_more_and_no_less(
    change: Callable[[Path], object], problem: str | None, result: Path
) -> None:
    change(result)
    assert unlike_manifest(result, digests=False)[:1] == ([problem] if problem else [])


def test_each_check_fails_where_only_it_can(source: Path, result: Path, tmp_path: Path) -> None:
    """Someone changed the result, and the manifest's digests with it."""
    record = json.loads((result / "kvconvert.json").read_text())
    shard = next(
        path
        for path in sorted(result.glob("*.safetensors"))
        if "model.layers.0.self_attn.k_proj.weight" in load_file(path)
    )

    def changed(name: str, change: Callable[[torch.Tensor], object]) -> Path:
        copy = Path(shutil.copytree(result, tmp_path / "copy", dirs_exist_ok=True))
        tensors = {key: tensor.clone() for key, tensor in load_file(shard).items()}
        change(tensors[name])
        save_file(tensors, copy / shard.name, metadata={"format": "pt"})
        write_manifest(copy, record)
        return copy

    made, copied = "model.layers.0.self_attn.k_proj.weight", "model.layers.0.self_attn.q_proj.weight"
    copy = changed(made, lambda tensor: tensor[0, 0].fill_(float("nan")))
    assert failed(copy) == ("weights", [f"{made} has 1 values that are not finite, and the manifest 0"])
    copy = changed(made, lambda tensor: tensor[0, 0].add_(1))
    assert verify(copy).ok
    assert failed(copy, against=source) == ("tensors", [f"{made} is not what mean makes of the original"])
    copy = changed(copied, lambda tensor: tensor[0, 0].add_(1))
    assert failed(copy, against=source) == ("tensors", [f"{copied} is not the original's, byte for byte"])
    copy = changed(copied, lambda tensor: tensor.fill_(3e38))
    assert failed(copy)[0] == "runs"
    assert verify(copy, run=False).ok


def test_a_cache_that_was_not_promised(result: Path) -> None:
    rewrite(result, lambda record: record["cache_bytes_per_token"].update(result=7))
    name, problems = failed(result)
    assert name == "cache"
    assert problems[0].endswith("and 7 were promised")


def test_another_original_is_told_from_the_one_that_was_converted(source: Path, result: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(source, tmp_path / "other"))
    (weights,) = other.glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert failed(result, against=other) == ("source", [f"{weights} is not the file that this was made from"])


def test_what_has_no_manifest_is_not_verified(source: Path, result: Path, invoke: Command) -> None:
    with pytest.raises(CheckpointError, match=r"kvconvert\.json: there is none"):
        verify(source)
    rewrite(result, lambda record: record.pop("files"))
    with pytest.raises(CheckpointError, match=r"kvconvert\.json: lists no files"):
        verify(result)
    rewrite(result, lambda record: record.update(files=[]) or record.pop("tensors"))
    outcome = invoke("verify", result, "--against", source)
    assert outcome.returncode == 2
    assert "was trained after it was converted" in outcome.stderr


def test_the_command_names_each_file_and_exits_with_2(result: Path, invoke: Command) -> None:
    assert json.loads(invoke("verify", result, "--json").stdout)["ok"] is True
    (result / "config.json").write_text("{}")
    (result / "notes").touch()
    outcome = invoke("verify", result, "--json")
    assert outcome.returncode == 2
    (check,) = json.loads(outcome.stdout)["checks"]
    size = json.loads((result / "kvconvert.json").read_text())["files"]
    size = next(entry["size"] for entry in size if entry["name"] == "config.json")
    assert check["problems"] == [f"config.json has 2 bytes, and had {size}", "notes is not in the manifest"]
    assert outcome.stderr.splitlines()[-1].startswith(f"error: {result} is not as kvconvert wrote it: config.json has")
    assert outcome.stderr.splitlines()[-1].endswith("and 1 more")


def test_a_source_that_kvconvert_wrote_is_compared_with_its_manifest(result: Path, tmp_path: Path) -> None:
    """A disk that flips a bit is noticed before a second conversion is built on it."""
    assert convert(result, Gqa(1), tmp_path / "sound").opened_as
    path = sorted(result.glob("*.safetensors"))[-1]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="has other bytes than kvconvert wrote"):
        convert(result, Gqa(1), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_download_that_was_damaged_is_found(name: str, source: Path, tmp_path: Path) -> None:
    """The cache of the hub names a large file by its SHA-256, and a small one by Git's SHA-1."""
    repository = tmp_path / "hub" / "models--org--model"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in source.iterdir():
        content = path.read_bytes()
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        blob = blobs / (hashlib.sha256(content).hexdigest() if path.suffix == ".safetensors" else git)
        blob.write_bytes(content)
        (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")
    assert convert(snapshot, Gqa(2), tmp_path / "sound").opened_as
    record = json.loads((tmp_path / "sound" / "kvconvert.json").read_text())
    assert (record["source"], record["source_revision"]) == ("org/model", "abc")
    blob = (snapshot / name).resolve()
    damaged = bytearray(blob.read_bytes())
    position = damaged.rindex(b" ") if name == "config.json" else len(damaged) - 1
    damaged[position] ^= 4 if name != "config.json" else ord(" ") ^ ord("\t")
    blob.write_bytes(damaged)
    with pytest.raises(CheckpointError, match="was damaged in the download or on the disk") as raised:
        convert(snapshot, Gqa(2), tmp_path / "out")
    assert raised.value.hint == f"remove {blob} and download the model again"
    assert not (tmp_path / "out").exists()


def test_a_result_runs_as_verified(result: Path) -> None:
    """The control of `runs`: the class itself, on the same weights."""
    from transformers import AutoModelForCausalLM

    cache = cache_of(AutoModelForCausalLM.from_pretrained(result)(TOKENS, use_cache=True))
    live = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers) * 2 / TOKENS.numel()
    assert live == json.loads((result / "kvconvert.json").read_text())["cache_bytes_per_token"]["result"]


def test_the_manifest_has_the_digest_of_text_and_of_statistics(
    make_checkpoint: CheckpointFactory, prose_file: Path, tmp_path: Path
) -> None:
    """The same wherever they lie; what was not opened is not listed."""
    source = make_checkpoint(with_tokenizer=True)
    manifests = []
    for place in (tmp_path / "one", tmp_path / "deep" / "two"):
        text = place / "text"
        (text / "more").mkdir(parents=True)
        (text / "a.txt").write_bytes(prose_file.read_bytes())
        (text / "more" / "b.txt").write_text("Another text, which is short. " * 20)
        (text / "README.md").write_text("About the text.")
        kept = place / "statistics"
        measured: dict[str, Any] = {"num_tokens": 256, "sequence_length": 64, "device": "cpu", "precision": "fp32"}
        on_text = Calibration(text, save_statistics=kept, **measured)
        on_statistics = Calibration(statistics=kept)
        for name, calibration in (("from-text", on_text), ("from-statistics", on_statistics)):
            output = convert(source, Gqa(2, merge="svd"), place / name, calibration=calibration).output
            manifests.append((output / "kvconvert.json").read_text())
    assert manifests[:2] == manifests[2:]
    assert str(tmp_path) not in "".join(manifests)
    of_text, of_statistics = (json.loads(manifest)["calibration"] for manifest in manifests[:2])
    assert [entry["name"] for entry in of_text["data_files"]] == ["a.txt", "more/b.txt"]
    assert of_text["data"] == of_statistics["data"] == "text"
    for folder, entry in (
        *((text, entry) for entry in of_text["data_files"]),
        (kept.parent, of_statistics["statistics_file"]),
    ):
        content = (folder / entry["name"]).read_bytes()
        assert (entry["digest"], entry["size"]) == (hashlib.sha256(content).hexdigest(), len(content))


def test_what_identifies_a_dataset_is_its_commit() -> None:
    known = text_record(TextSource("org/name", revision="0123abc"), [])
    assert known == {"data": "org/name", "data_revision": "0123abc"}


def test_what_a_text_says_of_itself_is_an_option_of_the_manifest(
    make_checkpoint: CheckpointFactory, prose_file: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"content": prose_file.read_text()}) + "\n")
    calibration = Calibration(f"{rows}[field=content]", num_tokens=64, sequence_length=64, device="cpu")
    source = make_checkpoint(with_tokenizer=True)
    output = convert(source, Gqa(2, merge="svd"), tmp_path / "out", calibration=calibration).output
    record = json.loads((output / "kvconvert.json").read_text())
    assert record["options"]["text_field"] == "content"
    assert record["calibration"]["data"] == "rows.jsonl"
