"""Routed feed-forward networks: the channels are cut into blocks, and each token passes the half of them that a router gives most.

Source: SPT, arXiv 2312.10365, and its released layers: c_i = 2 p_i multiplies every frozen product of block i and no product of LoRA's,
which is how the router gets its gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from fewer.checks import check_whole


class Map(NamedTuple):
    """A linear map as it is computed with: a frozen weight, its bias, and LoRA's A [r, in] and B [out, r] where there are any."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor | None
    b: Tensor | None


def map_of(linear: nn.Module) -> Map:
    """The parts of a torch Linear, or of one that peft has put LoRA on (with a scaling of 1)."""
    plain: Any = getattr(linear, "base_layer", linear)
    if not hasattr(linear, "base_layer"):
        return Map(plain.weight, plain.bias, None, None)
    wrapped: Any = linear
    (name,) = wrapped.active_adapters
    return Map(plain.weight, plain.bias, wrapped.lora_A[name].weight, wrapped.lora_B[name].weight)


class Router(nn.Module):
    """p = sigmoid(W_r x + b_r) for G blocks; the active ones are those with the largest p, of equal ones the first."""

    def __init__(self, hidden_size: int, blocks: int, active: int) -> None:
        super().__init__()
        check_whole(blocks=blocks, active=active)
        if active > blocks:
            raise ValueError(f"active is {active} and there are {blocks} blocks; expected 1 to {blocks}")
        self.linear, self.active = nn.Linear(hidden_size, blocks), active

    def forward(self, x: Float[Tensor, "T D"]) -> tuple[Float[Tensor, "T G"], Bool[Tensor, "T G"]]:
        """(p, which blocks are active)."""
        p = self.linear(x.to(self.linear.weight.dtype)).sigmoid()
        order = p.sort(dim=-1, descending=True, stable=True).indices[:, : self.active]
        return p, torch.zeros_like(p, dtype=torch.bool).scatter(1, order, True)


class _Routed(nn.Module):
    """What both forms share: blocks of channels, a gather for each, one sum.

    Attributes:
        load: [G] the share of tokens that each block saw in the last pass.
        balance_loss: of the last pass in training mode, where balance_weight is not 0.
    """

    down: nn.Module
    load: Tensor | None = None

    def __init__(
        self, channels: int, hidden_size: int, blocks: int, active: int, act: Callable[[Tensor], Tensor], balance_weight: float
    ) -> None:
        super().__init__()
        if channels % blocks:
            raise ValueError(f"{channels} channels do not divide into {blocks} blocks; expected a divisor of {channels}")
        self.router = Router(hidden_size, blocks, active)
        self.blocks, self.size, self.act, self.balance_weight = blocks, channels // blocks, act, balance_weight
        self.balance_loss: Tensor | None = None

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        rows = x.reshape(-1, x.shape[-1])
        p, active = self.router(rows)
        self.load = active.float().mean(0).detach()
        if self.training and self.balance_weight:
            self.balance_loss = self.balance_weight * balance(p, active)
        down = map_of(self.down)
        maps = self._maps(rows)
        y = rows.new_zeros(len(rows), len(down.weight), dtype=down.weight.dtype)
        low = None if down.a is None else y.new_zeros(len(rows), len(down.a), dtype=down.a.dtype)
        for block in range(self.blocks):
            tokens = active[:, block].nonzero().squeeze(1)
            part = slice(block * self.size, (block + 1) * self.size)
            c = 2 * p[tokens, block, None].to(x.dtype)
            h = self._hidden(rows.index_select(0, tokens), c, part, tokens, maps)
            y.index_add_(0, tokens, F.linear(c * h, down.weight[:, part]).to(y.dtype))
            if low is not None and down.a is not None:
                low.index_add_(0, tokens, F.linear(h.to(low.dtype), down.a[:, part]).to(low.dtype))
        if low is not None and down.b is not None:
            y = y + F.linear(low, down.b)  # B A h of all blocks at once
        return (y if down.bias is None else y + down.bias).to(x.dtype).reshape(*x.shape[:-1], -1)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"balance_loss": None}  # it has a graph, which no copy can have

    def _maps(self, rows: Tensor) -> list[tuple[Map, Tensor | None]]:
        """The maps into the channels, each with A x of all tokens."""
        raise NotImplementedError

    def _hidden(self, x: Tensor, c: Tensor, part: slice, tokens: Tensor, maps: list[tuple[Map, Tensor | None]]) -> Tensor:
        """h of a block's tokens."""
        raise NotImplementedError


