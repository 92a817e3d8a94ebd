"""What there is to tell of a run: sections of facts, tables, pictures and texts, made from what its stages measured.

Every number is one of `run_status.json`, `evaluation.json` or `benchmark.json`, written for people. Reports and cards
are drawn from these sections and compute nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..convert.checkpoint.json_files import read_object
from ..convert.checkpoint.manifest import read_provenance
from ..convert.checkpoint.tensors import CONFIG_NAME
from ..convert.describe.engines import engines_line, serving
from ..measure.gates import GATE_FORMATS
from .recipe_schema import Recipe
from .run_records import RunStatus
from .run_stages import BENCHMARK_NAME, EVALUATION_NAME

__all__ = ["Fact", "SampleText", "Section", "Story", "Table", "story_of"]

_TARGETS = {"gqa": "GQA", "mqa": "MQA", "cla": "CLA", "mla": "MLA"}
_GATES = {
    "max_ppl_increase": "perplexity above the original's, at most",
    "min_recovery": "excess loss won back, at least",
    "max_kl": "KL to the original in nats per token, at most",
    "baseline": "nats per token above the baseline's, at most",
}


@dataclass(frozen=True)
class Fact:
    """A number or a name, what it is, and what belongs to it."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Rows under headings; cells of numbers stand to the right."""

    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class SampleText:
    """How the result and the original go on behind one prompt."""

    prompt: str
    result: str
    original: str | None
    note: str


@dataclass(frozen=True)
class Section:
    """A part of the story; what it does not have is left out. Pictures are names of files below the report."""

    title: str
    text: tuple[str, ...] = ()
    facts: tuple[Fact, ...] = ()
    tables: tuple[Table, ...] = ()
    pictures: tuple[tuple[str, str], ...] = ()
    samples: tuple[SampleText, ...] = ()
    code: str = ""


@dataclass(frozen=True)
class Story:
    """A run as it is told: its heading, the verdict of its gates, what matters most, and the sections."""

    title: str
    lead: str
    verdict: str | None
    headline: tuple[Fact, ...]
    sections: tuple[Section, ...] = field(default_factory=tuple)


def story_of(place: Path, recipe: Recipe, status: RunStatus, resolved: str, model: Path) -> Story:
    """Tell a run whose stages are done; `resolved` is its recipe as YAML, `model` the checkpoint that it ended with."""
    evaluation = _read(place / EVALUATION_NAME) if "evaluate" in status.stages else {}
    timed = _read(place / BENCHMARK_NAME) if "benchmark" in status.stages else {}
    conversion: Mapping[str, Any] = status.stages["convert"].summary if "convert" in status.stages else {}
    training: Mapping[str, Any] = status.stages["uptrain"].summary if "uptrain" in status.stages else {}
    manifest = read_provenance(model)
    name = _name_of(recipe, manifest)
    gates = evaluation.get("gates", [])
    sections = [
        _gates_section(gates),
        _conversion_section(conversion, manifest),
        _quality_section(evaluation, conversion),
        _layers_section(conversion),
        _training_section(training),
        _speed_section(timed),
        _samples_section(evaluation),
        _serving_section(model),
        _limits_section(conversion, training, evaluation),
        _cost_section(status, training),
        _provenance_section(manifest),
        Section("Recipe", text=("Run it again with `kvconvert run recipe.yaml`.",), code=resolved),
    ]
    return Story(
        title=recipe.report.title or _title(name, conversion),
        lead=_lead(name, conversion, training),
        verdict=_verdict(gates),
        headline=tuple(_headline(conversion, evaluation, timed, training)),
        sections=tuple(section for section in sections if section is not None),
    )


def _read(path: Path) -> dict[str, Any]:
    return dict(read_object(path))


def _name_of(recipe: Recipe, manifest: Mapping[str, Any]) -> str:
    path = Path(recipe.model).expanduser()
    local = path.resolve().name if path.is_dir() else recipe.model
    return local if recipe.convert is not None else str(manifest.get("source", local))


def _title(name: str, conversion: Mapping[str, Any]) -> str:
    return f"{name} → {_TARGETS[conversion['target']]}" if conversion else name


