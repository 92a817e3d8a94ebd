"""`kvconvert benchmark` and its library call: the arithmetic, what is counted of live caches, and what is refused."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import (
    HEAD_DIM,
    LATENT,
    NUM_HEADS,
    VOCAB_SIZE,
    CheckpointFactory,
    Command,
    build_model,
    load,
)
from kvconvert.convert import Gqa, convert
from kvconvert.convert.errors import InputError, UnsupportedError
from kvconvert.measure import decoding, vllm_bench
from kvconvert.measure.benchmarking import benchmark, benchmark_models
from kvconvert.measure.decoding import Decoder, Turn
from kvconvert.measure.speed import (
    BenchmarkSettings,
    Durations,
    EngineCache,
    Gain,
    Rounds,
    largest_batch,
    mean_cache_bytes,
)

QUICK = BenchmarkSettings(batches=(2,), contexts=(9,), tokens=3, warm_up=1, repeats=2)
TOKEN_BYTES = 2 * 2 * NUM_HEADS * HEAD_DIM * 4  # layers, keys and values, heads, head_dim, float32


def test_the_median_and_the_90th_percentile_are_those_of_the_seconds() -> None:
    assert Durations.of([3.0, 1.0, 2.0]) == Durations(2.0, 2.8, (3.0, 1.0, 2.0))
    assert Durations.of([0.5]) == Durations(0.5, 0.5, (0.5,))


def test_a_gain_is_the_median_over_rounds_with_their_range_and_its_part_of_the_bound() -> None:
    """Of rounds whose medians are 4, 6 and 50 against 2, 2 and 10: one slow spell that hits both changes nothing."""
    original = Rounds(((4.0, 4.0, 9.0), (6.0, 6.0, 6.0), (50.0,)))
    result = Rounds(((2.0, 2.0, 2.0), (2.0, 2.0, 1.0), (10.0,)))
    assert Gain.between(original, result, bound=4.0) == Gain(3.0, 2.0, 5.0, 4.0, 0.75)
    assert Gain.between(original, result) == Gain(3.0, 2.0, 5.0, None, None)


def test_rounds_that_disagree_are_called_noisy() -> None:
    assert Gain(2.0, 1.0, 1.51, None, None).is_noisy
    assert not Gain(2.0, 1.0, 1.5, None, None).is_noisy


def test_what_fits_is_what_the_weights_leave_over() -> None:
    assert largest_batch(1000, weight_bytes=100, sequence_bytes=300) == 3
    assert largest_batch(999, weight_bytes=100, sequence_bytes=300) == 2
    assert largest_batch(99, weight_bytes=100, sequence_bytes=300) == 0


def test_the_cache_that_a_step_reads_is_the_mean_over_the_timed_steps() -> None:
    """A context of 10 tokens of 8 bytes: after one step that warms up, three read 12, 13 and 14 tokens."""
    assert mean_cache_bytes(80, 80 + 4 * 8, warm_up=1, tokens=3) == 8 * 13
    assert mean_cache_bytes(80, 80, warm_up=1, tokens=3) == 80  # a window, or a static cache


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batches": ()}, "batches is empty"),
        ({"batches": (1, 0)}, "batches has 0, expected 1 or more"),
        ({"contexts": (-1,)}, "contexts has -1, expected 1 or more"),
        ({"tokens": 0}, "tokens is 0, expected 1 or more"),
        ({"warm_up": -1}, "warm_up is -1, expected 0 or more"),
        ({"repeats": 0}, "repeats is 0, expected 1 or more"),
        ({"memory_bytes": 0}, "memory_bytes is 0, expected 1 or more"),
        ({"engine": "tgi"}, "engine is 'tgi', expected one of transformers, vllm"),
        ({"dtype": "int8"}, "dtype is 'int8', expected one of auto, float32"),
        ({"engine": "vllm", "compile": True}, "vLLM takes no compile: it compiles by itself"),
        ({"engine": "vllm", "prefill": False}, "vLLM takes no prefill: it fills its cache from prompts only"),
        ({"engine": "vllm", "memory_bytes": 1}, "vLLM takes no memory_bytes: it says how many sequences fit"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BenchmarkSettings(**settings)


def test_each_pair_of_batch_and_context_is_timed_once() -> None:
    settings = BenchmarkSettings(batches=(4, 1, 4), contexts=(8, 16))
    assert settings.shapes == [(4, 8), (4, 16), (1, 8), (1, 16)]


def turn_of(model: Any, *, prefill: bool = True, compiled: bool = False, with_memory: bool = False) -> Turn:
    decoder = Decoder(model, name="tiny", compiled=compiled)
    prompt = decoding.random_prompt(decoder, 2, 9)
    return decoder.turn(prompt, tokens=3, warm_up=1, prefill=prefill, with_memory=with_memory)


@pytest.mark.parametrize("prefill", [True, False])
@pytest.mark.parametrize(
    ("model_type", "overrides", "numbers_per_token", "held"),
    [
        ("llama", {}, 2 * 2 * NUM_HEADS * HEAD_DIM, (9, 13)),
        ("llama", {"num_key_value_heads": 2}, 2 * 2 * 2 * HEAD_DIM, (9, 13)),
        ("mistral", {"sliding_window": 6}, 2 * 2 * NUM_HEADS * HEAD_DIM, (5, 5)),  # the sixth is the token itself
        ("deepseek_v3", LATENT, 2 * (16 + 4), (9, 13)),
        ("cross_layer_decoder", {"kv_source_layers": [0, 0]}, 2 * NUM_HEADS * HEAD_DIM, (9, 13)),
    ],
)
def test_the_cache_is_counted_from_its_tensors(
    model_type: str, overrides: dict[str, Any], numbers_per_token: int, held: tuple[int, int], prefill: bool
) -> None:
    """Of 2 sequences in float32, after 9 tokens of the prompt and after 4 more; filled, it is as large as read."""
    turn = turn_of(build_model(model_type, **overrides), prefill=prefill)
    assert (turn.cache_bytes, turn.last_cache_bytes) == tuple(2 * 4 * numbers_per_token * tokens for tokens in held)
    assert len(turn.steps) == 3
    assert min(turn.prompt, *turn.steps) > 0


def test_a_turn_decodes_the_tokens_that_generate_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is fed to the model after the prompt is what transformers' greedy search writes after it."""
    model = build_model()
    decoder = Decoder(model, name="tiny", compiled=False)
    prompt = decoding.random_prompt(decoder, 2, 9)
    expected = model.generate(prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)[:, 9:]
    fed: list[torch.Tensor] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, inputs: fed.append(inputs[0]))
    decoder.turn(prompt, tokens=3, warm_up=1, prefill=True, with_memory=False)
    assert torch.equal(fed[0], prompt)
    assert torch.equal(torch.cat(fed[1:], dim=1), expected[:, :4])


