"""Serve converted checkpoints with vLLM and compare tokens, log-probabilities and K/V cache with transformers.

    scripts/check_vllm [CASE ...]

Each case is a small random checkpoint in float32, converted with the installed `kvconvert`. vLLM decodes greedily, and
transformers scores the same tokens in one pass without a cache: each has to be the most likely one, with the same
log-probability. The original is served too, for its cache. A control compares with the original's most likely tokens,
which has to fail. Prints a Markdown table, and exits with 1 if a case fails.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple


class Case(NamedTuple):
    """A source class, the conversion, what should come out, and by how much its cache should be smaller.

    `plugins` are those that vLLM loads.
    """

    model_type: str
    overrides: dict[str, Any]
    command: tuple[str, ...]
    served: str
    cache_ratio: int
    trust_remote_code: bool = False
    plugins: str = ""
    compiled: bool = False


FOUR_LAYERS = {"num_hidden_layers": 4}
CLA2 = ("mha2cla", "--share", "2")
MQA_CLA3 = ("mha2cla", "--share", "3", "--groups", "1")
CROSS_LAYER = "CrossLayerDecoderForCausalLM"
GQA2 = ("mha2gqa", "--groups", "2")
CASES = {
    "llama": Case("llama", {}, GQA2, "LlamaForCausalLM", 4),
    "gpt_neox": Case("gpt_neox", {}, GQA2, "PhiForCausalLM", 4),
    "gpt_neox-sequential": Case("gpt_neox", {"use_parallel_residual": False}, GQA2, "NemotronForCausalLM", 4),
    "gpt2": Case("gpt2", {}, ("mha2mqa",), "GPTBigCodeForCausalLM", 8),
    "gpt2-grouped": Case("gpt2", {}, GQA2, "GroupedDecoderForCausalLM", 4, trust_remote_code=True),
    "cla2": Case("llama", FOUR_LAYERS, CLA2, CROSS_LAYER, 2, plugins="kvconvert"),
    "cla2-compiled": Case("llama", FOUR_LAYERS, CLA2, CROSS_LAYER, 2, plugins="kvconvert", compiled=True),
    "cla2-no-plugin": Case("llama", FOUR_LAYERS, CLA2, CROSS_LAYER, 1, trust_remote_code=True),
    "mqa-cla3": Case(
        "qwen2", {**FOUR_LAYERS, "num_key_value_heads": 8}, MQA_CLA3, CROSS_LAYER, 16, plugins="kvconvert"
    ),
    "cla2-window": Case("mistral", {**FOUR_LAYERS, "sliding_window": 32}, CLA2, CROSS_LAYER, 2, plugins="kvconvert"),
}
PROMPT_LENGTHS = (1, 7, 40, 120)  # vLLM's blocks have 128 tokens on a CPU: the last prompt goes on into a second one
NUM_TOKENS = 16
VOCAB_SIZE = 384
TOLERANCE = 1e-3  # nats; the sums of float32 run in another order
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, where its cache can be looked at
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


def build(case: Case, directory: Path) -> None:
    """A random model of 8 heads of 32, its weights large enough that logits have a scale above 1."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings: dict[str, Any] = {
        "hidden_size": 256,
        "num_attention_heads": 8,
        "num_hidden_layers": 2,
        "intermediate_size": 512,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = AutoConfig.for_model(case.model_type, **(settings | case.overrides))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn(parameter.shape)
        else:
            parameter.data = torch.randn(parameter.shape) * 1.5 / parameter.shape[-1] ** 0.5
    model.save_pretrained(directory)


