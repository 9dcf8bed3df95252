"""Pruning: widths from the coarse step, channels from the fine step, weights sliced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from fewer.checks import check_choice
from fewer.files import made_whole
from fewer.language._shared.feed_forward import count_parameters, decoder_layers, ffn_flops, keep_channels, width_of
from fewer.language._shared.saved_form import check_savable, padded, take_own_widths
from fewer.language.cfsp.allocation import allocate, block_scores, check_reachable, uniform_widths
from fewer.language.cfsp.calibration import CfspStats, calibrate
from fewer.language.cfsp.importance import Metric, channel_importance, largest

GlobalMetric = Literal["angular", "cosine", "mse", "mae", "none"]
Export = Literal["list", "padded"]


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

    The model stays one that `save_pretrained` writes and `from_pretrained` reads: where widths differ, its class becomes one whose config
    has a list of them (`FewerLlamaForCausalLM`, still a `LlamaForCausalLM`).

    Args:
        model: a causal language model with gated feed-forward networks (Llama, Mistral, Qwen2 and 3, Gemma, Gemma 2 and 3, OLMo, OLMo 2,
            Granite, SmolLM3), dense and not quantised, in any floating point dtype.
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
        ValueError: a ratio or a metric that cannot be, a layer that would keep nothing, a model that is pruned already, of another shape
            than the statistics, or of a family whose layers cannot differ in width.
        TypeError: the model is quantised.

    Examples:
        >>> from fewer.tasks import micro_lm
        >>> model = micro_lm()
        >>> report = prune(model, calibrate_once(model), ratio=0.5, multiple_of=16)
        >>> sum(report.widths), report.ffn_flops / report.dense_ffn_flops
        (256, 0.5)
    """
    check_prunable(model, ratio, global_metric, metric, multiple_of=multiple_of)
    layers = decoder_layers(model)
    dense = [width_of(layer) for layer in layers]
    if len(set(dense)) > 1 or tuple(stats.channel_norm.shape) != (len(layers), dense[0]):
        raise ValueError(
            f"the layers' widths are {_short(dense)} and the statistics are of {tuple(stats.channel_norm.shape)}; expected the dense model that was calibrated"
        )
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


def check_prunable(
    model: nn.Module, ratio: float, global_metric: str = "angular", metric: str = "relative", *, multiple_of: int = 128
) -> None:
    """ValueError or TypeError for what `prune` would refuse whatever the statistics are: to be asked before they are taken."""
    check_choice(get_args(GlobalMetric), global_metric=global_metric)
    check_choice(get_args(Metric), metric=metric)
    layers = decoder_layers(model)
    width = width_of(layers[0])
    multiple_of = multiple_of if ratio else 1
    if global_metric == "none":
        uniform_widths(len(layers), ratio, width, multiple_of)
    else:
        check_reachable(len(layers), ratio, width, multiple_of)
        check_savable(model)


def cut(model: nn.Module, kept: list[Tensor]) -> None:
    """Keep these channels of each layer; class and config say the widths from then on."""
    for layer, channels in zip(decoder_layers(model), kept, strict=True):
        keep_channels(layer, channels)
    take_own_widths(model)


def save_pruned(
    model: nn.Module,
    out_dir: Path | str,
    tokenizer: Any = None,
    *,
    export: Export = "list",
    overwrite: bool = False,
    inputs: Sequence[Path | str] = (),
) -> Path:
    """Write a pruned model as a directory, whole or not at all.

    Args:
        model: as `prune` or `recover` left it.
        out_dir: a new or empty directory.
        tokenizer: written beside the weights where it is given.
        export: "list" keeps every layer's own width: `intermediate_size` is a list, and the file that can read it is written beside the
            weights (this library loads it as it is, others with `trust_remote_code=True`). Where all widths are equal, plain transformers
            loads it. "padded" fills every layer up with zeros to the widest, so that plain transformers always does.
        overwrite: replace what fewer wrote into the directory before.
        inputs: what the same work reads, and may not be replaced.

    Raises:
        FileExistsError: the directory is not empty and overwrite is false, or it holds what fewer did not write.
        ValueError: an unknown export.
    """
    check_choice(get_args(Export), export=export)
    out = Path(out_dir)
    with made_whole(out, overwrite, inputs=inputs, option="OUT_DIR") as part:
        (padded(model) if export == "padded" else cast(Any, model)).save_pretrained(part)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
    return out


def calibrate_once(model: nn.Module, tokens: int = 64) -> CfspStats:
    """Statistics on random token ids: enough to try pruning out, not to prune well."""
    vocabulary = cast(Any, model).config.vocab_size
    return calibrate(model, [torch.randint(vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0))])


def _short(widths: list[int]) -> str:
    return str(widths[0]) if len(set(widths)) == 1 else ", ".join(map(str, widths))
