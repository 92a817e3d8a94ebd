"""The model card of a result: what it is, what made it, what it scored, what it is not good for, how to serve it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...configs import CALIBRATION_TEXT
from ..architectures.table import known_architecture
from ..checkpoint.files import write_text
from ..checkpoint.input_files import leads_outside, open_regular
from ..checkpoint.manifest import digest_file, renew_entries
from ..checkpoint.output import CARD_NAME, RECIPE_NAME
from ..checkpoint.tensors import CONFIG_NAME
from ..errors import CheckpointError
from ..printable import printable
from ..runtime import RUNTIME_CLASSES
from .engines import Serving, engines_line, serve_command, serving

__all__ = ["add_recipe", "add_to_card", "source_on_hub", "with_section", "write_card"]

_INHERITED = ("license", "license_name", "license_link", "language", "datasets")  # of the source's card
_METADATA = re.compile(r"\A\s*---[ \t]*\n(.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)
_MAX_CARD_BYTES = 2**20
_MAX_METADATA = 2**18  # characters; the parser of YAML takes a second for a hundred thousand
_MAX_ENTRIES = 1000
_FENCE = re.compile("`{3,}")
_LIMITS, _SERVING, _RECIPE = "What it is not good for", "Serving", "Recipe"
_ENTRY = re.compile(r"^(?=[A-Za-z_][\w-]*\s*:)", re.MULTILINE)  # where a key of the outermost level begins


def write_card(source: Path, target: Path, provenance: Mapping[str, Any]) -> None:
    """Write the card (README.md) of the checkpoint in `target`, which was made from the one in `source`.

    The card says what config.json says of the result, and `provenance`, the content of `kvconvert.json`. It declares
    the licence, language and datasets that the card in `source` declares. Where that card cannot be read, the new one
    says so in words, so that nobody takes the result for free of a licence.
    """
    from huggingface_hub import ModelCardData

    config = json.loads((target / CONFIG_NAME).read_text(encoding="utf-8"))
    name = printable(str(provenance.get("source", source.name)))
    inherited, problem = _inherited(source / CARD_NAME)
    base_model = source_on_hub(provenance)
    # the hub knows finetune, merge, quantized and adapter; of these a conversion without training is none
    relation: dict[str, Any] = {"base_model_relation": "finetune"} if base_model and "uptraining" in provenance else {}
    data = ModelCardData(
        base_model=base_model,
        **relation,
        library_name="transformers",
        tags=["kvconvert", *([str(provenance["target"])] if "target" in provenance else [])],
        **inherited,
    )
    write_text(target / CARD_NAME, f"---\n{data.to_yaml()}\n---\n\n{_text(name, config, provenance, problem)}")


def source_on_hub(provenance: Mapping[str, Any]) -> str | None:
    """Return the hub id of the source of a conversion, of which `provenance` is the record; None for a directory."""
    name = printable(str(provenance.get("source", "")))
    return name if "/" in name or (name and "source_revision" in provenance) else None


def add_recipe(directory: str | Path, recipe: str) -> None:
    """Write the recipe that made a result beside its weights and into its card, and both into its manifest.

    Raises CheckpointError for a directory without a card.
    """
    place = Path(directory)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", recipe)), default=0))
    shown = [f"{fence}yaml", *map(printable, recipe.splitlines()), fence]
    add_to_card(place, _RECIPE, "\n".join([f"`kvconvert run {RECIPE_NAME}` makes it again.", "", *shown]))
    write_text(place / RECIPE_NAME, recipe)
    renew_entries(place, [RECIPE_NAME])


def add_to_card(directory: Path, heading: str, text: str, metadata: Mapping[str, Any] | None = None) -> None:
    """Write a section of the card in a directory, in the place of one of that heading, and renew the manifest's entry.

    `metadata` are entries of the card's metadata, by their names there, which replace those that it has. Raises
    CheckpointError where there is no card that can be read.
    """
    path = directory / CARD_NAME
    try:
        card = path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise CheckpointError(
            f"{path}: there is no model card to add to", hint="give a directory that kvconvert wrote"
        ) from error
    write_text(path, with_section(_with_metadata(card, metadata or {}), heading, text))
    renew_entries(directory, [CARD_NAME])


def with_section(card: str, heading: str, text: str) -> str:
    """Return a card with a section of this heading and text: in the place of one that it has, else before the limits.

    Sections begin with a line "## heading", and fenced blocks are no headings.
    """
    sections = _sections(card)
    new = f"## {heading}\n\n{text.strip()}\n\n"
    headings = [section.partition("\n")[0].removeprefix("## ") for section in sections[1:]]
    if heading in headings:
        sections[1 + headings.index(heading)] = new
    else:
        before = next((index for index, each in enumerate(headings) if each in (_LIMITS, _SERVING)), len(headings))
        sections.insert(1 + before, new)
    return (
        "".join(section if section.endswith("\n\n") else f"{section.rstrip()}\n\n" for section in sections).rstrip()
        + "\n"
    )


def _sections(card: str) -> list[str]:
    """A card in pieces: what stands before the first section, then each section from its heading on."""
    sections, fence = [""], ""
    for line in card.splitlines(keepends=True):
        ticks = _FENCE.match(line)
        if ticks is not None and (not fence or line.rstrip() == fence):
            fence = "" if fence else ticks[0]
        if line.startswith("## ") and not fence:
            sections.append("")
        sections[-1] += line
    return sections


def _with_metadata(card: str, entries: Mapping[str, Any]) -> str:
    """The card with entries of its metadata replaced, as the hub's library writes them."""
    block = _METADATA.match(card)
    declared = None if block is None else _parsed(block[1])
    if not entries or block is None or declared is None:
        return card
    from huggingface_hub import ModelCardData

    data = ModelCardData(**{**declared, **entries}, ignore_metadata_errors=True)
    return f"---\n{data.to_yaml()}\n---{card[block.end() :]}"


