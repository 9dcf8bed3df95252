"""Written C of a network: what it costs, and what it says on this machine."""

from __future__ import annotations

import ctypes
import tempfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fewer.control._shared.toolchain import Sizes, arm_sizes, build_library, host_compiler, measure_sizes
from fewer.control.smart_composites.to_c.network import Network, plan_buffers
from fewer.control.smart_composites.to_c.text import Number

CYCLES_PER_MAC, CYCLES_PER_ACTIVATION = 5, 120  # an estimate for a Cortex-M4F: two loads and a multiply-add; a call of expf or tanhf


@dataclass
class CompiledNetwork:
    """Written C, with what it costs and, where there is a compiler, what it says.

    Attributes:
        name: begins the names of its functions.
        network: the layers that were written.
        number: the type it computes with.
        files: what was written.
    """

    name: str
    network: Network
    number: Number
    files: list[Path]
    _sizes: Sizes | None = field(default=None, repr=False)
    _folder: Any = field(default=None, repr=False)
    _call: Any = field(default=None, repr=False)

    @property
    def source(self) -> Path:
        return next(file for file in self.files if file.name == f"{self.name}.c")

    @property
    def macs(self) -> int:
        """Multiply-accumulates of a call."""
        return self.network.macs

    @cached_property
    def ram_bytes(self) -> int:
        """Bytes of the caller's state: buffers and recurrent state; the stack (`sizes.stack`) comes on top."""
        plan = plan_buffers(self.network)
        kept = sum(layer.weights["weight_hh"].shape[1] * (2 if layer.kind == "lstm" else 1) for layer in self.network.recurrent)
        return (plan.arena + kept) * np.dtype(self.number.numpy).itemsize or 1

    @cached_property
    def sizes(self) -> Sizes:
        """What the compiler of this machine says with -Os."""
        return self._sizes or measure_sizes([self.source])

    @property
    def flash_bytes(self) -> int:
        """Bytes of code and constants, by the compiler of this machine."""
        return self.sizes.flash

    @property
    def cycles_estimate(self) -> int:
        """An estimate for a Cortex-M4F, from the counts alone: it is not measured."""
        called = sum(layer.size for layer in self.network.layers if layer.activation and "relu" not in layer.activation[0])
        gates = sum(5 * layer.size for layer in self.network.recurrent)
        return CYCLES_PER_MAC * self.macs + CYCLES_PER_ACTIVATION * (called + gates)

    def report(self) -> dict[str, Any]:
        """Flash, RAM, stack, multiply-accumulates and an estimate of cycles; those of a Cortex-M4F where its compiler is installed."""
        arm = arm_sizes([self.source])
        return {
            "flash_bytes": self.flash_bytes,
            "ram_bytes": self.ram_bytes,
            "stack_bytes": self.sizes.stack,
            "macs": self.macs,
            "cycles_estimate": self.cycles_estimate,
            "cortex_m4_flash_bytes": arm.flash if arm else "arm-none-eabi-gcc is not installed",
        }

    def build(self) -> Path:
        """A shared library for this machine; NoCompiler says what to install."""
        host_compiler()
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="fewer-c-")
        target = Path(self._folder.name) / f"lib{self.name}.so"
        if not target.exists():
            build_library([self.source], target)
        return target

    def _bind(self) -> Any:
        library = ctypes.CDLL(str(self.build()))
        predict, reset = library[f"{self.name}_predict"], library[f"{self.name}_reset"]
        x = np.zeros(self.network.inputs, self.number.numpy)
        y = np.zeros(self.network.producer(self.network.output).shape, self.number.numpy)
        state = ctypes.create_string_buffer(self.ram_bytes + 16)
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in (x, y)] + [ctypes.cast(state, ctypes.c_void_p)]
        predict.restype = reset.restype = None
        reset(pointers[2])
        self._call = (x, y, state, predict, pointers, reset)
        return self._call

    def predict(self, x: Any) -> np.ndarray:
        """What the C says of one input; a recurrent network goes on from where it stands (see `reset`).

        Args:
            x: as many numbers as the network has inputs, in any shape.

        Returns:
            array in the shape of the network's output, without the batch axis.
        """
        into, out, _, predict, pointers, _ = self._call or self._bind()
        values = np.asarray(x)
        if values.size != into.size:
            raise ValueError(f"x has {values.size} numbers; expected {into.size}: one input of shape {self.network.input_shape}")
        into[:] = values.reshape(-1)
        predict(*pointers)
        return out.copy()

    def reset(self) -> None:
        """Begin a new sequence."""
        call = self._call or self._bind()
        call[5](call[4][2])