@pytest.mark.parametrize(
    ("model_type", "overrides", "note"),
    [
        ("mixtral", {}, "tiny: all experts count as read in a step"),
        ("deepseek_v3", LATENT, "tiny: transformers expands the latent of all tokens in every step"),
        ("llama", {}, None),
    ],
)
def test_what_makes_a_timing_or_its_bound_rough_is_said(
    model_type: str, overrides: dict[str, Any], note: str | None
) -> None:
    notes = Decoder(build_model(model_type, **overrides), name="tiny", compiled=False).notes
    assert notes == () if note is None else any(each.startswith(note) for each in notes)


def test_the_weights_that_a_step_reads_leave_out_the_table_of_the_embedding() -> None:
    table = VOCAB_SIZE * NUM_HEADS * HEAD_DIM * 4
    untied, tied = (Decoder(build_model(tie_word_embeddings=tie), name="", compiled=False) for tie in (False, True))
    assert untied.weight_bytes - untied.read_weight_bytes == table
    assert tied.weight_bytes - tied.read_weight_bytes == 0  # the head reads it


def test_peak_memory_has_the_largest_thing_of_a_turn() -> None:
    """A vocabulary of 2 million makes logits of 16 MB for two sequences, beside which all else is small."""
    model = build_model(hidden_size=8, num_attention_heads=1, num_key_value_heads=1, vocab_size=2_000_000)
    small, large = (turn_of(each, with_memory=True) for each in (build_model(), model))
    assert small.peak_bytes is not None
    assert large.peak_bytes is not None
    assert 0 <= small.peak_bytes < 8e6
    assert 16e6 <= large.peak_bytes < 16e6 + 48e6


