"""The layers: released signature, drop-in mixer, streams."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fewer.signals import FlashFFTConv, LongConv, StreamingConv, fft_conv

near = {"rtol": 1e-12, "atol": 1e-12}


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("backend", ["auto", "fft", "monarch"])
def test_the_released_module_is_circular_at_its_length_and_causal_at_half_of_it(backend):
    conv, k = FlashFFTConv(64, backend=backend), draw(3, 64)
    u = draw(2, 3, 64)
    circular = torch.fft.irfft(torch.fft.rfft(u) * torch.fft.rfft(k), n=64)
    torch.testing.assert_close(conv(u, k), circular, **near)
    half, pre, post = draw(2, 3, 32), draw(2, 3, 32), draw(2, 3, 32)
    torch.testing.assert_close(conv(half, k[:, :32]), fft_conv(half, k[:, :32]), **near)
    torch.testing.assert_close(conv(half, k[:, :32], pre, post), post * fft_conv(half * pre, k[:, :32]), **near)
    assert not list(conv.parameters())
    torch.testing.assert_close(copy.deepcopy(conv)(u, k), circular, **near)


@pytest.mark.parametrize("words", [{}, {"filter_length": 8}, {"keep": (5, 3)}])
def test_a_mixer_is_the_filter_and_the_skip_with_gates_around_both(words):
    torch.manual_seed(0)
    mixer = LongConv(4, 32, **words).double()
    u, pre, post = draw(2, 4, 32), draw(2, 4, 32), draw(2, 4, 32)

    def mixed(u):
        return fft_conv(u, mixer.k, keep=mixer.keep) + mixer.skip[:, None] * u

    torch.testing.assert_close(mixer(u), mixed(u), **near)
    torch.testing.assert_close(mixer(u, pre, post), post * mixed(pre * u), **near)
    torch.testing.assert_close(mixer(u, pre), mixed(pre * u), **near)
    assert mixer(u[..., :5]).shape == (2, 4, 5)
    other = LongConv(4, 32, **words).double()
    other.load_state_dict(mixer.state_dict())
    assert torch.equal(other(u), mixer(u))
    assert torch.equal(copy.deepcopy(mixer)(u), mixer(u))


def test_filters_start_small_and_decay_at_their_own_pace():
    torch.manual_seed(0)
    mixer = LongConv(64, 4096)
    assert torch.equal(mixer.skip, torch.ones(64))
    tau = torch.logspace(1, 10, 64, base=2.0)  # 2 to 4096 / 4
    energy = mixer.k.detach().square().sum(1)
    expected = 0.25 / tau / (1 - torch.exp(-2 / tau))  # sum of the variances
    assert ((energy / expected)[16:] - 1).abs().mean() < 0.25
    assert energy.mean() == pytest.approx(expected.mean().item(), rel=0.2)


def test_a_sequence_model_learns_with_it():
    torch.manual_seed(0)

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.mixer, self.outer = nn.Linear(1, 8), LongConv(8, 64), nn.Linear(8, 1)

        def forward(self, x):
            return self.outer(self.mixer(self.inner(x).transpose(1, 2)).transpose(1, 2))

    model, x = Mixed(), torch.randn(16, 64, 1)
    y = torch.roll(x, 5, 1)
    y[:, :5] = 0
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.lists(st.integers(1, 30), min_size=1, max_size=6), st.data())
def test_chunks_of_any_sizes_are_the_whole_and_a_state_goes_on_elsewhere(taps, sizes, data):
    u, k = draw(2, 3, max(sum(sizes), taps)), draw(3, taps)
    sizes = [*sizes, *([u.shape[-1] - sum(sizes)] if u.shape[-1] > sum(sizes) else [])]
    stream, moved = StreamingConv(k), data.draw(st.integers(0, len(sizes)))
    found = []
    for i, chunk in enumerate(u.split(sizes, -1)):
        if i == moved:
            other = StreamingConv(torch.zeros_like(k))
            other.load_state_dict(copy.deepcopy(stream.state_dict()))
            stream = other
        found.append(stream.step(chunk))
    torch.testing.assert_close(torch.cat(found, -1), fft_conv(u, k), **near)


def test_long_chunks_go_through_frames_and_a_reset_starts_anew():
    u, k = draw(1, 2, 9000), draw(2, 300)
    stream = StreamingConv(k)
    for _ in range(2):
        found = torch.cat([stream.step(chunk) for chunk in u.split([1, 4000, 299, 4700], -1)], -1)
        torch.testing.assert_close(found, fft_conv(u, k), rtol=1e-11, atol=1e-11)
        assert stream.past.shape == (1, 2, 299)
        stream.reset()
