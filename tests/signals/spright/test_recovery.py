"""Recovery: exact support and values without and with noise, ghosts, the threshold of density evolution, counts of queries."""

from __future__ import annotations

import math
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewer.meters import counting
from fewer.signals.spright import ArrayFunction, SparseSpectrum, WHTConfig, fwht, sparse_wht
from fewer.signals.spright.bins.bits import pack, signs, unpack
from fewer.signals.spright.bins.hashing import add_columns
from fewer.signals.spright.bins.offsets import choose_offsets
from fewer.signals.spright.bins.peeling import Limits, hash_all, peel


def random_spectrum(n: int, k: int, rng: np.random.Generator, *, equal: bool = False) -> SparseSpectrum:
    """k coefficients at uniformly drawn places, of magnitude 1, or between 1 and 2."""
    indices = np.unique(rng.integers(0, 2, (k, n), dtype=np.uint8), axis=0)
    values = rng.choice([-1.0, 1.0], len(indices)) * (1 if equal else 1 + rng.random(len(indices)))
    return SparseSpectrum(indices, values, np.zeros(len(indices)))


class Noisy:
    """A spectrum with white noise on every answer."""

    def __init__(self, spectrum: SparseSpectrum, std: float, seed: int) -> None:
        self.spectrum, self.std, self.rng = spectrum, std, np.random.default_rng(seed)

    def __call__(self, m):
        return self.spectrum(m) + self.std * self.rng.standard_normal(len(m))


def same(found: SparseSpectrum, true: SparseSpectrum, tolerance: float) -> bool:
    ours, theirs = found.to_dict(), true.to_dict()
    return ours.keys() == theirs.keys() and all(abs(ours[k] - theirs[k]) <= tolerance for k in ours)


def test_noiseless_recovery_is_exact_for_every_seed():
    for seed in range(100):
        true = random_spectrum(20, 40, np.random.default_rng(seed))
        found = sparse_wht(true, 20, sparsity=40, design="none", seed=seed)
        assert same(found, true, 1e-9), seed
        assert found.converged


def test_150_variables_need_a_small_part_of_the_columns_of_a_list_of_monomials():
    """Exact for every seed; the queries are C B P, below 2 % of the monomials of degree <= 4, though the support has no such limit."""
    for seed in range(20):
        true = random_spectrum(150, 20, np.random.default_rng(seed))
        found = sparse_wht(true, 150, sparsity=20, design="none", seed=seed)
        assert same(found, true, 1e-9), seed
        assert found.queries <= 3 * 32 * (151 + 16)
        assert found.queries < 0.02 * sum(math.comb(150, degree) for degree in range(5))


@pytest.mark.parametrize("design", ["so", "nso"])
def test_support_is_exact_at_10_decibels(design):
    """|X| = 1 and nu^2 = sigma^2 / B = 0.1: at least 95 of 100 seeds, values within 4 standard errors, which are the true spread."""
    exact, errors = 0, []
    for seed in range(100):
        true = random_spectrum(16, 16, np.random.default_rng(seed), equal=True)
        found = sparse_wht(Noisy(true, math.sqrt(0.1 * 32), seed), 16, sparsity=16, design=design, seed=seed)
        if found.to_dict().keys() == true.to_dict().keys():
            exact += 1
            truth = true.to_dict()
            errors += [(value - truth[k]) / error for (k, value), error in zip(found.to_dict().items(), found.stderr, strict=True)]
    assert exact >= 95
    assert (np.abs(errors) < 4).mean() > 0.998
    assert 0.85 < np.std(errors) < 1.2


def bins_with(indices: np.ndarray, values: np.ndarray, columns: np.ndarray, offsets, noise: float, rng) -> np.ndarray:
    """The bins of all groups that hold these coefficients."""
    bins = noise * rng.standard_normal((len(columns), 1 << columns.shape[1], len(offsets.points)))
    signature = signs(pack(indices), offsets.words)
    for group, each in zip(bins, columns, strict=True):
        np.add.at(group, hash_all(pack(each), pack(indices)), values[:, None] * signature)
    return bins


def accepted(bins: np.ndarray, columns: np.ndarray, offsets, n: int, limits: Limits) -> np.ndarray:
    """The indices that peeling accepts, whatever becomes of them."""
    return unpack(peel(bins, np.stack([pack(each) for each in columns]), offsets, n, limits).indices, n)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("noise", [0.0, math.sqrt(0.1)])
