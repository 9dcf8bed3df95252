"""torch.nn modules, by way of torch.export, as layers."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from fewer.control.smart_composites.to_c.network import Layer, Network, UnsupportedLayer

ACTIVATIONS: dict[str, tuple[str, tuple]] = {  # aten name -> our name and the defaults of its arguments after the first
    "relu": ("relu", ()),
    "leaky_relu": ("leaky_relu", (0.01,)),
    "sigmoid": ("sigmoid", ()),
    "tanh": ("tanh", ()),
    "elu": ("elu", (1.0, 1.0, 1.0)),
    "selu": ("selu", ()),
    "softplus": ("softplus", (1.0, 20.0)),
    "hardsigmoid": ("hardsigmoid", ()),
}
NOTHING = ("dropout", "alias", "clone", "contiguous", "detach", "lift_fresh_copy", "_to_copy", "to")
RESHAPES = ("flatten", "view", "reshape", "squeeze", "unsqueeze", "_unsafe_view")


def network_from_module(model: nn.Module, example: torch.Tensor) -> Network:
    """The network that a module is on inputs of the example's shape [1, ...]."""
    if example.is_complex():
        raise ValueError(
            f"the example input is {example.dtype}; expected real numbers: split real and imaginary parts into inputs of their own"
        )
    if example.ndim < 2 or example.shape[0] != 1:
        raise ValueError(f"the example input has shape {tuple(example.shape)}; expected [1, ...], a batch of one: pass example_input[:1]")
    if any(isinstance(parameter, torch.Tensor) and parameter.is_complex() for parameter in model.parameters()):
        raise ValueError("the model has complex weights; expected real ones")
    for path, module in model.named_modules():  # refused here, where the module's path is known for sure
        if isinstance(module, nn.RNNBase):
            check_recurrent(path, module.num_layers, module.bidirectional, module.batch_first, getattr(module, "proj_size", 0))
        check_plain(path, module)
    training = model.training
    try:
        exported = torch.export.export(model.eval(), (example,))
    except Exception as error:
        raise UnsupportedLayer(type(model).__name__, f"torch.export cannot trace it ({str(error).splitlines()[0]})") from error
    finally:
        model.train(training)
    return network_from_export(exported)


def check_plain(path: str, module: nn.Module) -> None:
    """UnsupportedLayer where a weight is computed at each call, with the call that stores it (pruning shows in the exported names)."""
    pruned = [
        name.removesuffix("_orig") for name in module._parameters if name.endswith("_orig") and f"{name[:-5]}_mask" in module._buffers
    ]
    if pruned:
        raise UnsupportedLayer(path, f"its {pruned[0]} is pruned by a mask; call torch.nn.utils.prune.remove(module, {pruned[0]!r}) first")
    if is_parametrized(module):
        name = next(iter(module.parametrizations))  # pyright: ignore[reportCallIssue, reportArgumentType] - a ModuleDict
        call = f"torch.nn.utils.parametrize.remove_parametrizations(module, {name!r})"
        raise UnsupportedLayer(path, f"its {name} is computed by a parametrization; call {call} first")


def check_recurrent(path: str, layers: int, bidirectional: bool, batch_first: bool, projected: int = 0) -> None:
    if layers != 1 or bidirectional or not batch_first or projected:
        said = (
            f"a recurrent layer with num_layers={layers}, bidirectional={bidirectional}, batch_first={batch_first}, proj_size={projected}"
        )
        raise UnsupportedLayer(path, f"{said}; expected one layer, one direction, batch first: use one module a layer")


def network_from_export(exported: torch.export.ExportedProgram) -> Network:
    """The network of an exported program (also one read from a .pt2 file)."""
    return _Reader(exported).read()


