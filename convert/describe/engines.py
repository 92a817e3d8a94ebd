"""Which engines serve a converted checkpoint, and how that is known.

"run" means that greedy tokens were compared with those of transformers, by the test suite for transformers itself and
by scripts/check_vllm or a trial before this repository for vLLM 0.32 on a CPU; "read" that the source of the engine was
read: SGLang 0.5.23, llama.cpp as vendored in llama-cpp-python 0.3.36.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from ..algebra.attention_shape import AttentionShape, LatentSizes
from ..architectures.table import known_architecture
from ..runtime import RUNTIME_CLASSES

__all__ = [
    "KERNEL_RANKS",
    "Serving",
    "cached_by_transformers",
    "engines_line",
    "head_kernels",
    "latent_kernels",
    "serve_command",
    "serving",
]


@dataclass(frozen=True)
class Serving:
    """Whether an engine serves a class: `works` is None where that is not known, or depends on what `how` says.

    `evidence` says how it is known: "run", "read" or "not checked". `how` is a condition or an option of the engine.
    """

    engine: str
    works: bool | None
    evidence: str
    how: str = ""


_VLLM_RUN = ("falcon", "gemma", "gpt_bigcode", "llama", "nemotron", "olmo2", "phi", "stablelm", "starcoder2")
_SGLANG_READ = ("cohere", "gemma", "gpt_bigcode", "llama", "olmo2", "qwen2", "stablelm", "starcoder2")
_REMOTE_CODE = "with trust_remote_code, or after `import kvconvert.convert`"
_SEQ2SEQ = ("grouped_bart", "grouped_t5", "grouped_whisper")
_SGLANG_ASSUMES_MHA = "with --model-impl transformers; its own class assumes MHA"

_KNOWN = (
    *((model_type, Serving("vLLM", True, "run")) for model_type in _VLLM_RUN),
    *((model_type, Serving("SGLang", True, "read")) for model_type in _SGLANG_READ),
    *((model_type, Serving("transformers", True, "run", _REMOTE_CODE)) for model_type in RUNTIME_CLASSES),
    (
        "falcon",
        Serving(
            "transformers",
            True,
            "run",
            "caches all heads where new_decoder_architecture is set: memory is saved by vLLM only",
        ),
    ),
    *((name, Serving("vLLM", False, "read", "no encoder-decoders in its Transformers backend")) for name in _SEQ2SEQ),
    (
        "cross_layer_decoder",
        Serving("vLLM", True, "run", "with kvconvert installed beside it, whose plugin makes the saving real there"),
    ),
    ("cross_layer_decoder", Serving("SGLang", None, "read", "its pool has keys and values for every layer")),
    ("cross_layer_decoder", Serving("llama.cpp", False, "read", "it shares layers of Gemma only")),
    ("olmo", Serving("SGLang", True, "read", _SGLANG_ASSUMES_MHA)),
    ("phi", Serving("SGLang", True, "read", _SGLANG_ASSUMES_MHA)),
    ("gpt_bigcode", Serving("llama.cpp", True, "read")),
    ("phi", Serving("llama.cpp", False, "read", "its converter writes as many K/V heads as query heads")),
    ("nemotron", Serving("llama.cpp", None, "read", "squared ReLU only: not a translated GPT-NeoX, which has GELU")),
)
_BY_ENGINE = {(model_type, entry.engine): entry for model_type, entry in _KNOWN}


def cached_by_transformers(model_type: str, config: Mapping[str, Any], shape: AttentionShape) -> AttentionShape:
    """Return the sizes of what transformers' class keeps in its cache, which is more than it reads in two classes.

    config: with the values that the class has. Falcon's new architecture repeats keys and values for all query heads
    before it caches them, and GPT-Neo keeps all tokens for its local layers too.
    """
    if model_type == "falcon" and config["new_decoder_architecture"]:
        return replace(shape, num_key_value_heads=shape.num_attention_heads)
    if model_type == "gpt_neo":
        return replace(shape, windows=(None,) * shape.num_hidden_layers)
    return shape


KERNEL_RANKS = (512, 448, 256)
"""The values of kv_lora_rank that kernels for latent attention support, with a qk_rope_head_dim of 64."""

_KERNEL_ROPE_DIM = 64
_KERNEL_HEADS = ((128, 128), (64, 128), (192, 256))  # qk_nope_head_dim and v_head_dim


def head_kernels(head_dim: int) -> str | None:
    """Return why FlashAttention, which vLLM and SGLang use, has no kernel for heads of this size; None if it has one.

    Source: vLLM 0.32's code. Its other kernels take fewer sizes, FlashInfer's 64, 128, 256 and 512 and those for a CPU
    32, 64, 80, 96, 112, 128, 160, 192, 224, 256 and 512, or any from 32 on but slowly (Triton).
    """
    if head_dim % 8 == 0 and head_dim <= 256:
        return None
    return "FlashAttention takes multiples of 8 up to 256"


def latent_kernels(latent: LatentSizes) -> str | None:
    """Return why vLLM 0.32 and SGLang have no fast kernel for a latent of these sizes, or None if they have one.

    Source: vLLM's code. Its latent cache has 576, 512 or 320 numbers per token (576 in FlashMLA, and on a CPU), and the
    kernels for the first pass over a prompt support certain sizes of heads.
    """
    if latent.qk_rope_head_dim != _KERNEL_ROPE_DIM or latent.kv_lora_rank not in KERNEL_RANKS:
        totals = ", ".join(f"{rank} + {_KERNEL_ROPE_DIM}" for rank in KERNEL_RANKS)
        sizes = f"{latent.kv_lora_rank} + {latent.qk_rope_head_dim}"
        return f"{sizes} = {latent.num_cached} cached numbers, and they take {totals}"
    if (latent.qk_nope_head_dim, latent.v_head_dim) not in _KERNEL_HEADS:
        wanted = [v_head_dim for qk, v_head_dim in _KERNEL_HEADS if qk == latent.qk_nope_head_dim]
        if not wanted:
            sizes = ", ".join(str(qk) for qk, _ in _KERNEL_HEADS)
            return f"a head_dim of {latent.qk_nope_head_dim}, and they take {sizes}"
        return f"a v_head_dim of {latent.v_head_dim}, and they take {wanted[0]}: set v_head_dim = {wanted[0]}"
    return None


def serving(model_type: str, config: Mapping[str, Any] | None = None) -> tuple[Serving, ...]:
    """Return for each engine what is known of serving a converted checkpoint of this `model_type`.

    config: that of the checkpoint. Without it, the answer is about the class in general, with the conditions in `how`.
    """
    unknown = {engine: Serving(engine, None, "not checked") for engine in ("vLLM", "SGLang", "llama.cpp")}
    unknown = {"transformers": Serving("transformers", True, "run"), **unknown}
    if model_type == "grouped_decoder":
        unknown["vLLM"] = _grouped_decoder_in_vllm(config)
    if model_type == "deepseek_v3":
        unknown |= _latent(config)
    known = (_BY_ENGINE.get((model_type, engine), entry) for engine, entry in unknown.items())
    if config is not None and model_type not in _LONGROPE_CLASSES:
        parameters = config.get("rope_parameters") or {}
        if parameters.get("rope_type") == "longrope":  # frequencies one by one, as for heads of another size
            return tuple(_with_frequencies(entry, model_type) for entry in known)
    return tuple(known)


_LONGROPE_CLASSES = ("deepseek_v3", "phi3", "phimoe")  # whose frequencies engines are known to take, or not, otherwise


def _with_frequencies(entry: Serving, model_type: str) -> Serving:
    """How an engine serves a class whose RoPE has a factor for each frequency, if it serves the class."""
    if entry.engine == "llama.cpp":
        return Serving("llama.cpp", False, "read", "its converter drops the factors of RoPE silently")
    if entry.engine == "transformers" or not entry.works:
        return entry
    architecture = known_architecture(model_type)
    if architecture is not None and architecture.interleaved_rotary:
        how = "its own class has such a RoPE for half-split pairs only"
        return Serving(entry.engine, True, "read", f"with --model-impl transformers; {how}")
    return replace(entry, evidence="read")


_WITHOUT_KERNELS = "only with VLLM_MLA_DISABLE=1, which caches all heads' keys and values: no kernel for these sizes"
_OWN_LATENT_CLASS = "in sizes with kernels, without biases and with a RoPE of the default type"


def _latent(config: Mapping[str, Any] | None) -> dict[str, Serving]:
    """How engines serve DeepSeek-V3: as a conversion to MLA writes it, without experts, or another."""
    if config is None:
        return {
            "vLLM": Serving("vLLM", True, "read", f"its own class {_OWN_LATENT_CLASS}"),
            "SGLang": Serving("SGLang", True, "read", _OWN_LATENT_CLASS),
            "llama.cpp": Serving(
                "llama.cpp", None, "read", "with q_lora_rank, without biases and with a RoPE of the default type"
            ),
        }
    refusal = _latent_class_refusal(config)
    return {
        "vLLM": _latent_in_vllm(config, refusal),
        "SGLang": _latent_in_sglang(config, refusal),
        "llama.cpp": _latent_in_llama_cpp(config, refusal),
    }


def _latent_class_refusal(config: Mapping[str, Any]) -> str | None:
    """Why the class that engines have for DeepSeek-V3 computes something else than transformers' does, or None."""
    if config.get("attention_bias"):
        return "its own class drops the biases silently"
    rope_type = (config.get("rope_parameters") or {}).get("rope_type", "default")
    if rope_type not in ("default", "yarn") or not config.get("rope_interleave", True):
        return "its own class has another RoPE"
    return None


