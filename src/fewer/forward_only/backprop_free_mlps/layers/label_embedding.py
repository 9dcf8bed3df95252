"""Labels written into images: the first C entries of an example, flattened, are replaced by its label."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

EPSILON = 1e-8
NEUTRAL = 0.1  # what stands in every label entry where no label is claimed


def normalising_factor(square_sum: Float[Tensor, "batch"], width: int) -> Float[Tensor, "batch 1"]:
    """1 / (sqrt(mean(z^2)) + 1e-8), by which a row z is multiplied to take its length, and so its goodness, away."""
    return ((square_sum / width).sqrt_() + EPSILON).reciprocal_()[:, None]


def normalised(z: Float[Tensor, "batch width"]) -> Float[Tensor, "batch width"]:
    """Rows of root mean square 1.

    >>> normalised(torch.tensor([[3.0, -4.0, 0.0, 0.0]]))
    tensor([[ 1.2000, -1.6000,  0.0000,  0.0000]])
    """
    return z * normalising_factor(z.square().sum(1), z.shape[1])


def normalised_output(a: Float[Tensor, "batch width"], square_sum: Float[Tensor, "batch"]) -> Float[Tensor, "batch width"]:
    """The same for rows whose sums of squares are there, in a's dtype."""
    return (a * normalising_factor(square_sum, a.shape[1])).to(a.dtype)


def embed_labels(x: Float[Tensor, "batch features"], labels: Int[Tensor, "batch"], num_classes: int) -> Float[Tensor, "batch features"]:
    """A copy of x with one-hot(label) in its first C entries.

    >>> embed_labels(torch.full((1, 5), 0.5), torch.tensor([1]), num_classes=3)
    tensor([[0.0000, 1.0000, 0.0000, 0.5000, 0.5000]])
    """
    return torch.cat([F.one_hot(labels, num_classes).to(x.dtype), x[:, num_classes:]], dim=1)


def embed_neutral(x: Float[Tensor, "batch features"], num_classes: int) -> Float[Tensor, "batch features"]:
    """A copy of x with 0.1 in its first C entries: no label is claimed.

    >>> embed_neutral(torch.full((1, 5), 0.5), num_classes=3)
    tensor([[0.1000, 0.1000, 0.1000, 0.5000, 0.5000]])
    """
    return torch.cat([x.new_full((len(x), num_classes), NEUTRAL), x[:, num_classes:]], dim=1)


def wrong_labels(y: Int[Tensor, "batch"], num_classes: int, generator: torch.Generator | None = None) -> Int[Tensor, "batch"]:
    """(y + r) mod C, r uniform in 1..C-1."""
    r = torch.randint(1, num_classes, y.shape, generator=generator, device=generator.device if generator else None)
    return (y + r.to(y.device)) % num_classes


class Activity:
    """The input of a layer: rows of root mean square 1."""

    def __init__(self, h: Float[Tensor, "batch in"]) -> None:
        self.h = h

    def preactivation(self, layer: nn.Linear) -> Float[Tensor, "batch width"]:
        """z = h W^T + b."""
        return torch.addmm(layer.bias, self.h, layer.weight.T)

    def weight_gradient(self, dz: Float[Tensor, "batch width"]) -> Float[Tensor, "width in"]:
        """dW = dz^T h."""
        return dz.T @ self.h


class LabelledImages:
    """The input of the first layer: K copies of a batch of images, stacked, each copy with labels of its own, normalised.

    A one-hot label has length 1 whichever it is, so all copies of an image have one norm and differ in C entries alone. The rest is
    stored once and multiplied by W once, forwards and backwards; C columns of W make the difference.

    Args:
        x: the images.
        labels: of the first copy, then of the second, ...
        num_classes: C.
    """

    def __init__(self, x: Float[Tensor, "batch features"], labels: Int[Tensor, "copies_batch"], num_classes: int) -> None:
        unlabelled = x[:, num_classes:]
        factor = normalising_factor(unlabelled.square().sum(1) + 1, x.shape[1])
        self.copies = len(labels) // max(1, len(x))
        self.unlabelled = unlabelled * factor
        self.labels = F.one_hot(labels, num_classes).to(x.dtype).mul_(factor.repeat(self.copies, 1))

    def preactivation(self, layer: nn.Linear) -> Float[Tensor, "copies_batch width"]:
        """z = h W^T + b."""
        label_weight, weight = layer.weight.tensor_split([self.labels.shape[1]], dim=1)
        shared = torch.addmm(layer.bias, self.unlabelled, weight.T)
        return shared.repeat(self.copies, 1).addmm_(self.labels, label_weight.T)

    def weight_gradient(self, dz: Float[Tensor, "copies_batch width"]) -> Float[Tensor, "width features"]:
        """dW = dz^T h."""
        shared = dz.view(self.copies, -1, dz.shape[1]).sum(0)
        return torch.cat([dz.T @ self.labels, shared.T @ self.unlabelled], dim=1)
