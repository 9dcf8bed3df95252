"""`fft_conv` against the double sum, conv1d, scipy and autograd through torch.fft."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import signal
from torch.nn import functional as F

from fewer.meters import saved_bytes, tensor_memory
from fewer.signals import LongConv
from fewer.signals.flash_fft_conv import Plan, blocks, conv, depthwise_conv1d, fft_conv, make_plan
from fewer.signals.flash_fft_conv.monarch import kept_mask
from fewer.signals.flash_fft_conv.plan import convolution_cost, frame_size

MONARCH = {64: (8, 8), 96: (4, 4, 6), 2048: (16, 16, 8), 15: (3, 5)}
near = {"rtol": 1e-12, "atol": 1e-12}


def plan(n, backend="fft", rows=4, factors=None):
    return Plan(n, factors or MONARCH.get(n, (n,)), backend, rows, 0.0, 0)


def double_sum(u, k):
    y = np.zeros(u.shape)
    for s in range(k.shape[-1]):
        y[..., s:] += k[:, s : s + 1] * u[..., : u.shape[-1] - s]
    return y


def draw(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype)


@pytest.mark.parametrize("length", [1, 2, 7, 48, 1000])
@pytest.mark.parametrize("taps", [1, 5, None])
def test_causal_is_the_double_sum(length, taps):
    taps = min(taps or length, length)
    u, k = draw(2, 3, length), draw(3, taps)
    wanted = torch.from_numpy(double_sum(u.numpy(), k.numpy()))
    torch.testing.assert_close(fft_conv(u, k), wanted, **near)
    torch.testing.assert_close(fft_conv(u[0], k), wanted[0], **near)
    single = fft_conv(u.float(), k.float())
    bound = 2e-6 * length**0.5 * u.norm(dim=-1, keepdim=True) * k.norm(dim=-1)[:, None]
    assert ((single - wanted).abs() <= bound).all()
    assert single.dtype == torch.float32


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 90), st.data())
def test_it_is_conv1d_on_flipped_filters(batch, channels, length, data):
    taps = data.draw(st.integers(1, min(64, length)))
    u, k = draw(batch, channels, length), draw(channels, taps)
    wanted = F.conv1d(F.pad(u, (taps - 1, 0)), k.flip(-1)[:, None], groups=channels)
    torch.testing.assert_close(fft_conv(u, k), wanted, **near)


def test_it_is_scipys_row_by_row_for_inputs_that_are_not_contiguous():
    u, k = draw(200, 3, 2).permute(2, 1, 0), draw(50, 3).T
    y = fft_conv(u, k)
    for b in range(2):
        for h in range(3):
            np.testing.assert_allclose(y[b, h], signal.oaconvolve(u[b, h], k[h])[:200], rtol=1e-10, atol=1e-12)


def test_the_future_changes_nothing_unless_the_size_is_too_small():
    u, k = draw(1, 2, 100), draw(2, 100)
    other = u.clone()
    other[..., 60:] += 1
    for words in ({}, {"n": 200}, {"plan": plan(200)}):
        torch.testing.assert_close(fft_conv(u, k, **words)[..., :60], fft_conv(other, k, **words)[..., :60], **near)
    assert (fft_conv(u, k, n=128) - fft_conv(other, k, n=128))[..., :60].abs().max() > 0.1


def gated(k, *others, **words):
    u, pre, post, skip = others
    return fft_conv(u, k, pregate=pre, postgate=post, skip=skip, **words)


def by_torch(k, *others):
    u, pre, post, skip = others
    n = 2 * u.shape[-1]
    y = torch.fft.irfft(torch.fft.rfft(pre * u, n=n) * torch.fft.rfft(k, n=n), n=n)[..., : u.shape[-1]]
    return post * y + skip[:, None] * u


PLANS = {
    "chosen": None, "blocks of one row": plan(64, rows=1), "many rows": plan(64, rows=999), "frames": plan(16, rows=3), "a frame at a time": plan(16, rows=1),
    "matrices": plan(64, "monarch"), "matrices, one row": plan(64, "monarch", 1), "three stages": plan(96, "monarch"),
}  # fmt: skip


@pytest.mark.parametrize("words", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_gates_skip_and_all_gradients_are_autograds_through_torch(words, batch):
    channels, length, taps = 3, 31, 7
    inputs = [draw(channels, taps), *(draw(batch, channels, length) for _ in range(3)), draw(channels)]
    dout = draw(batch, channels, length)
    inputs = [each.requires_grad_() for each in inputs]
    found, wanted = gated(*inputs, plan=words), by_torch(*inputs)
    torch.testing.assert_close(found, wanted, **near)
    for one, other in zip(torch.autograd.grad(found, inputs, dout), torch.autograd.grad(wanted, inputs, dout), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    for i in (0, 1, 2):  # each alone, too
        alone = torch.autograd.grad(gated(*inputs, plan=words), inputs[i], dout)[0]
        torch.testing.assert_close(alone, torch.autograd.grad(by_torch(*inputs), inputs[i], dout)[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("channels", "batch", "taps"), [(1, 1, 9), (2, 3, 4)])
def test_gradcheck(channels, batch, taps):
    inputs = [draw(channels, taps), *(draw(batch, channels, 9) for _ in range(3)), draw(channels)]
    assert torch.autograd.gradcheck(gated, [each.requires_grad_() for each in inputs])


def test_a_gradient_of_the_gradient_is_refused():
    u = draw(1, 2, 8).requires_grad_()
    (du,) = torch.autograd.grad(fft_conv(u, draw(2, 8)).square().sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="expected first derivatives alone"):
        du.sum().backward()


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("n", [64, 96, 15])
def test_pairs_and_halves_and_plain_rows_agree(batch, n):
    u, k = draw(batch, 2, n), draw(2, n)
    whole = fft_conv(u, k, causal=False, plan=plan(n, "monarch"))
    rows = torch.cat([fft_conv(u[b : b + 1], k, causal=False, plan=plan(n, "monarch")) for b in range(batch)])
    torch.testing.assert_close(whole, rows, **near)
    torch.testing.assert_close(whole, fft_conv(u, k, causal=False), **near)


@pytest.mark.parametrize("taps", [3, 64, 1000])
def test_frames_of_any_size_are_the_whole_filter(taps):
    u, k = draw(2, 2, 5000), draw(2, taps)
    wanted = torch.fft.irfft(torch.fft.rfft(u, n=10_000) * torch.fft.rfft(k, n=10_000), n=10_000)[..., :5000]
    for n in {frame_size(5000, taps), 2 * taps, 2 * taps + 1, 4 * taps, 5 * taps + 3}:
        for rows in (1, 5):
            torch.testing.assert_close(fft_conv(u, k, plan=plan(n, rows=rows)), wanted, **near)


def test_frames_cost_l_log_k():
    costs = {
        (length, taps): convolution_cost(length, taps, frame_size(length, taps)) for length in (2**18, 2**20) for taps in (64, 1024, 4096)
    }
    for taps in (64, 1024, 4096):
        assert costs[2**20, taps] == pytest.approx(4 * costs[2**18, taps], rel=0.1)
    assert costs[2**20, 64] < costs[2**20, 4096] < 2 * costs[2**20, 64]
    assert costs[2**20, 4096] < 0.6 * convolution_cost(2**20, 4096, 2**21)


@pytest.mark.parametrize(("factors", "keep"), [((8, 8), (5, 3)), ((4, 4, 4), (3, 2, 2)), ((8, 8), (8, 8)), ((8, 8), (4,))])
@pytest.mark.parametrize("backend", ["fft", "monarch"])
def test_kept_frequencies_are_the_masked_dense_convolution(factors, keep, backend):
    inputs = [draw(2, 32), *(draw(3, 2, 32) for _ in range(3)), draw(2)]
    inputs = [each.requires_grad_() for each in inputs]
    found = gated(*inputs, keep=keep, plan=plan(64, backend, factors=factors))
    k, u, pre, post, skip = inputs
    mask = kept_mask(factors, (*keep, *factors[len(keep) :]))
    dense = torch.fft.irfft(torch.fft.rfft(pre * u, n=64) * torch.fft.rfft(k, n=64) * mask, n=64)[..., :32]
    wanted = post * dense + skip[:, None] * u
    torch.testing.assert_close(found, wanted, **near)
    for one, other in zip(torch.autograd.grad(found.sum(), inputs), torch.autograd.grad(wanted.sum(), inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_keep_without_a_plan_takes_balanced_factors():
    u, k = draw(2, 2, 32), draw(2, 32)
    torch.testing.assert_close(fft_conv(u, k, n=64, keep=(5, 3)), fft_conv(u, k, keep=(5, 3), plan=plan(64)), **near)
    torch.testing.assert_close(fft_conv(u, k, keep=(8, 8)), fft_conv(u, k), **near)


@pytest.mark.parametrize("bins", [1, 9, 32, 33])
def test_a_low_pass_takes_the_bins_from_there_away(bins):
    u, k = draw(2, 3, 32).requires_grad_(), draw(3, 32).requires_grad_()
    spectrum = torch.fft.rfft(u, n=64) * torch.fft.rfft(k, n=64)
    wanted = torch.fft.irfft(torch.cat([spectrum[..., :bins], torch.zeros_like(spectrum[..., bins:])], -1), n=64)[..., :32]
    found = fft_conv(u, k, n=64, low_pass=bins)
    torch.testing.assert_close(found, wanted, **near)
    for one, other in zip(torch.autograd.grad(found.sum(), (u, k)), torch.autograd.grad(wanted.sum(), (u, k)), strict=True):
        torch.testing.assert_close(one, other, **near)


@pytest.mark.parametrize("length", [50, 600])
def test_blocks_and_threads_change_no_bit(length):
    u, k = draw(5, 6, length, dtype=torch.float32), draw(6, length, dtype=torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(fft_conv(u, k, plan=plan(2 * length, rows=7)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)
    for rows in (1, 3, 64):
        torch.testing.assert_close(fft_conv(u, k, plan=plan(2 * length, rows=rows)), found[0], rtol=1e-6, atol=1e-5)


def test_half_precision_is_right_to_its_digits_and_sums_the_filters_gradient_in_float32():
    u, k, gate = draw(64, 2, 200), draw(2, 200) / 8, draw(64, 2, 200)
    low = [each.bfloat16().requires_grad_() for each in (u, gate)]
    taps = k.float().requires_grad_()
    y = fft_conv(low[0], taps, pregate=low[1], postgate=low[1])
    exact_inputs = [each.detach().double().requires_grad_() for each in (*low, taps)]
    exact = fft_conv(exact_inputs[0], exact_inputs[2], pregate=exact_inputs[1], postgate=exact_inputs[1])
    assert y.dtype == torch.bfloat16
    assert (y.double() - exact).norm() < 4e-3 * exact.norm()
    (dk,), (wanted,) = torch.autograd.grad(y.sum(), taps), torch.autograd.grad(exact.sum(), exact_inputs[2])
    assert dk.dtype == torch.float32
    assert (dk - wanted).norm() < 1e-5 * wanted.norm()


def test_autocast_leaves_the_filter_as_it_is():
    layer, mixer = torch.nn.Linear(8, 8), LongConv(8, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer(layer(torch.randn(2, 16, 8)).transpose(1, 2))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert mixer.k.grad.dtype == torch.float32


def test_the_compiler_sees_one_operator():
    u, k, pre = draw(2, 3, 40).requires_grad_(), draw(3, 40).requires_grad_(), draw(2, 3, 40)

    def loss(u, k):
        return (fft_conv(torch.tanh(u), k, pregate=pre) ** 2).sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(u, k), loss(u, k), **near)
    for one, other in zip(torch.autograd.grad(compiled(u, k), (u, k)), torch.autograd.grad(loss(u, k), (u, k)), strict=True):
        torch.testing.assert_close(one, other, **near)
    words = (u, k, pre, None, None, 80, False, [], [], 0, "auto", 0)
    torch.library.opcheck(conv._operator, words, test_utils=("test_schema", "test_faketensor"))


def test_memory_of_a_forward_pass_and_nothing_of_the_ffts_size_is_kept_for_backward():
    shape, n = (4, 64, 8192), 16384
    u, k = torch.randn(shape), torch.randn(shape[1:])
    with tensor_memory() as ours:
        blocks.convolve(u, k, None, None, None, blocks.Job(make_plan(n, 256, backend="fft")))
    assert ours.total <= 37.8e6 / 3
    u.requires_grad_(), k.requires_grad_()
    with saved_bytes(torch.nn.Module()) as kept:
        y = fft_conv(u, k)
    assert kept.total <= 4 * (u.numel() + k.numel())
    assert y.grad_fn is not None


def test_nan_passes_through():
    u = draw(2, 2, 16)
    u[0, 0, 3] = torch.nan
    y = fft_conv(u, draw(2, 16))
    assert y[0, 0].isnan().any()
    assert not y[1, 1].isnan().any()


@pytest.mark.parametrize("padding", ["same", "causal", 0, 1, 4])
@pytest.mark.parametrize("taps", [1, 3, 5, 11])
def test_short_filters_are_torchs_depthwise_convolution(padding, taps):
    x, w, bias = (each.requires_grad_() for each in (draw(2, 3, 20), draw(3, taps), draw(3)))
    ends = {"same": (taps // 2,) * 2, "causal": (taps - 1, 0)}.get(padding, (padding, padding))
    wanted = F.conv1d(F.pad(x, ends), w[:, None], bias, groups=3)
    found = depthwise_conv1d(x, w, bias, padding)
    torch.testing.assert_close(found, wanted, **near)
    for one, other in zip(torch.autograd.grad(found.sum(), (x, w, bias)), torch.autograd.grad(wanted.sum(), (x, w, bias)), strict=True):
        torch.testing.assert_close(one, other, **near)


def test_a_plan_is_plain_data():
    made = make_plan(4096, 8)
    assert pickle.loads(pickle.dumps(made)) == copy.deepcopy(made) == made