def _latent_in_vllm(config: Mapping[str, Any], refusal: str | None) -> Serving:
    through_transformers = [f"with --model-impl transformers; {refusal}"] if refusal else []
    if not _has_kernels(config):
        return Serving("vLLM", True, "read", "; ".join([_WITHOUT_KERNELS, *through_transformers]))
    return Serving("vLLM", True, "run" if refusal else "read", *through_transformers)


def _latent_in_sglang(config: Mapping[str, Any], refusal: str | None) -> Serving:
    if refusal:
        return Serving("SGLang", False, "read", refusal)
    return Serving("SGLang", True, "read") if _has_kernels(config) else Serving("SGLang", None, "not checked")


def _latent_in_llama_cpp(config: Mapping[str, Any], refusal: str | None) -> Serving:
    if config.get("q_lora_rank") is None:
        return Serving("llama.cpp", False, "read", "it wants q_lora_rank of most models with a latent")
    if refusal:
        return Serving("llama.cpp", False, "read", "it has neither biases nor other RoPEs for a latent")
    return Serving("llama.cpp", True, "read")


def _has_kernels(config: Mapping[str, Any]) -> bool:
    return latent_kernels(LatentSizes(*(int(config[size.name]) for size in fields(LatentSizes)))) is None


def _grouped_decoder_in_vllm(config: Mapping[str, Any] | None) -> Serving:
    if config is None:
        return Serving("vLLM", None, "run", "learned positions, with --trust-remote-code; ALiBi is refused")
    if config.get("alibi_slopes"):
        return Serving("vLLM", False, "read", "its Transformers backend leaves ALiBi out, so that the class refuses it")
    if config.get("position_embedding_type") != "learned" or "sliding_attention" in config.get("layer_types", ()):
        return Serving("vLLM", None, "not checked")
    return Serving("vLLM", True, "run", "with --trust-remote-code")