@pytest.fixture
def converted(make_checkpoint: CheckpointFactory, tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint with 8 K/V heads and what it becomes with 2."""
    original = make_checkpoint()
    convert(original, Gqa(num_key_value_heads=2), tmp_path / "gqa2")
    return tmp_path / "gqa2", original


def test_a_result_is_timed_beside_its_original(converted: tuple[Path, Path]) -> None:
    result, original = converted
    settings = replace(QUICK, batches=(1, 2), memory_bytes=10_000_000)
    timed = benchmark(result, against=original, settings=settings)
    assert [(point.batch, point.context) for point in timed.points] == [(1, 9), (2, 9)]
    assert timed.dtype == "float32"
    for point in timed.points:
        after, before = point.result, point.original
        assert after is not None
        assert before is not None
        assert before.cache_bytes == point.batch * 9 * TOKEN_BYTES == 4 * after.cache_bytes  # type: ignore[operator]
        assert before.weight_bytes == bytes_held(original)
        read = before.weight_bytes - VOCAB_SIZE * NUM_HEADS * HEAD_DIM * 4
        assert before.step_bytes == read + point.batch * 12 * TOKEN_BYTES  # after a step: 11, 12 and 13 tokens
        assert before.largest_batch == (10_000_000 - before.weight_bytes) // (9 * TOKEN_BYTES)
        assert len(before.decode.seconds) == 2 * 3
        assert before.prefill is not None
        assert len(before.prefill.seconds) == 2
        assert before.decode_tokens_per_second == point.batch / before.decode.median
        assert before.prefill_tokens_per_second == point.batch * 9 / before.prefill.median
        gain = point.decode_gain
        assert gain is not None
        assert gain.least <= gain.ratio <= gain.greatest
        assert gain.bound == before.step_bytes / after.step_bytes  # type: ignore[operator]
        assert point.prefill_gain is not None
        assert point.prefill_gain.bound is None


def bytes_held(checkpoint: Path) -> int:
    model = load(checkpoint)
    return sum(tensor.numel() * 4 for tensor in (*model.parameters(), *model.buffers()))


def test_the_models_take_turns_and_the_first_of_each_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock of which each turn takes as long as its number says: 1 and 2 warm up, 3 and 4, 5 and 6 are timed."""
    order: list[tuple[str, bool]] = []

    def turn(self: Decoder, prompt: Any, *, with_memory: bool, **named: Any) -> Turn:
        order.append((self.name, with_memory))
        return Turn(float(len(order)), (float(len(order)),), 100, 100, 7 if with_memory else None)

    monkeypatch.setattr(Decoder, "turn", turn)
    timed = benchmark_models(build_model(), build_model(), QUICK, names=("result", "original"))
    assert order == [("original", True), ("result", True)] + [("original", False), ("result", False)] * 2
    (point,) = timed.points
    assert point.original is not None
    assert point.result is not None
    assert point.original.decode.seconds == (3.0, 5.0)
    assert point.result.decode.seconds == (4.0, 6.0)
    assert point.result.peak_bytes == 7 + point.result.weight_bytes  # type: ignore[operator]
    assert point.decode_gain is not None
    assert (point.decode_gain.least, point.decode_gain.greatest) == (3 / 4, 5 / 6)


def test_an_original_whose_memory_runs_out_leaves_the_result_its_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = Decoder.turn

    def turn(self: Decoder, prompt: Any, **named: Any) -> Turn:
        if self.name == "original":
            raise torch.OutOfMemoryError("made up")
        return taken(self, prompt, **named)

    monkeypatch.setattr(Decoder, "turn", turn)
    (point,) = benchmark_models(build_model(), build_model(), QUICK, names=("result", "original")).points
    assert point.original is None
    assert point.result is not None
    assert point.decode_gain is None
    with pytest.raises(torch.OutOfMemoryError, match="made up"):
        benchmark_models(build_model(), None, QUICK, names=("original",))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # of torch's own compiler
def test_a_compiled_step_decodes_what_an_eager_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the compiler's first half alone, which traces the whole step over a static cache and runs it as it is."""
    fed: list[torch.Tensor] = []
    compiling = torch.compile

    def compile_(model: Any, **named: Any) -> Any:
        step = compiling(model, **(named | {"backend": "eager"}))

        def watched(*, input_ids: torch.Tensor, **given: Any) -> Any:
            fed.append(input_ids)
            return step(input_ids=input_ids, **given)

        return watched

    monkeypatch.setattr(torch, "compile", compile_)
    model = build_model("cross_layer_decoder", kv_source_layers=[0, 0])
    decoder = Decoder(model, name="tiny", compiled=True)
    prompt = decoding.random_prompt(decoder, 2, 9)
    turns = [decoder.turn(prompt, tokens=3, warm_up=1, prefill=True, with_memory=False) for _ in range(2)]
    expected = model.generate(prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)[:, 9:13]
    assert torch.equal(torch.cat(fed, dim=1), torch.cat([expected, expected], dim=1))
    # room for all 13 tokens from the beginning, in one layer: the other reads its keys and values
    assert {turn.cache_bytes for turn in turns} == {turn.last_cache_bytes for turn in turns} == {13 * TOKEN_BYTES}


def test_a_class_that_transformers_does_not_compile_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model()
    monkeypatch.setattr(type(model), "_can_compile_fullgraph", False)
    with pytest.raises(UnsupportedError, match="tiny: LlamaForCausalLM cannot be compiled over a static") as error:
        Decoder(model, name="tiny", compiled=True)
    assert error.value.settings == ("compile",)


def test_a_process_without_a_compiler_does_not_time_eager_code_as_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    with pytest.raises(UnsupportedError, match=r"the environment of this process turns torch\.compile off"):
        Decoder(build_model(), name="tiny", compiled=True)


def test_a_state_that_is_no_keys_and_values_cannot_be_filled_in() -> None:
    model = build_model("qwen3_next", layer_types=["linear_attention", "full_attention"])
    with pytest.raises(UnsupportedError, match="tiny: layer 0 keeps something else than keys and values") as error:
        turn_of(model, prefill=False)
    assert error.value.settings == ("prefill",)


def test_a_class_without_a_cache_of_keys_and_values_is_refused() -> None:
    config = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "vocab_size": VOCAB_SIZE}
    with pytest.raises(UnsupportedError, match="tiny: MambaForCausalLM keeps no cache of keys and values"):
        turn_of(build_model("mamba", **config))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--context", "100,120"],
            r"model takes 128 tokens, and a context of 120 with 36 decoded tokens after it has 156",
        ),
        (
            ["--tokens", "200"],
            r"model takes 128 tokens, and a context of 1024 with 204 decoded tokens after it has 1228",
        ),
        (["--batch", "1,x"], r"--batch: 'x' is not a whole number\nhint: write for example --batch 1,8,64"),
        (["--context", "1e3"], r"--context: '1e3' is not a whole number"),
        (["--batch", "0"], r"batches has 0, expected 1 or more"),
        (["--engine", "vllm"], r"vLLM is not installed here\nhint: pip install vllm"),
        (["--engine", "vllm", "--compile"], r"vLLM takes no compile: .*\nhint: .* \(--engine, --compile\)"),
        (["--against", "NARROW"], r"the vocabulary of \S+model has 384 tokens, and that of \S+narrow 300, so that"),
        (["--against", "./none"], r"\./none: no such directory"),
    ],
)
def test_what_cannot_be_timed_is_refused_in_one_line(
    options: list[str], message: str, make_checkpoint: CheckpointFactory, invoke: Command
) -> None:
    narrow = make_checkpoint(name="narrow", vocab_size=300)
    if "--context" not in options and "--tokens" not in options:
        options = ["--context", "9", *options]
    outcome = invoke("benchmark", make_checkpoint(), *(narrow if word == "NARROW" else word for word in options))
    assert outcome.returncode == 2
    assert outcome.stdout == ""
    assert re.match(f"error: .*{message}", outcome.stderr), outcome.stderr
    assert len(outcome.stderr.splitlines()) <= 2


