"""A result proves that its class computes the same with a cache as without, and code beside weights is renewed."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LATENT, CheckpointFactory, Command, build_model, build_tokenizer
from kvconvert.convert import Checkpoint, Gqa, as_target, cache_check, execute, open_checkpoint
from kvconvert.convert.cache_check import CacheCheck, check_cache, check_runtime, refresh
from kvconvert.convert.checkpoint.remote_code import allow_remote_code
from kvconvert.convert.checkpoint.runtime_code import EARLIER_CODE, BesideState, code_beside, copy_runtime_code
from kvconvert.convert.errors import CheckpointError, OutputError, UnsupportedError
from kvconvert.convert.runtime import RUNTIME_CLASSES, modeling_cross_layer_decoder, modeling_grouped_seq2seq
from kvconvert.convert.runtime.transformers_interface import CACHE_NAME
from test_seq2seq import BART, T5, WHISPER
from test_seq2seq import convert as convert_seq2seq
from test_seq2seq import make as make_seq2seq
from torch.nn.modules.module import register_module_forward_pre_hook

EARLIER = Path(__file__).parent / "earlier_code"
ALIBI = {"position_embedding_type": "alibi", "alibi_slopes": [2.0**-head for head in range(8)]}
SLIDING = ["full_attention", "full_attention", "sliding_attention", "full_attention", "sliding_attention"]
CLASSES: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {  # and the first layers of each kind
    "cla": ("cross_layer_decoder", {"num_hidden_layers": 3, "kv_source_layers": [0, 0, 0]}, (0, 1)),
    "cla, late": ("cross_layer_decoder", {"num_hidden_layers": 5, "kv_source_layers": [0, 1, 2, 2, 4]}, (0, 2, 3)),
    "cla, windows": (
        "cross_layer_decoder",
        {
            "num_hidden_layers": 5,
            "kv_source_layers": [0, 0, 2, 3, 2],
            "layer_types": SLIDING,
            "sliding_window": 4,
        },
        (0, 1, 2, 4),
    ),
    "learned": ("grouped_decoder", {"num_key_value_heads": 2}, (0,)),
    "alibi": ("grouped_decoder", ALIBI, (0,)),
    "mla": ("deepseek_v3", LATENT, (0,)),
    "phi": ("phi", {}, (0,)),
    "nemotron": ("nemotron", {}, (0,)),
    "gpt_bigcode": ("gpt_bigcode", {"multi_query": True}, (0,)),
    "falcon": ("falcon", {}, (0,)),
    "qwen2": ("qwen2", {"num_key_value_heads": 2}, (0,)),
}
SEQ2SEQ: dict[str, dict[str, Any]] = {"t5": T5, "bart": BART, "whisper": WHISPER}


def save_pairs(directory: Path) -> Path:
    """A cross-layer decoder with its code beside it."""
    build_model("cross_layer_decoder", kv_source_layers=[0, 0]).save_pretrained(directory)
    copy_runtime_code("cross_layer_decoder", directory)
    return directory


def put_earlier_code(directory: Path) -> None:
    """The code that kvconvert wrote before transformers 5.24."""
    (directory / "transformers_interface.py").unlink()
    for file in EARLIER.iterdir():
        shutil.copyfile(file, directory / f"{file.stem}.py")


def digests(directory: Path) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


@pytest.fixture(params=[True, False], ids=["whole", "first layers"])
def whole(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether a tiny model counts as one that runs whole."""
    if not request.param:
        monkeypatch.setattr(cache_check, "MAX_WHOLE_PARAMETERS", 0)
    return bool(request.param)


@pytest.mark.parametrize("kind", CLASSES)
def test_a_sound_class_passes(kind: str, whole: bool, tmp_path: Path) -> None:
    model_type, overrides, first = CLASSES[kind]
    model = build_model(model_type, **overrides)
    model.save_pretrained(tmp_path / "model")
    check = check_cache(tmp_path / "model")
    assert check.layers == (tuple(range(model.config.num_hidden_layers)) if whole else first)
    assert check.difference < 1e-5 * check.scale
    assert check.scale > 1


@pytest.mark.parametrize("model_type", SEQ2SEQ)
def test_a_sound_encoder_decoder_passes(model_type: str, whole: bool, tmp_path: Path) -> None:
    source = make_seq2seq(tmp_path / "model", model_type, SEQ2SEQ[model_type])
    check = check_cache(convert_seq2seq(source, 2, tmp_path / "out"))
    assert check.layers == ((0, 1) if whole else (0,))
    assert check.difference < 1e-5 * check.scale