def test_equal_coefficients_never_pass_for_one(size, noise):
    """Multi-tons of one coset: none of 1000 trials without noise; with noise, fewer than one in a thousand (so, nso in turn)."""
    n, trials = 20, 1000
    rng = np.random.default_rng(size)
    ghosts = 0
    for trial in range(trials):
        design = "none" if not noise else ("so", "nso")[trial % 2]
        offsets = choose_offsets(n, design, None, rng)
        columns = np.stack([add_columns(np.zeros((0, n), dtype=np.uint8), 3, rng) for _ in range(2)])
        indices = np.zeros((0, n), dtype=np.uint8)
        while len(np.unique(indices, axis=0)) < size:  # all of them in bin 0 of the first group
            drawn = rng.integers(0, 2, (200, n), dtype=np.uint8)
            indices = drawn[((drawn.astype(int) @ columns[0].T) % 2 == 0).all(axis=1)][:size]
        gamma = 0.5 + 2 * math.sqrt(2 / len(offsets.points))
        limits = Limits(not noise, 1e-12, np.full(2, (1 + gamma) * noise**2), np.zeros(2), n)
        bins = bins_with(indices, rng.choice([-1.0, 1.0], size), columns, offsets, noise, rng)
        found = {bytes(each) for each in accepted(bins, columns, offsets, n, limits)}
        ghosts += not found <= {bytes(each) for each in indices}
    assert ghosts == 0


@pytest.mark.parametrize("design", ["none", "so", "nso"])
def test_signs_that_are_no_signature_are_not_accepted(design):
    """All magnitudes are equal, as those of a single-ton, but random signs agree with no index of the bin; those of an index are accepted."""
    n, rng = 20, np.random.default_rng(0)
    for _ in range(100):
        offsets = choose_offsets(n, design, None, rng)
        limits = Limits(design == "none", 1e-12, np.full(2, 0.1), np.zeros(2), n)
        columns = np.stack([add_columns(np.zeros((0, n), dtype=np.uint8), 4, rng) for _ in range(2)])
        bins = np.zeros((2, 16, len(offsets.points)))
        bins[:, 0] = rng.choice([-1.0, 1.0], (2, len(offsets.points)))
        assert len(accepted(bins, columns, offsets, n, limits)) == 0
        index = np.zeros((1, n), dtype=np.uint8)
        index[0, rng.choice(n, 2, replace=False)] = 1
        bins = bins_with(index, np.ones(1), columns, offsets, 0.0, rng)
        assert (accepted(bins, columns, offsets, n, limits) == index).all()


def test_three_equal_coefficients_of_few_ones_are_told_apart():
    """At the paper's 0, e_1 ... e_n these three look like their sum: all magnitudes are equal. At random offsets they do not."""
    n = 60
    indices = np.zeros((3, n), dtype=np.uint8)
    indices[0, 0] = indices[1, 1] = indices[2, :2] = 1
    values = np.array([1.0, 1.0, -1.0])
    units = np.concatenate([np.zeros((1, n), dtype=np.uint8), np.eye(n, dtype=np.uint8)])
    assert np.allclose(np.abs(values @ signs(pack(indices), pack(units))), 1)
    limits = Limits(True, 1e-12, np.zeros(2), np.zeros(2), n)
    for seed in range(20):
        offsets = choose_offsets(n, "none", None, np.random.default_rng(seed))
        assert len(offsets.points) == n + 1
        columns = np.zeros((2, 0, n), dtype=np.uint8)
        bins = bins_with(indices, values, columns, offsets, 0.0, np.random.default_rng(seed))
        assert len(accepted(bins, columns, offsets, n, limits)) == 0


def test_peeling_fails_and_succeeds_on_the_two_sides_of_density_evolution():
    """eta_3 = 0.4073: with B = 256 bins (a power of two) and K around 500 to 700, success crosses one half between 0.36 and 0.46."""
    rate = {}
    for ratio in (0.36, 0.46):
        k = round(256 / ratio)
        seeds = range(12)
        found = [sparse_wht(random_spectrum(24, k, np.random.default_rng(s)), 24, bins=256, design="none", seed=s) for s in seeds]
        rate[ratio] = np.mean([each.converged for each in found])
    assert rate[0.36] < 0.5 < rate[0.46]


class Recorded:
    """f, and every point it was asked."""

    def __init__(self, f, batch_size=4096):
        self.f, self.asked, self.calls, self.batch_size = f, [], 0, batch_size

    def __call__(self, m):
        assert m.dtype == np.uint8
        assert len(m) <= self.batch_size
        self.asked += [row.tobytes() for row in m]
        self.calls += 1
        return self.f(m)


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 70), st.sampled_from(["so", "nso", "none"]), st.sampled_from([None, 1, 3]), st.integers(0, 1000), st.integers(100, 5000)
)
def test_queries_are_counted_exactly_and_none_is_asked_twice(n, design, sparsity, seed, batch_size):
    f = Recorded(random_spectrum(n, 2, np.random.default_rng(seed)), batch_size)
    with counting() as counts:
        found = sparse_wht(
            f, n, sparsity=min(sparsity, 2) if sparsity else None, design=design, seed=seed, config=WHTConfig(batch_size=batch_size)
        )
    assert found.queries == len(f.asked) == len(set(f.asked)) == counts["queries"]
    assert all(len(point) == n and set(point) <= {0, 1} for point in f.asked)
    assert f.calls <= math.ceil(found.queries / batch_size) + 8  # a call a batch; a last, shorter one a round