def _lead(name: str, conversion: Mapping[str, Any], training: Mapping[str, Any]) -> str:
    done = [f"converted from {name}: {_change(conversion)}"] if conversion else []
    done += [f"uptrained on {_count(training['tokens'])} tokens ({training['objective']})"] if training else []
    return f"{', then '.join(done)[:1].upper()}{', then '.join(done)[1:]}." if done else f"{name}, measured."


def _change(conversion: Mapping[str, Any]) -> str:
    heads, layers = conversion["num_key_value_heads"], conversion["num_key_value_layers"]
    if conversion["latent"]:
        latent = conversion["latent"]
        return (
            f"keys and values of {heads['source']} heads in each layer became a latent of {latent['kv_lora_rank']} "
            f"numbers and a rotary key of {latent['qk_rope_head_dim']}"
        )
    parts = []
    if heads["source"] != heads["result"] or "head_dim" in conversion:
        sizes = conversion.get("head_dim")
        source, result = (f" of {sizes[which]}" if sizes else "" for which in ("source", "result"))
        parts.append(f"{heads['source']} K/V heads{source} in each layer became {heads['result']}{result}")
    if layers["source"] != layers["result"]:
        parts.append(f"{layers['source']} layers share the keys and values of {layers['result']}")
    return " and ".join(parts) or "no head changed"


def _headline(
    conversion: Mapping[str, Any], evaluation: Mapping[str, Any], timed: Mapping[str, Any], training: Mapping[str, Any]
) -> Iterator[Fact]:
    if conversion:
        cache = conversion["cache_bytes_per_token"]
        share = f"1/{cache['source'] / cache['result']:.4g} of {cache['source']}"
        yield Fact("K/V cache", f"{cache['result']} bytes per token", f"{share}, in 16 bits")
    against = evaluation.get("against")
    if against:
        yield Fact(
            "Perplexity", f"{evaluation['perplexity']:.4g}", f"{against['original_perplexity']:.4g} of the original"
        )
        yield Fact(
            "Excess loss",
            _with_error(against["excess_nats_per_token"], against["excess_standard_error"]),
            "nats per token above the original",
        )
        yield Fact(
            "KL to the original",
            _with_error(against["kl_nats_per_token"], against["kl_standard_error"]),
            f"nats per token; the most likely token is the same for {against['top1_agreement']:.1%}",
        )
    elif evaluation:
        yield Fact("Perplexity", f"{evaluation['perplexity']:.4g}", "")
    gains = [point for point in timed.get("points", ()) if point["decode_gain"]]
    if gains:
        best = max(gains, key=lambda point: point["batch"] * point["context"])
        gain = best["decode_gain"]
        yield Fact(
            "Decoding",
            f"{gain['ratio']:.2f} × as fast",
            f"batch {best['batch']}, context {best['context']}; rounds {gain['least']:.2f} to {gain['greatest']:.2f}",
        )


def _verdict(gates: Sequence[Mapping[str, Any]]) -> str | None:
    if not gates:
        return None
    failed = sum(not gate["passed"] for gate in gates)
    return f"{failed} of {len(gates)} gates failed" if failed else f"all gates passed ({len(gates)})"


def _gates_section(gates: Sequence[Mapping[str, Any]]) -> Section | None:
    if not gates:
        return None
    rows = []
    for gate in gates:
        form = GATE_FORMATS[gate["name"]].format
        error = gate["standard_error"]
        spread = "" if error is None else f" ± {form(error)}"
        name = _GATES[gate["name"]] if gate["task"] is None else f"score kept on {gate['task']}, at least"
        verdict = "passed" if gate["passed"] else "failed"
        rows.append((name, form(gate["threshold"]), f"{form(gate['value'])}{spread}", verdict))
    return Section("Gates", tables=(Table(("gate", "limit", "value", "verdict"), tuple(rows)),))


