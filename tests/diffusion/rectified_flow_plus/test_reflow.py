"""The law of times and the training."""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, replace

import pytest
import torch
from flows import randn
from scipy import stats
from torch import nn

from fewer.diffusion.rectified_flow_plus import (
    FeatureDistance,
    LPIPSHuber,
    PairDataset,
    ReflowConfig,
    SquaredL2,
    UShapedTimesteps,
    sample,
    sample_t,
    train_reflow,
)
from fewer.diffusion.rectified_flow_plus.reflow import SkippingAdam


class Line(nn.Module):
    """v = W x + b t + c."""

    def __init__(self) -> None:
        super().__init__()
        self.map, self.drop = nn.Linear(3, 2), nn.Dropout(0.0)

    def forward(self, x, t, *condition):
        column = t.expand(len(x)).to(x).reshape(-1, 1)
        return self.drop(self.map(torch.cat([x, column], 1)))


class Narrow(Line):
    def forward(self, x, t, *condition):
        return super().forward(x, t)[:, :1]


SHIFT = torch.tensor([0.5, -0.5])


def pairs_of(n=400):
    z = randn(n, 2).float()
    return PairDataset(z + SHIFT, z)


# The law


@pytest.mark.parametrize("a", [0.0, 1.0, 4.0, 12.0])
def test_times_follow_the_closed_form_law(a):
    t = sample_t(1_000_000, a, generator=torch.Generator().manual_seed(0))
    free = ((t.double() - 1e-5) / (1 - 2e-5)).clamp(0, 1)
    law = UShapedTimesteps(a)
    assert stats.kstest(free.numpy(), lambda q: law.cdf(torch.from_numpy(q)).numpy()).pvalue > 1e-3
    assert float(t.min()) >= 1e-5 * (1 - 1e-6)
    assert float(t.max()) <= 1 - 1e-5 + 1e-7


def test_the_moments_are_those_of_the_released_code():
    t = sample_t(1_000_000, generator=torch.Generator().manual_seed(1)).double()
    for seen, wanted in (
        ((t - 0.5).abs(), 0.309601),
        ((t - 0.5).square(), 0.115671),
        ((t < 0.1).double(), 0.172504),
        (((t > 0.4) & (t < 0.6)).double(), 0.113253),
    ):
        assert abs(float(seen.mean()) - wanted) < 3 * float(seen.std()) / 1000 + 5e-6


@pytest.mark.parametrize("a", [0.0, 1e-6, 4.0, 20.0])
def test_density_distribution_and_quantiles_are_one_law(a):
    law, t = UShapedTimesteps(a), torch.linspace(0, 1, 2001, dtype=torch.float64)
    assert abs(float(torch.trapezoid(law.pdf(t), t)) - 1) < 1e-4
    assert torch.allclose(torch.cumulative_trapezoid(law.pdf(t), t), law.cdf(t)[1:], atol=1e-4)
    assert torch.allclose(law.icdf(law.cdf(t)), t, atol=1e-6)
    assert torch.allclose(law.pdf(t), law.pdf(1 - t)), "symmetric: no cosh of one side"
    if a <= 1e-6:
        assert torch.allclose(law.pdf(t), torch.ones_like(t), atol=1e-5), "a to 0 is uniform"


# The training


def test_the_straight_flow_of_the_pairs_is_found_and_one_call_samples_it():
    model = Line()
    before = copy.deepcopy(model.state_dict())
    config = ReflowConfig(steps=400, batch_size=64, lr=0.05, warm_up=10, decay=True, ema=0.9)
    student = train_reflow(model, pairs_of(), config, SquaredL2())
    z = randn(200, 2, seed=5).float()
    assert torch.allclose(sample(student, z, 1), z + SHIFT, atol=0.02)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items()), "the model is left as it is"
    assert model.training
    assert not student.training
    assert not any(weight.requires_grad for weight in student.parameters())
    again = train_reflow(model, pairs_of(), config, SquaredL2())
    assert torch.equal(again.map.weight, student.map.weight)