def _inherited(card: Path) -> tuple[dict[str, Any], str | None]:
    """What the source's card declares of licence, language and datasets, and a sentence where not all could be read."""
    if not card.exists():
        return {}, None
    if leads_outside(card, card.parent) is not None:
        return {}, _unread("The original's model card could not be read (a link that leads out of the checkpoint)", {})
    try:
        with open_regular(card) as file:
            text = file.read(_MAX_CARD_BYTES).decode(errors="replace").replace("\r\n", "\n")
    except OSError as error:
        return {}, _unread(f"The original's model card could not be read ({error.strerror})", {})
    block = _METADATA.match(text)
    if block is None:
        return {}, None
    declared = _parsed(block[1]) if len(block[1]) <= _MAX_METADATA else None
    if declared is not None:
        return {key: declared[key] for key in _INHERITED if _is_plain(declared.get(key))}, None
    # one wrong entry makes the whole unreadable: each is read by itself
    named = [entry for entry in _ENTRY.split(block[1]) if entry.startswith(_INHERITED) and len(entry) <= _MAX_METADATA]
    entries = [entry for entry in map(_parsed, named[:_MAX_ENTRIES]) if entry]
    found = {key: entry[key] for key in _INHERITED for entry in entries if _is_plain(entry.get(key))}
    return found, _unread("The metadata of the original's model card could not be read as a whole", found)


def _is_plain(value: object) -> bool:
    """Whether a value is what a licence, a language or a data set is called: a short text, or some of them."""
    texts = value if isinstance(value, list) else [value]
    return len(texts) <= _MAX_ENTRIES and all(isinstance(text, str) and printable(text) == text for text in texts)


def _parsed(metadata: str) -> dict[str, Any] | None:
    """The metadata of a card as its library reads them, or None if it cannot."""
    from huggingface_hub import ModelCard

    try:
        return dict(ModelCard(f"---\n{metadata}\n---\n", ignore_metadata_errors=True).data.to_dict())
    except Exception:  # the parser behind the library has errors of its own
        return None


def _unread(problem: str, found: Mapping[str, Any]) -> str:
    if "license" in found:
        return f"{problem}. Its licence was read; compare what is declared above with the original."
    return f"{problem}, so no licence is declared above. The licence of the original holds: see there."


def _text(name: str, config: Mapping[str, Any], provenance: Mapping[str, Any], problem: str | None) -> str:
    model_type = str(config.get("model_type"))
    architecture = known_architecture(model_type)
    seq2seq = architecture is not None and architecture.cross_attention is not None
    changes = _changes(provenance)
    lines = [f"# {name}, with a smaller K/V cache" if changes else f"# {name}", ""]
    if changes:
        cache = provenance["cache_bytes_per_token"]
        lines += [
            f"Converted by kvconvert {provenance['kvconvert_version']} ({str(provenance['target']).upper()}, method "
            f"{provenance['method']}): {' and '.join(changes)}, and the "
            f"cache takes {cache['result']} bytes per token in 16 bits, where it took {cache['source']}"
            + (", and as much for each token of the encoder." if seq2seq else "."),
            "",
        ]
    training = provenance.get("uptraining")
    if training:
        lines += [f"Uptrained on {training['tokens']} tokens, objective: {training['objective']}.", ""]
    if model_type in RUNTIME_CLASSES:
        lines += [
            f"Its class, `{RUNTIME_CLASSES[model_type].architecture}`, is in the files beside the weights: open it "
            "with `trust_remote_code=True`, or `import kvconvert.convert` first.",
            "",
        ]
    if problem is not None:
        lines += [problem, ""]
    engines = serving(model_type, config) if architecture is not None else ()
    limits = _limits(config, provenance, engines, seq2seq=seq2seq, converted=bool(changes))
    if limits:
        lines += [f"## {_LIMITS}", "", *(f"- {limit}" for limit in limits), ""]
    if engines:
        lines += [f"## {_SERVING}", "", f"Served by: {engines_line(engines)}.", *_serving(engines, config)]
    return "\n".join(map(printable, lines))


