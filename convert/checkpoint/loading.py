"""Opening a checkpoint in its stock transformers class, with the checks that transformers leaves out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, UnsupportedError, in_one_line, is_out_of_memory
from ..runtime import RUNTIME_CLASSES
from .remote_code import remote_code_allowed

# what older versions saved among the weights and newer ones compute
OLD_BUFFERS = re.compile(
    r"(?<!c_)(attn|attention)\.(bias|masked_bias|causal_mask)$|rotary_emb\.inv_freq$|(^|\.)(decoder|embed_positions)\.(version|_float_tensor)$"
)

__all__ = [
    "OLD_BUFFERS",
    "auto_class",
    "check_opens",
    "class_config",
    "empty_model",
    "knows_class",
    "load_model",
    "quiet_transformers",
]


def check_opens(directory: Path) -> str:
    """Open a checkpoint in its class on the meta device, without loading a weight, and return the name of the class.

    Raises CheckpointError where the class cannot be built, or a tensor is missing, unexpected or of the wrong shape.
    """
    model, problem = _open(directory, device_map="meta", dtype="auto")
    if problem:
        raise CheckpointError(
            f"{directory}: {type(model).__name__} does not accept its weights: {problem}",
            hint="config.json and the weights belong to different models, or one of them was edited",
        )
    return type(model).__name__


def load_model(model: str | Path, *, dtype: Any, device: Any, distributed_config: Any = None) -> Any:
    """Load a language model and return it in eval mode.

    dtype: a torch dtype. device: where the model goes; with a `distributed_config` that decides instead. Raises
    CheckpointError where tensors are missing, unexpected or of the wrong shape (transformers only warns, and fills what
    is missing with random numbers) or the model was saved without the head that predicts tokens, and UnsupportedError
    for an encoder-decoder. An error of memory that ran out is raised as it is, with a note that names the model.
    """
    sharding = {} if distributed_config is None else {"distributed_config": distributed_config}
    loaded, problem = _open(model, dtype=dtype, **sharding)
    if problem:
        raise CheckpointError(f"{model}: {type(loaded).__name__} does not accept its weights: {problem}")
    if loaded.config.is_encoder_decoder:
        raise UnsupportedError(
            f"{model}: {type(loaded).__name__} is an encoder-decoder, and only decoders are trained and evaluated here",
            hint="train it with transformers' Seq2SeqTrainer, which takes it as any other model",
        )
    if loaded.get_output_embeddings() is None:
        raise CheckpointError(
            f"{model}: was saved as {type(loaded).__name__}, without the head that predicts tokens",
            hint="save it with its ForCausalLM class; a conversion to GQA or MQA takes it as it is",
        )
    return (loaded if sharding else loaded.to(device)).eval()


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

    values = {key: value for key, value in config.items() if key not in ("model_type", "auto_map")}
    with quiet_transformers():
        return AutoConfig.for_model(config["model_type"], **values)


def empty_model(config: Mapping[str, Any]) -> Any:
    """Return the causal language model of a config in float32, parameters on the meta device and buffers on the CPU."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with quiet_transformers(), init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(class_config(config), dtype=torch.float32).eval()


def knows_class(model_type: object) -> bool:
    """Return whether transformers has a class for this `model_type`."""
    from transformers import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING


def auto_class(model: str | Path) -> Any:
    """Return the auto class of transformers that opens a checkpoint with the head that it was saved with.

    Raises ImportError for one of kvconvert's classes where this version of transformers does not do.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    from ..runtime.transformers_interface import require

    require("opening")
    config = transformers.AutoConfig.from_pretrained(model, trust_remote_code=remote_code_allowed())
    if config.model_type in RUNTIME_CLASSES:
        RUNTIME_CLASSES[config.model_type].model_classes()  # raises ImportError, with the versions
    saved_as = (config.architectures or [""])[0]
    stock_names = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    if saved_as.endswith("Model") and saved_as not in stock_names and not saved_as.endswith("LMHeadModel"):
        return transformers.AutoModel
    if not config.is_encoder_decoder:
        return transformers.AutoModelForCausalLM
    if type(config) in modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING:
        return transformers.AutoModelForSpeechSeq2Seq
    return transformers.AutoModelForSeq2SeqLM


def _open(model: str | Path, **options: Any) -> tuple[Any, str | None]:
    """The opened model, and a clause that names tensors that are missing, unexpected or of a wrong shape, or None."""
    try:
        with quiet_transformers():
            opened = auto_class(model).from_pretrained(
                model,
                trust_remote_code=remote_code_allowed(),
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # listed in `info`; transformers would raise without naming one
                **options,
            )
    except Exception as error:  # a config can be wrong in more ways than transformers has words for
        if is_out_of_memory(error):
            error.add_note(f"while {model} was loaded")
            raise
        reason = f"{model}: transformers cannot open it ({in_one_line(error)})"
        if "trust_remote_code" in str(error):
            hint = "allow the code beside it to run, if you trust it"
            raise CheckpointError(reason, hint=hint, settings=("trust_remote_code",)) from error
        raise CheckpointError(reason) from error
    loaded, info = opened
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(str(key) for key in info[problem])
        if problem == "unexpected_keys":
            keys = [key for key in keys if not OLD_BUFFERS.search(key)]
        if keys:
            return loaded, f"{len(keys)} {problem.replace('_', ' ')}, first {keys[0]}"
    return loaded, None
