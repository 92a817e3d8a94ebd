"""What the classes of ours take from a caller, and what they ask of transformers."""

from __future__ import annotations

import importlib
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import TOKENS, build_model
from kvconvert.convert import runtime
from kvconvert.convert.runtime import RUNTIME_CLASSES, transformers_interface
from kvconvert.convert.runtime.modeling_grouped_seq2seq import GroupedT5ForConditionalGeneration
from kvconvert.convert.runtime.transformers_interface import CACHE_NAME, CACHE_NAMES, RELIED_ON, cache_of, require
from transformers import AutoConfig, DynamicCache, EncoderDecoderCache
from transformers.generation.configuration_utils import ContinuousBatchingConfig

ROOT = Path(__file__).parents[1]
ALIBI = {"position_embedding_type": "alibi", "alibi_slopes": [2.0**-head for head in range(8)]}
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "pairs": ("cross_layer_decoder", {"kv_source_layers": [0, 0]}),
    "learned": ("grouped_decoder", {"num_key_value_heads": 2}),
    "alibi": ("grouped_decoder", ALIBI),
}
each_decoder = pytest.mark.parametrize("kind", DECODERS)


def build(kind: str) -> Any:
    model_type, overrides = DECODERS[kind]
    return build_model(model_type, **overrides)


def build_t5() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "d_model": 32, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 8}
    config: Any = AutoConfig.for_model("grouped_t5", **sizes, num_key_value_heads=2, decoder_start_token_id=0)
    config.initializer_factor = 2.0
    return GroupedT5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("name", CACHE_NAMES)
@each_decoder
def test_a_cache_is_read_under_either_name(kind: str, name: str) -> None:
    model = build(kind)
    with torch.no_grad():
        expected = model(TOKENS, use_cache=False).logits
        cache = DynamicCache(config=model.config)
        found = [model.model(TOKENS[:, part], use_cache=True, **{name: cache}) for part in (slice(9), slice(9, None))]
        without = model.model(TOKENS[:, 9:], use_cache=True)
    logits = model.lm_head(torch.cat([output.last_hidden_state for output in found], dim=1))
    scale = expected.abs().max().item()
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * scale)
    assert cache_of(found[1]) is cache
    # the control: the same tokens with a cache that is not read
    assert (model.lm_head(without.last_hidden_state) - expected[:, 9:]).abs().max() > 0.1 * scale


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_attention_of_an_encoder_decoder_reads_a_cache_under_either_name(name: str) -> None:
    attention = build_t5().decoder.block[0].layer[0].SelfAttention
    states = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    causal = torch.full((5, 5), float("-inf")).triu(1)[None, None]
    with torch.inference_mode():
        expected, *_ = attention(states, mask=causal)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        attention(states[:, :4], mask=causal[..., :4, :4], **{name: cache})
        found, *_ = attention(states[:, 4:], **{name: cache})
        alone, *_ = attention(states[:, 4:])
    torch.testing.assert_close(found, expected[:, 4:], rtol=1e-5, atol=1e-5)
    assert (alone - expected[:, 4:]).abs().max() > 1e-2


@each_decoder
def test_a_cache_under_both_names_is_refused(kind: str) -> None:
    model = build(kind)
    caches = {name: DynamicCache(config=model.config) for name in CACHE_NAMES}
    with pytest.raises(TypeError, match="got a cache under both of its names, past_key_values and cache: pass one"):
        model.model(TOKENS, **caches)


@pytest.mark.parametrize("name", ["kv_cache", "cache_params", "layer_past", "token_type_ids"])
@each_decoder
def test_what_nothing_reads_is_refused(kind: str, name: str) -> None:
    model = build(kind)
    value = torch.ones_like(TOKENS) if name == "token_type_ids" else DynamicCache(config=model.config)
    message = (
        rf"DecoderModel\.forward\(\) got an argument that it does not know: {name} "
        rf"\(transformers {transformers.__version__}; tested with \S+ to \S+\)"
    )
    with pytest.raises(TypeError, match=message):
        model(TOKENS, **{name: value})


