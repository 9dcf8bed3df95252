"""Where a language model keeps its coupled structures: heads (rows of q, k, v; columns of o), channels (rows of gate, up; columns of down)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from fewer.language._shared.feed_forward import check_unshared

Side = Literal["rows", "columns"]
Kind = Literal["v", "o", "u", "d"]  # units: heads with their rows of v or columns of o, channels with their rows of up or columns of down
KINDS: tuple[Kind, ...] = get_args(Kind)
AUTO = "auto"


@dataclass(frozen=True)
class Family:
    """The names of the linear maps in a decoder layer.

    Attributes:
        upstream: the maps whose rows are channels, the trained one (up) last.
        fused: q, k and v lie one below the other in one map.
    """

    name: str
    layers: str
    q: str
    k: str
    v: str
    o: str
    upstream: tuple[str, ...]
    down: str
    fused: bool = False

    @property
    def members(self) -> tuple[str, ...]:
        return (self.q, self.k, self.v, self.o, *self.upstream, self.down)


_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
FAMILIES = (
    Family("gated", "model.layers", *_ATTENTION, "self_attn.o_proj", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
    Family("opt", "model.decoder.layers", *_ATTENTION, "self_attn.out_proj", ("fc1",), "fc2"),
    Family("gpt2", "transformer.h", "attn.c_attn", "attn.c_attn", "attn.c_attn", "attn.c_proj", ("mlp.c_fc",), "mlp.c_proj", fused=True),
)


class Target(NamedTuple):
    """The part of a linear map that a kind of unit trains: unit n is `offset + n size` to `offset + (n + 1) size` of its rows or columns."""

    path: str
    side: Side
    size: int
    offset: int


def matrix(linear: nn.Module) -> Tensor:
    """The weight as [out, in], a view; transformers' Conv1D stores it the other way round."""
    weight = cast(Tensor, linear.weight)
    return weight.T if is_transposed(linear) else weight


def is_transposed(linear: nn.Module) -> bool:
    return type(linear).__name__ == "Conv1D"


@dataclass(frozen=True)
class Structure:
    """A model's coupled structures.

    Attributes:
        heads, kv_heads, head_dim: of its attention.
        widths: channels of each layer.
    """

    family: Family
    heads: int
    kv_heads: int
    head_dim: int
    widths: tuple[int, ...]

    @property
    def group(self) -> int:
        """Query heads that share a key/value head."""
        return self.heads // self.kv_heads

    @cached_property
    def layers(self) -> range:
        return range(len(self.widths))

    def path(self, layer: int, name: str) -> str:
        return f"{self.family.layers}.{layer}.{name}"

    def units(self, kind: Kind) -> list[int]:
        """How many units of a kind each layer has."""
        return list(self.widths) if kind in "ud" else [self.kv_heads if kind == "v" else self.heads] * len(self.widths)

    def target(self, kind: Kind, layer: int) -> Target:
        """What a kind of unit trains in a layer."""
        if kind == "d":
            return Target(self.path(layer, self.family.down), "columns", 1, 0)
        if kind == "u":
            return Target(self.path(layer, self.family.upstream[-1]), "rows", 1, 0)
        if kind == "o":
            return Target(self.path(layer, self.family.o), "columns", self.head_dim, 0)
        return Target(self.path(layer, self.family.v), "rows", self.head_dim, self.offset("v"))

    def offset(self, name: Literal["q", "k", "v"]) -> int:
        """The first row of q, k or v in its map."""
        rows = {"q": 0, "k": self.heads * self.head_dim, "v": (self.heads + self.kv_heads) * self.head_dim}
        return rows[name] if self.family.fused else 0

    def positions(self, kind: Kind, layer: int, units: Sequence[int]) -> Tensor:
        """The rows or columns of some units, in their order."""
        _, _, size, offset = self.target(kind, layer)
        return offset + (torch.as_tensor(units, dtype=torch.long)[:, None] * size + torch.arange(size)).flatten()


def structure_of(model: nn.Module, families: str | Sequence[str] = AUTO) -> Structure:
    """The structure of a causal language model.

    Raises:
        ValueError: the model is of no family that is known (and allowed).
    """
    allowed = [family for family in FAMILIES if families == AUTO or family.name in ([families] if isinstance(families, str) else families)]
    for family in allowed:
        layers = _get(model, family.layers)
        if (
            isinstance(layers, nn.ModuleList)
            and len(layers)
            and all(_get(each, name) is not None for each in layers for name in family.members)
        ):
            return _measure(model, family, layers)
    found = sorted({type(module).__name__ for module in model.modules()})
    names = ", ".join(family.name for family in allowed) or f"none of {', '.join(family.name for family in FAMILIES)}"
    raise ValueError(
        f"{type(model).__name__} is of no known family ({names}); expected a Llama, Mistral, Qwen2, Gemma, OPT or GPT-2 "
        f"causal language model with unfused linear maps; its classes: {', '.join(found)}"
    )


def _measure(model: nn.Module, family: Family, layers: nn.ModuleList) -> Structure:
    config = cast(Any, model).config
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    widths = tuple(_width(_get(layer, family.down)) for layer in layers)
    return Structure(family, heads, kv_heads, head_dim, widths)


def _width(down: Any) -> int:
    return int(down.in_features if hasattr(down, "in_features") else down.nx)


def _get(module: nn.Module, path: str) -> Any:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def check_trainable(model: nn.Module, structure: Structure, *, in_place: bool) -> None:
    """TypeError on quantised weights that are to be changed in place; ValueError on weights that are shared or not in memory."""
    members = (structure.path(layer, name) for layer in structure.layers for name in structure.family.members)
    check_unshared(model, (model.get_submodule(path) for path in members))
    for layer in structure.layers:
        for kind in KINDS:
            path = structure.target(kind, layer).path
            linear = model.get_submodule(path)
            weight = getattr(linear, "weight", None)
            plain = isinstance(weight, Tensor) and weight.is_floating_point() and weight.dim() == 2 and type(linear).__name__ in PLAIN
            if in_place and not plain:
                raise TypeError(
                    f"{path} is a {type(linear).__name__} of {getattr(weight, 'dtype', 'no plain weight')}, which cannot be trained in place; "
                    f"expected an unquantised linear map: use S2FTConfig(in_place=False)"
                )
            if plain and weight is not None and weight.is_meta:
                raise ValueError(
                    f"{path} is not in memory (its weight is offloaded); expected it on a device: load the model without offloading"
                )


PLAIN = ("Linear", "NonDynamicallyQuantizableLinear", "Conv1D")


def shapes_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    """path -> (out, in) of every linear map; wrapped ones under their own path."""
    shapes = {}
    for name, module in model.named_modules():
        plain: Any = getattr(module, "base_layer", module)
        if hasattr(plain, "out_features") and hasattr(plain, "in_features"):
            shapes[name] = (int(plain.out_features), int(plain.in_features))
        elif type(plain).__name__ == "Conv1D":
            shapes[name] = (int(plain.nf), int(plain.nx))
    return shapes