def test_queries_grow_as_the_sparsity_times_the_variables():
    def queries(k, n=40, design="so"):
        return sparse_wht(lambda m: np.ones(len(m)), n, sparsity=k, design=design).queries

    counts = [queries(k) for k in (26, 53, 106, 212)]
    slope = np.polyfit(np.log([26, 53, 106, 212]), np.log(counts), 1)[0]
    assert 0.9 <= slope <= 1.1
    assert queries(24) < queries(24, design="nso") / 5
    assert 0.9 <= np.polyfit(np.log([20, 40, 80]), np.log([queries(12, n) for n in (20, 40, 80)]), 1)[0] <= 1.1


@pytest.mark.parametrize("design", ["so", "nso", "none"])
def test_constant_parity_and_zero_functions(design):
    constant = sparse_wht(lambda m: np.full(len(m), 7.0), 30, design=design)
    assert constant.to_dict() == pytest.approx({"0" * 30: 7.0})
    parity = sparse_wht(lambda m: 1 - 2.0 * (m.sum(axis=1) % 2), 30, sparsity=1, design=design)
    assert parity.to_dict() == pytest.approx({"1" * 30: 1.0})
    zero = sparse_wht(lambda m: np.zeros(len(m)), 30, design=design)
    assert len(zero) == 0
    assert all(each.converged and each.residual_bins == 0 for each in (constant, parity, zero))


@pytest.mark.parametrize(("design", "noise"), [("none", 0.0), ("so", 0.0), ("nso", 0.0), ("so", 0.5)])
def test_more_coefficients_than_bins_can_carry_invent_nothing(design, noise):
    true = random_spectrum(20, 200, np.random.default_rng(0))
    found = sparse_wht(Noisy(true, noise, 0), 20, sparsity=10, design=design, noise_std=noise or None)
    assert not found.converged
    assert found.residual_bins > 0
    known = true.to_dict()
    assert not [
        k for (k, value), error in zip(found.to_dict().items(), found.stderr, strict=True) if abs(value) > 4 * error and k not in known
    ]


def test_an_unknown_sparsity_is_found_by_doubling_and_rounds_share_their_samples():
    true = random_spectrum(20, 100, np.random.default_rng(3))
    f = Recorded(true)
    found = sparse_wht(f, 20, max_queries=60_000)
    assert same(found, true, 1e-9)
    assert found.converged
    assert found.queries <= 3 * 128 * 60  # not the sum over all rounds: one is half of the next
    noisy = sparse_wht(Noisy(true, 1.0, 0), 20, noise_std=1.0)
    assert noisy.to_dict().keys() == true.to_dict().keys()
    assert noisy.noise_std == pytest.approx(1.0, rel=0.02)


@pytest.mark.parametrize("refine", [True, False])
@pytest.mark.parametrize("value", [7.0, 0.1, 1e-30, 1e30])
def test_rounding_is_not_taken_for_noise(refine, value):
    """A constant that floats cannot say exactly, and one with a small parity: the first round is the last, at any scale."""
    constant = sparse_wht(lambda m: np.full(len(m), value), 30, refine=refine)
    assert constant.to_dict() == pytest.approx({"0" * 30: value})
    assert constant.converged
    assert constant.queries <= 3 * 4 * 85
    both = sparse_wht(lambda m: value * (1 + 1e-3 * (1 - 2.0 * m[:, 4])), 30, refine=refine)
    assert both.converged
    assert both.to_dict() == pytest.approx({"0" * 30: value, "00001" + "0" * 25: 1e-3 * value}, rel=1e-9)


def test_a_budget_is_kept():
    true = random_spectrum(20, 300, np.random.default_rng(3))
    found = sparse_wht(true, 20, max_queries=10_000)
    assert found.queries <= 10_000
    assert not found.converged


@pytest.mark.parametrize("design", ["so", "nso", "none"])
def test_partition_hashing_and_rate_three(design):
    true = random_spectrum(24, 40, np.random.default_rng(0))
    for sparsity in (40, None):
        assert same(sparse_wht(true, 24, sparsity=sparsity, design=design, config=WHTConfig(hashing="partition")), true, 1e-9)
    assert same(sparse_wht(true, 24, sparsity=40, design=design, config=WHTConfig(rate=3)), true, 1e-9)