SIZES: list[object] = ["--batch", "1,2", "--context", "9", "--tokens", 3, "--warm-up", 1, "--repeats", 2, "--quiet"]


def test_the_command_shows_both_models_and_the_bound(converted: tuple[Path, Path], invoke: Command) -> None:
    result, original = converted
    shown = invoke("benchmark", result, "--against", original, *SIZES, "--memory", "10MB").stdout
    heads = [re.split(r"\s{2,}", line.strip()) for line in shown.splitlines() if line.startswith("  batch")]
    both = [f"{which} {what}" for what in ("ms", "tokens/s") for which in ("original", "result")]
    assert heads == [
        ["batch", "context", *both, "gain", "in rounds", "bound", "gain/bound"],
        ["batch", "context", *both, "gain", "in rounds"],
        ["batch", "context"]
        + [
            f"{which} {what}"
            for what in ("weights", "cache", "peak", "sequences in 10 MB")
            for which in ("original", "result")
        ],
    ]
    assert "no gain is to be expected here" in shown
    assert "2 rounds, the models in turn, of 3 steps timed after 1 that warm up; prompts of random tokens" in shown
    assert sum(bool(re.match(r"  +[12] +9 ", line)) for line in shown.splitlines()) == 6


def test_alone_and_without_prefill_there_is_less_to_show(converted: tuple[Path, Path], invoke: Command) -> None:
    shown = invoke("benchmark", converted[0], *SIZES, "--no-prefill", "--no-against").stdout
    assert "gain" not in shown
    assert "2 rounds of 3 steps timed after 1 that warm up; a cache filled with copies of one token's state" in shown
    assert "original" not in shown
    assert not any(line.startswith("prefill") for line in shown.splitlines())


