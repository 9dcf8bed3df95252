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
from fewer.control.smart_composites.compiler import network_texts
from fewer.control.smart_composites.files import check_folder, write_files
from fewer.control.smart_composites.toolchain import Sizes, build_library, measure_sizes

if TYPE_CHECKING:
    from fewer.control.smart_composites.controller import PredictiveController

HEADER = """#ifndef @BIG_MPC_H
#define @BIG_MPC_H

#include "@name.h"

#define @BIG_MPC_M @m   /* inputs of the plant */
#define @BIG_MPC_P @p   /* outputs of the plant */
#define @BIG_MPC_N2 @n2 /* samples looked ahead */
#define @BIG_MPC_SIZE @size
#define @BIG_MPC_NZ @nz

#ifdef __cplusplus
extern "C" {
#endif

/* All memory of the controller; the caller owns it. */
typedef struct {
    @real past_u[@keep * @m], past_y[@outs * @p], U[@size]; /* newest first */
    @real slopes[@n2 * @p * @size], curves[@curve_size], y[@n2 * @p];
    @real gradient[@size], hessian[@size * @size], factor[@size * @size], step[@size], trial[@size];
    @real z[@nz], dz[@nz * @size], jacobian[@p * @nz], second[@p * @nz * @nz], product[@nz * @size];
    @name_state model;
    int started;
    int held; /* samples on which y was not finite and the last input was held */
    int iterations; /* Newton-Raphson steps of the last sample */
} @name_mpc_state;

void @name_mpc_reset(@name_mpc_state *s);
/* y[P] was measured now, reference[N2 * P] is wanted at the next samples; u[M] is to be applied now. */
void @name_mpc_step(@name_mpc_state *s, const @real y[], const @real reference[], @real u[]);

#ifdef __cplusplus
}
#endif

#endif
"""

