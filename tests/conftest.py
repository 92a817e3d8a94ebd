"""Shared fixtures: tiny real checkpoints, a tokenizer, and the installed command."""

from __future__ import annotations

import contextvars
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import huggingface_hub.constants
import pytest
import torch
from hypothesis import settings as hypothesis_settings
from kvconvert.convert import open_checkpoint
from kvconvert.convert.checkpoint.loading import load_model
from kvconvert.convert.runtime.transformers_interface import CACHE_NAME, cache_of
from kvconvert.convert.text.sources import TextSource
from kvconvert.uptrain import run
from kvconvert.uptrain.data.blocks import PackedBlocks
from kvconvert.uptrain.data.corpus import Corpus
from kvconvert.uptrain.data.packing import build
from kvconvert.uptrain.data.sources import WeightedSource
from kvconvert.uptrain.job import UptrainJob
from kvconvert.uptrain.observation import Observation
from kvconvert.uptrain.recipe import LossWeights, Recipe
from kvconvert.uptrain.settings import Execution, RunSettings
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast
from typer.testing import CliRunner

NUM_HEADS = 8
HEAD_DIM = 8
HIDDEN_SIZE = NUM_HEADS * HEAD_DIM
VOCAB_SIZE = 384
# settings with which a row's checkpoints have the tensors that matter, or logits of a scale above 1
LATENT = {
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 6,
    "q_lora_rank": None,
    "first_k_dense_replace": 2,
}  # deepseek_v3 without experts
OVERRIDES: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 1.0},
    "cohere2": {"logit_scale": 1.0},
    "dbrx": {
        "d_model": 64,
        "n_heads": 8,
        "n_layers": 2,
        "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 8, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 2, "moe_top_k": 1, "hidden_size": 64},
    },
    "glm": {"attention_bias": True},
    "gpt_bigcode": {"n_embd": 64, "n_head": 8, "n_layer": 2, "n_inner": 48, "n_positions": 128, "multi_query": False},
    "llama": {"attention_bias": True, "mlp_bias": True},
    "nemotron": {"attention_bias": True},
    "olmo": {"clip_qkv": 1.5},
    "stablelm": {"use_qkv_bias": True},
}
PROSE = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness, "
    "it was the epoch of belief, it was the epoch of incredulity, it was the season of Light, it was the season of "
    "Darkness, it was the spring of hope, it was the winter of despair, we had everything before us, we had nothing "
    "before us, we were all going direct to Heaven, we were all going direct the other way. "
)

# no deadline: the machine is shared, and a slow first import is not a failure; the same examples on every run
hypothesis_settings.register_profile("kvconvert", deadline=None, derandomize=True, max_examples=50)
hypothesis_settings.load_profile("kvconvert")

KVCONVERT = Path(sys.executable).with_name("kvconvert")
_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"}

SETTINGS = RunSettings(steps=6, sequence_length=32, sequences_per_step=4, learning_rate=1e-2)
EXECUTION = Execution(micro_batch=4)
DISTILL: dict[str, Any] = {"recipe": Recipe.distill, "weights": LossWeights()}


