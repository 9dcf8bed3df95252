"""A linear map of which only some rows or columns S are trained, and whose backward pass keeps only what S's gradient needs."""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fewer.language._shared.structure import Side, is_transposed, matrix

Form = Literal["view", "gather", "delta"]
Where = slice | Tensor


def take(x: Float[Tensor, "*B N"], where: Where) -> Float[Tensor, "*B s"]:
    """Some of the last axis, as a contiguous copy: a view would keep the whole of x alive."""
    return x[..., where].contiguous() if isinstance(where, slice) else x.index_select(-1, where)


def flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


class ColumnsTrained(torch.autograd.Function):
    """y = W x + b with S = W[:, where] trained: dx = dy W, dS = dy^T x[..., where]. Kept: x[..., where] and W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, s: Tensor, weight: Tensor, bias: Tensor | None, where: Where) -> Tensor:
        y = F.linear(x, weight, bias)
        kept = take(x, where).to(y.dtype) if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(kept, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        kept, weight = ctx.saved_tensors
        dx = dy @ weight.to(dy.dtype) if ctx.needs_input_grad[0] else None
        ds = (flat(kept).T @ flat(dy)).T if ctx.needs_input_grad[1] else None  # dy^T x, laid out in memory as S is
        return dx, ds, None, None, None


class RowsTrained(torch.autograd.Function):
    """y = W x + b with S = W[where] trained: dx = dy W, dS = dy[..., where]^T x. Kept: all of x, and W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, s: Tensor, weight: Tensor, bias: Tensor | None, where: Where) -> Tensor:
        y = F.linear(x, weight, bias)
        ctx.save_for_backward(x.to(y.dtype) if ctx.needs_input_grad[1] else None, weight)
        ctx.where = where
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        dx = dy @ weight.to(dy.dtype) if ctx.needs_input_grad[0] else None
        ds = flat(take(dy, ctx.where)).T @ flat(x) if ctx.needs_input_grad[1] else None
        return dx, ds, None, None, None


TRAINED = {"columns": ColumnsTrained, "rows": RowsTrained}


def neighbours(index: Tensor) -> slice | None:
    """The range that an index is, or None."""
    first, length = int(index[0]), len(index)
    return slice(first, first + length) if torch.equal(index.cpu(), torch.arange(first, first + length)) else None