def test_json_has_every_sample_and_what_they_depend_on(converted: tuple[Path, Path], invoke: Command) -> None:
    result, original = converted
    printed = invoke("benchmark", result, "--against", original, *SIZES, "--json", "--dtype", "bfloat16").printed
    assert printed["dtype"] == "bfloat16"
    assert printed["settings"]["batches"] == [1, 2]
    assert set(printed["versions"]) == {"kvconvert", "torch", "transformers", "python"}
    assert printed["machine"]["threads"] == torch.get_num_threads()
    for point in printed["points"]:
        decode = point["result"]["decode"]
        assert len(decode["seconds"]) == 6
        assert min(decode["seconds"]) <= decode["median"] <= decode["p90"] <= max(decode["seconds"])
        assert point["original"]["cache_bytes"] == point["batch"] * 9 * TOKEN_BYTES // 2


# As people recorded them, of vLLM 0.7 (pull request 12569 of vllm-project/vllm) and of a version a year younger, and
# last the words of its source at the end of 2026, with numbers of our own
LOGS = {
    "INFO 01-30 03:18:12 gpu_model_runner.py:848] Loading model weights took 67.7229 GB\n"
    "INFO 01-30 03:19:14 kv_cache_utils.py:395] # GPU blocks: 1381\n"
    "INFO 01-30 03:19:14 kv_cache_utils.py:398] Maximum concurrency for 2048 tokens per request: 10.79x\n": (
        EngineCache(None, None, 1381, 2048, 10.79),
        round(67.7229 * 2**30),
    ),
    "(Worker_TP0 pid=24) INFO 12-11 00:06:53 [gpu_worker.py:359] Available KV cache memory: 52.36 GiB\n"
    "(EngineCore_DP0 pid=24) INFO 12-11 00:06:53 [kv_cache_utils.py:1286] GPU KV cache size: 686,320 tokens\n"
    "(EngineCore_DP0 pid=24) INFO 12-11 00:06:54 [kv_cache_utils.py:1291] Maximum concurrency for 100,000 tokens per "
    "request: 6.86x\n": (EngineCache(round(52.36 * 2**30), 686_320, None, 100_000, 6.86), None),
    "INFO Model loading took 14.99 GiB memory and 2.345678 seconds\n"
    "INFO Available KV cache memory: 8.00 GiB\n"
    "INFO GPU KV cache size: 65,536 tokens, Maximum concurrency for 1,033 tokens per request: 63.44x\n": (
        EngineCache(8 * 2**30, 65_536, None, 1033, 63.44),
        round(14.99 * 2**30),
    ),
}


