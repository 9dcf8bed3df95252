"""Pruning: widths from the coarse step, channels from the fine step, weights sliced."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from fewer.language.cfsp.allocation import allocate, block_scores, uniform_widths
from fewer.language.cfsp.calibration import CfspStats
from fewer.language.cfsp.gated_mlp import decoder_layers, ffn_flops, keep_channels, width_of
from fewer.language.cfsp.importance import Metric, channel_importance, largest

GlobalMetric = Literal["angular", "cosine", "mse", "mae", "none"]


@dataclass(frozen=True, eq=False)
class PruneReport:
    """What `prune` did.

    Attributes:
        widths: n_l, the channels that each layer keeps.
        kept: for each layer the kept channels' numbers in the dense model, rising.
        scores: S_l, each block's score in the coarse step (what ranks of recovery follow).
        achieved_ratio: the share of all channels that was removed.
        parameters, dense_parameters: of the whole model, tied ones once.
        ffn_flops, dense_ffn_flops: of all feed-forward networks, for one token.
    """

    widths: list[int]
    kept: list[Tensor]
    scores: Float64[Any, "L"]
    achieved_ratio: float
    parameters: int
    dense_parameters: int
    ffn_flops: int
    dense_ffn_flops: int


def prune(
    model: nn.Module,
    stats: CfspStats,
    ratio: float,
    global_metric: GlobalMetric = "angular",
    metric: Metric = "relative",
    *,
    a: float = 1.0,
    b: float = 1.0,
    c: float = 1.0,
    multiple_of: int = 128,
    exact_budget: bool = True,
    generator: torch.Generator | None = None,
) -> PruneReport:
    """Remove a share of the feed-forward channels of a model, in place. Attention and embeddings are untouched.

    Args:
        model: a Llama-like causal language model (Llama, Mistral, Qwen2), dense and not quantised.
        stats: what `calibrate` found on this model.
        ratio: p, the share of feed-forward channels (not of all parameters) to remove, in [0, 1).
        global_metric: what decides how much each block keeps; "none" keeps the same everywhere.
        metric: what decides which channels a block keeps.
        a: how strongly block importance is followed.
        b, c: exponents of the activation norms.
        multiple_of: widths are multiples of it.
        exact_budget: bring the sum of the widths back to the target after rounding.
        generator: draws channels where metric is "random".

    Returns:
        What was kept and what it saves.

    Raises:
        ValueError: a ratio or a metric that cannot be, a layer that would keep nothing, a model that is pruned already or of another shape
            than the statistics.
        TypeError: the model is quantised.

    Examples:
        >>> from fewer.tasks import micro_lm
        >>> model = micro_lm()
        >>> report = prune(model, calibrate_once(model), ratio=0.5, multiple_of=16)
        >>> sum(report.widths), report.ffn_flops / report.dense_ffn_flops
        (256, 0.5)
    """
    layers = decoder_layers(model)
    dense = [width_of(layer) for layer in layers]
    if len(set(dense)) > 1 or tuple(stats.channel_norm.shape) != (len(layers), dense[0]):
        raise ValueError(
            f"the layers' widths are {_short(dense)} and the statistics are of {tuple(stats.channel_norm.shape)}; expected the dense model that was calibrated"
        )
    if global_metric not in get_args(GlobalMetric):
        raise ValueError(f"global_metric {global_metric!r}; expected one of {', '.join(get_args(GlobalMetric))}")
    importance = torch.zeros(len(layers)) if global_metric == "none" else stats.distances[global_metric]
    multiple_of = min(multiple_of, dense[0]) if ratio == 0 else multiple_of
    widths = (
        uniform_widths(len(layers), ratio, dense[0], multiple_of)
        if global_metric == "none"
        else allocate(importance, ratio, dense[0], a, multiple_of, exact_budget)
    )
    before = count_parameters(model)
    kept = [
        largest(channel_importance(layer, norm, metric, b, c, generator), width)
        for layer, norm, width in zip(layers, stats.channel_norm, widths, strict=True)
    ]
    cut(model, kept)
    hidden = cast(Any, model).config.hidden_size
    flops = ffn_flops(hidden, widths), ffn_flops(hidden, dense)
    return PruneReport(widths, kept, block_scores(importance, a), 1 - sum(widths) / sum(dense), count_parameters(model), before, *flops)


def cut(model: nn.Module, kept: list[Tensor]) -> None:
    """Keep these channels of each layer, and say so in the config: a number where all widths are equal."""
    for layer, channels in zip(decoder_layers(model), kept, strict=True):
        keep_channels(layer, channels)
    widths = {len(channels) for channels in kept}
    if len(widths) == 1:
        cast(Any, model).config.intermediate_size = widths.pop()


def count_parameters(model: nn.Module) -> int:
    """Numbers in the model, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def calibrate_once(model: nn.Module, tokens: int = 64) -> CfspStats:
    """Statistics on random token ids: enough to try pruning out, not to prune well."""
    from fewer.language.cfsp.calibration import calibrate

    vocabulary = cast(Any, model).config.vocab_size
    return calibrate(model, [torch.randint(vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0))])


def _short(widths: list[int]) -> str:
    return str(widths[0]) if len(set(widths)) == 1 else ", ".join(map(str, widths))
