"""The convolution block by block: gate, frames, transform, product, inverse, slice and gate of a few rows while they stay in cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fewer.signals.flash_fft_conv import monarch
from fewer.signals.flash_fft_conv.monarch import Factors
from fewer.signals.flash_fft_conv.plan import Plan
from fewer.signals.flash_fft_conv.vendor_fft import VendorFFT


@dataclass(frozen=True)
class Job:
    """What is convolved: the plan, and what of the spectrum survives.

    Attributes:
        causal: whether a plan's size below L + K - 1 means frames (overlap-save); else, and where `wraps`, it is one circular transform.
        keep, low_pass: as `fft_conv` takes them.
    """

    plan: Plan
    causal: bool = True
    wraps: bool = False
    keep: Factors = ()
    low_pass: int = 0

    def frames(self, length: int, taps: int) -> Frames:
        n = self.plan.n
        if n >= length + taps - 1 or self.wraps or not self.causal:
            return Frames(n, 0, length, 1)
        step = n - taps + 1
        return Frames(n, taps - 1, step, -(-length // step))


@dataclass(frozen=True)
class Frames:
    """How a row is cut: `count` windows of n entries, each `step` after the last; a window's first `lead` results are thrown away."""

    n: int
    lead: int
    step: int
    count: int

    def windows(self, x: Tensor, gate: Tensor | None, first: int, count: int, dtype: torch.dtype) -> Tensor:
        """Windows [..., count, n] of gate * x from number `first` on, zero where x is not: a view of one buffer."""
        start = first * self.step - self.lead
        width = (count - 1) * self.step + self.n
        buffer = x.new_empty(*x.shape[:-1], width, dtype=dtype)
        left, right = max(start, 0), min(start + width, x.shape[-1])
        buffer[..., : left - start] = 0
        buffer[..., right - start :] = 0
        _gated(x[..., left:right], None if gate is None else gate[..., left:right], buffer[..., left - start : right - start])
        return buffer.unfold(-1, self.n, self.step)

    def results(self, windows: Tensor, length: int) -> Tensor:
        """The first `length` results that windows [..., count, n] hold, one after the other."""
        kept = windows[..., self.lead : self.lead + self.step]
        return (kept[..., 0, :] if kept.shape[-2] == 1 else kept.flatten(-2))[..., :length]

    def scattered(self, x: Tensor, gate: Tensor | None, first: int, count: int, dtype: torch.dtype) -> Tensor:
        """The transpose of `results`: each window [..., count, n] holds its share of gate * x where its results stand, and zeros."""
        start = first * self.step
        right = min(start + count * self.step, x.shape[-1])
        apart = x.new_zeros(*x.shape[:-1], count, self.n, dtype=dtype)
        if count == 1:
            place = apart[..., 0, self.lead : self.lead + right - start]
            _gated(x[..., start:right], None if gate is None else gate[..., start:right], place)
        else:
            joined = x.new_zeros(*x.shape[:-1], count * self.step, dtype=dtype)
            _gated(x[..., start:right], None if gate is None else gate[..., start:right], joined[..., : right - start])
            apart[..., self.lead : self.lead + self.step] = joined.unflatten(-1, (count, self.step))
        return apart

    def add_back(self, total: Tensor, windows: Tensor, first: int) -> None:
        """The transpose of `windows`: add each window [..., count, n] to total [..., lead + ...] where it was cut from."""
        count, start = windows.shape[-2], first * self.step
        if count == self.count == 1:
            total += windows[..., 0, : total.shape[-1]]
            return
        room = count * self.step
        if self.lead:
            total[..., start : start + room].unflatten(-1, (count, self.step))[..., : self.lead] += windows[..., : self.lead]
        total[..., start + self.lead : start + self.lead + room].unflatten(-1, (count, self.step)).add_(windows[..., self.lead :])


class Plain:
    """Monarch transforms of real rows, each as a complex one: for `keep`, whose set of frequencies is not symmetric, and for odd sizes."""

    def __init__(self, factors: Factors, keep: Factors = (), weight: Tensor | None = None) -> None:
        self.factors, self.keep, self.weight = factors, keep, weight

    def analyse(self, x: Tensor) -> Tensor:
        return monarch.monarch_dft(x, self.factors, self.keep).flatten(-len(self.factors))

    def synthesise(self, spectrum: Tensor) -> Tensor:
        _, kept = monarch.check_factors(self.factors, self.keep)
        return monarch.monarch_idft(spectrum.unflatten(-1, kept), self.factors).real

    def filter(self, k: Tensor) -> Tensor:
        spectrum = self.analyse(k)
        return spectrum if self.weight is None else spectrum * self.weight

    def taps(self, spectrum: Tensor) -> Tensor:
        return self.synthesise(spectrum if self.weight is None else spectrum * self.weight)