def test_where_training_begins_the_first_loss_is_the_teachers():
    """No random network under the name of the teacher."""
    model, seen = Line(), []
    pairs, config = pairs_of(), ReflowConfig(steps=1, batch_size=50_000, a=0.0)
    train_reflow(model, pairs, config, SquaredL2(), tell=lambda step, loss: seen.append(loss))
    x, z = pairs.batch(torch.randint(400, (50_000,)))
    t = torch.rand(50_000)
    with torch.no_grad():
        wanted = (model((1 - t[:, None]) * x + t[:, None] * z, t) - (z - x)).square().mean()
    assert abs(seen[0] / float(wanted) - 1) < 0.03


def test_other_times_and_a_default_premetric():
    times = []

    def at_the_end(n, generator):
        times.append(n)
        return torch.full((n,), 1 - 1e-5)

    train_reflow(Line(), pairs_of(), ReflowConfig(steps=3, batch_size=8), SquaredL2(), draw_times=at_the_end)
    assert times == [8, 8, 8]

    class Still(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x, t):
            return self.scale * x

    images = PairDataset(torch.zeros(8, 1, 4, 4, dtype=torch.uint8), torch.arange(8))
    losses = []
    train_reflow(Still(), images, ReflowConfig(steps=2, batch_size=4), tell=lambda step, loss: losses.append(loss))
    assert len(losses) == 2
    assert all(math.isfinite(each) for each in losses)


def test_real_pairs_take_their_share_of_a_batch_with_labels():
    seen = []

    class Noted(Line):
        def forward(self, x, t, label):
            seen.append(label)
            return super().forward(x, t)

    made, real = (PairDataset(pair.x, pair.z, torch.full((400,), label)) for label, pair in ((1, pairs_of()), (7, pairs_of())))
    config = ReflowConfig(steps=100, batch_size=20, real_share=0.25)
    brief = config.on_real_data()
    assert (brief.steps, brief.lr, brief.real_share) == (5, config.lr / 10, 0.25)
    train_reflow(Noted(), made, brief, SquaredL2(), real=real)
    assert len(seen) == 5
    assert all((each == 7).sum() == 5 and (each == 1).sum() == 15 for each in seen)


def test_steps_that_are_not_finite_are_left_out_and_counted():
    model = Line()

    class Sometimes(SquaredL2):
        calls = 0

        def forward(self, v, x, z, t):
            self.calls += 1
            return super().forward(v, x, z, t) * (float("nan") if self.calls % 2 else 1.0)

    student = train_reflow(model, pairs_of(), ReflowConfig(steps=50, batch_size=8, warm_up=0), Sometimes())
    assert student.skipped_steps == 25, "more than 20, but not in a row"
    assert student.map.weight.isfinite().all()

    class Never(SquaredL2):
        def forward(self, v, x, z, t):
            return super().forward(v, x, z, t) * float("inf")

    taken = []
    with pytest.raises(FloatingPointError, match="20 steps in a row"):
        train_reflow(model, pairs_of(), ReflowConfig(steps=50, batch_size=8), Never(), tell=lambda step, loss: taken.append(step))
    assert len(taken) == 19


def test_an_overflow_halves_the_loss_scale_and_leaves_the_weights():
    weight = nn.Parameter(torch.ones(2))
    optimizer = SkippingAdam([weight], 0.1, 32768.0)
    weight.grad = torch.tensor([math.inf, 1.0])
    optimizer.step()
    assert (optimizer.scale, optimizer.skipped, weight.tolist()) == (16384.0, 1, [1.0, 1.0])
    plain = nn.Parameter(torch.ones(2))
    theirs = torch.optim.Adam([plain], lr=0.1)
    for gradient in ([1e-8, 2e-8], [5e-9, -1e-8]):  # as small as Adam's eps, which a scale would leave behind
        weight.grad, plain.grad = torch.tensor(gradient) * optimizer.scale, torch.tensor(gradient)
        optimizer.step()
        theirs.step()
    assert torch.allclose(weight, plain)
    assert not torch.allclose(weight, torch.ones(2), atol=1e-2)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_learns_the_same_flow(precision):
    config = ReflowConfig(steps=200, batch_size=64, lr=0.05, warm_up=10, decay=True, ema=0.9, precision=precision)
    student = train_reflow(Line(), pairs_of(), config, SquaredL2())
    z = randn(200, 2, seed=5).float()
    assert torch.allclose(sample(student, z, 1), z + SHIFT, atol=0.1)
    assert student.map.weight.dtype == torch.float32


