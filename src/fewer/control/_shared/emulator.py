"""Instructions that C takes on an emulated Cortex-M4F (qemu-system-arm): counts, not cycles and not a rate."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from fewer.control._shared.toolchain import CORTEX_M4, run

TOOLS = ("arm-none-eabi-gcc", "qemu-system-arm")
INSTALL = "apt install gcc-arm-none-eabi libnewlib-arm-none-eabi qemu-system-arm"
TICK = 40  # instructions: with -icount shift=0 one takes 1 ns, and the board's SysTick counts at 25 MHz

LINK = """MEMORY { FLASH (rx) : ORIGIN = 0, LENGTH = 4M  RAM (rwx) : ORIGIN = 0x20000000, LENGTH = 4M }
ENTRY(start)
SECTIONS {
    .text : { KEEP(*(.vectors)) *(.text*) *(.rodata*) } > FLASH
    .ARM.exidx : { *(.ARM.exidx*) } > FLASH
    .data : { *(.data*) } > RAM
    .bss : { *(.bss*) *(COMMON) } > RAM
}
"""

START = """#include <stdint.h>
void start(void);
void stopped(void);
__attribute__((section(".vectors"), used)) static void *const vectors[16] = {
    (void *)0x20400000, (void *)start, (void *)stopped, (void *)stopped, (void *)stopped, (void *)stopped, (void *)stopped};

static void semihost(int what, const void *with)
{
    register int r0 __asm__("r0") = what;
    register const void *r1 __asm__("r1") = with;
    __asm__ volatile("bkpt 0xab" : "+r"(r0) : "r"(r1) : "memory");
}

void stopped(void)
{
    semihost(4, "fault\\n");
    semihost(24, (void *)0x20026);
    for (;;) {}
}

static void say(uint32_t number)
{
    char text[12], *at = text + 11;
    *at = 0;
    do *--at = (char)('0' + number % 10); while (number /= 10);
    semihost(4, at);
    semihost(4, "\\n");
}

@setup
#define SYSTICK ((volatile uint32_t *)0xE000E010)
__attribute__((noinline)) static void measure(void)
{
    prepare();
    SYSTICK[1] = 0xFFFFFF;
    SYSTICK[2] = 0;
    SYSTICK[0] = 5;
    for (int i = 0; i < @repeats; i++) {
        const uint32_t before = SYSTICK[2];
        call();
        say((before - SYSTICK[2]) & 0xFFFFFF);
    }
}

void start(void)
{
    *(volatile uint32_t *)0xE000ED88 |= 0xFu << 20; /* the floating-point unit, before any function that saves its registers */
    __asm__ volatile("dsb\\n isb");
    measure();
    semihost(24, (void *)0x20026);
    for (;;) {}
}
"""


def missing_tools() -> str:
    """What is not installed and how to install it, or nothing."""
    missing = [tool for tool in TOOLS if not shutil.which(tool)]
    return f"{' and '.join(missing)} not found; install them: {INSTALL}" if missing else ""


def cortex_m4_instructions(sources: list[Path], setup: str, repeats: int = 5, optimise: str = "-O2") -> list[int]:
    """Instructions of each of `repeats` calls on an emulated Cortex-M4F, to the next 40.

    Args:
        sources: C files; their headers are looked for beside them.
        setup: C text with `#include`s, `static void prepare(void)` and `static void call(void)`.
        optimise: the compiler's level.

    Raises:
        RuntimeError: the tools are missing (the message says what to install), or the program stops at a fault.
    """
    if missing_tools():
        raise RuntimeError(missing_tools())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "start.c").write_text(START.replace("@setup", setup).replace("@repeats", str(repeats)))
        (folder / "link.ld").write_text(LINK)
        run(
            TOOLS[0], "-std=gnu99", optimise, *CORTEX_M4, f"-I{sources[0].parent}", "-nostartfiles", "-T", str(folder / "link.ld"),
            *map(str, sources), str(folder / "start.c"), "-o", str(folder / "program"), "-lm", "-lc", "-lgcc", "-lnosys",
        )  # fmt: skip
        board = ("-M", "mps2-an386", "-nographic", "-monitor", "none", "-serial", "none")
        program = ("-semihosting-config", "enable=on,target=native", "-kernel", str(folder / "program"))
        said = run("timeout", "60", TOOLS[1], *board, "-icount", "shift=0", *program, both=True)
    words = said.split()
    if "fault" in words or len(words) != repeats:
        raise RuntimeError(f"the emulated program stopped at a fault; it said: {said.strip() or 'nothing'}")
    return [int(word) * TICK for word in words]


def network_setup(name: str) -> str:
    """Text for `cortex_m4_instructions` that calls a network of `compile_to_c` in float."""
    big = name.upper()
    return (
        f'#include "{name}.h"\nstatic float in[{big}_INPUTS], out[{big}_OUTPUTS];\nstatic {name}_state state;\n'
        f"static void prepare(void) {{ for (int i = 0; i < {big}_INPUTS; i++) in[i] = 0.1f * (float)(i % 7 - 3); {name}_reset(&state); }}\n"
        f"static void call(void) {{ {name}_predict(in, out, &state); }}\n"
    )


def controller_setup(name: str) -> str:
    """The same for a controller: a step at another output and reference each time."""
    big = f"{name.upper()}_MPC"
    return (
        f'#include "{name}_mpc.h"\nstatic float y[{big}_P], r[{big}_N2 * {big}_P], u[{big}_M];\nstatic {name}_mpc_state state;\n'
        f"static void prepare(void) {{ {name}_mpc_reset(&state); }}\nstatic void call(void)\n{{\n    static int n;\n    n++;\n"
        f"    for (int i = 0; i < {big}_P; i++) y[i] = 0.01f * (float)(n % 5);\n"
        f"    for (int i = 0; i < {big}_N2 * {big}_P; i++) r[i] = 0.1f * (float)(n % 3);\n    {name}_mpc_step(&state, y, r, u);\n}}\n"
    )
