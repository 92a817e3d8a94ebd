"""What has to work with every version that pip may install: scripts/test_versions runs it, with other files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import CheckpointFactory, RunHere, build_tokenizer
from safetensors.torch import load_file
from test_seq2seq import T5
from test_seq2seq import make as make_seq2seq

LAYERS = {"num_hidden_layers": 4}
CONVERSIONS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "gqa": ("llama", {}, "mha2gqa --groups 2", "LlamaForCausalLM"),
    "svd": ("llama", {}, "mha2gqa --groups 2 --method svd --no-calibration", "LlamaForCausalLM"),
    "gpt2-mqa": ("gpt2", {}, "mha2mqa", "GPTBigCodeForCausalLM"),
    "gpt2-gqa": ("gpt2", {}, "mha2gqa --groups 2", "GroupedDecoderForCausalLM"),
    "gptj-gqa": ("gptj", {"rotary_dim": 4}, "mha2gqa --groups 2", "PhiForCausalLM"),
    "cla2": ("llama", LAYERS, "mha2cla --share 2", "CrossLayerDecoderForCausalLM"),
    "mqa-cla2": ("qwen2", LAYERS, "mha2cla --share 2 --groups 1", "CrossLayerDecoderForCausalLM"),
    "mla": (
        "llama",
        {},
        "mha2mla --kv-lora-rank 16 --qk-rope-head-dim 4 --no-calibration",
        "DeepseekV3ForCausalLM",
    ),
    "t5-gqa": ("t5", {}, "mha2gqa --groups 2", "GroupedT5ForConditionalGeneration"),
}

GENERATE = """
import json, torch, transformers
for name in {names!r}:
    auto = transformers.AutoModelForSeq2SeqLM if name.startswith("t5") else transformers.AutoModelForCausalLM
    model = auto.from_pretrained(name, trust_remote_code=True, dtype=torch.float32).eval()
    options = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False, no_repeat_ngram_size=1)
    inputs = torch.arange(3, 13)[None]
    tokens = [model.generate(inputs, use_cache=use_cache, **options)[0].tolist() for use_cache in (True, False)]
    print(json.dumps([name, type(model).__name__, *tokens]))
"""


def test_every_kind_of_result_generates_with_a_cache_what_it_does_without(
    make_checkpoint: CheckpointFactory, run_here: RunHere, run_without_kvconvert: Any, tmp_path: Path
) -> None:
    """Opened by the code that lies beside it, in a process that has no kvconvert."""
    for name, (model_type, overrides, command, _) in CONVERSIONS.items():
        if model_type == "t5":
            source = make_seq2seq(tmp_path / f"{name}-source", "t5", T5)
        else:
            source = make_checkpoint(model_type, name=f"{name}-source", **overrides)
        run_here(*command.split(), source, "--output", tmp_path / name)
    printed = run_without_kvconvert(GENERATE.format(names=list(CONVERSIONS)))
    found = [json.loads(line) for line in printed.splitlines() if line.startswith("[")]
    assert [(name, kind) for name, kind, _, _ in found] == [(name, row[3]) for name, row in CONVERSIONS.items()]
    for name, _, with_cache, without in found:
        assert with_cache == without, name
        assert len(set(with_cache[-8:])) == 8, name  # a small random model would repeat one, whatever it reads


@pytest.mark.parametrize("recipe", [(), ("--layerwise-fraction", "0.5")], ids=["cross-entropy", "layers, then KL"])
def test_steps_of_uptraining_and_an_evaluation(
    recipe: tuple[str, ...], make_checkpoint: CheckpointFactory, run_here: RunHere, prose_file: Path, tmp_path: Path
) -> None:
    source = make_checkpoint(**LAYERS)
    build_tokenizer().save_pretrained(source)
    run_here("mha2cla", "--share", 2, source, "--output", tmp_path / "out")
    steps = ("--steps", 4, "--sequence-length", 32, "--global-batch-tokens", 64)
    teacher = ("--teacher", source) if recipe else ()
    run_here(
        "uptrain", tmp_path / "out", "--data", prose_file, *steps, *recipe, *teacher, "--output", tmp_path / "trained"
    )
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "trained"))
    assert before.keys() == after.keys()
    name = "model.layers.0.self_attn.k_proj.weight"
    assert not before[name].equal(after[name])
    scored = run_here("evaluate", tmp_path / "trained", "--against", source, "--data", prose_file, "--window", 32)
    assert scored["against"]["kl_nats_per_token"] > 0
    same = run_here("evaluate", source, "--against", source, "--data", prose_file, "--window", 32)
    assert same["against"]["kl_nats_per_token"] == 0  # the control
