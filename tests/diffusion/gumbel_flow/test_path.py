"""The path against its own law, torch's Concrete distributions, brute force and differences."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import RelaxedOneHotCategorical
from torch.distributions.relaxed_categorical import ExpRelaxedCategorical
from torch.nn import functional as F

from fewer.diffusion.gumbel_flow import GumbelSoftmaxPath, SequenceCNN, gumbel_flow_loss, gumbel_score_loss
from fewer.diffusion.gumbel_flow.path import gumbel

K = 7
PATH = GumbelSoftmaxPath(K)


def states(*shape: int, seed: int = 0) -> torch.Tensor:
    """Points inside the simplex, float64."""
    return torch.softmax(torch.randn(*shape, K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


@pytest.mark.parametrize("k", [4, 20, 512])
def test_the_largest_share_is_the_letters_equally_often_at_every_time(k):
    path, count, draw = GumbelSoftmaxPath(k), 4000, torch.Generator().manual_seed(k)
    tokens = torch.randint(k, (count, 2), generator=draw)
    right = math.exp(path.beta) / (math.exp(path.beta) + k - 1)
    for t in (0.0, 0.5, 1.0):
        share = float((path.sample(tokens, t, draw).x_t.argmax(-1) == tokens).double().mean())
        assert abs(share - right) < 3 * math.sqrt(right * (1 - right) / (2 * count))


def test_one_noise_at_two_times_is_a_power():
    tokens = torch.randint(K, (8, 5))
    early, late = (PATH.sample(tokens, t, torch.Generator().manual_seed(3)).x_t.double() for t in (0.2, 0.7))
    power = early ** float(PATH.tau(0.2) / PATH.tau(0.7))
    torch.testing.assert_close(power / power.sum(-1, keepdim=True), late, rtol=1e-5, atol=1e-7)


def test_the_derivative_is_that_of_the_path_with_its_noise():
    one_hot = F.one_hot(torch.randint(K, (6, 3)), K).double()
    noise = gumbel(one_hot.shape, dtype=torch.float64)

    def at(t: float, noise: torch.Tensor) -> torch.Tensor:
        return torch.softmax((one_hot + noise / PATH.beta) / PATH.tau(t), dim=-1)

    for t in (0.1, 0.6):
        difference = (at(t + 1e-5, noise) - at(t - 1e-5, noise)) / 2e-5
        torch.testing.assert_close(PATH.path_derivative(at(t, noise)), difference, rtol=1e-4, atol=1e-8)
        quiet = at(t, torch.zeros_like(noise))
        torch.testing.assert_close(PATH.conditional_velocity(quiet, one_hot, t), PATH.path_derivative(quiet), rtol=1e-10, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.floats(0, 1))
def test_velocities_sum_to_zero_and_never_push_an_empty_share_down(seed, t):
    x, p = states(2, 3, seed=seed), states(2, 3, seed=seed + 1)
    x[..., 0] = 0
    x = x / x.sum(-1, keepdim=True)
    one_hot = F.one_hot(torch.randint(K, (2, 3), generator=torch.Generator().manual_seed(seed)), K).double()
    for velocity in (PATH.velocity(p, x, t), PATH.conditional_velocity(x, one_hot, t), PATH.path_derivative(x)):
        assert velocity.sum(-1).abs().max() < 1e-6
        assert velocity[..., 0].min() >= 0
    torch.testing.assert_close(PATH.velocity(one_hot, x, t), PATH.conditional_velocity(x, one_hot, t))


@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
def test_the_posterior_is_bayes_with_torchs_concrete_density(t):
    x, prior = states(5), torch.softmax(torch.randn(K, dtype=torch.float64), 0)
    temperature = PATH.beta * PATH.tau(torch.tensor(t, dtype=torch.float64))
    density = [RelaxedOneHotCategorical(temperature, logits=PATH.beta * F.one_hot(torch.tensor(k), K).double()) for k in range(K)]
    log = torch.stack([prior[k].log() + density[k].log_prob(x) for k in range(K)], dim=-1)
    torch.testing.assert_close(
        PATH.posterior(x, prior, torch.tensor(t, dtype=torch.float64)), torch.softmax(log, -1), rtol=1e-8, atol=1e-10
    )


@pytest.mark.parametrize("t", [0.0, 0.5, 1.0])
def test_the_score_is_the_gradient_of_torchs_density_of_log_x(t):
    tokens, time = torch.randint(K, (3, 2)), torch.tensor(t, dtype=torch.float64)
    y = states(3, 2).log().requires_grad_()
    density = ExpRelaxedCategorical(PATH.beta * PATH.tau(time), logits=PATH.beta * F.one_hot(tokens, K).double())
    # y is normalised inside the density of the ambient variable, so the gradient is known up to a constant along 1
    (gradient,) = torch.autograd.grad(density.log_prob(y).sum(), y)
    ours = PATH.score(y.detach().exp(), tokens, time)
    torch.testing.assert_close(ours - ours.mean(-1, keepdim=True), gradient - gradient.mean(-1, keepdim=True), rtol=1e-6, atol=1e-6)
    assert ours.sum(-1).abs().max() < 1e-8


@pytest.mark.parametrize("t", [0.1, 0.9])
def test_the_exact_mixtures_score_gives_the_posterior_back(t):
    x, prior = states(20), torch.softmax(torch.randn(K, dtype=torch.float64), 0)
    time = torch.tensor(t, dtype=torch.float64)
    p, temperature = PATH.posterior(x, prior, time), PATH.beta * PATH.tau(time)
    each = torch.softmax(PATH.beta * torch.eye(K, dtype=torch.float64) - temperature * x.log()[:, None], dim=-1)  # [., letter, share]
    q = (p[..., None] * each).sum(1)
    torch.testing.assert_close(PATH.score_to_posterior(q, x, time), p, rtol=1e-10, atol=1e-10)


def test_padding_has_no_loss_and_a_last_layer_of_zeros_is_log_k():
    torch.manual_seed(0)
    net, tokens = SequenceCNN(K, width=8), torch.randint(K, (6, 9))
    net.leave.weight.data.zero_()
    net.leave.bias.data.zero_()
    assert float(gumbel_flow_loss(net, PATH, tokens)) == pytest.approx(math.log(K), abs=1e-6)
    net = SequenceCNN(K, width=8)
    mask = torch.arange(9) < torch.tensor([9, 4, 1, 9, 2, 7])[:, None]
    other = torch.where(mask, tokens, (tokens + 1) % K)
    for loss in (gumbel_flow_loss, gumbel_score_loss):
        first, second = (loss(net, PATH, each, mask, generator=torch.Generator().manual_seed(1)) for each in (tokens, other))
        assert float(first) == pytest.approx(float(second), rel=1e-6)
    alone = gumbel_flow_loss(net, PATH, tokens[2:3, :1], t=torch.tensor([0.5]), generator=torch.Generator().manual_seed(1))
    padded = gumbel_flow_loss(net, PATH, tokens[2:3, :1].repeat(1, 3), mask[2:3, :3], t=torch.tensor([0.5]))
    assert alone.isfinite()
    assert padded.isfinite()


def test_the_score_losss_minimum_is_the_mixtures_expectation():
    """One position, a law of the letters: the q that is best on average is E[softmax(beta e_k - T y) | x]; its loss is below any other's."""
    path, draw = GumbelSoftmaxPath(3), torch.Generator().manual_seed(0)
    law = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)

    def exact(x, t, cond=None):
        p = torch.stack([path.posterior(row, law, float(each)) for row, each in zip(x.double(), t, strict=True)])
        log_w = torch.stack([path._log_weights(row, float(each)) for row, each in zip(x.double(), t, strict=True)])
        each = torch.softmax(path.beta * torch.eye(3, dtype=torch.float64) + log_w[..., None, :], dim=-1)
        return (p[..., None] * each).sum(-2).log()

    tokens = torch.multinomial(law, 400, replacement=True, generator=draw)[:, None]
    losses = [
        float(gumbel_score_loss(lambda x, t, cond, s=s: exact(x, t) + s * x, path, tokens, generator=torch.Generator().manual_seed(1)))
        for s in (0.0, -0.5, 0.5)
    ]
    assert losses[0] == min(losses)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_is_right_to_its_precision(dtype):
    one_hot = F.one_hot(torch.randint(K, (4, 3)), K)
    drawn = PATH.sample(one_hot.to(dtype), 0.5, torch.Generator().manual_seed(0))
    assert drawn.x_t.dtype == dtype
    x, p = states(4, 3).to(dtype), states(4, 3, seed=1).to(dtype)
    for name, args in (
        ("velocity", (p, x, 0.5)),
        ("path_derivative", (x,)),
        ("posterior", (x, states(1)[0], 0.5)),
        ("score", (x, one_hot.to(dtype), 0.5)),
    ):
        ours = getattr(PATH, name)(*args)
        exact = getattr(PATH, name)(*(each.double() if isinstance(each, torch.Tensor) else each for each in args))
        assert ours.dtype == dtype
        eps = torch.finfo(dtype).eps
        assert (ours.double() - exact).abs().max() <= 40 * eps * exact.abs().max(), name
    flipped = states(3, 4).transpose(0, 1)  # not contiguous
    torch.testing.assert_close(PATH.path_derivative(flipped), PATH.path_derivative(flipped.contiguous()))


