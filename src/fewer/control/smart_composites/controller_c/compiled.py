"""The controller as C99: fixed sizes, no malloc, Cholesky in place. It follows `controller.py` and `newton.py` step by step."""

from __future__ import annotations

import ctypes
import tempfile
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fewer.checks import check_choice
from fewer.control._shared.toolchain import FAST, Sizes, build_library, measure_sizes
from fewer.control.smart_composites import newton
from fewer.control.smart_composites.to_c.compiler import add_sizes, network_texts, write_files
from fewer.control.smart_composites.to_c.text import DOUBLE, FLOAT, Number, array_text, check_name
from fewer.files import check_new

if TYPE_CHECKING:
    from fewer.control.smart_composites.controller import PredictiveController


def controller_texts(controller: PredictiveController, name: str, number: Number) -> dict[str, str]:
    """File name -> text of the controller alone: `mpc.h.in` and `mpc.c.in`, filled in."""
    c = controller
    boxed, curved, size = c.lower is not None, not c.gauss_newton, c.nu * c.m
    t, n = number.type, number.literal
    constants = {"Q": c.Q, "LAMBDA": c.Lambda, "REST": c.rest}
    if c.lower is not None and c.upper is not None:
        constants |= {"LOWER": c.lower, "UPPER": c.upper, "SHARPNESS": c.sharpness}
    arrays = "".join(array_text(f"{t} {key}", [n(each) for each in value.ravel()]) for key, value in constants.items())
    words = {
        "first_damping": n(newton.FIRST_DAMPING), "to_the_bound": n(newton.TO_THE_BOUND), "halvings": str(newton.HALVINGS),
        "curve_size": str(c.n2 * c.p * size * size if curved else 1), "max_iter": str(c.max_iter), "arrays": arrays,
        "curved": str(int(curved)), "boxed": str(int(boxed)), "slack": n(newton.SLACK), "rtol": n(c.rtol), "tiny": n(1e-9),
        "size": str(size), "keep": str(max(c.nd, 1)), "outs": str(c.dd + 1), "sqrt": f"sqrt{number.suffix}", "abs": f"fabs{number.suffix}",
        "real": t, "name": name, "BIG": name.upper(), "nz": str(c.f.inputs), "n1": str(c.n1), "n2": str(c.n2), "nu": str(c.nu),
        "nd": str(c.nd), "dd": str(c.dd), "10": n(10), "0": n(0), "1": n(1), "2": n(2), "4": n(4), "m": str(c.m), "p": str(c.p),
    }  # fmt: skip
    texts = resources.files("fewer.control.smart_composites.controller_c")
    return {f"{name}_mpc.{end}": filled(texts.joinpath(f"mpc.{end}.in").read_text(encoding="utf8"), words) for end in ("h", "c")}


def filled(text: str, words: dict[str, str]) -> str:
    """The text with every @word replaced; longer words first, since one may begin another."""
    for word in sorted(words, key=len, reverse=True):
        text = text.replace(f"@{word}", words[word])
    assert "@" not in text, text[text.index("@") :][:40]
    return text


def compile_controller(
    controller: PredictiveController,
    out_dir: str | Path,
    *,
    name: str = "net",
    dtype: Literal["float", "double"] = "float",
    overwrite: bool = False,
) -> CompiledController:
    """Write a controller, its model and the model's derivatives as C99: `NAME.c` and `NAME_mpc.c`.

    Args:
        controller: the `PredictiveController`.
        out_dir: a new or empty folder.
        name: begins the names of files and functions.
        dtype: what is computed with.
        overwrite: replace what was compiled into out_dir before.

    Returns:
        CompiledController: `.files`, `.build()`, `.step(y, reference)`, `.reset()`, `.sizes`.

    Raises:
        ValueError: a name that is none in C, or another dtype.
        FileExistsError: out_dir may not be written.
    """
    check_name(name)
    check_choice(("float", "double"), dtype=dtype)
    number = DOUBLE if dtype == "double" else FLOAT
    folder = check_new(out_dir, overwrite, option="out_dir")
    texts = network_texts(controller.network, name, number, None, True) | controller_texts(controller, name, number)
    texts["CMakeLists.txt"] = texts["CMakeLists.txt"].replace(f"STATIC {name}.c", f"STATIC {name}.c {name}_mpc.c")
    texts["library.json"] = texts["library.json"].replace(f'"+<{name}.c>"', f'"+<{name}.c>",\n      "+<{name}_mpc.c>"')
    sizes = add_sizes(texts)
    files = write_files(folder, texts, overwrite=overwrite)
    return CompiledController(name, number, files, controller.m, controller.p, controller.n2, sizes)


@dataclass
class CompiledController:
    """A controller in C, with what it costs and, where there is a compiler, what it says; `simulate` takes it as it takes the Python one."""

    name: str
    number: Number
    files: list[Path]
    m: int
    p: int
    preview: int
    _sizes: Sizes | None = field(default=None, repr=False)
    _folder: Any = field(default=None, repr=False)
    _bound: Any = field(default=None, repr=False)

    @property
    def sources(self) -> list[Path]:
        return [file for file in self.files if file.suffix == ".c"]

    @cached_property
    def sizes(self) -> Sizes:
        """Flash, static RAM and stack of model and controller, by the compiler of this machine with -Os."""
        return self._sizes or measure_sizes(self.sources)

    @property
    def flash_bytes(self) -> int:
        return self.sizes.flash

    def build(self) -> Path:
        """A shared library for this machine; NoCompiler says what to install."""
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="fewer-c-")
        target = Path(self._folder.name) / f"lib{self.name}.so"
        if not target.exists():
            size = Path(self._folder.name) / "size.c"
            size.write_text(
                f'#include "{self.name}_mpc.h"\nint state_size(void);\nint state_size(void) {{ return (int)sizeof({self.name}_mpc_state); }}\n'
            )
            build_library([*self.sources, size], target, (*FAST, f"-I{self.files[0].parent}"))
        return target

    def _bind(self) -> Any:
        library = ctypes.CDLL(str(self.build()))
        step, reset = library[f"{self.name}_mpc_step"], library[f"{self.name}_mpc_reset"]
        step.restype = reset.restype = None
        state = ctypes.create_string_buffer(library["state_size"]())
        y, reference, u = (np.zeros(size, self.number.numpy) for size in (self.p, self.preview * self.p, self.m))
        pointers = [ctypes.cast(state, ctypes.c_void_p), *(ctypes.c_void_p(array.ctypes.data) for array in (y, reference, u))]
        reset(pointers[0])
        self._bound = (step, reset, state, y, reference, u, pointers)
        return self._bound

    @property
    def ram_bytes(self) -> int:
        """Bytes of the caller's state; the stack comes on top."""
        return len((self._bound or self._bind())[2])

    def step(self, y: Any, reference: Any) -> np.ndarray:
        """The input [m] to apply now; y [p], reference [N2, p]."""
        step, _, _, into, wanted, u, pointers = self._bound or self._bind()
        into[:], wanted[:] = np.ravel(y), np.ravel(reference)
        step(*pointers)
        return u.copy()

    def reset(self) -> None:
        """Forget the past."""
        bound = self._bound or self._bind()
        bound[1](bound[6][0])
