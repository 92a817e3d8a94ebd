"""Opening a checkpoint in its stock transformers class, with the checks that transformers leaves out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, UnsupportedError, in_one_line, is_out_of_memory
from ..runtime import RUNTIME_CLASSES
from .config_classes import class_config, knows_class, quiet_transformers
from .known_classes import Header, known_class, known_generation
from .opening import open_checkpoint
from .quantisation import declared_method
from .remote_code import remote_code_allowed
from .tensors import CONFIG_NAME, INDEX_NAME, OLD_BUFFERS, Checkpoint

# the value head of TRL, which its own class adds to a language model; transformers leaves it aside
_VALUE_HEAD = re.compile(r"^v_head\.")
_OTHER_HEAD = re.compile(r"For(?!CausalLM|ConditionalGeneration)[A-Z]|Reward|DoubleHeads")
_HEADS = {
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
}

__all__ = [
    "Header",
    "auto_class",
    "check_accepts",
    "check_language_model",
    "check_opens",
    "check_source",
    "class_config",
    "empty_model",
    "knows_class",
    "load_model",
    "other_head",
    "quiet_transformers",
]

_REPORTING = {
    "output_loading_info": True,
    "ignore_mismatched_sizes": True,  # listed; transformers would raise without naming one
}
_PROBLEMS = {
    "missing_keys": "the checkpoint is incomplete, or config.json asks for more than was trained",
    "unexpected_keys": "config.json leaves out a part of the model, or the weights are another model's",
    "mismatched_keys": "config.json and the weights belong to different models, or one of them was edited",
}


def check_opens(directory: Path) -> str:
    """Check that a checkpoint opens in its class, without loading a weight, and return the name of the class.

    Where the data of `known_classes` covers all that the directory says, the headers are compared with that. Otherwise
    transformers opens the directory itself on the meta device, as whoever opens the model later will. Raises
    CheckpointError where the class cannot be built, or a tensor is missing, unexpected or of the wrong shape.
    """
    known = _known_directory(directory)
    if known is not None:
        return known
    model, info = _opened(directory, device_map="meta", dtype="auto")
    _require_accepted(str(directory), model, info, with_value_head=True)
    return type(model).__name__


def _known_directory(directory: Path) -> str | None:
    """The name of the class that opens a directory, None where the data does not cover all that transformers reads."""
    if remote_code_allowed() or (directory / "adapter_config.json").exists():
        return None
    generation = directory / "generation_config.json"
    try:
        if generation.exists() and not known_generation(json.loads(generation.read_bytes())):
            return None
        with open_checkpoint(directory) as checkpoint:
            config, tensors = checkpoint.config, list(checkpoint.tensors.values())
            is_plain = config == json.loads((directory / CONFIG_NAME).read_bytes()) and not checkpoint.pickled
        has_code = "auto_map" in config and config.get("model_type") not in RUNTIME_CLASSES
        index = directory / INDEX_NAME
        if index.exists() and not isinstance(json.loads(index.read_bytes()).get("metadata"), dict):
            return None
    except (CheckpointError, OSError, ValueError):  # the class says it in its words
        return None
    return known_class(config, tensors, ignored=_is_ignored) if is_plain and not has_code else None


def _is_ignored(name: str) -> bool:
    """Whether a tensor may lie beside those of the class."""
    return bool(OLD_BUFFERS.search(name) or _VALUE_HEAD.search(name))


def check_accepts(config: Mapping[str, Any], tensors: Iterable[Header], name: str) -> str:
    """Return the name of the class of a config if it takes tensors with these headers.

    The data of `known_classes` says so where it covers the config, and otherwise the class, which is built on the meta
    device. No file is read, so that what is checked is what was read, or what will be written. The `model_type` must be
    one that `knows_class`. Raises CheckpointError as `check_opens` does, with `name` in place of the directory.
    """
    tensors = list(tensors)
    known = known_class(config, tensors, ignored=_is_ignored)
    if known is not None:
        return known
    model, info = _built(config, tensors, name)
    _require_accepted(name, model, info, with_value_head=True)
    return type(model).__name__


def _built(config: Mapping[str, Any], tensors: Iterable[Header], name: str) -> tuple[Any, dict[str, Any]]:
    """The class of a config with tensors of these headers on the meta device, and what transformers says of them."""
    import torch

    headers = {tensor.name: torch.empty(tensor.shape, device="meta") for tensor in tensors}
    with _refusals(name), quiet_transformers():
        read = class_config(config)
        model, info = _model_class(read).from_pretrained(
            None, config=read, state_dict=headers, device_map="meta", **_REPORTING
        )
    return model, info


def check_source(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError if the class of a checkpoint does not accept it; a class that may not run is not asked.

    Of a translated checkpoint it is the original that is asked about, by the headers that were read where its class is
    one of transformers or ours. A checkpoint that was accepted before is not asked about again.
    """
    checkpoint = checkpoint.original
    if checkpoint.accepted:
        return
    model_type = checkpoint.config.get("model_type")
    has_code = "auto_map" in checkpoint.config and model_type not in RUNTIME_CLASSES
    try:
        if has_code and remote_code_allowed():
            if checkpoint.path is not None:
                check_opens(checkpoint.path)
        elif knows_class(model_type):
            check_accepts(checkpoint.config, checkpoint.tensors.values(), checkpoint.name)
        elif checkpoint.unsaved:
            raise _unsaved(checkpoint)
    except CheckpointError as error:
        if checkpoint.unsaved:
            raise _unsaved(checkpoint) from error
        raise
    checkpoint.accepted = True