def _limits(
    config: Mapping[str, Any],
    provenance: Mapping[str, Any],
    engines: Sequence[Serving],
    *,
    seq2seq: bool,
    converted: bool,
) -> list[str]:
    """What the manifest says of where the result is worse than the original, a sentence each."""
    found = []
    training, calibration = provenance.get("uptraining"), provenance.get("calibration")
    if converted and not training:
        found.append("It has not been uptrained, which recovers the quality that the conversion cost.")
    if calibration and calibration.get("data"):
        found.append(
            f"Its heads were fitted to {calibration['num_tokens']} tokens of {_text_name(calibration)}. On text of "
            "another kind it can lose more than on that."
        )
    elif calibration:
        found.append("It was merged by the weights alone, without a text to fit it to, which loses more than with one.")
    texts = [str(source["text"]["location"]) for source in (training or {}).get("data", ())]
    if texts:
        found.append(
            f"What came back by uptraining came back on {', '.join(texts)}. On text of another kind it can be less."
        )
    length, longest = (training or {}).get("sequence_length"), _context(config)
    if length and longest and length < longest:
        found.append(
            f"It was uptrained on sequences of {length} tokens. Nothing was trained on the rest of its {longest}."
        )
    if seq2seq and converted:
        found.append("Only the decoder's attention was converted; the encoder takes as much memory and time as before.")
    if provenance.get("nonfinite_values"):
        found.append(f"{len(provenance['nonfinite_values'])} of its tensors have values that are not finite.")
    return found + [f"{entry.engine} does not serve it: {entry.how}." for entry in engines if entry.works is False]


def _text_name(calibration: Mapping[str, Any]) -> str:
    """What the text of a calibration is called, which has a name of no meaning where it is kvconvert's own."""
    own = digest_file(CALIBRATION_TEXT.parent, CALIBRATION_TEXT.name).to_json()
    return "the text that ships with kvconvert" if calibration.get("data_files") == [own] else str(calibration["data"])


def _context(config: Mapping[str, Any]) -> int | None:
    """The longest context that a config allows, where it says that."""
    longest = config.get("max_position_embeddings", config.get("n_positions"))
    return longest if isinstance(longest, int) else None


def _serving(engines: Sequence[Serving], config: Mapping[str, Any]) -> list[str]:
    """What to type for each engine that serves the result."""
    model_type, names = str(config.get("model_type")), config.get("architectures") or []
    lines = [
        "Tested engines gave the same greedy tokens as transformers for a checkpoint of this class, not for this very "
        "one. MODEL is this directory, or its name on the hub.",
        "",
    ]
    if names:
        auto, trust = _opened_by(model_type, str(names[0]))
        lines += ["```python", f"from transformers import {auto}, AutoTokenizer", ""]
        lines += [f'model = {auto}.from_pretrained("MODEL"{trust}, dtype="auto")']
        lines += ['tokenizer = AutoTokenizer.from_pretrained("MODEL")', "```", ""]
    for entry in engines:
        command = serve_command(entry, model_type)
        if command is not None:
            lines += ["```bash", f"# {engines_line([entry])}", command, "```", ""]
    return ["", *lines]


def _opened_by(model_type: str, class_name: str) -> tuple[str, str]:
    """The class of transformers that opens a checkpoint, and the argument that code beside it needs."""
    if model_type in RUNTIME_CLASSES:
        autos = RUNTIME_CLASSES[model_type].auto_models
        return next(
            (auto for auto, name in autos.items() if name == class_name), "AutoModel"
        ), ", trust_remote_code=True"
    return ("AutoModelForCausalLM" if class_name.endswith("ForCausalLM") else class_name), ""


def _changes(provenance: Mapping[str, Any]) -> list[str]:
    """What there is less of than in the source, in words."""
    changes = []
    heads = provenance.get("num_key_value_heads", {"source": 0, "result": 0})
    if heads["source"] != heads["result"] or "head_dim" in provenance:
        sizes = provenance.get("head_dim")
        source, result = (f" of {sizes[which]}" if sizes else "" for which in ("source", "result"))
        changes.append(f"{heads['source']} K/V heads{source} in each layer became {heads['result']}{result}")
    layers = provenance.get("num_key_value_layers", {"source": 0, "result": 0})
    if layers["source"] != layers["result"]:
        changes.append(f"{layers['source']} layers share the keys and values of {layers['result']}")
    latent = provenance.get("latent")
    if latent:
        changes = [
            f"the keys and values of {heads['source']} heads in each layer became a latent of "
            f"{latent['kv_lora_rank']} numbers and a rotary key of {latent['qk_rope_head_dim']}"
        ]
    return changes
