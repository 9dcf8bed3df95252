"""The coarse step: how many channels each block keeps, from how much it does (section 3.2 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64
from torch import Tensor

from fewer.checks import check_whole, is_number

# The released code sums distances over 128 x 1024 tokens and divides the centred sums by 10,000; of means it is this factor.
KAPPA = 128 * 1024 / 1e4
MARGIN = 1.05  # how far below 1 the largest share is brought


def block_scores(block_importance: Sequence[float] | Tensor, a: float = 1.0) -> Float64[np.ndarray, "L"]:
    """S_l = sigmoid(a kappa (I_l - mean I))."""
    importance = np.asarray(block_importance, dtype=np.float64)
    odd = np.flatnonzero(~np.isfinite(importance))
    if len(odd):
        raise ValueError(
            f"the importance of block {odd[0]} is {importance[odd[0]]}; expected finite numbers: calibrate again, on other text"
        )
    return 1 / (1 + np.exp(-a * KAPPA * (importance - importance.mean())))


def keep_shares(scores: Float64[np.ndarray, "L"], ratio: float) -> Float64[np.ndarray, "L"]:
    """keep_l = (1 - p) S_l / mean S; where one would reach 1, deviations from the mean are shrunk until all are below it."""
    mean = scores.mean()
    shares = (1 - ratio) * scores / mean
    if shares.max() >= 1 and scores.max() > mean:
        shrink = mean * (1 / (1 - ratio) - 1) / (scores.max() - mean) / MARGIN
        shares = (1 - ratio) * (mean + (scores - mean) * shrink) / mean
    return shares


def allocate(
    block_importance: Sequence[float] | Tensor,
    ratio: float,
    intermediate_size: int,
    a: float = 1.0,
    multiple_of: int = 128,
    exact_budget: bool = True,
) -> list[int]:
    """How many channels each block keeps.

    Args:
        block_importance: [L], the more the more is kept; only differences count.
        ratio: p, the share of all channels that is removed, in [0, 1).
        intermediate_size: I, the channels of a dense block.
        a: how strongly importance is followed; 0 keeps the same everywhere.
        multiple_of: M, widths are multiples of it (128 suits GPUs).
        exact_budget: move single blocks of M, largest rounding error first, until the sum is within M of L I (1 - p).

    Raises:
        ValueError: the ratio is outside [0, 1), M outside 1..I, fewer than two blocks, or a block would keep nothing.

    Examples:
        >>> allocate([0.1, 0.1, 0.2, 0.4], 0.5, 512, multiple_of=32)
        [128, 128, 256, 512]
    """
    check_reachable(len(block_importance), ratio, intermediate_size, multiple_of)
    if len(block_importance) < 2:
        raise ValueError(f"{len(block_importance)} block; the coarse step shares out between at least two: prune with global_metric='none'")
    if ratio == 0:
        return [intermediate_size] * len(block_importance)
    wanted = intermediate_size * keep_shares(block_scores(block_importance, a), ratio)
    widths = (np.floor(wanted / multiple_of + 0.5) * multiple_of).astype(int)
    if widths.min() < multiple_of:
        layer, most = int(widths.argmin()), _highest_ratio(block_importance, a, intermediate_size, multiple_of)
        raise ValueError(
            f"at ratio {ratio:g} layer {layer} would keep no channels (multiples of {multiple_of}); use a ratio of at most {most:.2f}, or a smaller multiple_of"
        )
    widths = np.minimum(widths, intermediate_size)
    if exact_budget:
        widths = to_budget(widths, wanted, len(widths) * intermediate_size * (1 - ratio), multiple_of, intermediate_size)
    check_removed(widths, ratio, intermediate_size, multiple_of)
    return widths.tolist()


def check_reachable(layers: int, ratio: float, intermediate_size: int, multiple_of: int) -> None:
    """ValueError where no widths in these multiples come within one multiple of the share: known before anything is measured."""
    check_ratio(ratio)
    check_whole(multiple_of=multiple_of)
    if multiple_of > intermediate_size:
        raise ValueError(f"multiple_of is {multiple_of}; expected 1 to {intermediate_size}, the channels of a block")
    least, budget = layers * multiple_of, layers * intermediate_size * (1 - ratio)
    if ratio and least - budget >= multiple_of:
        raise ValueError(
            f"at ratio {ratio:g} layer 0 would keep no channels (multiples of {multiple_of}, {budget:.0f} to stay in {layers} layers); "
            f"use a ratio of at most {1 - least / (layers * intermediate_size):.2f}, or a smaller multiple_of"
        )


def check_removed(widths: Sequence[int] | np.ndarray, ratio: float, intermediate_size: int, multiple_of: int) -> None:
    """ValueError where rounding would keep every channel although some were to go."""
    if ratio and sum(widths) >= len(widths) * intermediate_size:
        raise ValueError(
            f"at ratio {ratio:g} widths in multiples of {multiple_of} keep every channel; use a higher ratio, or a smaller multiple_of"
        )


def to_budget(widths: np.ndarray, wanted: np.ndarray, budget: float, multiple_of: int, largest: int) -> np.ndarray:
    """Add or take single blocks of M where rounding erred most, until the sum is within M of the budget."""
    widths = widths.copy()
    while abs(owed := budget - widths.sum()) >= multiple_of:
        sign = 1 if owed > 0 else -1
        moved = widths + sign * multiple_of
        possible = (moved >= multiple_of) & (moved <= largest)
        if not possible.any():
            raise ValueError(
                f"widths of {multiple_of} to {largest} in multiples of {multiple_of} cannot add up to {budget:.0f}; use another multiple_of"
            )
        error = np.where(possible, sign * (wanted - widths), -np.inf)
        widths[int(error.argmax())] += sign * multiple_of
    return widths


def uniform_widths(layers: int, ratio: float, intermediate_size: int, multiple_of: int = 128) -> list[int]:
    """The same number of channels in every block, rounded to a multiple."""
    check_reachable(layers, ratio, intermediate_size, multiple_of)
    width = int(np.floor(intermediate_size * (1 - ratio) / multiple_of + 0.5)) * multiple_of
    if width < multiple_of:
        raise ValueError(
            f"at ratio {ratio:g} layer 0 would keep no channels (multiples of {multiple_of}); use a ratio of at most {1 - multiple_of / intermediate_size:.2f}"
        )
    widths = [min(width, intermediate_size)] * layers
    check_removed(widths, ratio, intermediate_size, multiple_of)
    return widths


def check_ratio(ratio: float) -> None:
    if not is_number(ratio) or not 0 <= ratio < 1:
        raise ValueError(f"ratio is {ratio}; expected at least 0 and below 1: the share of feed-forward channels to remove")


def _highest_ratio(block_importance: Sequence[float] | Tensor, a: float, intermediate_size: int, multiple_of: int) -> float:
    """The highest ratio, in hundredths, at which every block keeps something."""
    scores = block_scores(block_importance, a)
    for hundredths in range(99, 0, -1):
        if (intermediate_size * keep_shares(scores, hundredths / 100)).min() >= multiple_of / 2:
            return hundredths / 100
    return 0.0
