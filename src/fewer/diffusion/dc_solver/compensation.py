"""Dynamic compensation: the newest network output is replaced by what the last ones say at a slightly shifted time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fewer.checks import is_number


def interpolation_weights(times: Sequence[float], ratio: Any) -> list[Any]:
    """Lagrange's weights of outputs at `times` (newest first) at the time times[1] + ratio (times[0] - times[1]).

    Times count from times[1] in units of the last step, so that ratio 1 gives exactly the newest output and 0 the one before, and any
    affine image of the times gives the same weights.

    >>> interpolation_weights([600, 800, 999], 1.0), interpolation_weights([0, 1], 1.5)
    ([1.0, -0.0, 0.0], [1.5, -0.5])
    """
    u = [(time - times[1]) / (times[0] - times[1]) for time in times]
    weights = []
    for k, node in enumerate(u):
        weight = 1.0
        for other in (*u[:k], *u[k + 1 :]):
            weight = weight * ((ratio - other) / (node - other))
        weights.append(weight)
    return weights


def compensate(
    outputs: Sequence[Float[Tensor, "*shape"]], times: Sequence[float], ratio: float | Float[Tensor, ""]
) -> Float[Tensor, "*shape"]:
    """m_i read off at t' = t_{i-1} + ratio (t_i - t_{i-1}) from the polynomial through the last K + 1 outputs (arXiv 2409.03755).

    Args:
        outputs: K + 1 of them, newest first, K at least 1; any floating dtype.
        times: the discrete training time of each; no two alike.
        ratio: 1 gives the newest output, 0 the one before, more than 1 extrapolates; a scalar tensor may ask for a gradient.

    Raises:
        ValueError: fewer than two outputs, another number of times, two times alike, or a ratio that is not finite.

    Examples:
        >>> line = [torch.tensor([2.0 * t]) for t in (3.0, 5.0)]
        >>> compensate(line, [3.0, 5.0], 1.5)
        tensor([4.])
    """
    times = [float(time) for time in times]
    if len(outputs) < 2 or len(times) != len(outputs) or len(set(times)) < len(times):
        raise ValueError(f"{len(outputs)} outputs at the times {times}; expected at least two, each at a time of its own")
    if not is_number(ratio if not isinstance(ratio, Tensor) else float(ratio.detach())):
        raise ValueError(f"ratio is {ratio}; expected a finite number")
    weights = interpolation_weights(times, ratio)
    if not isinstance(ratio, Tensor):  # what has no weight is left out, so that ratios of 0 and 1 give an output to the bit
        kept = [(weight, output) for weight, output in zip(weights, outputs, strict=True) if weight]
        if len(kept) == 1 and kept[0][0] == 1:
            return kept[0][1]
        return weighted_sum([weight for weight, _ in kept], [output for _, output in kept])
    return torch.stack([weight.to(output) * output for weight, output in zip(weights, outputs, strict=True)]).sum(0)


def weighted_sum(weights: Sequence[float], tensors: Sequence[Float[Tensor, "*shape"]]) -> Float[Tensor, "*shape"]:
    """sum_k weights[k] tensors[k], in one new tensor."""
    total = tensors[0] * weights[0]
    for weight, tensor in zip(weights[1:], tensors[1:], strict=True):
        total = total.add_(tensor, alpha=weight)
    return total
