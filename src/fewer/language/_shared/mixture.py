"""A Llama whose feed-forward networks are replaced by mixtures of experts that keep their router logits, for transformers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

# pyright: reportCallIssue=false


class LlamaOfExperts(LlamaForCausalLM):
    """A Llama whose networks are mixtures: read whole or not at all (the host draws what is missing), its routers' losses never in vain."""

    accepts_loss_kwargs = False  # Trainer then divides the whole loss by the micro-batches of a step, as means over tokens need it

    @classmethod
    def check_names(cls, left_over: Sequence[str]) -> None:
        """Refuse names of weights that tell of another kind of model, in words that say which."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **words: Any) -> Any:
        """As transformers'; ValueError where weights are missing, left over or of other shapes than the config's."""
        told = words.pop("output_loading_info", False)
        lenient = words.pop("ignore_mismatched_sizes", False)
        words |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # so that it says which they are
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, **words)
        model, about = loaded
        cls.check_names(sorted(about["unexpected_keys"]))
        odd = sorted({*about["missing_keys"], *about["unexpected_keys"], *(each[0] for each in about["mismatched_keys"])})
        if odd and not lenient:
            raise ValueError(
                f"the weights in {pretrained_model_name_or_path} and its config disagree about {', '.join(odd[:5])}; "
                "expected all weights of the model and no others: take the config that was saved with them"
            )
        return (model, about) if told else model

    def _check_graph(self, router_logits: Sequence[Tensor]) -> None:
        """Re-entrant checkpointing runs layers without a graph, and losses on router logits would silently teach nothing."""
        learning = torch.is_grad_enabled() and any(each.requires_grad for each in self.model.layers.parameters())
        checkpointed = any(getattr(layer, "gradient_checkpointing", False) for layer in self.model.layers)
        if learning and checkpointed and not any(logits.requires_grad for logits in router_logits):
            raise RuntimeError(
                "router logits have no gradient under re-entrant checkpointing; expected the other kind: "
                "gradient_checkpointing_enable({'use_reentrant': False})"
            )


class MixtureForCausalLM(LlamaOfExperts):
    """A decoder of mixtures: a subclass says what a layer's network is, and what loss is on the router logits of all layers.

    A network is called with hidden states [B, S, d] alone. Where its `output_router_logits` is set it keeps `router_logits` [B, S, E] of
    its last pass; `reset_parameters(std)` gives it its first weights.

    With labels, `loss` is the token loss; in training (or with `output_router_logits`) the auxiliary loss is added, as Mixtral does.
    """

    def __init__(self, config: Any) -> None:
        with _narrow(config):  # Llama's own networks are thrown away
            super().__init__(config)
        for layer in self.model.layers:
            cast(Any, layer).mlp = self.feed_forward(config)
        self.post_init()

    @classmethod
    def feed_forward(cls, config: Any) -> Any:
        """A layer's network."""
        raise NotImplementedError

    def auxiliary_loss(self, router_logits: Sequence[Tensor], attention_mask: Tensor | None, doc_ids: Tensor | None) -> Tensor:
        """What is added to the token loss."""
        raise NotImplementedError

    def feed_forwards(self) -> list[Any]:
        """The layers' networks, first to last."""
        return [cast(Any, layer).mlp for layer in self.model.layers]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if hasattr(module, "router_logits"):
            cast(Any, module).reset_parameters(self.config.initializer_range)

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
            output_router_logits: give those of each layer [B, S, E], and with labels add the auxiliary loss; by default in training with labels.
            doc_ids: [B, S] a number for each document, for losses on neighbouring tokens.
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


def mean_over_layers(losses: Iterator[Tensor]) -> Tensor:
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