def _conversion_section(conversion: Mapping[str, Any], manifest: Mapping[str, Any]) -> Section | None:
    if not conversion:
        return None
    cache, weights = conversion["cache_bytes_per_token"], conversion["weight_bytes"]
    facts = [
        Fact("What changed", _change(conversion)),
        Fact("Method", conversion["method"], _calibration(manifest)),
        Fact("K/V cache", f"{cache['source']} → {cache['result']} bytes per token", "16 bits per number"),
        Fact("Weights", f"{_bytes(weights['source'])} → {_bytes(weights['result'])}"),
        Fact("Class", str(conversion.get("opened_as") or conversion["model_type"]), "which opens the result"),
    ]
    left = conversion.get("left_behind") or {}
    note = (f"Left behind: {', '.join(f'{name} ({why})' for name, why in left.items())}.",) if left else ()
    return Section("What was converted", text=note, facts=tuple(facts))


def _calibration(manifest: Mapping[str, Any]) -> str:
    text = manifest.get("calibration")
    if not isinstance(text, dict):
        return ""
    of = text.get("data")
    tokens = text.get("num_tokens") or text.get("tokens")
    return f"measured on {of}" + (f", {_count(tokens)} tokens" if isinstance(tokens, int) else "") if of else ""


def _quality_section(evaluation: Mapping[str, Any], conversion: Mapping[str, Any]) -> Section | None:
    if not evaluation:
        return None
    against, recovery = evaluation["against"], evaluation["recovery"]
    rows: list[tuple[str, ...]] = []
    if against:
        nats = against["original_nats_per_token"]
        rows.append(("original", f"{against['original_perplexity']:.4g}", f"{nats:.4f}", "0", "0", ""))
    if recovery:
        before = recovery["before_nats_per_token"]
        excess = f"{recovery['before_excess_nats_per_token']:.4f}"
        rows.append(("converted", f"{math.exp(before):.4g}", f"{before:.4f}", excess, "", ""))
    rows.append(_quality_row("uptrained" if recovery else evaluation["model"], evaluation))
    tables = [
        Table(
            ("model", "perplexity", "nats/token", "excess", "KL", "top-1 agrees"),
            tuple(rows),
            f"{', '.join(evaluation['data'])}: {evaluation['num_tokens']} tokens scored; {evaluation['method']}. "
            "±: one standard error over windows; excess: loss above the original's, windows paired.",
        )
    ]
    if evaluation["by_source"]:
        each = tuple(_quality_row(text, found) for text, found in evaluation["by_source"].items())
        tables.append(Table(("text", "perplexity", "nats/token", "excess", "KL", "top-1 agrees"), each))
    if len(evaluation["positions"]) > 1:
        tables.append(_positions(evaluation["positions"]))
    if evaluation["tasks"]:
        tables.append(_tasks(evaluation["tasks"]))
    text = []
    if recovery and recovery["recovered"] is not None:
        error = recovery["standard_error"]
        spread = "" if error is None else f" ± {error:.1%}"
        text.append(f"Uptraining won back {recovery['recovered']:.1%}{spread} of the excess loss.")
    pictures = (("quality.png", "Excess loss against the size of the cache"),) if against and conversion else ()
    return Section("Quality", text=tuple(text), tables=tuple(tables), pictures=pictures)


def _quality_row(name: str, evaluation: Mapping[str, Any]) -> tuple[str, ...]:
    against = evaluation["against"]
    cells = [name, f"{evaluation['perplexity']:.4g}"]
    cells.append(_with_error(evaluation["nats_per_token"], evaluation["standard_error"]))
    if not against:
        return (*cells, "", "", "")
    return (
        *cells,
        _with_error(against["excess_nats_per_token"], against["excess_standard_error"]),
        _with_error(against["kl_nats_per_token"], against["kl_standard_error"]),
        f"{against['top1_agreement']:.1%}",
    )


def _positions(positions: Sequence[Mapping[str, Any]]) -> Table:
    rows = tuple(
        (
            f"{each['first_position']} to {each['last_position']}",
            str(each["num_tokens"]),
            f"{each['nats_per_token']:.4f}",
            ""
            if each["excess_nats_per_token"] is None
            else _with_error(each["excess_nats_per_token"], each["excess_standard_error"]),
        )
        for each in positions
    )
    note = "By how many tokens stand before: what is lost at long range shows here."
    return Table(("tokens before", "tokens scored", "nats/token", "excess"), rows, note)


