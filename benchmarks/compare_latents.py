"""Held-out loss right after converting to multi-head latent attention, by method, with nothing trained.

    python benchmarks/compare_latents.py MODEL CALIBRATION HELD_OUT R+D [R+D ...]

R is kv_lora_rank, D qk_rope_head_dim; R + D numbers are cached per token and layer. Beside kvconvert's results, written
by its command in the model's dtype, it has two published conversions that need no training, computed here in float32:

TransMLA (arXiv 2502.07864). RoRoPE: of each frequency, the eigenvectors of the heads' second moments rotate keys across
heads, and the first rotated head keeps its RoPE. With D < head_dim = D · M, FreqFold takes each n · M neighbouring
frequencies (--freqfold n) for one and keeps its n first directions, which turn with every M-th of them from the highest
on. The rest of the keys loses its position and goes into a PCA with the values, both brought to the same rms norm.

MHA2MLA (arXiv 2502.14837). Each K/V head keeps the pairs with the largest ‖q‖ · ‖k‖, the same number in each, at least
one; what D leaves over goes to R. The rest loses its position; a truncated SVD of its weights and those of the values
is the latent.

Both are measured on the original's activations (norms are rms norms), their latents are not normalised, and biases of
values and of keys without position are kept beside the latent, where they cost no cache. Excess is nats per token over
the original.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from kvconvert.convert import open_checkpoint
from kvconvert.convert.algebra.attention_shape import AttentionShape
from kvconvert.convert.algebra.latent import LatentAttention
from kvconvert.convert.algebra.projections import Projections
from kvconvert.convert.algebra.rotations import Rotary
from kvconvert.convert.architectures.projections import read_projections
from kvconvert.convert.architectures.source import Source
from kvconvert.convert.calibration.streams import CPU, Stream
from kvconvert.convert.calibration.text import CalibrationText, read_calibration_text
from kvconvert.convert.checkpoint.loading import empty_model, load_model
from kvconvert.convert.methods.deepseek import result_config
from kvconvert.convert.methods.mla import Mla
from kvconvert.convert.text.sources import TextSource
from kvconvert.convert.translations.routes import as_latent_source
from kvconvert.measure.held_out import load_windows
from kvconvert.measure.perplexity import Evaluation, evaluate
from torch import Tensor, nn

LONGEST_SEQUENCE = 1024  # of calibration text, as for the command
VARIANTS: dict[str, tuple[str, ...]] = {
    "kvconvert --no-refit": ("--no-refit",),
    "kvconvert": (),
    "kvconvert, exact norm, gain": ("--latent-norm", "exact", "--rope-selection", "gain"),
}


class ImpossibleError(Exception):
    """A method has no result of these sizes."""


@dataclass(frozen=True)
class Measured:
    """A model, and E[x xᵀ] of each layer's attention inputs with a 1 appended."""

    source: Source
    grams: list[Tensor]


@dataclass(frozen=True)
class Converted:
    """A layer, and the frequencies of its rotary key, (S,), which no other layer need have."""

    layer: LatentAttention
    frequencies: Tensor


@dataclass(frozen=True)
class Heads:
    """queries: (H, d, E + 1), keys and values: (G, d, E + 1); queries and keys half-split."""

    queries: Tensor
    keys: Tensor
    values: Tensor

    @property
    def per_head(self) -> int:
        return len(self.queries) // len(self.keys)


Method = Callable[[Projections, AttentionShape, Rotary, Tensor, int, int], Converted]


def measure(source: Source, text: CalibrationText) -> Measured:
    """The source, measured on the text. Raises ImpossibleError where these conversions are not defined for it."""
    rotary, head_dim = source.rotary[0], source.shape.head_dim
    if rotary.dims != head_dim:
        raise ImpossibleError(f"{rotary.dims} of {head_dim} dims of a head rotate")
    modules = source.empty_model.modules()
    if any(getattr(module, "attention_scaling", 1.0) != 1.0 for module in modules):
        raise ImpossibleError("its RoPE scales queries and keys")
    grams, _ = Stream.of(source, text, CPU).moments(range(source.shape.num_hidden_layers))
    return Measured(source, grams)


def heads_of(projections: Projections, shape: AttentionShape, rotary: Rotary) -> Heads:
    def split(rows: Tensor) -> Tensor:
        return torch.stack([rotary.half_split(head) for head in rows.split(shape.head_dim)])

    return Heads(split(projections.q), split(projections.k), projections.v.unflatten(0, (-1, shape.head_dim)))


