"""Races: the latency of networks as C against onnxruntime, and their RAM against emlearn's."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from fewer.control.smart_composites.comparison import CASES, onnx_session, sklearn_mlp
from fewer.control.smart_composites.compiler import CompiledNetwork, compile_to_c
from fewer.errors import require
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
        "mlp-4-16-1": "80", "mlp-10-32-32-4": "1.5k", "gru-4-16": "10k", "cnn-4-12": "15k", "mlp-1024-1024-64": "1.1M",
        "cnn-16-28": "1.0M",
    }[name]  # fmt: skip


for network in ("mlp-4-16-1", "mlp-10-32-32-4", "gru-4-16", "cnn-4-12"):
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
    from fewer.control.smart_composites.toolchain import host_compiler, run

    emlearn, where = require("emlearn", "peers"), folder()
    with contextlib.chdir(where):  # it compiles into the working folder
        converted = emlearn.convert(sklearn_mlp(model), method="inline")
    converted.save(file=str(where / "peer.h"), name="peer")
    text = '#include "peer.h"\nint call(const float *x, int n, float *y, int m);\nint call(const float *x, int n, float *y, int m)\n'
    (where / "peer.c").write_text(text + "{ return peer_regress(x, n, y, m); }\n")
    run(host_compiler(), "-Os", f"-I{emlearn.includedir}", "-c", str(where / "peer.c"), "-o", str(where / "peer.o"))
    words = run("size", str(where / "peer.o")).splitlines()[1].split()
    return int(words[1]) + int(words[2])