_EVIDENCE = {"run": "tested", "read": "by its source, untested"}


_COMMANDS = {
    "vLLM": "vllm serve MODEL",
    "SGLang": "python -m sglang.launch_server --model-path MODEL",
    "llama.cpp": "python convert_hf_to_gguf.py MODEL --outfile model.gguf && llama-server -m model.gguf",
}
_OPTIONS = ("--model-impl transformers", "--trust-remote-code")
_VARIABLES = ("VLLM_MLA_DISABLE=1",)


def serve_command(entry: Serving, model_type: str) -> str | None:
    """Return what to type to serve a checkpoint called MODEL, with the options and variables that `how` names.

    None where the engine does not serve it, where that is not known, and for transformers, which is a library.
    """
    if not entry.works or entry.engine not in _COMMANDS:
        return None
    named = [option for option in _OPTIONS if option in entry.how]
    if model_type in RUNTIME_CLASSES and "--trust-remote-code" not in named and entry.engine != "llama.cpp":
        named.append("--trust-remote-code")
    return " ".join([*(name for name in _VARIABLES if name in entry.how), _COMMANDS[entry.engine], *named])


def engines_line(engines: Iterable[Serving]) -> str:
    """Return the engines that serve a class, with evidence and conditions, as one line of text."""
    return ", ".join(
        f"{engine.engine} ({_EVIDENCE[engine.evidence]}{': ' + engine.how if engine.how else ''})"
        for engine in engines
        if engine.works
    )
