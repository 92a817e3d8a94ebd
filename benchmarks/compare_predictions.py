"""Held-out loss of CLA2 right after merging, by how strongly predictions of a layer's keys and values are pulled.

    python benchmarks/compare_predictions.py MODEL HELD_OUT --calibration TEXT [--pull 0 0.3 1 3 10]

The pull is λ of docs/merging.md ("Layers that share"), in mean diagonals of C; 0 is plain least squares. Excess is nats
per token over the original, nothing trained.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from kvconvert.convert import Cla, LayerGrouping, TextSource, as_cross_layer, execute, open_checkpoint
from kvconvert.convert.calibration.fitting import Fit
from kvconvert.convert.calibration.streams import Hardware
from kvconvert.convert.calibration.text import read_calibration_text
from kvconvert.convert.checkpoint.loading import load_model
from kvconvert.convert.device import default_precision
from kvconvert.convert.methods.merging import HeadMerge, merge_heads
from kvconvert.convert.methods.prepared import Preparation
from kvconvert.measure.held_out import load_windows
from kvconvert.measure.perplexity import evaluate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("held_out")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--calibration-tokens", type=int, default=32768)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--max-windows", type=int)
    parser.add_argument("--pull", type=float, nargs="+", default=[0, 0.3, 1, 3, 10])
    arguments = parser.parse_args()

    held_out = TextSource(arguments.held_out)
    windows = load_windows(arguments.model, held_out, window=arguments.window, max_windows=arguments.max_windows)
    original = evaluate(load_model(arguments.model, dtype=torch.float32, device="cpu"), windows).nats_per_token
    source = as_cross_layer(open_checkpoint(arguments.model))
    text = read_calibration_text(
        source.checkpoint,
        TextSource(arguments.calibration),
        num_tokens=arguments.calibration_tokens,
        sequence_length=arguments.window,
    )
    layers = LayerGrouping.uniform(source.shape.num_hidden_layers, 2)
    plan = Cla(layers, merge="svd").plan(source)
    hardware = Hardware(precision=default_precision())
    print("| pull | excess |\n|---|---|")
    for pull in arguments.pull:
        merge = HeadMerge(source.shape.num_key_value_heads, layers, fit=Fit(0), prediction_pull=pull)
        with tempfile.TemporaryDirectory() as folder:
            prepared = merge_heads(source, merge, Preparation(Path(folder), text, hardware), plan.config)
            execute(plan, source.checkpoint, Path(folder) / "out", prepared.overlay)
            model = load_model(Path(folder) / "out", dtype=torch.float32, device="cpu")
        print(f"| {pull:g} | {evaluate(model, windows).nats_per_token - original:.4f} |", flush=True)


if __name__ == "__main__":
    main()
