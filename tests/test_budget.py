from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kvconvert.configs import DEMO
from kvconvert.convert.checkpoint.opening import open_checkpoint
from kvconvert.convert.checkpoint.tensors import Checkpoint
from kvconvert.convert.errors import CheckpointError, InputError, UnsupportedError
from kvconvert.uptrain.estimate.budget import (
    Batch,
    Budget,
    check_asked_batch,
    default_global_batch_tokens,
    derive_batch,
    plan_budget,
)
from kvconvert.uptrain.estimate.pretraining import PretrainingTokens, known_models, lookup_pretraining_tokens

KNOWN = PretrainingTokens(20_971_520, "pretraining.json beside model")
UNKNOWN = PretrainingTokens(None, "model is not in the table")
PYTHIA = 299_892_736_000
PYTHIA_160M = {
    "model_type": "gpt_neox",
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 50304,
}
LLAMA_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}

MakeSource = Callable[..., Checkpoint]


def plan(**settings: Any) -> Budget:
    nothing = {"steps": None, "tokens": None, "fraction": None, "pretraining_tokens": None}
    return plan_budget(**{**nothing, "lookup": KNOWN, "tokens_per_step": 16_384, **settings})


def headers(name: str, config: dict[str, Any], path: Path | None = None) -> Checkpoint:
    """A checkpoint of which only the headers were fetched, unless `path` is given."""
    return Checkpoint(name, path, config, {}, 0)


@pytest.fixture
def in_directory(tmp_path: Path) -> MakeSource:
    """A local checkpoint by the name of its directory, with the JSON files that are given beside its config."""

    def make(name: str, config: dict[str, Any], **files: dict[str, Any]) -> Checkpoint:
        directory = tmp_path / name
        directory.mkdir(parents=True)
        for stem, content in files.items():
            (directory / f"{stem}.json").write_text(json.dumps(content))
        return headers(str(directory), config, directory)

    return make


def test_a_run_of_steps() -> None:
    budget = plan(steps=10)
    assert budget == Budget(10, 16_384, 20_971_520, KNOWN.source)
    assert budget.tokens == 163_840
    assert budget.fraction_of_pretraining == 163_840 / 20_971_520


@pytest.mark.parametrize(("tokens", "steps"), [(1, 1), (16_384, 1), (16_385, 2), (10**9, 61_036)])
def test_tokens_are_rounded_up_to_steps(tokens: int, steps: int) -> None:
    assert plan(tokens=tokens, lookup=UNKNOWN).steps == steps


def test_a_fraction_of_what_is_known() -> None:
    budget = plan(fraction=0.1)
    assert (budget.steps, budget.fraction, budget.source) == (128, 0.1, KNOWN.source)


def test_five_per_cent_unless_a_length_is_given() -> None:
    budget = plan()
    assert (budget.steps, budget.fraction, budget.explicit) == (64, 0.05, False)
    assert plan(fraction=0.05).explicit


def test_what_the_user_says_comes_before_what_is_known() -> None:
    budget = plan(pretraining_tokens=16_384 * 1000)
    assert (budget.steps, budget.pretraining_tokens, budget.source) == (50, 16_384_000, "--pretraining-tokens")
    assert plan(pretraining_tokens=16_384 * 1000, lookup=UNKNOWN).steps == 50


