"""What CFSP is compared with: one threshold for the whole model (FLAP, Wanda-SP), and the structured pruners of other libraries."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from fewer.errors import require
from fewer.language._shared.feed_forward import count_parameters, decoder_layers, ffn_flops, parts_of, width_of
from fewer.language.cfsp.allocation import check_ratio, to_budget
from fewer.language.cfsp.calibration import CfspStats
from fewer.language.cfsp.importance import channel_importance, largest
from fewer.language.cfsp.pruning import PruneReport, cut

REMOVED = 0.5  # of the channels, where libraries are compared


def prune_by_global_threshold(model: nn.Module, stats: CfspStats, ratio: float, multiple_of: int = 128) -> PruneReport:
    """Keep the channels whose standardised Wanda score is above one threshold for all layers, widths brought to the same multiples.

    A threshold alone gives any widths; they are rounded and brought to the same budget as CFSP's, so that both keep as much.
    """
    check_ratio(ratio)
    layers = decoder_layers(model)
    width, before = width_of(layers[0]), count_parameters(model)
    scores = torch.stack([channel_importance(layer, norm, "wanda") for layer, norm in zip(layers, stats.channel_norm, strict=True)])
    standardised = (scores - scores.mean(dim=1, keepdim=True)) / scores.std(dim=1, keepdim=True)
    kept_in_all = round(standardised.numel() * (1 - ratio))
    threshold = standardised.flatten().sort(descending=True).values[kept_in_all - 1]
    wanted = (standardised >= threshold).sum(dim=1).numpy().astype(float)
    rounded = np.clip(np.floor(wanted / multiple_of + 0.5) * multiple_of, multiple_of, width).astype(int)
    widths = to_budget(rounded, wanted, len(layers) * width * (1 - ratio), multiple_of, width).tolist()
    kept = [largest(score, count) for score, count in zip(scores, widths, strict=True)]
    cut(model, kept)
    size = model.config.hidden_size  # pyright: ignore[reportAttributeAccessIssue]
    flops = ffn_flops(size, widths), ffn_flops(size, [width] * len(layers))  # pyright: ignore[reportArgumentType]
    return PruneReport(
        widths, kept, wanted / wanted.mean(), 1 - sum(widths) / (width * len(layers)), count_parameters(model), before, *flops
    )


def optipfair(model: Any, batches: list[torch.Tensor]) -> Any:
    """optipfair's data-driven pruning of gated MLPs to the same width."""
    peer = require("optipfair", "peers")
    return peer.prune_model(
        model=model,
        pruning_type="MLP_GLU",
        neuron_selection_method="MAW",
        pruning_percentage=100 * REMOVED,
        dataloader=[{"input_ids": batch, "attention_mask": torch.ones_like(batch)} for batch in batches],
        show_progress=False,
    )


def torch_pruning(model: Any) -> Any:
    """torch-pruning's magnitude pruning of the feed-forward channels, following its dependency graph."""
    peer = require("torch_pruning", "peers")
    example = {"input_ids": torch.zeros(1, 8, dtype=torch.long), "use_cache": False}
    widths = {parts_of(layer)[0]: REMOVED for layer in decoder_layers(model)}
    ignored = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module not in widths]
    pruner = peer.pruner.BasePruner(
        model,
        example,
        importance=peer.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.0,
        pruning_ratio_dict=widths,
        ignored_layers=[
            module for module in ignored if not any(module is part for layer in decoder_layers(model) for part in parts_of(layer))
        ],
        forward_fn=lambda m, x: m(**x),
    )
    pruner.step()
    return model
