"""Linear layers of a model cast to block formats: weights once, activations on the fly, and in training both backward products."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewer.lowbit._shared.block_formats import BlockFormat
from fewer.lowbit._shared.blocks import largest_magnitude
from fewer.lowbit._shared.conversion import Select, exchange, linear_maps, put_back, with_parameters_of
from fewer.lowbit._shared.formats import check_floating
from fewer.lowbit._shared.rotation import hadamard
from fewer.lowbit.int_vs_fp.quantisers import Quantiser, random_signs, rotation_of

Format = str | BlockFormat | Quantiser
STALE, LOADED = -1, -2  # in place of a weight's version: its cast is to be made, or was read from a file and stands


class _CastProducts(torch.autograd.Function):
    """Y = Q(X) Q(W)^T along K; dX = Q(dY) Q(W^T)^T along N; dW = Q(dY^T) Q(X^T)^T along tokens. Section 2.3, equations 4 to 6."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, fmt_x: Quantiser, fmt_w: Quantiser) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(x, w)
        ctx.formats = fmt_x, fmt_w
        return fmt_x(x) @ fmt_w(w).T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, w = ctx.saved_tensors
        fmt_x, fmt_w = ctx.formats
        dx = fmt_x(dy) @ fmt_w(w, 0) if ctx.needs_input_grad[0] else None
        dw = fmt_x(dy, 0).T @ fmt_x(x, 0) if ctx.needs_input_grad[1] else None
        return dx, dw, None, None


class QuantLinear(nn.Linear):
    """nn.Linear whose operands are cast to block formats along the contraction, in simulation: sums and bias stay as they are.

    Without `train` the weight is cast once and the cast kept until the weight changes; gradients, where they are asked for, go straight
    through the casts. With `train` the forward product and both backward products are made of cast operands, anew at each step.

    Args:
        in_features, out_features, bias, device, dtype: nn.Linear's.
        fmt_w, fmt_x: formats of the weight, and of activations and gradients: names (scales as the paper has them), block formats, or
            quantisers.
        rotate: turn both operands by random signs and a Hadamard matrix of this size along the contraction before the cast; "block": of
            the format's block size; by default not.
        train: cast the backward products too; not with `rotate`.
        seed: draws the signs.
        name: what errors call the layer.

    Raises:
        ValueError: an unknown format, or a rotation that does not divide `in_features`.
        FloatingPointError: (when called) the input has a NaN or an infinite value.

    Source: arXiv 2510.25602, sections 2.3 and 5.

    Examples:
        >>> linear = QuantLinear(64, 8, fmt_w="mxint8", fmt_x="mxint8", rotate=32)
        >>> linear(torch.zeros(2, 64)).shape
        torch.Size([2, 8])
    """

    signs: Tensor | None
    cast_weight: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device: Any = None, dtype: Any = None, *, fmt_w: Format = "mxint8",
        fmt_x: Format = "mxint8", rotate: int | str | None = None, train: bool = False, seed: int = 0, name: str = "QuantLinear",
    ) -> None:  # fmt: skip
        super().__init__(in_features, out_features, bias, device, dtype)
        self._begin(fmt_w, fmt_x, rotate, train, seed, name)

    def _begin(self, fmt_w: Format, fmt_x: Format, rotate: int | str | None, train: bool, seed: int, name: str) -> None:
        check_floating(self.weight, "weight")
        self.fmt_w, self.fmt_x = Quantiser.of(fmt_w), Quantiser.of(fmt_x)
        self.rotate = rotation_of(self.fmt_w, rotate)
        self.train_products, self.layer_name, self.seed = train, name, seed
        if self.rotate and train:
            raise ValueError(f"{name}: rotate is {rotate} and train is set; expected one of them: the paper trains without rotations")
        if self.rotate and self.in_features % self.rotate:
            raise ValueError(
                f"{name} has {self.in_features} inputs, which a rotation of {self.rotate} does not divide; expected a divisor: "
                "choose another, or leave the layer out with select"
            )
        signs = random_signs(self.in_features, seed, name).to(self.weight.device) if self.rotate else None
        self.register_buffer("signs", signs, persistent=False)
        self.register_buffer("cast_weight", None, persistent=False)
        self._cast_version, self._cast_place, self._loaded_version = STALE, 0, 0

    @classmethod
    def from_linear(cls, linear: nn.Linear, fmt_w: Format, fmt_x: Format, **words: Any) -> QuantLinear:
        """A layer with the same parameters, the very tensors."""
        made = with_parameters_of(cls, linear)
        made._begin(fmt_w, fmt_x, words.get("rotate"), words.get("train", False), words.get("seed", 0), words.get("name", "QuantLinear"))
        return made

    def to_linear(self) -> nn.Linear:
        """A plain layer with the same parameters, the very tensors."""
        return with_parameters_of(nn.Linear, self)

    def turned(self, x: Tensor) -> Tensor:
        """x R along the last dimension: signs, then a Hadamard matrix of each group."""
        return hadamard(x, self.rotate, signs=self.signs) if self.rotate else x

    def weight_as_cast(self) -> Tensor:
        """Q(W R), made where the weight has changed since."""
        version = self.weight._version
        fresh = self._cast_version == version and self._cast_place == self.weight.data_ptr()
        if self.cast_weight is None or not (fresh or (self._cast_version == LOADED and version <= self._loaded_version)):
            self.cast_weight = self.fmt_w(self.turned(self.weight.detach()))
            self._cast_version, self._cast_place = version, self.weight.data_ptr()
        return self.cast_weight

    def forward(self, input: Tensor) -> Tensor:
        flat = input.reshape(-1, input.shape[-1])
        if not largest_magnitude(flat).isfinite():
            raise FloatingPointError(
                f"{self.layer_name}: its input has a NaN or an infinite value; expected finite numbers: look for where the model overflows"
            )
        if self.train_products:
            y = _CastProducts.apply(flat, self.weight, self.fmt_x, self.fmt_w)
            assert isinstance(y, Tensor)
            y = y if self.bias is None else y + self.bias
        else:
            x, w = self.turned(flat), self.weight_as_cast()
            if torch.is_grad_enabled() and (flat.requires_grad or self.weight.requires_grad):
                turned = self.turned(self.weight)
                x, w = x + (self.fmt_x(x) - x).detach(), turned + (w - turned).detach()
            else:
                x = self.fmt_x(x)
            y = F.linear(x, w.to(x.dtype), self.bias)
        return y.reshape(*input.shape[:-1], self.out_features)

    def _apply(self, fn: Any, recurse: bool = True) -> QuantLinear:
        super()._apply(fn, recurse)
        if self._cast_version >= 0:
            self._cast_version = STALE  # the weight's values or their precision may be others
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # of a copy or a pickle, whose weight counts its versions anew
        self._loaded_version = self.weight._version
        if self._cast_version >= 0:
            self._cast_version = STALE

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._cast_version = STALE

    def extra_repr(self) -> str:
        turned = f", rotated by {self.rotate}" if self.rotate else ""
        return f"{super().extra_repr()}, weight {self.fmt_w.name}; input {self.fmt_x.name}{turned}"