def test_a_time_is_taken_in_the_dtype_of_what_is_drawn():
    one_hot, step = F.one_hot(torch.randint(K, (3, 2)), K), 1e-5
    at = [PATH.sample(one_hot.double(), t, torch.Generator().manual_seed(0)).x_t for t in (0.3 - step, 0.3, 0.3 + step)]
    torch.testing.assert_close((at[2] - at[0]) / (2 * step), PATH.path_derivative(at[1]), rtol=1e-4, atol=1e-8)
    tokens, t = one_hot.argmax(-1), torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    assert PATH.sample(tokens, t).x_t.dtype == torch.float64
    drawn = [PATH.sample(rows, t.float(), torch.Generator().manual_seed(0)) for rows in (tokens, one_hot, one_hot.float())]
    for each in drawn:  # torch's one_hot is of integers
        assert torch.equal(each.x_t, drawn[0].x_t)
        assert torch.equal(each.x_1, one_hot.float())


def test_each_row_has_its_own_time_whatever_stands_between_batch_and_letters():
    x, t, prior = states(3), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), states(1)[0]
    alone = torch.stack([PATH.posterior(row, prior, float(each)) for row, each in zip(x, t, strict=True)])
    torch.testing.assert_close(PATH.posterior(x, prior, t), alone)
    torch.testing.assert_close(PATH.posterior(x[:, None], prior, t)[:, 0], alone)