SOURCE = """#include "@name_mpc.h"

#include <math.h>

#define M @m
#define P @p
#define N1 @n1
#define N2 @n2
#define NU @nu
#define ND @nd
#define DD @dd
#define SIZE @size
#define NZ @nz
#define NI ((ND + 1) * M)
#define CURVED @curved
#define BOXED @boxed

@arrays
/* Where the input at delay k of predicted sample j comes from: below SIZE from U, from SIZE on from the past. */
static int place(int j, int k)
{
    const int at = j - k < NU - 1 ? j - k : NU - 1;
    return j >= k ? at * M : SIZE + (k - j - 1) * M;
}

static void model_input(@name_mpc_state *s, const @real *U, int j)
{
    for (int k = 0; k <= ND; k++) {
        const int at = place(j, k);
        for (int i = 0; i < M; i++) s->z[k * M + i] = at < SIZE ? U[at + i] : s->past_u[at - SIZE + i];
    }
    for (int k = 0; k <= DD; k++)
        for (int i = 0; i < P; i++) s->z[NI + k * P + i] = j > k ? s->y[(j - k - 1) * P + i] : s->past_y[(k - j) * P + i];
}

static @real error_cost(const @real *error)
{
    @real sum = @0;
    for (int a = 0; a < P; a++)
        for (int b = 0; b < P; b++) sum += error[a] * Q[a * P + b] * error[b];
    return sum;
}

static @real change_at(const @name_mpc_state *s, const @real *U, int j, int i)
{
    return U[j * M + i] - (j ? U[(j - 1) * M + i] : s->past_u[i]);
}

/* The changes of the input and the soft box. */
static @real input_cost(const @name_mpc_state *s, const @real *U)
{
    @real sum = @0;
    for (int j = 0; j < NU; j++)
        for (int a = 0; a < M; a++) {
            for (int b = 0; b < M; b++) sum += change_at(s, U, j, a) * LAMBDA[a * M + b] * change_at(s, U, j, b);
#if BOXED
            sum += SHARPNESS[a] / (U[j * M + a] - LOWER[a]) + SHARPNESS[a] / (UPPER[a] - U[j * M + a]) - @4 * SHARPNESS[a] / (UPPER[a] - LOWER[a]);
#endif
        }
    return sum;
}

static @real cost(@name_mpc_state *s, const @real *U, const @real *reference)
{
    @real sum = input_cost(s, U);
    for (int j = 0; j < N2; j++) {
        @real error[P];
        model_input(s, U, j);
        @name_predict(s->z, s->y + j * P, &s->model);
        for (int a = 0; a < P; a++) error[a] = reference[j * P + a] - s->y[j * P + a];
        if (j + 1 >= N1) sum += error_cost(error);
    }
    return sum;
}

/* dy/dU and d2y/dU2 of predicted sample j, from the model's derivatives and those of the samples fed back. */
static void accumulate(@name_mpc_state *s, int j)
{
    @real *slope = s->slopes + j * P * SIZE;
    for (int i = 0; i < NZ * SIZE; i++) s->dz[i] = @0;
    for (int k = 0; k <= ND; k++) {
        const int at = place(j, k);
        for (int i = 0; i < M && at < SIZE; i++) s->dz[(k * M + i) * SIZE + at + i] = @1;
    }
    for (int k = 0; k <= DD && k < j; k++)
        for (int i = 0; i < P * SIZE; i++) s->dz[(NI + k * P) * SIZE + i] = s->slopes[(j - k - 1) * P * SIZE + i];
    for (int a = 0; a < P; a++)
        for (int c = 0; c < SIZE; c++) slope[a * SIZE + c] = @0;
    for (int a = 0; a < P; a++)
        for (int i = 0; i < NZ; i++)
            for (int c = 0; c < SIZE; c++) slope[a * SIZE + c] += s->jacobian[a * NZ + i] * s->dz[i * SIZE + c];
#if CURVED
    for (int a = 0; a < P; a++) {
        @real *curve = s->curves + (j * P + a) * SIZE * SIZE;
        for (int i = 0; i < NZ * SIZE; i++) s->product[i] = @0;
        for (int i = 0; i < NZ; i++)
            for (int l = 0; l < NZ; l++)
                for (int c = 0; c < SIZE; c++) s->product[i * SIZE + c] += s->second[(a * NZ + i) * NZ + l] * s->dz[l * SIZE + c];
        for (int c = 0; c < SIZE * SIZE; c++) curve[c] = @0;
        for (int i = 0; i < NZ; i++)
            for (int c = 0; c < SIZE; c++)
                for (int d = 0; d < SIZE; d++) curve[c * SIZE + d] += s->dz[i * SIZE + c] * s->product[i * SIZE + d];
        for (int k = 0; k <= DD && k < j; k++)
            for (int b = 0; b < P; b++)
                for (int c = 0; c < SIZE * SIZE; c++)
                    curve[c] += s->jacobian[a * NZ + NI + k * P + b] * s->curves[((j - k - 1) * P + b) * SIZE * SIZE + c];
    }
#endif
}

static void add_errors(@name_mpc_state *s, const @real *error, int j)
{
    const @real *slope = s->slopes + j * P * SIZE;
    for (int a = 0; a < P; a++) {
        @real weighted = @0;
        for (int b = 0; b < P; b++) weighted += Q[a * P + b] * error[b];
        for (int c = 0; c < SIZE; c++) s->gradient[c] -= @2 * slope[a * SIZE + c] * weighted;
#if CURVED
        for (int c = 0; c < SIZE * SIZE; c++) s->hessian[c] -= @2 * weighted * s->curves[(j * P + a) * SIZE * SIZE + c];
#endif
        for (int b = 0; b < P; b++)
            for (int c = 0; c < SIZE; c++)
                for (int d = 0; d < SIZE; d++) s->hessian[c * SIZE + d] += @2 * slope[a * SIZE + c] * Q[a * P + b] * slope[b * SIZE + d];
    }
}

static void add_inputs(@name_mpc_state *s, const @real *U)
{
    for (int j = 0; j < NU; j++)
        for (int a = 0; a < M; a++) {
            const int c = j * M + a;
            for (int b = 0; b < M; b++) {
                const @real w = @2 * LAMBDA[a * M + b];
                s->gradient[c] += w * (change_at(s, U, j, b) - (j + 1 < NU ? change_at(s, U, j + 1, b) : @0));
                s->hessian[c * SIZE + j * M + b] += (j + 1 < NU ? @2 : @1) * w;
                if (j + 1 < NU) {
                    s->hessian[c * SIZE + (j + 1) * M + b] -= w;
                    s->hessian[((j + 1) * M + a) * SIZE + j * M + b] -= w;
                }
            }
#if BOXED
            {
                const @real below = U[c] - LOWER[a], above = UPPER[a] - U[c];
                s->gradient[c] += SHARPNESS[a] * (@1 / (above * above) - @1 / (below * below));
                s->hessian[c * SIZE + c] += @2 * SHARPNESS[a] * (@1 / (below * below * below) + @1 / (above * above * above));
            }
#endif
        }
}

static @real derivatives(@name_mpc_state *s, const @real *U, const @real *reference)
{
    @real sum = input_cost(s, U);
    for (int c = 0; c < SIZE; c++) s->gradient[c] = @0;
    for (int c = 0; c < SIZE * SIZE; c++) s->hessian[c] = @0;
    for (int j = 0; j < N2; j++) {
        @real error[P];
        model_input(s, U, j);
@evaluate
        accumulate(s, j);
        for (int a = 0; a < P; a++) error[a] = reference[j * P + a] - s->y[j * P + a];
        if (j + 1 >= N1) {
            sum += error_cost(error);
            add_errors(s, error, j);
        }
    }
    add_inputs(s, U);
    return sum;
}

/* factor factor^T = hessian + damping I, in place; 0 where that is not positive definite. */
static int cholesky(@name_mpc_state *s, @real damping)
{
    @real *f = s->factor;
    for (int c = 0; c < SIZE * SIZE; c++) f[c] = s->hessian[c];
    for (int c = 0; c < SIZE; c++) {
        @real pivot = f[c * SIZE + c] + damping;
        for (int k = 0; k < c; k++) pivot -= f[c * SIZE + k] * f[c * SIZE + k];
        if (!(pivot > @0)) return 0;
        f[c * SIZE + c] = @sqrt(pivot);
        for (int r = c + 1; r < SIZE; r++) {
            @real sum = f[r * SIZE + c];
            for (int k = 0; k < c; k++) sum -= f[r * SIZE + k] * f[c * SIZE + k];
            f[r * SIZE + c] = sum / f[c * SIZE + c];
        }
    }
    return 1;
}

/* step = -(hessian + mu I)^-1 gradient, mu the smallest of 0, 1e-6, 1e-5, ... that will do; 0 where none will. */
static int newton_step(@name_mpc_state *s)
{
    @real damping = @0, *x = s->step;
    const @real *f = s->factor;
    int tries = 0;
    while (!cholesky(s, damping)) {
        damping = damping > @0 ? damping * @10 : @first_damping;
        if (++tries > 40) return 0;
    }
    for (int r = 0; r < SIZE; r++) {
        x[r] = -s->gradient[r];
        for (int k = 0; k < r; k++) x[r] -= f[r * SIZE + k] * x[k];
        x[r] /= f[r * SIZE + r];
    }
    for (int r = SIZE - 1; r >= 0; r--) {
        for (int k = r + 1; k < SIZE; k++) x[r] -= f[k * SIZE + r] * x[k];
        x[r] /= f[r * SIZE + r];
    }
    return 1;
}

/* U + t step, t so short that U stays inside the box, and halved while the cost would rise. */
static void move(@name_mpc_state *s, @real value, const @real *reference)
{
    @real t = @1;
#if BOXED
    for (int c = 0; c < SIZE; c++) {
        const @real way = s->step[c], room = way < @0 ? LOWER[c % M] - s->U[c] : UPPER[c % M] - s->U[c];
        if (way < @0 || way > @0) {
            const @real longest = @to_the_bound * (room / way);
            if (longest < t) t = longest;
        }
    }
#endif
    for (int halving = 0; halving <= @halvings; halving++) {
        for (int c = 0; c < SIZE; c++) s->trial[c] = s->U[c] + t * s->step[c];
        if (halving == @halvings || cost(s, s->trial, reference) <= value + @slack * @abs(value)) break;
        t /= @2;
    }
    for (int c = 0; c < SIZE; c++) s->U[c] = s->trial[c];
}

static void remember(@real *past, const @real *now, int rows, int width)
{
    for (int i = rows * width - 1; i >= width; i--) past[i] = past[i - width];
    for (int i = 0; i < width; i++) past[i] = now[i];
}

void @name_mpc_reset(@name_mpc_state *s)
{
    for (int c = 0; c < SIZE; c++) s->U[c] = REST[c % M];
    for (int c = 0; c < @keep * M; c++) s->past_u[c] = REST[c % M];
    s->started = s->held = s->iterations = 0;
    @name_reset(&s->model);
}

void @name_mpc_step(@name_mpc_state *s, const @real y[], const @real reference[], @real u[])
{
    @real first = @0;
    for (int i = 0; i < P; i++)
        if (!(y[i] - y[i] == @0)) { /* NaN or infinity */
            s->held++;
            for (int k = 0; k < M; k++) u[k] = s->past_u[k];
            remember(s->past_u, u, @keep, M);
            return;
        }
    for (int k = s->started ? 1 : DD + 1; k > 0; k--) remember(s->past_y, y, DD + 1, P);
    s->started = 1;
    s->iterations = 0;
    for (int iteration = 0; iteration < @max_iter; iteration++) {
        const @real value = derivatives(s, s->U, reference);
        @real length = @0;
        for (int c = 0; c < SIZE; c++) length += s->gradient[c] * s->gradient[c];
        length = @sqrt(length);
        if (iteration == 0) first = length;
        if (length <= @tiny || (iteration && length <= @rtol * first) || !newton_step(s)) break;
        move(s, value, reference);
        s->iterations++;
    }
    for (int k = 0; k < M; k++) u[k] = s->U[k];
    remember(s->past_u, u, @keep, M);
    for (int c = 0; c < SIZE - M; c++) s->U[c] = s->U[c + M];
}
"""