@dataclass(frozen=True)
class Outcome:
    """What a command left: its exit code and its two streams."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def printed(self) -> dict[str, Any]:
        """The one JSON object on stdout of a command that succeeded."""
        assert self.returncode == 0, self.stderr
        printed: dict[str, Any] = json.loads(self.stdout)
        return printed


CheckpointFactory = Callable[..., Path]
Train = Callable[..., Path]
Command = Callable[..., Outcome]
RunHere = Callable[..., dict[str, Any]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests first, so that no worker is left with one when the others are done."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def build_model(model_type: str = "llama", *, seed: int = 0, **overrides: object) -> Any:
    """A tiny float32 model of the real class, its weights large enough that logits have a scale above 1."""
    settings: dict[str, object] = {
        "hidden_size": HIDDEN_SIZE,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_HEADS,
        "head_dim": HEAD_DIM,
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "num_local_experts": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    }
    settings |= overrides
    if isinstance(getattr(CONFIG_MAPPING[model_type], "head_dim", None), property):  # Falcon computes it
        del settings["head_dim"]
    config = AutoConfig.for_model(model_type, **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.add_(0.1 * noise)
            elif parameter.dim() == 1:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise * 1.5 / parameter.shape[-1] ** 0.5)
    return model.eval()


TOKENS = torch.randint(3, VOCAB_SIZE, (6, 32), generator=torch.Generator().manual_seed(0))


def load(directory: Path) -> Any:
    return load_model(directory, dtype=torch.float32, device="cpu")


def logits(model: Any) -> torch.Tensor:
    """Of TOKENS, without a cache."""
    with torch.inference_mode():
        result: torch.Tensor = model(input_ids=TOKENS, use_cache=False).logits
    return result


def tie_heads(model: Any, num_groups: int) -> None:
    """Make all K/V heads of a group equal to its first, so that pooling them loses nothing."""
    with torch.no_grad():
        for runs in key_value_heads(model).values():
            for heads in runs:  # (K, …)
                size = len(heads) // num_groups
                for head, tensor in enumerate(heads):
                    tensor.copy_(heads[head // size * size])


def key_value_heads(model: Any) -> dict[str, list[list[torch.Tensor]]]:
    """Of each parameter that belongs to K/V heads, its runs (keys, values) of heads, as views in the order of heads.

    Written from what the classes compute, to check the converter against: it shares nothing with it.
    """
    config = model.config
    num_heads = getattr(getattr(config, "attn_config", None), "kv_n_heads", None)
    num_heads = num_heads or getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    found: dict[str, list[list[torch.Tensor]]] = {}
    for name, parameter in model.named_parameters():
        *_, module, kind = name.split(".")
        if module in ("k_proj", "v_proj"):
            found[name] = [list(parameter.view(num_heads, head_dim, -1))]
        elif module == "c_attn" and config.model_type == "gpt2":  # inputs × outputs
            heads = parameter.view(-1, 3, num_heads, head_dim)
            found[name] = [list(heads[:, part].unbind(1)) for part in (1, 2)]
        elif module in ("query_key_value", "c_attn"):  # per K/V head: its queries, key and value
            count = config.num_kv_heads if getattr(config, "new_decoder_architecture", False) else num_heads
            rows = parameter.view(count, -1, head_dim, *parameter.shape[1:])
            found[name] = [list(rows[:, -2]), list(rows[:, -1])]
        elif module == "qkv_proj" and config.model_type == "codegen":  # 4 blocks of q, v, k, two heads in each
            rows = parameter.view(4, 3, num_heads // 4, head_dim, -1)
            found[name] = [[head for block in rows for head in block[part]] for part in (2, 1)]
        elif module in ("qkv_proj", "Wqkv"):
            rows = parameter[config.num_attention_heads * head_dim :].view(2, num_heads, head_dim, -1)
            found[name] = [list(rows[0]), list(rows[1])]
        elif module == "k_norm" and parameter.numel() == num_heads * head_dim and num_heads > 1:
            found[name] = [list(parameter.view(num_heads, head_dim))]
        elif ".k_layernorm.norms." in name:
            prefix = name.split(".norms.")[0]
            found.setdefault(f"{prefix}.{kind}", [[]])[0].append(parameter)
    return found


def assert_same_function(original: Any, converted: Any, num_key_value_heads: int) -> None:
    """Equal logits and greedy tokens, left padding included, with and without a cache, which has fewer heads."""
    input_ids = torch.randint(3, VOCAB_SIZE, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, found = (model(input_ids=input_ids, use_cache=False).logits for model in (original, converted))
    scale = expected.abs().max().item()
    assert scale > 1
    # float32 sums in another order, and weights that a folded norm rounds once more: 1e-5 of the scale
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * scale)

    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), input_ids], dim=1)
    mask = (torch.arange(padded.shape[1]) >= torch.tensor([[3], [3]])).long()
    generated = [
        model.generate(padded, attention_mask=mask, max_new_tokens=6, do_sample=False, use_cache=use_cache)
        for model, use_cache in ((converted, True), (converted, False), (original, True))
    ]
    assert torch.equal(generated[0], generated[1])
    assert torch.equal(generated[0], generated[2])

    cache = cache_of(converted(input_ids, use_cache=True, **{CACHE_NAME: DynamicCache(config=converted.config)}))
    assert cache.layers
    for layer in cache.layers:
        assert layer.keys.shape == layer.values.shape
        assert layer.keys.shape[1] == num_key_value_heads


def assert_gradients_everywhere(model: Any) -> None:
    """The loss moves every parameter, but for experts: one that no token was sent to learns nothing."""
    tokens = torch.arange(3, 67)[None]
    logits = model(input_ids=tokens, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:]).backward()
    for name, parameter in model.named_parameters():
        if "expert" not in name:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


@pytest.fixture
def run_without_kvconvert(tmp_path: Path) -> Callable[[str], str]:
    """Run a program in a clean process that cannot import kvconvert; returns what it prints."""

    def run(program: str) -> str:
        blocker = "import sys\nsys.modules['kvconvert'] = None\n"
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
        outcome = subprocess.run(
            [sys.executable, "-c", blocker + textwrap.dedent(program)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment,
            check=False,
        )
        assert outcome.returncode == 0, outcome.stderr
        return outcome.stdout

    return run


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> CheckpointFactory:
    """Save a tiny checkpoint and return its directory."""

    def make(
        model_type: str = "llama",
        *,
        name: str = "model",
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        max_shard_size: str = "5GB",
        tie_groups: int | None = None,
        with_tokenizer: bool = False,
        **overrides: object,
    ) -> Path:
        directory = tmp_path / name
        model = build_model(model_type, seed=seed, **overrides)
        if tie_groups is not None:
            tie_heads(model, tie_groups)
        model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
        if with_tokenizer:
            build_tokenizer().save_pretrained(directory)
        return directory

    return make


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with BOS and EOS, trained on PROSE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([PROSE], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=128
    )


def build_number_tokenizer() -> PreTrainedTokenizerFast:
    """Words are numbers below 2000, and these are their ids; neither BOS nor EOS."""
    vocabulary = {str(number): number for number in range(2000)} | {"<unk>": 2000}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def write_numbers(path: Path, documents: Iterable[Sequence[int]]) -> Path:
    """Documents as JSONL, which `build_number_tokenizer` turns into these very token ids."""
    path.write_text("".join(json.dumps({"text": " ".join(map(str, document))}) + "\n" for document in documents))
    return path


def pack_numbers(
    directory: Path, documents: Iterable[Sequence[int]], *, sequence_length: int, num_blocks: int
) -> PackedBlocks:
    """Samples of documents of token ids, packed in `directory`."""
    corpus = Corpus(
        sources=(WeightedSource(TextSource(str(write_numbers(directory / "numbers.jsonl", documents)))),),
        sequence_length=sequence_length,
        num_blocks=num_blocks,
        tokenizer_hash="numbers",
        vocab_size=2001,
    )
    build(corpus, directory / "packed", build_number_tokenizer())
    return PackedBlocks(directory / "packed", num_samples=num_blocks)


@pytest.fixture
def prose_file(tmp_path: Path) -> Path:
    """Forty documents of prose as JSONL."""
    path = tmp_path / "prose.jsonl"
    lines = [json.dumps({"text": f"Chapter {number}. {PROSE}"}) for number in range(40)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def working_directory(tmp_path: Path) -> Path:
    """An empty directory to run commands in."""
    directory = tmp_path / "cwd"
    directory.mkdir()
    return directory


@pytest.fixture
def kvconvert(working_directory: Path) -> Command:
    """Run the installed command in a process of its own, offline, from an empty directory.

    A process costs seconds, most of them for importing torch and transformers. `invoke` shows the same but for what
    belongs to a process: signals, limits, environment variables that are read at import, the bare start.
    """

    def run(*arguments: object, env: dict[str, str] | None = None) -> Outcome:
        done = subprocess.run(
            [str(KVCONVERT), *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=working_directory,
            env={**os.environ, **_ENVIRONMENT, **(env or {})},
            timeout=900,
            check=False,
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def invoke(working_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run a command in this process, offline, from an empty directory; what it changes in the environment is undone."""
    from kvconvert.cli.main import app

    monkeypatch.chdir(working_directory)
    # the library has read the variable when it was imported
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def run(*arguments: object) -> Outcome:
        with mock.patch.dict(os.environ, _ENVIRONMENT):
            # a context of its own, since --trust-remote-code holds for the rest of one
            done = contextvars.copy_context().run(
                CliRunner().invoke, app, [*map(str, arguments)], prog_name="kvconvert", catch_exceptions=False
            )
        return Outcome(done.exit_code, done.stdout, done.stderr)

    return run


