"""What one forward pass over a little text tells: how far each block turns the residual stream, and how large each channel gets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn

from fewer.language._shared.feed_forward import decoder_layers, parts_of, width_of
from fewer.meters import count


def angular_distance(h_in: Float[Tensor, "T H"], h_out: Float[Tensor, "T H"]) -> Float32[Tensor, "T"]:
    """arccos(cos(h_in, h_out)) / pi: 0 for the same direction, 0.5 for a right angle (or a zero vector), 1 for the opposite.

    As 2 atan2(|u - v|, |u + v|) of the unit vectors, for arccos is steep without bound at 1 and takes no rounded cosine above it.
    """
    u, v = (nn.functional.normalize(h.float(), dim=-1) for h in (h_in, h_out))
    return 2 * torch.atan2((u - v).norm(dim=-1), (u + v).norm(dim=-1)) / math.pi


def cosine_distance(h_in: Tensor, h_out: Tensor) -> Tensor:
    """1 - cos(h_in, h_out)."""
    return 1 - nn.functional.cosine_similarity(h_in.float(), h_out.float(), dim=-1).clamp(-1, 1)


def mean_squared_error(h_in: Tensor, h_out: Tensor) -> Tensor:
    """The mean of (h_out - h_in)^2."""
    return (h_out.float() - h_in.float()).square().mean(-1)


def mean_absolute_error(h_in: Tensor, h_out: Tensor) -> Tensor:
    """The mean of |h_out - h_in|."""
    return (h_out.float() - h_in.float()).abs().mean(-1)


DISTANCES = {"angular": angular_distance, "cosine": cosine_distance, "mse": mean_squared_error, "mae": mean_absolute_error}


@dataclass(frozen=True, eq=False)
class CfspStats:
    """What `calibrate` found.

    Attributes:
        distances: for each kind of distance, float32 [L]: the mean over tokens between a block's input and output.
        channel_norm: float32 [L, I]: the L2 norm over all tokens of each input of down_proj.
        tokens: how many tokens were seen (padding left out).
    """

    distances: Mapping[str, Float32[Tensor, "L"]]
    channel_norm: Float32[Tensor, "L I"]
    tokens: int

    @property
    def block_importance(self) -> Float32[Tensor, "L"]:
        """The mean angular distance of each block."""
        return self.distances["angular"]

    @staticmethod
    def merge(shards: Sequence[CfspStats]) -> CfspStats:
        """The statistics of all shards together, as if one pass had seen them.

        Examples:
            >>> one = CfspStats({"angular": torch.tensor([0.1])}, torch.tensor([[3.0]]), 10)
            >>> two = CfspStats({"angular": torch.tensor([0.4])}, torch.tensor([[4.0]]), 20)
            >>> both = CfspStats.merge([one, two])
            >>> [round(float(x), 3) for x in (both.block_importance[0], both.channel_norm[0, 0])], both.tokens
            ([0.3, 5.0], 30)
        """
        if not shards:
            raise ValueError("there are no shards to merge; give at least one CfspStats")
        tokens = sum(shard.tokens for shard in shards)
        distances = {
            kind: torch.stack([shard.distances[kind] * (shard.tokens / tokens) for shard in shards]).sum(0) for kind in shards[0].distances
        }
        norms = torch.stack([shard.channel_norm.square() for shard in shards]).sum(0).sqrt()
        return CfspStats(distances, norms, tokens)


class _LayerSums:
    """The running sums of one decoder layer, on its own device, in float64."""

    def __init__(self, number: int, layer: nn.Module) -> None:
        device = parts_of(layer)[2].weight.device
        self.number, self.entered = number, torch.empty(0)
        self.kept: Tensor | None = None  # [B, T] true where a token counts
        self.distance = torch.zeros(len(DISTANCES), dtype=torch.float64, device=device)
        self.squares = torch.zeros(width_of(layer), dtype=torch.float64, device=device)

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.entered = args[0] if args else kwargs["hidden_states"]

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        left = output[0] if isinstance(output, tuple) else output
        h_in, h_out = self._counted(self.entered), self._counted(left)
        self._refuse_nan(h_out)
        self.distance += torch.stack([distance(h_in, h_out).double().sum() for distance in DISTANCES.values()])

    def channels(self, module: nn.Module, args: Any) -> None:
        x = self._counted(args[0])
        self._refuse_nan(x)
        self.squares += x.float().square().sum(0, dtype=torch.float64)

    def _counted(self, x: Tensor) -> Tensor:
        return x.flatten(0, -2) if self.kept is None else x[self.kept.to(x.device)]

    def _refuse_nan(self, x: Tensor) -> None:
        if not bool(torch.isfinite(x).all()):
            raise ValueError(
                f"the activations of layer {self.number} are not finite; expected a model that gives finite ones on this text (try float32)"
            )


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Tensor | Mapping[str, Tensor]]) -> CfspStats:
    """Gather the statistics in one forward pass of the dense model over each batch; nothing is kept but sums.

    Args:
        model: a Llama-like causal language model (Llama, Mistral, Qwen2), not quantised.
        batches: token ids, int64 [B, T], or dicts with `input_ids` and, where there is padding, `attention_mask`.

    Raises:
        ValueError: there are no tokens, token ids beyond the vocabulary, activations that are not finite, or the model has no gated MLPs.
        TypeError: the model is quantised.
    """
    layers = decoder_layers(model)
    sums = [_LayerSums(number, layer) for number, layer in enumerate(layers)]
    tokens, was_training = 0, model.training
    model.eval()
    with ExitStack() as hooks:
        for layer, each in zip(layers, sums, strict=True):
            hooks.callback(layer.register_forward_pre_hook(each.before, with_kwargs=True).remove)
            hooks.callback(layer.register_forward_hook(each.after).remove)
            hooks.callback(parts_of(layer)[2].register_forward_pre_hook(each.channels).remove)
        hooks.callback(model.train, was_training)
        for batch in batches:
            tokens += _pass(model, batch, sums)
    if not tokens:
        raise ValueError("the calibration text is empty; give at least one batch of token ids [B, T]")
    means = torch.stack([each.distance.cpu() for each in sums], dim=1).float() / tokens
    norms = torch.stack([each.squares.cpu().sqrt().float() for each in sums])
    return CfspStats(dict(zip(DISTANCES, means, strict=True)), norms, tokens)


def _pass(model: nn.Module, batch: Tensor | Mapping[str, Tensor], sums: Sequence[_LayerSums]) -> int:
    """One forward pass; the number of tokens that count."""
    words: Mapping[str, Tensor] = {"input_ids": batch} if isinstance(batch, torch.Tensor) else batch
    embeddings: Any = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    place, vocabulary = embeddings.weight.device, embeddings.num_embeddings
    ids, mask = words["input_ids"].to(place), words.get("attention_mask")
    mask = None if mask is None else mask.to(place)
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise ValueError(
            f"token ids from {int(ids.min())} to {int(ids.max())}; expected 0 to {vocabulary - 1}: use the model's own tokenizer"
        )
    kept = None if mask is None or bool(mask.all()) else mask.bool()
    for each in sums:
        each.kept = kept
    seen = ids.numel() if kept is None else int(kept.sum())
    if seen:
        # the base model: a language model's head would only cost time
        getattr(model, "model", model)(input_ids=ids, attention_mask=mask, use_cache=False)
        count("forwarded_tokens", seen)
    return seen