def transmla(
    projections: Projections,
    shape: AttentionShape,
    rotary: Rotary,
    gram: Tensor,
    kv_lora_rank: int,
    qk_rope_head_dim: int,
    freqfold: int = 1,
) -> Converted:
    heads, num_pairs = heads_of(projections, shape, rotary), len(rotary.frequencies)
    collapse, left_over = divmod(shape.head_dim, qk_rope_head_dim)
    fold = freqfold * collapse
    if left_over or num_pairs % fold:
        raise ImpossibleError(f"{fold} frequencies as one, of {num_pairs}, for {qk_rope_head_dim} rotary dims")

    # RoRoPE: (F / fold, 2, G · fold, E + 1), the 2 being real and imaginary parts, which turn alike
    folded = heads.keys.unflatten(1, (2, -1, fold)).permute(2, 1, 0, 3, 4)
    keys = folded.flatten(2, 3)
    moments = (keys @ gram @ keys.mT).sum(1)
    # the paper's code adds to the diagonal first, which changes no eigenvector
    directions = torch.linalg.eigh(moments).eigenvectors.flip(2)[..., :freqfold]  # (F / fold, G · fold, freqfold)
    first = directions.mT[:, None] @ keys  # (F / fold, 2, freqfold, E + 1)
    left = (keys - directions[:, None] @ first).view_as(folded).permute(2, 1, 0, 3, 4).flatten(1, 3)
    readers = directions.unflatten(1, (-1, fold)).repeat_interleave(heads.per_head, dim=1)
    queries = torch.einsum("ihfj,hpifx->hpijx", readers, heads.queries.unflatten(1, (2, -1, fold)))

    left, values = without_bias(left), without_bias(heads.values)
    norms = [((part @ gram) * part).sum().clamp(min=0).sqrt() for part in (left, values)]
    balance = norms[0] / norms[1] if norms[0] > 1e-6 * norms[1] else torch.tensor(1.0)  # else nothing is left of keys
    parts = torch.cat([left / balance, values]).flatten(0, 1)  # (2 G d, E + 1)
    top = torch.linalg.eigh(parts @ gram @ parts.T).eigenvectors.flip(1)[:, :kv_lora_rank]
    key_up, value_up = top.unflatten(0, (2, -1, shape.head_dim))
    rope_key = first.transpose(0, 1).flatten(0, 2)
    layer = latent_attention(heads, projections, queries.flatten(1, 3), rope_key, top.T @ parts)
    return Converted(layer(key_up * balance, value_up), torch.tensor(rotary.frequencies[::collapse]))


