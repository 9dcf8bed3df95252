"""A trained network as C99 that needs nothing but math.h."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from fewer.checks import check_choice
from fewer.control._shared.program_file import read_program, run_program
from fewer.control._shared.toolchain import Sizes, sizes_of
from fewer.control.smart_composites.to_c.compiled import CompiledNetwork
from fewer.control.smart_composites.to_c.derivatives import derivative_text, smooth_layers
from fewer.control.smart_composites.to_c.from_torch import network_from_export, network_from_module
from fewer.control.smart_composites.to_c.layers import PANEL, LayerText
from fewer.control.smart_composites.to_c.network import Network, plan_buffers, simplified
from fewer.control.smart_composites.to_c.text import DOUBLE, FLOAT, Number, array_text, check_name
from fewer.files import check_new, made_whole

LONG = 4_000_000  # characters: about 1 MB of weights, which is more than a microcontroller holds
LEVELS = (
    "\nMatrices stand in panels of 16 outputs, and in each panel input by input, so that they are read once and in order. For a Cortex-M4F, "
    "-O3 keeps the sums of a panel in registers (about half of the instructions of -Os); for x86-64, gcc 12 needs -O2 to make vectors of "
    "them.\n"
)
TOLERANCE = {None: 1e-4, "q15": 1e-2, "int8": 0.3}  # of the recorded outputs, relative to the largest


def network_of(model: nn.Module | str | Path, example_input: torch.Tensor | None = None, *, trust: bool = False) -> Network:
    """The network of a module, of a file .onnx or of a file .pt2 (torch.export.save)."""
    if isinstance(model, nn.Module):
        if example_input is None:
            raise ValueError("no example_input was given; expected a tensor of shape [1, ...] to trace the module with")
        return simplified(network_from_module(model, example_input))
    path = Path(model)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file; expected a file .onnx or .pt2")
    if path.suffix == ".onnx":
        from fewer.control.smart_composites.to_c.from_onnx import network_from_onnx

        return simplified(network_from_onnx(path))
    if path.suffix == ".pt2":
        return simplified(network_from_export(read_program(path, trust)))
    raise ValueError(
        f"{path}: a file {path.suffix or 'without a suffix'}; expected .onnx or .pt2 (Keras HDF5 and TFLite are not read: export to ONNX)"
    )


def compile_to_c(
    model: nn.Module | str | Path,
    example_input: torch.Tensor | None,
    out_dir: str | Path,
    *,
    name: str = "net",
    dtype: Literal["float", "double", "q15"] = "float",
    quantize: Literal["int8"] | None = None,
    derivatives: bool = False,
    test: bool = False,
    overwrite: bool = False,
    trust: bool = False,
) -> CompiledNetwork:
    """Write a network as C (section "compiler" of the paper; int8 and q15 are not in the paper).

    Args:
        model: a module of the supported layers, or the path of an .onnx or .pt2 file.
        example_input: [1, ...], gives the shape; not needed for a file.
        out_dir: a new or empty folder.
        name: begins the names of files and functions, so that several networks link together.
        dtype: what is computed with; "q15" stores matrices as 16-bit fractions with a scale for each output, and computes in float.
        quantize: "int8" stores matrices as 8-bit integers with a scale for each output, and computes in float.
        derivatives: also write `NAME_jacobian`, `NAME_hvp` and `NAME_hessian`, for chains of Linear and smooth activations.
        test: also write `NAME_test.c`, which checks recorded inputs and outputs.
        overwrite: replace what was compiled into out_dir before.
        trust: read a .pt2 file even where reading it can run code that stands in it.

    Raises:
        UnsupportedLayer: a layer that has no C text, with its path.
        ValueError: dynamic shapes, a batch of more than one, weights that are not finite, or a name that is none in C.
        UntrustedFile: a .pt2 file that could run code, with the entry's name.
        FileExistsError: out_dir may not be written.

    Examples:
        >>> import tempfile, torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     compiled = compile_to_c(model, torch.zeros(1, 3), folder, name="arm")
        >>> compiled.macs, compiled.ram_bytes, [file.name for file in compiled.files][:2]
        (40, 32, ['arm.h', 'arm.c'])
    """
    check_name(name)
    check_choice(("float", "double", "q15"), dtype=dtype)
    check_choice((None, "int8"), quantize=quantize)
    if quantize and dtype != "float":
        raise ValueError(f"quantize={quantize!r} with dtype={dtype!r}; expected dtype='float': 8-bit weights are summed in float")
    stored = "q15" if dtype == "q15" else quantize
    if derivatives and stored:
        raise ValueError(f"derivatives of {stored} weights; expected dtype 'float' or 'double' without quantize")
    inputs = () if isinstance(model, nn.Module) else (model,)
    folder = check_new(out_dir, overwrite, inputs=inputs, option="out_dir")
    network = network_of(model, example_input, trust=trust)
    number = DOUBLE if dtype == "double" else FLOAT
    texts = network_texts(network, name, number, stored, derivatives)
    if test:
        texts[f"{name}_test.c"] = recorded_test(model, network, name, number, TOLERANCE[stored], trust)
    sizes = add_sizes(texts)
    files = write_files(folder, texts, overwrite=overwrite, inputs=inputs)
    return CompiledNetwork(name, network, number, files, sizes)


def write_files(folder: Path, texts: dict[str, str], *, overwrite: bool, inputs: tuple[str | Path, ...] = ()) -> list[Path]:
    """All files of a folder, or none."""
    with made_whole(folder, overwrite, inputs=inputs, option="out_dir") as made:
        for name, text in texts.items():
            (made / name).write_text(text, encoding="utf8")
    return [folder / name for name in texts]


def add_sizes(texts: dict[str, str]) -> Sizes | None:
    """Say in the README how large code and stack are, where a compiler is here to tell and the network is not so large that it takes long."""
    sizes = sizes_of(texts) if sum(map(len, texts.values())) <= LONG else None
    said = "Code and stack: compile it for your processor with -fstack-usage and ask `size`.\n"
    if sizes:
        said = (
            f"Compiled with -Os for the machine that wrote this ({platform.machine()}): {sizes.flash} bytes of code and constants, "
            f"{sizes.stack} bytes of stack.\n"
        )
    texts["README.md"] += "\n" + said + LEVELS
    return sizes


def network_texts(network: Network, name: str, number: Number, stored: str | None = None, derivatives: bool = False) -> dict[str, str]:
    """File name -> text; the same network gives the same bytes."""
    plan, writer = plan_buffers(network), LayerText(name, number, stored)
    calls, states = [], []
    for index, layer in enumerate(network.layers):
        if layer.kind == "alias":
            continue
        function = writer.write(layer, index)
        arguments = [plan.place[value] for value in layer.inputs] + [plan.place[layer.output]]
        if layer.kind in ("rnn", "gru", "lstm"):
            hidden = layer.weights["weight_hh"].shape[1]
            kept = [f"h{index}"] + ([f"c{index}"] if layer.kind == "lstm" else [])
            arguments += [plan.scratch[layer.output], *(f"state->{each}" for each in kept)]
            states += [(each, hidden) for each in kept]
        calls.append(f"    {function}({', '.join(arguments)});\n")
    if plan.place[network.output] == "in":
        calls.append(f"    for (int i = 0; i < {network.outputs}; i++) out[i] = in[i];\n")
    t, big = number.type, name.upper()
    if derivatives:
        smooth = smooth_layers(network)
        names = [(f"w{network.layers.index(layer)}", min(PANEL, layer.size)) for layer in smooth]
        writer.functions.append(derivative_text(name, network, names, number))
    reset = "".join(f"    for (int i = 0; i < {size}; i++) state->{each}[i] = {number.literal(0)};\n" for each, size in states)
    source = (
        f'#include "{name}.h"\n\n#include <math.h>\n\n'
        + "".join(writer.arrays)
        + "\n"
        + "\n".join(writer.functions)
        + f"\nvoid {name}_reset({name}_state *state)\n{{\n{reset or '    (void)state;' + chr(10)}}}\n"
        + f"\nvoid {name}_predict(const {t} in[{big}_INPUTS], {t} out[{big}_OUTPUTS], {name}_state *state)\n{{\n    (void)state;\n"
        + "".join(calls)
        + "}\n"
    )
    fields = ([("arena", plan.arena)] if plan.arena else []) + states
    ram = sum(size for _, size in fields) * np.dtype(number.numpy).itemsize or 1
    members = "".join(f"    {t} {each}[{size}];\n" for each, size in fields) or "    unsigned char nothing; /* C wants a member */\n"
    header = f"""#ifndef {big}_H
