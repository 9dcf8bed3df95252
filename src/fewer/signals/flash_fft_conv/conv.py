"""`fft_conv`: checks at the door, and the custom operators that torch's autograd, compiler and autocast see."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fewer.checks import check_whole, is_whole
from fewer.signals.flash_fft_conv import blocks
from fewer.signals.flash_fft_conv.monarch import check_factors
from fewer.signals.flash_fft_conv.plan import Plan, block_rows, check_triton, default_factors, frame_size, good_size, make_plan

SHIFTED_MOST = 9  # taps of a short filter that are done by shifts and sums
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def fft_conv(
    u: Float[Tensor, "*B H L"],
    k: Float[Tensor, "H K"],
    *,
    pregate: Tensor | None = None,
    postgate: Tensor | None = None,
    skip: Float[Tensor, "H"] | None = None,
    causal: bool = True,
    n: int | None = None,
    keep: Sequence[int] | None = None,
    low_pass: int | None = None,
    plan: Plan | None = None,
) -> Float[Tensor, "*B H L"]:
    """Long depthwise convolution y = postgate * ((pregate * u) conv k) + skip * u, without padding or spectra in main memory.

    In place of `irfft(rfft(u, 2L) * rfft(k, 2L))[..., :L]` and what stands around it. A few rows at a time are gated, transformed,
    multiplied, transformed back and gated while they stay in cache (on a GPU: in one kernel). A filter shorter than L is applied in
    overlapping frames (overlap-save), in L log K. The backward pass keeps u, k and the gates alone and makes the spectra anew.

    Args:
        u: [B, H, L] or [H, L], real: bfloat16, float32, float64, or float16 on a GPU; contiguous or not.
        k: [H, K], a filter for each channel, its first entry the present; float32 beside half-precision u is best.
        pregate, postgate: of u's shape.
        skip: [H]; adds skip[h] u, outside of the gates (a skip inside of them, as Hyena's, is `k[:, 0] + skip`).
        causal: whether y[t] sees u[s], s <= t, alone; else the convolution is circular, of length n.
        n: the FFT's size. Causal: by default the next good one of at least L + K - 1, or frames; smaller ones wrap around. Circular: L.
        keep: (a_1, ..., a_p): only frequencies k_1 + N_1 k_2 + ... with k_i < a_i, and their mirrors, survive; N_i are the plan's factors,
            or p balanced ones of n. In the Monarch form what is not kept is skipped.
        low_pass: bins of the real FFT of size n that survive.
        plan: from `make_plan`, in place of the model's choice; its n is the FFT's size, or a frame's where it is below L + K - 1.

    Returns:
        [B, H, L] or [H, L], of u's type; sums are float32, or float64 where u or k is.

    Raises:
        ValueError: shapes that do not fit, empty or integer or complex tensors, float16 on a CPU, K > L, n < L.

    Source: arXiv 2311.05908.

    Examples:
        >>> u, k = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0, 10.0]])
        >>> fft_conv(u, k).round()
        tensor([[ 1., 12., 23.]])
        >>> fft_conv(u, k, causal=False).round()
        tensor([[31., 12., 23.]])
    """
    _check_tensors(u, k, pregate, postgate, skip, fused=plan is not None and plan.backend == "triton")
    length, taps = u.shape[-1], k.shape[-1]
    if causal and taps > length:
        raise ValueError(f"k has {taps} entries and u {length}; expected K <= L in a causal convolution: pass k[..., :{length}]")
    if keep is not None and low_pass is not None:
        raise ValueError("keep and low_pass are both given; expected one: each says which frequencies survive")
    masked = keep is not None or low_pass is not None
    size = _size(length, taps, causal, n, plan, masked)
    if low_pass is not None and (not is_whole(low_pass) or not 1 <= low_pass <= size // 2 + 1):
        raise ValueError(f"low_pass is {low_pass!r}; expected 1 to {size // 2 + 1}, the bins of a real FFT of size {size}")
    wraps = n is not None or not causal or masked
    factors: tuple[int, ...] = plan.factors if plan else default_factors(size, keep) if keep is not None else ()
    if keep is not None:
        check_factors(factors, keep)
        if len(keep) == 0:
            raise ValueError("keep is empty; expected (a_1, ..., a_p): one number for each factor")
    backend, rows = (plan.backend, plan.block_rows) if plan else ("auto", 0)
    return _dispatch(u, k, pregate, postgate, skip, size, wraps, factors, list(keep or ()), low_pass or 0, backend, rows)


def _dispatch(
    u: Tensor, k: Tensor, pregate: Tensor | None, postgate: Tensor | None, skip: Tensor | None, n: int, wraps: bool,
    factors: Sequence[int], keep: list[int], low_pass: int, backend: str, rows: int,
) -> Tensor:  # fmt: skip
    """The operator, on a batch."""
    single = u.ndim == 2
    given = [each[None] if single and each is not None else each for each in (u, pregate, postgate)]
    y = _operator(given[0], k, given[1], given[2], skip, n, wraps, list(factors), keep, low_pass, backend, rows)
    return y[0] if single else y


def _size(length: int, taps: int, causal: bool, n: int | None, plan: Plan | None, masked: bool) -> int:
    """The FFT's size, or a frame's; 0 leaves the choice to the operator (the compiler need not see it made)."""
    if n is not None:
        check_whole(n=n)
    if plan is not None:
        if n is not None and n != plan.n:
            raise ValueError(f"n is {n} and the plan's is {plan.n}; expected one size: leave n out")
        if plan.n < length and (masked or not causal or plan.n < max(2 * taps - 1, taps)):
            raise ValueError(
                f"the plan's n is {plan.n}, u has {length} entries and k {taps}; expected at least L, or 2 K - 1 for a causal filter in frames: "
                f"make_plan({good_size(length + taps - 1)}, ...)"
            )
        size = plan.n
    elif n is not None:
        if n < length:
            raise ValueError(f"n is {n} and u has {length} entries; expected n >= L: leave n out, or give {good_size(length + taps - 1)}")
        size = n
    elif not causal:
        size = length
    else:
        size = good_size(length + taps - 1) if masked else 0
    if 0 < size < taps:
        raise ValueError(f"k has {taps} entries and the FFT {size}; expected K <= n: pass k[..., :{size}]")
    return size


def _check_tensors(u: Tensor, k: Tensor, pregate: Tensor | None, postgate: Tensor | None, skip: Tensor | None, fused: bool) -> None:
    """Refuse what cannot be convolved; float16 is for GPUs (and for the fused kernel in Triton's interpreter)."""
    if u.ndim not in (2, 3):
        raise ValueError(f"u has shape {tuple(u.shape)}; expected [B, H, L] or [H, L]: reshape it")
    if k.ndim != 2 or k.shape[0] != u.shape[-2]:
        raise ValueError(
            f"k has shape {tuple(k.shape)} and u {tuple(u.shape)}; expected k [H, K] with H = {u.shape[-2]}: a filter a channel"
        )
    if 0 in u.shape or 0 in k.shape:
        raise ValueError(
            f"u has shape {tuple(u.shape)} and k {tuple(k.shape)}; expected at least one entry along each axis: leave empty ones out"
        )
    for name, gate in (("pregate", pregate), ("postgate", postgate)):
        if gate is not None and gate.shape != u.shape:
            raise ValueError(f"{name} has shape {tuple(gate.shape)} and u {tuple(u.shape)}; expected the same: expand it to u's")
    if skip is not None and skip.shape != u.shape[-2:-1]:
        raise ValueError(f"skip has shape {tuple(skip.shape)}; expected ({u.shape[-2]},): one number a channel")
    for name, each in (("u", u), ("k", k), ("pregate", pregate), ("postgate", postgate), ("skip", skip)):
        if each is None:
            continue
        if each.dtype not in FLOATS:
            raise ValueError(f"{name} is {each.dtype}; expected real floating-point numbers: convert it with .float()")
        if each.dtype == torch.float16 and each.device.type == "cpu" and not fused:
            raise ValueError(
                f"{name} is float16 on a CPU; expected bfloat16, float32 or float64 there: convert it with .bfloat16() or .float()"
            )
        if each.device != u.device:
            raise ValueError(f"{name} is on {each.device} and u on {u.device}; expected one device: move it with .to(u.device)")


def _job(
    u: Tensor, k: Tensor, n: int, wraps: bool, factors: list[int], keep: list[int], low_pass: int, backend: str, rows: int
) -> blocks.Job:
    """The plan that the operator's plain words mean on this machine."""
    batch, channels, length = u.shape
    n = n or frame_size(length, k.shape[-1])
    kept = tuple(keep)
    kind = "fft" if backend == "auto" and u.device.type == "cpu" and not keep else backend
    if kind == "triton":
        check_triton(n, u.device.type, u.dtype, keep)
    if (
        kind == "auto" and u.dtype in (torch.float16, torch.bfloat16) and not (wraps or low_pass or keep)
    ):  # on a GPU: a size of the kernel's
        n = 2 ** (length + k.shape[-1] - 2).bit_length()
    if rows or kind == "fft":  # nothing to choose
        wide = 2.0 if torch.float64 in (u.dtype, k.dtype) else 1.0
        chosen = tuple(factors) or (n,)
        plan = Plan(n, chosen, kind, rows or block_rows(n, u.device.type, wide), float("nan"), 0)  # pyright: ignore[reportArgumentType]
    else:
        dtype = torch.promote_types(u.dtype, k.dtype) if torch.float64 in (u.dtype, k.dtype) else u.dtype
        plan = make_plan(n, batch * channels, u.device, dtype, keep or None, backend=kind, factors=factors or None)  # pyright: ignore[reportArgumentType]
        if low_pass:
            plan = replace(plan, backend="fft")
    return blocks.Job(plan, wraps=wraps, keep=kept, low_pass=low_pass)


def _plain_types(device: str) -> contextlib.AbstractContextManager[object]:
    """Types as they are given: the filter stays float32 under autocast."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


@torch.library.custom_op("fewer::fft_conv", mutates_args=())
def _operator(
    u: Tensor, k: Tensor, pregate: Tensor | None, postgate: Tensor | None, skip: Tensor | None, n: int, wraps: bool,
    factors: list[int], keep: list[int], low_pass: int, backend: str, rows: int,
) -> Tensor:  # fmt: skip
    job = _job(u, k, n, wraps, factors, keep, low_pass, backend, rows)
    with _plain_types(u.device.type):
        if job.plan.backend == "triton":
            from fewer.signals.flash_fft_conv import kernels

            return kernels.convolve(u, k, pregate, postgate, skip, job)
        return blocks.convolve(u, k, pregate, postgate, skip, job)


@_operator.register_fake
def _(u: Tensor, *_: object) -> Tensor:
    return torch.empty(u.shape, dtype=u.dtype, device=u.device)


@torch.library.custom_op("fewer::fft_conv_backward", mutates_args=())
def _backward_operator(
    dout: Tensor, u: Tensor, k: Tensor, pregate: Tensor | None, postgate: Tensor | None, skip: Tensor | None, n: int, wraps: bool,
    factors: list[int], keep: list[int], low_pass: int, backend: str, rows: int, wanted: list[bool],
) -> list[Tensor]:  # fmt: skip
    job, asked = _job(u, k, n, wraps, factors, keep, low_pass, backend, rows), blocks.Wanted(*wanted)
    with _plain_types(u.device.type):
        if job.plan.backend == "triton":
            from fewer.signals.flash_fft_conv import kernels

            found = kernels.gradients(dout, u, k, pregate, postgate, skip, job, asked)
        else:
            found = blocks.gradients(dout, u, k, pregate, postgate, skip, job, asked)
    return [found[name] for name in _NAMES if name in found]


_NAMES = ("u", "k", "pregate", "postgate", "skip")


@_backward_operator.register_fake
def _(dout: Tensor, *given: object) -> list[Tensor]:
    wanted = given[-1]
    assert isinstance(wanted, list)
    return [
        torch.empty(each.shape, dtype=each.dtype, device=each.device)
        for each, asked in zip(given[: len(_NAMES)], wanted, strict=True)
        if asked and isinstance(each, Tensor)
    ]


def _remember(ctx: object, inputs: tuple, output: object) -> None:
    ctx.save_for_backward(*inputs[: len(_NAMES)])  # pyright: ignore[reportAttributeAccessIssue]
    ctx.words = inputs[len(_NAMES) :]  # pyright: ignore[reportAttributeAccessIssue]


def _gradients(ctx: object, dout: Tensor) -> tuple[Tensor | None, ...]:
    given, words = ctx.saved_tensors, ctx.words  # pyright: ignore[reportAttributeAccessIssue]
    needed = [bool(each) for each in ctx.needs_input_grad[: len(_NAMES)]]  # pyright: ignore[reportAttributeAccessIssue]
    found = iter(_backward_operator(dout, *given, *words, needed))
    return (*(next(found) if asked else None for asked in needed), *[None] * len(words))


def _refuse_twice(ctx: object, *grads: object) -> None:
    raise RuntimeError(
        "a gradient of fft_conv's gradient is asked for; expected first derivatives alone: leave create_graph out, or use torch.fft there"
    )


torch.library.register_autograd("fewer::fft_conv", _gradients, setup_context=_remember)
torch.library.register_autograd("fewer::fft_conv_backward", _refuse_twice)


def depthwise_conv1d(
    x: Float[Tensor, "B H L"],
    w: Float[Tensor, "H K"],
    bias: Float[Tensor, "H"] | None = None,
    padding: int | Literal["same", "causal"] = "same",
) -> Float[Tensor, "B H M"]:
    """A short filter on each channel, as torch's depthwise `conv1d` (not flipped): on a CPU shifts and sums, whose backward pass is quick.

    Args:
        x: [B, H, L].
        w: [H, K], K odd (3, 5, ...).
        bias: [H].
        padding: zeros at both ends; "same" keeps the length, "causal" too, with all of them at the start.

    Returns:
        [B, H, L + 2 padding - K + 1].

    Examples:
        >>> depthwise_conv1d(torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([[100.0, 10.0, 1.0]]), padding="causal")
        tensor([[[  1.,  12., 123.]]])
    """
    if x.ndim != 3 or w.ndim != 2 or w.shape[0] != x.shape[1]:
        raise ValueError(f"x has shape {tuple(x.shape)} and w {tuple(w.shape)}; expected [B, H, L] and [H, K]: a filter a channel")
    taps = w.shape[1]
    if taps % 2 == 0:
        raise ValueError(f"w has {taps} taps; expected an odd number, such as {taps + 1}: pad it with a zero")
    if padding not in ("same", "causal") and (not is_whole(padding) or padding < 0):
        raise ValueError(f"padding is {padding!r}; expected 'same', 'causal' or a whole number of at least 0")
    ends = {"same": (taps // 2, taps // 2), "causal": (taps - 1, 0)}.get(padding, (padding, padding))  # pyright: ignore[reportArgumentType, reportCallIssue]
    x = F.pad(x, ends)  # pyright: ignore[reportArgumentType]
    length = x.shape[-1] - taps + 1
    if length < 1:
        raise ValueError(f"x with its padding has {x.shape[-1]} entries and w {taps}; expected at least as many: use padding='same'")
    if x.device.type != "cpu" or taps > SHIFTED_MOST:
        return F.conv1d(x, w[:, None], bias, groups=w.shape[0])
    y = x[..., :length] * w[:, :1]
    for j in range(1, taps):
        y = torch.addcmul(y, x[..., j : j + length], w[:, j : j + 1])
    return y if bias is None else y + bias[:, None]
