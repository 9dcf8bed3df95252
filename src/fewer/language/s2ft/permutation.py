"""Co-permutation: the channels (heads) of all maps of a block take a new order together, which leaves what the block computes unchanged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewer.language._shared.structure import AUTO, Structure, matrix, structure_of
from fewer.language.s2ft.selection import Selection


def joint_order(upstream: Iterable[int], downstream: Iterable[int], units: int) -> Tensor:
    """Only-upstream, both, only-downstream, then the rest in their old order: both trained parts are ranges.

    >>> joint_order([5, 1], [1, 3], 6).tolist()
    [5, 1, 3, 0, 2, 4]
    """
    up, down = set(upstream), set(downstream)
    parts = (sorted(up - down), sorted(up & down), sorted(down - up), sorted(set(range(units)) - up - down))
    return torch.tensor([unit for part in parts for unit in part], dtype=torch.long)


def head_order(v: Iterable[int], o: Iterable[int], structure: Structure) -> Tensor:
    """The new order of query heads: key/value heads move with all their query heads, which are ordered among themselves.

    Without grouped queries that is `joint_order`. With them it is as near to it as a legal order comes: the trained heads of o lead in
    their groups, but are not neighbours.
    """
    group, chosen = structure.group, set(o)
    groups = joint_order(v, {head // group for head in chosen}, structure.kv_heads).tolist()
    members = [range(group * each, group * (each + 1)) for each in groups]
    return torch.tensor([head for heads in members for head in sorted(heads, key=lambda head: head not in chosen)], dtype=torch.long)


@dataclass(frozen=True)
class Permutation:
    """New orders: layer -> what was where. `channels[l][new] = old`, `heads[l][new] = old` (query heads).

    Attributes:
        structure: of the model that it belongs to.
    """

    structure: Structure
    channels: Mapping[int, Tensor]
    heads: Mapping[int, Tensor]

    def inverse(self) -> Permutation:
        """The permutation that puts everything back."""
        return Permutation(
            self.structure,
            {layer: order.argsort() for layer, order in self.channels.items()},
            {layer: order.argsort() for layer, order in self.heads.items()},
        )

    def apply_(self, model: nn.Module) -> None:
        """Reorder a model's weights and biases, in place."""
        for layer, order in self.channels.items():
            self._permute_channels(model, layer, order)
        for layer, order in self.heads.items():
            self._permute_heads(model, layer, order)

    def _permute_channels(self, model: nn.Module, layer: int, order: Tensor) -> None:
        structure, family = self.structure, self.structure.family
        for name in family.upstream:
            _rows(model.get_submodule(structure.path(layer, name)), order)
        _columns(model.get_submodule(structure.path(layer, family.down)), order)

    def _permute_heads(self, model: nn.Module, layer: int, order: Tensor) -> None:
        structure, family = self.structure, self.structure.family
        kv_order = order[:: structure.group] // structure.group
        parts: tuple[tuple[Literal["q", "k", "v"], str, Tensor], ...]
        parts = (("q", family.q, order), ("k", family.k, kv_order), ("v", family.v, kv_order))
        for name, path, heads in parts:
            _rows(model.get_submodule(structure.path(layer, path)), _spread(heads, structure.head_dim), structure.offset(name))
        _columns(model.get_submodule(structure.path(layer, family.o)), _spread(order, structure.head_dim))


def permute_(model: nn.Module, selection: Selection) -> Permutation:
    """Make a selection's channels and heads neighbours, in place; the model computes what it did.

    Args:
        model: a causal language model of transformers, its weights not quantised.
        selection: kinds u and d order channels, v and o order heads (with grouped queries, whole groups of them).

    Returns:
        what was done; `inverse().apply_(model)` undoes it bit for bit.
    """
    structure = structure_of(model, AUTO)
    channels, heads = {}, {}
    for layer in structure.layers:
        up, down = selection.of("u", layer), selection.of("d", layer)
        if up or down:
            channels[layer] = joint_order(up, down, structure.widths[layer])
        v, o = selection.of("v", layer), selection.of("o", layer)
        if v or o:
            heads[layer] = head_order(v, o, structure)
    permutation = Permutation(structure, channels, heads)
    permutation.apply_(model)
    return permutation


def _spread(heads: Tensor, size: int) -> Tensor:
    """The rows of some heads."""
    return (heads[:, None] * size + torch.arange(size)).flatten()


@torch.no_grad()
def _rows(linear: nn.Module, order: Tensor, offset: int = 0) -> None:
    """Reorder output rows (and the bias) from an offset on."""
    bias: Any = linear.bias
    for values in (matrix(linear), bias):
        if values is not None:
            part = values[offset : offset + len(order)]
            part.copy_(part[order.to(part.device)])


@torch.no_grad()
def _columns(linear: nn.Module, order: Tensor) -> None:
    weight = matrix(linear)
    weight.copy_(weight[:, order.to(weight.device)])
