"""A Llama whose feed-forward networks are BlockFFN layers, for transformers: config and model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from fewer.checks import check_not_negative, check_positive, check_whole
from fewer.language._shared.mixture import MixtureForCausalLM, mean_over_layers
from fewer.language.block_ffn.layer import BlockFFN, check_ungated
from fewer.language.block_ffn.objective.losses import activation_locality_loss, chunk_sparsification_loss

# pyright: reportCallIssue=false


@strict
class BlockFFNConfig(LlamaConfig):
    """LlamaConfig with BlockFFN layers in place of the gated networks; `intermediate_size` follows from their number and size.

    Attributes:
        num_experts, expert_size, router_eps, kernel: of each layer (see `BlockFFN`); `hidden_act` is the experts' activation.
        locality_factor: lambda_al of the activation locality loss, whose sharpness is `locality_alpha`.
        chunk_factor: lambda_cs of the chunk sparsification loss at the start (0: none), whose chunks are `chunk_len` tokens.
        detach_target: no gradient into the later token of the locality loss.

    Raises:
        ValueError: sizes below 1, a negative factor, alpha not above 0.
    """

    model_type = "fewer_block_ffn"
    base_model_tp_plan = {  # noqa: RUF012 - as transformers declares it
        f"layers.*.self_attn.{name}_proj": "rowwise" if name == "o" else "colwise" for name in "qkvo"
    }
    num_experts: int = 48
    expert_size: int = 64
    router_eps: float = 1e-5
    kernel: str = "auto"
    locality_factor: float = 2e-3
    locality_alpha: float = 100.0
    detach_target: bool = False
    chunk_factor: float = 5e-2
    chunk_len: int = 64
    output_router_logits: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        check_whole(num_experts=self.num_experts, expert_size=self.expert_size, chunk_len=self.chunk_len)
        check_not_negative(locality_factor=self.locality_factor, chunk_factor=self.chunk_factor)
        check_positive(locality_alpha=self.locality_alpha, router_eps=self.router_eps)
        self.intermediate_size = self.num_experts * self.expert_size
        super().__post_init__(**kwargs)


class BlockFFNForCausalLM(MixtureForCausalLM):
    """A causal language model of BlockFFN layers: `from_pretrained`, `save_pretrained`, `generate` and Trainer as any of transformers.

    With labels, `loss` is the token loss; in training (or with `output_router_logits`) it is
    L_lm + locality_factor L_al + chunk_factor L_cs, and the output has the last two together as `aux_loss`. A sequence must then be a
    multiple of `chunk_len` tokens (ValueError) where the chunk loss is on.

    Attributes:
        chunk_factor: lambda_cs of the next pass; an `AdaptiveFactor` says how it goes on. It begins as the config's.
        locality_loss, chunk_loss: of the last pass that had them, without a graph.

    Examples:
        >>> import torch
        >>> config = BlockFFNConfig(vocab_size=32, hidden_size=16, num_experts=8, expert_size=4, num_hidden_layers=2,
        ...                         num_attention_heads=2, chunk_len=4)
        >>> model = BlockFFNForCausalLM(config).train()
        >>> ids = torch.arange(8)[None]
        >>> out = model(ids, labels=ids)
        >>> out.loss > model.eval()(ids, labels=ids).loss, out.router_logits[0].shape
        (tensor(True), torch.Size([1, 8, 8]))
        >>> model.generate(ids, max_new_tokens=2, do_sample=False).shape
        torch.Size([1, 10])
    """

    config_class = BlockFFNConfig

    def __init__(self, config: BlockFFNConfig) -> None:
        super().__init__(config)
        self.chunk_factor = config.chunk_factor
        self.locality_loss: Tensor | None = None
        self.chunk_loss: Tensor | None = None

    @classmethod
    def feed_forward(cls, config: Any) -> BlockFFN:
        sizes = (config.hidden_size, config.num_experts, config.expert_size)
        return BlockFFN(*sizes, eps=config.router_eps, activation=config.hidden_act, kernel=config.kernel)

    def auxiliary_loss(self, router_logits: Sequence[Tensor], attention_mask: Tensor | None, doc_ids: Tensor | None) -> Tensor:
        """locality_factor L_al + chunk_factor L_cs, each a mean over layers."""
        config, total = self.config, router_logits[0].new_zeros(())
        if config.locality_factor:
            words = {"alpha": config.locality_alpha, "detach_target": config.detach_target}
            locality = mean_over_layers(activation_locality_loss(logits, doc_ids, attention_mask, **words) for logits in router_logits)
            self.locality_loss = locality.detach()
            total = total + config.locality_factor * locality
        if self.chunk_factor:
            chunk = mean_over_layers(
                chunk_sparsification_loss(logits, attention_mask, config.chunk_len, config.router_eps) for logits in router_logits
            )
            self.chunk_loss = chunk.detach()
            total = total + self.chunk_factor * chunk
        return total

    @classmethod
    def check_names(cls, left_over: Sequence[str]) -> None:
        check_ungated(left_over)


def register() -> None:
    """Let AutoConfig and AutoModelForCausalLM know the classes."""
    AutoConfig.register(BlockFFNConfig.model_type, BlockFFNConfig, exist_ok=True)
    AutoModelForCausalLM.register(BlockFFNConfig, BlockFFNForCausalLM, exist_ok=True)


register()