class S2Linear(nn.Module):
    """A linear map of which the rows or columns S are trained.

    Args:
        base_layer: a `torch.nn.Linear`, or transformers' Conv1D; with form "delta" any module that maps the last axis linearly.
        index: which rows or columns [s], int64.
        side: "columns" (of o and down) needs the matching columns of the input for its gradient, "rows" (of v and up) all of it.
        form: "view": S is a view into the weight, which an optimizer's step changes in place (the index must be a range). "gather": S has
            its own memory and is written into the weight before the next product. "delta": the weight stays as it is, and the product
            with S - S0 is added.
        delta: S - S0 to start from, shaped like S; zeros by default.

    Attributes:
        s: the trained values, a Parameter [out, s] (columns) or [s, in] (rows).
        s0: what they were at first: writing it back restores the base bit for bit.
        active: whether the trained values are in effect; see `switch_off`.

    Raises:
        ValueError: a view of what is no range.

    Examples:
        >>> layer = S2Linear(nn.Linear(8, 4), torch.arange(2, 5), "columns")
        >>> layer(torch.ones(3, 8)).sum().backward()
        >>> layer.s.grad.shape, layer.weight.grad is None
        (torch.Size([4, 3]), True)
        >>> _ = torch.nn.init.zeros_(layer.s)
        >>> layer.weight[:, 2:5].abs().sum().item()
        0.0
    """

    s: nn.Parameter
    s0: Tensor
    index: Tensor

    def __init__(self, base_layer: nn.Module, index: Tensor, side: Side, form: Form = "view", delta: Tensor | None = None) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.side: Side = side
        self.target(index, form, delta)

    @torch.no_grad()
    def target(self, index: Tensor, form: Form, delta: Tensor | None = None) -> None:
        """Train other rows or columns from now on, starting `delta` away from the weight (which must hold the base's values)."""
        where = neighbours(index) if form == "view" else None
        if form == "view" and where is None:
            raise ValueError(f"columns or rows {index.tolist()[:8]} are no range; expected neighbours, or the form 'gather'")
        device = next(iter([*self.base_layer.parameters(), *self.base_layer.buffers()])).device
        self.form: Form = form
        self.register_buffer("index", index.to(device))
        self.where: Where = self.index if where is None else where
        self.register_buffer("s0", self._read())
        values = self.s0 if delta is None else (self.s0.to(delta.dtype) + delta.to(device)).to(self.s0.dtype)
        self._aside: Tensor | None = None
        self.active = True
        if form == "view":
            self._lay_out()
        self.s = nn.Parameter(self._slice() if form == "view" else dense(values.clone(), self.side))
        self.write(values)

    @property
    def weight(self) -> Tensor:
        """The weight [out, in], trained values included (with form "delta" those of the base)."""
        return matrix(self.base_layer)

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.base_layer, "bias", None)

    def _axis(self) -> int:
        return 0 if self.side == "rows" else 1

    def _lay_out(self) -> None:
        """Let rows or columns that are trained lie one behind the other in memory.

        Fused optimizers step through memory, whatever the strides: on a slice of columns of a usual weight, torch's fused AdamW for CPUs
        would change other weights.
        """
        laid_out = dense(self.weight.detach(), self.side)
        if laid_out.data_ptr() != self.weight.data_ptr():
            weight: Any = self.base_layer.weight
            weight.data = laid_out.T if is_transposed(self.base_layer) else laid_out

    def release(self) -> nn.Module:
        """The plain linear map again, its weight laid out as usual."""
        weight = getattr(self.base_layer, "weight", None)
        if isinstance(weight, Tensor) and not weight.is_contiguous():
            weight.data = weight.data.contiguous()
        return self.base_layer

    def _slice(self) -> Tensor:
        """The trained part as a view into the weight (which shares its count of changes)."""
        weight = self.weight.detach()
        return weight[self.where] if self.side == "rows" else weight[:, self.where]

    def _read(self) -> Tensor:
        """A copy of the weight's values at the index; zeros of that shape where a quantised base has none to read."""
        weight = getattr(self.base_layer, "weight", None)
        if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.dim() != 2:
            base: Any = self.base_layer
            shape = (len(self.index), base.in_features) if self.side == "rows" else (base.out_features, len(self.index))
            return torch.zeros(shape, device=self.index.device, dtype=torch.get_default_dtype())
        return self.weight.detach().index_select(self._axis(), self.index).contiguous()

    @torch.no_grad()
    def write(self, values: Tensor) -> None:
        """Put values into the weight's trained part (with form "delta" into S alone)."""
        if self.form == "delta":
            self.s.copy_(values)
        elif self.form == "view":
            self._slice().copy_(values)
        else:
            self.s.copy_(values)
            self._into_weight(values)

    def _into_weight(self, values: Tensor) -> None:
        # .data, as values that have not changed since an earlier pass must not spoil what that pass kept for its backward
        self.weight.data.index_copy_(self._axis(), self.index, values.detach().to(self.weight.device))

    def sync(self) -> None:
        """See to it that S and the weight are one: optimizers change S, and other libraries move or replace tensors one by one."""
        if self.form == "view" and self.s.untyped_storage().data_ptr() != self.weight.untyped_storage().data_ptr():
            self._slice().copy_(self.s.detach())
            self._tie()
        elif self.form == "gather" and self.active:
            self._into_weight(self.s)

    def _tie(self) -> None:
        if self.form == "view":
            self._lay_out()
            self.s.data = self._slice()
        self.where = self.where if isinstance(self.where, slice) else self.index

    def forward(self, x: Float[Tensor, "*B I"]) -> Float[Tensor, "*B O"]:
        if self.form == "delta":
            return self.base_layer(x) if not self.active else self._with_delta(x)
        if torch.is_grad_enabled() or self.s._version != self._seen:
            self.sync()
            # some optimizers change S without counting: after a pass that may have been for training it is looked at again
            self._seen = None if torch.is_grad_enabled() else self.s._version
        if not torch.is_grad_enabled() or not self.active:
            return self.base_layer(x)
        return TRAINED[self.side].apply(x, self.s, self.weight, self.bias, self.where)  # pyright: ignore[reportReturnType]

    _seen: int | None = None  # the count of S's changes when it was last known to be in the weight

    def _with_delta(self, x: Tensor) -> Tensor:
        y, delta = self.base_layer(x), self.s - self.s0
        if self.side == "columns":
            return y + F.linear(take(x, self.index), delta)
        return y.index_add(-1, self.index, F.linear(x, delta).to(y.dtype))

    def trained(self) -> Tensor:
        """S, also while it is switched off."""
        return self.s.detach() if self._aside is None else self._aside

    def delta(self) -> Tensor:
        """S - S0 in twice the precision, which is exact, so that S0 + delta is S again."""
        return self.trained().to(wide(self.s0.dtype)) - self.s0.to(wide(self.s0.dtype))

    @torch.no_grad()
    def switch_off(self) -> None:
        """Restore the base's own bits in the weight; S is kept aside and not trained meanwhile."""
        self.sync()
        if self.form == "view":
            self._aside = self.s.detach().clone()
            self._slice().copy_(self.s0)
        elif self.form == "gather":
            self._into_weight(self.s0)
        self.active = False
        self.s.requires_grad_(False)

    @torch.no_grad()
    def switch_on(self) -> None:
        """The trained values are in effect again."""
        self.active, values = True, self.trained()
        self._aside = None
        self.write(values)
        self.s.requires_grad_(True)

    @torch.no_grad()
    def into_base(self, path: str) -> None:
        """Write S into the weight that it was kept beside; TypeError, naming the map, on a quantised one."""
        weight = getattr(self.base_layer, "weight", None)
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            raise TypeError(f"{path} is quantised, its adapter cannot be merged; expected a plain weight: merge into the unquantised base")
        self.weight.index_copy_(self._axis(), self.index, self.trained())

    def _apply(self, fn: Any, recurse: bool = True) -> S2Linear:
        if self.form == "gather":
            self.sync()
        super()._apply(fn, recurse)
        self._aside = None if self._aside is None else fn(self._aside)
        self._tie()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:  # also how deepcopy makes its copy
        super().__setstate__(state)
        self._tie()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """The weight holds S already and is saved by the base layer; with form "delta" S is saved too."""
        self.sync()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.form != "delta":
            del destination[f"{prefix}s"]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        given = state_dict.get(f"{prefix}index")
        if given is not None and not torch.equal(given.to(self.index.device), self.index):
            raise ValueError(
                f"{prefix[:-1]}: the state trains other rows or columns; expected the same selection: use the same config and seed"
            )
        weight = state_dict.get(f"{prefix}base_layer.weight")
        if self.form != "delta" and weight is not None and f"{prefix}s" not in state_dict:
            stored = weight.T if is_transposed(self.base_layer) else weight
            state_dict = {**state_dict, f"{prefix}s": stored.index_select(self._axis(), self.index.to(stored.device))}
        super()._load_from_state_dict(state_dict, prefix, *rest)


def dense(values: Tensor, side: Side) -> Tensor:
    """The same values [out, in], each trained row (or column) contiguous in memory; themselves where that is so."""
    return values.contiguous() if side == "rows" else values.T.contiguous().T


def wide(dtype: torch.dtype) -> torch.dtype:
    """A dtype in which differences of two values of `dtype` are exact (but for differences of scale beyond reason)."""
    return torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32
