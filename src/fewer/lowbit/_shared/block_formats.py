"""Block formats: how a tensor is cut into blocks, what stands for each, and how a block's scale is chosen.

x is about s_block (s_tensor) q. A power-of-two scale (e8m0) is chosen by a rule from the block's largest magnitude; a floating one is that
magnitude over the element's largest value, over a float32 scale of the whole tensor where the format has one, rounded to the scale's format.

Sources: OCP MX specification v1.0 (2023); NVIDIA's NVFP4 rule as torchao 0.18 applies it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewer.checks import check_choice, is_number, is_whole
from fewer.lowbit._shared import kernels
from fewer.lowbit._shared.formats import ELEMENTS, ElementFormat, cast

ScaleRule = Literal["floor", "rceil", "ceil", "even", "round"]
SCALE_RULES = ("floor", "rceil", "ceil", "even", "round")
SCALES = {"e8m0": 8, "e4m3": 8, "ue5m3": 8, "ue5m3fn": 8, "ue4m3": 8, "e5m2": 8, "bf16": 16, "fp32": 32}  # bits of one
FLOAT_SCALES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class BlockFormat:
    """How a tensor is cut into blocks, and what stands for each.

    Attributes:
        element: the format of a value, a name of `ELEMENTS`.
        block: values a block; -1 a row (the whole dimension), None the whole tensor.
        scale: "e8m0", "e4m3", "ue5m3", "ue5m3fn", "ue4m3", "e5m2", "bf16" or "fp32".
        tensor_scale: whether a float32 scale of the whole tensor stands above the blocks' scales.
        scale_rule: of e8m0, from the block's largest magnitude a and the element's largest value max, emax = floor(log2 max):
            "floor" (OCP) floor(log2 a) - emax; "rceil" ceil(log2(a / max)), which never saturates; "ceil" ceil(log2 a) - emax;
            "even": "floor" after a was rounded to the element's mantissa bits; "round" round(log2(a / max)).
        scale_floor: the least scale of a block, by default the scale format's smallest positive value; "one": a scale that rounds to 0 is 1.
        scale_target: what the largest block scale becomes under a tensor scale; by default the scale format's largest value.

    Examples:
        >>> BlockFormat("e2m1", 16, "ue5m3").bits_per_value
        4.5
    """

    element: str
    block: int | None = 32
    scale: str = "e8m0"
    tensor_scale: bool = False
    scale_rule: ScaleRule = "floor"
    scale_floor: float | Literal["one"] | None = None
    scale_target: float | None = None

    def __post_init__(self) -> None:
        check_choice(list(ELEMENTS), element=self.element)
        if self.block is not None and (not is_whole(self.block) or (self.block < 1 and self.block != -1)):
            raise ValueError(f"block is {self.block!r}; expected a whole number of at least 1, -1 (a row) or None (the tensor)")
        check_choice(list(SCALES), scale=self.scale)
        check_choice(SCALE_RULES, scale_rule=self.scale_rule)
        if self.tensor_scale and (self.scale == "e8m0" or self.scale in FLOAT_SCALES):
            raise ValueError(
                f"tensor_scale is given and scale is {self.scale!r}; expected a scale of few values, such as 'e4m3': leave it out"
            )
        if self.scale_floor not in (None, "one") and (not is_number(self.scale_floor) or self.scale_floor <= 0):  # pyright: ignore[reportOperatorIssue]
            raise ValueError(f"scale_floor is {self.scale_floor!r}; expected a finite number above 0, 'one' or None")
        if self.scale_target is not None and (not is_number(self.scale_target) or self.scale_target <= 0):
            raise ValueError(f"scale_target is {self.scale_target!r}; expected a finite number above 0 or None")

    @property
    def elements(self) -> ElementFormat:
        return ELEMENTS[self.element]

    @property
    def bits_per_value(self) -> float:
        """Of a large tensor: an element's, and its share of the block's scale. A row's or tensor's scale is not counted."""
        return self.elements.bits + (SCALES[self.scale] / self.block if self.block and self.block > 0 else 0)

    def scales_of(self, amax: Tensor, tensor_amax: Tensor | float | None = None) -> tuple[Tensor, Tensor | None]:
        """The blocks' scales as the format stores them, and the tensor's.

        Args:
            amax: the largest magnitude of each block, float32 or float64; what has a NaN or inf gets a NaN.
            tensor_amax: the largest magnitude of the whole tensor, where amax is that of a shard.
        """
        grid = ELEMENTS.get(self.scale)
        if grid is not None and not grid.is_power_of_two:
            return self._grid_scales(amax, grid, tensor_amax)
        amax = torch.where(amax.isfinite(), amax, math.nan)
        if grid is not None:
            return self._powers(amax), None
        least = 2.0**-149 if self.scale == "fp32" else 2.0**-133
        return self._floored((amax / self.elements.max).to(FLOAT_SCALES[self.scale]), least), None

    def _grid_scales(self, amax: Tensor, grid: ElementFormat, tensor_amax: Tensor | float | None) -> tuple[Tensor, Tensor | None]:
        """Scales of few values, under the tensor's where there is one."""
        whole = None
        if self.tensor_scale:
            largest = amax.nan_to_num(0.0, 0.0, 0.0).amax() if tensor_amax is None else torch.as_tensor(tensor_amax, device=amax.device)
            whole = (largest / ((self.scale_target or grid.max) * self.elements.max)).clamp(max=torch.finfo(torch.float32).max).float()
        if found := kernels.on_cpu(amax):
            floor = self.scale_floor if isinstance(self.scale_floor, float | int) else grid.min_subnormal
            return found.grid_scales(amax, self.elements.max, whole, grid, floor, self.scale_floor == "one"), whole
        ratio = torch.where(amax.isfinite(), amax, math.nan) / self.elements.max
        if whole is not None:
            ratio = ratio / torch.where(whole > 0, whole, 1.0)
        return self._floored(cast(ratio, grid), grid.min_subnormal), whole

    def _floored(self, scales: Tensor, least: float) -> Tensor:
        if self.scale_floor == "one":
            return torch.where(scales == 0, torch.ones_like(scales), scales)
        return scales.clamp(min=least if self.scale_floor is None else self.scale_floor)

    def _powers(self, amax: Tensor) -> Tensor:
        """2^e by the scale rule. Exponents come from frexp: log2 in float32 is whole for numbers slightly above a power of two."""
        element = self.elements
        mantissa, exponent = torch.frexp(amax)  # amax = mantissa 2^exponent, mantissa in [1/2, 1)
        top, top_exponent = math.frexp(element.max)
        match self.scale_rule:
            case "floor":
                power = exponent - 1 - element.max_exponent
            case "rceil":
                power = exponent - top_exponent + (mantissa > top)
            case "ceil":
                power = exponent - 1 + (mantissa > 0.5) - element.max_exponent
            case "even":
                power = exponent - 1 + (mantissa >= 1 - 2.0 ** -(element.ulp_bits + 2)) - element.max_exponent
            case _:
                ratio = mantissa.double() / top
                power = exponent - top_exponent + (ratio > math.sqrt(2)).int() - (ratio < math.sqrt(0.5)).int()
        power = torch.where(amax > 0, power, -127).clamp(-127, 127)
        return torch.where(amax.isnan(), math.nan, torch.ldexp(torch.ones_like(amax), power))


