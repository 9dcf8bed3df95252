"""ONNX graphs as layers: every attribute and input of an operator is read, by the graph's opset, or the operator is refused by name.

With a batch of one, an axis of length one may stand anywhere without changing the order of the numbers: time-first and batch-first
sequences are the same.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from fewer.control.smart_composites.to_c.from_torch import ACTIVATIONS, check_recurrent
from fewer.control.smart_composites.to_c.network import Layer, Network, UnsupportedLayer
from fewer.control.smart_composites.to_c.onnx_operators import ATTRIBUTES, FIRST_OPSET, RANDOM, attributes_of, fused, taps_everywhere
from fewer.errors import require

RECURRENT = {"rnn": ["Tanh"], "gru": ["Sigmoid", "Tanh"], "lstm": ["Sigmoid", "Tanh", "Tanh"]}  # their activations


def network_from_onnx(path: Path) -> Network:
    """The network of an ONNX file with one input and one output of fixed shapes, batch one."""
    onnx = require("onnx", "control")
    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
        model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except Exception as error:
        why = " ".join((str(error).strip() or type(error).__name__).splitlines()[0].split())
        raise ValueError(f"{path} is no ONNX model that can be read ({why}); export it again") from error
    return _Reader(onnx, model).read()


class _Reader:
    def __init__(self, onnx: Any, model: Any) -> None:
        self.onnx, self.graph = onnx, model.graph
        self.opset = next((each.version for each in model.opset_import if each.domain in ("", "ai.onnx")), 0)
        if self.opset < FIRST_OPSET:
            raise ValueError(f"the graph is of opset {self.opset}; expected {FIRST_OPSET} or later: export it again")
        self.constants: dict[str, np.ndarray] = {each.name: onnx.numpy_helper.to_array(each) for each in self.graph.initializer}
        inputs = [each for each in self.graph.input if each.name not in self.constants]
        if len(inputs) != 1 or len(self.graph.output) != 1:
            raise ValueError(
                f"the graph has {len(inputs)} inputs and {len(self.graph.output)} outputs; expected one of each: one tensor in, one out"
            )
        self.shapes = {}
        for each in [*self.graph.input, *self.graph.value_info, *self.graph.output]:
            kind = each.type.tensor_type
            if kind.HasField("shape"):
                self.shapes[each.name] = tuple(axis.dim_value or axis.dim_param or "?" for axis in kind.shape.dim)
        kind = onnx.TensorProto.DataType.Name(inputs[0].type.tensor_type.elem_type)
        if kind not in ("FLOAT", "DOUBLE", "FLOAT16", "BFLOAT16"):
            raise ValueError(f"the input is {kind.lower()}; expected real numbers, such as float")
        self.input, self.output = inputs[0].name, self.graph.output[0].name
        self.uses = Counter(name for node in self.graph.node for name in node.input)
        self.uses[self.output] += 1
        self.values = {self.input}  # what is computed from the input
        self.layers: list[Layer] = []

    def read(self) -> Network:
        shape = self.shape(self.input)
        whole, parts = fused(self.graph, self.uses, self.constants)
        for index, node in enumerate(self.graph.node):
            if index in whole:
                kind, source = whole[index]
                self.add(node, "activation", inputs=[source], activation=(kind,))
            elif index not in parts:
                self.node(node)
        if self.output not in self.values or not self.layers:
            raise ValueError("the graph's output does not come from its input; expected at least one layer between them")
        return Network(self.input, shape, self.output, self.layers)

    def dims(self, name: str) -> tuple[int, ...]:
        """The whole shape, the batch axis with it."""
        shape = self.shapes.get(name)
        if shape is None or not all(isinstance(length, int) for length in shape):
            named = next((each for each in shape or () if not isinstance(each, int)), "batch")
            raise ValueError(
                f"{name} has the dynamic shape {shape}; expected fixed shapes: export without dynamic axes, or fix them with "
                f"`python -m onnxruntime.tools.make_dynamic_shape_fixed --dim_param {named} --dim_value 1 IN.onnx OUT.onnx`"
            )
        return tuple(int(length) for length in shape)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape after a batch axis of one, which must come first."""
        dims = self.dims(name)
        if not dims or dims[0] != 1:
            raise ValueError(f"{name} has shape {dims}; expected a batch of one: export with an example of shape [1, ...]")
        return dims[1:]

    def rows(self, name: str) -> tuple[int, ...]:
        """The shape without the batch axis, wherever it stands: for what looks at the last axes alone."""
        dims = self.dims(name)
        if 1 not in dims[:-1]:
            return self.shape(name)
        at = dims.index(1)
        return dims[:at] + dims[at + 1 :]

    def weight(self, node: Any, name: str) -> np.ndarray:
        if name not in self.constants:
            raise UnsupportedLayer(node.name, f"{node.op_type} with {name or 'an input'}, which is computed or missing, not stored")
        return self.constants[name].astype(float) if self.constants[name].dtype.kind == "f" else self.constants[name]

    def optional(self, node: Any, place: int) -> np.ndarray | None:
        """The stored input at a place, if there is one."""
        return self.weight(node, node.input[place]) if len(node.input) > place and node.input[place] else None

    def add(self, node: Any, kind: str, weights: dict[str, np.ndarray] | None = None, inputs: Any = None, **more: Any) -> None:
        inputs, activation = inputs or [node.input[0]], more.pop("activation", None)
        for name in inputs:
            if name not in self.values:
                raise UnsupportedLayer(node.name, f"{node.op_type} of {name}, which is stored, not computed")
        shape_of = self.shape if kind in ("conv", "max_pool", "avg_pool", "scale") else self.rows
        shape, before = more.pop("shape", None) or shape_of(node.output[0]), more.pop("in_shape", None) or shape_of(inputs[0])
        self.layers.append(Layer(kind, list(inputs), node.output[0], shape, before, weights or {}, more, activation, node.name))
        self.values.add(node.output[0])

    def node(self, node: Any) -> None:
        if node.domain not in ("", "ai.onnx"):
            raise UnsupportedLayer(node.name, f"the operation {node.op_type} of {node.domain}")
        if node.op_type == "Shape" or all(not name or name in self.constants for name in node.input):
            return self.compute(node)
        if node.op_type not in ATTRIBUTES:
            raise UnsupportedLayer(node.name, f"the operation {node.op_type}")
        attributes = attributes_of(node, self.opset, self.onnx.helper.get_attribute_value)
        if any(name and self.uses[name] for name in node.output[1:]):
            raise UnsupportedLayer(node.name, f"{node.op_type} with its second output used; expected the first alone")
        getattr(self, f"read_{node.op_type.lower()}")(node, attributes)

    def compute(self, node: Any) -> None:
        """What does not depend on the input is known now, such as the zeros that a recurrent layer begins with."""
        from onnx.reference import ReferenceEvaluator

        helper = self.onnx.helper
        if node.op_type in RANDOM or any(each.HasField("g") or each.graphs for each in node.attribute):
            raise UnsupportedLayer(node.name, f"the operation {node.op_type}")
        if node.op_type == "Shape":
            attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
            axes = self.dims(node.input[0]) if node.input[0] not in self.constants else self.constants[node.input[0]].shape
            self.constants[node.output[0]] = np.array(axes[attributes.get("start", 0) : attributes.get("end")], dtype=np.int64)
            return
        given = {name: self.constants[name] for name in node.input if name}
        typed = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape) for name, value in given.items()
        ]
        results = [helper.make_empty_tensor_value_info(name) for name in node.output if name]
        graph = helper.make_graph([node], "constant", typed, results)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)])
        try:
            values = ReferenceEvaluator(model).run(None, given)
        except Exception as error:
            raise UnsupportedLayer(node.name, f"{node.op_type} of stored values ({str(error).splitlines()[0]})") from error
        for result, value in zip(results, values, strict=True):
            self.constants[result.name] = np.asarray(value)

    # What is the same for each number

    def _activation(self, node: Any, attributes: dict[str, Any]) -> None:
        kind = {"LeakyRelu": "leaky_relu"}.get(node.op_type, node.op_type.lower())
        given = tuple(float(value) for value in attributes.values())
        defaults = ACTIVATIONS[kind][1] if kind in ACTIVATIONS else ()
        self.add(node, "activation", activation=(kind, *given, *defaults[len(given) :]))

    read_relu = read_leakyrelu = read_sigmoid = read_tanh = read_elu = read_softplus = read_softsign = _activation

    def read_selu(self, node: Any, attributes: dict[str, Any]) -> None:
        self.add(node, "activation", activation=("elu", float(attributes["alpha"]), float(attributes["gamma"]), 1.0))

    def read_hardsigmoid(self, node: Any, attributes: dict[str, Any]) -> None:
        alpha, beta = attributes["alpha"], attributes["beta"]
        if abs(alpha - 1 / 6) > 1e-6 or beta != 0.5:
            raise UnsupportedLayer(node.name, f"HardSigmoid with alpha {alpha:g}, beta {beta:g}; expected torch's 1/6 and 0.5")
        self.add(node, "activation", activation=("hardsigmoid",))

    def read_gelu(self, node: Any, attributes: dict[str, Any]) -> None:
        kinds = {b"none": "gelu", b"tanh": "gelu_tanh"}
        if attributes["approximate"] not in kinds:
            raise UnsupportedLayer(node.name, f"Gelu with approximate {attributes['approximate']}; expected none or tanh")
        self.add(node, "activation", activation=(kinds[attributes["approximate"]],))

    # What changes no number

    def _alias(self, node: Any, attributes: dict[str, Any]) -> None:
        if math.prod(self.dims(node.input[0])) != math.prod(self.dims(node.output[0])):
            raise UnsupportedLayer(node.name, f"{node.op_type} that changes how many numbers there are")
        self.add(node, "alias")

    read_identity = read_flatten = read_reshape = read_squeeze = read_unsqueeze = _alias

    def read_dropout(self, node: Any, attributes: dict[str, Any]) -> None:
        training = self.optional(node, 2)
        if training is not None and training.any():
            raise UnsupportedLayer(node.name, "Dropout in training mode")
        self.add(node, "alias")

    def read_transpose(self, node: Any, attributes: dict[str, Any]) -> None:
        dims = self.dims(node.input[0])
        order = [axis for axis in attributes["perm"] or range(len(dims))[::-1] if dims[axis] != 1]
        if order != sorted(order):
            raise UnsupportedLayer(node.name, "a Transpose that moves more than axes of length one")
        self.add(node, "alias")

    def read_gather(self, node: Any, attributes: dict[str, Any]) -> None:
        dims, index = self.dims(node.input[0]), self.weight(node, node.input[1])
        axis = attributes["axis"] % len(dims)
        if index.size != 1 or math.prod(dims[:axis]) != 1:
            raise UnsupportedLayer(node.name, "a Gather that is not one time step")
        self.add(node, "select", index=int(index.item()) % dims[axis])

    # Layers

    def read_softmax(self, node: Any, attributes: dict[str, Any]) -> None:
        """Over one axis since opset 13, before that over all from one on."""
        dims = self.dims(node.input[0])
        axis = attributes["axis"] % len(dims)
        if self.opset >= 13 and math.prod(dims[axis + 1 :]) != 1:
            raise UnsupportedLayer(node.name, f"Softmax over axis {attributes['axis']}; expected the last one")
        self.add(node, "softmax", length=math.prod(dims[axis:]))

    def _linear(self, node: Any, weight: np.ndarray, bias: np.ndarray | None) -> None:
        """y = x W^T + b, from weight [outputs, inputs]."""
        outputs = len(weight)
        if bias is not None and (bias.size not in (1, outputs) or bias.size != math.prod(bias.shape[-1:])):
            raise UnsupportedLayer(
                node.name, f"{node.op_type} with a bias of shape {bias.shape}; expected one number for each of {outputs} outputs"
            )
        flat = np.zeros(outputs) if bias is None else np.broadcast_to(bias.reshape(-1), (outputs,)).copy()
        self.add(node, "linear", {"weight": weight, "bias": flat})

    def read_gemm(self, node: Any, attributes: dict[str, Any]) -> None:
        weight, bias = self.weight(node, node.input[1]) * attributes["alpha"], self.optional(node, 2)
        if attributes["transA"]:
            raise UnsupportedLayer(node.name, "Gemm with transA")
        self._linear(node, weight if attributes["transB"] else weight.T, None if bias is None else bias * attributes["beta"])

    def read_matmul(self, node: Any, attributes: dict[str, Any]) -> None:
        weight = self.weight(node, node.input[1])
        if weight.ndim != 2:
            raise UnsupportedLayer(node.name, f"MatMul with weights of shape {weight.shape}; expected a matrix")
        self._linear(node, weight.T, None)

    def read_add(self, node: Any, attributes: dict[str, Any]) -> None:
        stored = [name for name in node.input if name in self.constants]
        if not stored:
            if self.dims(node.input[0]) != self.dims(node.input[1]):
                raise UnsupportedLayer(node.name, "an add of values of two shapes")
            return self.add(node, "add", inputs=list(node.input))
        (value,) = set(node.input) - set(stored)
        bias, dims = self.weight(node, stored[0]), self.dims(value)
        if self.dims(node.output[0]) != dims or bias.dtype.kind != "f":
            raise UnsupportedLayer(node.name, f"an add of a constant of shape {bias.shape} to a value of shape {dims}")
        before = next((layer for layer in self.layers if layer.output == value), None)
        if before is not None and before.kind == "linear" and self.uses[value] == 1 and bias.size == math.prod(bias.shape[-1:]):
            before.weights["bias"] = before.weights["bias"] + bias.reshape(-1)
            before.output = node.output[0]
            self.values.add(node.output[0])
            return
        whole = np.broadcast_to(bias, dims)
        channels = whole.reshape(*dims[:2], -1)[0] if len(dims) > 1 and dims[0] == 1 else np.zeros((0, 1))
        if not channels.size or (channels != channels[:, :1]).any():
            raise UnsupportedLayer(node.name, "an add of a constant that is no bias, neither of a MatMul before it nor of channels")
        self.add(node, "scale", {"scale": np.ones(len(channels)), "shift": channels[:, 0].copy()}, inputs=[value])

    def read_conv(self, node: Any, attributes: dict[str, Any]) -> None:
        weight, bias = self.weight(node, node.input[1]), self.optional(node, 2)
        spans = self._spans(node, attributes, weight.shape[2:])
        weight = weight[:, :, None, :] if weight.ndim == 3 else weight
        weights = {"weight": weight, "bias": np.zeros(len(weight)) if bias is None else bias}
        self.add(node, "conv", weights, groups=attributes["group"], **spans)

    def read_maxpool(self, node: Any, attributes: dict[str, Any]) -> None:
        self._pool(node, attributes, "max_pool")

    def read_averagepool(self, node: Any, attributes: dict[str, Any]) -> None:
        if attributes["ceil_mode"]:
            raise UnsupportedLayer(node.name, "AveragePool with ceil_mode")
        self._pool(node, attributes, "avg_pool", include_pad=bool(attributes["count_include_pad"]))

    def _pool(self, node: Any, attributes: dict[str, Any], kind: str, **more: Any) -> None:
        kernel = tuple(attributes["kernel_shape"] or ())
        spans = self._spans(node, attributes, kernel)
        whole = (*[1] * (2 - len(kernel)), *kernel)
        if not taps_everywhere(self.shape(node.input[0])[1:], self.shape(node.output[0])[1:], whole, spans):
            raise UnsupportedLayer(node.name, f"{node.op_type} with a window that lies in the padding or beyond")
        self.add(node, kind, kernel=whole, **spans, **more)

    def _spans(self, node: Any, attributes: dict[str, Any], kernel: tuple[int, ...]) -> dict[str, Any]:
        """Strides, padding and dilations of two axes; what is padded behind follows from the shape of the output."""
        axes = len(kernel)
        if axes not in (1, 2) or len(self.shape(node.input[0])) != axes + 1:
            raise UnsupportedLayer(node.name, f"{node.op_type} over {axes} axes; expected one or two")
        if attributes["auto_pad"] not in (b"NOTSET", b"VALID"):
            raise UnsupportedLayer(node.name, f"{node.op_type} with auto_pad")
        pads = list(attributes["pads"] or [0] * 2 * axes)
        pads = pads if attributes["auto_pad"] == b"NOTSET" else [0] * 2 * axes
        if min(pads) < 0:
            raise UnsupportedLayer(node.name, f"{node.op_type} with negative pads")
        lead = [1] * (2 - axes)
        return {
            "stride": (*lead, *(attributes["strides"] or [1] * axes)),
            "padding": (*[0] * (2 - axes), *pads[:axes]),
            "dilation": (*lead, *(attributes["dilations"] or [1] * axes)),
        }

    def read_globalaveragepool(self, node: Any, attributes: dict[str, Any]) -> None:
        shape = self.shape(node.input[0])[1:]
        if len(shape) not in (1, 2):
            raise UnsupportedLayer(node.name, f"GlobalAveragePool over {len(shape)} axes; expected one or two")
        whole = (1,) * (2 - len(shape)) + shape
        self.add(node, "avg_pool", kernel=whole, stride=whole, padding=(0, 0), dilation=(1, 1), include_pad=True)

    def read_batchnormalization(self, node: Any, attributes: dict[str, Any]) -> None:
        if attributes["training_mode"] or not attributes["spatial"]:
            raise UnsupportedLayer(node.name, "BatchNormalization in training mode, or not spatial")
        gain, shift, mean, variance = (self.weight(node, name) for name in node.input[1:5])
        scale = gain / np.sqrt(variance + attributes["epsilon"])
        self.add(node, "scale", {"scale": scale, "shift": shift - mean * scale})

    def read_layernormalization(self, node: Any, attributes: dict[str, Any]) -> None:
        dims, gain, shift = self.dims(node.input[0]), self.weight(node, node.input[1]), self.optional(node, 2)
        length = math.prod(dims[attributes["axis"] % len(dims) :])
        shift = np.zeros(length) if shift is None else shift
        if gain.size != length or shift.size != length:
            raise UnsupportedLayer(
                node.name, f"LayerNormalization with a scale of shape {gain.shape}; expected one for each of {length} numbers"
            )
        self.add(node, "layer_norm", {"gain": gain.reshape(-1), "shift": shift.reshape(-1)}, epsilon=attributes["epsilon"])

    # Recurrent layers

    def _recurrent(self, node: Any, attributes: dict[str, Any], kind: str, order: tuple[int, ...], **more: Any) -> None:
        check_recurrent(node.name, 1, attributes["direction"] != b"forward", True)
        given = [each.decode().lower() for each in attributes["activations"] or ()]
        if given not in ([], [name.lower() for name in RECURRENT[kind]]):
            raise UnsupportedLayer(node.name, f"{node.op_type} with activations {given}; expected {RECURRENT[kind]}")
        for name in ("clip", "layout", "activation_alpha", "activation_beta", "input_forget"):
            if attributes.get(name):
                raise UnsupportedLayer(node.name, f"{node.op_type} with {name}")
        dims = self.dims(node.input[0])
        if len(dims) != 3 or dims[1] != 1:
            raise UnsupportedLayer(node.name, f"{node.op_type} of shape {dims}; expected [time, 1, inputs]: a batch of one")
        lengths = self.optional(node, 4)
        if lengths is not None and (lengths != dims[0]).any():
            raise UnsupportedLayer(node.name, f"{node.op_type} with sequence_lens {lengths.tolist()}; expected {dims[0]}, all of it")
        for place in (5, 6, 7):
            state = self.optional(node, place)
            if state is not None and state.any():
                raise UnsupportedLayer(node.name, f"{node.op_type} with a first state or peepholes of its own; expected zeros")

        def gates(array: np.ndarray) -> np.ndarray:
            parts = np.split(array, len(order))
            return np.concatenate([parts[index] for index in order])

        ih, hh = (gates(self.weight(node, name)[0]) for name in node.input[1:3])
        stored, hidden = self.optional(node, 3), hh.shape[1]
        bias = np.zeros(2 * len(ih)) if stored is None else stored[0]
        weights = {"weight_ih": ih, "weight_hh": hh, "bias_ih": gates(bias[: len(ih)]), "bias_hh": gates(bias[len(ih) :])}
        self.add(node, kind, weights, shape=(dims[0], hidden), in_shape=(dims[0], dims[2]), **more)

    def read_rnn(self, node: Any, attributes: dict[str, Any]) -> None:
        relu = [each.decode().lower() for each in attributes["activations"] or ()] == ["relu"]
        self._recurrent(node, attributes | ({"activations": None} if relu else {}), "rnn", (0,), nonlinearity="relu" if relu else "tanh")

    def read_gru(self, node: Any, attributes: dict[str, Any]) -> None:
        if not attributes["linear_before_reset"]:
            raise UnsupportedLayer(node.name, "GRU without linear_before_reset; expected torch's")
        self._recurrent(node, attributes, "gru", (1, 0, 2))  # ONNX: z r n

    def read_lstm(self, node: Any, attributes: dict[str, Any]) -> None:
        self._recurrent(node, attributes, "lstm", (0, 2, 3, 1))  # ONNX: i o f g