def test_dropout_is_the_configs_and_off_in_what_comes_back():
    model = Line()
    student = train_reflow(model, pairs_of(), ReflowConfig(steps=1, batch_size=4, dropout=0.13), SquaredL2())
    assert (student.drop.p, model.drop.p) == (0.13, 0.0)


def test_what_is_frozen_is_not_trained_unless_all_is():
    config = ReflowConfig(steps=3, batch_size=8, lr=0.1, warm_up=0, ema=0.0)
    model = Line()
    model.map.bias.requires_grad_(False)
    student = train_reflow(model, pairs_of(), config, SquaredL2())
    assert torch.equal(student.map.bias, model.map.bias)
    assert not torch.equal(student.map.weight, model.map.weight)
    student = train_reflow(model.requires_grad_(False), pairs_of(), config, SquaredL2())
    assert not torch.equal(student.map.bias, model.map.bias)


def test_the_rate_rises_in_a_line_and_falls_where_it_is_told_to():
    config = ReflowConfig(steps=12, warm_up=4)
    assert [config.rate(step) for step in (0, 1, 3, 4, 11)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    falling = replace(config, decay=True)
    assert [falling.rate(step) for step in (0, 3, 4, 8, 11)] == [0.25, 1.0, 1.0, 0.5, 0.125]
    model, seen = Line(), []
    for warm_up in (0, 100):
        student = train_reflow(model, pairs_of(), ReflowConfig(steps=1, batch_size=8, lr=0.1, warm_up=warm_up), SquaredL2())
        seen.append(float((student.map.weight - model.map.weight).detach().abs().max()))
    assert seen[0] == pytest.approx(100 * seen[1], rel=0.01)


def test_presets_are_the_papers():
    assert ReflowConfig.preset("cifar10") == ReflowConfig(800_000, 512, 2e-4, 5000, ema=0.9999, dropout=0.13)
    assert ReflowConfig.preset("imagenet64").batch_size == 2048
    assert ReflowConfig(**asdict(ReflowConfig.preset("afhq64"))) == ReflowConfig.preset("ffhq64")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: sample_t(3, a=-1.0), "a is -1"),
        (lambda: sample_t(3, eps=0.5), "eps is 0.5"),
        (lambda: UShapedTimesteps(100.0), "expected 0 to 80"),
        (lambda: ReflowConfig(steps=0), "steps is 0"),
        (lambda: train_reflow(Line(), pairs_of(), ReflowConfig(steps=1)), r"expected images \[B, C, H, W\]: take PseudoHuber"),
        (lambda: train_reflow(Narrow(), pairs_of(), ReflowConfig(steps=1, batch_size=8)), r"answers \(8, 1\); expected \(8, 2\)"),
        (lambda: ReflowConfig(precision="half"), "precision is 'half'"),
        (lambda: ReflowConfig(dropout=1.5), "dropout is 1.5"),
        (lambda: ReflowConfig.preset("lsun"), "expected one of cifar10"),
        (
            lambda: train_reflow(Line(), pairs_of(), ReflowConfig(steps=1), real=PairDataset(torch.zeros(3, 5), torch.zeros(3, 5))),
            "one shape",
        ),
        (lambda: LPIPSHuber(FeatureDistance(nn.Sequential(nn.Linear(1, 1)), ["0"])), "train mode"),
    ],
)
def test_what_cannot_be_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
