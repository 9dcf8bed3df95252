"""What was left out, counted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor


@dataclass(eq=False)
class FFNSkipStats:
    """Counts of an enabled model; they go on while it decodes. Padding counts nowhere; rows that have ended and go on being fed do.

    Attributes:
        num_layers: L.
        flops_per_block: multiplications and additions of one FFN for one token (6 H I).
        keeps_tokens: whether `per_token` is kept.
        passes: forward passes in which somebody might skip.
    """

    num_layers: int
    flops_per_block: int
    keeps_tokens: bool = False
    passes: int = 0
    _tokens: Any = 0  # sums stay on the model's device until they are asked for
    _decoded: Any = 0
    _skipped: list[Any] = field(default_factory=list)
    _untouched: int = 0
    _kept: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._skipped = self._skipped or [0] * self.num_layers

    def begin_pass(self, real: Tensor, may_skip: Tensor | None) -> None:
        """A pass over decoded tokens begins. real, may_skip: bool [B, T]; None where nobody may."""
        self._decoded = self._decoded + real.sum()
        if may_skip is not None:
            self.passes += 1
            self._tokens = self._tokens + may_skip.sum()
        if self.keeps_tokens:
            self._kept.append(torch.zeros(*real.shape, self.num_layers, dtype=torch.bool, device=real.device))

    def add(self, layer: int, skipped: Tensor, untouched: bool) -> None:
        """A layer was passed: bool [B, T], and whether no token at all came to its FFN."""
        self._skipped[layer] = self._skipped[layer] + skipped.sum()
        self._untouched += untouched
        if self.keeps_tokens:
            self._kept[-1][..., layer] = skipped

    @property
    def tokens(self) -> int:
        """Tokens after the warm-up, those that might skip."""
        return int(self._tokens)

    @property
    def decoded_tokens(self) -> int:
        """Tokens after the prompt, warm-up and all (with the prompt's where those may skip; of a text that is read, all)."""
        return int(self._decoded)

    @property
    def per_layer(self) -> list[int]:
        """How many tokens left out each layer's FFN."""
        return [int(count) for count in self._skipped]

    @property
    def skipped_blocks(self) -> int:
        """FFN blocks left out, one a token and layer."""
        return sum(self.per_layer)

    @property
    def ratio(self) -> float:
        """Skipped blocks / (L x tokens after the warm-up), of all layers, the cold ones too."""
        return self.skipped_blocks / max(1, self.num_layers * self.tokens)

    @property
    def ratio_all(self) -> float:
        """The same over all decoded tokens."""
        return self.skipped_blocks / max(1, self.num_layers * self.decoded_tokens)

    @property
    def untouched_ratio(self) -> float:
        """The share of (pass after the warm-up, layer) in which no row came to the FFN: only these save reading its weights."""
        return self._untouched / max(1, self.num_layers * self.passes)

    @property
    def ffn_flops_saved(self) -> int:
        """Multiplications and additions that were not done."""
        return self.skipped_blocks * self.flops_per_block

    @property
    def per_token(self) -> Bool[Tensor, "B T L"]:
        """Which blocks each decoded token left out, in the order of decoding.

        Raises:
            ValueError: they were not kept, or the number of rows changed.
        """
        if not self.keeps_tokens:
            raise ValueError("skips were not kept token by token; expected a model enabled with per_token=True: enable it so")
        rows = {len(each) for each in self._kept}
        if len(rows) > 1:
            raise ValueError(f"the passes had {sorted(rows)} rows; expected as many in all: enable anew for each generation")
        return torch.cat(self._kept, dim=1) if self._kept else torch.zeros(0, 0, self.num_layers, dtype=torch.bool)
