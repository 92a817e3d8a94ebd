"""Reports that people filed with other tools, each rebuilt as a small input and given to kvconvert as a user would.

A docstring names the report and what was in it. Some of these inputs are right and only unusual: the result then
computes what transformers computes of the source. The others are refused in one line, before anything is written.
"""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROSE, TOKENS, CheckpointFactory, Command, Outcome, RunHere, load, logits, weights
from kvconvert.convert import TextSource, open_checkpoint
from kvconvert.convert.errors import DataError
from kvconvert.convert.text.documents import describe_files, read_documents
from kvconvert.uptrain.estimate.size import measure_size
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForSeq2SeqLM

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
KEYS = "model.layers.0.self_attn.k_proj.weight"
OTHER_MODEL = "config.json and the weights belong to different models, or one of them was edited"


def read_config(directory: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return content


def change_config(directory: Path, *absent: str, **changes: object) -> None:
    config = {name: value for name, value in read_config(directory).items() if name not in absent}
    (directory / "config.json").write_text(json.dumps(config | changes))


def change_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = weights(directory)
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def read_header(file: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and the bytes of the tensors."""
    content = file.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def write_header(file: Path, header: dict[str, Any], tensors: bytes) -> None:
    """A safetensors file with a header that the library might not write."""
    raw = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + tensors)


def refusal(outcome: Outcome) -> list[str]:
    """What a command says that refuses: `error: …` and, where there is something to do, `hint: …`."""
    assert (outcome.returncode, outcome.stdout) == (2, "")
    lines = outcome.stderr.splitlines()
    assert lines[0].startswith("error: ")
    assert all(line.startswith("hint: ") for line in lines[1:])
    return lines


def converted(run_here: RunHere, source: Path, groups: int = 2, *options: object) -> Path:
    return Path(run_here("mha2gqa", "--groups", groups, source, *options)["output"])


# ---------------------------------------------------------------------------------------------------- tied embeddings


def test_only_the_head_of_a_tied_pair_was_saved(make_checkpoint: CheckpointFactory, run_here: RunHere) -> None:
    """https://github.com/huggingface/transformers/issues/38870: of a tied pair, the embeddings are not in the file."""
    source = make_checkpoint(tie_word_embeddings=True, tie_groups=2)
    change_weights(source, lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDINGS)}))
    output = converted(run_here, source)
    assert torch.equal(logits(load(output)), logits(load(source)))
    assert torch.equal(weights(output)[HEAD], weights(source)[HEAD])
    assert EMBEDDINGS not in weights(output)


@pytest.mark.parametrize("differ", [False, True], ids=["equal", "different"])
def test_both_of_a_tied_pair_were_saved(differ: bool, make_checkpoint: CheckpointFactory, run_here: RunHere) -> None:
    """https://github.com/EvolvingLMMs-Lab/lmms-engine/issues/157: FSDP wrote the head beside the embeddings.

    Where the two differ, transformers ties nothing, whatever config.json says (transformers#42612).
    """
    source = make_checkpoint(tie_word_embeddings=True, tie_groups=2)
    tied = logits(load(source))
    noise = torch.randn(384, 64, generator=torch.Generator().manual_seed(0))
    change_weights(source, lambda tensors: tensors.update({HEAD: noise if differ else tensors[EMBEDDINGS].clone()}))
    output = converted(run_here, source)
    assert torch.equal(logits(load(output)), logits(load(source)))
    assert torch.equal(logits(load(output)), tied) is not differ
    assert read_config(output)["tie_word_embeddings"] is True