@pytest.mark.parametrize("log", LOGS)
def test_what_vllm_says_of_its_cache_is_read(log: str) -> None:
    assert (vllm_bench.engine_cache(log), vllm_bench.weight_bytes(log)) == LOGS[log]


def test_a_log_that_says_nothing_gives_nothing() -> None:
    assert vllm_bench.engine_cache("INFO nothing of use") == EngineCache()
    assert vllm_bench.weight_bytes("Model loading took 0.00 GiB memory") is None


def test_decoding_in_vllm_is_what_prompts_alone_do_not_take() -> None:
    assert vllm_bench.step_seconds([1.0, 2.0, 1.5], [3.5, 5.5], 4) == (0.5, 1.0)
    with pytest.raises(InputError, match=r"4 tokens took no time beside the prompts: 1\.5 s with them, 1\.5 s without"):
        vllm_bench.step_seconds([1.5], [1.5, 2.0], 4)


@dataclass
class MadeUpVllm:
    """Stands for `vllm bench latency`: a log of its words, and latencies that follow from what it was asked."""

    bytes_per_token: dict[str, int]
    asked: list[dict[str, str]] = field(default_factory=list)
    failure: str = ""

    def __call__(self, words: list[str], **named: Any) -> Any:
        assert words[1:5] == ["-m", "vllm.entrypoints.cli.main", "bench", "latency"]
        if self.failure:
            return SimpleNamespace(returncode=1, stdout=self.failure)
        options = [word for word in words[5:] if word not in FLAGS]
        assert len(words) - 5 - len(options) == len(FLAGS)
        asked = dict(zip(options[::2], options[1::2], strict=True))
        self.asked.append(asked)
        held = self.bytes_per_token[Path(asked["--model"]).name]
        seconds = 1 + int(asked["--output-len"]) * held / 1000
        latencies = {"avg_latency": seconds, "latencies": [seconds] * int(asked["--num-iters"])}
        Path(asked["--output-json"]).write_text(json.dumps(latencies))
        tokens = 2**30 // held
        log = "Model loading took 1.00 GiB memory\nAvailable KV cache memory: 1.00 GiB\n"
        log += f"GPU KV cache size: {tokens:,} tokens, Maximum concurrency for 73 tokens per request: 9.50x\n"
        return SimpleNamespace(returncode=0, stdout=log)


FLAGS = ("--skip-tokenizer-init", "--disable-detokenize", "--no-enable-prefix-caching")


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> MadeUpVllm:
    made_up = MadeUpVllm({"model": 512, "gqa2": 128})
    monkeypatch.setattr(vllm_bench, "find_spec", lambda name: object())
    monkeypatch.setattr("subprocess.run", made_up)
    return made_up


