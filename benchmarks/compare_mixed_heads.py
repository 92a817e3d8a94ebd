"""Held-out loss right after merging K/V heads, with a number of heads for each layer against one number for all.

    python benchmarks/compare_mixed_heads.py MODEL HELD_OUT --calibration TEXT --budgets 1/2 1/4 [--all]

MODEL is of a class with Llama's projections. A budget is a fraction of its K/V cache; a layer may keep any number of
heads that divides those it has. The damage of a number of heads in a layer is E ‖h' − h‖² / ‖h‖² of the hidden states
that leave the layer, where h' are those of the merged layer and both read what the original's layer reads. For each
budget the numbers of least total damage are converted, and the same number for all layers where the budget has one;
with --all every choice that leaves no room for another head. Excess is nats per token over the original.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import pairwise, product
from typing import Any

import torch
from kvconvert.convert import Gqa, Source, TextSource, open_checkpoint
from kvconvert.convert.algebra.attention_shape import AttentionShape
from kvconvert.convert.algebra.head_merge import Heads, LayerInput, merge_layers
from kvconvert.convert.algebra.head_search import best_grouping
from kvconvert.convert.architectures.projections import projection_tensors, read_projections
from kvconvert.convert.calibration.fitting import Fit, relative_error
from kvconvert.convert.calibration.streams import CPU, NewLayer, OriginalAttention, Stream
from kvconvert.convert.calibration.text import CalibrationText, read_calibration_text
from kvconvert.convert.checkpoint.loading import empty_model, load_model
from kvconvert.convert.methods.merging import free_transformations
from kvconvert.measure.held_out import load_windows
from kvconvert.measure.perplexity import evaluate
from torch import Tensor, nn

REFIT_RIDGE = 0.2  # that of Gqa
TRIAL_TOKENS = 4096  # that damage is measured on

Damages = Mapping[tuple[int, int], float]
"""What is lost if layer l alone keeps g heads, for pairs (l, g)."""


def with_heads(model: Any, shape: AttentionShape, numbers: Sequence[int]) -> Any:
    """The model, in place, with new k_proj and v_proj of so many heads for each layer."""
    for layer, number in zip(model.base_model.layers, numbers, strict=True):
        attention = layer.self_attn
        for name in ("k_proj", "v_proj"):
            old = getattr(attention, name)
            new = nn.Linear(
                old.in_features,
                number * shape.head_dim,
                bias=old.bias is not None,
                device=old.weight.device,
                dtype=old.weight.dtype,
            )
            setattr(attention, name, new)
        attention.num_key_value_groups = shape.num_attention_heads // number
    return model


@dataclass(frozen=True)
class MixedSource(Source):
    """A source whose class has a number of K/V heads for each layer; its checkpoint has the original's tensors."""

    numbers: tuple[int, ...] = ()

    @cached_property
    def empty_model(self) -> Any:
        return with_heads(empty_model(self.checkpoint.config), self.shape, self.numbers)

    @classmethod
    def of_numbers(cls, source: Source, numbers: Sequence[int]) -> MixedSource:
        return cls(source.checkpoint, source.architecture, tuple(numbers))


class Merges:
    """The tensors of each layer with fewer heads, merged in closed form; each is made once."""

    def __init__(self, source: Source, text: CalibrationText) -> None:
        self._source = source
        self._made: dict[tuple[int, int], dict[str, Tensor]] = {}
        original, self._grams = Stream.of(source, text, CPU), list[Tensor]()
        for layer in range(source.shape.num_hidden_layers):
            self._grams += original.moments([layer])[0]
            original.advance(layer)

    def tensors(self, layer: int, number: int) -> dict[str, Tensor]:
        if (layer, number) not in self._made:
            self._made[layer, number] = self._merged(layer, number)
        return dict(self._made[layer, number])

    def _merged(self, layer: int, number: int) -> dict[str, Tensor]:
        source, projections = self._source, read_projections(self._source, layer)
        if number < source.shape.num_key_value_heads:
            inputs = LayerInput(projections, self._grams[layer])
            heads = Heads([inputs], source.shape, free_transformations(source, layer))
            grouping = heads.in_order(1) if number == 1 else best_grouping(heads, number)
            projections = merge_layers(heads, grouping).projections[0]
        return projection_tensors(projections, source, layer)