def test_an_encoder_decoder_refuses_what_nothing_reads() -> None:
    attention = build_t5().decoder.block[0].layer[0].SelfAttention
    with pytest.raises(TypeError, match=r"GroupedT5Attention\.forward\(\) got an argument that it does not know: kv"):
        attention(torch.zeros(1, 3, 32), kv_cache=DynamicCache())


@each_decoder
def test_arguments_without_a_value_or_an_effect_pass(kind: str) -> None:
    model = build(kind)
    with torch.inference_mode():
        expected = model(TOKENS).logits
        found = model(TOKENS, kv_cache=None, token_type_ids=torch.zeros_like(TOKENS), num_items_in_batch=3).logits
    assert torch.equal(found, expected)


def test_this_version_has_all_that_is_relied_on() -> None:
    for user in RELIED_ON:
        if user != "sharding":  # from 5.23 on, and refused before
            require(user)


@pytest.mark.parametrize(
    ("path", "parameters", "message"),
    [
        ("cache_utils:NoCache", (), r"has no cache_utils\.NoCache"),
        ("no_module:name", (), r"has no no_module\.name"),
        (
            "cache_utils:DynamicCache.update",
            ("self", "value_states"),
            r"has another cache_utils\.DynamicCache\.update\(self, key_states, .*\) than \(self, value_states\)",
        ),
        ("cache_utils:DynamicCache.crop", ("self", None, "nonesuch"), r"has another .* than \(self, nonesuch\)"),
    ],
)
def test_what_is_missing_is_named_with_the_versions(
    path: str, parameters: tuple[str | None, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers_interface, "RELIED_ON", {"a test": {path: parameters}})
    versions = rf"it was tested with transformers {' to '.join(transformers_interface.TESTED_VERSIONS)}"
    with pytest.raises(ImportError, match=rf"transformers {transformers.__version__} {message}.*{versions}"):
        require.__wrapped__("a test")


def test_only_the_interface_names_the_cache() -> None:
    """Elsewhere CACHE_NAME, cache_of and positions stand for it, so that the next renaming changes one file."""
    allowed = {"convert/runtime", "tests/test_transformers_interface.py"}
    folders = ("cli", "convert", "measure", "pipeline", "uptrain", "scripts", "benchmarks", "tests")
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        name = str(path.relative_to(ROOT))
        if not any(name.startswith(start) for start in allowed):
            assert "past_key_values" not in path.read_text(), name


@pytest.mark.parametrize("first", ["transformers_interface", "modeling_grouped_decoder"])
def test_classes_are_registered_whatever_is_imported_first(first: str) -> None:
    program = (
        f"import kvconvert.convert.runtime.{first}\n"
        "from transformers import CONFIG_MAPPING as configs, MODEL_FOR_CAUSAL_LM_MAPPING as models\n"
        "print(*(models[configs[name]].__name__ for name in ('grouped_decoder', 'cross_layer_decoder')))"
    )
    outcome = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert outcome.stdout.split() == ["GroupedDecoderForCausalLM", "CrossLayerDecoderForCausalLM"], outcome.stderr


FAKE = """
registered = []


class Auto:
    @staticmethod
    def register(*arguments, exist_ok):
        registered.append(arguments)


def __getattr__(name):
    if not name.startswith("Auto"):
        raise AttributeError(name)
    return Auto
"""


@pytest.fixture
def fake_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module that passes for transformers, which is not imported yet, and hooks that are forgotten afterwards."""
    for entry in RUNTIME_CLASSES.values():
        entry.model_classes()  # with the real one
    monkeypatch.setattr(runtime.RuntimeClass, "files", ())  # as if none of them were imported
    monkeypatch.setattr(sys, "meta_path", [hook for hook in sys.meta_path if not isinstance(hook, runtime._Watch)])
    monkeypatch.delitem(sys.modules, "transformers")
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "transformers.py"
    path.write_text(FAKE)
    return path


def registered(library: Any) -> set[str]:
    """The model types that a library was told."""
    return {arguments[0] for arguments in library.registered if isinstance(arguments[0], str)}


def test_classes_are_registered_with_what_is_imported_later(fake_library: Path) -> None:
    """Once it is there, whole, as its own loader has made it."""
    assert not registered(importlib.import_module("transformers"))  # the control: without a hook nothing is
    del sys.modules["transformers"]
    runtime.register()
    library = importlib.import_module("transformers")
    assert registered(library) == set(RUNTIME_CLASSES)
    assert len(library.registered) == sum(1 + len(entry.auto_models) for entry in RUNTIME_CLASSES.values())
    assert library.__spec__ is not None
    assert library.__spec__.loader is library.__loader__
    assert isinstance(library.__loader__, SourceFileLoader)
    assert library.__file__ == str(fake_library)


def test_classes_are_registered_with_what_was_imported_before(fake_library: Path) -> None:
    library = importlib.import_module("transformers")
    assert not registered(library)
    runtime.register()
    assert registered(library) == set(RUNTIME_CLASSES)


def test_an_import_that_fails_registers_nothing_and_can_be_repeated(fake_library: Path) -> None:
    runtime.register()
    fake_library.write_text("raise ImportError('half')\n")
    with pytest.raises(ImportError, match="half"):
        importlib.import_module("transformers")
    assert "transformers" not in sys.modules
    fake_library.write_text(FAKE + "\n# of another length than the file before\n")
    importlib.invalidate_caches()
    assert registered(importlib.import_module("transformers")) == set(RUNTIME_CLASSES)


def test_what_is_not_watched_is_found_as_ever() -> None:
    assert runtime._Watch({"transformers"}).find_spec("json", None, None) is None
    assert runtime._Watch({"no_such_library"}).find_spec("no_such_library", None, None) is None


def test_importing_transformers_does_not_fail_for_a_class_that_it_cannot_hold() -> None:
    """It is said, and said again where such a checkpoint is opened."""
    program = (
        "from kvconvert.convert import runtime\n"
        "def broken(self): raise ImportError('transformers 9.9 has no such thing')\n"
        "runtime.RuntimeClass.model_classes = broken\n"
        "import transformers\n"
        "print(transformers.__name__)"
    )
    outcome = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert outcome.stdout == "transformers\n", outcome.stderr
    assert "grouped_decoder checkpoints cannot be opened here: transformers 9.9 has no such thing" in outcome.stderr


@pytest.mark.parametrize("kind", ["pairs", "learned"])
def test_continuous_batching_generates_the_same(kind: str) -> None:
    """Its paged cache is handed over as `cache` in every version, and read in another place until 5.23."""
    model = build(kind)
    prompts = [[1, 5, 6, 7, 8], [1, 9, 3]]
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": 95, "pad_token_id": 0}
    found = model.generate_batch(
        prompts,
        generation_config=transformers.GenerationConfig(**options),
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=64),
        warmup=False,
    )
    batched = [found[request].generated_tokens for request in sorted(found)]
    expected = [model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist() for ids in prompts]
    assert batched == expected


def test_continuous_batching_is_refused_where_it_would_leave_positions_out() -> None:
    with pytest.raises(ValueError, match="continuous batching takes no position bias, which ALiBi needs"):
        build("alibi")(TOKENS, read_index=[])


def test_the_name_is_that_under_which_generate_hands_it_over() -> None:
    model = build("pairs")
    seen: set[str] = set()
    model.register_forward_pre_hook(lambda module, args, named: seen.update(named), with_kwargs=True)
    model.generate(TOKENS[:1, :4], max_new_tokens=2, do_sample=False)
    assert seen & set(CACHE_NAMES) == {CACHE_NAME}
