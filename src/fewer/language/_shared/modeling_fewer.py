"""Gated language models whose layers have feed-forward networks of different widths.

This file needs nothing but transformers. It is written beside the weights of a pruned model, so that
`AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)` loads them anywhere.
"""

# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false
import copy

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

# model types of transformers whose layers have an `mlp` that is made from the config alone: gate, up and down of `intermediate_size`
PLAIN = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo", "olmo2", "granite", "smollm3")


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


def _classes(plain):
    """The config and the model of a plain type, the config's `intermediate_size` a number or a list, one width a layer."""
    plain_config = CONFIG_MAPPING[plain]
    plain_model = MODEL_FOR_CAUSAL_LM_MAPPING[plain_config]
    words = {
        "__module__": __name__,
        "__doc__": f"{plain_config.__name__} with a list of widths, one a layer, as `intermediate_size`.",
        "__annotations__": {"intermediate_size": int | list[int]},
        "model_type": f"fewer_{plain}",
        "intermediate_size": plain_config.intermediate_size,
    }
    config = strict(type(f"Fewer{plain_config.__name__}", (plain_config,), words))
    model = type(f"Fewer{plain_model.__name__}", (LayersOfOwnWidth, plain_model), {"__module__": __name__, "config_class": config})
    config.register_for_auto_class("AutoConfig")
    model.register_for_auto_class("AutoModelForCausalLM")  # `save_pretrained` writes this file beside the weights
    return config, model


FAMILIES = {plain: _classes(plain) for plain in PLAIN}
globals().update({made.__name__: made for family in FAMILIES.values() for made in family})


def register():
    """Let this process' AutoConfig and AutoModelForCausalLM know the classes."""
    for config, model in FAMILIES.values():
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModelForCausalLM.register(config, model, exist_ok=True)