def measure_damages(source: Source, merges: Merges, text: CalibrationText, options: Sequence[int]) -> Damages:
    shape = source.shape
    text = CalibrationText(text.token_ids[: TRIAL_TOKENS // text.token_ids.shape[1]], text.description)
    original = Stream.of(source, text, CPU)
    models = {
        number: Stream.of(MixedSource.of_numbers(source, [number] * shape.num_hidden_layers), text, CPU).model
        for number in options
        if number < shape.num_key_value_heads
    }
    damages: dict[tuple[int, int], float] = {}
    for layer in range(shape.num_hidden_layers):
        entering = original.states()
        original.advance(layer)
        damages[layer, shape.num_key_value_heads] = 0.0
        for number, model in models.items():
            with torch.no_grad(), model.layer(layer, merges.tensors(layer, number)) as module:
                errors = [
                    relative_error(model.run(module, layer, states).flatten(0, 1), wanted.flatten(0, 1))
                    for states, wanted in zip(entering, original.states(), strict=True)
                ]
            damages[layer, number] = sum(error.item() for error in errors) / len(errors)
    return damages


def best_numbers(damages: Damages, num_layers: int, options: Sequence[int], budget: int) -> tuple[int, ...]:
    """The numbers of heads of least total damage, of at most `budget` in all."""
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}  # of the layers so far, by the heads they take
    for layer in range(num_layers):
        longer: dict[int, tuple[float, tuple[int, ...]]] = {}
        for (used, (damage, numbers)), number in product(best.items(), options):
            candidate = (damage + damages[layer, number], (*numbers, number))
            longer[used + number] = min(longer.get(used + number, candidate), candidate)
        best = longer
    return min(choice for used, choice in best.items() if used <= budget)[1]


def all_numbers(num_layers: int, options: Sequence[int], budget: int) -> Iterator[tuple[int, ...]]:
    """All numbers of heads within the budget of which no layer's can be raised."""
    higher = dict(pairwise(options))
    for numbers in product(options, repeat=num_layers):
        room = budget - sum(numbers)
        if room >= 0 and all(number not in higher or higher[number] - number > room for number in numbers):
            yield numbers


def converted(source: Source, merges: Merges, text: CalibrationText, numbers: Sequence[int], fit: Fit) -> Any:
    """The model with so many heads for each layer, its attention fitted to the original's as `Gqa` does it."""
    shape, whole = source.shape, source.shape.num_key_value_heads
    model = load_model(source.checkpoint.directory, dtype=torch.float32, device="cpu")
    result = with_heads(copy.deepcopy(model), shape, numbers)
    weights = dict(model.named_parameters())
    original, merged = Stream.of(source, text, CPU), Stream.of(MixedSource.of_numbers(source, numbers), text, CPU)
    first = next((layer for layer, number in enumerate(numbers) if number < whole), len(numbers))
    for layer, number in enumerate(numbers):
        if layer < first:  # as it was, and so are its inputs: there is nothing to fit
            tensors = merges.tensors(layer, number)
            original.advance(layer)
            merged.advance(layer)
        else:
            attention = OriginalAttention(read_projections(source, layer).o, original.states(), [])
            original.advance(layer, attention.head_outputs)
            output = source.architecture.tensor_name(layer, "o_proj")
            new = NewLayer(layer, merges.tensors(layer, number), output, attention)
            merged.refit(new, ridge=REFIT_RIDGE, fit=fit)
            tensors = new.tensors
        weights |= tensors
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            parameter.copy_(weights[name])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("held_out")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--calibration-tokens", type=int, default=32768)
    parser.add_argument("--calibration-sequence-length", type=int, default=256)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--max-windows", type=int)
    parser.add_argument("--budgets", type=Fraction, nargs="+", default=[Fraction(1, 2), Fraction(1, 4)])
    parser.add_argument("--fit-steps", type=int)
    parser.add_argument("--all", action="store_true")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    held_out = TextSource(arguments.held_out)
    windows = load_windows(arguments.model, held_out, window=arguments.window, max_windows=arguments.max_windows)
    with Gqa(1, merge="svd").source(open_checkpoint(arguments.model)) as source:
        shape = source.shape
        num_layers, whole = shape.num_hidden_layers, shape.num_key_value_heads
        options = [number for number in range(1, whole + 1) if whole % number == 0]
        if min(arguments.budgets) * whole < 1:
            parser.error(f"a budget of {min(arguments.budgets)} leaves less than one of {whole} heads to a layer")
        text = read_calibration_text(
            source.checkpoint,
            TextSource(arguments.calibration),
            num_tokens=arguments.calibration_tokens,
            sequence_length=arguments.calibration_sequence_length,
        )
        merges = Merges(source, text)
        damages = measure_damages(source, merges, text, options)
        print("| layer |", *(f"{number} of {whole} heads |" for number in options[:-1]))
        print("|---|" + "---|" * len(options[:-1]))
        for layer in range(num_layers):
            print(f"| {layer} |", *(f"{damages[layer, number]:.4f} |" for number in options[:-1]))
        original = load_model(arguments.model, dtype=torch.float32, device="cpu")
        print("\n| budget | heads of each layer | in all | damage | excess |\n|---|---|---|---|---|", flush=True)
        for budget in arguments.budgets:
            num_heads = int(budget * whole * num_layers)
            chosen = [best_numbers(damages, num_layers, options, num_heads)]
            if num_heads % num_layers == 0 and num_heads // num_layers in options:
                chosen.append((num_heads // num_layers,) * num_layers)
            if arguments.all:
                chosen += all_numbers(num_layers, options, num_heads)
            for numbers in dict.fromkeys(chosen):
                model = converted(source, merges, text, numbers, Fit(arguments.fit_steps))
                against = evaluate(model, windows, original=original).against
                assert against is not None
                damage = sum(damages[place] for place in enumerate(numbers))
                excess = f"{against.excess_nats_per_token:.4f} ± {against.excess_standard_error:.4f}"
                listed = " ".join(map(str, numbers))
                print(f"| {budget} | {listed} | {sum(numbers)} | {damage:.4f} | {excess} |", flush=True)


if __name__ == "__main__":
    main()