def test_a_t5_without_the_shared_embeddings(tmp_path: Path, run_here: RunHere) -> None:
    """https://github.com/huggingface/transformers/issues/48154: decoder embeddings, another head, no `shared`."""
    torch.manual_seed(0)
    sizes = {"d_model": 64, "num_layers": 1, "num_heads": 8, "d_kv": 8, "d_ff": 48, "vocab_size": 96}
    source = tmp_path / "model"
    AutoModelForSeq2SeqLM.from_config(
        AutoConfig.for_model("t5", **sizes, pad_token_id=0, eos_token_id=2)
    ).save_pretrained(source)

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors["decoder.embed_tokens.weight"] = tensors.pop("shared.weight")
        tensors[HEAD] = torch.randn(96, 64)
        for name, tensor in tensors.items():
            if name.startswith("decoder") and name.endswith((".k.weight", ".v.weight")):
                tensors[name] = tensor.unflatten(0, (2, 4, 8))[:, :1].expand(2, 4, 8, 64).reshape(64, 64).contiguous()

    change_weights(source, rename)
    output = converted(run_here, source)
    one, other = (
        AutoModelForSeq2SeqLM.from_pretrained(place)(
            input_ids=TOKENS % 96, decoder_input_ids=TOKENS % 96, use_cache=False
        ).logits
        for place in (source, output)
    )
    torch.testing.assert_close(other, one, rtol=0, atol=1e-5 * one.abs().max().item())


# ------------------------------------------------------------------------------------------------- files of weights


def test_an_entry_without_a_dtype(make_checkpoint: CheckpointFactory, invoke: Command) -> None:
    """https://github.com/pytorch/torchtitan/issues/3764: a header with a tensor of dtype "" and shape []."""
    source = make_checkpoint()
    file = source / "model.safetensors"
    header, tensors = read_header(file)
    empty = {"dtype": "", "shape": [], "data_offsets": [len(tensors), len(tensors)]}
    write_header(file, {**header, "model.step": empty}, tensors)
    for command in (("inspect",), ("mha2gqa", "--groups", 2)):
        assert refusal(invoke(*command, source)) == [
            f"error: {file}: model.step has dtype '', which safetensors does not have",
            "hint: save the model again without it, or with a newer version of what wrote it",
        ]
    assert not source.with_name("model-gqa2").exists()


@pytest.mark.parametrize("metadata", [{}, {"__metadata__": {}}], ids=["absent", "empty"])
def test_a_header_without_metadata(
    metadata: dict[str, Any], make_checkpoint: CheckpointFactory, run_here: RunHere
) -> None:
    """https://github.com/foundation-model-stack/fastsafetensors/issues/88 (empty) and ml-explore/mlx#743 (absent).

    The result says what older versions of transformers require: that it is torch's.
    """
    source = make_checkpoint(tie_groups=2)
    header, tensors = read_header(source / "model.safetensors")
    del header["__metadata__"]
    write_header(source / "model.safetensors", metadata | header, tensors)
    output = converted(run_here, source)
    assert torch.equal(logits(load(output)), logits(load(source)))
    assert read_header(output / "model.safetensors")[0]["__metadata__"] == {"format": "pt"}


@pytest.mark.parametrize(
    ("is_empty", "found"),
    [
        (KEYS.__eq__, f"1 of 21 tensors are empty, first {KEYS}"),
        (
            lambda name: name.endswith("proj.weight"),
            "14 of 21 tensors are empty, first model.layers.0.mlp.down_proj.weight",
        ),
        (EMBEDDINGS.__eq__, f"1 of 21 tensors are empty, first {EMBEDDINGS}"),
    ],
    ids=["keys", "all", "embeddings"],
)
def test_tensors_that_were_not_gathered(
    is_empty: Callable[[str], bool], found: str, make_checkpoint: CheckpointFactory, invoke: Command
) -> None:
    """https://github.com/huggingface/peft/issues/2405: DeepSpeed ZeRO-3 left tensors of shape [0]."""
    source = make_checkpoint()
    change_weights(source, lambda tensors: tensors.update({name: torch.empty(0) for name in tensors if is_empty(name)}))
    for command in (("inspect",), ("mha2gqa", "--groups", 2)):
        error, hint = refusal(invoke(*command, source))
        assert error == f"error: {source}: {found}, whose shape is [0]"
        assert hint.startswith("hint: DeepSpeed ZeRO-3 leaves sharded weights so: gather them")


