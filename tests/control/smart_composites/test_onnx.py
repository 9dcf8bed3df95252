"""ONNX graphs as C: random ones over all operators, opsets and attribute values equal onnxruntime's, or are refused by name."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from fewer.control import UnsupportedLayer
from fewer.control.smart_composites.to_c.from_onnx import network_from_onnx
from fewer.control.smart_composites.to_c.network import simplified
from fewer.control.smart_composites.to_c.onnx_operators import ATTRIBUTES
from fewer.control.smart_composites.to_c.text import DOUBLE

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
helper, TensorProto = onnx.helper, onnx.TensorProto
OPSETS = (7, 9, 11, 12, 13, 14, 17, 19, 20, 21, 22)


def save(folder, nodes, stored, shape, opset, out="y", name="m.onnx"):
    """A model file of these nodes; the shape of its output is inferred."""
    given = [onnx.numpy_helper.from_array(value, key) for key, value in stored.items()]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    graph = helper.make_graph(nodes, "g", [x], [helper.make_empty_tensor_value_info(out)], given)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8 if opset < 20 else 10)
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph.output[0]
    model.graph.output[0].CopyFrom(inferred)
    onnx.save(model, folder / name)
    return folder / name


def session(file):
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


class Drawn:
    """A random graph: nodes appended one after the other, each on the value `at` of known shape."""

    def __init__(self, rng, opset):
        self.rng, self.opset, self.nodes, self.stored, self.at, self.used = rng, opset, [], {}, "x", set()
        self.shape = tuple(self.pick([(1, 6), (1, 4, 8), (1, 2, 6, 7), (1, 5, 3)]))
        self.start = self.shape

    def pick(self, options):
        return options[self.rng.integers(len(options))]

    def const(self, *shape, low=None):
        name = f"w{len(self.stored)}"
        value = self.rng.standard_normal(shape) * 0.5 if low is None else self.rng.uniform(low, 1.5, shape)
        self.stored[name] = value.astype(np.float32)
        return name

    def ints(self, *values):
        name = f"w{len(self.stored)}"
        self.stored[name] = np.array(values, dtype=np.int64)
        return name

    def emit(self, kind, *inputs, outputs=1, **attributes):
        name = f"v{len(self.nodes)}"
        more = ["" for _ in range(outputs - 1)]
        self.nodes.append(helper.make_node(kind, list(inputs), [name, *more], name=f"{kind}{len(self.nodes)}", **attributes))
        self.used.add(kind)
        self.before, self.at = self.at, name
        return name

    def some(self, **attributes):
        """Some of these attributes, each a function of nothing."""
        return {name: value for name, value in attributes.items() if value is not None and self.rng.random() < 0.6}

    def node(self):
        rng, rank = self.rng, len(self.shape)
        kind = self.pick([*sorted(ATTRIBUTES), "Softsign as three", "GELU as five", "Constant add"])
        getattr(self, "draw_" + kind.lower().replace(" ", "_"), self.draw_elementwise)(kind, rng, rank)

    def draw_elementwise(self, kind, rng, rank):
        alpha = float(np.float32(rng.uniform(0.05, 1.5)))
        attributes = {
            "LeakyRelu": {"alpha": alpha}, "Elu": {"alpha": alpha}, "Selu": {"alpha": alpha, "gamma": 1 + alpha},
            "HardSigmoid": self.pick([{"alpha": alpha}, {"alpha": 1 / 6, "beta": 0.5}, {"beta": 0.4}]),
        }.get(kind, {})  # fmt: skip
        attributes = attributes if kind == "HardSigmoid" else self.some(**attributes)
        self.emit(kind, self.at, **attributes)

    def draw_gelu(self, kind, rng, rank):
        self.emit(kind, self.at, **self.some(approximate=self.pick(["none", "tanh"])))

    def draw_softsign_as_three(self, kind, rng, rank):
        x, one = self.at, self.const(1, low=1.0)
        self.stored[one][:] = self.pick([1.0, 1.0, 2.0])
        a = self.emit("Abs", x)
        b = self.emit("Add", *self.pick([(a, one), (one, a)]))
        self.emit("Div", *self.pick([(x, b), (x, b), (b, x), (a, b)]))

    def draw_gelu_as_five(self, kind, rng, rank):
        x = self.at
        root, one, half = (self.const(1, low=1.0) for _ in range(3))
        self.stored[root][:], self.stored[one][:], self.stored[half][:] = self.pick([2**0.5, 2**0.5, 1.0]), 1.0, 0.5
        a = self.emit("Erf", self.emit("Div", x, root))
        b = self.emit("Add", *self.pick([(a, one), (one, a)]))
        c = self.emit("Mul", *self.pick([(x, b), (b, x), (b, b)]))
        self.emit("Mul", *self.pick([(c, half), (half, c)]))

    def draw_constant_add(self, kind, rng, rank):
        shape = self.pick([(), (1,), self.shape[-1:], self.shape[1:], (1, self.shape[1], *[1] * (rank - 2)), (3, *self.shape[1:])])
        self.emit("Add", *self.pick([(self.at, self.const(*shape)), (self.const(*shape), self.at)]))

    def draw_add(self, kind, rng, rank):
        x = self.at
        kind = self.pick(["same", "branch"])
        if kind == "same":
            self.emit("Add", x, x)
        else:
            self.emit("Add", *self.pick([(self.emit("Tanh", x), x), (x, self.emit("Relu", x))]))

    def draw_matmul(self, kind, rng, rank):
        width = int(rng.integers(1, 20))
        h = self.emit("MatMul", self.at, self.const(self.shape[-1], width))
        self.shape = (*self.shape[:-1], width)
        if rng.random() < 0.7:
            b = self.const(*self.pick([(width,), (1, width), (1,)]))
            self.emit("Add", *self.pick([(h, b), (b, h)]))
            if rng.random() < 0.4:  # the value before its bias has another user
                self.emit("Add", *self.pick([(self.at, h), (h, self.at)]))

    def draw_gemm(self, kind, rng, rank):
        width, turned = int(rng.integers(1, 20)), int(rng.integers(2))
        weight = self.const(*((width, self.shape[-1]) if turned else (self.shape[-1], width)))
        bias = [self.const(*self.pick([(width,), (1, width), (1,), (1, 1), ()]))] if rng.random() < 0.7 or self.opset < 11 else []
        self.emit("Gemm", self.at, weight, *bias, transB=turned, **self.some(alpha=0.5, beta=2.0, transA=self.pick([0, 0, 1])))
        self.shape = (*self.shape[:-1], width)

    def window(self, rank, kernel):
        axes = rank - 2
        attributes = self.some(
            strides=[int(s) for s in self.rng.integers(1, 3, axes)], pads=[int(p) for p in self.rng.integers(0, 2, 2 * axes)],
            auto_pad=self.pick(["NOTSET", "NOTSET", "VALID", "SAME_UPPER"]),
        )  # fmt: skip
        if attributes.get("auto_pad", "NOTSET") != "NOTSET":
            attributes.pop("pads", None)
        return attributes

    def draw_conv(self, kind, rng, rank):
        axes, channels = max(rank - 2, 1), self.shape[1]
        groups, out = self.pick([1, 1, channels]), channels * int(rng.integers(1, 4))
        kernel = [int(k) for k in rng.integers(1, 4, axes)]
        inputs = [self.at, self.const(out, channels // groups, *kernel), *self.pick([[], [self.const(out)]])]
        more = self.some(dilations=[int(d) for d in rng.integers(1, 3, axes)], kernel_shape=kernel)
        self.emit("Conv", *inputs, **({"group": groups} if groups > 1 else {}), **more, **self.window(rank, kernel))

    def draw_maxpool(self, kind, rng, rank):
        axes = max(rank - 2, 1)
        kernel = [int(k) for k in rng.integers(1, 4, axes)]
        more = self.some(
            ceil_mode=int(rng.integers(2)) if self.opset >= 10 else None, storage_order=1 if self.opset >= 8 and kind == "MaxPool" else None,
            dilations=[int(d) for d in rng.integers(1, 3, axes)] if self.opset >= (10 if kind == "MaxPool" else 19) else None,
            count_include_pad=1 if kind == "AveragePool" else None,
        )  # fmt: skip
        self.emit(kind, self.at, kernel_shape=kernel, **more, **self.window(rank, kernel))

    draw_averagepool = draw_maxpool

    def draw_batchnormalization(self, kind, rng, rank):
        c = self.shape[1]
        inputs = [self.at, self.const(c), self.const(c), self.const(c), self.const(c, low=0.5)]
        self.emit(kind, *inputs, **self.some(epsilon=1e-2, momentum=0.5, training_mode=0 if self.opset >= 14 else None))

    def draw_layernormalization(self, kind, rng, rank):
        axis = int(rng.integers(1, rank))
        wide = self.pick([self.shape[axis:], self.shape[axis:], self.shape[-1:]])
        self.emit(kind, self.at, self.const(*wide), *self.pick([[], [self.const(*wide)]]), axis=axis, **self.some(epsilon=1e-2))

    def draw_softmax(self, kind, rng, rank):
        self.emit(kind, self.at, **self.some(axis=int(rng.integers(-rank, rank))))

    def draw_dropout(self, kind, rng, rank):
        if self.opset < 12:
            return self.emit(kind, self.at, **self.some(ratio=0.3))
        ratio = self.const(low=0.1)
        self.stored["train"] = np.array(False)
        self.stored[ratio] = np.array(0.3, dtype=np.float32)
        self.emit(kind, self.at, *self.pick([[], [ratio], [ratio, "train"]]))

    def draw_flatten(self, kind, rng, rank):
        self.emit(kind, self.at, **self.some(axis=self.pick([0, 1, 1, 2])))
        self.shape = (1, int(np.prod(self.shape)))

    def draw_reshape(self, kind, rng, rank):
        whole = int(np.prod(self.shape))
        target = self.pick([[1, -1], [0, -1], [1, whole], [1, 1, whole], [-1, 1, self.shape[-1]]])
        self.emit(kind, self.at, self.ints(*target))
        self.shape = tuple(whole if t == -1 else t for t in target)

    def draw_squeeze(self, kind, rng, rank):
        self.unsqueezed()
        self.axes("Squeeze", 1)

    def draw_unsqueeze(self, kind, rng, rank):
        self.unsqueezed()
        self.shape = (1, 1, *self.shape[1:])

    def unsqueezed(self):
        self.axes("Unsqueeze", 1)

    def axes(self, kind, *axes):
        self.emit(kind, self.at, self.ints(*axes)) if self.opset >= 13 else self.emit(kind, self.at, axes=list(axes))

    def draw_transpose(self, kind, rng, rank):
        if rng.random() < 0.5:
            self.unsqueezed()
            self.emit("Transpose", self.at, perm=[1, 0, *range(2, rank + 1)])
            self.shape = (1, 1, *self.shape[1:])
        else:
            self.emit("Transpose", self.at, **self.some(perm=[0, *rng.permutation(np.arange(1, rank)).tolist()]))

    def draw_gather(self, kind, rng, rank):
        index = self.pick([self.ints(-1), self.ints(0), self.ints(0, 1)])
        if rng.random() < 0.5:
            self.stored[index] = self.stored[index][0].reshape(())
        self.emit(kind, self.at, index, **self.some(axis=1))

    def draw_gru(self, kind, rng, rank):
        gates, hidden = {"RNN": 1, "GRU": 3, "LSTM": 4}[kind], int(rng.integers(1, 6))
        time, wide = self.shape[1], self.shape[-1]
        sequence = self.emit("Transpose", self.at, perm=[1, 0, 2])
        inputs = [sequence, self.const(1, gates * hidden, wide), self.const(1, gates * hidden, hidden)]
        names = ["Sigmoid", "Tanh", "Relu"]
        length = {"RNN": 1, "GRU": 2, "LSTM": 3}[kind]
        usual = {"RNN": ["Tanh"], "GRU": ["Sigmoid", "Tanh"], "LSTM": ["Sigmoid", "Tanh", "Tanh"]}[kind]
        attributes = self.some(
            activations=self.pick([usual, usual, [self.pick(names) for _ in range(length)]]), direction=self.pick(["forward"] * 3 + ["reverse"]),
            clip=self.pick([None, None, 0.5]), input_forget=1 if kind == "LSTM" and rng.random() < 0.3 else None,
        )  # fmt: skip
        if kind == "GRU":
            attributes["linear_before_reset"] = self.pick([1, 1, 1, 0])
        if rng.random() < 0.7:
            inputs.append(self.const(1, 2 * gates * hidden))
            if rng.random() < 0.4:
                self.stored[f"w{len(self.stored)}"] = np.array([self.pick([time, time, time - 1])], dtype=np.int32)
                inputs.append(f"w{len(self.stored) - 1}")
                if rng.random() < 0.5:
                    first = self.const(1, 1, hidden)
                    self.stored[first] *= self.pick([0, 0, 1])
                    inputs.append(first)
        self.emit(kind, *inputs, hidden_size=hidden, **attributes)
        self.axes("Squeeze", 1)
        self.emit("Transpose", self.at, perm=[1, 0, 2])
        self.shape = (1, time, hidden)
        if rng.random() < 0.5:
            self.emit("Gather", self.at, self.ints(-1), axis=1)
            self.shape = (1, 1, hidden)

    draw_rnn = draw_lstm = draw_gru


def drawn(folder, seed):
    """A file that onnxruntime runs, its input and what onnxruntime says; None where the draw was no model."""
    rng = np.random.default_rng(seed)
    graph = Drawn(rng, int(OPSETS[seed % len(OPSETS)]))
    try:
        for _ in range(int(rng.integers(1, 4))):
            graph.node()
            file = save(folder, graph.nodes, graph.stored, graph.start, graph.opset, graph.at, f"{seed}.onnx")
            graph.shape = tuple(axis.dim_value for axis in onnx.load(file).graph.output[0].type.tensor_type.shape.dim)
        onnx.checker.check_model(str(file))
        run = session(file)
        x = np.random.default_rng(0).standard_normal(graph.start).astype(np.float32)
        return file, graph, lambda x: run.run(None, {"x": x})[0], run.run(None, {"x": x})[0]
    except Exception:
        return None


def test_random_graphs_equal_onnxruntime_or_are_refused_by_name(tmp_path, run_together):
    cases, said, compiled, refused, seen = [], [], Counter(), Counter(), 0
    for seed in range(900):
        made = drawn(tmp_path, seed)
        if made is None:
            continue
        file, graph, run, _ = made
        seen += 1
        try:
            network = simplified(network_from_onnx(file))
        except ValueError as error:  # UnsupportedLayer among them
            refused[str(error)[:60]] += 1
            continue
        compiled.update(graph.used)
        said.append((seed, run))
        cases.append((None, graph.start, network))
    assert seen > 500
    assert len(cases) > 0.5 * seen, refused.most_common(20)
    assert not set(ATTRIBUTES) - set(compiled), "operators that were compiled in none of the graphs"
    wrong = []
    for (seed, run), (x, out, _) in zip(said, run_together(tmp_path / "c", cases, DOUBLE, ("-O0",)), strict=True):
        wanted = run(x).ravel()
        if not np.allclose(out, wanted, rtol=1e-4, atol=1e-5 * max(1.0, float(np.abs(wanted).max()))):
            wrong.append((seed, float(np.abs(out - wanted).max())))
    assert not wrong


def refused(folder, nodes, stored, shape, opset=17):
    with pytest.raises(UnsupportedLayer) as caught:
        network_from_onnx(save(folder, nodes, stored, shape, opset))
    return str(caught.value)


def recurrent(kind, gates, **attributes):
    rng = np.random.default_rng(0)
    stored = {
        "W": rng.standard_normal((1, gates * 3, 2)).astype(np.float32),
        "R": rng.standard_normal((1, gates * 3, 3)).astype(np.float32),
    }
    return [helper.make_node(kind, ["x", "W", "R"], ["y"], name="layer", hidden_size=3, **attributes)], stored


@pytest.mark.parametrize(
    ("kind", "gates", "attributes", "message"),
    [
        ("GRU", 3, {"linear_before_reset": 1, "activations": ["Sigmoid", "Relu"]}, "layer: GRU with activations"),
        ("LSTM", 4, {"activations": ["Relu", "Tanh", "Tanh"]}, "LSTM with activations"),
        ("LSTM", 4, {"input_forget": 1}, "LSTM with input_forget"),
        ("RNN", 1, {"activations": ["Affine"], "activation_alpha": [2.0], "activation_beta": [1.0]}, "RNN with activations"),
        ("RNN", 1, {"clip": 0.5}, "RNN with clip"),
        ("GRU", 3, {}, "without linear_before_reset"),
        ("LSTM", 4, {"direction": "reverse"}, "expected one layer, one direction"),
    ],
)
def test_a_recurrent_layer_that_is_not_torchs_is_refused_by_name(kind, gates, attributes, message, tmp_path):
    nodes, stored = recurrent(kind, gates, **attributes)
    assert message in refused(tmp_path, nodes, stored, (1, 1, 2))


def test_softmax_below_opset_13_runs_over_all_axes_from_its_own(tmp_path, run_together):
    cases, wanted = [], []
    for opset in (9, 11, 13):
        file = save(tmp_path, [helper.make_node("Softmax", ["x"], ["y"])], {}, (1, 3, 4), opset, name=f"{opset}.onnx")
        cases.append((None, (1, 3, 4), network_from_onnx(file)))
        wanted.append(session(file))
    for run, (x, out, _) in zip(wanted, run_together(tmp_path / "c", cases, DOUBLE), strict=True):
        assert np.allclose(out, run.run(None, {"x": x})[0].ravel(), atol=1e-6)


def test_a_value_that_is_used_again_keeps_its_own_numbers(tmp_path, run_together):
    """MatMul -> h, Add(h, b), Add(., h): the bias may not be folded into h."""
    rng = np.random.default_rng(0)
    stored = {"w": rng.standard_normal((4, 3)).astype(np.float32), "b": rng.standard_normal(3).astype(np.float32)}
    nodes = [("MatMul", ["x", "w"], "h"), ("Add", ["h", "b"], "s"), ("Add", ["s", "h"], "y")]
    file = save(tmp_path, [helper.make_node(kind, inputs, [out]) for kind, inputs, out in nodes], stored, (1, 4), 17)
    ((x, out, _),) = run_together(tmp_path / "c", [(None, (1, 4), simplified(network_from_onnx(file)))], DOUBLE)
    assert np.allclose(out, session(file).run(None, {"x": x})[0].ravel(), atol=1e-5)


@pytest.mark.parametrize(
    ("nodes", "stored", "message"),
    [
        ([("Div", ["a", "x"], "y")], {"a": np.float32([2])}, "the operation Div"),
        ([("MatMul", ["a", "x"], "y")], {"a": np.ones((3, 1), np.float32)}, "MatMul with x, which is computed"),
        ([("Gemm", ["a", "x"], "y")], {"a": np.ones((2, 1), np.float32)}, "Gemm with x, which is computed"),
        ([("Abs", ["x"], "a"), ("Add", ["a", "c"], "b"), ("Div", ["b", "x"], "y")], {"c": np.float32([1])}, "the operation Abs"),
        ([("Relu", ["x"], "a"), ("Cos", ["a"], "y")], {}, "the operation Cos"),
    ],
)
def test_what_is_not_read_is_named(nodes, stored, message, tmp_path):
    made = [helper.make_node(kind, inputs, [out], name=kind.lower()) for kind, inputs, out in nodes]
    assert message in refused(tmp_path, made, stored, (1, 4))


def test_an_attribute_that_no_opset_has_and_random_constants_are_refused(tmp_path):
    from fewer.control.smart_composites.to_c.onnx_operators import attributes_of

    with pytest.raises(UnsupportedLayer, match="Relu with the attribute alpha"):
        attributes_of(helper.make_node("Relu", ["x"], ["y"], alpha=1.0), 17, helper.get_attribute_value)
    nodes = [helper.make_node("RandomNormal", [], ["r"], shape=[1, 4]), helper.make_node("Add", ["x", "r"], ["y"])]
    assert "RandomNormal" in refused(tmp_path, nodes, {}, (1, 4))
