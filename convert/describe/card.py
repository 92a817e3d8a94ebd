"""The model card of a result: what it is, what made it, which engines serve it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..architectures.table import known_architecture
from ..checkpoint.output import CARD_NAME, write_text
from ..checkpoint.tensors import CONFIG_NAME
from ..runtime import RUNTIME_CLASSES
from .engines import engines_line, serving

__all__ = ["write_card"]

_INHERITED = ("license", "license_name", "license_link", "language", "datasets")  # of the source's card


def write_card(source: Path, target: Path, provenance: Mapping[str, Any]) -> None:
    """Write the card of the checkpoint in `target`, made from the one in `source`.

    It says what config.json and `kvconvert.json`, whose content is `provenance`, say of it.
    """
    from huggingface_hub import ModelCardData

    config = json.loads((target / CONFIG_NAME).read_text(encoding="utf-8"))
    name = str(provenance.get("source", source.name))
    data = ModelCardData(
        base_model=name if "/" in name else None,
        library_name="transformers",
        tags=["kvconvert", *([str(provenance["target"])] if "target" in provenance else [])],
        **_inherited(source / CARD_NAME),
    )
    write_text(target / CARD_NAME, f"---\n{data.to_yaml()}\n---\n\n{_text(name, config, provenance)}")


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


def _text(name: str, config: Mapping[str, Any], provenance: Mapping[str, Any]) -> str:
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
    if architecture is not None:
        lines += [f"Served by: {engines_line(serving(model_type, config))}.", ""]
    return "\n".join(lines)


def _changes(provenance: Mapping[str, Any]) -> list[str]:
    """What there is less of than in the source, in words."""
    changes = []
    heads = provenance.get("num_key_value_heads", {"source": 0, "result": 0})
    if heads["source"] != heads["result"]:
        changes.append(f"{heads['source']} K/V heads in each layer became {heads['result']}")
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