class Pairs(Plain):
    """Two rows b, b' of a channel as u_b + i u_b': the filter is real, so that both results come out apart."""

    def analyse(self, x: Tensor) -> Tensor:
        return super().analyse(torch.complex(x[0::2], x[1::2]))

    def synthesise(self, spectrum: Tensor) -> Tensor:
        z = monarch.monarch_idft(spectrum.unflatten(-1, self.factors), self.factors)
        return torch.stack([z.real, z.imag], 1).flatten(0, 1)

    def filter(self, k: Tensor) -> Tensor:
        return Plain.analyse(self, k)

    def taps(self, spectrum: Tensor) -> Tensor:
        return Plain.synthesise(self, spectrum)  # the real part: u_b with g_b, and u_b' with g_b'


class Halves(Plain):
    """A row of even length N through a complex transform of N/2, for a batch that cannot be paired."""

    def analyse(self, x: Tensor) -> Tensor:
        return monarch.real_dft(x, self.factors)

    def synthesise(self, spectrum: Tensor) -> Tensor:
        return monarch.real_idft(spectrum, self.factors)


Transform = VendorFFT | Plain


def transform_for(job: Job, batch: int, dtype: torch.dtype, device: str) -> Transform:
    """How a block of so many rows a channel goes to frequencies and back."""
    n, factors = job.plan.n, job.plan.factors
    if job.plan.backend == "fft":
        weight = monarch.kept_mask(factors, job.keep).to(device, dtype) if job.keep else None
        return VendorFFT(n, job.low_pass, weight)
    if job.low_pass:
        raise ValueError(f"low_pass is {job.low_pass} with backend='monarch'; expected None there: use keep, or backend='fft'")
    if job.keep:
        return Plain(factors, job.keep, monarch.kept_weights(factors, job.keep).to(device, dtype))
    if batch % 2 == 0:
        return Pairs(factors)
    return Halves(_half(factors)) if n % 2 == 0 else Plain(factors)


