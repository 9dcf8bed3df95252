"""Mono-Forward's update of one layer, in closed form: a = act(W a_in + b), G = a M^T, loss = cross-entropy(G, y).

With P = softmax(G) - onehot(y) over a batch of B rows:

    dM = P^T a / B,   da = P M / B,   dz = da * act'(z),   dW = dz^T a_in,   db = sum of dz over the batch
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from fewer.forward_only.backprop_free_mlps.layers.local_loss import activation_gradient, cross_entropy_gradient, projection_gradient

Activation = Literal["relu", "tanh"]
ACTIVATIONS = {"relu": torch.relu_, "tanh": torch.tanh_}
CHAIN_RULES = {  # da, a -> da * act'(z), the slope said by the output a = act(z); in the memory of da, by torch's own kernels
    "relu": lambda da, a: torch.ops.aten.threshold_backward.grad_input(da, a, 0, grad_input=da),
    "tanh": lambda da, a: torch.ops.aten.tanh_backward.grad_input(da, a, grad_input=da),
}

BLOCK = 1_500_000  # entries of W's gradient that exist at a time: 6 MB of float32, which a last-level cache holds until Adam has read them
ALIGNED = 64  # rows of W that a block is a multiple of: products whose columns begin anywhere are a third slower


def layer_output(
    layer: nn.Linear, x: Float[Tensor, "batch in"], activation: Activation, out: Tensor | None = None
) -> Float[Tensor, "batch width"]:
    """a = act(x W^T + b), written into `out` where given."""
    return ACTIVATIONS[activation](torch.addmm(layer.bias, x, layer.weight.T, out=out))


def preactivation_gradient(
    da: Float[Tensor, "batch width"], a: Float[Tensor, "batch width"], activation: Activation
) -> Float[Tensor, "batch width"]:
    """dz = da * act'(z), in the memory of da."""
    return CHAIN_RULES[activation](da, a)


def weight_gradient(dz: Float[Tensor, "batch width"], x: Float[Tensor, "batch in"], out: Tensor | None = None) -> Float[Tensor, "width in"]:
    """dW = dz^T x, written into `out` where given."""
    return torch.mm(dz.T, x, out=out)


@torch.no_grad()
def set_layer_gradients(
    layer: nn.Linear, projection: nn.Linear, x: Float[Tensor, "batch in"], y: Int[Tensor, "batch"], activation: Activation
) -> tuple[Tensor, Tensor]:
    """Set `.grad` of W, b and M to the gradient of the layer's own loss; returns (loss, a)."""
    a = layer_output(layer, x, activation)
    scores = projection(a)
    score_gradient = cross_entropy_gradient(scores, y)
    dz = preactivation_gradient(activation_gradient(score_gradient, projection.weight), a, activation)
    projection.weight.grad = projection_gradient(score_gradient, a)
    layer.weight.grad = weight_gradient(dz, x)
    layer.bias.grad = dz.sum(0)
    return F.cross_entropy(scores, y), a


@torch.no_grad()
def set_projection_gradient(projection: nn.Linear, x: Float[Tensor, "batch in"], y: Int[Tensor, "batch"]) -> Tensor:
    """Set `.grad` of M, and of its bias where it has one, to the gradient of the loss of its scores on x; returns the loss."""
    scores = projection(x)
    score_gradient = cross_entropy_gradient(scores, y)
    projection.weight.grad = projection_gradient(score_gradient, x)
    if projection.bias is not None:
        projection.bias.grad = score_gradient.sum(0)
    return F.cross_entropy(scores, y)


class ProjectionTrainer:
    """Adam on a projection M alone: multinomial logistic regression, with an intercept where M has a bias."""

    def __init__(self, projection: nn.Linear, lr: float, weight_decay: float = 0.0) -> None:
        self.projection = projection
        self.modules = [projection]
        self.optimizer = torch.optim.Adam(projection.parameters(), lr=lr, weight_decay=weight_decay, fused=True)

    def step(self, x: Float[Tensor, "batch width"], y: Int[Tensor, "batch"]) -> Tensor:
        """Take one step on a batch; returns its mean loss."""
        loss = set_projection_gradient(self.projection, x, y)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def scores(self, x: Float[Tensor, "batch width"]) -> Float[Tensor, "batch classes"]:
        return self.projection(x)


class LayerTrainer:
    """Adam on one layer's W, b and M. The gradient of W is made and used a block of rows at a time: it never exists as a whole.

    Attributes:
        output: the layer's output for the batch of the last step, computed before the update; overwritten by the next step.
    """

    def __init__(self, layer: nn.Linear, projection: nn.Linear, activation: Activation, lr: float) -> None:
        self.layer, self.projection = layer, projection
        self.activation: Activation = activation
        self.modules = [layer, projection]
        blocks = math.ceil(layer.weight.numel() / BLOCK)
        self._blocks = layer.weight.detach().split(
            ALIGNED * math.ceil(layer.out_features / blocks / ALIGNED)
        )  # views: what moves them moves W
        self._bias, self._projection = layer.bias.detach(), projection.weight.detach()
        self._block_gradient = torch.empty_like(self._blocks[0])
        self._activations = self._gradients = layer.weight.new_empty(0, layer.out_features)
        self.optimizer = torch.optim.Adam([*self._blocks, self._bias, self._projection], lr=lr, fused=True)

    @torch.no_grad()
    def step(self, x: Float[Tensor, "batch in"], y: Int[Tensor, "batch"]) -> Tensor:
        """Take one step on a batch; returns its mean loss."""
        if len(x) > len(self._activations):
            self._activations, self._gradients = (x.new_empty(len(x), self.layer.out_features) for _ in range(2))
        a = self.output = layer_output(self.layer, x, self.activation, out=self._activations[: len(x)])
        scores = a @ self._projection.T
        score_gradient = cross_entropy_gradient(scores, y)
        da = activation_gradient(score_gradient, self._projection, out=self._gradients[: len(x)])
        dz = preactivation_gradient(da, a, self.activation)
        self._projection.grad = projection_gradient(score_gradient, a)
        self._bias.grad = dz.sum(0)
        columns = dz.split(len(self._block_gradient), dim=1)
        for block, dz_block in zip(self._blocks, columns, strict=True):
            block.grad = weight_gradient(dz_block, x, out=self._block_gradient[: len(block)])
            self.optimizer.step()
            self.optimizer.zero_grad()  # to None: the next step moves the next block alone
        return F.cross_entropy(scores, y)

    def scores(self, x: Float[Tensor, "batch in"]) -> Float[Tensor, "batch classes"]:
        return self.projection(layer_output(self.layer, x, self.activation))