def mha2mla(
    projections: Projections,
    shape: AttentionShape,
    rotary: Rotary,
    gram: Tensor,
    kv_lora_rank: int,
    qk_rope_head_dim: int,
) -> Converted:
    heads, num_shared = heads_of(projections, shape, rotary), shape.num_key_value_heads
    num_kept = min(max(qk_rope_head_dim // (2 * num_shared), 1), len(rotary.frequencies))
    rank = kv_lora_rank + qk_rope_head_dim - 2 * num_shared * num_kept
    if rank < 1:
        raise ImpossibleError(f"a pair of each of {num_shared} heads is more than {kv_lora_rank} + {qk_rope_head_dim}")

    query_norms = pair_norms(heads.queries, gram).unflatten(0, (num_shared, -1)).mean(1)
    kept = (query_norms * pair_norms(heads.keys, gram)).topk(num_kept, dim=1).indices.sort(1).values  # (G, r)
    pairs = heads.keys.unflatten(1, (2, -1))  # (G, 2, F, E + 1)
    left = pairs.clone()
    rope_keys, queries = [], torch.zeros(len(heads.queries), 2, num_shared, num_kept, gram.shape[0], dtype=gram.dtype)
    for head, chosen in enumerate(kept):
        rope_keys.append(pairs[head][:, chosen])
        left[head][:, chosen] = 0
        own = slice(head * heads.per_head, (head + 1) * heads.per_head)
        queries[own, :, head] = heads.queries.unflatten(1, (2, -1))[own][:, :, chosen]

    parts = torch.cat([without_bias(left.flatten(1, 2)), without_bias(heads.values)]).flatten(0, 1)
    up, sizes, down = torch.linalg.svd(parts, full_matrices=False)
    key_up, value_up = up[:, :rank].unflatten(0, (2, -1, shape.head_dim))
    rope_key = torch.stack(rope_keys, dim=1).flatten(0, 2)
    layer = latent_attention(heads, projections, queries.flatten(1, 3), rope_key, (sizes[:, None] * down)[:rank])
    return Converted(layer(key_up, value_up), torch.tensor(rotary.frequencies)[kept.flatten()])


def latent_attention(
    heads: Heads, projections: Projections, rope_queries: Tensor, rope_key: Tensor, latent: Tensor
) -> Callable[[Tensor, Tensor], LatentAttention]:
    """The layer, but for key_up and value_up; the class divides scores by the root of more dims."""
    head_dim = heads.queries.shape[1]
    queries = torch.cat([heads.queries, rope_queries], dim=1) * (1 + len(rope_key) / head_dim) ** 0.5
    return lambda key_up, value_up: LatentAttention(
        queries, rope_key, latent, key_up, value_up, projections.o, float("nan"), float("nan")
    )


def without_bias(rows: Tensor) -> Tensor:
    return torch.cat([rows[..., :-1], torch.zeros_like(rows[..., -1:])], dim=-1)


def pair_norms(heads: Tensor, gram: Tensor) -> Tensor:
    """The rms norm of each rotary pair, (heads, F)."""
    norms: Tensor = ((heads @ gram) * heads).sum(2).unflatten(1, (2, -1)).sum(1).sqrt()
    return norms


def convert(measured: Measured, method: Method, kv_lora_rank: int, qk_rope_head_dim: int) -> list[Converted]:
    layers, source = [], measured.source
    for index, gram in enumerate(measured.grams):
        projections = read_projections(source, index)
        layers.append(method(projections, source.shape, source.rotary[0], gram, kv_lora_rank, qk_rope_head_dim))
    return layers


def build(source: Source, layers: Sequence[Converted]) -> Any:
    """A DeepSeek-V3 in float32 whose latents have no norm and whose layers each have their frequencies."""
    checkpoint, architecture, shape = source.checkpoint, source.architecture, source.shape
    one = layers[0].layer
    mla = Mla(len(one.latent), len(one.rope_key), rope_interleave=False)
    config = result_config(source, mla.layout(source), [(0, 0)] * mla.num_rope_pairs)
    config.pop("rope_scaling", None)
    model = empty_model(config | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}})
    prefixes = tuple(f"{architecture.attention.format(layer=layer)}." for layer in range(len(layers)))
    others = [name for name in checkpoint.tensors if not name.startswith(prefixes)]
    model.load_state_dict({name: checkpoint.read(name).float() for name in others}, strict=False, assign=True)
    model.tie_weights()
    per_head = shape.num_attention_heads // shape.num_key_value_heads
    for index, converted in enumerate(layers):
        layer, attention = converted.layer, model.get_submodule(architecture.attention.format(layer=index))
        queries, down = layer.q.flatten(0, 1), torch.cat([layer.latent, layer.rope_key])
        ups = torch.cat([layer.key_up, layer.value_up], dim=1).repeat_interleave(per_head, dim=0).flatten(0, 1)
        attention.q_proj = linear(queries[:, :-1], queries[:, -1])
        attention.kv_a_proj_with_mqa = linear(down[:, :-1], down[:, -1])
        attention.kv_a_layernorm = nn.Identity()
        attention.kv_b_proj = linear(ups)
        attention.o_proj = linear(layer.o, output_bias(source, index))
        attention.register_forward_pre_hook(with_frequencies(converted.frequencies), with_kwargs=True)
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise ValueError(f"{len(missing)} parameters are missing, first {missing[0]}")
    return model