#define {big}_H

#define {big}_INPUTS {network.inputs}
#define {big}_OUTPUTS {network.outputs}
#define {big}_MACS {network.macs}
#define {big}_RAM_BYTES {ram} /* of {name}_state: buffers and recurrent state; the stack comes on top */
#define {big}_WEIGHT_BYTES {writer.flash}

#ifdef __cplusplus
extern "C" {{
#endif

/* All memory that a network needs beside its constants; the caller owns it. */
typedef struct {{
{members}}} {name}_state;

/* Begin a new sequence. Call it once before the first {name}_predict. */
void {name}_reset({name}_state *state);

/* out = f(in); recurrent layers go on from where the state stands. in and out must not overlap. */
void {name}_predict(const {t} in[{big}_INPUTS], {t} out[{big}_OUTPUTS], {name}_state *state);
{derivative_header(name, big, t) if derivatives else ""}
#ifdef __cplusplus
}}
#endif

#endif
"""
    return {f"{name}.h": header, f"{name}.c": source, **project_texts(name, network, ram, writer.flash)}


def derivative_header(name: str, big: str, t: str) -> str:
    return f"""
/* jacobian[o * {big}_INPUTS + i] = d out[o] / d in[i] */
void {name}_jacobian(const {t} in[], {t} jacobian[]);
/* product = (second derivative of sum weights[o] out[o]) v */
void {name}_hvp(const {t} in[], const {t} weights[], const {t} v[], {t} product[]);
/* out, its jacobian, and hessian[(o * {big}_INPUTS + i) * {big}_INPUTS + j] = d2 out[o] / d in[i] d in[j] */
void {name}_hessian(const {t} in[], {t} out[], {t} jacobian[], {t} hessian[]);
"""


def project_texts(name: str, network: Network, ram: int, weights: int) -> dict[str, str]:
    """What CMake, PlatformIO and a reader want."""
    cmake = (
        f"cmake_minimum_required(VERSION 3.10)\nproject({name} C)\nset(CMAKE_C_STANDARD 99)\nadd_library({name} STATIC {name}.c)\n"
        f"target_include_directories({name} PUBLIC ${{CMAKE_CURRENT_SOURCE_DIR}})\ntarget_link_libraries({name} PUBLIC m)\n"
        f"if(EXISTS ${{CMAKE_CURRENT_SOURCE_DIR}}/{name}_test.c)\n  add_executable({name}_test {name}_test.c)\n"
        f"  target_link_libraries({name}_test {name})\n  enable_testing()\n  add_test(NAME {name} COMMAND {name}_test)\nendif()\n"
    )
    library = {
        "name": name, "version": "1.0.0", "description": f"A neural network: {network.inputs} inputs, {network.outputs} outputs",
        "frameworks": "*", "platforms": "*", "build": {"srcFilter": [f"+<{name}.c>"], "srcDir": ".", "includeDir": "."},
    }  # fmt: skip
    layers = "\n".join(f"- {layer.kind} -> {list(layer.shape)}" for layer in network.layers if layer.kind != "alias")
    readme = (
        f"# {name}\n\n{network.inputs} inputs, {network.outputs} outputs, {network.macs} multiply-accumulates, {weights} bytes of constants, "
        f"{ram} bytes of RAM in `{name}_state` (the stack comes on top).\n\n```c\n{name}_state state;\n{name}_reset(&state);\n"
        f"{name}_predict(in, out, &state);\n```\n\n{layers}\n"
    )
    return {"CMakeLists.txt": cmake, "library.json": json.dumps(library, indent=2) + "\n", "README.md": readme}


def recorded_test(model: nn.Module | str | Path, network: Network, name: str, number: Number, tolerance: float, trust: bool = False) -> str:
    """A C program that holds the network against what its model said of four inputs; it ends with 0 where all agree."""
    inputs = np.random.default_rng(0).standard_normal((4, *network.input_shape)).astype(np.float32)
    said = reference(model, trust)
    wanted = np.array([said(each[None]).reshape(-1) for each in inputs])
    t, big = number.type, name.upper()
    arrays = array_rows(f"{t} recorded_in", inputs, number) + array_rows(f"{t} recorded_out", wanted, number)
    largest = float(np.abs(wanted).max())
    return f"""#include "{name}.h"