FORMATS: dict[str, BlockFormat] = {
    "mxfp8_e4m3": BlockFormat("e4m3"),
    "mxfp8_e5m2": BlockFormat("e5m2"),
    "mxfp6_e2m3": BlockFormat("e2m3"),
    "mxfp6_e3m2": BlockFormat("e3m2"),
    "mxfp4": BlockFormat("e2m1"),
    "mxint8": BlockFormat("int8"),
    "mxint6": BlockFormat("int6"),
    "mxint4": BlockFormat("int4"),
    "nvfp4": BlockFormat("e2m1", 16, "e4m3", tensor_scale=True),
    "nvint4": BlockFormat("int4", 16, "e4m3", tensor_scale=True),
    "fp8_tensor": BlockFormat("e4m3", None, "fp32"),
    "fp8_row": BlockFormat("e4m3", -1, "fp32"),
    "int8_tensor": BlockFormat("int8", None, "fp32"),
    "int8_row": BlockFormat("int8", -1, "fp32"),
    "int4_row": BlockFormat("int4", -1, "fp32"),
}


def block_format(fmt: str | BlockFormat) -> BlockFormat:
    """The format of that name; ValueError naming the choices."""
    if isinstance(fmt, BlockFormat):
        return fmt
    check_choice(list(FORMATS), fmt=fmt)
    return FORMATS[fmt]
