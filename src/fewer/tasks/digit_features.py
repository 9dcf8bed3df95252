"""A small classifier of digits whose features judge generated images, and the Frechet distance between two sets of features."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

SEED, EPOCHS, BATCH = 1, 3, 128  # another seed than the models that it judges


class DigitFeatures(nn.Module):
    """Two strided convolutions, 64 features, ten classes; images [B, 1, side, side] in [-1, 1]."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten()
        )
        halved = (side + 1) // 2
        self.to_features = nn.Linear(32 * ((halved + 1) // 2) ** 2, 64)
        self.to_classes = nn.Linear(64, 10)

    def features(self, x: Tensor) -> Tensor:
        """[B, 64]."""
        return self.to_features(self.convolutions(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.to_classes(F.relu(self.features(x)))


def train_features(images: Tensor, labels: Tensor) -> DigitFeatures:
    """Train the classifier; in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = DigitFeatures(images.shape[-1])
    draw = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    epochs = max(EPOCHS, 20_000 // len(images))  # small sets are seen more often
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=draw).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
    return model.eval().requires_grad_(False)


def frechet_distance(a: Tensor | np.ndarray, b: Tensor | np.ndarray) -> float:
    """|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of two sets of features [N, F] and [M, F], in float64.

    Examples:
        >>> x = np.random.default_rng(0).normal(size=(1000, 3))
        >>> round(frechet_distance(x, x), 6), round(frechet_distance(x, x + [1, 0, 2]), 6)
        (0.0, 5.0)
    """
    a, b = (np.asarray(each, dtype=np.float64) for each in (a, b))
    c_a, c_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # the trace of the root is the sum of the roots of the eigenvalues of C_a C_b, which are those of a symmetric matrix and not negative
    values, vectors = np.linalg.eigh(c_a)
    root = vectors * np.sqrt(np.clip(values, 0, None)) @ vectors.T
    between = np.sqrt(np.clip(np.linalg.eigvalsh(root @ c_b @ root), 0, None)).sum()
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(c_a) + np.trace(c_b) - 2 * between)
