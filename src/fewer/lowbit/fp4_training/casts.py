"""The casts of a layer's operands: rotations, tensors' maxima, random numbers of their own, and what is kept in few bits."""

from __future__ import annotations

import functools
import hashlib
import math
import warnings
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fewer.checks import check_share
from fewer.lowbit._shared import kernels
from fewer.lowbit._shared.block_formats import BlockFormat
from fewer.lowbit._shared.blocks import BlockCast, block_amax, cut, element_values, packed_elements, uncut, unpack
from fewer.lowbit._shared.formats import ELEMENTS, Rule, check_floating
from fewer.lowbit._shared.rotation import hadamard
from fewer.lowbit.fp4_training.recipe import FP4Recipe, Operand

Product = Literal["forward", "dgrad", "wgrad"]


def tiled(w: Tensor, k: int) -> Tensor:
    """[N, K] as its k x k tiles in rows, [ceil(N/k), ceil(K/k), k k], filled up with zeros."""
    n, m = w.shape
    full = torch.nn.functional.pad(w, (0, -m % k, 0, -n % k))
    return full.view(full.shape[0] // k, k, full.shape[1] // k, k).transpose(1, 2).reshape(full.shape[0] // k, full.shape[1] // k, k * k)


def untiled(tiles: Tensor, shape: tuple[int, int]) -> Tensor:
    """Undoes `tiled`."""
    rows, columns, square = tiles.shape
    k = math.isqrt(square)
    return tiles.view(rows, columns, k, k).transpose(1, 2).reshape(rows * k, columns * k)[: shape[0], : shape[1]]


def signs_of(recipe: FP4Recipe, layer: int) -> Tensor:
    """The random signs of a layer's rotations, float32 [hadamard_size], drawn once from the recipe's seed."""
    draw = torch.Generator().manual_seed(_seed(recipe.seed, layer, "signs"))
    return torch.randint(0, 2, (recipe.hadamard_size or recipe.block,), generator=draw) * 2.0 - 1.0


def _seed(*words: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(words).encode(), digest_size=8).digest()) >> 1


@functools.cache
def _tell_once(words: str) -> None:
    warnings.warn(words, stacklevel=4)