def output_bias(source: Source, index: int) -> Tensor:
    """That of o_proj, and what the biases of values add to it: attention weights sum to 1."""
    shape, name = source.shape, source.architecture.tensor_name(index, "o_proj", "bias")
    projections = read_projections(source, index)
    values = projections.v[:, -1].unflatten(0, (shape.num_key_value_heads, -1))
    bias: Tensor = projections.o @ values.repeat_interleave(len(projections.q) // len(projections.v), dim=0).flatten()
    if name in source.checkpoint.tensors:
        bias = bias + source.checkpoint.read(name).double()
    return bias


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    module.weight = nn.Parameter(weight.float().contiguous())
    if bias is not None:
        module.bias = nn.Parameter(bias.float().contiguous())
    return module


def with_frequencies(frequencies: Tensor) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
    """A hook that gives an attention the rotations of its own frequencies."""

    def hook(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        angles = (named["position_ids"][..., None] * frequencies.float()).repeat(1, 1, 2)
        return arguments, named | {"position_embeddings": (angles.cos(), angles.sin())}

    return hook


def methods(freqfolds: Sequence[int]) -> dict[str, Method]:
    folded: dict[str, Method] = {
        "TransMLA" + f", FreqFold {freqfold} M" * (freqfold > 1): partial(transmla, freqfold=freqfold)
        for freqfold in freqfolds
    }
    return folded | {"MHA2MLA": mha2mla}


def kvconvert(options: argparse.Namespace, rank: int, rope_dim: int, variant: Sequence[str], output: Path) -> None:
    """Run the command. Raises ImpossibleError with what it says where it refuses."""
    command = [Path(sys.executable).with_name("kvconvert"), "mha2mla", options.model, "--output", output, "--quiet"]
    sizes = ["--kv-lora-rank", rank, "--qk-rope-head-dim", rope_dim]
    text = ["--calibration", options.calibration, "--calibration-tokens", options.calibration_tokens]
    words = [str(part) for part in [*command, *sizes, *text, *variant]]
    process = subprocess.run(words, capture_output=True, text=True, check=False)
    if process.returncode:
        raise ImpossibleError(process.stderr.strip())


def two_sizes(text: str) -> tuple[int, int]:
    rank, rope_dim = map(int, text.split("+"))
    if rank < 1 or rope_dim < 2 or rope_dim % 2:
        raise ValueError
    return rank, rope_dim


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("held_out")
    parser.add_argument("sizes", nargs="+", type=two_sizes, metavar="R+D")
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--max-windows", type=int, default=8)
    parser.add_argument("--freqfold", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--variants", type=int, default=len(VARIANTS), help="how many of kvconvert's")
    options = parser.parse_args()

    windows = load_windows(
        options.model, TextSource(options.held_out), window=options.window, max_windows=options.max_windows
    )
    original = load_model(options.model, dtype=torch.float32, device="cpu")
    before = evaluate(original, windows)

    def row(name: str, rank: int, rope_dim: int, result: Evaluation | str) -> None:
        cells = (result, "")
        if isinstance(result, Evaluation) and result.against is not None:
            excess = f"{result.against.excess_nats_per_token:.4f} ± {result.against.excess_standard_error:.4f}"
            cells = (f"{result.perplexity:.4g}", excess)
        print(f"| {name} | {rank} + {rope_dim} | {rank + rope_dim} | {' | '.join(map(str, cells))} |", flush=True)

    with as_latent_source(open_checkpoint(options.model)) as source, torch.inference_mode():
        text = read_calibration_text(
            source.checkpoint,
            TextSource(options.calibration),
            num_tokens=options.calibration_tokens,
            sequence_length=min(
                LONGEST_SEQUENCE, source.longest_context or LONGEST_SEQUENCE, options.calibration_tokens
            ),
        )
        measured = measure(source, text)
        numbers = 2 * source.shape.num_key_value_heads * source.shape.head_dim
        titles = ("method", "R + D", "numbers cached per token and layer", "perplexity", "excess nats per token")
        print(f"| {' | '.join(titles)} |\n|---|---|---|---|---|")
        print(f"| original | | {numbers} | {before.perplexity:.4g} | |", flush=True)
        for rank, rope_dim in options.sizes:
            for name, method in methods(options.freqfold).items():
                try:
                    layers = convert(measured, method, rank, rope_dim)
                except ImpossibleError as error:
                    row(name, rank, rope_dim, f"not possible: {error}")
                    continue
                result = evaluate(build(source, layers), windows, original=original)
                row(name, len(layers[0].layer.latent), len(layers[0].layer.rope_key), result)
            for name, variant in islice(VARIANTS.items(), options.variants):
                with tempfile.TemporaryDirectory() as folder:
                    output = Path(folder) / "converted"
                    try:
                        kvconvert(options, rank, rope_dim, variant, output)
                    except ImpossibleError as error:
                        print(error, file=sys.stderr)
                        row(name, rank, rope_dim, "not possible")
                        continue
                    config = json.loads((output / "config.json").read_text())
                    model = load_model(output, dtype=torch.float32, device="cpu")
                    result = evaluate(model, windows, original=original)
                    row(name, config["kv_lora_rank"], config["qk_rope_head_dim"], result)
    print(f"\n{before.num_tokens} tokens: {before.method}; {text.num_tokens} calibration tokens")


if __name__ == "__main__":
    main()
