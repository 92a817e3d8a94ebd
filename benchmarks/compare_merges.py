"""Held-out loss right after merging K/V heads, by method, with nothing trained.

    python benchmarks/compare_merges.py MODEL HELD_OUT --calibration TEXT [--calibration TEXT ...] --groups 4 2 1

Beside kvconvert's methods it has the field's: the mean rescaled to the heads' norm, and the mean of heads aligned by
orthogonal maps (arXiv 2412.20677: an orthogonal matrix for values, a rotation of each rotary pair for keys, both from
the covariances of the calibration text, by generalised Procrustes analysis). Excess is nats per token over the
original.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from kvconvert.convert import Gqa, HeadGrouping, Source, TextSource, open_checkpoint
from kvconvert.convert.algebra.attention_shape import AttentionShape
from kvconvert.convert.algebra.projections import Projections
from kvconvert.convert.architectures.projections import projection_names, projection_tensors, read_projections
from kvconvert.convert.calibration.fitting import Fit
from kvconvert.convert.calibration.streams import Hardware
from kvconvert.convert.calibration.text import CalibrationText, read_calibration_text
from kvconvert.convert.checkpoint.loading import load_model
from kvconvert.convert.device import default_precision
from kvconvert.convert.methods.merging import HeadMerge, merge_heads
from kvconvert.convert.methods.prepared import Preparation, Prepared
from kvconvert.measure.held_out import load_windows
from kvconvert.measure.perplexity import evaluate
from torch import Tensor

PROCRUSTES_ROUNDS = 20

Baseline = Callable[[Projections, AttentionShape, HeadGrouping, Tensor], Projections]


def heads_of(rows: Tensor, shape: AttentionShape) -> Tensor:
    """(num_key_value_heads, head_dim, hidden_size + 1)."""
    heads: Tensor = rows.unflatten(0, (-1, shape.head_dim))
    return heads


def pooled(
    source: Projections, shape: AttentionShape, grouping: HeadGrouping, pool: Callable[[Tensor], Tensor]
) -> Projections:
    """Every head of a group replaced by `pool` of the group, (m, head_dim, hidden_size + 1)."""
    parts = {}
    for side in ("k", "v"):
        heads = heads_of(getattr(source, side), shape).clone()
        for group in grouping.groups:
            heads[list(group)] = pool(heads[list(group)])
        parts[side] = heads.flatten(0, 1)
    return replace(source, **parts)


def mean(source: Projections, shape: AttentionShape, grouping: HeadGrouping, gram: Tensor) -> Projections:
    return pooled(source, shape, grouping, lambda heads: heads.mean(0))


def first(source: Projections, shape: AttentionShape, grouping: HeadGrouping, gram: Tensor) -> Projections:
    return pooled(source, shape, grouping, lambda heads: heads[0])


def rescaled_mean(source: Projections, shape: AttentionShape, grouping: HeadGrouping, gram: Tensor) -> Projections:
    """The mean, with the mean Frobenius norm of the heads."""

    def pool(heads: Tensor) -> Tensor:
        average = heads.mean(0)
        rescaled: Tensor = average * heads.flatten(1).norm(dim=1).mean() / average.norm()
        return rescaled

    return pooled(source, shape, grouping, pool)


def procrustes_mean(source: Projections, shape: AttentionShape, grouping: HeadGrouping, gram: Tensor) -> Projections:
    """Heads turned towards their mean, again and again, then averaged; half-split RoPE over the whole head."""
    size = shape.num_attention_heads // shape.num_key_value_heads
    keys, values = heads_of(source.k, shape).clone(), heads_of(source.v, shape).clone()
    queries = source.q.unflatten(0, (-1, size, shape.head_dim)).clone()
    outputs = source.o.unflatten(1, (-1, size, shape.head_dim)).clone()
    for group in map(list, grouping.groups):
        turns = align(values[group], gram, orthogonal)
        outputs[:, group] = torch.einsum("dmsi,mji->dmsj", outputs[:, group], turns)
        values[group] = (turns @ values[group]).mean(0)
        turns = align(keys[group], gram, rotations)
        queries[group] = turns[:, None] @ queries[group]
        keys[group] = (turns @ keys[group]).mean(0)
    return Projections(queries.flatten(0, 2), keys.flatten(0, 1), values.flatten(0, 1), outputs.flatten(1))


def align(heads: Tensor, gram: Tensor, nearest: Callable[[Tensor], Tensor]) -> Tensor:
    """Generalised Procrustes: for each head the map, of those `nearest` gives, that brings it closest to the mean."""
    turns = torch.eye(heads.shape[1], dtype=heads.dtype).repeat(len(heads), 1, 1)
    for _ in range(PROCRUSTES_ROUNDS):
        target = (turns @ heads).mean(0)
        turns = torch.stack([nearest(target @ gram @ head.T) for head in heads])
    return turns


def orthogonal(cross: Tensor) -> Tensor:
    """The orthogonal matrix R with the largest tr(R crossᵀ)."""
    left, _, right = torch.linalg.svd(cross)
    product: Tensor = left @ right
    return product


def rotations(cross: Tensor) -> Tensor:
    """The same among rotations of each pair (i, i + half)."""
    half = len(cross) // 2
    real = cross[:half, :half].diagonal() + cross[half:, half:].diagonal()
    imaginary = cross[half:, :half].diagonal() - cross[:half, half:].diagonal()
    angle = torch.atan2(imaginary, real)
    cosine, sine = torch.diag(angle.cos()), torch.diag(angle.sin())
    return torch.cat([torch.cat([cosine, -sine], dim=1), torch.cat([sine, cosine], dim=1)])


BASELINES: dict[str, Baseline] = {
    "first": first,
    "mean": mean,
    "mean, rescaled": rescaled_mean,
    "mean, Procrustes-aligned": procrustes_mean,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "svd, weights only": {"refit": False, "text": None},
    "svd, no refit, keys as if at any angle": {"refit": False, "at_distances": False},
    "svd, no refit, neighbours": {"refit": False, "grouping": "contiguous"},
    "svd, no refit": {"refit": False},
    "svd, o_proj alone refitted": {"fit": Fit(0)},
    "svd": {},
}


def expanded(source: Source, prepared: Prepared) -> dict[str, Tensor]:
    """The merged tensors for the source's own class: each K/V head as often as that class has it."""
    tensors: dict[str, Tensor] = {}
    assert prepared.overlay is not None
    for layer in range(source.shape.num_hidden_layers):
        for part, name in projection_names(source, layer).items():
            tensors[name] = tensor = prepared.overlay.read(name)
            if part[0] in "kv":
                heads = tensor.unflatten(0, (-1, source.shape.head_dim))
                times = source.shape.num_key_value_heads // len(heads)
                tensors[name] = heads.repeat_interleave(times, dim=0).flatten(0, 1)
    return tensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("held_out")
    parser.add_argument("--calibration", action="append", required=True)
    parser.add_argument("--calibration-tokens", type=int, default=131072)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--max-windows", type=int)
    parser.add_argument("--precision", default=default_precision(), choices=["bf16", "fp32"])
    parser.add_argument("--groups", type=int, nargs="+", required=True)
    arguments = parser.parse_args()

    whole = Source.of(open_checkpoint(arguments.model))
    checkpoint, shape = whole.checkpoint, whole.shape
    windows = load_windows(
        arguments.model, TextSource(arguments.held_out), window=arguments.window, max_windows=arguments.max_windows
    )
    share = arguments.calibration_tokens // len(arguments.calibration)
    texts = [
        read_calibration_text(checkpoint, TextSource(path), num_tokens=share, sequence_length=arguments.window)
        for path in arguments.calibration
    ]
    text = CalibrationText(torch.cat([part.token_ids for part in texts]), ", ".join(arguments.calibration))
    model = load_model(arguments.model, dtype=torch.float32, device="cpu")
    original = evaluate(model, windows).nats_per_token
    print(f"original: perplexity {torch.tensor(original).exp():.2f}; calibration tokens: {text.num_tokens}", flush=True)

    def report(name: str, groups: int, tensors: dict[str, Tensor], seconds: float) -> None:
        for key, tensor in tensors.items():
            model.get_parameter(key).data = tensor.float()
        loss = evaluate(model, windows).nats_per_token
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        perplexity = torch.tensor(loss).exp()
        cells = (name, groups, f"{perplexity:.4g}", f"{loss - original:.4f}", f"{seconds:.1f}", f"{peak:.2f}")
        print(f"| {' | '.join(map(str, cells))} |", flush=True)

    print("| method | K/V heads | perplexity | excess | seconds | peak RSS so far, GB |\n|---|---|---|---|---|---|")
    for groups in arguments.groups:
        contiguous = HeadGrouping.contiguous(shape.num_key_value_heads, groups)
        for name, variant in VARIANTS.items():
            begin = time.monotonic()
            options = dict(variant)
            measured_on = options.pop("text", text)
            merge = HeadMerge(groups, **{"refit": measured_on is not None} | options)
            with tempfile.TemporaryDirectory() as scratch:
                hardware = Hardware(precision=arguments.precision)
                preparation = Preparation(Path(scratch), measured_on, hardware, keep_gram=True)
                prepared = merge_heads(whole, merge, preparation, Gqa(groups).result_config(whole))
                seconds = time.monotonic() - begin
                report(name, groups, expanded(whole, prepared), seconds)
                if name != "svd" or prepared.gram is None:
                    continue
                grams = [prepared.gram(layer) for layer in range(shape.num_hidden_layers)]
        for name, baseline in BASELINES.items():
            tensors: dict[str, Tensor] = {}
            begin = time.monotonic()
            for layer, gram in enumerate(grams):
                source = read_projections(whole, layer)
                result = baseline(source, shape, contiguous, gram)
                tensors |= projection_tensors(result, whole, layer)
            report(name, groups, tensors, time.monotonic() - begin)


if __name__ == "__main__":
    main()
