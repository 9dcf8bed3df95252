"""ONNX graphs as layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fewer.control.smart_composites.to_c.from_torch import ACTIVATIONS, check_recurrent
from fewer.control.smart_composites.to_c.network import Layer, Network, UnsupportedLayer
from fewer.errors import require

NAMES = {  # ONNX operation -> our activation, and the attributes that it takes with their defaults
    "Relu": ("relu", {}),
    "LeakyRelu": ("leaky_relu", {"alpha": 0.01}),
    "Sigmoid": ("sigmoid", {}),
    "Tanh": ("tanh", {}),
    "Elu": ("elu", {"alpha": 1.0}),
    "Selu": ("selu", {}),
    "Softplus": ("softplus", {}),
    "Softsign": ("softsign", {}),
}


def network_from_onnx(path: Path) -> Network:
    """The network of an ONNX file with one input and one output of fixed shapes, batch one."""
    onnx = require("onnx", "control")
    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
        model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except Exception as error:
        raise ValueError(f"{path} is no ONNX model that can be read ({str(error).splitlines()[0]}); export it again") from error
    return _Reader(onnx, model.graph).read()


class _Reader:
    def __init__(self, onnx: Any, graph: Any) -> None:
        self.onnx, self.graph = onnx, graph
        self.constants: dict[str, np.ndarray] = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
        inputs = [each for each in graph.input if each.name not in self.constants]
        if len(inputs) != 1 or len(graph.output) != 1:
            raise ValueError(
                f"the graph has {len(inputs)} inputs and {len(graph.output)} outputs; expected one of each: one tensor in, one out"
            )
        self.shapes = {}
        for each in [*graph.input, *graph.value_info, *graph.output]:
            kind = each.type.tensor_type
            if kind.HasField("shape"):
                self.shapes[each.name] = tuple(axis.dim_value or axis.dim_param or "?" for axis in kind.shape.dim)
        kind = inputs[0].type.tensor_type.elem_type
        if kind in (onnx.TensorProto.COMPLEX64, onnx.TensorProto.COMPLEX128):
            raise ValueError("the input is complex; expected real numbers")
        self.input, self.output = inputs[0].name, graph.output[0].name
        self.layers: list[Layer] = []
        self.transposed: dict[str, str] = {}  # time-first value -> the batch-first value of the same numbers
        self.parts: dict[str, tuple[str, str]] = {}  # value -> which part of a Softsign or GELU it is, and of what

    def read(self) -> Network:
        shape = self.shape(self.input)
        for node in self.graph.node:
            self.node(node)
        if not self.layers:
            raise ValueError("the graph has no layers; expected at least one")
        return Network(self.input, shape, self.output, self.layers)

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self.shapes.get(name)
        if shape is None or not all(isinstance(length, int) for length in shape):
            raise ValueError(f"{name} has the dynamic shape {shape}; expected fixed shapes: export without dynamic axes")
        if shape[0] != 1:
            raise ValueError(f"{name} has shape {shape}; expected a batch of one: export with an example of shape [1, ...]")
        return tuple(int(length) for length in shape[1:])

    def weight(self, node: Any, name: str) -> np.ndarray:
        if name not in self.constants:
            raise UnsupportedLayer(node.name, f"{node.op_type} with {name}, which is computed, not stored")
        return self.constants[name].astype(float) if self.constants[name].dtype.kind == "f" else self.constants[name]

    def add(self, node: Any, kind: str, weights: dict[str, np.ndarray] | None = None, inputs: Any = None, **more: Any) -> None:
        inputs, activation = inputs or [node.input[0]], more.pop("activation", None)
        shape, before = self.shape(node.output[0]), self.shape(inputs[0])
        self.layers.append(Layer(kind, list(inputs), node.output[0], shape, before, weights or {}, more, activation, node.name))

    def node(self, node: Any) -> None:
        attributes = {each.name: self.onnx.helper.get_attribute_value(each) for each in node.attribute}
        if node.op_type == "Shape" or all(not name or name in self.constants for name in node.input):
            return self.compute(node, attributes)
        if self.is_part(node):
            return
        if node.op_type in NAMES:
            kind, wanted = NAMES[node.op_type]
            given = tuple(float(attributes.get(key, default)) for key, default in wanted.items())
            defaults = ACTIVATIONS[kind][1] if kind in ACTIVATIONS else ()
            return self.add(node, "activation", activation=(kind, *given, *defaults[len(given) :]))
        if node.op_type == "HardSigmoid":
            alpha, beta = attributes.get("alpha", 0.2), attributes.get("beta", 0.5)
            if abs(alpha - 1 / 6) > 1e-6 or beta != 0.5:
                raise UnsupportedLayer(node.name, f"HardSigmoid with alpha {alpha}, beta {beta}; expected torch's 1/6 and 0.5")
            return self.add(node, "activation", activation=("hardsigmoid",))
        if node.op_type in ("Identity", "Flatten", "Reshape", "Dropout", "Squeeze", "Unsqueeze"):
            return self.alias(node)
        reader = getattr(self, f"read_{node.op_type.lower()}", None)
        if reader is None:
            raise UnsupportedLayer(node.name, f"the operation {node.op_type}")
        reader(node, attributes)

    def compute(self, node: Any, attributes: dict[str, Any]) -> None:
        """What does not depend on the input is known now, such as the zeros that a recurrent layer begins with."""
        from onnx.reference import ReferenceEvaluator

        if node.op_type == "Shape":
            axes = self.shapes[node.input[0]]
            if not all(isinstance(length, int) for length in axes):
                self.shape(node.input[0])
            self.constants[node.output[0]] = np.array(axes[attributes.get("start", 0) : attributes.get("end")])
            return
        given = {name: self.constants[name] for name in node.input if name}
        for name, value in zip(node.output, ReferenceEvaluator(node).run(None, given), strict=True):
            self.constants[name] = np.asarray(value)

    def is_part(self, node: Any) -> bool:
        """Exporters before opset 20 write Softsign as x / (|x| + 1), and GELU as x (erf(x / sqrt 2) + 1) / 2, node by node."""
        constant = next(
            (self.constants[name].item() for name in node.input if name in self.constants and self.constants[name].size == 1), None
        )
        value = next((name for name in node.input if name not in self.constants), "")
        part, source = next((self.parts[name] for name in node.input if name in self.parts), ("", value))
        finished = {("Div", "|x| + 1", None): "softsign", ("Mul", "x (erf + 1)", 0.5): "gelu"}
        steps = {
            ("Abs", "", None): "|x|",
            ("Add", "|x|", 1.0): "|x| + 1",
            ("Div", "", 1.414214): "x / sqrt 2",
            ("Erf", "x / sqrt 2", None): "erf",
            ("Add", "erf", 1.0): "erf + 1",
            ("Mul", "erf + 1", None): "x (erf + 1)",
        }
        key = (node.op_type, part, None if constant is None else round(constant, 6))
        if constant is None and len(node.input) == 2 and source not in node.input:
            return False
        if key in finished:
            self.add(node, "activation", inputs=[source], activation=(finished[key],))
            return True
        if key in steps:
            self.parts[node.output[0]] = (steps[key], source)
            return True
        return False

    def alias(self, node: Any) -> None:
        """The same numbers in the same order; the axes before a recurrent layer's output are gone by then."""
        if node.input[0] in self.transposed:
            self.transposed[node.output[0]] = self.transposed[node.input[0]]
            return
        self.add(node, "alias")

    def read_constant(self, node: Any, attributes: dict[str, Any]) -> None:
        self.constants[node.output[0]] = self.onnx.numpy_helper.to_array(attributes["value"])

    def read_gelu(self, node: Any, attributes: dict[str, Any]) -> None:
        self.add(node, "activation", activation=("gelu_tanh" if attributes.get("approximate", b"none") == b"tanh" else "gelu",))

    def read_softmax(self, node: Any, attributes: dict[str, Any]) -> None:
        axes = len(self.shape(node.input[0])) + 1
        if attributes.get("axis", -1) % axes != axes - 1:
            raise UnsupportedLayer(node.name, f"Softmax over axis {attributes.get('axis')}; expected the last one")
        self.add(node, "softmax")

    def read_gemm(self, node: Any, attributes: dict[str, Any]) -> None:
        weight = self.weight(node, node.input[1]) * attributes.get("alpha", 1.0)
        weight = weight if attributes.get("transB", 0) else weight.T
        bias = self.weight(node, node.input[2]).reshape(-1) * attributes.get("beta", 1.0) if len(node.input) > 2 else np.zeros(len(weight))
        if attributes.get("transA", 0):
            raise UnsupportedLayer(node.name, "Gemm with transA")
        self.add(node, "linear", {"weight": weight, "bias": np.broadcast_to(bias, (len(weight),)).copy()})

    def read_matmul(self, node: Any, attributes: dict[str, Any]) -> None:
        weight = self.weight(node, node.input[1]).T
        self.add(node, "linear", {"weight": weight, "bias": np.zeros(len(weight))})

    def read_add(self, node: Any, attributes: dict[str, Any]) -> None:
        stored = [name for name in node.input if name in self.constants]
        if not stored:
            if self.shape(node.input[0]) != self.shape(node.input[1]):
                raise UnsupportedLayer(node.name, "an add of values of two shapes")
            return self.add(node, "add", inputs=node.input)
        (value,) = set(node.input) - set(stored)
        before = next((layer for layer in self.layers if layer.output == value), None)
        bias = self.weight(node, stored[0])
        if before is None or before.kind != "linear" or bias.size != before.shape[-1]:
            raise UnsupportedLayer(node.name, "an add of a constant that is no bias of a MatMul before it")
        before.weights["bias"], before.output = before.weights["bias"] + bias.reshape(-1), node.output[0]

    def _spans(self, node: Any, attributes: dict[str, Any], kernel: Any) -> dict[str, Any]:
        axes = len(kernel)
        if attributes.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID") or (
            attributes.get("ceil_mode", 0) and node.op_type != "MaxPool"
        ):
            raise UnsupportedLayer(node.name, f"{node.op_type} with auto_pad or ceil_mode")
        lead = [1] * (2 - axes)
        pads = list(attributes.get("pads", [0] * 2 * axes))[:axes]
        return {
            "stride": (*lead, *attributes.get("strides", [1] * axes)),
            "padding": (*[0] * (2 - axes), *pads),
            "dilation": (*lead, *attributes.get("dilations", [1] * axes)),
        }

    def read_conv(self, node: Any, attributes: dict[str, Any]) -> None:
        weight = self.weight(node, node.input[1])
        spans = self._spans(node, attributes, weight.shape[2:])
        bias = self.weight(node, node.input[2]) if len(node.input) > 2 else np.zeros(len(weight))
        weight = weight[:, :, None, :] if weight.ndim == 3 else weight
        self.add(node, "conv", {"weight": weight, "bias": bias}, groups=attributes.get("group", 1), **spans)

    def _pool(self, node: Any, attributes: dict[str, Any], kind: str, **more: Any) -> None:
        kernel = attributes["kernel_shape"]
        self.add(node, kind, kernel=(*[1] * (2 - len(kernel)), *kernel), **self._spans(node, attributes, kernel), **more)

    def read_maxpool(self, node: Any, attributes: dict[str, Any]) -> None:
        self._pool(node, attributes, "max_pool")

    def read_averagepool(self, node: Any, attributes: dict[str, Any]) -> None:
        self._pool(node, attributes, "avg_pool", include_pad=bool(attributes.get("count_include_pad", 0)))

    def read_globalaveragepool(self, node: Any, attributes: dict[str, Any]) -> None:
        shape = self.shape(node.input[0])[1:]
        whole = (1,) * (2 - len(shape)) + shape
        self.add(node, "avg_pool", kernel=whole, stride=whole, padding=(0, 0), dilation=(1, 1), include_pad=True)

    def read_batchnormalization(self, node: Any, attributes: dict[str, Any]) -> None:
        gain, shift, mean, variance = (self.weight(node, name) for name in node.input[1:5])
        scale = gain / np.sqrt(variance + attributes.get("epsilon", 1e-5))
        self.add(node, "scale", {"scale": scale, "shift": shift - mean * scale})

    def read_layernormalization(self, node: Any, attributes: dict[str, Any]) -> None:
        gain = self.weight(node, node.input[1]).reshape(-1)
        shift = self.weight(node, node.input[2]).reshape(-1) if len(node.input) > 2 else np.zeros(gain.size)
        self.add(node, "layer_norm", {"gain": gain, "shift": shift}, epsilon=attributes.get("epsilon", 1e-5))

    def read_transpose(self, node: Any, attributes: dict[str, Any]) -> None:
        """Only those around a recurrent layer, between batch-first and time-first: with a batch of one the same numbers."""
        if node.input[0] not in self.transposed and list(attributes.get("perm", [])) != [1, 0, 2]:
            raise UnsupportedLayer(node.name, "a Transpose that is not around a recurrent layer")
        source = self.transposed[node.input[0]] if node.input[0] in self.transposed else node.input[0]
        shape = self.shapes.get(node.output[0], ())
        if node.input[0] in self.transposed and shape and shape[0] == 1:
            self.layers.append(self._same(source, node))
        else:
            self.transposed[node.output[0]] = source

    def _same(self, source: str, node: Any) -> Layer:
        shape = self.shape(node.output[0])
        return Layer("alias", [source], node.output[0], shape, shape, path=node.name)

    def read_gather(self, node: Any, attributes: dict[str, Any]) -> None:
        index = self.weight(node, node.input[1])
        if attributes.get("axis", 0) != 1 or index.size != 1:
            raise UnsupportedLayer(node.name, "a Gather that is not one time step")
        self.add(node, "select", index=index.item() % self.shape(node.input[0])[0])

    def _recurrent(self, node: Any, attributes: dict[str, Any], kind: str, order: tuple[int, ...], **more: Any) -> None:
        direction = attributes.get("direction", b"forward").decode()
        check_recurrent(node.name, 1, direction != "forward", True)
        if node.input[0] not in self.transposed or attributes.get("clip"):
            raise UnsupportedLayer(node.name, f"{kind} that is not batch first, or with clip")
        for name in node.input[5:7]:
            if name and np.any(self.weight(node, name)):
                raise UnsupportedLayer(node.name, f"{kind} with a first state of its own; expected zeros")
        if any(name and any(name in other.input for other in self.graph.node) for name in node.output[1:]):
            raise UnsupportedLayer(node.name, f"{kind} whose final state is used; expected the outputs alone")

        def gates(array: np.ndarray) -> np.ndarray:
            parts = np.split(array, len(order))
            return np.concatenate([parts[index] for index in order])

        ih, hh = (gates(self.weight(node, name)[0]) for name in node.input[1:3])
        bias = self.weight(node, node.input[3])[0] if len(node.input) > 3 and node.input[3] else np.zeros(2 * len(ih))
        source, hidden = self.transposed[node.input[0]], hh.shape[1]
        before = self.shape(source)
        weights = {"weight_ih": ih, "weight_hh": hh, "bias_ih": gates(bias[: len(ih)]), "bias_hh": gates(bias[len(ih) :])}
        name = node.output[0]
        self.layers.append(Layer(kind, [source], name, (before[0], hidden), before, weights, more, None, node.name))
        self.transposed[name] = name

    def read_rnn(self, node: Any, attributes: dict[str, Any]) -> None:
        name = attributes.get("activations", [b"Tanh"])[0].decode().lower()
        self._recurrent(node, attributes, "rnn", (0,), nonlinearity=name)

    def read_gru(self, node: Any, attributes: dict[str, Any]) -> None:
        if not attributes.get("linear_before_reset", 0):
            raise UnsupportedLayer(node.name, "GRU without linear_before_reset; expected torch's")
        self._recurrent(node, attributes, "gru", (1, 0, 2))  # ONNX: z r n

    def read_lstm(self, node: Any, attributes: dict[str, Any]) -> None:
        self._recurrent(node, attributes, "lstm", (0, 2, 3, 1))  # ONNX: i o f g