def test_the_layers_that_run_have_the_weights_of_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a larger model the layers that were chosen, not its first ones, and all of the decoder around them."""
    monkeypatch.setattr(cache_check, "MAX_WHOLE_PARAMETERS", 0)
    build_model("cross_layer_decoder", num_hidden_layers=4, kv_source_layers=[0, 1, 2, 2]).save_pretrained(tmp_path)
    ran: list[torch.nn.Module] = []
    read: set[str] = set()
    real = Checkpoint.read

    def note(self: Checkpoint, name: str) -> torch.Tensor:
        read.add(name)
        return real(self, name)

    monkeypatch.setattr(Checkpoint, "read", note)
    with register_module_forward_pre_hook(lambda module, inputs: ran.append(module)):
        assert check_cache(tmp_path).layers == (0, 2, 3)
    assert not {"model.embed_tokens.weight", "lm_head.weight"} & read
    loaded = dict(ran[0].named_parameters())
    with open_checkpoint(tmp_path) as checkpoint:
        for name, saved in [(0, 0), (1, 2), (2, 3)]:
            for part in ("self_attn.q_proj.weight", "mlp.up_proj.weight", "input_layernorm.weight"):
                expected = real(checkpoint, f"model.layers.{saved}.{part}")
                assert torch.equal(loaded[f"layers.{name}.{part}"], expected)
        assert torch.equal(loaded["norm.weight"], real(checkpoint, "model.norm.weight"))


def without_cache(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that overlooks its cache."""

    def forward_without(self: Any, *arguments: Any, **named: Any) -> Any:
        return forward(self, *arguments, **{name: value for name, value in named.items() if name != CACHE_NAME})

    return forward_without


def test_a_class_that_overlooks_its_cache_is_refused(
    whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_pairs(tmp_path / "model")
    attention = modeling_cross_layer_decoder.CrossLayerDecoderAttention
    monkeypatch.setattr(attention, "forward", without_cache(attention.forward))
    message = (
        r"model: with a cache, CrossLayerDecoderForCausalLM computes something else than without: outputs differ by "
        r"\d.* at a scale of \d.* \(transformers 5\..*; its code works with 5\.\d+ to 5\.\d+\)"
    )
    with pytest.raises(CheckpointError, match=message):
        check_cache(model)


def test_a_class_that_cannot_run_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **named: Any) -> None:
        raise TypeError("create_causal_mask() got an unexpected keyword argument")

    monkeypatch.setattr(modeling_cross_layer_decoder, "create_causal_mask", fail)
    with pytest.raises(CheckpointError, match=r"cannot run a few tokens \(TypeError: create_causal_mask\(\) got"):
        check_cache(save_pairs(tmp_path / "model"))


