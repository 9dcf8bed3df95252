"""One batch, an adapter for each row: what an adapter adds is x[..., index] delta^T, so rows share the base's products."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewer.language.s2ft.adapters.adapter import Adapter, Slice

BASE = "__base__"  # peft's word for no adapter


def add_slice(x: Tensor, y: Tensor, side: str, index: Tensor, delta: Tensor) -> Tensor:
    """y + what a slice adds to the output for input x."""
    if side == "columns":
        return y + F.linear(x.index_select(-1, index), delta)
    return y.index_add(-1, index, F.linear(x, delta))


@contextlib.contextmanager
def adapters_by_row(
    model: nn.Module, adapters: Mapping[str, Adapter], names: Sequence[str], orders: Mapping[str, Tensor]
) -> Iterator[None]:
    """Inside the block, each row of a batch passes through the base model with its own adapter.

    Args:
        model: the base, no adapter in its weights.
        adapters: by name.
        names: one for each row.
        orders: path -> how its trained side is permuted now.
    """
    rows = {name: torch.tensor([row for row, each in enumerate(names) if each == name]) for name in adapters}
    by_path: dict[str, list[tuple[Tensor, Slice]]] = {}
    for name, adapter in adapters.items():
        for path, part in adapter.slices.items():
            index = orders[path].argsort()[part.index] if path in orders else part.index
            by_path.setdefault(path, []).append((rows[name], Slice(part.side, index, part.delta, part.size)))
    handles = [model.get_submodule(path).register_forward_hook(_hook(parts, len(names))) for path, parts in by_path.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(parts: list[tuple[Tensor, Slice]], count: int) -> Any:
    # an input may come as [B, T, I], or as [B T, I] from models that flatten it
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        x = args[0]
        if x.shape[0] % count:
            raise ValueError(f"{count} adapter names for a batch of {x.shape[0]} rows; expected one name a row")
        by_row, result = x.reshape(count, -1, x.shape[-1]), output.reshape(count, -1, output.shape[-1]).clone()
        for rows, part in parts:
            mine = rows.to(x.device)
            result[mine] = add_slice(by_row[mine], result[mine], part.side, part.index.to(x.device), part.delta.to(x))
        return result.reshape(output.shape)

    return hook
