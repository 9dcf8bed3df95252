"""A linear layer whose three products are of four-bit operands: forward, and both of the backward pass."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fewer.checks import check_whole
from fewer.lowbit._shared.blocks import QuantizedTensor, pack, quantize
from fewer.lowbit._shared.conversion import Select, converted, exchange, linear_maps, put_back, with_parameters_of
from fewer.lowbit._shared.formats import check_floating, compute_dtype
from fewer.lowbit.fp4_training.casts import Casts, Kept, signs_of, split_outliers, tiled, untiled
from fewer.lowbit.fp4_training.gradients import through_cast
from fewer.lowbit.fp4_training.recipe import FP4Recipe, Operand


class _FourBitProduct(torch.autograd.Function):
    """Y = Q(X) Q(W)^T along K; dX = Q(dY) Q(W^T)^T along N; dW = Q(dY^T) Q(X^T)^T along M. arXiv 2509.17791, section 2."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, casts: Casts) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        recipe = casts.recipe
        rest = None
        if recipe.casts and recipe.clamp is not None:
            casts.check_finite(x, "x", "forward")  # an infinite value would be cut off, and none would be seen
            x, rest = split_outliers(x, recipe.clamp)
        xq = casts.cast(casts.rotated(x, "forward", 1), "x", "forward", 1)
        wq = casts.cast(casts.rotated(w, "forward", 1), "w", "forward", 1)
        y = xq @ wq.T
        if rest is not None:
            y += rest @ w.T
        ctx.casts, ctx.rest, ctx.shape = casts, rest, (x.shape[0], x.shape[1])
        ctx.largest = {operand: casts.held.get(f"{operand} forward") for operand in ("x", "w")}  # a later pass measures its own
        if not ctx.needs_input_grad[1] or recipe.keeps_operands or not recipe.casts:
            ctx.save_for_backward(x if ctx.needs_input_grad[1] or recipe.keeps_operands else None, w)
        else:  # with the straight-through gradient four bits are enough
            ctx.save_for_backward(None, w, *casts.kept(casts.rotated(x, "wgrad", 0), "x_wgrad", "wgrad"))
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        with torch.autocast(dy.device.type, enabled=False):
            return *_FourBitProduct.gradients(ctx, dy), None

    @staticmethod
    def gradients(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        casts, recipe = ctx.casts, ctx.casts.recipe
        x, w, *kept = ctx.saved_tensors
        dy = dy * recipe.loss_scale if recipe.casts and recipe.loss_scale != 1 else dy
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dyq = casts.cast(casts.rotated(dy, "dgrad", 1), "dy", "dgrad", 1)
            dx = dyq @ casts.cast(casts.rotated(w, "dgrad", 0), "w_dgrad", "dgrad", 0)
            dx = _through(casts, dx, x, "x", ctx.largest["x"])
        if ctx.needs_input_grad[1]:
            dyq = casts.cast(casts.rotated(dy, "wgrad", 0), "dy", "wgrad", 0)
            if kept:
                xq = Kept(*kept).values(recipe, ctx.shape, dy.dtype)
            else:
                xq = casts.cast(casts.rotated(x, "wgrad", 0), "x_wgrad", "wgrad", 0)
            dw = dyq.T @ xq
            if ctx.rest is not None:
                dw += (ctx.rest.T @ dy).T
            dw = _through(casts, dw, w, "w", ctx.largest["w"])
        if recipe.casts and recipe.loss_scale != 1:
            dx, dw = (each if each is None else each / recipe.loss_scale for each in (dx, dw))
        return dx, dw


def _through(casts: Casts, g: Tensor, x: Tensor | None, operand: Operand, largest: Tensor | None) -> Tensor:
    """A gradient of an operand's forward cast made that of the operand; it is taken in the coordinates that were cast."""
    recipe = casts.recipe
    if not recipe.keeps_operands or x is None:
        return g
    turned = casts.rotated(x, "forward", 1)
    shape = (x.shape[0], x.shape[1])
    given = casts.rotated(g, "forward", 1)
    if operand == "w" and recipe.weight_blocks == "2d":
        tiles = replace(recipe, weight_blocks="1d", block=recipe.block * recipe.block, hadamard_size=recipe.hadamard_size or recipe.block)
        given = untiled(through_cast(tiled(given, recipe.block), tiled(turned, recipe.block), tiles, -1, largest), shape)
    else:
        given = through_cast(given, turned, recipe, 1, largest)
    return casts.rotated(given, "forward", 1, inverse=True)


def fp4_matmul(x: Tensor, w: Tensor, recipe: FP4Recipe, step: int = 1) -> Tensor:
    """x W^T with operands of four bits, in the forward pass and in both products of the backward pass.

    Args:
        x: [..., K]; float32, bfloat16, float16 (computed in float32) or float64.
        w: [N, K].
        recipe: formats, scales, rounding, rotations, gradients.
        step: from 1; the same seed and step draw the same random numbers.

    Returns:
        [..., N] in x's dtype.

    Raises:
        ValueError: shapes that do not meet, numbers that are not floating point, a step below 1.
        FloatingPointError: an operand has a NaN or an infinite value.

    Examples:
        >>> x, w = torch.eye(16), torch.eye(16)
        >>> bool((fp4_matmul(x, w, FP4Recipe.preset("nvfp4")) == torch.eye(16)).all())
        True
    """
    check_whole(step=step)
    return _product(x, w, Casts(recipe, step))


def _product(x: Tensor, w: Tensor, casts: Casts) -> Tensor:
    check_floating(x)
    check_floating(w, "w")
    if w.ndim != 2 or x.ndim < 1 or x.shape[-1] != w.shape[1]:
        raise ValueError(f"x is {tuple(x.shape)} and w {tuple(w.shape)}; expected [..., K] and [N, K]: give both the same last dimension")
    check_tiles(casts.recipe, w)
    dtype = torch.promote_types(compute_dtype(x), compute_dtype(w))
    with torch.autocast(x.device.type, enabled=False):  # operands are cast from full precision, not from bfloat16
        y = _FourBitProduct.apply(x.reshape(x.shape[:-1].numel(), x.shape[-1]).to(dtype), w.to(dtype), casts)
    assert isinstance(y, Tensor)
    return y.to(x.dtype).reshape(*x.shape[:-1], w.shape[0])


def check_tiles(recipe: FP4Recipe, w: Tensor) -> None:
    if recipe.weight_blocks == "2d" and recipe.block > max(w.shape):
        raise ValueError(
            f"weight_blocks is '2d', block {recipe.block} and the weight {tuple(w.shape)}; expected a block of at most {max(w.shape)}: "
            "take a smaller block, or '1d'"
        )


class FP4Linear(nn.Linear):
    """nn.Linear that trains with four-bit operands, in simulation: weights, bias and sums stay in full precision.

    It evaluates as it trains, in four bits. Each forward pass in training mode is a step (recomputation by a checkpoint is none), from
    which random numbers are drawn; they do not depend on torch's global generators. Under autocast operands are cast from the inputs as
    they come, and the output has the input's dtype.

    Args:
        in_features, out_features, bias, device, dtype: nn.Linear's.
        recipe: how the products are made.
        layer: a number of its own, so that layers draw different random numbers.
        name: what errors call it.

    Raises:
        ValueError: tiles of weights larger than the weight.

    Examples:
        >>> linear = FP4Linear(32, 8, recipe=FP4Recipe.preset("nvfp4"))
        >>> linear(torch.zeros(2, 32)).shape
        torch.Size([2, 8])
    """

    hadamard_signs: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device: Any = None, dtype: Any = None, *,
        recipe: FP4Recipe | None = None, layer: int = 0, name: str = "FP4Linear",
    ) -> None:  # fmt: skip
        super().__init__(in_features, out_features, bias, device, dtype)
        self._begin(recipe or FP4Recipe(), layer, name)

    def _begin(self, recipe: FP4Recipe, layer: int, name: str) -> None:
        check_floating(self.weight, "weight")
        check_tiles(recipe, self.weight)
        self.recipe, self.layer, self.layer_name, self.steps = recipe, layer, name, 0
        self._held: dict[str, Tensor] = {}
        signs = None if recipe.hadamard == "none" else signs_of(recipe, layer).to(self.weight.device)
        self.register_buffer("hadamard_signs", signs)

    @classmethod
    def from_linear(cls, linear: nn.Linear, recipe: FP4Recipe, layer: int = 0, name: str = "FP4Linear") -> FP4Linear:
        """A layer with the same parameters, the very tensors."""
        made = with_parameters_of(cls, linear)
        made._begin(recipe, layer, name)
        return made

    def to_linear(self) -> nn.Linear:
        """A plain layer with the same parameters, the very tensors."""
        return with_parameters_of(nn.Linear, self)

    def forward(self, input: Tensor) -> Tensor:
        if self.training and torch._C._current_graph_task_id() == -1:  # inside a backward pass it is a checkpoint's recomputation
            self.steps += 1
        y = _product(input, self.weight, self.casts(trace=self.training))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def casts(self, *, trace: bool = False) -> Casts:
        """The casts of the step that the layer stands at; without a trace the maxima that it holds stay as they are."""
        held = self._held if trace else dict(self._held)
        return Casts(self.recipe, max(1, self.steps), self.layer, self.hadamard_signs, self.layer_name, held)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if self.hadamard_signs is not None:
            state_dict.setdefault(f"{prefix}hadamard_signs", self.hadamard_signs)  # a plain layer's state has none: the drawn ones stay
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.recipe.element} in blocks of {self.recipe.block} with {self.recipe.scale} scales"


