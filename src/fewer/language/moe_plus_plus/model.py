"""A Llama whose feed-forward networks are MoE++ mixtures, for transformers: config, model, and what reads the released weights."""

from __future__ import annotations

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, initialization
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel
from transformers.utils import can_return_tuple  # pyright: ignore[reportPrivateImportUsage]

from fewer.language._shared.experts import GatedExperts
from fewer.language._shared.mixture import LlamaOfExperts
from fewer.language.moe_plus_plus.layer import ConstantExperts, MoEPlusPlus, MoEPlusPlusOutput

# pyright: reportCallIssue=false


@strict
class MoEPlusPlusConfig(LlamaConfig):
    """LlamaConfig with mixtures in place of the feed-forward networks; see `MoEPlusPlus` for what their numbers mean.

    Attributes:
        intermediate_size: of one feed-forward expert.
        router_aux_loss_coef: beta; the balance losses of all mixtures are summed, and added to the loss in training.
        moe_layers: which layers are mixtures; None is all. Logits pass the others unchanged.
    """

    model_type = "fewer_moe_plus_plus"
    num_ffn_experts: int = 8
    num_zero: int = 1
    num_copy: int = 1
    num_constant: int | None = None
    top_k: int = 2
    tau: float = 0.75
    capacity_factor: float | None = 1.1
    router: str = "linear"
    gating: str = "paper"
    gate_residual: bool = True
    capacity_base: str = "assignments"
    capacity_priority: str = "position"
    global_balance: bool = False
    router_aux_loss_coef: float = 0.01
    output_router_logits: bool = False
    moe_layers: list[int] | None = None

    def mixtures(self) -> list[int]:
        """The layers that are mixtures, first to last."""
        outside = [number for number in self.moe_layers or () if not 0 <= number < self.num_hidden_layers]
        if outside:
            raise ValueError(f"moe_layers has {outside[0]}; expected numbers from 0 to {self.num_hidden_layers - 1}")
        return sorted(self.moe_layers) if self.moe_layers is not None else list(range(self.num_hidden_layers))

    def mixture(self, layer_idx: int) -> MoEPlusPlus:
        """The mixture of a layer; the first of a model has no map for the logits of one before."""
        return MoEPlusPlus(
            self.hidden_size, self.intermediate_size, self.num_ffn_experts, self.num_zero, self.num_copy, self.num_constant, self.top_k,
            self.tau, self.capacity_factor, self.router, self.gating, self.gate_residual and layer_idx != self.mixtures()[0],  # pyright: ignore[reportArgumentType]
            self.capacity_base, self.capacity_priority, self.global_balance, layer_idx,  # pyright: ignore[reportArgumentType]
        )  # fmt: skip


# layers / hidden / intermediate / heads / FFN experts / zero, copy, constant
PRESETS = {
    name: {
        "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": heads,
        "num_ffn_experts": experts, "num_zero": 1, "num_copy": 1, "num_constant": constant,
    }
    for name, layers, hidden, inner, heads, experts, constant in (
        ("0.6B", 12, 768, 2048, 12, 8, 2), ("1B", 12, 768, 2048, 12, 16, 2), ("2B", 12, 768, 2048, 12, 32, 6), ("7B", 24, 1536, 4096, 16, 16, 2),
    )
}  # fmt: skip


class Pathway:
    """What goes beside the hidden states in one pass: the mask of its tokens, and what each mixture gave. No cache keeps it."""

    def __init__(self, token_mask: Tensor | None = None) -> None:
        self.token_mask, self.outputs = token_mask, dict[int, MoEPlusPlusOutput]()

    def through(self, layer_idx: int, mixture: MoEPlusPlus, x: Tensor) -> Tensor:
        before = [number for number in self.outputs if number < layer_idx]
        residual = self.outputs[max(before)].router_logits if before else None
        self.outputs[layer_idx] = out = mixture(x, residual, self.token_mask)
        return out.hidden_states

    @property
    def aux_loss(self) -> Tensor:
        """The sum of the mixtures' balance losses."""
        return torch.stack([out.aux_loss for out in self.outputs.values()]).sum()


