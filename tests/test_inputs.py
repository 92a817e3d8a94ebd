"""The tables of docs/inputs.md: each row's input is built here, and its outcome is what the row says."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from conftest import build_model, load
from datasets import Dataset
from kvconvert.convert import Gqa, TextSource, convert
from kvconvert.convert.errors import InputError
from kvconvert.convert.text.documents import read_documents
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from transformers import LlamaForSequenceClassification

DOCS = Path(__file__).parent.parent / "docs" / "inputs.md"
TEXTS = ["one day", "two days", "three days"]
ROWS = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
Build = Callable[[Path], object]


def table(heading: str) -> dict[str, str]:
    """The rows of the table under a heading, without the marks of code, by their first cell."""
    section = re.split(r"^## ", DOCS.read_text(), flags=re.MULTILINE)
    (text,) = [part for part in section if part.startswith(heading)]
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("|")]
    plain = [[cell.replace("`", "").replace("\\|", "|").strip() for cell in row] for row in cells[2:]]
    return dict(plain)


# --- checkpoints: each changes a small Llama in place, and may return the directory that is to be converted


def sharded(source: Path) -> None:
    load(source).save_pretrained(source, max_shard_size="60KB")
    (source / "model.safetensors").unlink(missing_ok=True)


def pickled(source: Path) -> None:
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()


def beside_older_shards(source: Path) -> None:
    build_model("llama", seed=1).save_pretrained(source / "older", max_shard_size="60KB")
    for path in (source / "older").glob("model*"):
        path.rename(source / path.name)


def beside_a_pickle(source: Path) -> None:
    torch.save(build_model("llama", seed=1).state_dict(), source / "pytorch_model.bin")


def named_by_config(source: Path) -> None:
    (source / "model.safetensors").rename(source / "ours.safetensors")
    build_model("llama", seed=1).save_pretrained(source / "other")
    (source / "other" / "model.safetensors").rename(source / "model.safetensors")
    edit_config(source, transformers_weights="ours.safetensors")


def phantom_head(source: Path) -> None:
    build_model("llama", tie_word_embeddings=True).save_pretrained(source, max_shard_size="60KB")
    (source / "model.safetensors").unlink(missing_ok=True)
    index = source / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    assert "lm_head.weight" not in content["weight_map"]
    content["weight_map"]["lm_head.weight"] = next(iter(content["weight_map"].values()))
    index.write_text(json.dumps(content))


def default_keys(source: Path) -> None:
    model = build_model("llama", max_position_embeddings=2048)
    model.save_pretrained(source)
    config = json.loads((source / "config.json").read_text())
    del config["max_position_embeddings"], config["hidden_act"], config["rms_norm_eps"]
    (source / "config.json").write_text(json.dumps(config))


def silent_block(source: Path) -> None:
    zero(source, "layers.1.self_attn.o_proj", "layers.1.mlp.down_proj")


def reward_model(source: Path) -> None:
    config = build_model("llama").config
    config.num_labels = 1
    torch.manual_seed(0)
    LlamaForSequenceClassification(config).save_pretrained(source)


def beside_an_adapter(source: Path) -> None:
    (source / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"lora": torch.zeros(1)}, source / "adapter_model.safetensors")


def linked_licence(source: Path) -> None:
    (source.parent / "elsewhere").write_text("secret")
    (source / "LICENSE").symlink_to(source.parent / "elsewhere")


def linked_weights(source: Path) -> None:
    (source / "model.safetensors").rename(source.parent / "model.safetensors")
    (source / "model.safetensors").symlink_to(source.parent / "model.safetensors")


def named_pipe(source: Path) -> None:
    os.mkfifo(source / "tokenizer.json")


def index_of_elsewhere(source: Path) -> None:
    (source / "model.safetensors").rename(source.parent / "model.safetensors")
    index = {"weight_map": {"lm_head.weight": "../model.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))


def edited(**changes: object) -> Build:
    def edit(source: Path) -> None:
        config = json.loads((source / "config.json").read_text()) | changes
        (source / "config.json").write_text(json.dumps(config))

    return edit


def adapter_alone(source: Path) -> None:
    beside_an_adapter(source)
    (source / "model.safetensors").unlink()
    (source / "config.json").unlink()


def gguf(source: Path) -> None:
    (source / "model.safetensors").rename(source / "model-q4_k_m.gguf")


def pointer(source: Path) -> None:
    (source / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def consolidated(source: Path) -> None:
    (source / "model.safetensors").rename(source / "consolidated.safetensors")


def training_run(source: Path) -> None:
    (source / "checkpoint-10").mkdir()
    for name in ("config.json", "model.safetensors"):
        (source / name).rename(source / "checkpoint-10" / name)


def wrapped(source: Path) -> None:
    edit(source, lambda tensors: {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()})


def gptq(source: Path) -> None:
    def packed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for name in [name for name in tensors if "proj" in name]:
            stem, (rows, columns) = name.removesuffix(".weight"), tensors.pop(name).shape
            tensors[f"{stem}.qweight"] = torch.zeros(columns // 8, rows, dtype=torch.int32)
            tensors[f"{stem}.scales"] = torch.ones(1, rows)
        return tensors

    edit(source, packed)


def float8(source: Path) -> None:
    edit(source, lambda tensors: {k: t.to(torch.float8_e4m3fn) if "proj" in k else t for k, t in tensors.items()})


def not_a_number(source: Path) -> None:
    def damaged(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
        return tensors

    edit(source, damaged)


def other_heads(source: Path) -> None:
    edit_config(source, num_key_value_heads=4)


def edit(source: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(source / "model.safetensors")), source / "model.safetensors", {"format": "pt"})


def edit_config(source: Path, **entries: object) -> None:
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def zero(source: Path, *modules: str) -> None:
    edit(source, lambda tensors: {k: t * (not any(part in k for part in modules)) for k, t in tensors.items()})


CHECKPOINTS: dict[str, Build] = {
    "one model.safetensors": lambda source: None,
    "shards and their model.safetensors.index.json": sharded,
    "pytorch_model.bin": pickled,
    "one model.safetensors beside an index of older shards": beside_older_shards,
    "pytorch_model.bin beside model.safetensors": beside_a_pickle,
    "another file, which config.json names as its transformers_weights": named_by_config,
    "an index that lists a tied lm_head.weight which no file holds": phantom_head,
    "a config.json that leaves out what equals its class's default": default_keys,
    "a block whose o_proj and down_proj are zero": silent_block,
    "a reward model (LlamaForSequenceClassification)": reward_model,
    "an adapter beside the weights": beside_an_adapter,
    "a LICENSE that is a link to a file elsewhere": linked_licence,
    "weights that are a link to a file elsewhere": linked_weights,
    "a named pipe in the place of tokenizer.json": named_pipe,
    "an index that names ../model.safetensors": index_of_elsewhere,
    "a model_type that is a number": edited(model_type=3),
    "more layers in config.json than there are tensors": edited(num_hidden_layers=1000),
    "an adapter alone": adapter_alone,
    "a GGUF file": gguf,
    "a pointer of Git LFS": pointer,
    "consolidated.safetensors alone": consolidated,
    "the folder of a training run": training_run,
    "tensors named _orig_mod.…": wrapped,
    "GPTQ weights, whatever config.json says": gptq,
    "float8 weights, whatever config.json says": float8,
    "a weight that is not a number": not_a_number,
    "a number of K/V heads in config.json that the weights do not have": other_heads,
}


@pytest.mark.parametrize(("place", "outcome"), table("Checkpoints").items(), ids=list(table("Checkpoints")))
def test_checkpoints(place: str, outcome: str, tmp_path: Path) -> None:
    source, output = tmp_path / "model", tmp_path / "out"
    build_model("llama").save_pretrained(source)
    CHECKPOINTS[place](source)
    if outcome.startswith("refused: "):
        with pytest.raises(InputError) as refusal:
            convert(source, Gqa(2), output)
        assert outcome.removeprefix("refused: ") in str(refusal.value)
        assert refusal.value.hint or "convert the unquantised original" in str(refusal.value)  # what to do
        assert not output.exists()
        return
    assert outcome.startswith("converted")
    remarks: list[str] = []
    result = convert(source, Gqa(2), output, remark=remarks.append)
    in_its_class = "in its class" in outcome
    assert pooled(source, output, LlamaForSequenceClassification.from_pretrained if in_its_class else load)
    if "is said" in outcome or "are named" in outcome:
        assert remarks or result.left_behind
    if "adds nothing" in outcome:
        assert not load(output).model.layers[1].self_attn.o_proj.weight.any()
    if in_its_class:
        assert result.opened_as == "LlamaForSequenceClassification"


def pooled(source: Path, output: Path, opened: Callable[[Path], Any]) -> bool:
    """Whether the keys are the means of what transformers opens as the source, and nothing else of a layer changed."""
    one, other = opened(source), opened(output)
    keys, found = (dict(model.named_parameters())["model.layers.0.self_attn.k_proj.weight"] for model in (one, other))
    kept = [dict(model.named_parameters())["model.layers.0.mlp.up_proj.weight"] for model in (one, other)]
    means = keys.unflatten(0, (2, 4, -1)).double().mean(1).flatten(0, 1).float()
    return torch.equal(means, found) and torch.equal(*kept)


# --- texts: each writes a place and returns it, with the options that the row names


def file(name: str, content: bytes) -> Callable[[Path], TextSource]:
    def write(folder: Path) -> TextSource:
        (folder / name).write_bytes(content)
        return TextSource(str(folder / name))

    return write


def of_table(name: str) -> Callable[[Path], TextSource]:
    def write(folder: Path) -> TextSource:
        rows = pa.table({"text": TEXTS})
        if name.endswith(".parquet"):
            parquet.write_table(rows, folder / name)
        else:
            with pa.ipc.new_stream(str(folder / name), rows.schema) as stream:
                stream.write_table(rows)
        return TextSource(str(folder / name))

    return write


def saved(folder: Path) -> TextSource:
    Dataset.from_dict({"text": TEXTS}).save_to_disk(folder / "saved")
    return TextSource(str(folder / "saved"))


def with_companions(folder: Path) -> TextSource:
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / ".ipynb_checkpoints" / "a-checkpoint.jsonl").write_bytes(ROWS)
    (folder / "README.md").write_text("# Data\n")
    (folder / "requirements.txt").write_text("torch\n")
    (folder / "a.jsonl").write_bytes(ROWS)
    return TextSource(str(folder))


def with_link(folder: Path) -> TextSource:
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "b.jsonl").write_bytes(ROWS.replace(b"day", b"night"))
    (folder / "data").mkdir()
    (folder / "data" / "a.jsonl").write_bytes(ROWS)
    (folder / "data" / "more").symlink_to(folder / "elsewhere")
    return TextSource(str(folder / "data"))


def repository(split: str) -> Callable[[Path], TextSource]:
    def write(folder: Path) -> TextSource:
        (folder / "data").mkdir()
        (folder / "README.md").write_text("---\nlicense: mit\n---\n# Card\n")
        parquet.write_table(pa.table({"text": ["9 9"] * 4}), folder / "data" / "train-00000-of-00001.parquet")
        parquet.write_table(pa.table({"text": TEXTS}), folder / "data" / "test-00000-of-00001.parquet")
        return TextSource(str(folder), split=split)

    return write


def split_of_a_file(folder: Path) -> TextSource:
    (folder / "a.jsonl").write_bytes(ROWS)
    return TextSource(str(folder / "a.jsonl"), split="test")


ARRAY = [{"text": text} for text in TEXTS]


def text_pipe(folder: Path) -> TextSource:
    os.mkfifo(folder / "a.txt")
    return TextSource(str(folder / "a.txt"))


TEXT_PLACES: dict[str, Callable[[Path], TextSource]] = {
    "a.txt": file("a.txt", b"one\ntwo\n"),
    "a.md": file("a.md", b"# one\n"),
    "a.txt.gz": file("a.txt.gz", gzip.compress(b"one\n")),
    "stories.txt, with <|endoftext|> between its parts": file("stories.txt", "\n<|endoftext|>\n".join(TEXTS).encode()),
    **{name: file(name, ROWS) for name in ("a.jsonl", "a.JSONL", "a.ndjson")},
    "a.json, rows on lines": file("a.json", ROWS),
    "a.json, an array on one line": file("a.json", json.dumps(ARRAY).encode()),
    "a.json, an array over many lines": file("a.json", json.dumps(ARRAY, indent=2).encode()),
    "a.json.gz": file("a.json.gz", gzip.compress(ROWS)),
    "a.jsonl.zst": file("a.jsonl.zst", bytes(pa.compress(ROWS, codec="zstd", asbytes=True))),
    "a.jsonl.xz": file("a.jsonl.xz", lzma.compress(ROWS)),
    "a.jsonl.bz2": file("a.jsonl.bz2", bz2.compress(ROWS)),
    "a.jsonl, with a byte order mark": file("a.jsonl", b"\xef\xbb\xbf" + ROWS),
    "a.jsonl, with half a character (a lone surrogate)": file("a.jsonl", ROWS.replace(b"two", b"two \\ud83d")),
    "a.parquet": of_table("a.parquet"),
    "a.arrow": of_table("a.arrow"),
    "what save_to_disk wrote": saved,
    "a directory with README.md, requirements.txt and hidden copies beside a.jsonl": with_companions,
    "a directory with a link to a folder of b.jsonl beside a.jsonl": with_link,
    "a dataset repository with the splits train and test, asked for test": repository("test"),
    "a dataset repository with the splits train and test, asked for validation": repository("validation"),
    "a.jsonl, asked for the split test": split_of_a_file,
    "a.jsonl, with a byte of Latin-1 in line 2": file("a.jsonl", ROWS.replace(b"two", b"tw\xf3")),
    "a.jsonl, with a line that is no JSON": file("a.jsonl", ROWS.replace(b'"two days"}', b'"two days"')),
    "a named pipe called a.txt": text_pipe,
    "a.txt, in UTF-16": file("a.txt", "größe".encode("utf-16")),
    "a.pdf": file("a.pdf", b"%PDF"),
    "a path that is not there": lambda folder: TextSource(str(folder / "absent" / "a.jsonl")),
}


@pytest.mark.parametrize(("place", "outcome"), table("Text").items(), ids=list(table("Text")))
def test_texts(place: str, outcome: str, tmp_path: Path) -> None:
    source = TEXT_PLACES[place](tmp_path)
    if outcome.startswith("refused: "):
        with pytest.raises(InputError) as refusal:
            list(read_documents(source))
        assert outcome.removeprefix("refused: ") in str(refusal.value)
        return
    found = list(read_documents(source))
    assert len(found) == int(outcome.split()[0])
    if outcome.startswith("3"):
        assert [document.split()[0] for document in found] == ["one", "two", "three"]


def test_every_input_that_is_built_has_a_row() -> None:
    assert set(table("Checkpoints")) == set(CHECKPOINTS)
    assert set(table("Text")) == set(TEXT_PLACES)
