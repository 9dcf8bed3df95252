"""A linear predictor by ridge regression on one-hot labels, in closed form."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

CHUNK = 512  # rows whose products are formed at a time


@torch.no_grad()
def fit_ridge(predictor: nn.Linear, a: Float[Tensor, "rows width"], y: Int[Tensor, "rows"], ridge: float) -> None:
    """Set weight and bias to (A^T A + lambda I)^{-1} A^T Y, with a column of ones in A for the bias and Y the one-hot labels.

    In float64 throughout: features are not centred, so that products rounded to float32 can leave A^T A with negative eigenvalues
    larger than lambda.

    Args:
        a: the features.
        y: labels 0..C-1.
        ridge: lambda relative to the mean of the diagonal of A^T A.

    Raises:
        LinAlgError: A^T A + lambda I is not positive definite, as where a feature is not finite.
    """
    width, classes = a.shape[1] + 1, predictor.out_features
    gram = torch.zeros(width, width, dtype=torch.float64, device=a.device)
    target = torch.zeros(width, classes, dtype=torch.float64, device=a.device)
    for part, labels in zip(a.split(CHUNK), y.split(CHUNK), strict=True):
        ones = F.pad(part.double(), (0, 1), value=1.0)
        gram.addmm_(ones.T, ones)
        target.addmm_(ones.T, F.one_hot(labels, classes).double())
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    solution = torch.cholesky_solve(target, torch.linalg.cholesky(gram))
    predictor.weight.copy_(solution[:-1].T)
    predictor.bias.copy_(solution[-1])
