"""Codes as a stream of bits, without holes: the first value lowest."""

from __future__ import annotations

import torch
from torch import Tensor

from fewer.lowbit._shared.formats import piece_size


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes, one a byte, as a stream of bits, the first value lowest: two of 4 bits a byte, four of 6 bits in three bytes.

    >>> pack(torch.tensor([1, 2, 3], dtype=torch.uint8), 4)
    tensor([33,  3], dtype=torch.uint8)
    """
    codes = codes.reshape(-1)
    if bits == 8:
        return codes.clone()
    if bits == 4:
        low, high = torch.nn.functional.pad(codes, (0, codes.numel() % 2)).view(-1, 2).unbind(1)
        return (high << 4).bitwise_or_(low)
    out = torch.empty(-(-codes.numel() * bits // 8), dtype=torch.uint8, device=codes.device)
    size = 8 * piece_size(codes)
    for start in range(0, codes.numel(), size):
        part = codes[start : start + size]
        groups = torch.nn.functional.pad(part, (0, -part.numel() % 8)).view(-1, 8).long()
        words = (groups << (bits * torch.arange(8, device=codes.device))).sum(1)
        packed = words.view(torch.uint8).view(-1, 8)[:, :bits].reshape(-1)
        place = out[start * bits // 8 :][: packed.numel()]
        place.copy_(packed[: place.numel()])
    return out


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The `count` codes of a stream of bits, one a byte; undoes `pack`.

    >>> unpack(torch.tensor([33, 3], dtype=torch.uint8), 4, 3)
    tensor([1, 2, 3], dtype=torch.uint8)
    """
    if bits == 8:
        return packed.clone()
    out = torch.empty(count, dtype=torch.uint8, device=packed.device)
    size = 8 * piece_size(out)
    for start in range(0, count, size):
        part = packed[start * bits // 8 :][: size * bits // 8]
        groups = torch.nn.functional.pad(part, (0, -part.numel() % bits)).view(-1, bits)
        words = torch.nn.functional.pad(groups, (0, 8 - bits)).view(torch.int64).view(-1, 1)
        codes = (words >> (bits * torch.arange(8, device=packed.device))).bitwise_and_((1 << bits) - 1).to(torch.uint8).view(-1)
        place = out[start : start + size]
        place.copy_(codes[: place.numel()])
    return out
