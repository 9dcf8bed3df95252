"""Velocity fields: a small MLP with a clock, and a frozen field with a residual added."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fewer.checks import check_whole
from fewer.diffusion.flow_mle.solver import Field, bound
from fewer.files import made_whole, read_json, read_weights

PAIRS = 8  # of sine and cosine
CONFIG, WEIGHTS = "config.json", "model.safetensors"


def clock(t: Float[Tensor, "B"], pairs: int = PAIRS) -> Float[Tensor, "B 2*pairs"]:
    """Sines and cosines of pi k t, k = 1 .. pairs."""
    angles = t.to(torch.promote_types(t.dtype, torch.float32))[:, None] * math.pi * torch.arange(1, pairs + 1, device=t.device)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def as_rows(x: Float[Tensor, "B *shape"]) -> Float[Tensor, "B d"]:
    """Each sample as a row, be it a single number."""
    return x.flatten(1) if x.ndim > 1 else x[:, None]


def with_clock(t: Tensor, x: Tensor | None, cond: Tensor | None, cond_dim: int) -> Tensor:
    """Rows of x (where given), cond and the clock, side by side."""
    c = None if cond is None else as_rows(cond)
    if (0 if c is None else c.shape[1]) != cond_dim:
        given = "none" if c is None else f"{c.shape[1]} numbers a row"
        raise ValueError(f"the condition has {given}; expected {cond_dim} numbers a row: give cond of [B, {cond_dim}]")
    parts = [each for each in (x, c) if each is not None]
    dtype = parts[0].dtype if parts else t.dtype
    return torch.cat([*(each.to(dtype) for each in parts), clock(t).to(dtype)], dim=1)


class VelocityMLP(nn.Module):
    """v(t, x, cond): three hidden layers of SiLU on (x, cond, clock).

    Args:
        dim: numbers of a sample; samples of other shapes are flattened and come back in their own.
        cond_dim: numbers of a condition; 0: none is taken.
        width: of the hidden layers.
        residual: whether the last layer is zero at first, as that of an added residual must be.
    """

    def __init__(self, dim: int, cond_dim: int = 0, width: int = 128, residual: bool = False) -> None:
        super().__init__()
        check_whole(dim=dim, width=width)
        check_whole(least=0, cond_dim=cond_dim)
        self.config = {"dim": dim, "cond_dim": cond_dim, "width": width, "residual": residual}
        sizes = [dim + cond_dim + 2 * PAIRS, width, width, width]
        hidden = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, dim))
        if residual:
            silence(self.layers[-1])

    def forward(self, t: Float[Tensor, "B"], x: Float[Tensor, "B *shape"], cond: Tensor | None = None) -> Float[Tensor, "B *shape"]:
        return self.layers(with_clock(t, x.flatten(1), cond, self.config["cond_dim"])).reshape(x.shape)

    def save_pretrained(self, folder: str | Path, overwrite: bool = False, **more: Any) -> None:
        """Its sizes (and `more`, such as the steps it was tuned for) and weights into a folder, whole or not at all."""
        from safetensors.torch import save_file

        with made_whole(folder, overwrite, option="folder") as part:
            (part / CONFIG).write_text(json.dumps({"model": "VelocityMLP", "sizes": self.config, **more}, indent=1) + "\n", "utf8")
            save_file({name: value.contiguous() for name, value in self.state_dict().items()}, part / WEIGHTS)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> VelocityMLP:
        """What `save_pretrained` wrote, in eval mode; nothing in the folder is run.

        Raises:
            FileNotFoundError, ValueError: it is no such folder.
        """
        sizes = read_json(Path(folder) / CONFIG)
        if sizes.get("model") != "VelocityMLP" or not isinstance(sizes.get("sizes"), dict):
            raise ValueError(f"{folder} holds {sizes.get('model')!r}; expected a VelocityMLP as save_pretrained writes it")
        try:
            net = cls(**sizes["sizes"])
            weights = read_weights(Path(folder) / WEIGHTS)
            net.to(dtype_of(weights)).load_state_dict(weights)
        except (TypeError, RuntimeError) as error:
            raise ValueError(f"{folder} does not fit its own sizes ({' '.join(str(error).split())[:200]}); write it again") from error
        return net.eval()


def dtype_of(weights: dict[str, Tensor]) -> torch.dtype:
    """That of the first weights that are no whole numbers."""
    return next((each.dtype for each in weights.values() if each.is_floating_point()), torch.get_default_dtype())


def silence(layer: nn.Module) -> None:
    """All weights of a layer to zero."""
    with torch.no_grad():
        for weight in layer.parameters():
            weight.zero_()


class ResidualField(nn.Module):
    """w = v + r: a base field and what is added to it. Where r is zero, w is v bit for bit.

    Args:
        base: any field; it is not changed (freeze it with `requires_grad_(False)`, as `finetune` does with its own copy).
        residual: of the same signature, such as `VelocityMLP(..., residual=True)` or `ContractingResidual`.

    As a plain module its `state_dict` has both, so that the sum is kept and moved as one.
    """

    def __init__(self, base: nn.Module, residual: nn.Module) -> None:
        super().__init__()
        self.base, self.residual = base, residual

    def forward(self, t: Tensor, x: Tensor, cond: Any = None) -> Tensor:
        return self.bound()(t, x, cond)

    def bound(self) -> Field:
        """The field with the residual's constants computed, for one solve."""
        base, residual = bound(self.base), bound(self.residual)

        def field(t: Tensor, x: Tensor, cond: Any = None) -> Tensor:
            given = () if cond is None else (cond,)
            return base(t, x, *given) + residual(t, x, *given)

        return field
