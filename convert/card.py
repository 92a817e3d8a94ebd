"""The model card of a result: what it is, what made it, which engines serve it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .output import write_text
from .runtime import RUNTIME_CLASSES
from .serving import engines_line, serving

__all__ = ["CARD_NAME", "write_card"]

CARD_NAME = "README.md"
_INHERITED = ("license", "license_name", "license_link", "language", "datasets")  # of the source's card


def write_card(source: Path, target: Path, provenance: Mapping[str, Any]) -> None:
    """Write the card of the checkpoint in `target`, made from the one in `source`, from what `kvconvert.json` holds."""
    from huggingface_hub import ModelCardData

    name = str(provenance.get("source", source.name))
    data = ModelCardData(
        base_model=name if "/" in name else None,
        library_name="transformers",
        tags=["kvconvert", *([str(provenance["target"])] if "target" in provenance else [])],
        **_inherited(source / CARD_NAME),
    )
    write_text(target / CARD_NAME, f"---\n{data.to_yaml()}\n---\n\n{_text(name, provenance)}")


def _inherited(card: Path) -> dict[str, Any]:
    """The licence and language that the source's card declares, if it is there and can be read."""
    from huggingface_hub import ModelCard

    if not card.is_file():
        return {}
    try:
        declared = ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except Exception:  # a card is free text, and none of it is needed
        return {}
    return {key: declared[key] for key in _INHERITED if key in declared}


def _text(name: str, provenance: Mapping[str, Any]) -> str:
    lines = [f"# {name}, with a smaller K/V cache", ""]
    if "target" in provenance:
        heads, cache = provenance["num_key_value_heads"], provenance["cache_bytes_per_token"]
        lines += [
            f"Converted by kvconvert {provenance['kvconvert_version']} ({str(provenance['target']).upper()}, method "
            f"{provenance['method']}): {heads['source']} K/V heads in each layer became {heads['result']}, and the "
            f"cache takes {cache['result']} bytes per token in 16 bits, where it took {cache['source']}.",
            "",
        ]
    training = provenance.get("uptraining")
    if training:
        lines += [f"Uptrained on {training['tokens']} tokens, objective: {training['objective']}.", ""]
    else:
        lines += ["It has not been uptrained: `kvconvert uptrain` recovers the quality that pooling heads costs.", ""]
    model_type = str(provenance.get("model_type"))
    if model_type in RUNTIME_CLASSES:
        lines += [
            f"Its class, `{RUNTIME_CLASSES[model_type].architecture}`, is in the files beside the weights: open it "
            "with `trust_remote_code=True`, or `import kvconvert.convert` first.",
            "",
        ]
    if "model_type" in provenance:
        lines += [f"Served by: {engines_line(serving(model_type))}.", ""]
    return "\n".join(lines)