def _half(factors: Factors) -> Factors:
    """Factors of N/2: the first even one halved."""
    at = next(i for i, factor in enumerate(factors) if factor % 2 == 0)
    return (*factors[:at], factors[at] // 2, *factors[at + 1 :])


def _blocks(batch: int, channels: int, rows: int, paired: bool) -> Iterator[tuple[slice, list[slice]]]:
    """Blocks of about `rows` rows: channels, and for each of them the parts of the batch (even ones where rows go in pairs)."""
    deep = -(-batch // -(-batch // rows))  # parts of equal size
    if paired and batch % 2 == 0:
        deep = max(2, deep // 2 * 2)
    broad = max(1, rows // deep)
    for h in range(0, channels, broad):
        yield slice(h, h + broad), [slice(b, b + deep) for b in range(0, batch, deep)]


def _parts(frames: Frames, rows: int) -> list[tuple[int, int]]:
    """(first, count) of the frames that are worked on at a time, where one row has more than a block is to hold."""
    return [(first, min(rows, frames.count - first)) for first in range(0, frames.count, rows)]


def _working(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(each.dtype == torch.float64 for each in tensors) else torch.float32


def convolve(u: Tensor, k: Tensor, pregate: Tensor | None, postgate: Tensor | None, skip: Tensor | None, job: Job) -> Tensor:
    """postgate * ((pregate * u) conv k) + skip * u of u [B, H, L] and k [H, K], in blocks of the plan's rows."""
    (batch, channels, length), dtype = u.shape, _working(u, k)
    frames = job.frames(length, k.shape[-1])
    out = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    transform = transform_for(job, batch, dtype, str(u.device))
    rows = min(job.plan.block_rows, batch * channels)  # one frame of many rows is a plain block; several of one are copied apart
    for h, parts in _blocks(batch, channels, rows, job.plan.backend == "monarch"):
        spectrum = transform.filter(k[h].to(dtype))[:, None]
        for b in parts:
            for first, count in _parts(frames, job.plan.block_rows // rows):
                here = slice(first * frames.step, min((first + count) * frames.step, length))
                x = transform.analyse(frames.windows(u[b, h], None if pregate is None else pregate[b, h], first, count, dtype))
                y = frames.results(transform.synthesise(x.mul_(spectrum)), here.stop - here.start)
                place = out[b, h, here]
                if skip is None:
                    _gated(y, None if postgate is None else postgate[b, h, here], place)
                else:
                    y = y if postgate is None else y * postgate[b, h, here]
                    place.copy_(torch.addcmul(y, skip[h, None].to(dtype), u[b, h, here].to(dtype)))
    return out


@dataclass(frozen=True)
class Wanted:
    """Which gradients are asked for."""

    u: bool = True
    k: bool = True
    pregate: bool = False
    postgate: bool = False
    skip: bool = False


def gradients(
    dout: Tensor, u: Tensor, k: Tensor, pregate: Tensor | None, postgate: Tensor | None, skip: Tensor | None, job: Job, wanted: Wanted
) -> dict[str, Tensor]:
    """The gradients of `convolve` by name; spectra are made anew, block by block, and the filter's is summed in the working precision."""
    (batch, channels, length), taps, dtype = u.shape, k.shape[-1], _working(u, k)
    frames = job.frames(length, taps)
    transform = transform_for(job, batch, dtype, str(u.device))
    like = {"u": u, "k": k, "pregate": pregate, "postgate": postgate, "skip": skip}
    found = {
        name: torch.zeros(each.shape, dtype=each.dtype, device=each.device)
        if name == "skip"
        else torch.empty_like(each, memory_format=torch.contiguous_format)
        for name, each in like.items()
        if each is not None and getattr(wanted, name)
    }
    rows = min(job.plan.block_rows, batch * channels)  # one frame of many rows is a plain block; several of one are copied apart
    for h, parts in _blocks(batch, channels, rows, job.plan.backend == "monarch"):
        spectrum = transform.filter(k[h].to(dtype))[:, None]
        conjugate = spectrum.conj().resolve_conj()
        summed: Tensor | None = None
        for b in parts:
            before = None if pregate is None else pregate[b, h]
            behind = None if postgate is None else postgate[b, h]
            dx = u.new_zeros(u[b, h].shape[0], u[b, h].shape[1], frames.lead + frames.count * frames.step, dtype=dtype)
            for first, count in _parts(frames, job.plan.block_rows // rows):
                here = slice(first * frames.step, min((first + count) * frames.step, length))
                if wanted.k or "postgate" in found:
                    x = transform.analyse(frames.windows(u[b, h], before, first, count, dtype))
                    if "postgate" in found:
                        y = frames.results(transform.synthesise(x * spectrum), here.stop - here.start)
                        _gated(y, dout[b, h, here], found["postgate"][b, h, here])
                g = transform.analyse(frames.scattered(dout[b, h], behind, first, count, dtype))
                if wanted.k:
                    part = x.conj_physical_().mul_(g).sum((0, 2))  # pyright: ignore[reportPossiblyUnboundVariable]
                    summed = part if summed is None else summed.add_(part)
                if wanted.u or "pregate" in found:
                    frames.add_back(dx, transform.synthesise(g.mul_(conjugate)), first)
            dx = dx[..., frames.lead : frames.lead + length]
            if "pregate" in found:
                _gated(dx, u[b, h], found["pregate"][b, h])
            if "u" in found:
                if before is not None:
                    dx = dx * before
                if skip is not None:
                    dx = torch.addcmul(dx, skip[h, None].to(dtype), dout[b, h].to(dtype))
                found["u"][b, h] = dx
            if "skip" in found:
                found["skip"][h] += (dout[b, h].to(dtype) * u[b, h]).sum((0, 2)).to(skip.dtype)  # pyright: ignore[reportOptionalMemberAccess]
        if summed is not None:
            found["k"][h] = transform.taps(summed)[..., :taps]
    return found


def _gated(x: Tensor, gate: Tensor | None, out: Tensor) -> None:
    """gate * x into `out`, in the wider type of x and out."""
    if gate is None:
        out.copy_(x)
    elif x.dtype == gate.dtype == out.dtype:
        torch.mul(x, gate, out=out)
    else:
        wide = torch.promote_types(x.dtype, out.dtype)
        out.copy_(x.to(wide) * gate)
