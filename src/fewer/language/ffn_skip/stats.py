"""What was left out, counted."""

from __future__ import annotations

from dataclasses import dataclass, field

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
        tokens: those after the warm-up, which might skip.
        decoded_tokens: those after the prompt, warm-up and all (with the prompt's where these may skip; of a text that is read, all).
        passes: forward passes in which somebody might skip.
        untouched: of (pass, layer), those in which no row came to the FFN.
        per_layer: how many tokens left out each layer's FFN.
    """

    num_layers: int
    flops_per_block: int
    keeps_tokens: bool = False
    tokens: int = 0
    decoded_tokens: int = 0
    passes: int = 0
    untouched: int = 0
    per_layer: list[int] = field(default_factory=list)
    _kept: list[Tensor] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        self.per_layer = self.per_layer or [0] * self.num_layers

    def begin_pass(self, shape: tuple[int, int], decoded: int, after_warm_up: int) -> None:
        """A pass over decoded tokens [B, T] begins: how many are no padding, and how many of these may skip."""
        self.decoded_tokens += decoded
        self.tokens += after_warm_up
        self.passes += after_warm_up > 0
        if self.keeps_tokens:
            self._kept.append(torch.zeros(*shape, self.num_layers, dtype=torch.bool))

    def add(self, layer: int, skip: Bool[Tensor, "B T"], skipped: int) -> None:
        """A layer was passed: who left out its FFN, and how many these are."""
        self.per_layer[layer] += skipped
        self.untouched += skipped == skip.numel()
        if self.keeps_tokens:
            self._kept[-1][..., layer] = skip.cpu()

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
        return self.untouched / max(1, self.num_layers * self.passes)

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
        rows = {len(each) for each in self._kept}
        if not self.keeps_tokens:
            raise ValueError("skips were not kept token by token; expected a model enabled with per_token=True: enable it so")
        if len(rows) > 1:
            raise ValueError(f"the passes had {sorted(rows)} rows; expected as many in all: enable anew for each generation")
        return torch.cat(self._kept, dim=1) if self._kept else torch.zeros(0, 0, self.num_layers, dtype=torch.bool)
