"""CrossLayerDecoder in vLLM's Transformers backend, layers that share keys and values with one cache."""

from typing import Any

import vllm
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.transformers import TransformersForCausalLM

__all__ = ["CrossLayerDecoderForCausalLM"]

_TESTED = "0.32"

if not hasattr(TransformersForCausalLM, "_create_attention_instances"):
    raise ImportError(
        f"vLLM {vllm.__version__} makes the attention of its Transformers backend elsewhere than kvconvert's plugin "
        f"looks; it was tested with vLLM {_TESTED}. Without the plugin (VLLM_PLUGINS='') every layer has a cache"
    )


class CrossLayerDecoderForCausalLM(TransformersForCausalLM):
    def _create_attention_instances(self, prefix: str = "") -> None:
        """Raises ValueError where a layer and the one that it reads are in different stages of a pipeline, RuntimeError
        where the attention of no layer is found: nothing would be saved, and nothing would say so.
        """
        super()._create_attention_instances(prefix)
        attentions: dict[int, Any] = {}
        for module in self.model.modules():
            instances = [child for child in module.children() if isinstance(child, Attention)]
            if instances:
                attentions[module.layer_idx] = instances[0]
        known = [hasattr(attention, "kv_sharing_target_layer_name") for attention in attentions.values()]
        if not known or not all(known):
            raise RuntimeError(
                f"vLLM {vllm.__version__} shares caches between layers in another way than vLLM {_TESTED}, with which "
                "kvconvert's plugin was tested. Without the plugin (VLLM_PLUGINS='') every layer has a cache"
            )
        for layer, source in enumerate(self.text_config.kv_source_layers):
            if source == layer or layer not in attentions:
                continue
            if source not in attentions:
                raise ValueError(
                    f"layer {layer} reads keys and values of layer {source}, which is in another stage of the pipeline"
                )
            target = attentions[source].layer_name
            attentions[layer].kv_sharing_target_layer_name = target
            attentions[layer].impl.kv_sharing_target_layer_name = target