class _Reader:
    def __init__(self, exported: torch.export.ExportedProgram) -> None:
        signature, self.exported = exported.graph_signature, exported
        tensors = {**exported.state_dict, **exported.constants}
        pruned = next((name for name in tensors if name.endswith("_orig") and f"{name[:-5]}_mask" in tensors), "")
        if pruned:
            path, _, weight = pruned.removesuffix("_orig").rpartition(".")
            raise UnsupportedLayer(path, f"its {weight} is pruned by a mask; call torch.nn.utils.prune.remove(module, {weight!r}) first")
        names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
        self.constants = {
            placeholder: tensors[name].detach().double().numpy() if tensors[name].is_floating_point() else tensors[name].numpy()
            for placeholder, name in names.items()
        }
        if len(signature.user_inputs) != 1:
            raise ValueError(f"the network takes {len(signature.user_inputs)} inputs; expected one tensor")
        if len(signature.user_outputs) != 1:
            raise ValueError(
                f"the network gives {len(signature.user_outputs)} outputs; expected one tensor: wrap it so that it returns one"
            )
        self.input, self.output = str(next(iter(signature.user_inputs))), str(next(iter(signature.user_outputs)))
        self.layers: list[Layer] = []

    def read(self) -> Network:
        input_shape = ()
        for node in self.exported.graph.nodes:
            if node.op == "placeholder" and node.name == self.input:
                input_shape = self.shape(node)
            elif node.op == "call_function":
                self.layer(node)
        if self.output == self.input or not self.layers:
            self.layers.append(Layer("alias", [self.input], "same", input_shape, input_shape))
            self.output = "same"
        return Network(self.input, input_shape, self.output, self.layers)

    def shape(self, node: Any) -> tuple[int, ...]:
        value = node.meta["val"]
        value = value[0] if isinstance(value, tuple | list) else value
        if not all(isinstance(length, int) for length in value.shape):
            raise ValueError(
                f"{node.name} has the dynamic shape {tuple(value.shape)}; expected fixed shapes: export without dynamic_shapes"
            )
        if value.ndim and value.shape[0] != 1:
            raise ValueError(
                f"{node.name} has shape {tuple(value.shape)}; expected a batch of one: export with an example of shape [1, ...]"
            )
        return tuple(value.shape[1:])

    def weight(self, node: Any) -> np.ndarray:
        if getattr(node, "name", None) not in self.constants:
            raise UnsupportedLayer(str(node), "a weight that is computed, not stored")
        return self.constants[node.name]

    def add(self, node: Any, kind: str, weights: dict[str, np.ndarray] | None = None, sources: Any = None, **more: Any) -> None:
        sources = sources or [node.args[0]]
        for source in sources:
            if source.name in self.constants:
                raise UnsupportedLayer(path_of(node), f"{node.target} on a constant")
        activation = more.pop("activation", None)
        inputs = [source.name for source in sources]
        self.layers.append(
            Layer(kind, inputs, node.name, self.shape(node), self.shape(sources[0]), weights or {}, more, activation, path_of(node))
        )

    def layer(self, node: Any) -> None:
        if node.target is operator.getitem:
            source, index = node.args
            if index == 0:  # the outputs of a recurrent layer; its final state has no name of its own
                self.add(node, "alias", sources=[source])
            elif node.users:
                raise UnsupportedLayer(path_of(source), "the final state is used; expected the outputs alone")
            return
        name = str(node.target).split(".")[1] if str(node.target).startswith("aten.") else str(node.target)
        if name in ("zeros", "_assert_tensor_metadata", "sym_size"):
            return
        if name.endswith("_") and used_after(node, node.args[0]):
            raise UnsupportedLayer(path_of(node), f"{node.target} changes in place a value that is used again; use inplace=False")
        if name in ACTIVATIONS or name.rstrip("_") in ACTIVATIONS:
            kind, defaults = ACTIVATIONS[name.rstrip("_")]
            given = tuple(node.args[1:])
            return self.add(node, "activation", activation=(kind, *(given + defaults[len(given) :])))
        if name in RESHAPES:
            return self.add(node, "alias")
        if name in NOTHING:
            if name == "dropout" and node.args[2]:
                raise UnsupportedLayer(path_of(node), "dropout in training mode; export model.eval()")
            if not node.meta["val"].is_floating_point():
                raise UnsupportedLayer(path_of(node), f"{node.target} to {node.meta['val'].dtype}; expected real numbers")
            return self.add(node, "alias")
        reader = getattr(self, f"read_{name}", None)
        if reader is None:
            raise UnsupportedLayer(path_of(node), f"the operation {node.target}")
        reader(node)

    def read_gelu(self, node: Any) -> None:
        self.add(node, "activation", activation=("gelu" if node.kwargs.get("approximate", "none") == "none" else "gelu_tanh",))

    def read_softsign(self, node: Any) -> None:
        self.add(node, "activation", activation=("softsign",))

    def read_abs(self, node: Any) -> None:
        """Softsign is exported as x / (|x| + 1): its three nodes are read at the division."""
        (plus,) = node.users or [None]
        if plus is None or not str(plus.target).startswith("aten.add") or plus.args[1] != 1 or len(plus.users) != 1:
            raise UnsupportedLayer(path_of(node), f"the operation {node.target}")

    def read_div(self, node: Any) -> None:
        over = node.args[1]
        if not (hasattr(over, "args") and hasattr(over.args[0], "args") and str(over.args[0].target).startswith("aten.abs")):
            raise UnsupportedLayer(path_of(node), f"the operation {node.target}")
        if over.args[0].args[0] is not node.args[0]:
            raise UnsupportedLayer(path_of(node), f"the operation {node.target}")
        self.add(node, "activation", activation=("softsign",))

    def read_softmax(self, node: Any) -> None:
        axis, axes = node.args[1], len(self.shape(node)) + 1
        if axis % axes != axes - 1:
            raise UnsupportedLayer(path_of(node), f"Softmax over axis {axis}; expected the last one")
        self.add(node, "softmax")

    def read_linear(self, node: Any) -> None:
        weight = self.weight(node.args[1])
        bias = self.weight(node.args[2]) if len(node.args) > 2 and node.args[2] is not None else np.zeros(len(weight))
        self.add(node, "linear", {"weight": weight, "bias": bias})

    def read_conv1d(self, node: Any) -> None:
        arguments: dict[int, Any] = dict(enumerate(node.args)) | {3: (node.args[3:] or [[1]])[0]}
        weight = self.weight(node.args[1])[:, :, None, :]
        (stride,), padding, (dilation,), groups = (
            ones(arguments[3], 1), arguments.get(4, [0]), ones(arguments.get(5, [1]), 1), arguments.get(6, 1)
        )  # fmt: skip
        pad = same(padding, [(weight.shape[3], dilation)])
        self._conv(node, weight, (1, stride), (0, pad[0]), (1, dilation), groups)

    def read_conv2d(self, node: Any) -> None:
        arguments = dict(enumerate(node.args))
        weight = self.weight(node.args[1])
        stride, dilation = ones(arguments.get(3, [1, 1]), 2), ones(arguments.get(5, [1, 1]), 2)
        pad = same(arguments.get(4, [0, 0]), [*zip(weight.shape[2:], dilation, strict=True)])
        self._conv(node, weight, stride, pad, dilation, arguments.get(6, 1))

    def _conv(self, node: Any, weight: np.ndarray, stride: Any, padding: Any, dilation: Any, groups: int) -> None:
        bias = self.weight(node.args[2]) if len(node.args) > 2 and node.args[2] is not None else np.zeros(len(weight))
        self.add(node, "conv", {"weight": weight, "bias": bias}, stride=stride, padding=padding, dilation=dilation, groups=groups)

    def _pool(self, node: Any, kind: str, axes: int, dilation: Any = 1, **more: Any) -> None:
        arguments = dict(enumerate(node.args))
        kernel = ones(arguments[1], axes)
        stride = ones(arguments.get(2) or kernel, axes)
        padding = ones(arguments.get(3, [0] * axes), axes)
        lead = (1,) * (2 - axes)
        dilated = (*lead, *ones(dilation, axes))
        self.add(
            node, kind, kernel=(*lead, *kernel), stride=(*lead, *stride), padding=(*[0] * (2 - axes), *padding), dilation=dilated, **more
        )

    def read_max_pool1d(self, node: Any) -> None:
        self._pool(node, "max_pool", 1, (node.args[4:] or [[1]])[0])

    def read_max_pool2d(self, node: Any) -> None:
        self._pool(node, "max_pool", 2, (node.args[4:] or [[1, 1]])[0])

    def _average(self, node: Any, axes: int) -> None:
        arguments = dict(enumerate(node.args))
        if arguments.get(4, False) or arguments.get(6) is not None:
            raise UnsupportedLayer(path_of(node), "AvgPool with ceil_mode or divisor_override")
        self._pool(node, "avg_pool", axes, include_pad=arguments.get(5, True))

    def read_avg_pool1d(self, node: Any) -> None:
        self._average(node, 1)

    def read_avg_pool2d(self, node: Any) -> None:
        self._average(node, 2)

    def _adaptive(self, node: Any) -> None:
        shape = self.shape(node.args[0])[1:]
        if any(length != 1 for length in self.shape(node)[1:]):
            raise UnsupportedLayer(path_of(node), "AdaptiveAvgPool to more than one value a channel")
        whole = (1,) * (2 - len(shape)) + shape
        self.add(node, "avg_pool", kernel=whole, stride=whole, padding=(0, 0), dilation=(1, 1), include_pad=True)

    read_adaptive_avg_pool1d = read_adaptive_avg_pool2d = _adaptive

    def read_mean(self, node: Any) -> None:
        shape = self.shape(node.args[0])
        if len(shape) < 2 or sorted(axis % (len(shape) + 1) for axis in node.args[1]) != list(range(2, len(shape) + 1)):
            raise UnsupportedLayer(path_of(node), "a mean over anything but all of a channel")
        self._adaptive(node)

    def read_batch_norm(self, node: Any) -> None:
        gain, shift = (None if each is None else self.weight(each) for each in node.args[1:3])
        if node.args[3] is None or node.args[5]:
            raise UnsupportedLayer(path_of(node), "BatchNorm without running statistics or in training mode; export model.eval()")
        mean, variance, epsilon = self.weight(node.args[3]), self.weight(node.args[4]), node.args[7]
        scale = (1.0 if gain is None else gain) / np.sqrt(variance + epsilon)
        self.add(node, "scale", {"scale": scale, "shift": (0.0 if shift is None else shift) - mean * scale})

    def read_layer_norm(self, node: Any) -> None:
        length = int(np.prod(node.args[1]))
        gain = self.weight(node.args[2]) if len(node.args) > 2 and node.args[2] is not None else np.ones(length)
        shift = self.weight(node.args[3]) if len(node.args) > 3 and node.args[3] is not None else np.zeros(length)
        epsilon = node.args[4] if len(node.args) > 4 else 1e-5
        self.add(node, "layer_norm", {"gain": gain.reshape(-1), "shift": shift.reshape(-1)}, epsilon=epsilon)

    def read_add(self, node: Any) -> None:
        left, right = node.args[:2]
        if hasattr(left, "target") and str(left.target).startswith("aten.abs") and right == 1:
            return  # a part of Softsign
        if not hasattr(right, "name") or node.kwargs.get("alpha", 1) != 1 or self.shape(left) != self.shape(right):
            raise UnsupportedLayer(path_of(node), "an add of anything but two values of one shape")
        self.add(node, "add", sources=[left, right])

    read_add_ = read_add

    def read_select(self, node: Any) -> None:
        _, axis, index = node.args
        length = self.shape(node.args[0])[0]
        if axis != 1:
            raise UnsupportedLayer(path_of(node), f"an index into axis {axis}; expected axis 1, time")
        self.add(node, "select", index=index % length)

    def read_slice(self, node: Any) -> None:
        if self.shape(node) != self.shape(node.args[0]):
            raise UnsupportedLayer(path_of(node), "a slice that leaves something out")
        self.add(node, "alias")

    def _recurrent(self, node: Any, kind: str, **more: Any) -> None:
        _, state, parameters, biases, layers, _, _, bidirectional, batch_first = node.args
        check_recurrent(path_of(node), layers, bidirectional, batch_first)
        for each in state if isinstance(state, list | tuple) else [state]:
            if not str(each.target).startswith("aten.zeros"):
                raise UnsupportedLayer(path_of(node), "a recurrent layer with a first state of its own; expected zeros")
        arrays = [self.weight(each) for each in parameters]
        bias = arrays[2:4] if biases else [np.zeros(len(arrays[0]))] * 2
        named: dict[str, np.ndarray] = dict(zip(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), [*arrays[:2], *bias], strict=True))
        self.add(node, kind, named, **more)

    def read_gru(self, node: Any) -> None:
        self._recurrent(node, "gru")

    def read_lstm(self, node: Any) -> None:
        self._recurrent(node, "lstm")

    def read_rnn_tanh(self, node: Any) -> None:
        self._recurrent(node, "rnn", nonlinearity="tanh")

    def read_rnn_relu(self, node: Any) -> None:
        self._recurrent(node, "rnn", nonlinearity="relu")


def used_after(node: Any, value: Any) -> bool:
    """Whether the value, or one that is a view of the same numbers, is used after the node that changes it."""
    views = [each for each in value.users if str(each.target).startswith(tuple(f"aten.{name}." for name in RESHAPES))]
    base = str(value.target).startswith(tuple(f"aten.{name}." for name in RESHAPES))
    later = any(each is not node and node < each for each in value.users)
    return later or any(used_after(node, each) for each in views) or (base and any(node < each for each in value.args[0].users))


def path_of(node: Any) -> str:
    """The path of the module whose code a node comes from."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values() if path]
    return paths[-1].removeprefix("L['self'].") if paths else node.name


def ones(value: Any, axes: int) -> tuple[int, ...]:
    """A length for each axis, where one stands for all."""
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return values * axes if len(values) == 1 else values


def same(padding: Any, spans: list[tuple[int, int]]) -> tuple[int, ...]:
    """The padding before each axis; "same" pads (k - 1) dilation in all, the smaller half first."""
    if padding == "same":
        return tuple((kernel - 1) * dilation // 2 for kernel, dilation in spans)
    return (0,) * len(spans) if padding == "valid" else ones(padding, len(spans))
