"""One Newton-Raphson step and the soft box it stays in: what the controller in Python and the one in C share."""

from __future__ import annotations

import numpy as np
from scipy.linalg import cho_factor, cho_solve

TO_THE_BOUND = 0.99  # of the way to a bound that a step may go (not in the paper)
FIRST_DAMPING = 1e-6  # mu, times 10 until H + mu I is positive definite (not in the paper)
TRIES = 40  # of mu: up to 1e32
HALVINGS = 8  # of a step that would raise J (not in the paper)
SLACK = 1e-6  # by which J may seem to rise by rounding, relative


def box_terms(u: np.ndarray, lower: np.ndarray, upper: np.ndarray, sharpness: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """The soft box s/(u + r/2 - b) + s/(r/2 + b - u) - 4 s/r summed, with its first and second derivative for each u.

    lower = b - r/2 and upper = b + r/2; the constant makes it zero in the middle.
    """
    below, above = u - lower, upper - u
    value = float(np.sum(sharpness / below + sharpness / above - 4 * sharpness / (upper - lower)))
    return value, sharpness * (1 / above**2 - 1 / below**2), 2 * sharpness * (1 / below**3 + 1 / above**3)


def newton_step(gradient: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """-(H + mu I)^{-1} grad J, with the smallest mu of 0, 1e-6, 1e-5, ... for which Cholesky succeeds: always a direction of descent."""
    damping = 0.0
    for _ in range(TRIES):
        try:
            return -cho_solve(cho_factor(hessian + damping * np.eye(len(gradient)), check_finite=False), gradient, check_finite=False)
        except np.linalg.LinAlgError:
            damping = max(FIRST_DAMPING, 10 * damping)
    return np.zeros_like(gradient)  # a Hessian that holds NaN or infinity
