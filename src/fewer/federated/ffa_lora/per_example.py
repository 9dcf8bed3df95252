"""The gradient that DP-SGD steps along: each example's gradient clipped over all trained numbers together, summed, and noise on the sum.

Where every trained parameter is the weight of a linear layer, as LoRA's factors are, an example's gradient is s sum_t g_t (A x_t)^T, of
what went into the layer and what came back to it: one pass forward and back gives both for the whole batch. Elsewhere each example is a
client of one for `FlatModel.stacked_gradient`.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fewer import meters
from fewer.checks import check_not_negative, check_positive
from fewer.federated._shared.flat_model import FlatModel

NORM_FLOOR = 1e-6  # of Opacus: C / (|g| + 1e-6)
CHUNK = 64 * 2**20  # bytes of per-example gradients that are held at once where they must be formed whole


class Factors(NamedTuple):
    """A linear layer's share of each example's gradient, as a product not multiplied out: sum_t e_t a_t^T over the tokens t.

    Attributes:
        a: what went into the layer [B, ..., i].
        e: the gradient of the example's loss with respect to what came out [B, ..., o].
    """

    a: Float[Tensor, "B *T i"]
    e: Float[Tensor, "B *T o"]

    def multiplied(self) -> Gradients:
        """Each example's gradient, multiplied out."""
        a, e = (each.reshape(len(each), -1, each.shape[-1]) for each in self)
        return Gradients(e.mT @ a)

    def smallest(self) -> Factors | Gradients:
        """Whichever takes less to keep: multiplied out where there are more tokens than a thin layer such as LoRA's is wide."""
        kept = self.a[0].numel() + self.e[0].numel()
        return self.multiplied() if self.a.shape[-1] * self.e.shape[-1] <= kept and self.a.ndim > 2 else self

    def squared_norms(self) -> Float[Tensor, "B"]:
        """|g_j|^2; without tokens |a_j|^2 |e_j|^2, for which nothing is multiplied out."""
        if self.a.ndim == 2:
            return self.a.square().sum(1) * self.e.square().sum(1)
        return self.multiplied().squared_norms()

    def weighted_sum(self, weights: Float[Tensor, "B"]) -> Float[Tensor, "o i"]:
        """sum_j w_j g_j."""
        weighed = self.e * weights.view(-1, *[1] * (self.e.ndim - 1))
        return weighed.flatten(0, -2).mT @ self.a.flatten(0, -2)


class Gradients(NamedTuple):
    """A linear layer's share of each example's gradient, whole."""

    g: Float[Tensor, "B o i"]

    def squared_norms(self) -> Float[Tensor, "B"]:
        """|g_j|^2."""
        return self.g.square().sum((1, 2))

    def weighted_sum(self, weights: Float[Tensor, "B"]) -> Float[Tensor, "o i"]:
        """sum_j w_j g_j."""
        return (weights @ self.g.flatten(1)).view(self.g.shape[1:])


def private_gradient(
    flat: FlatModel,
    vector: Float[Tensor, "d"],
    x: Any,
    y: Tensor,
    clip: float,
    noise_multiplier: float,
    expected_batch: float,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "d"]:
    """DP-SGD's step gradient: (sum_j g_j min(1, C / (|g_j| + 1e-6)) + N(0, sigma^2 C^2 I)) / the expected batch.

    Args:
        flat: the model; its loss gives one number an example [B].
        vector: the trained parameters [d].
        x, y: the examples drawn [B, ...], which may be none.
        clip: C.
        noise_multiplier: sigma; 0: no noise.
        expected_batch: how many examples a step has on average; how many were drawn is private and does not enter.
        generator: draws the noise, on the vector's device; None: torch's own.

    Raises:
        ValueError: a number is out of its range.

    Examples:
        >>> flat = FlatModel(nn.Linear(2, 3, bias=False))
        >>> nothing = torch.zeros(0, 2), torch.zeros(0, dtype=torch.long)
        >>> private_gradient(flat, flat.initial(), *nothing, clip=1.0, noise_multiplier=0.0, expected_batch=10)
        tensor([0., 0., 0., 0., 0., 0.])
    """
    check_positive(clip=clip, expected_batch=expected_batch)
    check_not_negative(noise_multiplier=noise_multiplier)
    total = clipped_sum(flat, vector, x, y, clip) if len(y) else torch.zeros_like(vector)
    if noise_multiplier:
        noise = torch.randn(vector.shape, generator=generator, dtype=vector.dtype, device=vector.device)
        total.add_(noise, alpha=noise_multiplier * clip)
    return total.div_(expected_batch)