def test_a_fraction_of_an_unknown_number() -> None:
    with pytest.raises(InputError, match=r"not known, so that 0\.05 of them is no number: model is not in") as caught:
        plan(lookup=UNKNOWN)
    assert caught.value.hint == "pass --pretraining-tokens, --tokens or --steps"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 1, "tokens": 1}, "--steps and --tokens both say how long the run is"),
        ({"tokens": 1, "fraction": 0.1}, "--tokens and --fraction both say how long the run is"),
        ({"steps": 0}, "--steps is 0, expected a positive number"),
        ({"tokens": -1}, "--tokens is -1, expected a positive number"),
        ({"fraction": 0.0}, r"--fraction is 0.0, expected a positive number"),
        ({"fraction": float("nan")}, "--fraction is nan, expected a positive number"),
        ({"steps": 1, "pretraining_tokens": 0}, "--pretraining-tokens is 0, expected a positive number"),
    ],
)
def test_impossible_lengths(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        plan(**settings)


@given(st.integers(1, 10**13), st.integers(1, 10**4), st.integers(1, 10**7))
def test_steps_are_the_fewest_that_hold_the_fraction(known: int, ten_thousandths: int, tokens_per_step: int) -> None:
    wanted = Fraction(ten_thousandths, 10_000) * known
    budget = plan(fraction=ten_thousandths / 10_000, pretraining_tokens=known, tokens_per_step=tokens_per_step)
    assert budget.tokens >= wanted > budget.tokens - tokens_per_step


@given(st.integers(1, 64), st.sampled_from([2, 128, 1000, 2048]), st.integers(1, 64), st.integers(1, 16))
def test_every_number_of_processes_takes_the_same_batch(steps: int, length: int, world: int, micro: int) -> None:
    sequences = steps * world * micro
    alone = derive_batch(global_batch_tokens=sequences * length, sequence_length=length, num_processes=1, micro_batch=1)
    for micro_batch in (micro, None):
        batch = derive_batch(
            global_batch_tokens=sequences * length,
            sequence_length=length,
            num_processes=world,
            micro_batch=micro_batch,
        )
        shared_out = batch.gradient_accumulation_steps * batch.micro_batch * world
        assert shared_out * length == batch.tokens_per_step == alone.tokens_per_step == sequences * length


@given(st.integers(1, 10**6), st.integers(2, 4096), st.integers(1, 64), st.none() | st.integers(1, 64))
def test_the_hint_of_a_batch_that_does_not_divide_works(
    tokens: int, length: int, world: int, micro: int | None
) -> None:
    def derive(tokens: int, micro: int | None) -> Batch:
        return derive_batch(global_batch_tokens=tokens, sequence_length=length, num_processes=world, micro_batch=micro)

    try:
        derive(tokens, micro)
    except UnsupportedError as error:
        nearest = re.match(r"pass --global-batch-tokens (\d+) \((\d+) sequences\)", error.hint or "")
        assert nearest is not None
        found = derive(int(nearest[1]), micro)
        assert found.sequences_per_step == int(nearest[2])
        smaller = re.search(r"or a micro-batch of (\d+)$", error.hint or "")
        if smaller is not None:
            assert micro is not None
            assert derive(tokens, int(smaller[1])).micro_batch < micro
            for larger in range(int(smaller[1]) + 1, micro + 1):
                with pytest.raises(UnsupportedError):
                    derive(tokens, larger)


@pytest.mark.parametrize(
    ("tokens", "length", "world", "micro"),
    [(16_384, 256, 1, 8), (16_384, 256, 16, 4), (16_384, 256, 64, 1), (1024, 2048, 1, 1), (12 * 128, 128, 2, 6)],
)
def test_the_largest_micro_batch_up_to_eight(tokens: int, length: int, world: int, micro: int) -> None:
    assert derive_batch(global_batch_tokens=tokens, sequence_length=length, num_processes=world).micro_batch == micro


def test_a_batch_that_does_not_divide() -> None:
    with pytest.raises(UnsupportedError, match="64 sequences of 256 tokens per step cannot be split evenly") as caught:
        derive_batch(global_batch_tokens=16_384, sequence_length=256, num_processes=3)
    assert caught.value.hint == "pass --global-batch-tokens 16128 (63 sequences)"
    with pytest.raises(UnsupportedError, match="over 4 processes that take 6 at a time") as caught:
        derive_batch(global_batch_tokens=16_384, sequence_length=256, num_processes=4, micro_batch=6)
    assert caught.value.hint == "pass --global-batch-tokens 18432 (72 sequences), or a micro-batch of 4"


def test_batches_of_nothing() -> None:
    with pytest.raises(UnsupportedError, match="--global-batch-tokens is 0, expected at least 1"):
        derive_batch(global_batch_tokens=0, sequence_length=256, num_processes=1)
    with pytest.raises(UnsupportedError, match="num processes is 0, expected at least 1"):
        Batch(sequences_per_step=8, sequence_length=256, num_processes=0, micro_batch=1)


@pytest.mark.parametrize(
    ("num_parameters", "tokens"),
    [(99_999_999, 16_384), (10**8, 131_072), (999_999_999, 131_072), (10**9, 524_288), (7 * 10**9, 524_288)],
)
def test_larger_models_take_larger_batches(num_parameters: int, tokens: int) -> None:
    assert default_global_batch_tokens(num_parameters) == tokens


def test_the_table_is_sound() -> None:
    ids = [name for model in known_models() for name in model.ids]
    assert len(ids) == len(set(ids))
    for model in known_models():
        assert model.source
        assert model.tokens is None or 10**10 < model.tokens < 10**14
        for fingerprint in model.fingerprints:
            assert list(fingerprint)[:5] == list(PYTHIA_160M)
            assert fingerprint["hidden_size"] % fingerprint["num_attention_heads"] == 0


def test_the_demo_says_it_itself(tmp_path: Path) -> None:
    with open_checkpoint(DEMO / "model") as demo:
        assert lookup_pretraining_tokens(demo).tokens == 20_971_520
        converted = shutil.copytree(DEMO / "model", tmp_path / "converted")
        (converted / "pretraining.json").unlink()
        with open_checkpoint(converted) as checkpoint:
            assert lookup_pretraining_tokens(checkpoint).tokens is None
            found = lookup_pretraining_tokens(checkpoint, demo)
    assert found == PretrainingTokens(20_971_520, f"pretraining.json beside {DEMO / 'model'}")


@pytest.mark.parametrize("tokens", [0, -5, 1.5, "2T", True, None])
def test_a_number_that_is_none(in_directory: MakeSource, tokens: object) -> None:
    checkpoint = in_directory("model", LLAMA_7B, pretraining={"pretraining_tokens": tokens})
    with pytest.raises(CheckpointError, match=f"pretraining_tokens is {tokens!r}, expected a positive integer"):
        lookup_pretraining_tokens(checkpoint)


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("EleutherAI/pythia-160m", PYTHIA),
        ("EleutherAI/pythia-6.9b-deduped", PYTHIA),
        ("facebook/opt-125m", 180 * 10**9),
        ("meta-llama/Llama-2-7b-hf", 2 * 10**12),
        ("Qwen/Qwen1.5-7B", 4 * 10**12),
        ("eleutherai/GPT-J-6B", 402 * 10**9),
        ("openlm-research/open_llama_3b_v2", 10**12),
    ],
)
def test_hub_ids(name: str, tokens: int) -> None:
    found = lookup_pretraining_tokens(headers(name, {}))
    assert (found.tokens, found.remarks) == (tokens, ())
    assert found.source.startswith(f"configs/pretraining_tokens.json, by the name {name}: ")