def convert(
    model: nn.Module,
    fmt: Format | Mapping[str, Format],
    rotate: int | str | None = None,
    select: Select | None = None,
    *,
    train: bool = False,
    seed: int = 0,
) -> nn.Module:
    """Cast a model's linear layers, in place; parameters stay the very tensors, and `revert` undoes it.

    Args:
        model: any torch module; of a transformers model the (tied) head stays as it is.
        fmt: the format of weights and activations, or a mapping of patterns of layers' names ("*.mlp.*") to formats: the first that fits,
            layers that none fits are left alone.
        rotate, train, seed: as `QuantLinear` takes them.
        select: (name, layer) -> whether to cast; by default all but a language model's head.

    Returns:
        The model.

    Raises:
        TypeError: a layer is quantised already or belongs to an adapter; nothing is changed.
        ValueError: an unknown format, a rotation that does not divide a layer's width, or no layer to cast; nothing is changed.

    Examples:
        >>> model = convert(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)), {"0": "mxint8", "*": "mxfp4"})
        >>> model[0].fmt_w.fmt.element, model[2].fmt_w.fmt.element
        ('int8', 'e2m1')
    """
    patterns = fmt if isinstance(fmt, Mapping) else {"*": fmt}
    made = []
    for name, linear in linear_maps(model, select):
        chosen = next((each for pattern, each in patterns.items() if fnmatch.fnmatchcase(name, pattern)), None)
        if chosen is not None:
            made.append((name, QuantLinear.from_linear(linear, chosen, chosen, rotate=rotate, train=train, seed=seed, name=name)))
    if not made:
        raise ValueError("the model has no linear layer to cast by these patterns; expected at least one: see model.named_modules()")
    for name, layer in made:
        exchange(model, name, layer)
    return model


def revert(model: nn.Module) -> nn.Module:
    """Undo `convert`: plain layers with the same parameters."""
    put_back(model, QuantLinear)
    return model