def _tasks(tasks: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for task in tasks:
        metric, original = task["metric"], task.get("original_metrics") or {}
        value, of_original = task["metrics"][metric], original.get(metric)
        error = task["standard_errors"].get(metric)
        rows.append(
            (
                task["task"],
                metric,
                _with_error(value, error),
                "" if of_original is None else f"{of_original:.4f}",
                str(task["num_samples"]),
            )
        )
    note = "Scores by lm-evaluation-harness."
    return Table(("task", "metric", "result", "original", "examples"), tuple(rows), note)


def _layers_section(conversion: Mapping[str, Any]) -> Section | None:
    layers = conversion.get("layers") or []
    if not layers:
        return None
    rows = []
    for layer in layers:
        fit = layer["fits"][0] if layer["fits"] else None
        rows.append(
            (
                ", ".join(map(str, layer["layers"])),
                f"{min(layer['keys_retained']):.1%}",
                f"{min(layer['values_retained']):.1%}",
                "" if fit is None else f"{fit['loss_before']:.3g}",
                "" if fit is None else f"{fit['loss_after']:.3g}",
            )
        )
    note = (
        "Kept: the energy of keys and values, as queries and outputs see it, in the worst group of each layer. Error: "
        "the relative squared error of the hidden states after the layer's attention, before and after gradient steps, "
        "on a part of the text that was kept aside."
    )
    headings = ("layer", "keys kept", "values kept", "error before", "error after")
    return Section(
        "What each layer kept",
        tables=(Table(headings, tuple(rows), note),),
        pictures=(("layers.png", "Energy kept and error of each layer"),),
    )


def _training_section(training: Mapping[str, Any]) -> Section | None:
    if not training:
        return None
    settings, budget, start = training["settings"], training["budget"], training["start"]
    part = budget["fraction_of_pretraining"]
    rate = settings["learning_rate"] if start is None else start["peak_learning_rate"]
    held_out = training["held_out_nats_per_token"]
    passes = training["passes"]
    facts = [
        Fact("Objective", training["objective"], "to the original" if _teacher(training) else ""),
        Fact(
            "Length",
            f"{_count(training['tokens'])} tokens",
            f"{settings['steps']} steps" + ("" if part is None else f", {part:.3%} of pretraining"),
        ),
        Fact("Passes over the text", "at most one" if passes is None else f"{passes:.2g}"),
        Fact("Peak learning rate", f"{rate:.2g}", f"{settings['lr_scheduler']}, {settings['precision']}"),
    ]
    if start is not None:
        facts.append(Fact("KL at the start", f"{start['kl_nats_per_token']:.4f}", "nats per token, from the teacher"))
    if held_out["after"] is not None:
        before = "" if held_out["before"] is None else f"{held_out['before']:.4f} before"
        facts.append(Fact("Held-out loss", f"{held_out['after']:.4f} nats per token", before))
    return Section(
        "Uptraining", facts=tuple(facts), pictures=(("training.png", "Loss over the tokens of the uptraining"),)
    )


def _teacher(training: Mapping[str, Any]) -> bool:
    return training["teacher"] not in (None, "None")


def _speed_section(timed: Mapping[str, Any]) -> Section | None:
    if not timed:
        return None
    rows = []
    for point in timed["points"]:
        result, original, gain = point["result"], point["original"], point["decode_gain"]
        rows.append(
            (
                str(point["batch"]),
                str(point["context"]),
                *(_milliseconds(each) for each in (original, result)),
                "" if gain is None else f"{gain['ratio']:.2f}",
                "" if gain is None else f"{gain['least']:.2f} to {gain['greatest']:.2f}",
                "" if gain is None or gain["bound"] is None else f"{gain['bound']:.2f}",
                *("" if each is None else _bytes(each["cache_bytes"]) for each in (original, result)),
            )
        )
    headings = ("batch", "context", "original, ms", "result, ms", "gain", "in rounds", "bound")
    machine = timed["machine"]
    count = machine.get("threads")
    threads = f", {count} thread{'s' * (count > 1)}" if count else ""
    note = (
        f"Decoding, a step of which gives each sequence a token, on {machine['device']}{threads}, {timed['dtype']}; "
        f"{timed['method']}. Bound: the bytes that a step has to read, weights and cache, of the original over the "
        "result's. A gain whose rounds lie on both sides of 1 shows no difference."
    )
    table = Table((*headings, "original's cache", "result's cache"), tuple(rows), note)
    return Section(
        "Speed and memory", tables=(table,), pictures=(("decode.png", "Time of a decoding step against the context"),)
    )


def _samples_section(evaluation: Mapping[str, Any]) -> Section | None:
    samples = [
        SampleText(
            each["prompt"],
            each["continuation"],
            each["original"],
            "" if each["equal_tokens"] is None else f"the first {each['equal_tokens']} tokens are equal",
        )
        for each in evaluation.get("samples", ())
    ]
    if not samples:
        return None
    text = ("The most likely continuation of held-out text, of the result and of the original.",)
    return Section("Side by side", text=text, samples=tuple(samples))


def _serving_section(model: Path) -> Section | None:
    config = _read(model / CONFIG_NAME)
    line = engines_line(serving(str(config.get("model_type")), config))
    return Section("Serving", text=(f"Served by: {line}.",)) if line else None


def _limits_section(
    conversion: Mapping[str, Any], training: Mapping[str, Any], evaluation: Mapping[str, Any]
) -> Section | None:
    text = []
    if conversion and not training:
        text.append("It was not uptrained, which wins back quality that a conversion costs.")
    if evaluation:
        text.append(
            f"Its quality was measured on {', '.join(evaluation['data'])} alone; text of another kind may lose more."
        )
    elif conversion:
        text.append("Its quality was not measured.")
    return Section("What it was not shown to be good for", text=tuple(text)) if text else None


def _cost_section(status: RunStatus, training: Mapping[str, Any]) -> Section:
    rows = [(name, f"{record.seconds:.1f}") for name, record in status.stages.items()]
    facts = []
    if training:
        cost = training["cost"]
        facts.append(Fact("Uptraining", f"{cost['flops']:.3g} FLOPs", f"{cost['h100_hours']:.3g} hours of one H100"))
        facts.append(Fact("Tokens", _count(training["tokens"])))
    total = sum(record.seconds for record in status.stages.values())
    whole = f"{total / 3600:.3g} hours" if total >= 3600 else f"{total:.0f} seconds"
    note = f"{whole} in all, by the clock. Of a stage that was interrupted, only the part since it was resumed counts."
    table = Table(("stage", "seconds"), tuple(rows), note)
    return Section("Cost", facts=tuple(facts), tables=(table,))


def _provenance_section(manifest: Mapping[str, Any]) -> Section | None:
    if not manifest:
        return None
    versions = manifest.get("versions", {})
    facts = [
        Fact("Original", str(manifest.get("source")), str(manifest.get("source_revision", ""))),
        Fact("kvconvert", str(manifest.get("kvconvert_version"))),
        Fact("Libraries", ", ".join(f"{name} {number}" for name, number in versions.items())),
    ]
    listed: list[tuple[str, ...]] = []
    for what, key in (("original", "source_files"), ("result", "files")):
        for file in manifest.get(key, ()):
            if str(file["name"]).endswith((".safetensors", ".bin", ".json")):
                listed.append((what, file["name"], str(file["size"]), file["digest"][:16]))
    note = "The first 16 digits of each SHA-256; `kvconvert verify` compares all of them."
    table = Table(("of", "file", "bytes", "SHA-256"), tuple(listed), note)
    return Section("Provenance", facts=tuple(facts), tables=(table,))


def _milliseconds(timing: Mapping[str, Any] | None) -> str:
    return "out of memory" if timing is None else f"{1e3 * timing['decode']['median']:.4g}"


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" if error is None or math.isnan(error) else f"{value:.4f} ± {error:.4f}"


def _count(count: int) -> str:
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if count >= size:
            return f"{count / size:.4g}{unit}"
    return f"{count:,}"


def _bytes(count: int) -> str:
    for size, unit in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"
