"""What kvconvert relies on in transformers, and what differs between the versions that it works with.

This file stands alone: it is copied beside converted weights, where the classes of the other files import it.
"""

import inspect
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import Any

import transformers
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask

__all__ = [
    "ACTIVATION_CHECKPOINTING",
    "CACHE_NAME",
    "RELIED_ON",
    "TESTED_VERSIONS",
    "cache_of",
    "checkpoint_activations",
    "refuse_unknown",
    "require",
    "take_cache",
]

TESTED_VERSIONS = ("5.17", "5.24")  # the oldest and the newest
CACHE_NAMES = ("cache", "past_key_values")  # of the cache, in forward passes and outputs: until 5.23 the second one
CACHE = " or ".join(CACHE_NAMES)
UNNAMED = ""  # a parameter that is passed by its position, whatever its name

# For each user of transformers the functions, methods and classes that it takes by name, with the parameters that it
# passes by position, in order, or by name (after None). Private members and what has changed its name are all here.
RELIED_ON: Mapping[str, Mapping[str, tuple[str | None, ...]]] = {
    # runtime: the classes in the files beside this one
    "decoder": {
        "masking_utils:create_causal_mask": ("config", "inputs_embeds", "attention_mask", CACHE, "position_ids"),
        "masking_utils:create_sliding_window_causal_mask": (
            "config",
            "inputs_embeds",
            "attention_mask",
            CACHE,
            "position_ids",
        ),
        "modeling_outputs:BaseModelOutputWithPast": ("last_hidden_state", CACHE),
        "cache_utils:DynamicCache": (None, "config"),
        "cache_utils:DynamicCache.update": ("self", "key_states", "value_states", "layer_idx"),
        "cache_utils:DynamicCache.get_seq_length": ("self", "layer_idx"),
        "cache_utils:DynamicCache.get_mask_sizes": ("self", UNNAMED, "layer_idx"),
        "modeling_layers:GradientCheckpointingLayer": (),
        "modeling_utils:ALL_ATTENTION_FUNCTIONS.get_interface": (UNNAMED, "default"),
        "modeling_utils:PreTrainedModel.post_init": ("self",),
        "integrations.sdpa_attention:sdpa_attention_forward": (
            *("module", "query", "key", "value", "attention_mask", None, "dropout", "scaling", "position_bias"),
        ),
        "utils.generic:merge_with_config_defaults": (UNNAMED,),
        "utils.output_capturing:capture_outputs": (),
        "models.llama.modeling_llama:LlamaForCausalLM.forward": (
            *("self", "input_ids", "attention_mask", "position_ids", CACHE, "inputs_embeds", None, "logits_to_keep"),
        ),
        "models.llama.modeling_llama:rotate_half": (UNNAMED,),
        "models.llama.modeling_llama:eager_attention_forward": (
            *("module", "query", "key", "value", "attention_mask", None, "dropout", "scaling"),
        ),
        "models.persimmon.modeling_persimmon:apply_rotary_pos_emb": (UNNAMED, UNNAMED, "cos", "sin"),
        "models.persimmon.modeling_persimmon:PersimmonRotaryEmbedding.forward": ("self", "x", "position_ids"),
        "models.phi3.modeling_phi3:Phi3RotaryEmbedding.forward": ("self", "x", "position_ids"),
    },
    "seq2seq": {
        "cache_utils:EncoderDecoderCache": (),
        "cache_utils:DynamicCache.update": ("self", "key_states", "value_states", "layer_idx"),
        "cache_utils:DynamicCache.get_seq_length": ("self", "layer_idx"),
        "cache_utils:DynamicCache.get_mask_sizes": ("self", UNNAMED, "layer_idx"),
        "integrations.sdpa_attention:repeat_kv": (UNNAMED, "n_rep"),
        "modeling_utils:ALL_ATTENTION_FUNCTIONS.get_interface": (UNNAMED, "default"),
        "models.bart.modeling_bart:BartAttention.forward": (
            *("self", "hidden_states", None, "key_value_states", CACHE, "attention_mask"),
        ),
        "models.t5.modeling_t5:T5Attention.forward": (
            *("self", "hidden_states", None, "mask", "key_value_states", "position_bias", CACHE),
        ),
        "models.t5.modeling_t5:T5Attention.compute_bias": ("self", "query_length", "key_length", "device", UNNAMED),
        "models.t5.modeling_t5:eager_attention_forward": (
            *("module", "query", "key", "value", "attention_mask", None, "dropout", "scaling", "position_bias"),
        ),
        "models.whisper.modeling_whisper:WhisperAttention.forward": (
            *("self", "hidden_states", None, "key_value_states", CACHE, "attention_mask"),
        ),
    },
    # opening: convert/loading.py
    "opening": {
        "models.auto.modeling_auto:MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values": (),
        "models.auto.modeling_auto:MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING.keys": (),
        "modeling_utils:PreTrainedModel.from_pretrained": (UNNAMED,),
        "utils.logging:disable_progress_bar": (),
    },
    # training: uptrain/, which extends the Trainer
    "training": {
        "trainer:Trainer._get_grad_norm": ("self",),
        "trainer:Trainer._save_checkpoint": ("self", "model", "trial"),
        "trainer:Trainer._save_optimizer_and_scheduler": ("self", "output_dir"),
        "trainer:Trainer._load_from_checkpoint": ("self", "resume_from_checkpoint", "model"),
        "trainer:Trainer._load_optimizer_and_scheduler": ("self", "checkpoint"),
        "trainer:Trainer.create_optimizer": ("self",),
        "trainer:Trainer.create_scheduler": ("self", "num_training_steps", "optimizer"),
        "trainer:Trainer.log": ("self", "logs"),
        "trainer:Trainer.compute_loss": ("self", "model", "inputs", "return_outputs", "num_items_in_batch"),
        "trainer:Trainer.save_model": ("self", "output_dir", "_internal_call"),
        "trainer:Trainer.get_decay_parameter_names": ("self", UNNAMED),
        "trainer:Trainer.get_optimizer_cls_and_kwargs": ("args", "model"),
        "trainer:SCHEDULER_NAME": (),
        "trainer_utils:SchedulerType": (),
        "integrations.deepspeed:unset_hf_deepspeed_config": (),
    },
    # sharding: uptrain with --fsdp in several processes, from 5.23 on
    "sharding": {
        "distributed.configuration_utils:DistributedConfig": (None, "fsdp_size", "fsdp_plan"),
        "distributed.mixin:DistributedMixin.is_distributed_loading_by_transformers": (),
    },
}

