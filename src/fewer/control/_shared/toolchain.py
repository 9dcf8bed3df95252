"""The C compilers of this machine: building a library to call, and asking how large code is."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

STRICT = ("-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror")
FAST = ("-O2", "-march=native")  # -O3 unrolls the sums of a panel before gcc 12 can make vectors of them: three times slower here
CORTEX_M4 = ("-mcpu=cortex-m4", "-mthumb", "-mfpu=fpv4-sp-d16", "-mfloat-abi=hard")


class NoCompiler(RuntimeError):
    """No C compiler is installed; the message says what to install."""


def host_compiler() -> str:
    """The C compiler of this machine; NoCompiler where there is none."""
    for name in ("gcc", "cc", "clang"):
        if shutil.which(name):
            return name
    raise NoCompiler(
        "no C compiler found (looked for gcc, cc, clang); the C text is written: to build it here, install gcc (apt install gcc)"
    )


def run(*words: str, both: bool = False) -> str:
    """What a program prints (with what it prints as errors, where `both`); RuntimeError where it fails."""
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed:\n{done.stderr}")
    return done.stdout + done.stderr * both


def build_library(sources: list[Path], target: Path, flags: tuple[str, ...] = FAST) -> Path:
    """A shared library of C sources for this machine."""
    run(host_compiler(), *STRICT, *flags, "-fPIC", "-shared", *map(str, sources), "-o", str(target), "-lm")
    return target


@dataclass(frozen=True)
class Sizes:
    """What a compiler says of some C.

    Attributes:
        flash: bytes of code and constants.
        static_ram: bytes of variables.
        stack: bytes of the deepest chain of calls, library functions left out.
    """

    flash: int
    static_ram: int
    stack: int


def measure_sizes(sources: list[Path], compiler: str | None = None, flags: tuple[str, ...] = ()) -> Sizes:
    """Compile with -Os and ask `size`, and add up the compiler's own figures of stack (-fstack-usage)."""
    compiler = compiler or host_compiler()
    flash = ram = stack = 0
    with tempfile.TemporaryDirectory() as folder:
        for source in sources:
            target = Path(folder) / f"{source.stem}.o"
            run(
                compiler,
                "-std=c99",
                "-Os",
                *flags,
                "-fno-asynchronous-unwind-tables",
                "-fstack-usage",
                "-c",
                str(source),
                "-o",
                str(target),
            )
            size = run(compiler.removesuffix("gcc") + "size" if compiler.endswith("-gcc") else "size", str(target)).splitlines()[1].split()
            flash, ram = flash + int(size[0]), ram + int(size[1]) + int(size[2])
            usage = target.with_suffix(".su")
            if usage.exists():
                stack += deepest(source.read_text(), usage.read_text())
    return Sizes(flash, ram, stack)


def sizes_of(texts: Mapping[str, str]) -> Sizes | None:
    """The same of texts that are not files yet; None without a compiler."""
    try:
        host_compiler()
    except NoCompiler:
        return None
    with tempfile.TemporaryDirectory() as folder:
        for name, text in texts.items():
            (Path(folder) / name).write_text(text)
        return measure_sizes([Path(folder) / name for name in texts if name.endswith(".c") and not name.endswith("_test.c")])


def deepest(source: str, usage: str) -> int:
    """Bytes of the deepest chain of calls in a C source whose functions call only those above them."""
    own = {line.split("\t")[0].rsplit(":", 1)[1]: int(line.split("\t")[1]) for line in usage.splitlines()}
    total: dict[str, int] = {}
    bodies = re.split(r"^(?=(?:static )?\w+ \w+\([^;]*\)\n?\s?\{)", source, flags=re.M)
    for body in bodies:
        name = re.match(r"(?:static )?\w+ (\w+)\(", body)
        if name:
            called = [total[other] for other in set(re.findall(r"(\w+)\(", body)) - {name[1]} if other in total]
            inlined = own.get(name[1], 0)
            total[name[1]] = inlined + (max(called) if called else 0)
    return max(total.values(), default=0)


def arm_sizes(sources: list[Path]) -> Sizes | None:
    """The same for a Cortex-M4F; None where arm-none-eabi-gcc is not installed."""
    return measure_sizes(sources, "arm-none-eabi-gcc", CORTEX_M4) if shutil.which("arm-none-eabi-gcc") else None