CURVED = "        @name_hessian(s->z, s->y + j * P, s->jacobian, s->second);"
FLAT = "        @name_predict(s->z, s->y + j * P, &s->model);\n        @name_jacobian(s->z, s->jacobian);"


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


def compile_controller(controller: PredictiveController, out_dir: str | Path, *, name: str, dtype: str, overwrite: bool) -> CompiledController:
    """What `PredictiveController.compile_to_c` does."""
    check_name(name)
    if dtype not in ("float", "double"):
        raise ValueError(f"dtype={dtype!r}; expected 'float' or 'double'")
    number = DOUBLE if dtype == "double" else FLOAT
    check_folder(Path(out_dir), overwrite=overwrite)
    texts = network_texts(controller.network, name, number, None, True) | controller_texts(controller, name, number)
    texts["CMakeLists.txt"] = texts["CMakeLists.txt"].replace(f"STATIC {name}.c", f"STATIC {name}.c {name}_mpc.c")
    texts["library.json"] = texts["library.json"].replace(f'"+<{name}.c>"', f'"+<{name}.c>",\n      "+<{name}_mpc.c>"')
    files = write_files(Path(out_dir), texts, overwrite=overwrite)
    return CompiledController(name, number, files, controller.m, controller.p, controller.n2)


@dataclass
class CompiledController:
    """A controller in C, with what it costs and, where there is a compiler, what it says; `simulate` takes it as it takes the Python one."""

    name: str
    number: Number
    files: list[Path]
    m: int
    p: int
    preview: int
    _folder: Any = field(default=None, repr=False)
    _bound: Any = field(default=None, repr=False)

    @property
    def sources(self) -> list[Path]:
        return [file for file in self.files if file.suffix == ".c"]

    @cached_property
    def sizes(self) -> Sizes:
        """Flash, static RAM and stack of model and controller, by the compiler of this machine with -Os."""
        return measure_sizes(self.sources)

    @property
    def flash_bytes(self) -> int:
        return self.sizes.flash

    def build(self) -> Path:
        """A shared library for this machine; NoCompiler says what to install."""
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="fewer-c-")
        target = Path(self._folder.name) / f"lib{self.name}.so"
        if not target.exists():
            size = Path(self._folder.name) / "size.c"
            size.write_text(f'#include "{self.name}_mpc.h"\nint state_size(void);\nint state_size(void) {{ return (int)sizeof({self.name}_mpc_state); }}\n')
            build_library([*self.sources, size], target, ("-O3", "-march=native", f"-I{self.files[0].parent}"))
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
