"""Races: the latency of networks as C against onnxruntime, and their RAM against emlearn's."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from fewer.control._shared.toolchain import measure_sizes
from fewer.control.smart_composites.peers import emlearn_c, onnx_session
from fewer.control.smart_composites.problems import CASES
from fewer.control.smart_composites.to_c.compiler import CompiledNetwork, compile_to_c
from fewer.study import Bench

bench = Bench("smart-composites")
Call = Callable[[], Any]
FOLDERS: list[tempfile.TemporaryDirectory[str]] = []  # kept until the races are over


def folder() -> Path:
    FOLDERS.append(tempfile.TemporaryDirectory(prefix="fewer-bench-"))
    return Path(FOLDERS[-1].name)


def compiled_case(name: str) -> tuple[CompiledNetwork, nn.Module, np.ndarray, Any]:
    model, x = CASES[name].built()
    return compile_to_c(model, x, folder()), model, x.numpy(), x


def against_onnxruntime(name: str) -> tuple[Call, Call]:
    compiled, model, values, x = compiled_case(name)
    session = onnx_session(model, x)
    wanted = session.run(None, {"x": values})[0][0]
    compiled.reset()
    if np.abs(compiled.predict(values) - wanted).max() > 1e-4 * max(np.abs(wanted).max(), 1e-3):
        raise RuntimeError(f"{name}: the C and onnxruntime do not agree")
    return lambda: compiled.predict(values), lambda: session.run(None, {"x": values})


def declare(name: str, reach: float) -> None:
    macs = compiled_macs(name)
    bench.race(f"{name}, {macs} MACs", peer="onnxruntime, one thread", reach=reach)(lambda: against_onnxruntime(name))


def compiled_macs(name: str) -> str:
    return {
        "mlp-4-16-1": "80", "mlp-10-32-32-4": "1.5k", "rnn-4-16": "3k", "signal-cnn-8": "7k", "mlp-64-128-10": "9k", "gru-4-16": "10k",
        "lstm-4-16": "13k", "cnn-4-12": "16k", "mlp-1024-1024-64": "1.1M", "cnn-16-28": "1.0M",
    }[name]  # fmt: skip


for network in ("mlp-4-16-1", "mlp-10-32-32-4", "rnn-4-16", "signal-cnn-8", "mlp-64-128-10", "gru-4-16", "lstm-4-16", "cnn-4-12"):
    declare(network, 0.5)
for network in ("mlp-1024-1024-64", "cnn-16-28"):
    declare(network, 3.0)


@bench.quantity("RAM of mlp-10-32-32-4", peer="emlearn (its static variables)", unit="bytes", reach=1.0)
def ram() -> tuple[float, float]:
    compiled, model, _, _ = compiled_case("mlp-10-32-32-4")
    assert isinstance(model, nn.Sequential)
    return compiled.ram_bytes, emlearn_measured(model)


def emlearn_measured(model: nn.Sequential) -> int:
    """Bytes of static variables in emlearn's C of the same MLP, by `size`."""
    source, flags = emlearn_c(model, folder())
    return measure_sizes([source], flags=flags).static_ram