#include <math.h>
#include <stdio.h>

{arrays}
static {name}_state state;

int main(void)
{{
    int wrong = 0;
    for (int row = 0; row < {len(inputs)}; row++) {{
        {t} out[{big}_OUTPUTS];
        {name}_reset(&state);
        {name}_predict(recorded_in + row * {big}_INPUTS, out, &state);
        for (int i = 0; i < {big}_OUTPUTS; i++)
            if (!(fabs((double)(out[i] - recorded_out[row * {big}_OUTPUTS + i])) <= {tolerance * max(largest, 1e-6):.9g})) wrong++;
    }}
    printf("{name}: %d of {wanted.size} outputs wrong\\n", wrong);
    return wrong != 0;
}}
"""


def array_rows(declaration: str, rows: np.ndarray, number: Number) -> str:
    return array_text(declaration, [number.literal(value) for value in rows.reshape(-1)])


def reference(model: nn.Module | str | Path, trust: bool = False) -> Callable[[np.ndarray], np.ndarray]:
    """The model as a function of arrays."""
    if isinstance(model, nn.Module):
        return lambda x: _said(model, x)
    if Path(model).suffix == ".pt2":
        program = read_program(model, trust)
        return lambda x: run_program(program, x)
    import onnx
    from onnx.reference import ReferenceEvaluator

    evaluator: Any = ReferenceEvaluator(onnx.load(model))
    return lambda x: np.asarray(evaluator.run(None, {evaluator.input_names[0]: x})[0])


def _said(module: nn.Module, x: np.ndarray) -> np.ndarray:
    kind = next((parameter.dtype for parameter in module.parameters()), torch.float32)
    training = module.training
    try:
        with torch.no_grad():
            return module.eval()(torch.as_tensor(x).to(kind)).double().numpy()
    finally:
        module.train(training)
