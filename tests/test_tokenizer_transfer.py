"""A result in another class has a tokenizer that opens, and does what the source's does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import pytest
from conftest import CheckpointFactory, Command, build_tokenizer
from kvconvert.convert import Calibration, Cla, Gqa, convert
from kvconvert.convert.checkpoint import tokenizer_transfer
from kvconvert.convert.checkpoint.tokenizer_transfer import transfer_tokenizer
from kvconvert.convert.errors import CheckpointError
from tokenizers import processors
from transformers import AutoTokenizer

# a BPE with byte fallback as Llama's, of PROSE: SentencePieceTrainer.train(sentence_iterator=iter([PROSE] * 20),
# model_writer=…, model_type="bpe", vocab_size=340, byte_fallback=True, character_coverage=1.0, split_digits=True,
# normalization_rule_name="identity", remove_extra_whitespaces=False)
SENTENCEPIECE = Path(__file__).with_name("sentencepiece.model")
TEXT = "It was  the age\n of wisdom, 1859 – né <s> </s>x"
OPT = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>"}
LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@dataclass(frozen=True)
class Layout:
    """The files of a tokenizer, and whether they alone open, and do the same, beside the class of the target.

    The last depends on transformers; it is that of 5.23 and later, and shows what is to be mended there.
    """

    model_type: str
    target: str
    kind: str
    config: Mapping[str, Any] | None
    same_as_copied: bool = False
    model_config: Mapping[str, Any] = field(default_factory=dict)


LAYOUTS = {
    "opt": Layout("opt", "gpt_bigcode", "vocab.json", {**OPT, "add_bos_token": True, "pad_token": "<pad>"}),
    "opt, several heads": Layout("opt", "grouped_decoder", "vocab.json", {**OPT, "add_bos_token": True}, True),
    "gpt_neo": Layout("gpt_neo", "gpt_bigcode", "vocab.json", OPT),
    "gptj": Layout("gptj", "phi", "vocab.json", OPT, True),
    "codegen": Layout("codegen", "phi", "vocab.json", OPT | {"tokenizer_class": "CodeGenTokenizer"}, True),
    "gpt2 without a config": Layout("gpt2", "grouped_decoder", "vocab.json", None),
    "gpt2 with a length only": Layout("gpt2", "gpt_bigcode", "tokenizer.json", {"model_max_length": 128}),
    "gpt_neox": Layout("gpt_neox", "nemotron", "tokenizer.json", {"tokenizer_class": "GPTNeoXTokenizer"}),
    "bart without a class": Layout("bart", "grouped_bart", "vocab.json", {"model_max_length": 128}),
    "llama": Layout("llama", "deepseek_v3", "sentencepiece", {**LLAMA, "add_bos_token": True}, True),
    "llama without a class": Layout("llama", "cross_layer_decoder", "sentencepiece", {"add_bos_token": True}, True),
    "llama without a config": Layout("llama", "deepseek_v3", "sentencepiece", None, True),
    # transformers opens mistral's and persimmon's as TokenizersBackend whatever their config says, others' as it says
    "mistral": Layout("mistral", "cross_layer_decoder", "sentencepiece", {**LLAMA, "add_bos_token": True}),
    "mistral as latent": Layout("mistral", "deepseek_v3", "sentencepiece", LLAMA),
    "persimmon": Layout("persimmon", "grouped_decoder", "sentencepiece", LLAMA),
    "llama 3": Layout(
        "llama", "cross_layer_decoder", "tokenizer.json", {"tokenizer_class": "LlamaTokenizerFast"}, True
    ),
    "the class in config.json": Layout(
        "mt5", "grouped_t5", "tokenizer.json", {}, True, model_config={"tokenizer_class": "PreTrainedTokenizerFast"}
    ),
}


def write_layout(layout: Layout, directory: Path) -> None:
    directory.mkdir(exist_ok=True)
    config_path = directory / "config.json"
    config = json.loads(config_path.read_text()) if config_path.exists() else {"model_type": layout.model_type}
    config_path.write_text(json.dumps(config | dict(layout.model_config)))
    backend = build_tokenizer().backend_tokenizer
    if layout.kind == "sentencepiece":
        shutil.copyfile(SENTENCEPIECE, directory / "tokenizer.model")
    elif layout.kind == "vocab.json":
        backend.model.save(str(directory))
    else:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        backend.save(str(directory / "tokenizer.json"))
    if layout.config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(layout.config))


def behaviour(directory: Path) -> list[Any]:
    """Of the tokenizer in a directory, as transformers opens it."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = [tokenizer(TEXT, add_special_tokens=special)["input_ids"] for special in (True, False)]
    inputs = sorted(tokenizer(TEXT))
    return [ids, inputs, tokenizer.decode(ids[0]), tokenizer.special_tokens_map, tokenizer.padding_side, len(tokenizer)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_tokenizer_does_the_same_beside_another_class(name: str, tmp_path: Path) -> None:
    layout, source, target = LAYOUTS[name], tmp_path / "source", tmp_path / "target"
    write_layout(layout, source)
    shutil.copytree(source, target)
    (target / "config.json").write_text(json.dumps({"model_type": layout.target}))
    expected = behaviour(source)
    try:
        same_as_copied = behaviour(target) == expected
    except ValueError:  # there is no way from a vocabulary to a tokenizer of no class
        same_as_copied = False
    if tuple(map(int, version("transformers").split(".")[:2])) >= (5, 23):
        assert same_as_copied == layout.same_as_copied
    assert transfer_tokenizer(source, target, name="out") is None
    assert behaviour(target) == expected
    written = json.loads((target / "tokenizer_config.json").read_text())
    assert "tokenizer_class" in written
    assert written | dict(layout.config or {}) | {"tokenizer_class": written["tokenizer_class"]} == written
    if "tokenizer_class" in (layout.config or {}) and same_as_copied:  # nothing is written without need
        assert {path.name for path in target.iterdir()} == {path.name for path in source.iterdir()}
        assert (target / "tokenizer_config.json").read_bytes() == (source / "tokenizer_config.json").read_bytes()


def test_the_files_that_a_tokenizer_links_to_stay_as_they_are(tmp_path: Path) -> None:
    """A dry run links to the source's files; of this layout both are written anew."""
    layout, source, target = LAYOUTS["gpt_neox"], tmp_path / "source", tmp_path / "target"
    write_layout(layout, source)
    files = {path: path.read_bytes() for path in source.iterdir()}
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).symlink_to(path)
    (target / "config.json").unlink()
    (target / "config.json").write_text(json.dumps({"model_type": layout.target}))
    assert transfer_tokenizer(source, target, name="out") is None
    assert not any(path.is_symlink() for path in target.iterdir())
    assert {path: path.read_bytes() for path in source.iterdir()} == files


