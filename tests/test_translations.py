"""Classes without grouped attention, converted to the native class that has it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    OVERRIDES,
    VOCAB_SIZE,
    CheckpointFactory,
    Command,
    assert_gradients_everywhere,
    assert_same_function,
    build_tokenizer,
    key_value_heads,
)
from kvconvert.convert import ARCHITECTURES, ROUTES, Checkpoint, Gqa, as_target, execute, open_checkpoint
from kvconvert.convert.architectures.table import find_architecture
from kvconvert.convert.checkpoint.loading import load_model
from kvconvert.convert.checkpoint.tokenizer import load_tokenizer
from kvconvert.convert.describe.inspection import inspect_checkpoint
from kvconvert.convert.errors import CheckpointError, UnsupportedError
from kvconvert.convert.runtime.transformers_interface import cache_of
from kvconvert.uptrain import Length, UptrainRequest, plan_uptraining
from kvconvert.uptrain.settings import default_sequence_length
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoTokenizer

GPTJ: dict[str, Any] = {"n_embd": 64, "n_head": 8, "n_layer": 2, "n_inner": 48, "n_positions": 128, "rotary_dim": 4}
ROTARY: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "rope_theta": 99.0, "partial_rotary_factor": 0.5}}
GPT2: dict[str, Any] = {"n_embd": 64, "n_head": 8, "n_layer": 2, "n_inner": 48, "n_positions": 128}
OPT: dict[str, Any] = {"ffn_dim": 48, "word_embed_proj_dim": 64, "pad_token_id": 0}
NEO: dict[str, Any] = {
    "num_heads": 8,
    "num_layers": 2,
    "attention_types": [[["global", "local"], 1]],
    "window_size": 128,
}
BLOOM: dict[str, Any] = {"n_layer": 2, "use_cache": True}
MPT: dict[str, Any] = {"n_layers": 2, "max_seq_len": 128, "use_cache": True}
# ALiBi has another formula where the number of heads is no power of two
SIX_HEADS: dict[str, Any] = {"num_attention_heads": 6, "num_key_value_heads": 6, "hidden_size": 48}
FALCON: dict[str, Any] = {"ffn_hidden_size": 48, "bias": True, "multi_query": False}
# heads of 4 dims: their square root is a power of two, as that of published Falcons' 64
FALCON_RW: dict[str, Any] = {**FALCON, "alibi": True, "parallel_attn": False, "hidden_size": 32}


@dataclass(frozen=True)
class Row:
    """A source, and the classes it becomes with one K/V head and with several."""

    name: str
    model_type: str
    overrides: dict[str, Any]
    single: str
    grouped: str
    num_heads: int = 8

    def target(self, groups: int) -> str:
        return self.single if groups == 1 else self.grouped


ROWS = [
    Row("neox", "gpt_neox", ROTARY, "phi", "phi"),
    Row("neox-no-bias", "gpt_neox", {**ROTARY, "attention_bias": False}, "phi", "phi"),
    Row("neox-sequential", "gpt_neox", {**ROTARY, "use_parallel_residual": False}, "nemotron", "nemotron"),
    Row(
        "neox-sequential-no-bias",
        "gpt_neox",
        {**ROTARY, "use_parallel_residual": False, "attention_bias": False},
        "nemotron",
        "nemotron",
    ),
    Row("gptj", "gptj", GPTJ, "phi", "phi"),
    Row("codegen", "codegen", GPTJ, "phi", "phi"),
    Row("gpt2", "gpt2", GPT2, "gpt_bigcode", "grouped_decoder"),
    Row("gpt2-scaled", "gpt2", {**GPT2, "scale_attn_by_inverse_layer_idx": True}, "gpt_bigcode", "grouped_decoder"),
    Row("gpt2-unscaled", "gpt2", {**GPT2, "scale_attn_weights": False}, "gpt_bigcode", "grouped_decoder"),
    Row("gpt2-tied", "gpt2", {**GPT2, "tie_word_embeddings": True}, "gpt_bigcode", "grouped_decoder"),
    Row("opt", "opt", OPT, "gpt_bigcode", "grouped_decoder"),
    Row("gpt_neo", "gpt_neo", NEO, "gpt_bigcode", "grouped_decoder"),
    Row("gpt_neo-window", "gpt_neo", {**NEO, "window_size": 4}, "grouped_decoder", "grouped_decoder"),
    Row("gpt_bigcode", "gpt_bigcode", OVERRIDES["gpt_bigcode"], "gpt_bigcode", "grouped_decoder"),
    Row(
        "gpt_bigcode-unscaled",
        "gpt_bigcode",
        {**OVERRIDES["gpt_bigcode"], "scale_attn_weights": False},
        "gpt_bigcode",
        "grouped_decoder",
    ),
    Row("biogpt", "biogpt", {"tie_word_embeddings": True}, "gpt_bigcode", "grouped_decoder"),
    Row("xglm", "xglm", {"ffn_dim": 48, "tie_word_embeddings": True}, "gpt_bigcode", "grouped_decoder"),
    Row("xglm-padding", "xglm", {"ffn_dim": 48, "pad_token_id": 5}, "gpt_bigcode", "grouped_decoder"),
    Row("bloom", "bloom", BLOOM, "grouped_decoder", "grouped_decoder"),
    Row("bloom-6-heads", "bloom", {**BLOOM, **SIX_HEADS}, "grouped_decoder", "grouped_decoder", 6),
    Row("mpt", "mpt", MPT, "grouped_decoder", "grouped_decoder"),
    Row("mpt-clip-0", "mpt", {**MPT, "attn_config": {"clip_qkv": 0.0}}, "grouped_decoder", "grouped_decoder"),
    Row(
        "mpt-clipped",
        "mpt",
        {**MPT, **SIX_HEADS, "attn_config": {"clip_qkv": 1.5}},
        "grouped_decoder",
        "grouped_decoder",
        6,
    ),
    Row("falcon", "falcon", FALCON, "falcon", "falcon"),
    Row("falcon-alibi", "falcon", {**FALCON, "alibi": True}, "falcon", "falcon"),
    Row("falcon-new", "falcon", {**FALCON, "new_decoder_architecture": True}, "falcon", "falcon"),
    Row("falcon-rw", "falcon", FALCON_RW, "falcon", "grouped_decoder"),
    Row("falcon-sequential", "falcon", {**FALCON, "parallel_attn": False}, "falcon", "nemotron"),
    Row("persimmon", "persimmon", {**ROTARY, "hidden_act": "relu2"}, "grouped_decoder", "grouped_decoder"),
    Row("persimmon-no-norm", "persimmon", {**ROTARY, "qk_layernorm": False}, "nemotron", "nemotron"),
]
LINEAR_ROWS = [row for row in ROWS if row.name not in ("mpt-clipped", "persimmon")]  # clipping and norms are not linear
each_row = pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])


def convert(source: Path, num_key_value_heads: int, output: Path, **options: Any) -> Path:
    with as_target(open_checkpoint(source), num_key_value_heads) as view:
        plan = Gqa(num_key_value_heads, **options).plan(view)
        execute(plan, view.checkpoint, output, max_shard_bytes=60_000)
    return output


def load(directory: Path) -> Any:
    return load_model(directory, dtype=torch.float32, device="cpu")


@pytest.fixture
def input_ids() -> torch.Tensor:
    return torch.randint(3, VOCAB_SIZE, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("row", "groups"),
    [
        pytest.param(row, groups, id=f"{row.name}-{groups}")
        for row in ROWS
        for groups in ((1, 2, 4) if row.num_heads == 8 else (1, 2, 3))
    ],
)
def test_pooling_equal_heads_changes_nothing(
    row: Row, groups: int, make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = make_checkpoint(row.model_type, seed=groups, tie_groups=groups, max_shard_size="60KB", **row.overrides)
    original, converted = load(source), load(convert(source, groups, tmp_path / "out"))
    assert converted.config.model_type == row.target(groups)
    # Falcon's class expands keys and values to all heads before it caches them, but not where multi_query is set
    expands = converted.config.model_type == "falcon" and converted.config.new_decoder_architecture
    assert_same_function(original, converted, row.num_heads if expands else groups)


@pytest.mark.parametrize("row", LINEAR_ROWS, ids=[row.name for row in LINEAR_ROWS])
def test_keys_and_values_are_the_mean_of_the_originals(
    row: Row, make_checkpoint: CheckpointFactory, tmp_path: Path, input_ids: torch.Tensor
) -> None:
    """Keys, rotated, and values are linear in the weights: in the first layer pooled ones are means of the originals'.

    This goes through the forward pass of both classes and through nothing of the converter.
    """
    source = make_checkpoint(row.model_type, seed=5, **row.overrides)
    original, converted = load(source), load(convert(source, 2, tmp_path / "out"))
    with torch.inference_mode():
        caches = [cache_of(model(input_ids, use_cache=True)) for model in (original, converted)]
    expected, found = (cache.layers[0] for cache in caches)
    keys = expected.keys
    if row.model_type in ("gptj", "codegen"):  # their rotary pairs are neighbours, Phi's are half the rotary dims apart
        keys = torch.cat([keys[..., 0:4:2], keys[..., 1:4:2], keys[..., 4:]], dim=-1)
    for heads, pooled in ((keys, found.keys), (expected.values, found.values)):
        mean = heads.double().unflatten(1, (2, -1)).mean(2)
        distinct = pooled[:, :: pooled.shape[1] // 2].double()  # Falcon's cache repeats them
        torch.testing.assert_close(distinct, mean, rtol=0, atol=1e-5 * mean.abs().max().item())
        assert (mean - heads.double()[:, :: heads.shape[1] // 2]).abs().max() > 0.1  # the first heads are not it


@pytest.mark.parametrize("row", [row for row in ROWS if row.grouped != "phi"], ids=lambda row: row.name)
def test_each_head_is_the_float64_mean_of_its_group(
    row: Row, make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    """Of every layer, bit for bit; Phi, which folds norms into its projections, is compared above."""
    source = make_checkpoint(row.model_type, seed=7, dtype=torch.bfloat16, **row.overrides)
    original, converted = (
        load_model(directory, dtype="auto", device="cpu")
        for directory in (source, convert(source, 2, tmp_path / "out"))
    )
    factor = row.num_heads // 2
    expected = [runs for name, runs in key_value_heads(original).items() if not name.endswith("bias")]
    found = [runs for name, runs in key_value_heads(converted).items() if not name.endswith("bias")]
    expected_heads = [run for runs in expected for run in runs]
    found_heads = [run for runs in found for run in runs]
    assert len(expected_heads) == len(found_heads) == 4  # keys and values of two layers
    for heads, pooled in zip(expected_heads, found_heads, strict=True):
        for group in range(2):
            members = [heads[group * factor + member].double() for member in range(factor)]
            mean = (torch.stack(members).sum(0) / factor).to(torch.bfloat16)
            assert torch.equal(pooled[group], mean.T if row.model_type == "gpt2" else mean)


@pytest.mark.parametrize("groups", [1, 2])
@each_row
def test_gradients_reach_every_parameter(
    row: Row, groups: int, make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    assert_gradients_everywhere(load(convert(make_checkpoint(row.model_type, **row.overrides), groups, tmp_path / "o")))


@pytest.mark.parametrize("model_type", ["gptj", "codegen"])
def test_masks_among_the_weights_are_left_behind(
    model_type: str, make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = make_checkpoint(model_type, tie_groups=2, **GPTJ)
    weights = load_file(source / "model.safetensors")
    num_parameters = sum(tensor.numel() for tensor in weights.values())
    for layer in range(2):
        for buffer in ("bias", "masked_bias", "causal_mask"):
            weights[f"transformer.h.{layer}.attn.{buffer}"] = torch.ones(1, 1, 200, 200, dtype=torch.bool)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with open_checkpoint(source) as checkpoint:
        inspection = inspect_checkpoint(checkpoint)
    assert (inspection.num_parameters, inspection.dtype) == (num_parameters, "F32")
    assert_same_function(load(source), load(convert(source, 2, tmp_path / "out")), 2)


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_rope_scaling_of_older_configs(key: str, make_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source = make_checkpoint("gpt_neox", tie_groups=2, rope_parameters={**ROTARY["rope_parameters"], "rope_theta": 99})
    config = json.loads((source / "config.json").read_text())
    del config["rope_parameters"]
    config |= {"rotary_pct": 0.5, "rotary_emb_base": 99, "rope_scaling": {key: "linear", "factor": 4.0}}
    (source / "config.json").write_text(json.dumps(config))
    assert_same_function(load(source), load(convert(source, 2, tmp_path / "out")), 2)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


def test_the_default_rotary_dim_is_that_of_the_class(make_checkpoint: CheckpointFactory) -> None:
    source = make_checkpoint("gptj", **GPTJ)
    config = json.loads((source / "config.json").read_text())
    del config["rotary_dim"]
    (source / "config.json").write_text(json.dumps(config))
    with as_target(open_checkpoint(source), 2) as view:
        assert view.checkpoint.config["partial_rotary_factor"] == 64 / 8


@pytest.mark.parametrize("files", ["tokenizer.json", "vocab.json and merges.txt"])
def test_a_tokenizer_that_the_model_type_named_is_named(
    files: str, make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    """GPT-2's own tokenizer_config.json holds a length and nothing else."""
    source = make_checkpoint("gpt2", **GPT2)
    vocabulary = {letter: index for index, letter in enumerate("abcdefgh")} | {"<|endoftext|>": 8, "ab": 9}
    (source / "vocab.json").write_text(json.dumps(vocabulary))
    (source / "merges.txt").write_text("#version: 0.2\na b\n")
    (source / "tokenizer_config.json").write_text('{"model_max_length": 128}')
    if files == "tokenizer.json":
        AutoTokenizer.from_pretrained(source).backend_tokenizer.save(str(source / "tokenizer.json"))
    before = load_tokenizer(source)
    after = load_tokenizer(convert(source, 1, tmp_path / "out"))
    assert after.eos_token_id == before.eos_token_id == 8
    assert after("abc")["input_ids"] == before("abc")["input_ids"] == [9, 2]
    assert after.model_max_length == 128


