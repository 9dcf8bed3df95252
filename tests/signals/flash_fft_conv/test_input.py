"""What cannot be done is told in one clear error: what was given, what was expected, what to do."""

from __future__ import annotations

import pytest
import torch

from fewer.signals import FlashFFTConv, LongConv, StreamingConv, depthwise_conv1d, fft_conv
from fewer.signals.flash_fft_conv import make_plan, monarch_dft


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


U, K = zeros(2, 3, 8), zeros(3, 8)
CALLS = {
    "k has shape (4, 8) and u (2, 3, 8); expected k [H, K] with H = 3: a filter a channel": (U, zeros(4, 8), {}),
    "u has shape (8,); expected [B, H, L] or [H, L]: reshape it": (zeros(8), K, {}),
    "k has 9 entries and u 8; expected K <= L in a causal convolution: pass k[..., :8]": (U, zeros(3, 9), {}),
    "k has 9 entries and the FFT 8; expected K <= n: pass k[..., :8]": (U, zeros(3, 9), {"causal": False}),
    "n is 7 and u has 8 entries; expected n >= L: leave n out, or give 16": (U, K, {"n": 7}),
    "n is 8.5; expected a whole number": (U, K, {"n": 8.5}),
    "keep has 3 entries and there are 2 factors (4, 4); expected at most one a factor": (U, K, {"keep": (1, 1, 1), "plan": make_plan(16, 6, factors=(4, 4))}),
    "keep[0] is 5 and the factor is 4; expected at most that": (U, K, {"n": 16, "keep": (5, 1)}),
    "keep[1] is 0; expected a whole number of at least 1": (U, K, {"n": 16, "keep": (2, 0)}),
    "keep is empty; expected (a_1, ..., a_p)": (U, K, {"keep": ()}),
    "low_pass is 10; expected 1 to 9, the bins of a real FFT of size 16": (U, K, {"n": 16, "low_pass": 10}),
    "low_pass is 0; expected 1 to 9": (U, K, {"n": 16, "low_pass": 0}),
    "keep and low_pass are both given; expected one": (U, K, {"keep": (1, 1), "low_pass": 1}),
    "u is torch.int64; expected real floating-point numbers: convert it with .float()": (U.long(), K, {}),
    "k is torch.complex64; expected real": (U, K.cfloat(), {}),
    "u is float16 on a CPU; expected bfloat16, float32 or float64 there": (U.half(), K, {}),
    "pregate has shape (3, 8) and u (2, 3, 8); expected the same: expand it to u's": (U, K, {"pregate": K}),
    "postgate has shape (2, 3, 1)": (U, K, {"postgate": U[..., :1]}),
    "skip has shape (3, 1); expected (3,): one number a channel": (U, K, {"skip": K[:, :1]}),
    "u has shape (2, 3, 0) and k (3, 0); expected at least one entry along each axis": (U[..., :0], K[..., :0], {}),
    "n is 16 and the plan's is 32; expected one size: leave n out": (U, K, {"n": 16, "plan": make_plan(32, 6)}),
    "the plan's n is 4, u has 8 entries and k 8; expected at least L, or 2 K - 1": (U, K, {"plan": make_plan(4, 6)}),
}  # fmt: skip


@pytest.mark.parametrize(("message", "call"), CALLS.items(), ids=range(len(CALLS)))
def test_a_convolution_that_cannot_be(message, call):
    u, k, words = call
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared below
        fft_conv(u, k, **words)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FlashFFTConv(16)(U, K, U), "postgate is missing; expected both gates or none: call fft_conv for one alone"),
        (lambda: FlashFFTConv(16)(U, K, None, U), "pregate is missing"),
        (lambda: FlashFFTConv(4)(U, K), "u has 8 entries and seqlen is 4; expected L <= seqlen: make FlashFFTConv(8)"),
        (lambda: FlashFFTConv(16, dtype=torch.bfloat16)(U, K), "u is torch.float32 and the module's dtype torch.bfloat16"),
        (lambda: FlashFFTConv(16, dtype=torch.long), "dtype is torch.int64; expected a real floating-point type"),
        (lambda: FlashFFTConv(16, backend="cuda"), "backend is 'cuda'; expected one of auto, fft, monarch, triton"),
        (lambda: FlashFFTConv(0), "seqlen is 0; expected a whole number of at least 1"),
        (lambda: LongConv(3, 8, 9), "filter_length is 9 and length 8; expected at most that: leave it out"),
        (lambda: LongConv(3, 8, keep=(5, 5)), "keep[0] is 5 and the factor is 4"),
        (lambda: LongConv(3, 7)(U), "u has 8 entries; expected at most 7"),
        (lambda: StreamingConv(K.long()), "k is torch.int64 of shape (3, 8); expected real numbers [H, K]"),
        (lambda: StreamingConv(K).step(U[:, :2]), "the chunk has shape (2, 2, 8); expected [B, 3, C] with C >= 1"),
        (lambda: StreamingConv(K).load_state_dict({"k": K, "past": zeros(1, 3, 6)}), "past has shape (1, 3, 6); expected [B, 3, 7]"),
        (lambda: depthwise_conv1d(U, K), "w has 8 taps; expected an odd number, such as 9"),
        (lambda: depthwise_conv1d(U, zeros(2, 3)), "x has shape (2, 3, 8) and w (2, 3); expected [B, H, L] and [H, K]"),
        (lambda: depthwise_conv1d(U, zeros(3, 3), padding="full"), "padding is 'full'; expected 'same', 'causal' or a whole number"),
        (lambda: depthwise_conv1d(U, zeros(3, 11), padding=0), "x with its padding has 8 entries and w 11; expected at least as many"),
        (lambda: make_plan(16, 2, factors=(4, 5)), "factors (4, 5) make 20 and n is 16; expected factors of n, such as (4, 4)"),
        (lambda: make_plan(0, 2), "n is 0; expected a whole number of at least 1"),
        (lambda: monarch_dft(K, (2, 2)), "x has length 8 and the factors (2, 2) make 4; expected at most that"),
        (lambda: monarch_dft(K, ()), "factors is empty; expected at least one"),
        (lambda: fft_conv(U, K, low_pass=3, plan=make_plan(16, 6, backend="monarch")), "low_pass is 3 with backend='monarch'"),
    ],
)
def test_parts_that_do_not_fit(make, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared below
        make()
    assert message in str(caught.value)


def test_triton_without_a_gpu_says_what_to_set():
    with pytest.raises(RuntimeError, match="expected a GPU, or Triton's interpreter: move them there, set TRITON_INTERPRET=1"):
        FlashFFTConv(256, backend="triton")(zeros(1, 3, 256), zeros(3, 256))


def test_a_stream_of_other_rows_is_refused_and_goes_on():
    stream = StreamingConv(torch.ones(3, 4))
    stream.step(torch.ones(2, 3, 5))
    with pytest.raises(ValueError, match="the chunk has 1 rows and the stream 2; expected the same: reset"):
        stream.step(torch.ones(1, 3, 5))
    assert stream.step(torch.ones(2, 3, 1)).eq(4).all()
