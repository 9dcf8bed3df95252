"""The one-dimensional convolutional network of sequences: a model of flows, or with pooled outputs a classifier."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from fewer.checks import check_whole
from fewer.files import whole_file

EMBEDDING = 32


class SequenceCNN(nn.Module):
    """Residual dilated convolutions, the time added in each layer; positions whose row is all zeros are padding and stay empty.

    Args:
        num_classes: letters, K.
        width: channels.
        kernel: positions of a kernel, odd.
        dilations: one layer each.
        outputs: None: logits [B, L, K], a model of flows; a number: [B, outputs], a classifier over real positions' mean.
        condition: entries of `cond` [B, condition]; 0: none is taken.

    Called with x [B, L, K], t [B] (None: 0) and cond.
    """

    def __init__(
        self,
        num_classes: int,
        width: int = 48,
        kernel: int = 5,
        dilations: Sequence[int] = (1, 2, 4),
        outputs: int | None = None,
        condition: int = 0,
    ) -> None:
        super().__init__()
        check_whole(num_classes=num_classes, width=width, kernel=kernel)
        check_whole(least=0, condition=condition)
        check_whole(optional=["outputs"], outputs=outputs)
        if kernel % 2 == 0:
            raise ValueError(f"kernel is {kernel}; expected an odd number, so that a position is a kernel's middle")
        self.config: dict[str, Any] = {
            "num_classes": num_classes, "width": width, "kernel": kernel, "dilations": list(dilations), "outputs": outputs, "condition": condition,
        }  # fmt: skip
        self.enter = nn.Conv1d(num_classes, width, kernel, padding=kernel // 2)
        self.condition = nn.Linear(condition, EMBEDDING) if condition else None
        self.times = nn.ModuleList(nn.Linear(EMBEDDING, width) for _ in dilations)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in dilations)
        self.layers = nn.ModuleList(nn.Conv1d(width, width, kernel, dilation=d, padding=d * (kernel // 2)) for d in dilations)
        self.leave = nn.Linear(width, num_classes if outputs is None else outputs)

    def forward(self, x: Float[Tensor, "B L K"], t: Tensor | None = None, cond: Tensor | None = None) -> Tensor:
        if x.ndim != 3 or x.shape[-1] != self.config["num_classes"]:
            raise ValueError(f"x is {tuple(x.shape)}; expected [B, L, {self.config['num_classes']}]: one row of shares a position")
        if (cond is None) != (self.condition is None):
            raise ValueError(
                f"cond is {'missing' if cond is None else 'given'}; this network was built with condition={self.config['condition']}"
            )
        x = x.to(self.enter.weight.dtype)
        real = (x.sum(-1, keepdim=True) > 0).to(x)
        e = time_embedding(torch.zeros(len(x), device=x.device) if t is None else t).to(x)
        if self.condition is not None and cond is not None:
            e = e + self.condition(cond.to(x))
        h = self.enter(x.mT).mT * real
        for time, norm, layer in zip(self.times, self.norms, self.layers, strict=True):
            h = h + F.silu(layer((norm(h + time(e)[:, None]) * real).mT)).mT * real
        if self.config["outputs"] is None:
            return self.leave(h)
        return self.leave(h.sum(1) / real.sum(1).clamp_min(1))

    def save(self, file: str | Path, overwrite: bool = False) -> None:
        """As safetensors with its sizes, whole or not at all."""
        with whole_file(file, overwrite, option="file") as part:
            save_file(
                {name: value.contiguous() for name, value in self.state_dict().items()}, part, {"sequence_cnn": json.dumps(self.config)}
            )

    @classmethod
    def load(cls, file: str | Path) -> SequenceCNN:
        """What `save` wrote, in eval mode; nothing in the file is run.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is no network of this kind.
        """
        if not Path(file).is_file():
            raise FileNotFoundError(f"{file} is no file; expected a network that SequenceCNN.save wrote")
        try:
            with safe_open(str(file), "pt") as opened:
                said = (opened.metadata() or {})["sequence_cnn"]
                state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
            net = cls(**json.loads(said))
            net.load_state_dict(state)
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError, OSError) as error:
            why = " ".join(str(error).split())[:200]
            raise ValueError(f"{file} is no network of sequences ({why}); expected one that SequenceCNN.save wrote") from error
        return net.to(next(iter(state.values())).dtype).eval()


def time_embedding(t: Float[Tensor, "B"]) -> Float[Tensor, "B 32"]:
    """Cosines and sines of t at frequencies from 1 to 1000."""
    frequencies = torch.exp(torch.linspace(0, math.log(1000), EMBEDDING // 2, device=t.device))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)