@given(st.integers(1, 7), st.sampled_from(["so", "nso", "none"]), st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_few_variables_with_every_coefficient_equal_the_full_transform(n, design, seed):
    x = np.random.default_rng(seed).standard_normal(2**n)
    found = sparse_wht(ArrayFunction(x), n, sparsity=2**n, design=design, seed=seed)
    full = fwht(x)
    assert found.queries <= 2**n
    for k, value in found.to_dict().items():
        assert value == pytest.approx(full[int(k, 2)], abs=1e-9)
    assert len(found) == 2**n


def karate_edges() -> tuple[set, np.ndarray]:
    graph = nx.karate_club_graph()
    return {tuple(sorted(edge)) for edge in graph.edges}, nx.to_numpy_array(graph, weight=None)


@pytest.mark.parametrize("how", [{"sparsity": 79}, {"sparsity": 79, "design": "none"}, {"max_degree": 2}])
def test_the_edges_of_the_karate_club_come_from_cut_sizes(how):
    edges, adjacency = karate_edges()
    found = sparse_wht(lambda m: (m.astype(float) @ adjacency * (1 - m.astype(float))).sum(axis=1), 34, **how)
    pairs = {tuple(np.flatnonzero(k)): value for k, value in zip(found.indices, found.values, strict=True) if k.sum() == 2}
    assert set(pairs) == edges
    assert np.allclose(list(pairs.values()), -0.5)
    assert len(found) == 79
    assert found.to_dict()["0" * 34] == pytest.approx(78 / 2)


def test_a_bound_on_the_degree_saves_queries_and_falls_back_where_lists_are_long():
    rng = np.random.default_rng(0)
    drawn = np.zeros((12, 30), dtype=np.uint8)
    for row in drawn:
        row[rng.choice(30, rng.integers(1, 4), replace=False)] = 1
    indices = np.unique(drawn, axis=0)
    true = SparseSpectrum(indices, 1 + rng.random(len(indices)), np.zeros(len(indices)))
    bounded, free = (sparse_wht(true, 30, sparsity=12, max_degree=degree) for degree in (3, None))
    assert same(bounded, true, 1e-9)
    assert bounded.queries < free.queries / 3
    noisy = sparse_wht(Noisy(true, math.sqrt(0.1 * 16), 0), 30, sparsity=12, max_degree=3)
    assert noisy.to_dict().keys() == true.to_dict().keys()
    long = random_spectrum(30, 12, rng)
    fallen_back = sparse_wht(long, 30, sparsity=12, max_degree=15)
    assert (fallen_back.order() <= 15).all()
    assert fallen_back.queries == free.queries


def pairs_function(m):
    return 1.0 * m[:, 0] * m[:, 5] - 2.0 * m[:, 3] * m[:, 69]


def test_two_worker_processes_give_the_same_result():
    here = sparse_wht(pairs_function, 70, sparsity=8, config=WHTConfig(batch_size=500))
    with ProcessPoolExecutor(2, mp_context=get_context("forkserver")) as executor:
        there = sparse_wht(pairs_function, 70, sparsity=8, config=WHTConfig(batch_size=500, executor=executor))
    assert (here.indices == there.indices).all()
    assert (here.values == there.values).all()
    assert here.queries == there.queries


def test_the_joint_fit_is_least_squares_on_all_samples():
    """Against numpy's lstsq on every asked point and its answer (128 variables: no point falls on another)."""
    true = random_spectrum(128, 10, np.random.default_rng(0))
    points, answers = [], []
    noisy = Noisy(true, 0.5, 0)

    def f(m):
        points.append(m)
        answers.append(noisy(m))
        return answers[-1]

    found = sparse_wht(f, 128, sparsity=10, groups=3)
    design = signs(pack(np.concatenate(points)), pack(found.indices))
    values, left, *_ = np.linalg.lstsq(design, np.concatenate(answers), rcond=None)
    assert np.allclose(found.values, values, atol=2e-3)
    spread = math.sqrt(left[0] / (len(design) - len(values)))
    assert found.noise_std == pytest.approx(spread, rel=0.05)
    assert np.allclose(found.stderr, spread * np.sqrt(np.diag(np.linalg.inv(design.T @ design))), rtol=0.05)
    rough = sparse_wht(Noisy(true, 0.5, 0), 128, sparsity=10, groups=3, refine=False)
    truth = true.to_dict()
    error = [sum((each.to_dict()[k] - truth[k]) ** 2 for k in truth) for each in (found, rough)]
    assert error[0] < error[1]