@pytest.fixture
def run_here(invoke: Command) -> RunHere:
    """Run a command that must succeed in this process; returns the JSON object that it prints."""
    return lambda *arguments: invoke(*arguments, "--json", "--quiet").printed


@pytest.fixture
def make_job(make_checkpoint: CheckpointFactory, prose_file: Path, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Jobs that uptrain one tiny checkpoint, each named after its output."""
    source = make_checkpoint(num_key_value_heads=2, with_tokenizer=True)
    with ExitStack() as stack:

        def make(
            name: str = "out",
            *,
            settings: RunSettings = SETTINGS,
            teacher: Path | str | None = None,
            data: Path = prose_file,
            model: Path = source,
            execution: Execution = EXECUTION,
            **fields: Any,
        ) -> UptrainJob:
            if teacher is not None and settings.recipe is Recipe.pretraining:
                settings = replace(settings, **DISTILL)
            return UptrainJob(
                checkpoint=stack.enter_context(open_checkpoint(model)),
                settings=settings,
                sources=(WeightedSource(TextSource(str(data))),),
                output=tmp_path / name,
                teacher=None if teacher is None else str(teacher),
                execution=execution,
                **fields,
            )

        yield make


@pytest.fixture
def train(make_job: Callable[..., Any]) -> Train:
    """Uptrain one tiny checkpoint; returns where the result is."""

    def train_into(name: str, *, watch: Observation | None = None, force: bool = False, **job: Any) -> Path:
        return run.uptrain(make_job(name, **job), watch or Observation(), force=force).output

    return train_into


class KilledError(Exception):
    """Stands for a machine that goes away without a word."""


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def same_weights(one: Path, other: Path) -> bool:
    """Whether two results hold tensors of the same names, and these are equal."""
    ones, others = weights(one), weights(other)
    return ones.keys() == others.keys() and all(torch.equal(tensor, others[name]) for name, tensor in ones.items())


def settings_with(**changes: Any) -> RunSettings:
    return replace(SETTINGS, **changes)
