"""CrossLayerDecoder in vLLM's Transformers backend, layers that share keys and values with one cache."""

from typing import Any

from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.transformers import TransformersForCausalLM

__all__ = ["CrossLayerDecoderForCausalLM"]


class CrossLayerDecoderForCausalLM(TransformersForCausalLM):
    def _create_attention_instances(self, prefix: str = "") -> None:
        """Raises ValueError where a layer and the one that it reads are in different stages of a pipeline."""
        super()._create_attention_instances(prefix)
        attentions: dict[int, Any] = {}
        for module in self.model.modules():
            instances = [child for child in module.children() if isinstance(child, Attention)]
            if instances:
                attentions[module.layer_idx] = instances[0]
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
