"""The gradient of a block cast x^ = s q(x / s): derivatives put in the place of a staircase's, and what reaches the scale through the maximum."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fewer.lowbit._shared.blocks import cut, fake_quantize, quantize, uncut
from fewer.lowbit._shared.formats import ELEMENTS, check_floating, compute_dtype
from fewer.lowbit.fp4_training.recipe import FP4Recipe

DGE_POWER, DGE_MOST = 5.0, 3.0
RAMP_WIDTH = 0.5
SOFTMAX_SHARPNESS = 8.0


def ste(t: Tensor) -> Tensor:
    """Straight through: 1."""
    return torch.ones_like(t)


def dge(t: Tensor) -> Tensor:
    """min((1/5) |2t - 1|^(1/5 - 1), 3), the differentiable gradient estimator of Wang et al. (2025)."""
    return ((2 * t - 1).abs().pow(1 / DGE_POWER - 1) / DGE_POWER).clamp(max=DGE_MOST)


def spline(t: Tensor) -> Tensor:
    """6 t (1 - t): the cast as a smoothstep between two codes."""
    return 6 * t * (1 - t)


def ramp(t: Tensor) -> Tensor:
    """1/w within w/2 of the middle, else 0: flat at the codes, a line between them."""
    return ((t - 0.5).abs() <= RAMP_WIDTH / 2).to(t.dtype) / RAMP_WIDTH


ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {"ste": ste, "dge": dge, "spline": spline, "ramp": ramp}


def cast_derivative(u: Tensor, element: str, estimator: str) -> Tensor:
    """Q'(u): the estimator at t = (|u| - lo) / (hi - lo) of u's interval of the element's grid; beyond the grid 0, but for "ste" 1.

    Args:
        u: values in units of their scale, float32 or float64.
        element: a name of `ELEMENTS`.
        estimator: "ste", "dge", "spline" or "ramp".
    """
    if estimator == "ste":
        return ste(u)
    grid = ELEMENTS[element].values
    grid = grid[(grid >= 0) & grid.isfinite()].unique().to(u)  # 0 .. max, each once
    size = u.abs()
    upper = torch.searchsorted(grid, size, right=True).clamp_(1, len(grid) - 1)
    low, high = grid[upper - 1], grid[upper]
    return torch.where(size <= grid[-1], ESTIMATORS[estimator]((size - low) / (high - low)), 0.0)


def through_cast(g: Tensor, x: Tensor, recipe: FP4Recipe, dim: int = -1, tensor_amax: Tensor | None = None) -> Tensor:
    """The gradient of x, given that of its cast along `dim`.

    With u = x / s, q = q(u), s = max|x| / 6 of a block, m where the maximum is (arXiv 2509.17791, sections 4 and 5; the scale's own cast
    counts as straight through):

        g_x[j] = g[j] Q'(u_j) + [j = m] sign(x_m) / 6 sum_i g[i] (q_i - u_i Q'(u_i))

    The second term is `scale_gradient`: "none", "absmax", or spread over the block by softmax(8 |x| / max|x|) in place of [j = m].

    Args:
        g, x: of equal shape.
        recipe: gives format, estimator and scale gradient.
        dim: the dimension along which the blocks lie.
        tensor_amax: the maximum that the cast used, where it was not x's own.
    """
    if (recipe.estimator == "ste" and recipe.scale_gradient == "none") or x.numel() == 0:
        return g
    dim, dtype = dim % x.ndim, compute_dtype(x)
    packed = quantize(x, recipe.format, dim, tensor_amax=tensor_amax)
    last = x.movedim(dim, -1).to(dtype)
    blocks = cut(last.contiguous(), recipe.block, x.ndim - 1)[..., 0]  # [blocks, block]
    given = cut(g.movedim(dim, -1).to(dtype).contiguous(), recipe.block, x.ndim - 1)[..., 0]
    made = cut(packed.dequantize(dtype).movedim(dim, -1).contiguous(), recipe.block, x.ndim - 1)[..., 0]
    s = packed.steps(dtype).reshape(-1, 1)
    s = torch.where(s > 0, s, 1.0)
    u, q = blocks / s, made / s
    slope = cast_derivative(u, recipe.element, recipe.estimator)
    found = given * slope
    if recipe.scale_gradient != "none":
        reaches = (given * (q - u * slope)).sum(1, keepdim=True) / ELEMENTS[recipe.element].max
        found = found + _share_of_scale(blocks, recipe.scale_gradient) * reaches
    return uncut(found[..., None], last.shape, x.ndim - 1).movedim(-1, dim).to(g.dtype)


def _share_of_scale(blocks: Tensor, kind: str) -> Tensor:
    """d max|x| / d x of each block: sign(x_m) at the first maximum, or spread by a softmax."""
    size = blocks.abs()
    top, first = size.max(1, keepdim=True)
    if kind == "absmax":
        return torch.zeros_like(blocks).scatter_(1, first, blocks.gather(1, first).sign())
    return (SOFTMAX_SHARPNESS * size / torch.where(top > 0, top, 1.0)).softmax(1) * blocks.sign()


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, recipe: FP4Recipe, dim: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(x)
        ctx.recipe, ctx.dim = recipe, dim
        return fake_quantize(x, recipe.format, dim) if recipe.casts else x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        return (through_cast(g, x, ctx.recipe, ctx.dim) if ctx.recipe.casts else g), None, None


def fake_quantize_ste(x: Tensor, recipe: FP4Recipe, dim: int = -1) -> Tensor:
    """x cast to the recipe's format and back, rounded to nearest, with the recipe's gradient through the cast.

    Args:
        x: any shape; float32, bfloat16, float16 or float64.
        recipe: its element, scales, estimator and scale gradient are used; rotations and stochastic rounding belong to products.
        dim: the dimension along which blocks lie.

    Returns:
        A tensor of x's shape and dtype.

    Raises:
        ValueError: x is no tensor of floating point numbers, or has no such dimension.

    Examples:
        >>> x = torch.tensor([0.1, 0.9, -3.2, 6.0], requires_grad=True)
        >>> y = fake_quantize_ste(x, FP4Recipe.preset("mxfp4"))
        >>> y.sum().backward()
        >>> y.tolist(), x.grad.tolist()
        ([0.0, 1.0, -3.0, 6.0], [1.0, 1.0, 1.0, 1.0])
    """
    check_floating(x)
    made = _FakeQuantize.apply(x, recipe, dim)
    assert isinstance(made, Tensor)
    return made