@pytest.mark.parametrize("loss", [gumbel_flow_loss, gumbel_score_loss])
def test_masks_of_ones_and_weights_of_any_dtype_are_taken(loss):
    class Net(torch.nn.Linear):
        def forward(self, x, t, cond=None):
            return super().forward(x)

    tokens, mask, net = torch.randint(K, (3, 4)), torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]), Net(K, K)
    found = {}
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        net = net.to(dtype)
        found[dtype] = float(loss(net, PATH, tokens, mask, generator=torch.Generator().manual_seed(0)).detach())
    for value in found.values():
        assert value == pytest.approx(found[torch.float32], rel=2e-2)
    assert found[torch.float64] == pytest.approx(found[torch.float32], rel=1e-5)


def test_a_path_is_copied_and_pickled():
    for twin in (copy.deepcopy(PATH), pickle.loads(pickle.dumps(PATH))):
        assert twin == PATH


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: GumbelSoftmaxPath(1), "num_classes"),
        (lambda: GumbelSoftmaxPath(4, tau_max=0), "tau_max"),
        (lambda: GumbelSoftmaxPath(4, decay=-1), "decay"),
        (lambda: GumbelSoftmaxPath(4, beta=math.nan), "beta"),
        (lambda: PATH.sample(torch.tensor([[0, K]]), 0.5), r"tokens hold 0\.\.7; expected 0\.\.6"),
        (lambda: PATH.sample(torch.tensor([[-1]]), 0.5), "tokens hold"),
        (lambda: PATH.sample(torch.zeros(2, 0, dtype=torch.long), 0.5), "with a position at least"),
        (lambda: PATH.sample(torch.zeros(2, 3), 0.5), "expected rows of 7 letters"),
        (lambda: PATH.sample(torch.tensor([[0]]), 1.5), r"in \[0, 1\]"),
        (lambda: PATH.sample(torch.tensor([[0]]), torch.tensor([0.1, 0.2])), "one for each of 1"),
        (lambda: PATH.sample(torch.tensor([[0]]), math.nan), r"in \[0, 1\]"),
        (lambda: PATH.sample(torch.zeros(1, 2, 3, dtype=torch.long), 0.5), "expected rows of 7 letters"),
        (lambda: PATH.tau(-0.1), r"t holds -0\.1.*in \[0, 1\]"),
        (lambda: PATH.velocity(states(2, 3), states(2, 3), torch.tensor([0.1, 1.5])), r"in \[0, 1\]"),
        (lambda: PATH.posterior(states(2), states(1)[0], 2.0), r"in \[0, 1\]"),
        (lambda: gumbel_flow_loss(lambda x, t, cond: x, PATH, torch.tensor([[0, 1]]), torch.tensor([True, True])), r"mask is \(2,\)"),
        (lambda: gumbel_flow_loss(lambda x, t, cond: x[..., :3], PATH, torch.tensor([[0]])), "expected as many logits"),
        (lambda: gumbel_flow_loss(lambda x, t, cond: x, PATH, torch.tensor([[0]]), torch.tensor([[False]])), "no real position"),
    ],
)
def test_what_cannot_be_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