def test_a_conversion_to_another_class_brings_its_tokenizer(make_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    opt = make_checkpoint("opt", name="opt", ffn_dim=48, word_embed_proj_dim=64)
    write_layout(LAYOUTS["opt"], opt)
    mistral = make_checkpoint("mistral", name="mistral")
    write_layout(LAYOUTS["mistral"], mistral)
    for source, method in ((opt, Gqa(1)), (mistral, Cla(share=2))):
        result = convert(source, method, tmp_path / f"{source.name}-out")
        assert result.unchecked_tokenizer is None
        assert behaviour(result.output) == behaviour(source)


@pytest.mark.parametrize(
    ("options", "merge"),
    [({}, "mean"), ({"dry_run": True}, "mean"), ({"calibration": Calibration("absent.txt")}, "svd")],
    ids=["run", "dry-run", "before-measuring"],
)
def test_a_tokenizer_that_cannot_be_made_equal_is_refused(
    options: dict[str, Any],
    merge: Literal["mean", "svd"],
    make_checkpoint: CheckpointFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing is left, the message names the output, not what becomes it, and no text was read for it."""
    source = make_checkpoint("mistral")
    write_layout(LAYOUTS["mistral"], source)
    monkeypatch.setattr(tokenizer_transfer, "_ways", lambda tokenizer, target: iter([lambda: None]))
    with pytest.raises(CheckpointError) as raised:
        convert(source, Cla(share=2, merge=merge), tmp_path / "out", **options)
    assert str(raised.value) == (
        f"{tmp_path / 'out'}: beside the new class the tokenizer has another encoding of text, unlike that of {source}"
    )
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_tokenizer_that_cannot_be_opened_is_copied_and_the_result_says_so(
    make_checkpoint: CheckpointFactory, invoke: Command, tmp_path: Path
) -> None:
    source = make_checkpoint("gpt2", n_embd=64, n_head=8, n_layer=2, n_inner=48, n_positions=128)
    (source / "tokenizer.json").write_text("{}")
    reason = f"{source}: the tokenizer cannot be loaded"
    shown = invoke("mha2mqa", source, "--output", tmp_path / "out").stdout
    assert f"  tokenizer   copied, not compared with the source's: {reason}" in shown
    printed = invoke("mha2mqa", source, "--output", tmp_path / "other", "--json").printed
    assert printed["unchecked_tokenizer"].startswith(reason)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
