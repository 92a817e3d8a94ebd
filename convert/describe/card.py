"""The model card of a result: what it is, what made it, which engines serve it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..architectures.table import known_architecture
from ..checkpoint.files import write_text
from ..checkpoint.input_files import leads_outside, open_regular
from ..checkpoint.output import CARD_NAME
from ..checkpoint.tensors import CONFIG_NAME
from ..printable import printable
from ..runtime import RUNTIME_CLASSES
from .engines import engines_line, serving

__all__ = ["write_card"]

_INHERITED = ("license", "license_name", "license_link", "language", "datasets")  # of the source's card
_METADATA = re.compile(r"\A\s*---[ \t]*\n(.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)
_MAX_CARD_BYTES = 2**20
_MAX_METADATA = 2**18  # characters; the parser of YAML takes a second for a hundred thousand
_MAX_ENTRIES = 1000
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
    data = ModelCardData(
        base_model=name if "/" in name else None,
        library_name="transformers",
        tags=["kvconvert", *([str(provenance["target"])] if "target" in provenance else [])],
        **inherited,
    )
    write_text(target / CARD_NAME, f"---\n{data.to_yaml()}\n---\n\n{_text(name, config, provenance, problem)}")


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
    elif changes:
        lines += ["It has not been uptrained, which recovers the quality that the conversion cost.", ""]
    if model_type in RUNTIME_CLASSES:
        lines += [
            f"Its class, `{RUNTIME_CLASSES[model_type].architecture}`, is in the files beside the weights: open it "
            "with `trust_remote_code=True`, or `import kvconvert.convert` first.",
            "",
        ]
    if problem is not None:
        lines += [problem, ""]
    if architecture is not None:
        lines += [f"Served by: {engines_line(serving(model_type, config))}.", ""]
    return "\n".join(map(printable, lines))


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
