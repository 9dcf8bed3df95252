"""Layers: the released module, a causal sequence mixer, and a filter that streams."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fewer.checks import check_choice, check_whole
from fewer.signals.flash_fft_conv.conv import FLOATS, fft_conv
from fewer.signals.flash_fft_conv.plan import BACKENDS, Backend, default_factors, good_size, make_plan

DIRECT = 2**12  # taps times entries of a chunk up to which a stream is filtered by a sum


class FlashFFTConv(nn.Module):
    """The released module: a convolution by FFTs of size `seqlen`, circular for inputs of that length, causal for half of it.

    Args:
        seqlen: the FFT's size.
        dtype: what u must be, if it is to be checked.
        backend: "auto", "fft" (the machine's FFT, block by block), "monarch" (matrix products) or "triton" (a fused kernel, on a GPU).

    Examples:
        >>> conv = FlashFFTConv(8)
        >>> u, k = torch.randn(2, 3, 4), torch.randn(3, 4)
        >>> torch.allclose(conv(u, k), fft_conv(u, k), atol=1e-5)
        True
    """

    def __init__(self, seqlen: int, dtype: torch.dtype | None = None, backend: Backend = "auto") -> None:
        super().__init__()
        check_whole(seqlen=seqlen)
        check_choice(BACKENDS, backend=backend)
        if dtype is not None and dtype not in FLOATS:
            raise ValueError(f"dtype is {dtype}; expected a real floating-point type, such as torch.bfloat16, or None")
        self.seqlen, self.dtype = seqlen, dtype
        self.backend: Backend = backend

    def forward(
        self, u: Float[Tensor, "B H L"], k: Float[Tensor, "H K"], pregate: Tensor | None = None, postgate: Tensor | None = None
    ) -> Float[Tensor, "B H L"]:
        """postgate * ((pregate * u) conv k); L <= seqlen, K <= seqlen; both gates or none.

        Raises:
            ValueError: one gate alone, a longer u or k, another type than the module's, or a backend that cannot run there.
        """
        if (pregate is None) != (postgate is None):
            missing = "postgate" if postgate is None else "pregate"
            raise ValueError(f"{missing} is missing; expected both gates or none: call fft_conv for one alone")
        if u.shape[-1] > self.seqlen:
            raise ValueError(
                f"u has {u.shape[-1]} entries and seqlen is {self.seqlen}; expected L <= seqlen: make FlashFFTConv({u.shape[-1]})"
            )
        if self.dtype is not None and u.dtype != self.dtype:
            raise ValueError(f"u is {u.dtype} and the module's dtype {self.dtype}; expected the same: convert u, or leave dtype out")
        gates: dict[str, Any] = {"pregate": pregate, "postgate": postgate}
        if self.backend in ("auto", "fft") and u.device.type == "cpu":
            return fft_conv(u, k, n=self.seqlen, causal=False, **gates)
        plan = make_plan(self.seqlen, u[..., 0].numel(), u.device, u.dtype, backend=self.backend)
        return fft_conv(u, k, plan=plan, causal=False, **gates)

    def extra_repr(self) -> str:
        return f"{self.seqlen}, dtype={self.dtype}, backend={self.backend!r}"


class LongConv(nn.Module):
    """A causal mixer along the sequence, y = k conv u + skip * u, in place of a state-space or Hyena layer's convolution.

    Filters start as k[h, t] ~ N(0, 1/4) exp(-t / tau_h) / sqrt(tau_h), with tau_h from 2 to filter_length / 4, evenly in its logarithm
    (ours), and skip as 1.

    Args:
        channels: H.
        length: the longest input.
        filter_length: K, `length` by default; a shorter filter costs less (L log K).
        keep: frequencies that survive, as `fft_conv` takes them, of an FFT of the good size of at least 2 `length`.

    Examples:
        >>> LongConv(8, 100)(torch.randn(2, 8, 100)).shape
        torch.Size([2, 8, 100])
    """

    def __init__(self, channels: int, length: int, filter_length: int | None = None, keep: Sequence[int] | None = None) -> None:
        super().__init__()
        check_whole(channels=channels, length=length)
        filter_length = length if filter_length is None else filter_length
        check_whole(filter_length=filter_length)
        if filter_length > length:
            raise ValueError(f"filter_length is {filter_length} and length {length}; expected at most that: leave it out")
        self.length = length
        self.n = good_size(2 * length) if keep is not None else None
        self.keep = None if keep is None else tuple(keep)
        if keep is not None:
            make_plan(good_size(2 * length), channels, keep=keep, factors=default_factors(good_size(2 * length), keep))
        self.k = nn.Parameter(torch.empty(channels, filter_length))
        self.skip = nn.Parameter(torch.ones(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        channels, taps = self.k.shape
        decay = torch.logspace(math.log2(2), math.log2(max(taps / 4, 2)), channels, base=2.0)[:, None]
        with torch.no_grad():
            self.k.copy_(0.5 * torch.randn(channels, taps) * torch.exp(-torch.arange(taps) / decay) / decay.sqrt())
            self.skip.fill_(1.0)

    def forward(self, u: Float[Tensor, "B H L"], pregate: Tensor | None = None, postgate: Tensor | None = None) -> Float[Tensor, "B H L"]:
        """postgate * mixed(pregate * u), the skip inside of the gates."""
        if u.shape[-1] > self.length:
            raise ValueError(f"u has {u.shape[-1]} entries; expected at most {self.length}: make LongConv with a larger length")
        k = self.k[:, : u.shape[-1]]
        if self.keep is None:  # the skip is the filter's first tap
            return fft_conv(u, torch.cat([k[:, :1] + self.skip[:, None], k[:, 1:]], 1), pregate=pregate, postgate=postgate)
        around = u if pregate is None else pregate * u
        around = self.skip.to(u.dtype)[:, None] * (around if postgate is None else postgate * around)
        return fft_conv(u, k, keep=self.keep, n=self.n, pregate=pregate, postgate=postgate) + around

    def extra_repr(self) -> str:
        return f"{self.k.shape[0]}, {self.length}, filter_length={self.k.shape[1]}, keep={self.keep}"


class StreamingConv(nn.Module):
    """A causal filter over a sequence that comes in chunks of any sizes: K - 1 inputs of each channel are all it remembers.

    Args:
        k: [H, K].

    Examples:
        >>> stream = StreamingConv(torch.tensor([[1.0, 10.0]]))
        >>> u = torch.tensor([[[1.0, 2.0, 3.0]]])
        >>> stream.step(u[..., :1]), stream.step(u[..., 1:])
        (tensor([[[1.]]]), tensor([[[12., 23.]]]))
    """

    k: Tensor
    past: Tensor | None

    def __init__(self, k: Float[Tensor, "H K"]) -> None:
        super().__init__()
        if k.ndim != 2 or 0 in k.shape or k.dtype not in FLOATS:
            raise ValueError(f"k is {k.dtype} of shape {tuple(k.shape)}; expected real numbers [H, K]: a filter a channel")
        self.register_buffer("k", k.detach().clone())
        self.register_buffer("past", None)

    def reset(self) -> None:
        """Forget what came before."""
        self.past = None

    @torch.no_grad()
    def step(self, chunk: Float[Tensor, "B H C"]) -> Float[Tensor, "B H C"]:
        """The outputs of the next entries.

        Raises:
            ValueError: another number of channels, or of rows than before.
        """
        channels, taps = self.k.shape
        if chunk.ndim != 3 or chunk.shape[1] != channels or 0 in chunk.shape:
            raise ValueError(
                f"the chunk has shape {tuple(chunk.shape)}; expected [B, {channels}, C] with C >= 1: k has {channels} channels"
            )
        past = chunk.new_zeros(*chunk.shape[:2], taps - 1) if self.past is None else self.past
        if past.shape[0] != chunk.shape[0]:
            raise ValueError(
                f"the chunk has {chunk.shape[0]} rows and the stream {past.shape[0]}; expected the same: reset() starts another"
            )
        u = torch.cat([past.to(chunk.dtype), chunk], -1)
        self.past = u[..., u.shape[-1] - taps + 1 :].clone()
        if taps * chunk.shape[-1] <= DIRECT:
            wide = torch.promote_types(u.dtype, self.k.dtype)
            return torch.einsum("bhck,hk->bhc", u.to(wide).unfold(-1, taps, 1), self.k.flip(-1).to(wide)).to(chunk.dtype)
        return fft_conv(u, self.k)[..., taps - 1 :]

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *words: Any) -> None:
        past = state.get(prefix + "past")
        if past is not None and (past.ndim != 3 or past.shape[1:] != (self.k.shape[0], self.k.shape[1] - 1)):
            raise ValueError(
                f"past has shape {tuple(past.shape)}; expected [B, {self.k.shape[0]}, {self.k.shape[1] - 1}]: load another state"
            )
        self.past = None if past is None else torch.empty_like(past)  # as many rows as the state has
        super()._load_from_state_dict(state, prefix, *words)
