"""The static algorithm against dense inverses, closed forms and its own recursion."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewer.optimization import InverseFisher
from fewer.optimization.mfac.window.factor import factorise

METHODS = ["cholesky", "recursion"]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense_inverse(grads: torch.Tensor, damping: float, block_size: int | None = None) -> torch.Tensor:
    m, d = grads.shape
    fisher = damping * torch.eye(d, dtype=torch.float64) + grads.T.double() @ grads.double() / m
    if block_size:
        block = torch.arange(d) // block_size
        fisher = torch.where(block[:, None] == block, fisher, 0.0)
    return torch.linalg.inv(fisher)


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("damping", "close"), [(1e-1, 1e-8), (1e-3, 1e-8), (1e-6, 1e-5)])
def test_product_diagonal_and_elements_are_those_of_the_dense_inverse(method, damping, close):
    grads, x = draw(50, 200), draw(200, seed=1)
    fisher, inverse = InverseFisher(grads, damping, method=method, chunk=64), dense_inverse(grads, damping)
    assert distance(fisher @ x, inverse @ x) < close
    assert distance(fisher.diagonal(), inverse.diagonal()) < close
    for i, j in [(0, 0), (3, 100), (199, 199), (198, 7)]:
        assert abs(fisher.element(i, j) - float(inverse[i, j])) < close * float(inverse.abs().max())
    assert (fisher.m, fisher.d, fisher.damping) == (50, 200, damping)


def test_many_right_hand_sides_are_solved_at_once():
    grads, right = draw(20, 90), draw(90, 7, seed=1)
    fisher = InverseFisher(grads, 1e-2)
    assert distance(fisher.solve(right), dense_inverse(grads, 1e-2) @ right) < 1e-10
    assert torch.equal(fisher.solve(right), fisher @ right)
    before = right.clone()
    fisher.solve(right)
    assert torch.equal(right, before)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 12), st.integers(1, 30), st.integers(1, 40), st.integers(1, 50), st.integers(0, 10))
def test_the_recursion_and_the_factor_agree_in_every_shape(m, d, block_size, chunk, seed):
    grads, x = draw(m, d, seed=seed), draw(d, seed=seed + 100)
    factor, recursion = (InverseFisher(grads, 1e-2, block_size=block_size, method=method, chunk=chunk) for method in METHODS)
    assert distance(factor @ x, recursion @ x) < 1e-9
    assert distance(factor.diagonal(), recursion.diagonal()) < 1e-9
    assert factor.element(0, d - 1) == pytest.approx(recursion.element(0, d - 1), abs=1e-9 * 100)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("block_size", [7, 30, 64, 500])  # below m, above it, one that d is no multiple of, all
def test_blocks_are_the_dense_inverse_of_the_block_diagonal_matrix(method, block_size):
    grads, x = draw(25, 100), draw(100, seed=1)
    fisher, inverse = InverseFisher(grads, 1e-2, block_size=block_size, method=method), dense_inverse(grads, 1e-2, block_size)
    assert distance(fisher @ x, inverse @ x) < 1e-10
    assert distance(fisher.diagonal(), inverse.diagonal()) < 1e-10
    for i, j in [(0, 6), (6, 7), (98, 99), (64, 99), (0, 99)]:
        assert fisher.element(i, j) == pytest.approx(float(inverse[i, j]), abs=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_one_gradient_has_a_closed_form(method):
    g, x, damping = draw(1, 40), draw(40, seed=1), 1e-3
    expected = x / damping - g[0] * (g[0] @ x) / (damping * (damping + g[0] @ g[0]))
    assert distance(InverseFisher(g, damping, method=method) @ x, expected) < 1e-10


@pytest.mark.parametrize("method", METHODS)
def test_without_gradients_only_the_damping_is_left(method):
    x = draw(40)
    assert torch.equal(InverseFisher(torch.zeros(5, 40).double(), 0.125, method=method) @ x, x / 0.125)


@pytest.mark.parametrize("method", METHODS)
def test_fisher_times_its_inverse_is_the_identity(method):
    grads, x, damping = draw(30, 80), draw(80, seed=1), 1e-3
    y = InverseFisher(grads, damping, method=method) @ x
    assert distance(damping * y + grads.T @ (grads @ y) / 30, x) < 1e-9


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_the_gradients_does_not_matter(method):
    grads, x = draw(30, 80), draw(80, seed=1)
    shuffled = grads[torch.randperm(30, generator=torch.Generator().manual_seed(1))]
    assert distance(InverseFisher(shuffled, 1e-2, method=method) @ x, InverseFisher(grads, 1e-2, method=method) @ x) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_stored_in_few_bits_lose_nothing_beyond_that(dtype):
    grads, x = draw(20, 300).to(dtype), draw(300, seed=1)
    for block_size in (None, 10):
        assert distance(InverseFisher(grads, 1e-6, block_size=block_size) @ x, dense_inverse(grads, 1e-6, block_size) @ x) < 1e-6


def test_a_matrix_that_rounding_made_indefinite_is_factored_all_the_same():
    g = draw(1, 6)
    gram = 1e20 * g.T @ g  # rank one, and a floor far below its last digit
    upper = factorise(gram + 1e-6 * torch.eye(6).double(), floor=1e-6)
    assert float((upper.T @ upper - gram).abs().max()) < 2e-12 * float(gram.trace())  # eigenvalues are raised to 1e-12 of the largest
    assert bool((upper.diagonal() > 0).all())
    duplicates = InverseFisher(1e9 * draw(1, 30).repeat(8, 1), damping=1e-9)
    assert bool((duplicates @ draw(30)).isfinite().all())


def test_finite_gradients_whose_sum_overflows_are_taken():
    assert InverseFisher(torch.full((2, 4), 3e38), damping=1.0).diagonal().isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InverseFisher(torch.zeros(3)), r"grads is \(3,\).*expected a floating-point tensor \[m, d\]"),
        (lambda: InverseFisher(torch.zeros(3, 3, dtype=torch.int64)), "int64.*expected a floating-point"),
        (lambda: InverseFisher(torch.zeros(0, 3)), r"\(0, 3\), which is empty"),
        (lambda: InverseFisher(torch.tensor([[1.0], [float("nan")]])), "NaN or infinite value in row 1"),
        (lambda: InverseFisher(torch.tensor([[float("inf")], [1.0]])), "NaN or infinite value in row 0"),
        (lambda: InverseFisher(torch.ones(2, 2), damping=0.0), "damping is 0.0; expected a finite number above 0"),
        (lambda: InverseFisher(torch.ones(2, 2), damping=float("nan")), "damping is nan"),
        (lambda: InverseFisher(torch.ones(2, 2), block_size=0), "block_size is 0; expected a whole number of at least 1"),
        (lambda: InverseFisher(torch.ones(2, 2), chunk=0), "chunk is 0"),
        (lambda: InverseFisher(torch.ones(2, 2), method="lu"), "method is 'lu'; expected one of cholesky, recursion"),
        (lambda: InverseFisher(torch.ones(2, 2)) @ torch.ones(3), r"x is \(3,\).*expected a floating-point tensor \[2\] or \[2, k\]"),
        (lambda: InverseFisher(torch.ones(2, 2)).element(0, 2), r"index 2 is out of range; expected 0..1"),
        (lambda: InverseFisher(torch.ones(2, 2)).element(-1, 0), r"index -1 is out of range"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
