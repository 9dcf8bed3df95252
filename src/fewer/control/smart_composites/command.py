"""The verb `fewer compile-c`: a network file in, C out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def compile_c(
    model: Annotated[Path, typer.Argument(help="An .onnx file, or a .pt2 file that torch.export.save wrote.")],
    out: Annotated[Path, typer.Option(help="The folder to write the C into.")],
    name: Annotated[str, typer.Option(help="Begins the names of files and functions.")] = "net",
    dtype: Annotated[Literal["float", "double", "q15"], typer.Option(help="What is computed with.")] = "float",
    quantize: Annotated[Literal["int8"] | None, typer.Option(help="Store matrices as 8-bit integers.")] = None,
    derivatives: Annotated[bool, typer.Option("--derivatives", help="Also write Jacobian and Hessian of a smooth MLP.")] = False,
    test: Annotated[bool, typer.Option("--test", help="Also write a C program that checks recorded outputs.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what was compiled into the folder before.")] = False,
    trust: Annotated[bool, typer.Option("--trust", help="Read a .pt2 file even where that can run code that stands in it.")] = False,
) -> None:
    """Write a trained network as C99 that needs nothing but math.h, and say what it takes.

    Example: fewer compile-c model.onnx --out firmware/net --name net --test
    """
    import json

    from fewer.control._shared.toolchain import NoCompiler
    from fewer.control.smart_composites.to_c.compiler import compile_to_c

    compiled = compile_to_c(
        model,
        None,
        out,
        name=name,
        dtype=dtype,
        quantize=quantize,
        derivatives=derivatives,
        test=test,
        overwrite=overwrite,
        trust=trust,
    )
    try:
        report = compiled.report()
    except NoCompiler as missing:
        report = {"ram_bytes": compiled.ram_bytes, "macs": compiled.macs, "flash_bytes": str(missing)}
    if as_json:
        print(json.dumps(report | {"files": [str(file) for file in compiled.files]}))
        return
    for what, value in report.items():
        print(f"{what.replace('_', ' ')}: {value}")
    print(f"written to {out}")


COMMANDS = {"compile-c": compile_c}
