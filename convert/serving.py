"""Which engines serve a converted checkpoint, and how that is known.

"run" means that greedy tokens were compared with those of transformers; "read" that the engine's source was read.
vLLM 0.32 on a CPU, SGLang 0.5.23, llama.cpp as vendored in llama-cpp-python 0.3.36. transformers is run by the test
suite; the others come from a trial before this repository, which its tests do not repeat.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Serving", "serving"]


@dataclass(frozen=True)
class Serving:
    """How an engine serves a class: `how` is a remark or option; `evidence` is "run", "read" or "not checked"."""

    engine: str
    works: bool | None
    evidence: str
    how: str = ""


_VLLM_RUN = frozenset({"gemma", "gpt_bigcode", "llama", "nemotron", "olmo2", "phi", "stablelm", "starcoder2"})
_SGLANG_READ = frozenset({"cohere", "gemma", "gpt_bigcode", "llama", "olmo2", "qwen2", "stablelm", "starcoder2"})
_SGLANG_ASSUMES_MHA = frozenset({"olmo", "phi"})
_LLAMA_CPP_READ = frozenset({"gpt_bigcode"})


def serving(model_type: str) -> tuple[Serving, ...]:
    """What is known for a converted checkpoint of this `model_type`, engine by engine."""
    vllm = Serving("vLLM", True, "run") if model_type in _VLLM_RUN else _unchecked("vLLM")
    if model_type in _SGLANG_ASSUMES_MHA:
        sglang = Serving("SGLang", True, "read", "with --model-impl transformers; its own class assumes MHA")
    elif model_type in _SGLANG_READ:
        sglang = Serving("SGLang", True, "read")
    else:
        sglang = _unchecked("SGLang")
    if model_type == "phi":
        llama_cpp = Serving("llama.cpp", False, "read", "its converter writes as many K/V heads as query heads")
    elif model_type == "nemotron":
        llama_cpp = Serving("llama.cpp", None, "read", "squared ReLU only: not a translated GPT-NeoX, which has GELU")
    elif model_type in _LLAMA_CPP_READ:
        llama_cpp = Serving("llama.cpp", True, "read")
    else:
        llama_cpp = _unchecked("llama.cpp")
    return Serving("transformers", True, "run"), vllm, sglang, llama_cpp


def _unchecked(engine: str) -> Serving:
    return Serving(engine, None, "not checked")