def test_nothing_is_published_that_does_not_prove_itself(
    make_checkpoint: CheckpointFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_seq2seq(tmp_path / "model", "t5", T5)
    attention = modeling_grouped_seq2seq.GroupedT5Attention
    monkeypatch.setattr(attention, "forward", without_cache(attention.forward))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=r"out: with a cache, GroupedT5ForConditionalGeneration computes some"):
        convert_seq2seq(source, 2, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_a_class_of_transformers_in_another_than_the_sources_is_checked(
    make_checkpoint: CheckpointFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[str | None] = []

    def note(directory: Path, *, name: str | None = None) -> CacheCheck:
        checked.append(name)
        return check_cache(directory, name=name)

    monkeypatch.setattr(sys.modules[execute.__module__], "check_cache", note)
    for model_type, name in (("gptj", "phi"), ("llama", "llama")):
        overrides = {"rotary_dim": 4} if model_type == "gptj" else {}
        with as_target(open_checkpoint(make_checkpoint(model_type, name=model_type, **overrides)), 2) as source:
            execute(Gqa(2).plan(source), source.checkpoint, tmp_path / f"{name}-gqa2")
    assert checked == [str(tmp_path / "phi-gqa2")]  # a Llama stays what it was


def test_earlier_code_is_recognised() -> None:
    for file in EARLIER.iterdir():
        assert EARLIER_CODE[sha256(file.read_bytes()).hexdigest()] == "5.23 and earlier"
    modeling = {file for entry in RUNTIME_CLASSES.values() for file in entry.files if file.name.startswith("modeling")}
    assert not {sha256(file.read_bytes()).hexdigest() for file in modeling} & set(EARLIER_CODE)


@pytest.mark.filterwarnings("ignore:`past_.*` is deprecated:FutureWarning")  # what the earlier code is told
def test_earlier_code_works_with_its_transformers_and_is_refused_with_later_ones(tmp_path: Path) -> None:
    """The control of it all: what was written before 5.24 generates nonsense from 5.24 on."""
    model = save_pairs(tmp_path / "model")
    put_earlier_code(model)
    if CACHE_NAME != "cache":
        check = check_runtime(model)
        assert check is not None
        assert check.difference < 1e-5 * check.scale
    else:
        with pytest.raises(
            CheckpointError,
            match=r"with a cache, .* computes something else than without: .*its code works with 5\.23 and earlier",
        ) as raised:
            check_runtime(model)
        assert raised.value.hint == f"`refresh` renews the code beside the weights of {model}"
    refresh(model)
    assert check_runtime(model) is not None


def test_refresh_renews_the_code_and_nothing_else(invoke: Command, tmp_path: Path) -> None:
    model = save_pairs(tmp_path / "model")
    wanted = digests(model)
    put_earlier_code(model)
    outcome = invoke("refresh", model)
    names = "transformers_interface.py, modeling_cross_layer_decoder.py, configuration_cross_layer_decoder.py"
    assert outcome.stdout == f"{model}: renewed {names}\n", outcome.stderr
    assert digests(model) == wanted
    assert refresh(model) == ()


def test_a_refresh_that_is_cut_off_leaves_code_that_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_pairs(tmp_path / "model")
    put_earlier_code(model)
    earlier = digests(model)
    replaced: list[str] = []
    real = Path.replace

    def once(self: Path, target: Path) -> Path:
        if replaced:
            raise OSError(28, "No space left on device")
        replaced.append(Path(target).name)
        return real(self, target)

    monkeypatch.setattr(Path, "replace", once)
    with pytest.raises(OutputError, match="the disk is full"):
        refresh(model)
    assert replaced == ["transformers_interface.py"]  # which earlier code does not import
    assert digests(model) == earlier | {"transformers_interface.py": digests(model)["transformers_interface.py"]}
    entry = RUNTIME_CLASSES["cross_layer_decoder"]
    assert code_beside(model, entry).state is BesideState.EARLIER


def test_code_of_another_hand_is_neither_run_nor_replaced_unasked(tmp_path: Path) -> None:
    model = save_pairs(tmp_path / "model")
    changed = model / "modeling_cross_layer_decoder.py"
    changed.write_text(changed.read_text() + f"\nopen({str(tmp_path / 'ran')!r}, 'w').close()\n")
    assert check_runtime(model) is not None  # in the installed class
    with pytest.raises(OutputError, match="the code beside its weights is none that this kvconvert knows"):
        refresh(model)
    assert not (tmp_path / "ran").exists()
    assert refresh(model, force=True) == ("modeling_cross_layer_decoder.py",)


def test_trusted_code_of_another_hand_is_what_is_checked(tmp_path: Path) -> None:
    model = save_pairs(tmp_path / "model")
    changed = model / "modeling_cross_layer_decoder.py"
    changed.write_text(changed.read_text().replace("cache = take_cache(", "cache = None and ("))
    allow_remote_code()
    try:
        with pytest.raises(CheckpointError, match=r"its code works with 5\.\d+ to 5\.\d+"):
            check_runtime(model)
    finally:
        allow_remote_code(False)


def test_refresh_says_where_there_is_nothing_to_renew(make_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    for directory in (make_checkpoint(), make_checkpoint("grouped_decoder", name="alone")):
        with pytest.raises(UnsupportedError, match="no code of kvconvert lies beside its weights"):
            refresh(directory)
    with pytest.raises(CheckpointError, match="nonesuch: no such directory"):
        refresh(tmp_path / "nonesuch")


@pytest.mark.filterwarnings("ignore:`past_.*` is deprecated:FutureWarning")
def test_evaluate_and_uptrain_refuse_code_that_no_longer_works(
    invoke: Command, prose_file: Path, tmp_path: Path
) -> None:
    """With a version that it works with, they go on."""
    model = save_pairs(tmp_path / "model")
    build_tokenizer().save_pretrained(model)
    put_earlier_code(model)
    for command in (
        ("evaluate", model, "--data", prose_file, "--window", 16, "--max-windows", 1),
        ("uptrain", model, "--data", prose_file, "--steps", 1, "--sequence-length", 32, "--global-batch-tokens", 64),
    ):
        outcome = invoke(*command)
        if CACHE_NAME != "cache":
            assert outcome.returncode == 0, outcome.stderr
        else:
            assert outcome.returncode == 2
            assert f"hint: `refresh` renews the code beside the weights of {model}" in outcome.stderr
