"""What networks as C are held against: onnxruntime on one thread, and emlearn's C."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fewer.control._shared.toolchain import FAST, build_library
from fewer.errors import require


def onnx_session(model: nn.Module | Path, x: torch.Tensor | None = None) -> Any:
    """An onnxruntime session of one thread, of a module or of an .onnx file."""
    import io
    import warnings

    onnxruntime = require("onnxruntime", "control")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    if isinstance(model, Path):
        return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x,), file, dynamo=False, input_names=["x"])  # pyright: ignore[reportArgumentType] - takes files, too
    return onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])


def sklearn_mlp(model: nn.Sequential) -> Any:
    """The same MLP as scikit-learn's MLPRegressor, which emlearn reads (m2cgen reads linear models, trees and support vectors, no network)."""
    from sklearn.neural_network import MLPRegressor

    linear = [layer for layer in model if isinstance(layer, nn.Linear)]
    hidden = tuple(layer.out_features for layer in linear[:-1])
    kind = "tanh" if any(isinstance(layer, nn.Tanh) for layer in model) else "relu"
    peer = MLPRegressor(hidden_layer_sizes=hidden, activation=kind, max_iter=1)
    inputs, outputs = linear[0].in_features, linear[-1].out_features
    rng = np.random.default_rng(0)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y = rng.standard_normal((20, outputs))
        peer.fit(rng.standard_normal((20, inputs)), y[:, 0] if outputs == 1 else y)
    peer.coefs_ = [layer.weight.detach().numpy().T.astype(float) for layer in linear]
    peer.intercepts_ = [layer.bias.detach().numpy().astype(float) for layer in linear]
    return peer


def emlearn_c(model: nn.Sequential, folder: Path) -> tuple[Path, tuple[str, ...]]:
    """emlearn's C of the same MLP with one function `call(x, inputs, y, outputs)`, and the flags that it needs."""
    emlearn = require("emlearn", "control")
    with contextlib.chdir(folder):  # it compiles into the working folder
        converted = emlearn.convert(sklearn_mlp(model), method="inline")
    converted.save(file=str(folder / "peer.h"), name="peer")
    text = '#include "peer.h"\nint call(const float *x, int n, float *y, int m);\nint call(const float *x, int n, float *y, int m)\n'
    (folder / "peer.c").write_text(text + "{ return peer_regress(x, n, y, m); }\n")
    return folder / "peer.c", (f"-I{emlearn.includedir}",)


def emlearn_call(source: Path, flags: tuple[str, ...], model: nn.Module, x: torch.Tensor) -> Callable[[], np.ndarray]:
    """A call of that C on this machine with the input x."""
    library = ctypes.CDLL(str(build_library([source], source.with_suffix(".so"), (*FAST, "-w", *flags))))
    values, into, out = x.numpy(), np.zeros(x.numel(), np.float32), np.zeros(model(x).numel(), np.float32)
    places = [ctypes.c_void_p(into.ctypes.data), into.size, ctypes.c_void_p(out.ctypes.data), out.size]
    function = library["call"]
    function.restype = None

    def call() -> np.ndarray:
        into[:] = values.reshape(-1)
        function(*places)
        return out.copy()

    return call