def test_the_longest_context_is_found_under_its_own_name(make_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    output = convert(make_checkpoint("gpt2", **{**GPT2, "max_position_embeddings": 64}), 1, tmp_path / "out")
    with open_checkpoint(output) as checkpoint:
        assert inspect_checkpoint(checkpoint).context_length == 64
        assert default_sequence_length(checkpoint) == 64


def test_a_quantised_source_is_refused_as_such(make_checkpoint: CheckpointFactory) -> None:
    source = make_checkpoint("gpt_neox", **ROTARY)
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="the checkpoint is quantised"):
        as_target(open_checkpoint(source), 2)


def test_without_pooling_only_the_class_changes(
    make_checkpoint: CheckpointFactory, tmp_path: Path, input_ids: torch.Tensor
) -> None:
    source = make_checkpoint("gpt_neox", **ROTARY)
    original, converted = load(source), load(convert(source, 8, tmp_path / "out", allow_same=True))
    assert converted.config.model_type == "phi"
    with torch.inference_mode():
        expected, found = (model(input_ids=input_ids, use_cache=False).logits for model in (original, converted))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_a_pythia_checkpoint_as_its_authors_saved_it(
    make_checkpoint: CheckpointFactory, tmp_path: Path, input_ids: torch.Tensor
) -> None:
    """embed_out, masks and frequencies among the weights, rotary_pct in the config, float16."""
    source = make_checkpoint("gpt_neox", tie_groups=2, dtype=torch.float16, **ROTARY)
    weights = load_file(source / "model.safetensors")
    assert "embed_out.weight" in weights
    for layer in range(2):
        attention = f"gpt_neox.layers.{layer}.attention"
        weights[f"{attention}.bias"] = torch.ones(1, 1, 4, 4, dtype=torch.bool)
        weights[f"{attention}.masked_bias"] = torch.tensor(-1e9)
        weights[f"{attention}.rotary_emb.inv_freq"] = torch.ones(2)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    for name in ("rope_parameters", "dtype"):
        del config[name]
    config |= {"rotary_pct": 0.5, "rotary_emb_base": 99, "torch_dtype": "float16"}
    (source / "config.json").write_text(json.dumps(config))
    original, converted = load(source), load(convert(source, 2, tmp_path / "out"))
    assert load_model(tmp_path / "out", dtype="auto", device="cpu").dtype == torch.float16
    with torch.inference_mode():
        expected, found = (model(input_ids=input_ids, use_cache=False).logits for model in (original, converted))
    # the folded weights are rounded to float16, 11 bits: 2e-3 of the scale
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3 * expected.abs().max().item())