def convert(model: nn.Module, recipe: FP4Recipe, select: Select | None = None) -> list[str]:
    """Make a model's linear layers train in four bits, in place; parameters stay the very tensors.

    Args:
        model: any torch module; of a transformers model the tied head stays as it is, and so do embeddings and norms.
        recipe: how the products are made.
        select: (name, layer) -> whether to convert; by default all but a language model's head.

    Returns:
        The names of the converted layers.

    Raises:
        TypeError: a selected layer is quantised already or belongs to an adapter; nothing is converted.
        ValueError: the recipe does not fit a layer; nothing is converted.

    Examples:
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        >>> convert(model, FP4Recipe.preset("paper"))
        ['0', '2']
        >>> revert(model)
        ['0', '2']
    """
    found = list(linear_maps(model, select))
    made = [(name, FP4Linear.from_linear(linear, recipe, layer, name)) for layer, (name, linear) in enumerate(found)]
    for name, linear in made:
        exchange(model, name, linear)
    return [name for name, _ in made]


def revert(model: nn.Module) -> list[str]:
    """Undo `convert`: plain layers with the same parameters; returns their names."""
    return put_back(model, FP4Linear)


@torch.no_grad()
def export(model: nn.Module) -> dict[str, QuantizedTensor]:
    """The weights of a converted model as its forward products use them, packed: name of the weight -> its blocks along K.

    With rotations "all" they are the rotated weights; tiles become rows of blocks that share their scale.
    """
    found = {}
    for name, module in converted(model, FP4Linear).items():
        if module.recipe.casts:
            casts = replace(module.casts(), name=name)
            w = casts.rotated(module.weight.detach().to(compute_dtype(module.weight)), "forward", 1)
            largest = casts.maximum(w.abs().amax(), "w", "forward")
            as_used = _tiles_as_rows if module.recipe.weight_blocks == "2d" else _rows
            found[f"{name}.weight"] = as_used(w, module.recipe, largest)
    return found


def _rows(w: Tensor, recipe: FP4Recipe, largest: Tensor) -> QuantizedTensor:
    return quantize(w, recipe.format, 1, tensor_amax=largest)


def _tiles_as_rows(w: Tensor, recipe: FP4Recipe, largest: Tensor) -> QuantizedTensor:
    k = recipe.block
    packed = quantize(tiled(w, k), recipe.tile_format, tensor_amax=largest)
    codes = untiled(packed.elements(), (w.shape[0], w.shape[1]))
    scales = packed.scales[..., 0].repeat_interleave(k, 0)[: w.shape[0]]  # [N, blocks of K]
    return QuantizedTensor(pack(codes, recipe.format.elements.bits), scales.contiguous(), packed.tensor_scale, recipe.format, w.shape, 1)
