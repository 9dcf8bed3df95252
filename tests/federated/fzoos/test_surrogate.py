"""The surrogate and the shared features against scikit-learn, autograd, central differences and brute force."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, Matern
from sklearn.linear_model import Ridge

from fewer.federated import GradientSurrogate, RandomFeatures
from fewer.federated.fzoos.surrogate import factor_of, slope, slope_at_zero, value

FIXED: Any = {"alpha": 1e-6, "optimizer": None}
KERNELS = {"matern52": lambda scale: Matern(scale, nu=2.5), "rbf": lambda scale: RBF(scale)}
NOISE = 1e-6


def queries(n=40, d=6, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.random((n, d))
    return x, np.sin(3 * x[:, 0]) + (x**2).sum(axis=1)


@pytest.mark.parametrize("kernel", KERNELS)
def test_mean_is_scikit_learns_and_the_gradient_its_central_differences_and_autograds(kernel):
    x, y = queries()
    surrogate = GradientSurrogate(x, y, kernel, length_scale=0.8, noise=NOISE)
    range_ = y.max() - y.min()
    theirs = GaussianProcessRegressor(KERNELS[kernel](0.8), **FIXED).fit(x, (y - y.mean()) / range_)
    at = np.random.default_rng(1).random((5, 6))
    predicted = y.mean() + range_ * theirs.predict(at)
    assert np.abs(surrogate.mean(at).numpy() - predicted).max() <= 1e-9
    assert float(surrogate.mean(at[0])) == pytest.approx(predicted[0], abs=1e-9)
    step = 1e-5
    for point in at:
        ends = [y.mean() + range_ * theirs.predict(point + sign * step * np.eye(6)) for sign in (1, -1)]
        assert np.abs(surrogate.gradient(point).numpy() - (ends[0] - ends[1]) / (2 * step)).max() <= 1e-6
    variable = torch.from_numpy(at).requires_grad_()
    distances = (variable[:, None] - torch.from_numpy(x)).norm(dim=-1)
    mean = surrogate.mean_y + surrogate.range_y * value(distances, 0.8, kernel) @ surrogate.weights
    (by_autograd,) = torch.autograd.grad(mean.sum(), variable)
    assert (surrogate.gradient(at) - by_autograd).abs().max() <= 1e-10


@pytest.mark.parametrize("kernel", KERNELS)
def test_uncertainty_is_the_trace_by_brute_force_and_falls_where_a_point_is_added(kernel):
    x, y = queries(20, 4)
    surrogate = GradientSurrogate(x, y, kernel, length_scale=0.7, noise=NOISE)
    points = torch.from_numpy(x)
    candidates = torch.rand(7, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    matrix = value(torch.cdist(points, points), 0.7, kernel) + NOISE * torch.eye(20, dtype=torch.float64)
    for c, ours in zip(candidates, surrogate.uncertainty(candidates), strict=True):
        jacobian = -(slope((c - points).norm(dim=1), 0.7, kernel)[:, None] * (c - points)).T  # [d, n]
        prior = slope_at_zero(0.7, kernel) * torch.eye(4, dtype=torch.float64)
        trace = (prior - jacobian @ torch.linalg.inv(matrix) @ jacobian.T).trace()
        assert float(ours) == pytest.approx(float(trace), abs=1e-9)
        assert ours >= -1e-9
        more = GradientSurrogate(torch.cat([points, c[None]]), np.append(y, 1.0), kernel, length_scale=0.7, noise=NOISE)
        assert more.uncertainty(c[None]) < ours
    far = surrogate.uncertainty(torch.full((1, 4), 1e3, dtype=torch.float64))
    assert float(far) == pytest.approx(4 * slope_at_zero(0.7, kernel), rel=1e-12)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6), n=st.integers(1, 30), d=st.integers(1, 8), kernel=st.sampled_from(list(KERNELS)), scale=st.floats(0.2, 5)
)
def test_uncertainty_is_never_negative_nor_above_that_of_no_data(seed, n, d, kernel, scale):
    x, y = queries(n, d, seed)
    found = GradientSurrogate(x, y, kernel, scale).uncertainty(np.random.default_rng(seed + 1).random((5, d)))
    most = d * slope_at_zero(scale, kernel)
    assert (found >= -1e-6 * most).all()
    assert (found <= most * (1 + 1e-9)).all()


def test_the_length_scale_is_the_most_likely_of_scikit_learns():
    x, y = queries(60)
    surrogate = GradientSurrogate(x, y, "matern52")
    scaled = (y - y.mean()) / (y.max() - y.min())

    def profile(scale):
        model = GaussianProcessRegressor(Matern(scale, nu=2.5), **FIXED).fit(x, scaled)
        n = len(x)
        return -n / 2 * math.log(scaled @ model.alpha_ / n) - np.log(np.diag(model.L_)).sum()

    scales = np.geomspace(0.1, 100, 13)
    assert surrogate.length_scale == pytest.approx(max(scales, key=profile))


def test_a_linear_functions_gradient_is_found_and_a_constants_is_zero():
    x = np.random.default_rng(0).random((60, 10))
    slope_ = np.random.default_rng(1).standard_normal(10)
    found = GradientSurrogate(x, x @ slope_, "rbf", length_scale=10.0).gradient(np.full(10, 0.5)).numpy()
    assert found @ slope_ / np.linalg.norm(found) / np.linalg.norm(slope_) > 0.9999
    constant = GradientSurrogate(x, np.full(60, 3.0))
    assert torch.equal(constant.gradient(np.full(10, 0.5)), torch.zeros(10, dtype=torch.float64))
    assert float(constant.mean(np.full(10, 0.5))) == 3.0


def test_one_point_integers_strides_and_copies():
    one = GradientSurrogate([[0.5, 0.5]], [2])
    assert float(one.mean([0.1, 0.1])) == 2.0
    x, y = queries(30, 4)
    plain = GradientSurrogate(x, y, length_scale=1.0)
    strided = GradientSurrogate(
        np.repeat(x, 2, axis=0)[::2], torch.from_numpy(y).float().double() * 0 + torch.from_numpy(y), length_scale=1.0
    )
    z = np.full(4, 0.4)
    for other in (strided, copy.deepcopy(plain), pickle.loads(pickle.dumps(plain))):
        assert torch.equal(other.gradient(z), plain.gradient(z))
    single = GradientSurrogate(torch.from_numpy(x).half(), torch.from_numpy(y).half(), length_scale=1.0)
    assert single.gradient(z).dtype == torch.float64


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"x": np.zeros(3), "y": np.zeros(3)}, r"x has the shape \(3,\)"),
        ({"x": np.zeros((3, 2)), "y": np.zeros(4)}, r"y \(4,\); expected points \[n, d\] and values \[n\]"),
        ({"x": np.zeros((0, 2)), "y": np.zeros(0)}, "n >= 1"),
        ({"x": np.full((2, 2), np.nan), "y": np.zeros(2)}, "NaN or infinite"),
        ({"x": np.zeros((2, 2)), "y": np.zeros(2), "kernel": "rfb"}, "did you mean 'rbf'"),
        ({"x": np.zeros((2, 2)), "y": np.zeros(2), "noise": 0}, "noise is 0; expected a finite number above 0"),
        ({"x": np.zeros((2, 2)), "y": np.zeros(2), "length_scale": -1}, "length_scale is -1"),
    ],
)
def test_bad_words_are_refused(words, said):
    with pytest.raises(ValueError, match=said):
        GradientSurrogate(**words)


def test_points_of_another_length_are_refused():
    with pytest.raises(ValueError, match="expected points of 2 numbers"):
        GradientSurrogate(np.eye(2), [0, 1]).gradient(np.zeros(3))


def test_noise_is_raised_with_a_warning_and_given_up_with_an_error():
    x = np.zeros((50, 2))
    with pytest.warns(UserWarning, match="not positive definite with noise 1e-17"):
        raised = GradientSurrogate(x, np.arange(50.0), "rbf", length_scale=1.0, noise=1e-17)
    assert 1e-17 < raised.noise <= 1e-3
    assert raised.factor.isfinite().all()
    with pytest.raises(RuntimeError, match="not positive definite with noise 0.001; expected points apart"):
        factor_of(torch.full((3, 3), math.nan).double(), 1e-3)
    features = RandomFeatures.draw(2, 5)
    with pytest.warns(UserWarning, match="not positive definite with noise 1e-17"):
        assert features.fit(x, np.arange(50.0), noise=1e-17).isfinite().all()


@pytest.mark.parametrize("n", [30, 90])
def test_weights_are_scikit_learns_ridge(n):
    x, y = queries(n, 5)
    features = RandomFeatures.draw(5, 60, seed=3)
    phi = features(x).numpy()
    scaled, range_ = (y - y.mean()) / (y.max() - y.min()), y.max() - y.min()
    theirs = Ridge(alpha=1e-3, fit_intercept=False, solver="cholesky").fit(phi, scaled).coef_ * range_
    ours = features.fit(x, y, noise=1e-3)
    assert np.abs(ours.numpy() - theirs).max() <= 1e-8
    z = torch.rand(5, dtype=torch.float64, requires_grad=True)
    (by_autograd,) = torch.autograd.grad((math.sqrt(2 / 60) * torch.cos(z @ features.w + features.b) * ours).sum(), z)
    assert (features.gradient(z.detach(), ours) - by_autograd).abs().max() <= 1e-10


def test_the_gradient_of_mean_weights_is_the_mean_of_gradients():
    features = RandomFeatures.draw(5, 200, seed=0)
    weights = [features.fit(*queries(30, 5, seed)) for seed in range(4)]
    z = torch.full((5,), 0.3, dtype=torch.float64)
    mean = torch.stack([features.gradient(z, each) for each in weights]).mean(dim=0)
    assert (features.gradient(z, torch.stack(weights).mean(dim=0)) - mean).abs().max() <= 1e-12 * max(1, float(mean.abs().max()))


@pytest.mark.parametrize("count", [500, 2000, 8000])
def test_products_of_features_are_near_the_kernel(count):
    x = np.random.default_rng(0).random((40, 20))
    kernel = RBF(1.0)(x)
    errors = []
    for seed in range(4):
        phi = RandomFeatures.draw(20, count, 1.0, seed)(x).numpy()
        errors.append(np.sqrt(np.mean((phi @ phi.T - kernel) ** 2)))
    assert 0.8 <= np.mean(errors) * math.sqrt(count) <= 1.2


def test_features_of_one_seed_are_the_same_and_say_which_they_are():
    one, same, other = (RandomFeatures.draw(3, 10, seed=seed) for seed in (0, 0, 1))
    assert repr(one) == repr(same) != repr(other)
    with pytest.raises(ValueError, match=r"weights have the shape \(9,\); expected \(10,\)"):
        one.gradient(np.zeros(3), torch.zeros(9))
    with pytest.raises(ValueError, match=r"expected \[d, M\] and \[M\]"):
        RandomFeatures(torch.zeros(3, 4), torch.zeros(5))
    with pytest.raises(ValueError, match="features is 0"):
        RandomFeatures.draw(3, 0)
    with pytest.raises(ValueError, match=r"y \(4,\); expected points \[n, d\] and values \[n\]"):
        one.fit(np.zeros((3, 3)), np.zeros(4))
    with pytest.raises(ValueError, match="expected points of 3 numbers"):
        one.fit(np.zeros((4, 2)), np.zeros(4))
