"""Casts to block formats: a tensor as codes of few bits with a scale a block, packed, or as the values that these stand for."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fewer.checks import is_whole
from fewer.lowbit._shared import kernels
from fewer.lowbit._shared.block_formats import FLOAT_SCALES, FORMATS, SCALE_RULES, BlockFormat, block_format
from fewer.lowbit._shared.formats import (
    ELEMENTS,
    ElementFormat,
    Rounding,
    Rule,
    check_floating,
    codes_of,
    compute_dtype,
    element_format,
    encode,
    piece_size,
    round_,
    saturated_,
)
from fewer.lowbit._shared.packing import pack, unpack

__all__ = [
    "FORMATS", "SCALE_RULES", "BlockFormat", "QuantizedTensor", "block_format", "checked_cast", "checked_dim", "cut",
    "element_values", "fake_quantize", "largest_magnitude", "pack", "packed_elements", "prepare", "quantize", "unpack",
]  # fmt: skip

# Cutting into blocks: a view [blocks, block, inner] of a contiguous tensor, the scale being one for the middle dimension


def checked_dim(x: Tensor, dim: int) -> int:
    """The dimension counted from 0; ValueError where x has none such."""
    if x.ndim == 0 or not is_whole(dim) or not -x.ndim <= dim < x.ndim:
        raise ValueError(f"dim is {dim!r} and x has {x.ndim} dimensions; expected one from {-x.ndim} to {x.ndim - 1}: name another")
    return dim % x.ndim


def cut(x: Tensor, block: int | None, dim: int) -> Tensor:
    """x as [blocks, values of a block, inner]; a view where x is contiguous and the blocks are whole, else a copy filled up with zeros."""
    if block is None:
        return x.reshape(1, -1, 1)
    width = x.shape[dim]
    size = width if block == -1 else block
    if width % size:
        x = torch.nn.functional.pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, size - width % size))
    inner = math.prod(x.shape[dim + 1 :])
    return x.reshape(-1, size, inner)


def uncut(blocks: Tensor, shape: torch.Size, dim: int) -> Tensor:
    """The tensor of that shape whose blocks these are."""
    whole = blocks.reshape(*shape[:dim], -1, *shape[dim + 1 :])
    return whole.narrow(dim, 0, shape[dim])


def pieces(blocks: Tensor) -> Iterator[tuple[slice, slice]]:
    """Parts of [blocks, block, inner] of about as many values as a CPU's cache holds: slices of the first two dimensions."""
    count, size, inner = blocks.shape
    at_once = piece_size(blocks)
    rows = max(1, at_once // max(1, size * inner))
    columns = size if rows > 1 or size * inner <= at_once else max(1, at_once // max(1, inner))
    for row in range(0, count, rows):
        for column in range(0, size, columns):
            yield slice(row, row + rows), slice(column, column + columns)


def block_amax(blocks: Tensor) -> Tensor:
    """[blocks, 1, inner]: the largest magnitude of each block, in the dtype that casts are computed in; NaN where one is.

    Magnitudes are compared by their bits, which for whole numbers is quicker, and puts inf and NaN last.
    """
    if found := kernels.on_cpu(blocks):
        return found.block_amax(blocks)
    dtype = compute_dtype(blocks)
    whole, no_sign = (torch.int64, 2**63 - 1) if dtype == torch.float64 else (torch.int32, 2**31 - 1)
    amax = torch.zeros(blocks.shape[0], 1, blocks.shape[2], dtype=whole, device=blocks.device)
    for rows, columns in pieces(blocks):
        top = blocks[rows, columns].to(dtype).view(whole).bitwise_and(no_sign).amax(1, keepdim=True)
        torch.maximum(amax[rows], top, out=amax[rows])
    return amax.view(dtype)


@torch.no_grad()
def largest_magnitude(x: Tensor) -> Tensor:
    """max |x|, NaN where one is and 0 of nothing: float32, or float64; several times as quick as a norm."""
    return block_amax(x.detach().contiguous().view(1, -1, 1)).amax() if x.numel() else x.new_zeros((), dtype=compute_dtype(x))


def _steps(scales: Tensor, whole: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What an element of 1 is worth in each block."""
    step = scales.to(dtype)
    return step if whole is None else step * whole


@dataclass(frozen=True)
class BlockCast:
    """A cast of blocks, its scales chosen: what `quantize` and `fake_quantize` share."""

    fmt: BlockFormat
    rule: Rule
    blocks: Tensor
    scales: Tensor
    whole: Tensor | None

    def steps(self) -> Tensor:
        """[blocks, 1, inner]: what an element of 1 is worth in each block."""
        return _steps(self.scales, self.whole, compute_dtype(self.blocks))

    def into(self, out: Tensor, elements_only: bool = False) -> Tensor:
        """out <- the values, or the elements alone on their grid; what is drawn is the same."""
        element, step = self.fmt.elements, self.steps()
        known = self.rule.rounding in ("nearest", "stochastic") and not element.is_power_of_two
        if known and (found := kernels.on_cpu(self.blocks) or kernels.on_gpu(self.blocks)):
            found.cast_blocks(self.blocks, step, element, self.rule, out, elements_only)
            return out
        divisor = torch.where(step == 0, 1.0, step)
        step = torch.ones_like(step) if elements_only else step
        for rows, columns in pieces(self.blocks):
            v = self.blocks[rows, columns].to(step.dtype) / divisor[rows]
            torch.mul(saturated_(round_(v, element, self.rule), element), step[rows], out=v)
            out[rows, columns].copy_(v)
        return out


def prepare(x: Tensor, fmt: BlockFormat, dim: int, rule: Rule, tensor_amax: Tensor | float | None) -> BlockCast:
    blocks = cut(x, fmt.block, dim)
    scales, whole = fmt.scales_of(block_amax(blocks), tensor_amax)
    return BlockCast(fmt, rule, blocks, scales, whole)


def checked_cast(x: Tensor, fmt: str | BlockFormat, dim: int, rule: Rule, tensor_amax: Tensor | float | None) -> tuple[BlockFormat, int]:
    check_floating(x)
    fmt = block_format(fmt)
    rule.checked(x)
    if tensor_amax is not None and not (math.isfinite(float(tensor_amax)) and float(tensor_amax) >= 0):
        raise ValueError(
            f"tensor_amax is {float(tensor_amax)}; expected a finite number of at least 0: the largest magnitude of the tensor"
        )
    return fmt, checked_dim(x, dim)


@torch.no_grad()
def fake_quantize(
    x: Tensor,
    fmt: str | BlockFormat,
    dim: int = -1,
    rounding: Rounding = "nearest",
    generator: torch.Generator | None = None,
    tensor_amax: Tensor | float | None = None,
    out: Tensor | None = None,
    random_bits: int | None = None,
) -> Tensor:
    """x as a block format would hold it, without making codes: the values of `quantize(x, ...).dequantize()`.

    It is computed piece by piece and takes little memory beside its result. No gradient flows through it.

    Args:
        x: any shape; float32, bfloat16, float16 (computed in float32) or float64.
        fmt: a name of `FORMATS`, or a format.
        dim: the dimension along which blocks lie.
        rounding, generator, random_bits: of the elements, as `cast` takes them. Scales are rounded by the format's own rule.
        tensor_amax: the largest magnitude of the whole tensor, where x is a shard of it and the format has a tensor scale.
        out: where to write, contiguous and of x's shape and dtype; may be x itself.

    Returns:
        `out`, or a new tensor of x's shape and dtype. A block with a NaN or an infinite value is NaN.

    Raises:
        ValueError: an unknown format or rounding, an integer or complex x, a dimension that x has not, stochastic rounding without a
            generator, a tensor_amax that is no finite number, or an `out` that cannot be written to.
        TypeError: a generator on another device.

    Source: OCP MX specification v1.0, section 6.3; NVIDIA's NVFP4 rule.

    Examples:
        >>> fake_quantize(torch.tensor([[0.1, 0.9, -3.2, 7.0]]), "mxfp4")
        tensor([[ 0.,  1., -3.,  6.]])
    """
    rule = Rule(rounding, generator, random_bits)
    fmt, dim = checked_cast(x, fmt, dim, rule, tensor_amax)
    if out is not None and (out.shape != x.shape or out.dtype != x.dtype or not out.is_contiguous()):
        raise ValueError(
            f"out is {tuple(out.shape)} {out.dtype}; expected a contiguous tensor {tuple(x.shape)} {x.dtype}: make it with torch.empty_like(x)"
        )
    if out is None and fmt.block is not None and x.ndim == 2 and not x.is_contiguous() and x.mT.is_contiguous():
        return fake_quantize(x.mT, fmt, 1 - dim, rounding, generator, tensor_amax, random_bits=random_bits).mT
    if x.numel() == 0:
        return torch.empty_like(x) if out is None else out
    made = prepare(x.contiguous(), fmt, dim, rule, tensor_amax)
    padded = fmt.block is not None and fmt.block > 0 and x.shape[dim] % fmt.block
    target = cut(out, fmt.block, dim) if out is not None and not padded else torch.empty_like(made.blocks)
    made.into(target)
    if out is None:
        return uncut(target, x.shape, dim).contiguous() if padded else target.view(x.shape)
    return out.copy_(uncut(target, x.shape, dim)) if padded else out


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A tensor in a block format.

    Attributes:
        codes: the elements' codes as a stream of bits (uint8), `dim` moved last, nothing filled up.
        scales: [..., blocks], `dim` moved last: codes of the scale's format (uint8), or bfloat16 or float32.
        tensor_scale: float32, where the format has one.
        fmt: the format.
        shape: of the tensor.
        dim: the dimension along which blocks lie, from 0.
    """

    codes: Tensor
    scales: Tensor
    tensor_scale: Tensor | None
    fmt: BlockFormat
    shape: torch.Size
    dim: int

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(part.numel() * part.element_size() for part in (self.codes, self.scales, self.tensor_scale) if part is not None)

    @property
    def T(self) -> QuantizedTensor:
        """A matrix transposed; the same codes."""
        if len(self.shape) != 2:
            raise ValueError(f"the tensor has shape {tuple(self.shape)}; expected a matrix: transpose its values instead")
        return replace(self, shape=torch.Size(self.shape[::-1]), dim=1 - self.dim)

    def elements(self) -> Tensor:
        """[..., dim last]: the codes, one a byte."""
        return unpack(self.codes, self.fmt.elements.bits, self.shape.numel()).view(self._last)

    def steps(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[..., blocks]: what an element of 1 is worth in each block."""
        scale = self.scales if self.fmt.scale in FLOAT_SCALES else element_values(self.fmt.scale, self.scales, dtype)
        return _steps(scale, self.tensor_scale, dtype)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values, computed in float32 (float64 for float64)."""
        inner = torch.float64 if dtype == torch.float64 else torch.float32
        if self.fmt.elements.bits == 4 and inner == torch.float32 and (found := kernels.on_cpu(self.codes)):
            values = found.values_of_nibbles(self.codes, self.fmt.elements.values, self.shape.numel()).view(self._last)
        else:
            values = element_values(self.fmt.element, self.elements(), inner)
        if values.numel() == 0:
            return values.movedim(-1, self.dim).to(dtype)
        blocks = cut(values, self.fmt.block, values.ndim - 1)
        blocks = blocks.mul(self.steps(inner).reshape(-1, 1, 1))
        return uncut(blocks, values.shape, values.ndim - 1).movedim(-1, self.dim).contiguous().to(dtype)

    @property
    def _last(self) -> torch.Size:
        """The shape with `dim` moved last."""
        return torch.Size([*self.shape[: self.dim], *self.shape[self.dim + 1 :], self.shape[self.dim]])

    def to_ocp(self) -> tuple[Tensor, Tensor]:
        """Codes and scales in OCP's convention, where an element of MXINT8 is q / 64: its scales' codes are 6 higher than ours.

        Raises:
            ValueError: the format's scales are no e8m0, or one is too large for that.
        """
        if self.fmt.scale != "e8m0":
            raise ValueError(
                f"the scales are {self.fmt.scale}; expected e8m0, as OCP's formats have: quantise to mxint8 or another MX format"
            )
        if self.fmt.element != "int8":
            return self.codes, self.scales
        number = self.scales != ELEMENTS["e8m0"].nan
        if bool((number & (self.scales > 248)).any()):
            raise ValueError("a scale is above 2^121, which OCP's MXINT8 has no code for; expected smaller values: divide the tensor")
        return self.codes, torch.where(number, self.scales + 6, self.scales)

    def to_dict(self) -> dict[str, Tensor]:
        """Plain tensors that safetensors writes; `from_dict` undoes it."""
        about = {"format": asdict(self.fmt), "shape": list(self.shape), "dim": self.dim}
        words = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)
        kept = {"codes": self.codes, "scales": self.scales.contiguous(), "about": words}
        return kept if self.tensor_scale is None else kept | {"tensor_scale": self.tensor_scale}

    @classmethod
    def from_dict(cls, kept: Mapping[str, Tensor]) -> QuantizedTensor:
        """What `to_dict` gave; ValueError where it is not that."""
        try:
            about: dict[str, Any] = json.loads(bytes(kept["about"].tolist()))
            fmt, shape, dim = BlockFormat(**about["format"]), torch.Size(about["shape"]), int(about["dim"])
            whole = cls(kept["codes"], kept["scales"], kept.get("tensor_scale"), fmt, shape, dim)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"these are no packed tensors ({' '.join(str(error).split())}); expected what QuantizedTensor.to_dict gives"
            ) from error
        whole._check()
        return whole

    def _check(self) -> None:
        bits, stored = self.fmt.elements.bits, FLOAT_SCALES.get(self.fmt.scale, torch.uint8)
        if not 0 <= self.dim < len(self.shape) or (self.tensor_scale is not None) != self.fmt.tensor_scale:
            raise ValueError(
                f"dim is {self.dim} of {len(self.shape)}, or the tensor scale is missing; expected what `to_dict` gives: pack it again"
            )
        whole = self.tensor_scale
        if whole is not None and (whole.dtype != torch.float32 or whole.shape != ()):
            raise ValueError(f"tensor_scale is {whole.dtype} {tuple(whole.shape)}; expected one float32 number: pack it again")
        expected = (-(-self.shape.numel() * bits // 8),)
        if self.codes.dtype != torch.uint8 or self.codes.shape != expected:
            raise ValueError(f"codes are {self.codes.dtype} {tuple(self.codes.shape)}; expected uint8 {expected}: pack it again")
        shape = _scale_shape(self.fmt, self._last)
        if self.scales.dtype != stored or self.scales.shape != shape:
            raise ValueError(f"scales are {self.scales.dtype} {tuple(self.scales.shape)}; expected {stored} {tuple(shape)}: pack it again")


def element_values(element: str, codes: Tensor, dtype: torch.dtype) -> Tensor:
    return ELEMENTS[element].values.to(codes.device, dtype)[codes.int()]


def packed_elements(grid: Tensor, element: ElementFormat) -> Tensor:
    """The codes of values on a format's grid, contiguous float32 or float64, as a stream of bits; NaN becomes 0."""
    if (found := kernels.on_cpu(grid)) and not element.is_power_of_two:
        return found.nibbles_of(grid, element) if element.bits == 4 else pack(found.codes_of(grid, element), element.bits)
    codes = torch.empty(grid.numel(), dtype=torch.uint8, device=grid.device)
    for made, part in zip(codes.split(piece_size(grid)), grid.view(-1).split(piece_size(grid)), strict=True):
        made.copy_(codes_of(part.nan_to_num(0.0), element))
    return pack(codes, element.bits)


def _scale_shape(fmt: BlockFormat, last: torch.Size) -> torch.Size:
    """Of the scales of a tensor whose blocks lie along its last dimension."""
    if fmt.block is None:
        return torch.Size([1])
    return torch.Size([*last[:-1], -(-last[-1] // fmt.block) if fmt.block > 0 else min(1, last[-1])])


@torch.no_grad()
def quantize(
    x: Tensor,
    fmt: str | BlockFormat,
    dim: int = -1,
    rounding: Rounding = "nearest",
    generator: torch.Generator | None = None,
    tensor_amax: Tensor | float | None = None,
    random_bits: int | None = None,
) -> QuantizedTensor:
    """x in a block format, packed. Arguments and errors are those of `fake_quantize`.

    Raises:
        ValueError: also where a block has a NaN or an infinite value and its scale's format no NaN.

    Examples:
        >>> packed = quantize(torch.tensor([[0.1, 0.9, -3.2, 7.0]]), "mxfp4")
        >>> packed.nbytes, packed.dequantize()
        (3, tensor([[ 0.,  1., -3.,  6.]]))
    """
    rule = Rule(rounding, generator, random_bits)
    fmt, dim = checked_cast(x, fmt, dim, rule, tensor_amax)
    last = x.movedim(dim, -1).contiguous()
    scale_shape = _scale_shape(fmt, last.shape)
    if x.numel() == 0:
        nothing = torch.empty(0, dtype=torch.uint8, device=x.device)
        scales = torch.zeros(scale_shape, dtype=FLOAT_SCALES.get(fmt.scale, torch.uint8), device=x.device)
        return QuantizedTensor(nothing, scales, x.new_zeros((), dtype=torch.float32) if fmt.tensor_scale else None, fmt, x.shape, dim)
    made = prepare(last, fmt, last.ndim - 1, rule, tensor_amax)
    grid = made.into(torch.empty_like(made.blocks, dtype=compute_dtype(x)), elements_only=True)
    stored = made.scales if fmt.scale in FLOAT_SCALES else encode(made.scales, element_format(fmt.scale))
    packed = packed_elements(uncut(grid, last.shape, last.ndim - 1).contiguous(), fmt.elements)
    return QuantizedTensor(packed, stored.reshape(scale_shape), made.whole, fmt, x.shape, dim)