def check_language_model(checkpoint: Checkpoint) -> None:
    """Raise what `load_model` would raise for a checkpoint, by its headers.

    A class that may not run, and quantised weights that config.json admits, which need a library, are not asked about.
    """
    config, model_type = checkpoint.config, checkpoint.config.get("model_type")
    if checkpoint.quantised and declared_method(config):
        return
    if checkpoint.quantised:
        raise UnsupportedError(f"{checkpoint.name}: {checkpoint.quantised}")
    if knows_class(model_type) and ("auto_map" not in config or model_type in RUNTIME_CLASSES):
        model, info = _built(config, checkpoint.tensors.values(), checkpoint.name)
        _require_accepted(checkpoint.name, model, info)
        _require_language_model(checkpoint.name, model)


def _unsaved(checkpoint: Checkpoint) -> CheckpointError:
    tensor, file = next(iter(checkpoint.unsaved.items()))
    return CheckpointError(
        f"{checkpoint.name}: its index says that {tensor} is in {file}, but it is not there",
        hint="download the checkpoint again",
    )


def load_model(model: str | Path, *, dtype: Any, device: Any, distributed_config: Any = None) -> Any:
    """Load a language model and return it in eval mode.

    dtype: a torch dtype. device: where the model goes; with a `distributed_config` that decides instead. Raises
    CheckpointError where tensors are missing, unexpected or of the wrong shape (transformers only warns, and fills what
    is missing with random numbers) or the model was saved without the head that predicts tokens, and UnsupportedError
    for an encoder-decoder. An error of memory that ran out is raised as it is, with a note that names the model.
    """
    sharding = {} if distributed_config is None else {"distributed_config": distributed_config}
    loaded, info = _opened(model, dtype=dtype, **sharding)
    _require_accepted(str(model), loaded, info)
    _require_language_model(str(model), loaded)
    return (loaded if sharding else loaded.to(device)).eval()


def _require_language_model(name: str, model: Any) -> None:
    """Raise an InputError for a model that is no decoder, or has no head that predicts tokens."""
    if model.config.is_encoder_decoder:
        raise UnsupportedError(
            f"{name}: {type(model).__name__} is an encoder-decoder, and only decoders are trained and evaluated here",
            hint="train it with transformers' Seq2SeqTrainer, which takes it as any other model",
        )
    if model.get_output_embeddings() is None:
        raise CheckpointError(
            f"{name}: was saved as {type(model).__name__}, without the head that predicts tokens",
            hint="save it with its ForCausalLM class; a conversion to GQA or MQA takes it as it is",
        )