def test_norms_in_another_dtype_than_config_says(make_checkpoint: CheckpointFactory, run_here: RunHere) -> None:
    """https://github.com/axolotl-ai-cloud/axolotl/issues/904: config.json says float32, the weights are bfloat16.

    The norms are float32 among them (deepseek-ai/DeepSeek-V3#1002). Each tensor keeps the dtype that it has.
    """
    source = make_checkpoint(tie_groups=2, dtype=torch.bfloat16)
    change_config(source, dtype="float32")
    change_weights(
        source,
        lambda tensors: tensors.update({name: tensor.float() for name, tensor in tensors.items() if "norm" in name}),
    )
    before, after = weights(source), weights(converted(run_here, source))
    assert {name: tensor.dtype for name, tensor in after.items()} == {
        name: torch.float32 if "norm" in name else torch.bfloat16 for name in before
    }


# --------------------------------------------------------------------------------------------- config.json and heads


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
        {"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 4.0}, "rope_theta": 5000.0},
        {"rope_scaling": None, "rope_theta": 5000.0},
    ],
    ids=["linear", "dynamic", "both keys", "null"],
)
def test_rope_scaling_as_older_versions_wrote_it(
    rope: dict[str, Any], make_checkpoint: CheckpointFactory, run_here: RunHere
) -> None:
    """https://github.com/huggingface/transformers/issues/32166, 32167 and 32916: `type`, or both keys, or null.

    transformers before 4.43 refuses more keys than `type` and `factor`: the result has those of the source.
    """
    source = make_checkpoint(tie_groups=2)
    unscaled = logits(load(source))
    change_config(source, "rope_parameters", **rope)
    output = converted(run_here, source)
    assert torch.equal(logits(load(output)), logits(load(source)))
    assert read_config(output) == read_config(source) | {"num_key_value_heads": 2}
    if rope.get("rope_theta") or rope["rope_scaling"]["type"] == "linear":  # dynamic sets in beyond the context
        assert not torch.equal(unscaled, logits(load(source)))


@pytest.mark.parametrize(
    ("model_type", "rope", "command", "theta"),
    [
        ("llama", {"rope_theta": 5000.0}, "mha2gqa --groups 2", 5000.0),
        ("gpt_neox", {"rotary_emb_base": 5000.0}, "mha2gqa --groups 2", 5000.0),
        ("gpt_neox", {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}, "mha2gqa --groups 2", 5000.0),
        # the two highest frequencies, 1 and θ^(-2/8), are those of √θ with four rotary dimensions
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
            "mha2mla --kv-lora-rank 16 --qk-rope-head-dim 4 --no-calibration",
            5000.0**0.5,
        ),
    ],
    ids=["gqa", "another class", "another class, new keys", "mla, new keys"],
)
def test_the_same_theta_for_both_versions_of_transformers(
    model_type: str,
    rope: dict[str, Any],
    command: str,
    theta: float,
    make_checkpoint: CheckpointFactory,
    run_here: RunHere,
) -> None:
    """https://github.com/marin-community/marin/pull/7156: transformers 4 found no rope_theta, and took 10000."""
    source = make_checkpoint(model_type)
    change_config(source, "rope_parameters", **rope)
    output = Path(run_here(*command.split(), source)["output"])
    assert read_config(output)["rope_theta"] == pytest.approx(theta, rel=1e-12)
    assert load(output).config.rope_parameters["rope_theta"] == pytest.approx(theta, rel=1e-12)


@pytest.mark.parametrize(("found", "said"), [(8, 2), (2, 8)])
def test_a_number_of_heads_that_was_edited(
    found: int, said: int, make_checkpoint: CheckpointFactory, invoke: Command
) -> None:
    """https://github.com/meta-llama/llama/issues/427, transformers#28425 (fewer) and QwenLM/Qwen3#862 (more).

    num_key_value_heads was changed in config.json, in the hope that the weights would follow.
    """
    source = make_checkpoint("qwen2", num_key_value_heads=found)
    change_config(source, num_key_value_heads=said)
    line = f"layer 0: k_proj has {found} heads, config.json says num_key_value_heads = {said} (model.safetensors)"
    for command in (("inspect",), ("mha2gqa", "--groups", 2), ("mha2mqa", "--dry-run")):
        assert refusal(invoke(*command, source)) == [f"error: {line}", f"hint: {OTHER_MODEL}"]


