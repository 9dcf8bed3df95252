"""What the tests of the compiler share: many networks in one program, since one call of gcc for all is much quicker than one for each."""

from __future__ import annotations

import subprocess

import numpy as np
import pytest

from fewer.control._shared.toolchain import STRICT
from fewer.control.smart_composites.to_c.compiler import network_texts


@pytest.fixture(scope="session")
def run_together():
    """`run_together(folder, cases, number, flags, wrap)`; a case is (model, shape, network)."""
    return compile_and_run


def compile_and_run(folder, cases, number, flags=("-O2",), wrap=()) -> list[tuple[np.ndarray, ...]]:
    """Compile many networks into one program; for each its input, what the C says of it after a reset, and what it says of NaN."""
    folder.mkdir(exist_ok=True)
    rng, calls, sources, inputs = np.random.default_rng(0), [], [], []
    for index, (_, shape, network) in enumerate(cases):
        x, name, t = rng.standard_normal(shape).astype(np.float32), f"n{index}", number.type
        texts = network_texts(network, name, number)
        (folder / f"{name}.h").write_text(texts[f"{name}.h"])
        sources.append(texts[f"{name}.c"])
        inputs.append(x)
        values = ", ".join(number.literal(v) for v in x.ravel())
        calls.append(
            f"static void call{index}(void) {{ static const {t} x[] = {{{values}}}; {t} y[{network.outputs}], nan[{x.size}];\n"
            f"for (int i = 0; i < {x.size}; i++) nan[i] = ({t})NAN;\n{name}_state s; {name}_reset(&s); {name}_predict(nan, y, &s);\n"
            f'for (int i = 0; i < {network.outputs}; i++) printf("%d ", y[i] != y[i]);\n'
            f"{name}_reset(&s); {name}_predict(x, y, &s); {name}_reset(&s); {name}_predict(x, y, &s);\n"
            f'for (int i = 0; i < {network.outputs}; i++) printf("%.17g ", (double)y[i]);\nprintf("\\n"); }}\n'
        )
    main = "#include <math.h>\n#include <stdio.h>\n" + "".join(f'#include "n{index}.h"\n' for index in range(len(calls))) + "".join(calls)
    main += "int main(void) {\n" + "".join(f"call{index}();\n" for index in range(len(calls))) + "return 0; }\n"
    (folder / "networks.c").write_text("".join(sources))
    (folder / "main.c").write_text(main)
    strict, networks = ["gcc", *STRICT, *flags, f"-I{folder}"], str(folder / "networks.o")
    subprocess.run([*strict, "-c", str(folder / "networks.c"), "-o", networks], check=True)
    plain = "-O0"  # the calls are ours alone: at -O2 gcc would inline every network into its own
    subprocess.run([*strict, plain, str(folder / "main.c"), networks, "-o", str(folder / "all"), "-lm"], check=True)
    done = subprocess.run([*wrap, str(folder / "all")], check=True, capture_output=True, text=True)
    said = [np.array([float(word) for word in line.split()]) for line in done.stdout.splitlines()]
    return [(x, *np.split(row, 2)[::-1]) for x, row in zip(inputs, said, strict=True)]
