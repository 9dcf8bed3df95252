"""A Llama whose feed-forward networks are BlockFFN layers, for transformers: config and model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.utils import can_return_tuple

from fewer.checks import check_not_negative, check_positive, check_whole
from fewer.language.block_ffn.layer.block_ffn import BlockFFN, check_ungated
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


class BlockFFNForCausalLM(LlamaForCausalLM):
    """A causal language model of BlockFFN layers: `from_pretrained`, `save_pretrained`, `generate` and Trainer as any of transformers.

    With labels, `loss` is the token loss; in training (or with `output_router_logits`) it is
    L_lm + locality_factor L_al + chunk_factor L_cs, and the output has the last two together as `aux_loss`.

    Attributes:
        chunk_factor: lambda_cs of the next pass; an `AdaptiveFactor` says how it goes on. It begins as the config's.
        locality_loss, chunk_loss: of the last pass that had them, without a graph.

    Examples:
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
    accepts_loss_kwargs = False  # Trainer then divides the whole loss by the micro-batches of a step, as these means need it

    def __init__(self, config: BlockFFNConfig) -> None:
        with _narrow(config):  # Llama's own networks are thrown away
            super().__init__(config)
        for layer in self.model.layers:
            cast(Any, layer).mlp = self.feed_forward(config)
        self.chunk_factor = config.chunk_factor
        self.locality_loss: Tensor | None = None
        self.chunk_loss: Tensor | None = None
        self.post_init()

    @staticmethod
    def feed_forward(config: Any) -> BlockFFN:
        """A layer's network."""
        sizes = (config.hidden_size, config.num_experts, config.expert_size)
        return BlockFFN(*sizes, eps=config.router_eps, activation=config.hidden_act, kernel=config.kernel)

    def feed_forwards(self) -> list[BlockFFN]:
        """The layers' networks, first to last."""
        return [cast(Any, layer).mlp for layer in self.model.layers]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, BlockFFN):
            module.reset_parameters(self.config.initializer_range)

    @can_return_tuple
    def forward(  # transformers looks up the names of these arguments
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        output_router_logits: bool | None = None,
        doc_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """As LlamaForCausalLM's.

        Args:
            output_router_logits: give A0 [B, S, E] of each layer, and with labels add the two losses; by default in training with labels.
            doc_ids: [B, S] a number for each document; neighbours of two documents do not count in the locality loss.

        Raises:
            ValueError: the chunk loss is on and S is no multiple of chunk_len.
        """
        asked = self.config.output_router_logits if output_router_logits is None else output_router_logits
        with self._router_logits(asked or (self.training and labels is not None)) as router_logits:
            out = super().forward(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, labels=labels,
                logits_to_keep=logits_to_keep, return_dict=True, **kwargs,
            )  # fmt: skip
        words = dict(out)
        if router_logits:
            self._check_graph(router_logits)
            words["router_logits"] = tuple(router_logits)
            if labels is not None:
                aux = self.auxiliary_loss(router_logits, attention_mask, doc_ids).to(words["loss"].device)
                words |= {"aux_loss": aux, "loss": words["loss"] + aux}
        return MoeCausalLMOutputWithPast(**words)

    def auxiliary_loss(self, router_logits: Sequence[Tensor], attention_mask: Tensor | None, doc_ids: Tensor | None) -> Tensor:
        """locality_factor L_al + chunk_factor L_cs, each a mean over layers."""
        config, total = self.config, router_logits[0].new_zeros(())
        if config.locality_factor:
            words = {"alpha": config.locality_alpha, "detach_target": config.detach_target}
            locality = _mean(activation_locality_loss(logits, doc_ids, attention_mask, **words) for logits in router_logits)
            self.locality_loss = locality.detach()
            total = total + config.locality_factor * locality
        if self.chunk_factor:
            chunk = _mean(
                chunk_sparsification_loss(logits, attention_mask, config.chunk_len, config.router_eps) for logits in router_logits
            )
            self.chunk_loss = chunk.detach()
            total = total + self.chunk_factor * chunk
        return total

    @contextlib.contextmanager
    def _router_logits(self, wanted: bool) -> Iterator[list[Tensor]]:
        """A list that has the layers' router logits when the block has ended, where they are wanted."""
        gathered: list[Tensor] = []
        layers = self.feed_forwards()
        before = [layer.output_router_logits for layer in layers]
        try:
            for layer in layers:
                layer.output_router_logits = wanted
            yield gathered
            gathered += [layer.router_logits for layer in layers if layer.router_logits is not None]
        finally:
            for layer, was in zip(layers, before, strict=True):
                layer.output_router_logits, layer.router_logits = was, None

    def _check_graph(self, router_logits: Sequence[Tensor]) -> None:
        """Re-entrant checkpointing runs layers without a graph, and the losses on router logits would silently teach nothing."""
        learning = torch.is_grad_enabled() and any(each.requires_grad for each in self.model.layers.parameters())
        checkpointed = any(getattr(layer, "gradient_checkpointing", False) for layer in self.model.layers)
        if learning and checkpointed and not any(logits.requires_grad for logits in router_logits):
            raise RuntimeError(
                "router logits have no gradient under re-entrant checkpointing; expected the other kind: "
                "gradient_checkpointing_enable({'use_reentrant': False})"
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **words: Any) -> Any:
        """As transformers'; ValueError where weights are missing, left over, or those of gated experts."""
        told = words.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **words)
        model, about = loaded
        check_ungated(about["unexpected_keys"])
        odd = sorted({*about["missing_keys"], *about["unexpected_keys"]})
        if odd and not words.get("ignore_mismatched_sizes"):
            raise ValueError(
                f"the weights in {pretrained_model_name_or_path} and its config disagree about {', '.join(odd[:5])}; "
                "expected all weights of the model and no others: take the config that was saved with them"
            )
        return (model, about) if told else model


def _mean(losses: Iterator[Tensor]) -> Tensor:
    """Of one loss a layer, the layers perhaps on several devices."""
    each = list(losses)
    return torch.stack([loss.to(each[0].device) for loss in each]).mean()


@contextlib.contextmanager
def _narrow(config: Any) -> Iterator[None]:
    """The config with networks of a single channel inside the block."""
    width = config.intermediate_size
    try:
        config.intermediate_size = 1
        yield
    finally:
        config.intermediate_size = width


def register() -> None:
    """Let AutoConfig and AutoModelForCausalLM know the classes."""
    AutoConfig.register(BlockFFNConfig.model_type, BlockFFNConfig, exist_ok=True)
    AutoModelForCausalLM.register(BlockFFNConfig, BlockFFNForCausalLM, exist_ok=True)


register()