def repeat_heads(directory: Path, times: int) -> None:
    """Write every K/V head `times` times, as people do who make a GQA model MHA."""

    def repeat(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if ".k_proj." in name or ".v_proj." in name:
                tensors[name] = tensor.unflatten(0, (-1, 8)).repeat_interleave(times, 0).flatten(0, 1).contiguous()

    change_weights(directory, repeat)
    change_config(directory, num_key_value_heads=read_config(directory)["num_key_value_heads"] * times)


def test_back_from_heads_that_were_repeated(make_checkpoint: CheckpointFactory, run_here: RunHere) -> None:
    """https://github.com/QwenLM/Qwen3/issues/862: GQA made MHA by repeating the heads. The mean gives it back."""
    original = make_checkpoint("qwen2", name="original", num_key_value_heads=2, dtype=torch.bfloat16)
    source = make_checkpoint("qwen2", num_key_value_heads=2, dtype=torch.bfloat16)
    repeat_heads(source, 4)
    assert torch.equal(logits(load(source)), logits(load(original)))
    output = converted(run_here, source)
    assert (output / "model.safetensors").read_bytes() == (original / "model.safetensors").read_bytes()
    assert read_config(output) == read_config(original)


def test_heads_that_were_repeated_are_merged_without_a_loss(
    make_checkpoint: CheckpointFactory, invoke: Command, tmp_path: Path
) -> None:
    """https://github.com/QwenLM/Qwen3/issues/862, by the merge that reads no text."""
    source = make_checkpoint("qwen2", num_key_value_heads=2)
    expected = logits(load(source))
    repeat_heads(source, 4)
    done = invoke("mha2gqa", "--groups", 2, "--method", "svd", "--no-calibration", source, "-o", tmp_path / "out")
    assert done.returncode == 0
    assert "merging by the weights alone can be worse than the mean" in done.stderr.splitlines()
    torch.testing.assert_close(
        logits(load(tmp_path / "out")), expected, rtol=0, atol=1e-5 * expected.abs().max().item()
    )


def test_three_heads_do_not_form_two_groups(make_checkpoint: CheckpointFactory, invoke: Command) -> None:
    """https://github.com/wandb/senpai/pull/2309: two groups were planned for a model with three heads."""
    source = make_checkpoint(num_attention_heads=3, num_key_value_heads=3, hidden_size=24)
    assert refusal(invoke("mha2gqa", "--groups", 2, source)) == [
        "error: 3 K/V heads cannot form 2 equal groups",
        "hint: possible numbers of groups: 1",
    ]
    gqa, mqa = invoke("inspect", source, "--json").printed["targets"][:2]
    assert (gqa["possible"], gqa["reason"]) == (False, "3 K/V heads have no divisor between 1 and 3")
    assert (mqa["possible"], mqa["groups"]) == (True, [1])


def test_infinity_in_config(make_checkpoint: CheckpointFactory, run_here: RunHere) -> None:
    """https://github.com/huggingface/transformers/pull/42959: a number that JSON does not have, and Python reads."""
    source = make_checkpoint(tie_groups=2)
    change_config(source, time_step_limit=[0.0, float("inf")])
    output = converted(run_here, source)
    assert read_config(output)["time_step_limit"] == [0.0, float("inf")]
    assert torch.equal(logits(load(output)), logits(load(source)))


# ------------------------------------------------------------------------------- the vocabulary, and how to generate


def test_a_tied_pair_of_which_the_head_was_saved_is_trained(
    make_checkpoint: CheckpointFactory, run_here: RunHere, prose_file: Path, tmp_path: Path
) -> None:
    """https://github.com/huggingface/transformers/issues/38870, of which the size of the model is measured too."""
    source = make_checkpoint(tie_word_embeddings=True, num_key_value_heads=2, with_tokenizer=True)
    size = measure_size(open_checkpoint(source))
    change_weights(source, lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDINGS)}))
    assert measure_size(open_checkpoint(source)) == size
    length = ("--steps", 1, "--sequence-length", 32, "--global-batch-tokens", 64)
    run_here("uptrain", source, "--data", prose_file, *length, "--output", tmp_path / "trained")
    assert not torch.equal(logits(load(tmp_path / "trained")), logits(load(source)))