def test_rounded_figures_say_so() -> None:
    assert lookup_pretraining_tokens(headers("meta-llama/Llama-2-7b-hf", {})).source.endswith("model card; rounded")
    assert lookup_pretraining_tokens(headers("EleutherAI/pythia-70m", {})).source.endswith("of 2 097 152 tokens")


@pytest.mark.parametrize("name", ["meta-llama/Llama-2-7b-chat-hf", "Qwen/Qwen1.5-7B-Chat", "google/gemma-7b-it"])
def test_tuned_models_are_remarked(name: str) -> None:
    found = lookup_pretraining_tokens(headers(name, {}))
    assert found.tokens is not None
    assert found.remarks == (f"{name} is a tuned model: these are the tokens of its base model",)


def test_undisclosed_models_say_why() -> None:
    found = lookup_pretraining_tokens(headers("openai-community/gpt2-medium", {}))
    assert found.tokens is None
    assert "OpenAI published the size of its text (40 GB), not how often" in found.source


def test_unknown_models() -> None:
    found = lookup_pretraining_tokens(headers("org/model", {"model_type": "llama"}))
    assert found == PretrainingTokens(None, "org/model is not in configs/pretraining_tokens.json")


def test_a_directory_of_the_name_counts_where_the_shape_agrees(in_directory: MakeSource) -> None:
    assert lookup_pretraining_tokens(in_directory("pythia-160m", PYTHIA_160M)).tokens == PYTHIA
    other = in_directory("a/pythia-160m", PYTHIA_160M | {"hidden_size": 760})
    assert lookup_pretraining_tokens(other).tokens is None


def test_a_snapshot_in_the_hub_cache(in_directory: MakeSource) -> None:
    checkpoint = in_directory("models--facebook--opt-125m/snapshots/27dcfa74", {})
    assert lookup_pretraining_tokens(checkpoint).tokens == 180 * 10**9


