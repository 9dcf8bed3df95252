"""A smooth MLP in NumPy with its exact first and second derivatives."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.special import erf, expit

from fewer.control.smart_composites.to_c.derivatives import smooth_layers
from fewer.control.smart_composites.to_c.network import Network

Slopes = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]


def tanh_slopes(h: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """sigma, sigma', sigma''."""
    v = np.tanh(h)
    d1 = 1 - v * v
    return v, d1, -2 * v * d1


def sigmoid_slopes(h: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    v = expit(h)
    d1 = v * (1 - v)
    return v, d1, d1 * (1 - 2 * v)


def gelu_slopes(h: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    density, below = np.exp(-0.5 * h * h) / np.sqrt(2 * np.pi), 0.5 * (1 + erf(h / np.sqrt(2)))
    return h * below, below + h * density, density * (2 - h * h)


def softplus_slopes(beta: float, threshold: float) -> Slopes:
    def slopes(h: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        linear, s = beta * h > threshold, expit(beta * h)
        return (
            np.where(linear, h, np.logaddexp(0, beta * h) / beta),
            np.where(linear, 1.0, s),
            np.where(linear, 0.0, beta * s * (1 - s)),
        )

    return slopes


def slopes_of(activation: tuple) -> Slopes:
    if activation[0] == "softplus":
        return softplus_slopes(*activation[1:])
    return {"tanh": tanh_slopes, "sigmoid": sigmoid_slopes, "gelu": gelu_slopes}[activation[0]]


class SmoothMLP:
    """f(z) with df/dz and d2f/dz2, of the chains of Linear and smooth activations that the compiler knows derivatives of."""

    def __init__(self, network: Network) -> None:
        self.inputs, self.outputs = network.inputs, network.outputs
        self.layers = [
            (layer.weights["weight"], layer.weights["bias"], slopes_of(layer.activation) if layer.activation else None)
            for layer in smooth_layers(network)
        ]

    def __call__(self, z: np.ndarray) -> np.ndarray:
        """f(z) [outputs] of z [inputs]."""
        for weight, bias, slopes in self.layers:
            h = weight @ z + bias
            z = slopes(h)[0] if slopes else h
        return z

    def derivatives(self, z: np.ndarray, second: bool = True) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """f(z), df/dz [outputs, inputs] and, where asked for, d2f/dz2 [outputs, inputs, inputs]."""
        tangent, curve = None, None
        for weight, bias, slopes in self.layers:
            h = weight @ z + bias
            tangent = weight if tangent is None else weight @ tangent
            if curve is not None:
                curve = np.tensordot(weight, curve, 1)
            if slopes is None:
                z = h
                continue
            z, d1, d2 = slopes(h)
            if second:
                bent = (tangent * d2[:, None])[:, :, None] * tangent[:, None, :]
                curve = bent if curve is None else bent + d1[:, None, None] * curve
            tangent = tangent * d1[:, None]
        if second and curve is None:
            curve = np.zeros((self.outputs, self.inputs, self.inputs))
        assert tangent is not None
        return z, tangent, curve