def empty_model(config: Mapping[str, Any]) -> Any:
    """Return the causal language model of a config in float32, parameters on the meta device and buffers on the CPU."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with quiet_transformers(), init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(class_config(config), dtype=torch.float32).eval()


def other_head(config: Mapping[str, Any], tensors: Iterable[str]) -> str | None:
    """Return what a model was saved with in place of, or beside, a head that predicts tokens; None if nothing.

    That is a class, by the name in config.json, or a tensor of a value head.
    """
    value_head = next((name for name in tensors if _VALUE_HEAD.search(name)), None)
    if value_head is not None:
        return f"a value head, {value_head}"
    saved_as = str((config.get("architectures") or [""])[0])
    return saved_as if _OTHER_HEAD.search(saved_as) else None


def auto_class(model: str | Path) -> Any:
    """Return the auto class of transformers that opens a checkpoint with the head that it was saved with.

    Raises ImportError for one of kvconvert's classes where this version of transformers does not do.
    """
    import transformers

    return _auto_class(transformers.AutoConfig.from_pretrained(model, trust_remote_code=remote_code_allowed()))


def _auto_class(config: Any) -> Any:
    """The auto class that opens a checkpoint with this config object with the head that it was saved with."""
    import transformers
    from transformers.models.auto import modeling_auto

    from ..runtime.transformers_interface import require

    require("opening")
    if config.model_type in RUNTIME_CLASSES:
        RUNTIME_CLASSES[config.model_type].model_classes()  # raises ImportError, with the versions
    saved_as = (config.architectures or [""])[0]
    for auto, names in _HEADS.items():
        if getattr(modeling_auto, names).get(config.model_type) == saved_as:
            return getattr(transformers, auto)
    stock_names = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    has_head = saved_as in stock_names or saved_as.endswith("LMHeadModel") or "For" in saved_as
    if saved_as.endswith("Model") and not has_head:
        return transformers.AutoModel
    if not config.is_encoder_decoder:
        return transformers.AutoModelForCausalLM
    if type(config) in modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING:
        return transformers.AutoModelForSpeechSeq2Seq
    return transformers.AutoModelForSeq2SeqLM


def _model_class(config: Any) -> Any:
    """The class itself. Raises KeyError where the auto class has none for this config."""
    found = _auto_class(config)._model_mapping[type(config)]
    return found[0] if isinstance(found, tuple | list) else found


def _opened(model: str | Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The model that transformers opens, and what it says of its tensors."""
    config = _true_config(model)
    with _refusals(str(model)), quiet_transformers():
        opened = auto_class(model).from_pretrained(
            model, config=config, trust_remote_code=remote_code_allowed(), **_REPORTING, **options
        )
    loaded, info = opened
    return loaded, info


def _true_config(model: str | Path) -> Any:
    """The config object for weights that config.json calls quantised and that are not; None where the file is right."""
    path = Path(model) / CONFIG_NAME
    if not path.is_file() or b"quantization_config" not in path.read_bytes():
        return None
    with open_checkpoint(model) as checkpoint:
        config = checkpoint.config
        return (
            class_config(config) if "quantization_config" not in config and knows_class(config["model_type"]) else None
        )


@contextmanager
def _refusals(name: str) -> Iterator[None]:
    """Raise CheckpointError for whatever transformers raises; memory that ran out is raised as it is, with a note."""
    try:
        yield
    except Exception as error:  # a config can be wrong in more ways than transformers has words for
        if is_out_of_memory(error):
            error.add_note(f"while {name} was loaded")
            raise
        reason = f"{name}: transformers cannot open it ({in_one_line(error)})"
        if "trust_remote_code" in str(error):
            hint = "allow the code beside it to run, if you trust it"
            raise CheckpointError(reason, hint=hint, settings=("trust_remote_code",)) from error
        raise CheckpointError(reason) from error


def _require_accepted(name: str, model: Any, info: Mapping[str, Any], *, with_value_head: bool = False) -> None:
    """Raise CheckpointError, which names a tensor, where the class and the tensors do not belong together.

    A value head beside the tensors of the class is none of them, and may be there only `with_value_head`.
    """
    saved_as = (model.config.architectures or [type(model).__name__])[0]
    absent = f"saved as {saved_as}, which transformers does not have; " if not _has_class(saved_as) else ""
    for problem, hint in _PROBLEMS.items():
        keys = sorted(_described(key) for key in info[problem])
        if problem == "unexpected_keys":
            ignored = _is_ignored if with_value_head else OLD_BUFFERS.search
            keys = [key for key in keys if not ignored(key)]
        if keys:
            found = f"{len(keys)} {problem.replace('_', ' ')}, first {keys[0]}"
            reason = f"{absent}{type(model).__name__} does not accept its weights: {found}"
            raise CheckpointError(f"{name}: {reason}", hint=hint)


def _has_class(name: str) -> bool:
    """Whether transformers has a class of this name, or we have."""
    import transformers

    ours = {own for entry in RUNTIME_CLASSES.values() for own in entry.auto_models.values()}
    return name in ours or hasattr(transformers, name)


def _described(key: Any) -> str:
    """A tensor that transformers names: its name, and its two shapes where these are what is wrong."""
    if isinstance(key, str):
        return key
    name, found, expected = key
    return f"{name}, whose shape is {list(found)} and by config.json {list(expected)}"
