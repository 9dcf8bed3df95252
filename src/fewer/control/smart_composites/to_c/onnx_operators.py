"""The ONNX operators that are read: their attributes with the defaults of each opset, and patterns of several that are one activation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fewer.control.smart_composites.to_c.network import UnsupportedLayer

FIRST_OPSET = 7  # before it, broadcasting, Dropout and BatchNormalization meant other things
RANDOM = ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli", "Dropout")

_SPANS = {"auto_pad": b"NOTSET", "dilations": None, "kernel_shape": None, "pads": None, "strides": None}
_RECURRENT = {
    "activation_alpha": None, "activation_beta": None, "activations": None, "clip": 0.0, "direction": b"forward", "hidden_size": None,
    "layout": 0,
}  # fmt: skip

ATTRIBUTES: dict[str, dict[str, Any]] = {  # operator -> attribute -> default, of all opsets; any other attribute is refused
    "Add": {},
    "AveragePool": _SPANS | {"ceil_mode": 0, "count_include_pad": 0},
    "BatchNormalization": {"epsilon": 1e-5, "momentum": 0.9, "spatial": 1, "training_mode": 0},
    "Conv": _SPANS | {"group": 1},
    "Dropout": {"ratio": 0.5, "seed": 0},
    "Elu": {"alpha": 1.0},
    "Flatten": {"axis": 1},
    "GRU": _RECURRENT | {"linear_before_reset": 0},
    "Gather": {"axis": 0},
    "Gelu": {"approximate": b"none"},
    "Gemm": {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0},
    "GlobalAveragePool": {},
    "HardSigmoid": {"alpha": 0.2, "beta": 0.5},
    "Identity": {},
    "LSTM": _RECURRENT | {"input_forget": 0},
    "LayerNormalization": {"axis": -1, "epsilon": 1e-5, "stash_type": 1},
    "LeakyRelu": {"alpha": 0.01},
    "MatMul": {},
    "MaxPool": _SPANS | {"ceil_mode": 0, "storage_order": 0},
    "RNN": _RECURRENT,
    "Relu": {},
    "Reshape": {"allowzero": 0},
    "Selu": {"alpha": 1.67326319217681884765625, "gamma": 1.05070102214813232421875},
    "Sigmoid": {},
    "Softmax": {"axis": -1},
    "Softplus": {},
    "Softsign": {},
    "Squeeze": {"axes": None},
    "Tanh": {},
    "Transpose": {"perm": None},
    "Unsqueeze": {"axes": None},
}
BEFORE: dict[str, tuple[int, dict[str, Any]]] = {"Softmax": (13, {"axis": 1})}  # operator -> (opset, defaults before it)


def attributes_of(node: Any, opset: int, value_of: Callable[[Any], Any]) -> dict[str, Any]:
    """Every attribute of a node, given or by default, in a fixed order; UnsupportedLayer where it has one that is not known."""
    known = ATTRIBUTES[node.op_type]
    until, older = BEFORE.get(node.op_type, (0, {}))
    given = {each.name: value_of(each) for each in node.attribute}
    for name in given:
        if name not in known:
            raise UnsupportedLayer(node.name, f"{node.op_type} with the attribute {name}")
    return {name: given.get(name, (older if opset < until else {}).get(name, default)) for name, default in known.items()}


def taps_everywhere(size: tuple[int, ...], out: tuple[int, ...], kernel: tuple[int, ...], spans: dict[str, Any]) -> bool:
    """Whether every window of a pooling begins before the end of its input and holds some of it: nobody agrees on what others give."""
    for axis in range(-len(size), 0):
        starts = np.arange(out[axis]) * spans["stride"][axis] - spans["padding"][axis]
        at = starts[:, None] + np.arange(kernel[axis]) * spans["dilation"][axis]
        if not ((at >= 0) & (at < size[axis])).any(axis=1).all() or (starts >= size[axis]).any():
            return False
    return True


def fused(graph: Any, uses: Counter[str], constants: Mapping[str, np.ndarray]) -> tuple[dict[int, tuple[str, str]], set[int]]:
    """Exporters before opset 20 write Softsign as x / (|x| + 1), and GELU as x (erf(x / sqrt 2) + 1) / 2, node by node.

    Returns:
        The last node of each -> (the activation, x), and the nodes before it, of which nothing else uses the output.
    """
    made_by = {name: index for index, node in enumerate(graph.node) for name in node.output}
    stored = {**constants}
    for node in graph.node:
        value = next((each.t for each in node.attribute if each.name == "value"), None)
        if node.op_type == "Constant" and value is not None:
            from onnx import numpy_helper

            stored[node.output[0]] = numpy_helper.to_array(value)

    def number(name: str, wanted: float) -> bool:
        return (
            name in stored and stored[name].size == 1 and stored[name].ndim <= 1 and abs(float(stored[name].reshape(-1)[0]) - wanted) < 1e-5
        )

    def step(name: str, kind: str, seen: list[int]) -> list[str]:
        """The inputs of the node of this kind that makes a value which nothing else uses; none where there is no such."""
        index = made_by.get(name)
        if index is None or graph.node[index].op_type != kind or graph.node[index].domain or uses[name] != 1:
            return []
        seen.append(index)
        return list(graph.node[index].input)

    def other(inputs: list[str], wanted: float) -> str:
        """The one of two factors or summands that is not this number."""
        return next((inputs[1 - place] for place in range(len(inputs)) if len(inputs) == 2 and number(inputs[place], wanted)), "")

    def softsign(inputs: list[str], seen: list[int]) -> str:
        x, below = inputs
        return x if step(other(step(below, "Add", seen), 1.0), "Abs", seen) == [x] else ""

    def gelu(inputs: list[str], seen: list[int]) -> str:
        for x, sum_ in [(pair[0], pair[1]) for pair in _both(step(other(inputs, 0.5), "Mul", seen))]:
            trial: list[int] = []
            erf = step(other(step(sum_, "Add", trial), 1.0), "Erf", trial)
            inner = step(erf[0], "Div", trial) if erf else []
            if inner and inner[0] == x and number(inner[1], 1.41421356):
                seen += trial
                return x
        return ""

    whole, parts = {}, set()
    for index, node in enumerate(graph.node):
        for last, kind, match in (("Div", "softsign", softsign), ("Mul", "gelu", gelu)):
            seen: list[int] = []
            source = match(list(node.input), seen) if node.op_type == last and not node.domain else ""
            if source and source not in stored:
                whole[index] = (kind, source)
                parts |= set(seen)
    return whole, parts


def _both(pair: list[str]) -> list[list[str]]:
    """Two factors, and in the other order."""
    return [pair, pair[::-1]] if len(pair) == 2 else []
