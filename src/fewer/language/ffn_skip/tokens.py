"""How the tokens of one forward pass stand as they go up the layers: who leaves out the next feed-forward block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor
from torch.nn import functional as F

from fewer.language.ffn_skip.config import FFNSkipConfig

LOW = 0xFFFFFFFF  # 32 bits


def similarity(before: Float[Tensor, "*N H"], after: Float[Tensor, "*N H"]) -> Float32[Tensor, "*N"]:
    """cos(h', h' + FFN(norm2(h'))): a token's state before its FFN against after the sum, -1 to 1.

    In float32 whatever the states are: near 1, where decisions fall, bfloat16 knows nothing between 0.996 and 1.
    """
    return F.cosine_similarity(before.float(), after.float(), dim=-1).clamp(-1, 1)


def uniform(seed: int, layer: int, ids: Int64[Tensor, "*N"], positions: Int64[Tensor, "*N"]) -> Float64[Tensor, "*N"]:
    """Numbers in [0, 1) that follow from these alone, so that a row draws the same alone and in a batch, read at once or token by token."""
    mixed = torch.full_like(positions, seed & LOW)
    for each in (seed >> 32 & LOW, layer, ids, positions):
        mixed = _mix((mixed + each * 0x9E3779B1 + 0x7F4A7C15) & LOW)
    return mixed.double() / 2**32


def _mix(x: Tensor) -> Tensor:
    """MurmurHash3's last steps; products pass 64 bits, their lowest 32 are right all the same."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & LOW
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & LOW
    return x ^ (x >> 16)


@dataclass
class Tokens:
    """The tokens of a pass, all of them at the same layer.

    Attributes:
        config: when they skip.
        may_skip: bool [B, T], those after the warm-up.
        ids, positions: int64 [B, T], what "random" draws by.
        skip_state: bool [B, T], those that have met the threshold in this pass.
        left: int64 [B, T], how many layers each of these still skips, where that is limited.
    """

    config: FFNSkipConfig
    may_skip: Bool[Tensor, "B T"]
    ids: Int64[Tensor, "B T"]
    positions: Int64[Tensor, "B T"]

    def __post_init__(self) -> None:
        self.skip_state = torch.zeros_like(self.may_skip)
        if self.config.max_skips is not None:
            self.left = torch.full(self.may_skip.shape, self.config.max_skips, device=self.may_skip.device)

    def skip(self, layer: int) -> Bool[Tensor, "B T"]:
        """Who leaves out this layer's FFN, a layer between the cold regions."""
        config = self.config
        if config.mode == "adaptive":
            return self.skip_state if config.max_skips is None else self._skip_at_most(config.max_skips)
        if config.mode == "random":
            return self.may_skip & (uniform(config.seed, layer, self.ids, self.positions) < config.p)
        return self.may_skip & (layer in config.static_layers)

    def _skip_at_most(self, k: int) -> Bool[Tensor, "B T"]:
        skip = self.skip_state & (self.left > 0)
        self.left = self.left - skip.long()
        if self.config.rearm:
            done = skip & (self.left == 0)
            self.skip_state = self.skip_state & ~done
            self.left = torch.where(done, k, self.left)
        return skip

    def watch(self, layer: int, h: Float[Tensor, "B T H"], h_out: Float[Tensor, "B T H"], skip: Bool[Tensor, "B T"]) -> None:
        """After a layer that some did not `skip`: those of them that it hardly turned skip from the next one on."""
        if self.config.mode != "adaptive" or layer + 1 == self.config.cold_end:  # the last one's similarity decides nothing
            return
        watched = self.may_skip & ~(self.skip_state | skip)
        if self.config.max_skips is None or watched.any():  # without a limit, one that ran is watched: a GPU need not be asked
            self.skip_state = self.skip_state | (watched & (similarity(h, h_out) >= self.config.threshold))
