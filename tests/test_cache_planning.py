"""The memory that is planned is what transformers allocates, and what vLLM was seen to allocate."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LATENT, OVERRIDES, CheckpointFactory, Command, build_model
from kvconvert.convert import Calibration, Cla, Gqa, KvConvertError, Mla, convert, open_checkpoint, plan_cache
from kvconvert.convert.algebra.attention_shape import AttentionShape, LatentSizes
from kvconvert.convert.algebra.kv_cache import CACHE_FORMATS, num_blocks
from kvconvert.convert.checkpoint.loading import load_model
from kvconvert.convert.runtime.transformers_interface import CACHE_NAME, cache_of
from test_known_classes import imported
from test_seq2seq import BART, T5, WHISPER, inputs_of
from test_seq2seq import load as load_seq2seq
from test_seq2seq import make as make_seq2seq
from transformers import StaticCache

DEMO = Path(__file__).parent.parent / "configs" / "demo" / "model"
DOCS = Path(__file__).parent.parent / "docs"
NUM_PROMPT, NUM_DECODED = 24, 4
CONTEXT = NUM_PROMPT + NUM_DECODED
WINDOW = {"sliding_window": 16}
HYBRID = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
GPT2 = {"n_embd": 64, "n_head": 8, "n_layer": 2, "n_positions": 128}
LOCAL = {"hidden_size": 64, "num_layers": 2, "num_heads": 8, "attention_types": [[["global", "local"], 1]]}
# model_type, settings, and the numbers that the whole cache holds after CONTEXT tokens, by hand
FAMILIES: dict[str, tuple[str, dict[str, Any], int]] = {
    "MHA": ("llama", {}, 2 * CONTEXT * 2 * 64),
    "GQA": ("llama", {"num_key_value_heads": 2}, 2 * CONTEXT * 2 * 16),
    "its own class": ("gpt2", GPT2, 2 * CONTEXT * 2 * 64),
    "MQA": ("gpt_bigcode", {**OVERRIDES["gpt_bigcode"], "multi_query": True}, 2 * CONTEXT * 2 * 8),
    "windows": ("mistral", WINDOW, 2 * 16 * 2 * 64),
    "a window longer than the context": ("mistral", {"sliding_window": 64}, 2 * CONTEXT * 2 * 64),
    "hybrid, gemma2": ("gemma2", WINDOW, (16 + CONTEXT) * 2 * 64),
    "hybrid, gemma3": ("gemma3_text", HYBRID, (16 + CONTEXT) * 2 * 64),
    "hybrid, qwen2": (
        "qwen2",
        {**WINDOW, "use_sliding_window": True, "max_window_layers": 1, "num_key_value_heads": 4},
        (16 + CONTEXT) * 2 * 32,
    ),
    "MoE": ("mixtral", {"num_key_value_heads": 2}, 2 * CONTEXT * 2 * 16),
    "MoE, windows": ("qwen3_moe", {**WINDOW, "use_sliding_window": True}, 2 * 16 * 2 * 64),
    "shared layers": ("cross_layer_decoder", {"num_hidden_layers": 4, "kv_source_layers": [0, 0, 2, 2]}, 7168),
    "latent": ("deepseek_v3", LATENT, 2 * CONTEXT * (16 + 4)),
    "falcon, one head": ("falcon", {"multi_query": True}, 2 * CONTEXT * 2 * 8),
    "falcon, all heads cached": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, 7168),
    "gpt_neo, all tokens cached": ("gpt_neo", {**LOCAL, "window_size": 16}, 7168),
}
METHODS: dict[str, Any] = {"mha2gqa": Gqa, "mha2mqa": Gqa, "mha2cla": Cla, "mha2mla": Mla}


def layers_of(cache: Any) -> Iterator[Any]:
    """The layers of a cache, those of cross-attention too."""
    if hasattr(cache, "cross_attention_cache"):
        yield from cache.self_attention_cache.layers
        yield from cache.cross_attention_cache.layers
    else:
        yield from cache.layers


def live_bytes(cache: Any) -> int:
    """What the tensors of a cache keep allocated.

    That of a window's keys is a view of one token less than the memory that it keeps.
    """
    tensors = [
        value
        for layer in layers_of(cache)
        for value in vars(layer).values()
        if isinstance(value, torch.Tensor) and value.dim() > 2  # (B, K, T, D), not a counter
    ]
    assert tensors
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def allocated(model: Any) -> int:
    """The bytes of the cache of one sequence after a prompt and a few decoded tokens."""
    tokens = torch.randint(3, 90, (1, CONTEXT), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        cache = cache_of(model(input_ids=tokens[:, :NUM_PROMPT], use_cache=True))
        for token in tokens[:, NUM_PROMPT:].split(1, dim=1):
            cache = cache_of(model(input_ids=token, use_cache=True, **{CACHE_NAME: cache}))
    return live_bytes(cache)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_allocates_what_is_planned(family: str, tmp_path: Path) -> None:
    model_type, overrides, num_values = FAMILIES[family]
    model = build_model(model_type, **overrides).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    (as_it_is, *_) = plan_cache(tmp_path, context_length=CONTEXT).models
    assert as_it_is.bytes_per_sequence_in_transformers == 2 * num_values
    assert allocated(model) == 2 * num_values


@pytest.mark.parametrize(
    ("family", "in_other_engines"),
    [("falcon, all heads cached", 2 * CONTEXT * 2 * 16), ("gpt_neo, all tokens cached", (16 + CONTEXT) * 2 * 64)],
)
def test_a_class_that_caches_more_than_it_reads_is_named(
    family: str, in_other_engines: int, tmp_path: Path, invoke: Command
) -> None:
    model_type, overrides, num_values = FAMILIES[family]
    build_model(model_type, **overrides).save_pretrained(tmp_path)
    (as_it_is, *_) = plan_cache(tmp_path, context_length=CONTEXT).models
    assert as_it_is.costs["16-bit"].bytes_per_sequence == 2 * in_other_engines < 2 * num_values
    shown = invoke("inspect", tmp_path, "--context", CONTEXT, "--batch", 2).stdout
    assert (
        f"transformers caches more than that for one sequence in 16-bit: {2 * num_values / 1000:.3g} kB as it" in shown
    )


def test_a_dynamic_cache_holds_a_prompt_whole_until_the_next_token() -> None:
    model = build_model("mistral", **WINDOW).to(torch.bfloat16)
    with torch.inference_mode():
        cache = cache_of(model(input_ids=torch.arange(3, 3 + NUM_PROMPT)[None], use_cache=True))
    assert live_bytes(cache) == 2 * NUM_PROMPT * 2 * 64 * 2


def test_a_result_of_falcon_is_planned_as_its_class_caches_it(
    make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = make_checkpoint("falcon", dtype=torch.bfloat16, multi_query=False)
    models = {model.name: model for model in plan_cache(source, context_length=CONTEXT).models}
    whole = models["as it is"].bytes_per_sequence_in_transformers
    assert models["gqa2"].costs["16-bit"].bytes_per_sequence == whole // 4
    for name, expected in {"gqa2": whole, "mqa": whole // 8}.items():
        output = convert(source, Gqa(**models[name].settings), tmp_path / name).output
        live = allocated(load_model(output, dtype=torch.bfloat16, device="cpu"))
        assert live == expected == models[name].bytes_per_sequence_in_transformers


@pytest.mark.parametrize(("model_type", "overrides"), [("gemma2", WINDOW), ("llama", {})])
def test_a_static_cache_takes_what_is_planned(model_type: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    model = build_model(model_type, **overrides).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    cache = StaticCache(config=model.config, max_cache_len=CONTEXT)
    with torch.inference_mode():
        model(input_ids=torch.arange(3, 8)[None], use_cache=True, **{CACHE_NAME: cache})
    (as_it_is, *_) = plan_cache(tmp_path, context_length=CONTEXT).models
    assert live_bytes(cache) == as_it_is.costs["16-bit"].bytes_per_sequence


@pytest.mark.parametrize(
    ("model_type", "overrides", "num_encoded"), [("t5", T5, 10), ("bart", BART, 10), ("whisper", WHISPER, 12)]
)
def test_an_encoder_takes_as_much_of_the_cache(
    model_type: str, overrides: dict[str, Any], num_encoded: int, tmp_path: Path
) -> None:
    """Whisper's encoder has a fixed length; of the others it is planned as long as the decoder's context."""
    make_seq2seq(tmp_path, model_type, overrides)
    plan = plan_cache(tmp_path, context_length=10)
    assert plan.encoder_length == num_encoded
    model = load_seq2seq(tmp_path).to(torch.bfloat16)
    inputs = {name: value[:1] for name, value in inputs_of(model).items() if name != "attention_mask"}
    inputs = {name: value.to(torch.bfloat16) if value.is_floating_point() else value for name, value in inputs.items()}
    with torch.inference_mode():
        outputs = model(**inputs, decoder_input_ids=torch.arange(3, 13)[None], use_cache=True)
    expected = 2 * 2 * (10 + num_encoded) * 2 * 64  # bytes, layers, tokens, keys and values
    assert live_bytes(cache_of(outputs)) == expected
    assert {model.name: expected // model.costs["16-bit"].bytes_per_sequence for model in plan.models} == {
        "as it is": 1,
        "gqa4": 2,
        "gqa2": 4,
        "mqa": 8,
    }


def test_every_result_has_the_weights_and_the_cache_that_were_planned(
    make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = make_checkpoint(dtype=torch.bfloat16, hidden_size=256, head_dim=64)
    plan = plan_cache(source, context_length=CONTEXT)
    found = {model.name: model for model in plan.models[1:]}
    assert list(found) == ["gqa4", "gqa2", "mqa", "cla2", "mqa-cla2", "mla256-64"]
    for name, model in found.items():
        method = METHODS[str(model.command)](**model.settings)
        text = Calibration(weights_only=True) if method.needs_measurements else None
        output = convert(source, method, tmp_path / name, calibration=text).output
        with open_checkpoint(output) as checkpoint:
            assert sum(info.num_bytes for info in checkpoint.tensors.values()) == model.weights_bytes, name
        live = allocated(load_model(output, dtype=torch.bfloat16, device="cpu"))
        assert live == model.costs["16-bit"].bytes_per_sequence == model.bytes_per_sequence_in_transformers, name
        assert live < plan.models[0].costs["16-bit"].bytes_per_sequence, name


HEADS = AttentionShape(256, 8, 4, 32, (None, None, 16))
COMPRESSED = AttentionShape(256, 8, 8, 32, (None,) * 3, latent=LatentSizes(512, 64, 128, 128))


@pytest.mark.parametrize(
    ("name", "of_heads", "of_a_latent"),
    [
        ("16-bit", 2 * 4 * 32 * 2, 576 * 2),
        ("fp8", 2 * 4 * 32, 576),
        ("int8", 2 * 4 * (32 + 4), None),
        ("int4", 2 * 4 * (16 + 4), None),
    ],
)
def test_bytes_in_each_format(name: str, of_heads: int, of_a_latent: int | None) -> None:
    """Of a token and layer. vLLM has no cache of a latent with a scale per head: a latent has no heads."""
    (cache_format,) = (each for each in CACHE_FORMATS if each.name == name)
    assert cache_format.bytes_per_token(HEADS) == 3 * of_heads
    assert cache_format.sequence_bytes(HEADS, 100) == (2 * 100 + 16) * of_heads
    assert cache_format.holds(COMPRESSED) == (of_a_latent is not None)
    if of_a_latent is not None:
        assert cache_format.sequence_bytes(COMPRESSED, 100) == 300 * of_a_latent
    else:
        with pytest.raises(ValueError, match=f"a latent has no heads, and {name} has a scale for each"):
            cache_format.bytes_per_token(COMPRESSED)


def test_blocks_are_those_that_vllm_made() -> None:
    """Blocks of 128 tokens, as on a CPU, in 1 GiB, before and after each conversion of the published table."""
    section = (DOCS / "measurement-log.md").read_text().partition("## Served by vLLM")[2].partition("\n## ")[0]
    rows = re.findall(r"\| (\d+) → (\d+) \| (\d+) → (\d+) \|$", section, re.MULTILINE)
    assert len(rows) == 10
    for row in rows:
        *per_token, before, after = map(int, row)
        assert [num_blocks(2**30, bytes_per_token=each, block_tokens=128) for each in per_token] == [before, after]
    assert num_blocks(2**30, bytes_per_token=4096) == 2048 * 128 // 16
    assert num_blocks(2**16 - 1, bytes_per_token=4096) == 0  # of a block there is no part


def test_sequences_fit_beside_the_weights(make_checkpoint: CheckpointFactory) -> None:
    source = make_checkpoint(dtype=torch.bfloat16)
    with open_checkpoint(source) as checkpoint:
        weights = sum(info.num_bytes for info in checkpoint.tensors.values())
    sequence = 100 * 2 * 2 * 64 * 2  # tokens, layers, keys and values, bytes
    usable = weights + 3 * sequence
    for memory, expected in ((usable, 3), (usable - 1, 2), (weights - 1, 0)):
        plan = plan_cache(source, context_length=100, batch=5, memory_bytes=memory, memory_fraction=1.0)
        cost = plan.models[0].costs["16-bit"]
        assert (cost.sequences, cost.bytes_per_sequence, cost.total_bytes) == (
            expected,
            sequence,
            weights + 5 * sequence,
        )
        assert cost.blocks == max(0, memory - weights) // (16 * 512)
    assert plan_cache(source, memory_bytes=1000).usable_bytes == 900
    assert plan_cache(source).models[0].costs["16-bit"].sequences is None


def test_blocks_are_not_said_where_they_depend_on_more(make_checkpoint: CheckpointFactory) -> None:
    plan = plan_cache(make_checkpoint("gemma2", **WINDOW), context_length=100, memory_bytes=10**9)
    cost = plan.models[0].costs["16-bit"]
    assert cost.blocks is None
    assert cost.sequences is not None


def test_notes_say_what_the_figures_depend_on(make_checkpoint: CheckpointFactory) -> None:
    plan = plan_cache(make_checkpoint(), context_length=1000)
    long, stored = plan.notes
    assert long == "the model takes 128 tokens, and 1000 are planned"
    assert stored.startswith("weights are counted in 32 bits, as they are stored")
    assert plan_cache(make_checkpoint(name="short", dtype=torch.bfloat16), context_length=128).notes == ()


@pytest.mark.parametrize(("num_full", "names"), [(2, ["cla2", "mqa-cla2"]), (1, []), (0, ["cla2", "mqa-cla2"])])
def test_pairs_are_planned_where_both_layers_see_as_much(
    num_full: int, names: list[str], make_checkpoint: CheckpointFactory
) -> None:
    windows = {**WINDOW, "use_sliding_window": True, "max_window_layers": num_full}
    plan = plan_cache(make_checkpoint("qwen2", num_hidden_layers=4, **windows), context_length=100)
    found = {model.name: model.costs["16-bit"].bytes_per_sequence for model in plan.models if "CLA" in model.attention}
    assert list(found) == names
    if names:
        half = plan.models[0].costs["16-bit"].bytes_per_sequence // 2
        assert found == {"cla2": half, "mqa-cla2": half // 8}


@pytest.mark.parametrize(("rotary", "names"), [(1.0, ["mla256-64"]), (0.5, [])])
def test_a_latent_is_planned_where_heads_have_its_rotary_dims(
    rotary: float, names: list[str], make_checkpoint: CheckpointFactory
) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": rotary}
    source = make_checkpoint("phi3", hidden_size=256, head_dim=64, rope_parameters=rope)
    plan = plan_cache(source)
    assert [model.name for model in plan.models if model.attention == "MLA"] == names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context_length": 0}, r"context_length = 0: use 1 or more"),
        ({"batch": 0}, r"batch = 0: use 1 or more"),
        ({"memory_bytes": -1}, r"memory_bytes = -1: use 1 or more"),
        ({"memory_fraction": 0.0}, r"memory_fraction = 0\.0: use more than 0 and at most 1"),
        ({"memory_fraction": 1.5}, r"memory_fraction = 1\.5: use more than 0 and at most 1"),
    ],
)
def test_a_plan_for_nothing_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(KvConvertError, match=message):
        plan_cache(DEMO, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch", 0), "'--batch': Input should be greater than or equal to 1"),
        (("--context", 0, "--batch", 2), "'--context': Input should be greater than or equal to 1"),
        (("--gpu-memory", "80"), "'--gpu-memory': '80' has no unit; write for example 80GB or 80GiB"),
        (("--gpu-memory", "80XB"), "'--gpu-memory': '80XB' is not a size; write for example"),
        (("--gpu-memory", "-1GB"), "'--gpu-memory': '-1GB' is not a size; write for example"),
        (("--gpu-memory", "0GB"), "'--gpu-memory': '0GB' is not a size; write for example"),
    ],
)
def test_what_cannot_be_planned_is_wrong_usage(arguments: tuple[object, ...], message: str, invoke: Command) -> None:
    outcome = invoke("inspect", DEMO, *arguments)
    assert outcome.returncode == 2
    assert outcome.stdout == ""
    assert f"Error: Invalid value for {message}" in outcome.stderr


def test_inspect_shows_the_plan_and_gives_it_as_json(invoke: Command) -> None:
    arguments = ("inspect", DEMO, "--context", 32768, "--batch", 64, "--gpu-memory", "80GB")
    printed = invoke(*arguments, "--json").printed
    plan = printed["cache_plan"]
    assert (plan["context_length"], plan["batch"], plan["usable_bytes"]) == (32768, 64, 72 * 10**9)
    mqa = next(model for model in plan["models"] if model["name"] == "mqa")
    whole = plan["models"][0]["weights_bytes"]
    weights, sequence = whole - 4 * 2 * 7 * 32 * 256 * 2, 32768 * 512  # layers, keys and values, heads
    cost = {"bytes_per_sequence": sequence, "total_bytes": weights + 64 * sequence, "sequences": 4291}
    assert mqa["costs"]["16-bit"] == cost | {"blocks": (72 * 10**9 - weights) // (512 * 16)}
    assert (72 * 10**9 - weights) // sequence == 4291
    assert (mqa["weights_bytes"], mqa["command"], mqa["settings"]) == (weights, "mha2mqa", {"num_key_value_heads": 1})
    assert printed.keys() - invoke("inspect", DEMO, "--json").printed.keys() == {"cache_plan"}

    lines = invoke(*arguments).stdout.splitlines()
    at = lines.index("plan for 64 sequences of 32768 tokens")
    groups, title, as_it_is = lines[at + 1 : at + 4]
    assert groups.index("sequences that fit") == title.rindex("16-bit")
    figures = "7.38 MB 8.6 GB 134 MB 67.1 MB 75.5 MB 41.9 MB 536 1072 953 1716"
    assert re.sub(r" +", " ", as_it_is) == f" as it is MHA {figures}"
    assert "  note: the model takes 512 tokens, and 32768 are planned" in lines
    assert any(line.startswith("  sequences that fit: beside the weights in 72 GB, 90 % of 80 GB; ") for line in lines)


def test_gib_are_powers_of_1024(invoke: Command) -> None:
    plan = invoke("inspect", DEMO, "--gpu-memory", "80GiB", "--json").printed["cache_plan"]
    assert (plan["memory_bytes"], plan["batch"]) == (80 * 2**30, 1)


def test_planning_imports_neither_torch_nor_transformers() -> None:
    modules = imported("inspect", str(DEMO), "--batch", "64", "--gpu-memory", "80GB")
    assert "kvconvert.convert.describe.cache_planning" in modules
    assert modules.isdisjoint({"torch", "transformers"})