def test_a_converted_checkpoint_by_its_source(in_directory: MakeSource) -> None:
    provenance = {"source": "EleutherAI/pythia-160m", "target": "gqa"}
    checkpoint = in_directory("mine", {"model_type": "phi"}, kvconvert=provenance)
    assert lookup_pretraining_tokens(checkpoint).tokens == PYTHIA


def test_a_converted_checkpoint_by_its_teacher(in_directory: MakeSource) -> None:
    student = in_directory("mine", PYTHIA_160M | {"model_type": "phi", "num_key_value_heads": 4})
    assert lookup_pretraining_tokens(student).tokens is None
    assert lookup_pretraining_tokens(student, headers("EleutherAI/pythia-160m", PYTHIA_160M)).tokens == PYTHIA
    assert lookup_pretraining_tokens(student, headers("org/copy", PYTHIA_160M)).tokens == PYTHIA
    larger = PYTHIA_160M | {"hidden_size": 1024}
    assert lookup_pretraining_tokens(student, headers("EleutherAI/pythia-410m", larger)).tokens is None


def test_a_shape(in_directory: MakeSource) -> None:
    found = lookup_pretraining_tokens(headers("org/copy", PYTHIA_160M))
    assert found.tokens == PYTHIA
    assert "by the shape of EleutherAI/pythia-*: " in found.source
    old_names = {"model_type": "gptj", "n_embd": 4096, "n_layer": 28, "n_head": 16, "vocab_size": 50400}
    assert lookup_pretraining_tokens(headers("org/copy", old_names)).tokens == 402 * 10**9


def test_the_shape_of_a_converted_checkpoint(in_directory: MakeSource) -> None:
    """Its class and its number of K/V heads are no longer the original's."""
    config = PYTHIA_160M | {"model_type": "phi", "num_key_value_heads": 4}
    heads = {"source": 12, "result": 4}
    found = in_directory("mine", config, kvconvert={"target": "gqa", "source": "copy", "num_key_value_heads": heads})
    assert lookup_pretraining_tokens(found).tokens == PYTHIA
    # without the note it is a GQA model of its own, which no row of the table is
    assert lookup_pretraining_tokens(in_directory("other", config | {"model_type": "gpt_neox"})).tokens is None


def test_models_of_one_shape(in_directory: MakeSource) -> None:
    """LLaMA and Llama 2 differ in context; LLaMA and OpenLLaMA agree; OLMos do not."""
    first, second = (LLAMA_7B | {"max_position_embeddings": length} for length in (2048, 4096))
    found = lookup_pretraining_tokens(headers("org/copy", first))
    assert found.tokens == 10**12
    assert "huggyllama/llama-7b, huggyllama/llama-13b or openlm-research/open_llama_*" in found.source
    assert lookup_pretraining_tokens(headers("org/copy", second)).tokens == 2 * 10**12
    olmo = LLAMA_7B | {"model_type": "olmo", "vocab_size": 50304}
    found = lookup_pretraining_tokens(headers("org/copy", olmo))
    assert found.tokens is None
    assert re.search("its shape is that of allenai/OLMo-7B, .*, which were pretrained on different numb", found.source)


@pytest.mark.parametrize(
    ("asked", "length", "said"),
    [
        (131072, 2048, None),
        (128_000, 2048, "a step takes 126976 tokens, 62 sequences, which is nearest to 128000"),
        (1050, 512, "a step takes 1024 tokens, 2 sequences, which is nearest to 1050"),
    ],
)
def test_a_batch_is_met_or_nearly(asked: int, length: int, said: str | None) -> None:
    batch = derive_batch(global_batch_tokens=asked, sequence_length=length, num_processes=1)
    assert check_asked_batch(asked, batch) == said


@pytest.mark.parametrize(("asked", "sizes"), [(100, "512"), (800, "512 or 1024"), (1100, "1024 or 1536")])
def test_a_batch_that_cannot_be_met_is_refused(asked: int, sizes: str) -> None:
    batch = derive_batch(global_batch_tokens=asked, sequence_length=512, num_processes=1)
    expected = f"--global-batch-tokens {asked} cannot be met: a step takes whole sequences of 512 tokens"
    with pytest.raises(UnsupportedError, match=f"^{expected}$") as raised:
        check_asked_batch(asked, batch)
    assert raised.value.hint == f"pass --global-batch-tokens {sizes}, or a smaller --sequence-length"