# What passes through a forward without a parameter of its own: read further down, or of no effect on the result.
_PASSED_ON = frozenset(
    {
        *("output_attentions", "output_hidden_states", "return_dict", "num_items_in_batch"),
        *("is_causal", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),  # flash attention
        # continuous batching
        *("cache", "read_index", "write_index", "block_table", "max_seqlen_q", "max_seqlen_k"),
        *("logits_indices", "logits_processor_args"),
        *("attention_instances", "forward_batch"),  # vLLM, SGLang
        *("use_cache", "position_ids", "position_bias"),
    }
)


@cache
def require(user: str) -> None:
    """Raise ImportError unless this version of transformers has all that `user`, a key of RELIED_ON, relies on."""
    for path, parameters in RELIED_ON[user].items():
        if problem := _problem(path, parameters):
            oldest, newest = TESTED_VERSIONS
            raise ImportError(
                f"transformers {transformers.__version__} {problem}, on which this code relies; it was tested with "
                f"transformers {oldest} to {newest} ({__name__})"
            )


def take_cache(past_key_values: Cache | None, cache: Any, passed_on: dict[str, Any]) -> Cache | None:
    """The cache that a forward pass was given under either name.

    Until 5.23, `cache` is the name of the paged cache of continuous batching, which attention functions read: such a
    one is put back into `passed_on`. Raises TypeError for two caches.
    """
    if cache is not None and CACHE_NAME != "cache" and not isinstance(cache, Cache):
        passed_on["cache"] = cache
        return past_key_values
    if past_key_values is not None and cache is not None:
        raise TypeError("got a cache under both of its names, past_key_values and cache: pass one")
    return past_key_values if cache is None else cache


def cache_of(outputs: Any) -> Any:
    """The cache among the outputs of a forward pass, under either name."""
    return getattr(outputs, CACHE_NAME)


def checkpoint_activations(model: Any, **options: Any) -> None:
    """Let layers compute their activations again in the backward pass, by the method's name in this version."""
    getattr(model, f"{ACTIVATION_CHECKPOINTING}_enable")(**{f"{ACTIVATION_CHECKPOINTING}_kwargs": options or None})


def refuse_unknown(module: Any, passed_on: Mapping[str, Any]) -> None:
    """Raise TypeError for an argument that nothing reads: under a name that this code does not know it may be a cache,
    and a forward pass that leaves it out would compute something else without a word.
    """
    for name, value in passed_on.items():
        if name in _PASSED_ON or value is None:
            continue
        if name == "token_type_ids" and not value.any():  # all of one kind, which some tokenizers say by default
            continue
        oldest, newest = TESTED_VERSIONS
        raise TypeError(
            f"{type(module).__name__}.forward() got an argument that it does not know: {name} (transformers "
            f"{transformers.__version__}; tested with {oldest} to {newest})"
        )


def _problem(path: str, parameters: tuple[str | None, ...]) -> str | None:
    """What is missing of `module:name.attribute` or of its parameters, in words; None where all is there."""
    module, _, names = path.partition(":")
    try:
        found: Any = import_module(f"transformers.{module}")
        for name in names.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError):
        return f"has no {module}.{names}"
    if not parameters:
        return None
    described = ", ".join(name or "…" for name in parameters if name is not None)
    known = inspect.signature(found).parameters
    by_position = [*parameters, None][: [*parameters, None].index(None)]
    by_name = parameters[len(by_position) + 1 :]
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    in_order = len(known) >= len(by_position) and all(
        wanted == UNNAMED or actual in str(wanted).split(" or ")
        for wanted, actual in zip(by_position, known, strict=False)
    )
    named = all(takes_any or any(name in known for name in str(wanted).split(" or ")) for wanted in by_name)
    return None if in_order and named else f"has another {module}.{names}({', '.join(known)}) than ({described})"


# that of the parameter that masks are made from
CACHE_NAME = next((name for name in CACHE_NAMES if name in inspect.signature(create_causal_mask).parameters), CACHE)
# in the model's method and in the Trainer's arguments: renamed in 5.23
_RENAMED = hasattr(PreTrainedModel, "activation_checkpointing_enable")
ACTIVATION_CHECKPOINTING = "activation_checkpointing" if _RENAMED else "gradient_checkpointing"