def clipped_sum(flat: FlatModel, vector: Float[Tensor, "d"], x: Any, y: Tensor, clip: float) -> Float[Tensor, "d"]:
    """sum_j g_j min(1, C / (|g_j| + 1e-6)) over the examples of a batch that has some."""
    factors = factors_of(flat, vector, x, y)
    if factors is not None:
        weights = clip_weights(torch.stack([each.squared_norms() for each in factors]).sum(0).sqrt(), clip)
        return torch.cat([each.weighted_sum(weights).reshape(-1) for each in factors])
    total, at_once = torch.zeros_like(vector), max(1, CHUNK // (flat.size * flat.dtype.itemsize))
    for some_x, some_y in zip(x.split(at_once), y.split(at_once), strict=True):
        each = per_example_gradients(flat, vector, some_x, some_y)
        total += clip_weights(torch.linalg.vector_norm(each, dim=1), clip) @ each
    return total


def clip_weights(norms: Float[Tensor, "B"], clip: float) -> Float[Tensor, "B"]:
    """min(1, C / (|g_j| + 1e-6))."""
    weights = (clip / (norms + NORM_FLOOR)).clamp(max=1.0)
    meters.count("clipped", int((weights < 1).sum()))
    meters.count("drawn", len(norms))
    return weights


def per_example_gradients(flat: FlatModel, vector: Float[Tensor, "d"], x: Tensor, y: Tensor) -> Float[Tensor, "B d"]:
    """Each example's gradient whole, for any model: a client of one each."""
    return flat.stacked_gradient(vector.expand(len(y), -1), x.unsqueeze(1), y.unsqueeze(1), None)


def factors_of(flat: FlatModel, vector: Float[Tensor, "d"], x: Any, y: Tensor) -> list[Factors | Gradients] | None:
    """Each trained parameter's share of the examples' gradients, in the vector's order, in float32 at least.

    None where the gradient has no such form: a trained parameter is no linear layer's weight, a layer is called twice or not at all, examples
    are not the first axis of what goes into it, or the loss is one number a batch.
    """
    if flat not in _examples_first:
        with torch.random.fork_rng(devices=[vector.device] if vector.is_cuda else []):  # what Dropout draws here does not show later
            _examples_first[flat] = _traced(flat, vector, x[:1], y[:1]) is not None
    return _traced(flat, vector, x, y) if _examples_first[flat] else None


# Models in which, of a batch of one, each layer sees a first axis of one. With the tokens first it would be their number, which in another
# batch may equal the number of examples by chance.
_examples_first: WeakKeyDictionary[FlatModel, bool] = WeakKeyDictionary()


def _traced(flat: FlatModel, vector: Tensor, x: Any, y: Tensor) -> list[Factors | Gradients] | None:
    module = flat.module_at(vector)
    layers = [layer for name in flat.shapes if (layer := _linear(module, name)) is not None]
    if flat.tied or len(layers) < len(flat.shapes):
        return None
    inputs: list[list[Tensor]] = [[] for _ in layers]
    shares: dict[int, Factors | Gradients] = {}

    def forward_hook(place: int) -> Any:
        """Keep what goes in, and on the way back what it makes of what comes: the gradient at a wide output is not held any longer."""

        def back(e: Tensor) -> None:
            shares[place] = Factors(inputs[place].pop().to(flat.dtype), e.to(flat.dtype)).smallest()

        def keep(layer: nn.Module, arguments: tuple[Tensor], output: Tensor) -> None:
            inputs[place].append(arguments[0].detach())
            output.register_hook(back)

        return keep

    hooks = [layer.register_forward_hook(forward_hook(place)) for place, layer in enumerate(layers)]
    with torch.enable_grad():
        try:
            losses = flat.loss_fn(module(x), y)
        finally:
            for hook in hooks:
                hook.remove()
        if losses.shape != (len(y),) or any(len(each) != 1 or len(each[0]) != len(y) for each in inputs):
            return None
        torch.autograd.grad(losses.sum(), [layer.weight for layer in layers])
    return [shares[place] for place in range(len(layers))]


def _linear(module: nn.Module, name: str) -> nn.Linear | None:
    """The linear layer that a parameter is the weight of."""
    owner, _, which = name.rpartition(".")
    layer = module.get_submodule(owner)
    return layer if which == "weight" and type(layer) is nn.Linear else None