def test_more_rows_than_the_tokenizer_has_tokens(
    make_checkpoint: CheckpointFactory, run_here: RunHere, prose_file: Path, tmp_path: Path
) -> None:
    """https://github.com/OpenHelix-Team/ReconVLA/issues/7 and b4rtaz/distributed-llama#282: a padded vocabulary."""
    source = make_checkpoint(vocab_size=512, tie_groups=2, with_tokenizer=True)
    output = converted(run_here, source)
    assert read_config(output)["vocab_size"] == 512
    assert torch.equal(logits(load(output)), logits(load(source)))

    windows = ("--window", 32, "--max-windows", 2)
    against = run_here("evaluate", output, "--data", prose_file, "--against", source, *windows)["against"]
    assert (against["kl_nats_per_token"], against["excess_nats_per_token"], against["top1_agreement"]) == (0, 0, 1)

    length = ("--steps", 1, "--sequence-length", 32, "--global-batch-tokens", 64)
    run_here("uptrain", output, "--data", prose_file, "--teacher", source, *length, "--output", tmp_path / "trained")
    assert weights(tmp_path / "trained")[HEAD].shape == (512, 64)


def test_a_generation_config_that_transformers_does_not_save(
    make_checkpoint: CheckpointFactory, run_here: RunHere, prose_file: Path, tmp_path: Path
) -> None:
    """https://github.com/haotian-liu/LLaVA/issues/1144: temperature without do_sample; a run fails when it is saved."""
    source = make_checkpoint(num_key_value_heads=2, with_tokenizer=True)
    settings = '{"temperature": 0.9, "top_p": 0.6, "eos_token_id": 2}'
    (source / "generation_config.json").write_text(settings)
    length = ("--steps", 1, "--sequence-length", 32, "--global-batch-tokens", 64)
    run_here("uptrain", source, "--data", prose_file, *length, "--output", tmp_path / "trained")
    assert (tmp_path / "trained" / "generation_config.json").read_text() == settings


def test_a_generation_config_that_is_no_json(make_checkpoint: CheckpointFactory, run_here: RunHere) -> None:
    """https://github.com/ml-explore/mlx-lm/pull/708: a comma behind the last value; transformers opens the model."""
    source = make_checkpoint(tie_groups=2)
    (source / "generation_config.json").write_text('{"eos_token_id": 2,}')
    output = converted(run_here, source)
    assert (output / "generation_config.json").read_text() == '{"eos_token_id": 2,}'
    assert torch.equal(logits(load(output)), logits(load(source)))


# ----------------------------------------------------------------------------------------------- files beside a text


