"""Llama-like language models whose layers have feed-forward networks of different widths.

This file needs nothing but transformers. It is written beside the weights of a pruned model, so that
`AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)` loads them anywhere.
"""

# pyright: reportCallIssue=false, reportAttributeAccessIssue=false
import copy

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM


@strict
class FewerLlamaConfig(LlamaConfig):
    """LlamaConfig with a list of widths, one a layer, as `intermediate_size`."""

    model_type = "fewer_llama"
    intermediate_size: int | list[int] = 11008


@strict
class FewerMistralConfig(MistralConfig):
    """MistralConfig with a list of widths, one a layer, as `intermediate_size`."""

    model_type = "fewer_mistral"
    intermediate_size: int | list[int] = 14336


@strict
class FewerQwen2Config(Qwen2Config):
    """Qwen2Config with a list of widths, one a layer, as `intermediate_size`."""

    model_type = "fewer_qwen2"
    intermediate_size: int | list[int] = 22016


class LayersOfOwnWidth:
    """Makes the model at its smallest width and then each layer's feed-forward network at its own."""

    def __init__(self, config):
        widths = config.intermediate_size
        if isinstance(widths, int):
            super().__init__(config)
            return
        if len(widths) != config.num_hidden_layers:
            raise ValueError(f"intermediate_size names {len(widths)} widths for {config.num_hidden_layers} layers; expected one a layer")
        try:
            config.intermediate_size = min(widths)
            super().__init__(config)
            for layer, width in zip(self.model.layers, widths, strict=True):
                own = copy.copy(config)
                own.intermediate_size = width
                layer.mlp = type(layer.mlp)(own)
        finally:
            config.intermediate_size = widths
        self.post_init()


class FewerLlamaForCausalLM(LayersOfOwnWidth, LlamaForCausalLM):
    config_class = FewerLlamaConfig


class FewerMistralForCausalLM(LayersOfOwnWidth, MistralForCausalLM):
    config_class = FewerMistralConfig


class FewerQwen2ForCausalLM(LayersOfOwnWidth, Qwen2ForCausalLM):
    config_class = FewerQwen2Config


FAMILIES = {
    "llama": (FewerLlamaConfig, FewerLlamaForCausalLM),
    "mistral": (FewerMistralConfig, FewerMistralForCausalLM),
    "qwen2": (FewerQwen2Config, FewerQwen2ForCausalLM),
}