def _into(into: tuple[Map, Tensor | None], cx: Tensor, c: Tensor, part: slice, tokens: Tensor) -> Float[Tensor, "t I/G"]:
    """c (W_i x + b_i) + B_i A x. c goes on x, not on the product: x is kept once for all maps then, a product would be for each."""
    map_, low = into
    frozen = F.linear(cx, map_.weight[part])
    if map_.bias is not None:
        frozen = frozen + c * map_.bias[part]
    if low is None or map_.b is None:
        return frozen
    return frozen + F.linear(low.index_select(0, tokens), map_.b[part]).to(frozen.dtype)


def _with_low(map_: Map, rows: Tensor) -> tuple[Map, Tensor | None]:
    return map_, None if map_.a is None else F.linear(rows.to(map_.a.dtype), map_.a)


class RoutedFFN(_Routed):
    """OPT's form: h_i = act(c_i (W1_i x + b1_i) + B1_i A1 x); y = b2 + sum over active i of [c_i W2_i h_i + B2 A2_i h_i].

    Args:
        up, down: the dense network's maps, Linear or peft's LoRA around one; they are kept, not copied.
        blocks, active: G, and how many of them a token passes.
        act: the activation.
        balance_weight: of G sum_i f_i P_i, the routers' balance.

    Examples:
        >>> network = RoutedFFN(nn.Linear(8, 16), nn.Linear(16, 8), blocks=4, active=2)
        >>> network(torch.randn(2, 3, 8)).shape, network.load.sum().item()
        (torch.Size([2, 3, 8]), 2.0)
    """

    def __init__(
        self,
        up: nn.Module,
        down: nn.Module,
        blocks: int = 4,
        active: int = 2,
        act: Callable[[Tensor], Tensor] = F.relu,
        balance_weight: float = 0.0,
    ) -> None:
        channels, hidden_size = map_of(up).weight.shape
        super().__init__(channels, hidden_size, blocks, active, act, balance_weight)
        self.up, self.down = up, down

    def _maps(self, rows: Tensor) -> list[tuple[Map, Tensor | None]]:
        return [_with_low(map_of(self.up), rows)]

    def _hidden(self, x: Tensor, c: Tensor, part: slice, tokens: Tensor, maps: list[tuple[Map, Tensor | None]]) -> Tensor:
        return self.act(_into(maps[0], c * x, c, part, tokens))


class RoutedGatedFFN(_Routed):
    """LLaMA's form: h_i = act(c_i Wg_i x + Bg_i Ag x) * (c_i Wu_i x + Bu_i Au x); y = sum over active i of [c_i Wd_i h_i + Bd Ad_i h_i].

    Args:
        gate, up, down: the dense network's maps, Linear or peft's LoRA around one; they are kept, not copied.
        blocks, active, act, balance_weight: see `RoutedFFN`.
    """

    def __init__(
        self,
        gate: nn.Module,
        up: nn.Module,
        down: nn.Module,
        blocks: int = 4,
        active: int = 2,
        act: Callable[[Tensor], Tensor] = F.silu,
        balance_weight: float = 0.0,
    ) -> None:
        channels, hidden_size = map_of(up).weight.shape
        super().__init__(channels, hidden_size, blocks, active, act, balance_weight)
        self.gate, self.up, self.down = gate, up, down

    def _maps(self, rows: Tensor) -> list[tuple[Map, Tensor | None]]:
        return [_with_low(map_of(self.gate), rows), _with_low(map_of(self.up), rows)]

    def _hidden(self, x: Tensor, c: Tensor, part: slice, tokens: Tensor, maps: list[tuple[Map, Tensor | None]]) -> Tensor:
        cx = c * x
        gate, up = (_into(each, cx, c, part, tokens) for each in maps)
        return self.act(gate) * up


def balance(p: Float[Tensor, "T G"], active: Bool[Tensor, "T G"]) -> Float[Tensor, ""]:
    """G sum_i f_i P_i: f_i the share of the assignments that i gets (a constant), P_i the mean of p_i / sum p. Even is 1."""
    share = active.to(p.dtype).mean(0) / active.sum(-1).to(p.dtype).mean()
    return p.shape[1] * (share.detach() * (p / p.sum(-1, keepdim=True)).mean(0)).sum()
