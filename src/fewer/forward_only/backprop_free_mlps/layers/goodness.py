"""Forward-Forward's update of one layer, in closed form: a = ReLU(z) of B rows with the true label, then the same B with a wrong one.

Goodness g = sum of a^2; logit = g - d for d units; the loss is the mean binary cross-entropy of the 2B logits, target t = 1 then 0, plus
0.03 times the mean of (mean(m) - m)^2 over the units, m <- 0.9 m + 0.1 mean(a) being each unit's running mean over the true rows.

    dg = (sigmoid(g - d) - t) / 2B,   dm = 0.03 * 2 (m - mean(m)) / d,   da = 2 a dg + 0.1 dm / B (the latter in true rows),   dz = da

The backward pass of the ReLU is the identity: a unit that is silent for every image still feels dm, and learns to speak.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fewer.forward_only.backprop_free_mlps.layers.label_embedding import Activity, LabelledImages, normalised_output

PEER_WEIGHT = 0.03
PEER_START = 0.5
PEER_RATE = 0.1  # share of the newest batch in the running mean


def goodness(a: Float[Tensor, "batch width"]) -> Float[Tensor, "batch"]:
    """g = the sum of a row's squares, float32 at least: 16 bits do not tell sums over thousands of units apart."""
    return a.square().sum(1, dtype=torch.promote_types(a.dtype, torch.float32))


def contrast_loss(g: Float[Tensor, "batch"], width: int, true: Float[Tensor, "batch"]) -> Float[Tensor, ""]:
    """Mean binary cross-entropy of the logits g - d: 1 for rows with their true label, 0 for the others."""
    return F.binary_cross_entropy_with_logits(g - width, true)


def goodness_gradient(g: Float[Tensor, "batch"], width: int, true: Float[Tensor, "batch"]) -> Float[Tensor, "batch"]:
    """dg = (sigmoid(g - d) - t) / number of rows."""
    return ((g - width).sigmoid_() - true).div_(len(g))


def peer_mean(m: Float[Tensor, "width"], a_true: Float[Tensor, "batch width"]) -> Float[Tensor, "width"]:
    """m <- 0.9 m + 0.1 mean(a)."""
    return torch.lerp(m, a_true.mean(0), PEER_RATE)


def peer_loss(m: Float[Tensor, "width"]) -> Float[Tensor, ""]:
    """0.03 * mean((mean(m) - m)^2): no unit shall be much more active than its peers."""
    return PEER_WEIGHT * (m.mean() - m).square().mean()


def peer_gradient(m: Float[Tensor, "width"], rows: int) -> Float[Tensor, "width"]:
    """da of the peer loss, the same in each of the true rows; the old mean is a constant."""
    return (m - m.mean()) * (PEER_WEIGHT * 2 / len(m) * PEER_RATE / rows)


@torch.no_grad()
def set_layer_gradients(
    layer: nn.Linear, h: LabelledImages | Activity, m: Float[Tensor, "width"]
) -> tuple[Float[Tensor, ""], Float[Tensor, "batch width"]]:
    """Set `.grad` of W and b to the gradient of the layer's own loss, and bring its running means m up to date.

    Returns:
        The loss, and the layer's normalised output, which the next layer works on.
    """
    a = h.preactivation(layer).relu_()
    rows, width = len(a) // 2, a.shape[1]
    g = goodness(a)
    true = torch.zeros_like(g)
    true[:rows] = 1
    m.copy_(peer_mean(m, a[:rows]))
    output = normalised_output(a, g)
    dz = a.mul_(2 * goodness_gradient(g, width, true)[:, None])
    dz[:rows] += peer_gradient(m, rows)
    layer.weight.grad, layer.bias.grad = h.weight_gradient(dz), dz.sum(0)
    return contrast_loss(g, width, true) + peer_loss(m), output