def test_vllm_times_both_models_in_turn(vllm: MadeUpVllm, make_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    original = make_checkpoint(vocab_size=10_000)
    convert(original, Gqa(num_key_value_heads=2), tmp_path / "gqa2")
    settings = BenchmarkSettings(batches=(4,), contexts=(64,), tokens=8, warm_up=2, repeats=2, engine="vllm")
    timed = benchmark(tmp_path / "gqa2", against=original, settings=settings)
    assert [(Path(asked["--model"]).name, asked["--output-len"]) for asked in vllm.asked] == [
        *(("model", "1"), ("model", "9"), ("gqa2", "1"), ("gqa2", "9")),
    ] * 2
    sizes = {"--input-len": "64", "--batch-size": "4", "--max-num-seqs": "4", "--max-model-len": "73"}
    sizes |= {"--num-iters-warmup": "2", "--dtype": "float32"}
    assert all(asked.items() >= sizes.items() for asked in vllm.asked)
    (point,) = timed.points
    assert point.original is not None
    assert point.result is not None
    assert point.original.decode.median == pytest.approx(0.512)
    assert point.original.prefill is not None
    assert point.original.prefill.median == pytest.approx(1.512)
    assert (point.original.cache_bytes, point.result.cache_bytes) == (4 * 64 * 512, 4 * 64 * 128)
    assert point.original.engine_cache == EngineCache(2**30, 2**30 // 512, None, 73, 9.5)
    assert point.decode_gain is not None
    assert point.decode_gain.ratio == pytest.approx(4)
    read = [2**30 + 4 * round((64 + 4.5) * held) for held in (512, 128)]  # after half of the steps
    assert point.decode_gain.bound == read[0] / read[1]


def test_what_vllm_cannot_do_is_said_in_one_line(
    vllm: MadeUpVllm, make_checkpoint: CheckpointFactory, invoke: Command
) -> None:
    options = ["--engine", "vllm", "--context", "9", "--quiet"]
    narrow = invoke("benchmark", make_checkpoint(), *options)
    assert narrow.returncode == 2
    assert re.match(r"error: \S+model has a vocabulary of 384, and vLLM's benchmark draws from 10000", narrow.stderr)
    vllm.failure = "INFO starting\nValueError: no such architecture\nEngine core died\n"
    failed = invoke("benchmark", make_checkpoint(name="wide", vocab_size=10_000), *options)
    assert failed.returncode == 2
    expected = r"error: \S+wide: vLLM's benchmark ended with 1 \(ValueError: no such architecture\)\n"
    assert re.fullmatch(expected, failed.stderr), failed.stderr


def test_vllm_is_shown_with_what_it_says_of_its_cache(
    vllm: MadeUpVllm, make_checkpoint: CheckpointFactory, invoke: Command
) -> None:
    shown = invoke("benchmark", make_checkpoint(vocab_size=10_000), *SIZES, "--engine", "vllm").stdout
    heads = [re.split(r"\s{2,}", line.strip()) for line in shown.splitlines() if line.startswith("  batch")]
    assert heads[-1] == ["batch", "context", "weights", "cache", "blocks", "tokens", "at once"]
    assert re.search(r"\n +2 +9 +1\.07 GB +9\.22 kB +– +2,097,152 +9\.50\n", shown)


def test_the_command_draws_what_it_timed(converted: tuple[Path, Path], invoke: Command, tmp_path: Path) -> None:
    result, original = converted
    options = ["--against", original, "--batch", "1,2", "--context", "9,18", "--tokens", 2, "--repeats", 1]
    outcome = invoke("benchmark", result, *options, "--picture", tmp_path / "decode.svg", "--json")
    assert f"wrote {tmp_path / 'decode.svg'}" in outcome.stderr
    drawn = (tmp_path / "decode.svg").read_text()
    for label in ("original, batch 1", "result, batch 2", "bound from bytes moved"):
        assert label in drawn
    rows = [
        row for point in outcome.printed["points"] for row in (point["original"]["decode"], point["result"]["decode"])
    ]
    assert len(rows) == 8
    for place, message in (("decode.pdf", "end its name in .png or .svg"), ("no/decode.png", "no such directory")):
        refused = invoke("benchmark", result, *options, "--picture", tmp_path / place)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert message in refused.stderr
