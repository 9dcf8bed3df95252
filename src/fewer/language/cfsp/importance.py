"""The fine step: which channels of a block are kept (section 3.3 of the paper, equation 8, and what it is compared with)."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fewer.checks import check_choice
from fewer.language._shared.feed_forward import parts_of

Metric = Literal["relative", "activation", "wanda", "magnitude", "random"]


def relative_to_competitors(size: Float[Tensor, "H I"]) -> Float[Tensor, "I"]:
    """sum_j size_ji / sum_i' size_ji': each weight relative to the other channels' for the same hidden dimension j."""
    return (size / size.sum(dim=1, keepdim=True).clamp_min(torch.finfo(size.dtype).tiny)).sum(dim=0)


def relative_importance(
    gate: Float[Tensor, "I H"],
    up: Float[Tensor, "I H"],
    down: Float[Tensor, "H I"],
    norm: Float[Tensor, "I"],
    b: float = 1.0,
    c: float = 1.0,
) -> Float[Tensor, "I"]:
    """[sum_j |Wd_ji| X_i^b / sum_i' (|Wd_ji'| X_i'^b) + the same of |Wu| and |Wg| without X] * X_i^c (equation 8)."""
    shares = relative_to_competitors(down.abs() * norm**b) + relative_to_competitors(up.abs().T) + relative_to_competitors(gate.abs().T)
    return shares * norm**c


def activation_importance(hidden_size: int, norm: Float[Tensor, "I"], c: float = 1.0) -> Float[Tensor, "I"]:
    """3 / H * X_i^c: what the released code computes, because it normalises each weight over j and not over the channels.

    Each of its three normalised sums is then 1 (it takes the mean over j: 1 / H), and the weights cancel.
    """
    return 3 / hidden_size * norm**c


def channel_importance(
    mlp: nn.Module,
    channel_norm: Float[Tensor, "I"],
    metric: Metric = "relative",
    b: float = 1.0,
    c: float = 1.0,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "I"]:
    """How much each channel of a gated MLP matters; the largest are kept.

    Args:
        mlp: a module with gate_proj, up_proj and down_proj (or a decoder layer that has such an `mlp`).
        channel_norm: X, the L2 norm over the calibration tokens of each input of down_proj.
        metric: "relative", the paper's equation 8; "activation", what the released code computes; "wanda", mean_j |Wd_ji| X_i;
            "magnitude", the norm of the channel's column of down; "random", drawn from `generator`.
        b, c: exponents of X inside and behind the bracket.

    Raises:
        ValueError: an unknown metric, or norms that are not one a channel.
    """
    layer = mlp if hasattr(mlp, "mlp") else _Holder(mlp)
    gate, up, down = (linear.weight.detach().float() for linear in parts_of(layer))
    norm = channel_norm.to(down)
    check_choice(get_args(Metric), metric=metric)
    if norm.shape != (down.shape[1],):
        raise ValueError(f"channel_norm is {tuple(norm.shape)}; expected ({down.shape[1]},): one a channel, of the dense model")
    if not bool(torch.isfinite(norm).all()):
        raise ValueError(
            f"channel_norm of channel {int((~torch.isfinite(norm)).nonzero()[0, 0])} is not finite; expected norms: calibrate again"
        )
    match metric:
        case "relative":
            return relative_importance(gate, up, down, norm, b, c)
        case "activation":
            return activation_importance(down.shape[0], norm, c)
        case "wanda":
            return down.abs().mean(dim=0) * norm
        case "magnitude":
            return down.norm(dim=0)
        case "random":
            return torch.rand(len(norm), generator=generator)


class _Holder(nn.Module):
    """Something with an `mlp`."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp


def largest(importance: Float[Tensor, "I"], count: int) -> Tensor:
    """The `count` most important channels in their own order; of equal ones the lower index stays.

    >>> largest(torch.tensor([0.1, 0.9, 0.9, 0.9]), 2).tolist()
    [1, 2]
    """
    return torch.sort(torch.sort(importance.cpu(), descending=True, stable=True).indices[:count]).values