def test_inspect_and_convert_say_what_the_result_is(make_checkpoint: CheckpointFactory, invoke: Command) -> None:
    source = make_checkpoint("gpt_neox", **ROTARY)
    with open_checkpoint(source) as checkpoint:
        inspection = inspect_checkpoint(checkpoint)
    assert inspection.model_type == "gpt_neox"
    assert [target.model_type for target in inspection.targets] == ["phi", "phi", None, None]
    assert inspection.num_parameters == checkpoint.num_parameters
    shown = invoke("inspect", source).stdout
    assert re.search(r"architecture +gpt_neox \(MHA\)$", shown, re.MULTILINE)
    assert re.search(r"mha2gqa +--groups 2 or 4, as phi$", shown, re.MULTILINE)
    assert invoke("mha2mqa", source, "--json").printed["opened_as"] == "PhiForCausalLM"


def test_a_missing_tensor_is_named(make_checkpoint: CheckpointFactory) -> None:
    source = make_checkpoint("gptj", **GPTJ)
    weights = load_file(source / "model.safetensors")
    name = "transformer.h.1.mlp.fc_in.weight"
    save_file({key: value for key, value in weights.items() if key != name}, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name} is missing from"):
        as_target(open_checkpoint(source), 2)


@pytest.mark.parametrize(
    ("model_type", "overrides", "message"),
    [
        ("opt", {**OPT, "word_embed_proj_dim": 32}, "its embeddings are narrower than its layers"),
        ("opt", {**OPT, "do_layer_norm_before": False}, "it normalises after each branch"),
        ("bloom", {**BLOOM, "apply_residual_connection_post_layernorm": True}, "its residual branches off after"),
        ("mpt", {**MPT, "attn_config": {"softmax_scale": 0.5}}, r"no counterpart of attn_config.softmax_scale = 0.5"),
        ("falcon", {**FALCON_RW, "hidden_size": 64}, "a division by √8, which is not a power of two"),
        ("gpt2", {**GPT2, "add_cross_attention": True}, "it has cross-attention"),
    ],
)
def test_what_would_not_be_exact_is_refused(
    model_type: str, overrides: dict[str, Any], message: str, make_checkpoint: CheckpointFactory
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        as_target(open_checkpoint(make_checkpoint(model_type, **overrides)), 2)


def test_inspect_shows_the_class_of_each_conversion(make_checkpoint: CheckpointFactory, invoke: Command) -> None:
    """One K/V head has a stock class, several have ours."""
    shown = invoke("inspect", make_checkpoint("gpt2", **GPT2)).stdout
    assert re.search(r"mha2gqa +--groups 2 or 4, as grouped_decoder$", shown, re.MULTILINE)
    assert re.search(r"mha2mqa +8 K/V heads become 1, as gpt_bigcode$", shown, re.MULTILINE)
    assert re.search(r"^ +gpt_bigcode +transformers \(tested\), vLLM", shown, re.MULTILINE)
    assert re.search(
        r"^ +grouped_decoder +transformers \(tested: with trust_remote_code, or after", shown, re.MULTILINE
    )


def test_an_mqa_checkpoint_is_recognised(make_checkpoint: CheckpointFactory) -> None:
    with open_checkpoint(
        make_checkpoint("gpt_bigcode", **{**OVERRIDES["gpt_bigcode"], "multi_query": True})
    ) as checkpoint:
        inspection = inspect_checkpoint(checkpoint)
    assert (inspection.attention, inspection.num_key_value_heads) == ("MQA", 1)
    assert [target.reason for target in inspection.targets[:3]] == [
        "the model has one K/V head already",
        "the model is MQA already",
        "no class lets layers of gpt_bigcode share keys and values",
    ]


def test_gpt2_as_its_authors_saved_it(make_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    """No prefix, no output head, masks among the weights, a config that leaves most out."""
    source = make_checkpoint("gpt2", tie_groups=1, tie_word_embeddings=True, **GPT2)
    weights = {
        name.removeprefix("transformer."): tensor for name, tensor in load_file(source / "model.safetensors").items()
    }
    assert "lm_head.weight" not in weights
    for layer in range(2):
        weights[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 4, 4)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    kept = ["architectures", "model_type", "n_embd", "n_head", "n_layer", "n_inner", "n_positions", "vocab_size"]
    kept += ["bos_token_id", "eos_token_id", "pad_token_id"]
    (source / "config.json").write_text(json.dumps({name: config[name] for name in kept}))
    assert_same_function(load(source), load(convert(source, 1, tmp_path / "out")), 1)


def test_the_first_qwen_becomes_qwen2(make_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    """Transformers has no class for it: a Qwen2 is rewritten in its layout, and must come back with its heads tied."""
    stock = make_checkpoint("qwen2", tie_groups=2, max_position_embeddings=128, use_sliding_window=False)
    weights = load_file(stock / "model.safetensors")
    qwen = {
        "transformer.wte.weight": weights["model.embed_tokens.weight"],
        "transformer.ln_f.weight": weights["model.norm.weight"],
        "lm_head.weight": weights["lm_head.weight"],
    }
    for layer in range(2):
        old, new = f"model.layers.{layer}", f"transformer.h.{layer}"
        for kind in ("weight", "bias"):
            parts = [weights[f"{old}.self_attn.{projection}_proj.{kind}"] for projection in "qkv"]
            qwen[f"{new}.attn.c_attn.{kind}"] = torch.cat(parts)
        qwen[f"{new}.attn.c_proj.weight"] = weights[f"{old}.self_attn.o_proj.weight"]
        qwen[f"{new}.ln_1.weight"] = weights[f"{old}.input_layernorm.weight"]
        qwen[f"{new}.ln_2.weight"] = weights[f"{old}.post_attention_layernorm.weight"]
        for ours, theirs in (("w1", "up_proj"), ("w2", "gate_proj"), ("c_proj", "down_proj")):
            qwen[f"{new}.mlp.{ours}.weight"] = weights[f"{old}.mlp.{theirs}.weight"]
    source = tmp_path / "qwen"
    source.mkdir()
    save_file(qwen, source / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["QWenLMHeadModel"],
        "auto_map": {"AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"},
        "model_type": "qwen",
        "hidden_size": 64,
        "intermediate_size": 96,  # of both halves
        "layer_norm_epsilon": 1e-6,
        "no_bias": True,
        "num_attention_heads": 8,
        "num_hidden_layers": 2,
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "seq_length": 128,
        "max_position_embeddings": 32768,
        "vocab_size": VOCAB_SIZE,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    (source / "config.json").write_text(json.dumps(config))
    converted = load(convert(source, 2, tmp_path / "out"))
    assert converted.config.model_type == "qwen2"
    assert converted.config.max_position_embeddings == 128
    assert_same_function(load(stock), converted, 2)

    build_tokenizer().save_pretrained(source)
    build_tokenizer().save_pretrained(tmp_path / "out")
    (tmp_path / "text.txt").write_text("a b c " * 1000)
    run = UptrainRequest(model=tmp_path / "out", data=(tmp_path / "text.txt",), teacher=source, length=Length(steps=2))
    assert plan_uptraining(run).job.settings.sequence_length == 128


def test_every_class_that_needs_converting_is_named_as_such() -> None:
    """What the error of uptrain says of them; and each has a row in a test."""
    tested = {row.model_type for row in ROWS} | {"bart", "mt5", "t5", "whisper"} | {"qwen"}
    assert set(ROUTES) - set(ARCHITECTURES) == tested - {"falcon", "gpt_bigcode"}
    for model_type in set(ROUTES) - set(ARCHITECTURES):
        checkpoint = Checkpoint("model", None, {"model_type": model_type}, {}, 0)
        with pytest.raises(UnsupportedError, match="a conversion to GQA or MQA gives it one that has"):
            find_architecture(checkpoint)


BASE_CLASSES = [
    "neox",
    "neox-sequential",
    "gptj",
    "codegen",
    "gpt2-tied",
    "opt",
    "gpt_neo",
    "gpt_bigcode",
    "biogpt",
    "xglm",
    "bloom",
    "mpt",
    "falcon",
    "falcon-rw",
    "persimmon",
    "persimmon-no-norm",
]


@pytest.mark.parametrize("row", [row for row in ROWS if row.name in BASE_CLASSES], ids=lambda row: row.name)
def test_what_a_base_class_saved(row: Row, make_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    """Without prefix and without head: the result has the same hidden states."""
    whole = load(make_checkpoint(row.model_type, tie_groups=2, **row.overrides))
    whole.base_model.save_pretrained(tmp_path / "base")
    convert(tmp_path / "base", 2, tmp_path / "out")
    input_ids = torch.arange(3, 15)[None]
    with torch.inference_mode():
        expected, found = (
            AutoModel.from_pretrained(tmp_path / name, dtype=torch.float32)(input_ids=input_ids).last_hidden_state
            for name in ("base", "out")
        )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_a_falcon_of_transformers_4(make_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source = make_checkpoint("falcon", tie_groups=2, **FALCON, parallel_attn=False)
    config = json.loads((source / "config.json").read_text())
    del config["rope_parameters"]
    (source / "config.json").write_text(json.dumps(config | {"rope_theta": 25.0}))
    assert_same_function(load(source), load(convert(source, 2, tmp_path / "out")), 2)


def test_a_falcon_reduced_in_two_steps_caches_one_head(make_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source = make_checkpoint("falcon", tie_groups=1, **FALCON)
    halfway = convert(source, 2, tmp_path / "gqa2")
    assert load(halfway).config.new_decoder_architecture
    assert_same_function(load(source), load(convert(halfway, 1, tmp_path / "mqa")), 1)


def test_special_tokens_that_the_class_had_by_default_are_kept(
    make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    for number, row in enumerate(ROWS):
        source = make_checkpoint(row.model_type, name=f"model{number}", **row.overrides)
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in names}))
        with as_target(open_checkpoint(source), 2) as view:
            if view.checkpoint.config["model_type"] != row.model_type:
                default = AutoConfig.for_model(row.model_type)
                assert {n: view.checkpoint.config[n] for n in names} == {n: getattr(default, n, None) for n in names}, (
                    row.name
                )


def test_a_tensor_that_would_be_dropped_is_named(make_checkpoint: CheckpointFactory) -> None:
    source = make_checkpoint("gpt2", **GPT2)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"n_layer": 1}))
    with pytest.raises(CheckpointError, match=r"config.json implies no tensor transformer\.h\.1\."):
        as_target(open_checkpoint(source), 2)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_tokenizer_is_copied_as_it_is(name: str, make_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source = make_checkpoint("gpt2", **GPT2)
    (source / "tokenizer.json").write_text("{}")
    (source / name).write_text("{")
    assert (convert(source, 2, tmp_path / "out") / name).read_text() == "{"