def write_rows(directory: Path, *names: str) -> Path:
    """JSON rows in files of these names; a file's text is its name and some prose."""
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        rows = [{"text": f"{name} {number} {PROSE}"} for number in range(1 if name.endswith(".json") else 4)]
        (directory / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def files_read(source: TextSource) -> set[str]:
    return {document.split()[0] for document in read_documents(source)}


@pytest.mark.parametrize(
    ("split", "name"),
    [(None, "train.json"), ("train", "train.json"), ("validation", "val.json"), ("test", "test.json")],
)
def test_a_file_for_every_split(split: str | None, name: str, tmp_path: Path) -> None:
    """https://github.com/huggingface/datasets/issues/7343: train.json, val.json and test.json, of one object each."""
    text = write_rows(tmp_path / "data", "train.json", "val.json", "test.json")
    assert files_read(TextSource(str(text), split=split)) == {name}


def test_only_some_names_tell_of_a_split(tmp_path: Path) -> None:
    """https://github.com/huggingface/datasets/issues/7343, its second part: one file of several is named test."""
    text = write_rows(tmp_path / "data", "books.jsonl", "news_test.jsonl")
    with pytest.raises(DataError) as raised:
        files_read(TextSource(str(text)))
    assert str(raised.value) == f"{text}: no split 'train' (there is test)"
    assert raised.value.settings == ("split",)
    assert files_read(TextSource(str(text), split="test")) == {"news_test.jsonl"}


def test_one_file_of_several_is_named_train(tmp_path: Path) -> None:
    """https://github.com/huggingface/datasets/issues/7201: the other files are not read, and that is said."""
    text = write_rows(tmp_path / "data", "train.jsonl", "more.jsonl", "sub/other.jsonl")
    assert files_read(TextSource(str(text))) == {"train.jsonl"}
    assert describe_files(TextSource(str(text))) == (
        f"{text}: split 'train', 1 file (train.jsonl), not more.jsonl, sub/other.jsonl (of no split)"
    )


def test_reports_beside_the_rows(tmp_path: Path) -> None:
    """https://github.com/unslothai/unsloth/issues/7585: filter_report.json, dataset_manifest.json and a README.md."""
    text = write_rows(tmp_path / "data", "train.jsonl", "val.jsonl")
    (text / "filter_report.json").write_text('{"reasons": [], "kept": 1}')
    (text / "dataset_manifest.json").write_text('{"text": "of no row", "run_id": "1"}')
    (text / "README.md").write_text("---\nlicense: mit\n---\n")
    assert files_read(TextSource(str(text))) == {"train.jsonl"}
    assert files_read(TextSource(str(text), split="validation")) == {"val.jsonl"}
    assert describe_files(TextSource(str(text))) == (
        f"{text}: split 'train', 1 file (train.jsonl), not README.md (about the data); "
        "dataset_manifest.json, filter_report.json (of no split); val.jsonl (split 'validation')"
    )


def test_a_report_beside_rows_of_no_split(tmp_path: Path) -> None:
    """https://github.com/unslothai/unsloth/issues/7585, where no name tells which files are rows: none is left out."""
    text = write_rows(tmp_path / "data", "corpus.jsonl")
    (text / "filter_report.json").write_text('{"reasons": [], "kept": 1}')
    with pytest.raises(DataError) as raised:
        files_read(TextSource(str(text)))
    assert str(raised.value) == f"{text / 'filter_report.json'}, line 1: no field 'text' (there is reasons, kept)"


def test_the_split_that_is_scored(
    make_checkpoint: CheckpointFactory, run_here: RunHere, invoke: Command, tmp_path: Path
) -> None:
    """https://github.com/OpenRLHF/OpenRLHF/pull/367 and THUDM/LongBench#65: `--split` of a directory, of a file.

    Of a directory it is the file of that split; a file has no split, and the option is refused, not ignored.
    """
    source = make_checkpoint(with_tokenizer=True)
    text = write_rows(tmp_path / "local_dataset", "train.jsonl", "test.jsonl")
    evaluate = ("evaluate", source, "--window", 32)
    train, test, split, usual = (
        run_here(*evaluate, "--data", *data)["nats_per_token"]
        for data in ((text / "train.jsonl",), (text / "test.jsonl",), (text, "--split", "train"), (text,))
    )
    assert (split, usual) == (train, test)
    assert train != test
    assert refusal(invoke(*evaluate, "--data", text / "test.jsonl", "--split", "test")) == [
        f"error: {text / 'test.jsonl'}: no split 'test': a file has none",
        "hint: leave the split out (--split)",
    ]


def test_a_readme_without_metadata(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """https://github.com/unslothai/unsloth/issues/7585: the README.md; nothing is printed about what it lacks."""
    text = write_rows(tmp_path / "data", "train.jsonl")
    (text / "README.md").write_text("# my data\n")
    logger = logging.getLogger("huggingface_hub")
    logger.addHandler(caplog.handler)
    try:
        assert files_read(TextSource(str(text))) == {"train.jsonl"}
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.text == ""