@dataclass
class Casts:
    """The casts of one layer at one step.

    Attributes:
        recipe, layer, step: what their random numbers come from.
        signs: of the rotations, [hadamard_size].
        name: of the layer, for errors.
        held: the maxima in use, measured every `recipe.hold` steps; shared by the layer's steps.
    """

    recipe: FP4Recipe
    step: int = 1
    layer: int = 0
    signs: Tensor | None = None
    name: str = "the product"
    held: dict[str, Tensor] = field(default_factory=dict)

    def rotated(self, x: Tensor, product: Product, dim: int, inverse: bool = False) -> Tensor:
        """x turned along a product's contraction, as both operands of it are."""
        if not self.recipe.rotates(product):
            return x
        n = self.recipe.rotation_size(x.shape[dim])
        wanted = self.recipe.hadamard_size or self.recipe.block
        if n < wanted:
            _tell_once(f"{self.name}: a rotation of {wanted} does not divide {x.shape[dim]}; one of {n} is used")
        if n == 1:
            return x
        signs = signs_of(self.recipe, self.layer) if self.signs is None else self.signs
        return hadamard(x, n, dim, signs[:n].to(x.device), inverse)

    def maximum(self, largest: Tensor, operand: Operand, product: Product) -> Tensor:
        """max |x| of an operand, the held one where the recipe holds it; FloatingPointError where x is not finite."""
        self.check_finite(largest, operand, product)
        if self.recipe.sync_amax and torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
        key = f"{operand} {product}"
        if (self.step - 1) % self.recipe.hold == 0 or key not in self.held:
            self.held[key] = largest
        return self.held[key]

    def check_finite(self, x: Tensor, operand: Operand, product: Product) -> None:
        """FloatingPointError naming layer and operand where x, or its largest magnitude, is not finite."""
        if not (math.isfinite(x.item()) if x.ndim == 0 else bool(x.isfinite().all())):
            raise FloatingPointError(
                f"{self.name}: the operand {operand} of the {product} product has a NaN or an infinite value at step {self.step}; "
                "expected finite numbers: lower the learning rate, or clip"
            )

    def rule(self, operand: Operand, product: Product, device: torch.device) -> Rule:
        """How an operand is rounded, with random numbers of its own."""
        if operand not in self.recipe.stochastic:
            return Rule()
        draw = torch.Generator(device).manual_seed(_seed(self.recipe.seed, self.layer, self.step, operand, product))
        return Rule("stochastic", draw, self.recipe.sr_bits)

    def prepared(self, x: Tensor, fmt: BlockFormat, dim: int, operand: Operand, product: Product) -> BlockCast:
        """A cast with its scales chosen."""
        blocks = cut(x.contiguous(), fmt.block, dim)
        amax = block_amax(blocks)
        scales, whole = fmt.scales_of(amax, self.maximum(amax.amax(), operand, product))
        return BlockCast(fmt, self.rule(operand, product, x.device), blocks, scales, whole)

    def cast(self, x: Tensor, operand: Operand, product: Product, dim: int) -> Tensor:
        """An operand [., .], rotated already, in the values of its format, blocks along the contraction."""
        if not self.recipe.casts or x.numel() == 0:
            return x
        if self.recipe.weight_blocks == "2d" and operand in ("w", "w_dgrad"):
            tiles = tiled(x, self.recipe.block)
            made = self.prepared(tiles, self.recipe.tile_format, 2, operand, product)
            return untiled(made.into(torch.empty_like(made.blocks)).view(tiles.shape), (x.shape[0], x.shape[1]))
        made = self.prepared(x, self.recipe.format, dim, operand, product)
        return uncut(made.into(torch.empty_like(made.blocks)), x.shape, dim)

    def kept(self, x: Tensor, operand: Operand, product: Product) -> Kept:
        """The operand [M, K] cast along M, for the backward pass."""
        if not self.recipe.pack_saved or x.numel() == 0:
            return Kept(self.cast(x, operand, product, 0))
        made = self.prepared(x, self.recipe.format, 0, operand, product)
        grid = made.into(torch.empty_like(made.blocks), elements_only=True)
        codes = packed_elements(uncut(grid, x.shape, 0).contiguous(), ELEMENTS[self.recipe.element])
        scales = (
            packed_elements(made.scales, ELEMENTS[self.recipe.scale]).view(made.scales.shape)
            if self.recipe.scale in ELEMENTS
            else made.scales
        )
        return Kept(codes, scales, made.whole)


class Kept(NamedTuple):
    """An operand [M, K] for the backward pass: its values; or its packed codes, row by row, with its blocks' scales [blocks, 1, K]."""

    codes: Tensor
    scales: Tensor | None = None
    whole: Tensor | None = None

    def values(self, recipe: FP4Recipe, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        if self.scales is None:
            return self.codes
        count, element = shape[0] * shape[1], ELEMENTS[recipe.element]
        if element.bits == 4 and dtype == torch.float32 and (found := kernels.on_cpu(self.codes)):
            values = found.values_of_nibbles(self.codes, element.values, count)
        else:
            values = element_values(recipe.element, unpack(self.codes, element.bits, count), dtype)
        steps = element_values(recipe.scale, self.scales, dtype) if recipe.scale in ELEMENTS else self.scales.to(dtype)
        steps = steps if self.whole is None else steps * self.whole
        blocks = cut(values.view(shape), recipe.block, 0)
        return uncut(blocks.mul_(steps), torch.Size(shape), 0)


def split_outliers(x: Tensor, q: float) -> tuple[Tensor, Tensor]:
    """x clamped at the q-quantile of its magnitudes, and what was cut off as a sparse tensor; the two add up to x.

    Args:
        x: any shape; float32 or float64.
        q: between 0 and 1.

    Raises:
        ValueError: a q that is no such share, or numbers that are not floating point.

    Source: Wang et al. 2025, Optimizing large language model training using FP4 quantization.

    Examples:
        >>> clamped, rest = split_outliers(torch.tensor([[1.0, -2.0, 3.0, 9.0]]), 0.75)
        >>> clamped.tolist(), rest.to_dense().tolist()
        ([[1.0, -2.0, 3.0, 3.0]], [[0.0, 0.0, 0.0, 6.0]])
    """
    check_floating(x)
    check_share(ends=False, q=q)
    if x.numel() == 0:
        return x, torch.zeros_like(x).to_sparse()
    limit = x.abs().flatten().kthvalue(max(1, math.ceil(q * x.numel()))).values
    clamped = x.clamp(-limit, limit)
    return clamped, (x - clamped).to_sparse()
