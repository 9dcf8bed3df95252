"""A network as the compiler sees it: layers over values without a batch axis, where each value lives, and what is refused."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

SUPPORTED = (
    "Linear, Conv1d, Conv2d, MaxPool1d/2d, AvgPool1d/2d, AdaptiveAvgPool to 1, Flatten, BatchNorm, LayerNorm, RNN, GRU, LSTM (one layer, one "
    "direction, batch first), residual adds, taking one time step, ReLU, LeakyReLU, Sigmoid, Tanh, Softmax (last axis), ELU, SELU, Softplus, "
    "Softsign, Hardsigmoid, GELU, Identity, Dropout (at inference)"
)


class UnsupportedLayer(ValueError):
    """A layer that has no C text; the message names where it stands and what is supported."""

    def __init__(self, path: str, what: str) -> None:
        super().__init__(f"{path or 'the network'}: {what}; supported are: {SUPPORTED}")


@dataclass
class Layer:
    """One step of a network.

    Attributes:
        kind: linear, conv, max_pool, avg_pool, scale, layer_norm, rnn, gru, lstm, add, activation, softmax, alias or select.
        inputs, output: names of values.
        shape: of the output, without the batch axis.
        in_shape: of the first input, without the batch axis.
        weights: float arrays, in torch's layout and gate order.
        settings: integers and floats such as strides.
        activation: what is applied to the output, with its parameters: ("relu",), ("leaky_relu", 0.01), ...
        path: the module it came from.
    """

    kind: str
    inputs: list[str]
    output: str
    shape: tuple[int, ...]
    in_shape: tuple[int, ...]
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    activation: tuple[Any, ...] | None = None
    path: str = ""

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass
class Network:
    """Layers in the order in which they run, from the value `input` to the value `output`."""

    input: str
    input_shape: tuple[int, ...]
    output: str
    layers: list[Layer]

    @property
    def inputs(self) -> int:
        return math.prod(self.input_shape)

    @property
    def outputs(self) -> int:
        return self.producer(self.output).size

    @property
    def recurrent(self) -> list[Layer]:
        return [layer for layer in self.layers if layer.kind in ("rnn", "gru", "lstm")]

    def producer(self, value: str) -> Layer:
        return next(layer for layer in self.layers if layer.output == value)

    def uses(self, value: str) -> int:
        return sum(layer.inputs.count(value) for layer in self.layers) + (value == self.output)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one call."""
        return sum(_macs(layer) for layer in self.layers)

    @property
    def parameters(self) -> int:
        return sum(array.size for layer in self.layers for array in layer.weights.values())


def _macs(layer: Layer) -> int:
    if layer.kind == "linear":
        return layer.weights["weight"].size * (layer.size // layer.weights["weight"].shape[0])
    if layer.kind == "conv":
        return layer.weights["weight"][0].size * layer.size
    if layer.kind in ("rnn", "gru", "lstm"):
        return layer.in_shape[0] * (layer.weights["weight_ih"].size + layer.weights["weight_hh"].size)
    return 0


def simplified(network: Network) -> Network:
    """The network with batch norms folded into the layer before, activations fused, and layers that do nothing left out."""
    check_finite(network)
    network = _fold_scales(network)
    return _fuse_activations(network)


def check_finite(network: Network) -> None:
    for layer in network.layers:
        for name, array in layer.weights.items():
            if not np.isfinite(array).all():
                raise ValueError(
                    f"{layer.path or layer.kind}: {name} holds NaN or infinity; expected finite weights: train again or repair them"
                )


def _absorb(network: Network, layer: Layer) -> Layer | None:
    """The layer before, where it feeds this one alone and has no activation yet."""
    before = next((other for other in network.layers if other.output == layer.inputs[0]), None)
    return before if before and network.uses(before.output) == 1 and before.activation is None else None


def _fold_scales(network: Network) -> Network:
    """W <- s W, b <- s b + t, exactly what the batch norm after it would do."""
    for layer in [each for each in network.layers if each.kind == "scale"]:
        before = _absorb(network, layer)
        if before is None or before.kind not in ("linear", "conv") or (before.kind == "linear" and len(before.shape) > 1):
            continue
        scale, shift = layer.weights["scale"], layer.weights["shift"]
        weight = before.weights["weight"]
        before.weights["weight"] = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
        before.weights["bias"] = before.weights["bias"] * scale + shift
        before.output = layer.output
        network.layers.remove(layer)
    return network


def _fuse_activations(network: Network) -> Network:
    for layer in [each for each in network.layers if each.kind == "activation"]:
        before = _absorb(network, layer)
        if before is not None and before.kind in ("linear", "conv", "scale", "layer_norm", "add"):
            before.activation, before.output = layer.activation, layer.output
            network.layers.remove(layer)
    return network


# Where values live


@dataclass(frozen=True)
class Plan:
    """Where every value lives: the caller's arrays, or a place in one arena that values share when they are not alive together.

    Attributes:
        place: value -> its C expression.
        scratch: the output of a recurrent layer -> the C expression of its scratch.
        arena: numbers that the arena holds.
    """

    place: dict[str, str]
    scratch: dict[str, str]
    arena: int


def scratch_size(layer: Layer) -> int:
    """Numbers that a recurrent layer needs beside its state: the gates' sums."""
    gates = {"rnn": 2, "gru": 6, "lstm": 8}.get(layer.kind, 0)
    return gates * layer.weights["weight_hh"].shape[1] if gates else 0


def plan_buffers(network: Network) -> Plan:
    """First fit, largest first, over the layers at which values are alive."""
    root = {network.input: network.input}
    for layer in network.layers:
        root[layer.output] = root[layer.inputs[0]] if layer.kind == "alias" else layer.output
    born, dies, sizes = {}, {}, {}
    for time, layer in enumerate(network.layers):
        if layer.kind != "alias":
            born[layer.output], dies[layer.output], sizes[layer.output] = time, time, layer.size
        for value in layer.inputs:
            dies[root[value]] = time
        if scratch_size(layer):
            name = f"scratch of {layer.output}"
            born[name], dies[name], sizes[name] = time, time, scratch_size(layer)
    fixed = {network.input: "in", root[network.output]: "out"}
    fixed[network.input] = "in"
    wanted = sorted((name for name in sizes if name not in fixed), key=lambda name: (-sizes[name], born[name]))
    offsets: dict[str, int] = {}
    for name in wanted:
        taken = sorted(
            (offsets[other], offsets[other] + sizes[other]) for other in offsets if born[other] <= dies[name] and born[name] <= dies[other]
        )
        offset = 0
        for start, end in taken:
            if offset + sizes[name] <= start:
                break
            offset = max(offset, end)
        offsets[name] = offset
    arena = max((offsets[name] + sizes[name] for name in offsets), default=0)
    expressions = fixed | {name: f"(state->arena + {offset})" for name, offset in offsets.items()}
    place = {value: expressions[root[value]] for value in root}
    scratch = {layer.output: expressions[f"scratch of {layer.output}"] for layer in network.layers if scratch_size(layer)}
    return Plan(place, scratch, arena)
