"""The config classes of transformers and of kvconvert: what they say where a config.json says nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from types import MappingProxyType
from typing import Any

from .known_classes import is_known, known_config

__all__ = ["MOST_POSITIONS", "class_config", "class_values", "full_config", "knows_class", "quiet_transformers"]

# Classes that compute a table of all positions when they are built, or that are translated to one which does: a mask of
# positions × positions (gpt_bigcode has one, gpt_neo one in each layer), or the sines of each position. Published
# models of these classes have at most 8192 positions, gpt_neo 2048.
MOST_POSITIONS: Mapping[str, int] = MappingProxyType(
    dict.fromkeys(("biogpt", "codegen", "gpt2", "gpt_bigcode", "gptj", "opt", "xglm"), 2**14) | {"gpt_neo": 2**12}
)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Switch off progress bars and warnings of transformers inside the block: callers report and check themselves."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled
    from transformers.utils import logging

    verbosity, had_bars = logging.get_verbosity(), not are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()


def class_config(config: Mapping[str, Any]) -> Any:
    """Return the config object of a config.json, with the defaults of its class, which must be one of transformers."""
    from transformers import AutoConfig

    # a copy, since classes write the newer form of rotary settings into what they are given
    values = {key: copy.deepcopy(value) for key, value in config.items() if key not in ("model_type", "auto_map")}
    with quiet_transformers():
        return AutoConfig.for_model(config["model_type"], **values)


def full_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json with every value that its class has: those it leaves out, and those computed of others.

    Names are the class's own, and rotary settings lie in `rope_parameters`, whatever the version that wrote the file.
    What every class has beside (`id2label` and such) is there only where the file says it. A `model_type` without a
    class in transformers is returned as it is. Raises what the class raises for values that it cannot hold.
    """
    if not knows_class(config.get("model_type")):
        return dict(config)
    known = known_config(config)
    return class_values(config) if known is None else known


def class_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `full_config` does, as the class itself says it, whose import takes seconds."""
    values: dict[str, Any] = class_config(config).to_dict()
    return {
        name: value
        for name, value in values.items()
        if name in config or name not in _of_every_class() or value != _of_every_class()[name]
    }


@cache
def _of_every_class() -> Mapping[str, Any]:
    from transformers import PreTrainedConfig

    values: dict[str, Any] = PreTrainedConfig().to_dict()
    return values


def knows_class(model_type: object) -> bool:
    """Return whether transformers has a class for this `model_type`."""
    if is_known(model_type):
        return True
    from transformers import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING
