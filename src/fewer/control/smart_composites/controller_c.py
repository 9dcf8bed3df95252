"""The controller as C99: fixed sizes, no malloc, Cholesky in place. It follows `controller.py` step by step."""

from __future__ import annotations

import ctypes
import tempfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fewer.control.smart_composites.c_text import DOUBLE, FLOAT, Number, array_text, check_name
from fewer.control.smart_composites.compiler import add_sizes, network_texts
from fewer.control.smart_composites.controller_text import CURVED, FLAT, HEADER, SOURCE
from fewer.control.smart_composites.files import check_folder, write_files
from fewer.control.smart_composites.toolchain import FAST, Sizes, build_library, measure_sizes

if TYPE_CHECKING:
    from fewer.control.smart_composites.controller import PredictiveController


def controller_texts(controller: PredictiveController, name: str, number: Number) -> dict[str, str]:
    """File name -> text of the controller alone."""
    from fewer.control.smart_composites import controller as python

    c = controller
    boxed, curved, size = c.lower is not None, not c.gauss_newton, c.nu * c.m
    t, n = number.type, number.literal
    constants = {"Q": c.Q, "LAMBDA": c.Lambda}
    rest = np.zeros(c.m)
    if c.lower is not None and c.upper is not None:
        constants |= {"LOWER": c.lower, "UPPER": c.upper, "SHARPNESS": c.sharpness}
        rest = np.where((c.lower < 0) & (c.upper > 0), 0.0, (c.lower + c.upper) / 2)
    constants["REST"] = rest
    arrays = "".join(array_text(f"{t} {key}", [n(each) for each in value.ravel()]) for key, value in constants.items())
    words = {
        "evaluate": CURVED if curved else FLAT,
        "first_damping": n(python.FIRST_DAMPING), "to_the_bound": n(python.TO_THE_BOUND), "halvings": str(python.HALVINGS),
        "curve_size": str(c.n2 * c.p * size * size if curved else 1), "max_iter": str(c.max_iter), "arrays": arrays,
        "curved": str(int(curved)), "boxed": str(int(boxed)), "slack": n(python.SLACK), "rtol": n(c.rtol), "tiny": n(1e-9),
        "size": str(size), "keep": str(max(c.nd, 1)), "outs": str(c.dd + 1), "sqrt": f"sqrt{number.suffix}", "abs": f"fabs{number.suffix}",
        "real": t, "name": name, "BIG": name.upper(), "nz": str(c.f.inputs), "n1": str(c.n1), "n2": str(c.n2), "nu": str(c.nu),
        "nd": str(c.nd), "dd": str(c.dd), "10": n(10), "0": n(0), "1": n(1), "2": n(2), "4": n(4), "m": str(c.m), "p": str(c.p),
    }  # fmt: skip
    return {f"{name}_mpc.h": filled(HEADER, words), f"{name}_mpc.c": filled(SOURCE, words)}


def filled(text: str, words: dict[str, str]) -> str:
    """The text with every @word replaced; longer words first, since one may begin another (and `evaluate` holds more)."""
    for word in ["evaluate", *sorted(words, key=len, reverse=True)]:
        text = text.replace(f"@{word}", words[word])
    assert "@" not in text, text[text.index("@") :][:40]
    return text


def compile_controller(
    controller: PredictiveController, out_dir: str | Path, *, name: str, dtype: str, overwrite: bool
) -> CompiledController:
    """What `PredictiveController.compile_to_c` does."""
    check_name(name)
    if dtype not in ("float", "double"):
        raise ValueError(f"dtype={dtype!r}; expected 'float' or 'double'")
    number = DOUBLE if dtype == "double" else FLOAT
    check_folder(Path(out_dir), overwrite=overwrite)
    texts = network_texts(controller.network, name, number, None, True) | controller_texts(controller, name, number)
    texts["CMakeLists.txt"] = texts["CMakeLists.txt"].replace(f"STATIC {name}.c", f"STATIC {name}.c {name}_mpc.c")
    texts["library.json"] = texts["library.json"].replace(f'"+<{name}.c>"', f'"+<{name}.c>",\n      "+<{name}_mpc.c>"')
    sizes = add_sizes(texts)
    files = write_files(Path(out_dir), texts, overwrite=overwrite)
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