class MoEPlusPlusDecoderLayer(LlamaDecoderLayer):
    """Llama's decoder layer, whose mixture sees the pathway."""

    def __init__(self, config: MoEPlusPlusConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.layer_idx = layer_idx
        if layer_idx in config.mixtures():
            self.mlp: Any = config.mixture(layer_idx)

    def forward(self, hidden_states: Tensor, pathway: Pathway, **words: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **words)
        hidden_states = hidden_states + attended
        x = self.post_attention_layernorm(hidden_states)
        return hidden_states + (pathway.through(self.layer_idx, self.mlp, x) if isinstance(self.mlp, MoEPlusPlus) else self.mlp(x))


class MoEPlusPlusModel(LlamaModel):
    """The decoder without its head."""

    config_class = MoEPlusPlusConfig

    def __init__(self, config: MoEPlusPlusConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList([MoEPlusPlusDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)])
        self.post_init()

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        inputs_embeds: Tensor | None = None,
        pathway: Pathway | None = None,
        **words: Any,
    ) -> Any:
        pathway = pathway or Pathway()
        tokens = input_ids if input_ids is not None else inputs_embeds
        if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2 and tokens is not None:
            pathway.token_mask = attention_mask[:, -tokens.shape[1] :]  # with a cache the mask is of what was read before, too
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, pathway=pathway, **words)  # pyright: ignore[reportArgumentType]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        _init_experts(module, self.config.initializer_range)


def _init_experts(module: nn.Module, std: float) -> None:
    if isinstance(module, GatedExperts):
        initialization.normal_(module.up_proj, mean=0.0, std=std)
        initialization.normal_(module.down_proj, mean=0.0, std=std)
    if isinstance(module, ConstantExperts):
        initialization.uniform_(module.wg, -(module.wg.shape[-1] ** -0.5), module.wg.shape[-1] ** -0.5)
        initialization.normal_(module.constant, mean=0.0, std=1.0)  # as released


class MoEPlusPlusForCausalLM(LlamaOfExperts):
    """A causal language model of MoE++ mixtures: `from_pretrained`, `save_pretrained`, `generate` and Trainer as any of transformers.

    The output has `aux_loss` (the balance losses, summed), `router_logits` ([T, N] of each mixture, where `output_router_logits` asks for
    them); with labels `loss` is the token loss, in training (or with `output_router_logits`) + `router_aux_loss_coef` x `aux_loss`.

    Examples:
        >>> config = MoEPlusPlusConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
        >>> model = MoEPlusPlusForCausalLM(config).eval()
        >>> ids = torch.arange(6)[None]
        >>> out = model(ids, labels=ids, output_router_logits=True)
        >>> [logits.shape for logits in out.router_logits], out.loss > out.aux_loss * config.router_aux_loss_coef
        ([torch.Size([6, 11]), torch.Size([6, 11])], tensor(True))
        >>> model.generate(ids, max_new_tokens=2, do_sample=False).shape
        torch.Size([1, 8])
    """

    config_class = MoEPlusPlusConfig
    _keep_in_fp32_modules_strict = ["router"]  # noqa: RUF012 - as transformers declares it

    def __init__(self, config: MoEPlusPlusConfig) -> None:
        super().__init__(config)
        self.model = MoEPlusPlusModel(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        _init_experts(module, self.config.initializer_range)

    @can_return_tuple
    def forward(  # transformers looks up the names of these arguments
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        pathway = Pathway()
        out = super().forward(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, labels=labels, logits_to_keep=logits_to_keep,
            return_dict=True, pathway=pathway, **kwargs,
        )  # fmt: skip
        words: dict[str, Any] = dict(out)
        shown = self.config.output_router_logits if output_router_logits is None else output_router_logits
        if pathway.outputs:
            self._check_graph([each.router_logits for each in pathway.outputs.values()])
            words["aux_loss"] = pathway.aux_loss
            if labels is not None and (self.training or shown):  # as Mixtral: a text's perplexity is without it
                words["loss"] = words["loss"] + self.config.router_aux_loss_coef * words["aux_loss"].to(words["loss"])
        if shown:
            words["router_logits"] = tuple(each.router_logits for each in pathway.outputs.values())
        return MoeCausalLMOutputWithPast(**words)


def register() -> None:
    """Let AutoConfig and AutoModelForCausalLM know the classes."""
    AutoConfig.register(MoEPlusPlusConfig.model_type, MoEPlusPlusConfig, exist_ok=True)
    AutoModelForCausalLM.register(MoEPlusPlusConfig, MoEPlusPlusForCausalLM, exist_ok=True)


register()