def serve(directory: str, prompts: list[list[int]], trust_remote_code: bool, compiled: bool) -> dict[str, Any]:
    """Greedy tokens, their log-probabilities, and the cache that vLLM allocated. Runs in a process of its own."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        directory,
        dtype="float32",
        enforce_eager=not compiled,
        skip_tokenizer_init=True,
        trust_remote_code=trust_remote_code,
    )
    sampling = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=1, detokenize=False)
    requests = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    outputs = [request.outputs[0] for request in requests]
    core = llm.llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    config = core.scheduler.kv_cache_config
    (group,) = config.kv_cache_groups
    # layers are views of one allocation
    storages = {cache.untyped_storage().data_ptr(): cache.untyped_storage().nbytes() for cache in runner.kv_caches}
    return {
        "tokens": [list(output.token_ids) for output in outputs],
        "logprobs": [[row[t].logprob for row, t in zip(o.logprobs, o.token_ids, strict=True)] for o in outputs],
        "class": type(runner.model).__name__,
        "heads": group.kv_cache_spec.num_kv_heads,
        "blocks": config.num_blocks,
        "bytes_per_token": sum(storages.values()) / (config.num_blocks * group.kv_cache_spec.block_size),
        "versions": {name: version(name) for name in ("vllm-cpu", "transformers", "torch")},
    }


def score(directory: Path, prompts: list[list[int]], tokens: list[list[int]], trust_remote_code: bool) -> Any:
    """What transformers says of tokens that follow the prompts: which are the most likely (bool), log-probabilities."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, trust_remote_code=trust_remote_code
    ).eval()
    likely, logprobs = [], []
    for prompt, continuation in zip(prompts, tokens, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + continuation]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        assert logits.std() > 1, "logits too flat to compare"
        chosen = torch.tensor(continuation)
        likely.append(logits.argmax(-1) == chosen)
        logprobs.append(logits.log_softmax(-1)[torch.arange(len(chosen)), chosen])
    return torch.stack(likely), torch.stack(logprobs)


def run_vllm(directory: Path, prompts: list[list[int]], case: Case) -> dict[str, Any]:
    """`serve` in a process of its own, which gives its memory back."""
    answer = directory.with_suffix(".json")
    arguments = json.dumps([str(directory), prompts, case.trust_remote_code, case.compiled])
    command = [sys.executable, __file__, "--serve", arguments, str(answer)]
    environment = os.environ | ENVIRONMENT | {"VLLM_PLUGINS": case.plugins}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if process.returncode:
        raise RuntimeError(f"vLLM failed on {directory.name}:\n{(process.stdout + process.stderr)[-3000:]}")
    result: dict[str, Any] = json.loads(answer.read_text())
    return result


def check(case: Case, folder: Path) -> tuple[str, bool, dict[str, str]]:
    """The row's cells after its name, whether the case passes, and the versions."""
    import torch

    source, converted = folder / "source", folder / "converted"
    build(case, source)
    program = Path(sys.executable).with_name("kvconvert")
    command = [str(program), *case.command, str(source), "--output", str(converted), "--json", "--quiet"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (architecture,) = json.loads((converted / "config.json").read_text())["architectures"]

    prompts = [torch.randint(3, VOCAB_SIZE, (length,)).tolist() for length in PROMPT_LENGTHS]
    before = run_vllm(source, prompts, case)
    after = run_vllm(converted, prompts, case)
    likely, logprobs = score(converted, prompts, after["tokens"], True)
    control, _ = score(source, prompts, after["tokens"], False)
    difference = (torch.tensor(after["logprobs"]) - logprobs).abs().max().item()
    passed = (
        architecture == case.served
        and bool(likely.all())
        and not control.all()
        and difference <= TOLERANCE
        and before["bytes_per_token"] == case.cache_ratio * after["bytes_per_token"]
    )
    implementation = "" if after["class"] == architecture else f" as {after['class']}"
    cells = [
        architecture + implementation,
        f"{before['heads']} → {after['heads']}",
        f"{likely.sum()}/{likely.numel()}",
        f"{control.sum()}/{control.numel()}",
        f"{difference:.1e}",
        f"{before['bytes_per_token']:.0f} → {after['bytes_per_token']:.0f}",
        f"{before['blocks']} → {after['blocks']}",
    ]
    return " | ".join(cells), passed, after["versions"]


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        arguments, answer = sys.argv[2:]
        Path(answer).write_text(json.dumps(serve(*json.loads(arguments))))
        return
    parser = argparse.ArgumentParser(
        prog="scripts/check_vllm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("case", nargs="*", help=", ".join(CASES))
    options = parser.parse_args()
    if unknown := set(options.case) - set(CASES):
        parser.error(f"no such case: {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")

    versions: dict[str, str] = {}
    failed = []
    print("| case | served | K/V heads | tokens equal | control | max. Δ log-prob | B/token | blocks in 1 GiB |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for name in options.case or CASES:
        cells, passed = "did not run", False
        with tempfile.TemporaryDirectory() as folder:
            try:
                cells, passed, versions = check(CASES[name], Path(folder))
            except (RuntimeError, subprocess.CalledProcessError) as error:
                print(error, file=sys.stderr)
        print(f"| {name} | {cells} |", flush=True)
        failed += [] if passed else [name]
    engine = ", ".join(f"{name} {number}" for name, number in versions.items()) or "nothing"
    print(f"\nConverted by kvconvert {version('kvconvert')}, served with {engine}, in one environment.")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
