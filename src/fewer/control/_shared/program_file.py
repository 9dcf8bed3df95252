"""Programs that torch.export.save wrote, read without running what is in the file.

`torch.export.load` unpickles whatever the archive says is pickled, evaluates the expressions of symbolic shapes, loads compiled libraries,
and the module it gives runs guards that stand in the file as code. So the archive is read first, and refused where it has any of that.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

PLAIN = ("torch.ops.aten.", "_operator.getitem")  # what a node of a network may call
TRUST = "such a file can run code; if you trust who made it, say --trust (trust=True), or export the network again"


class UntrustedFile(ValueError):
    """A file that could run code when it is read; the message names the entry."""


def read_program(file: str | Path, trust: bool = False) -> torch.export.ExportedProgram:
    """The exported program of a .pt2 file.

    Args:
        file: what torch.export.save wrote.
        trust: read it as torch does, pickles and all.

    Raises:
        UntrustedFile: an entry of the archive could run code.
        ValueError: the file is no such archive, or its shapes are dynamic.
    """
    file = Path(file)
    data = file.read_bytes()  # once: what is checked is what is read
    broken = "is no archive of torch.export.save that can be read"
    again = "save it again with torch.export.save (torch 2.8 or later)"
    if not trust:
        try:
            reader = torch._C.PyTorchFileReader(io.BytesIO(data))
            names = list(reader.get_all_records())
            listed = zipfile.ZipFile(io.BytesIO(data)).namelist()
            inside = sorted(name.partition("/")[2] for name in listed)
            if "archive_version" not in names or inside != sorted(names):  # torch looks beside the folder of the archive, too
                raise ValueError("it lacks archive_version, or has entries beside the archive's one folder, or one twice")
        except (RuntimeError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"{file} {broken} ({first_line(error)}); {again}") from error
        _check_entries(file, reader, names)
    try:
        return torch.export.load(io.BytesIO(data))
    except Exception as error:  # whatever a damaged file leads to
        raise ValueError(f"{file} {broken} ({first_line(error)}); {again}") from error


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]


def _check_entries(file: Path, reader: Any, names: list[str]) -> None:
    """UntrustedFile where an entry may only be unpickled, holds code, or is not known."""
    for name in names:
        if name.startswith("models/"):
            _check_graph(file, name, _json(file, name, reader))
        elif name.endswith(("weights_config.json", "constants_config.json")):
            config = _json(file, name, reader)
            entries = config.get("config") if isinstance(config, dict) else None
            for key, entry in (entries or {}).items() if isinstance(entries, dict) else [("", {"use_pickle": True})]:
                path = str(entry.get("path_name", "")) if isinstance(entry, dict) else ""
                if not isinstance(entry, dict) or entry.get("use_pickle") is not False or path.startswith(("custom_obj", "opaque_obj")):
                    raise UntrustedFile(f"{file}: {name} says that {key or 'it'} ({path}) is to be unpickled; {TRUST}")
        elif name.endswith(".pt"):  # sample inputs, and weights of older versions: torch unpickles them where they are no plain tensors
            try:
                torch.load(io.BytesIO(reader.get_record(name)), weights_only=True)
            except Exception as error:
                raise UntrustedFile(f"{file}: {name} holds more than tensors ({first_line(error)}); {TRUST}") from error
        elif not name.startswith(("data/weights/weight_", "data/constants/tensor_", "extra/", ".data/")) and name not in (
            "archive_format", "archive_version", "byteorder", "version"
        ):  # fmt: skip
            raise UntrustedFile(f"{file}: {name} is no part of a network; {TRUST}")


def _json(file: Path, name: str, reader: Any) -> Any:
    try:
        return json.loads(reader.get_record(name))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: {name} is no JSON ({first_line(error)}); save it again with torch.export.save") from error


def _check_graph(file: Path, name: str, graph: Any) -> None:
    """UntrustedFile where the graph calls anything but tensor operations; ValueError where a shape is an expression, which is evaluated."""
    for each in _objects(graph):
        if "expr_str" in each:
            said = str(each["expr_str"])[:40]
            raise ValueError(f"{file} has the dynamic shape {said} in {name}; expected fixed shapes: export without dynamic_shapes")
        target = each.get("target")
        if isinstance(target, str) and "inputs" in each and not target.startswith(PLAIN):
            raise UntrustedFile(f"{file}: {name} calls {target[:60]}, which is no tensor operation; {TRUST}")


def _objects(tree: Any) -> Iterator[dict[str, Any]]:
    """Every object of a JSON tree, without recursion."""
    waiting = [tree]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            yield each
            waiting += each.values()
        elif isinstance(each, list):
            waiting += each


def run_program(program: torch.export.ExportedProgram, x: np.ndarray) -> np.ndarray:
    """What the program's graph says of x; `program.module()` would run the guards that stand in its file as code."""
    signature, kinds = program.graph_signature, torch.export.graph_signature.InputKind
    given = []
    for spec in signature.input_specs:
        if spec.kind is kinds.USER_INPUT:
            dtype = next(node.meta["val"].dtype for node in program.graph.nodes if node.name == spec.arg.name)
            given.append(torch.as_tensor(x).to(dtype))
        else:
            assert spec.target is not None
            held = program.state_dict if spec.target in program.state_dict else program.constants
            given.append(held[spec.target])
    with torch.no_grad():
        out = torch.fx.Interpreter(program.graph_module).run(*given)
    return out[-1].numpy()  # changed buffers, where there are any, come first
