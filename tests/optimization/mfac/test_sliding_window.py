"""The sliding window against fresh inverses of the same gradients, in one process and in two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import distributed as dist

from fewer.optimization import InverseFisher, SlidingInverseFisher
from fewer.optimization.mfac.window.factor import factorise
from fewer.optimization.mfac.window.row_products import combination, row_products
from house import on_two_processes

M, D = 8, 40


def gradients(number: int, d: int = D, seed: int = 0) -> list[torch.Tensor]:
    """Random ones, among them a zero gradient and duplicates."""
    draw = torch.Generator().manual_seed(seed)
    rows = list(torch.randn(number, d, generator=draw, dtype=torch.float64))
    if number > 20:
        rows[number - 3] = rows[number - 5].clone()
        rows[number - 2] = torch.zeros(d, dtype=torch.float64)
        rows[12] = rows[11].clone()
    return rows


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("damping", [1e-1, 1e-4])
def test_after_many_pushes_it_is_a_fresh_inverse_of_the_last_gradients(damping):
    window, rows, x = SlidingInverseFisher(M, D, damping, torch.float64), gradients(3 * M + 5), gradients(1, seed=1)[0]
    for g in rows:
        window.push(g)
    assert distance(window @ x, InverseFisher(torch.stack(rows[-M:]), damping) @ x) < 1e-8
    assert window.seen == 3 * M + 5


def test_the_updated_factor_is_that_of_a_factorisation_at_every_push():
    window = SlidingInverseFisher(M, D, 1e-3, torch.float64)
    for number, g in enumerate(gradients(5 * M)):
        window.push(g)
        order = window._by_age()
        expected = factorise(window._gram[order][:, order] + 1e-3 * M * torch.eye(M).double(), floor=1e-3 * M)
        assert distance(window._upper, expected) < 1e-9, number
        if number >= M:
            assert torch.equal(window._grads[order], torch.stack(gradients(5 * M)[number - M + 1 : number + 1]))


def test_it_refactors_every_m_replacements_and_not_in_between(monkeypatch):
    from fewer.optimization.mfac.window import sliding_window

    calls = []
    monkeypatch.setattr(sliding_window, "factorise", lambda matrix, floor: (calls.append(1), factorise(matrix, floor))[1])
    window = SlidingInverseFisher(M, D, 1e-2, torch.float64)
    for g in gradients(20)[:16]:
        window.push(g)
    assert len(calls) == 1 + 2


@pytest.mark.parametrize(("scale", "close"), [(1.0, 1e-6), (1e8, 1e-3)])
def test_a_pivot_that_lost_its_digits_asks_for_a_factorisation(scale, close):
    """Nearly parallel gradients of a size at which the damping is lost beside them: the result stays finite and F's."""
    window, g = SlidingInverseFisher(4, 6, 1e-6, torch.float64), scale * gradients(1, 6)[0]
    for _ in range(11):
        u = window.push_and_apply(g)
        assert bool(u.isfinite().all())
    assert distance(u, g / (1e-6 + g @ g)) < close


@pytest.mark.parametrize("warm", [False, True])
def test_pushing_and_applying_is_pushing_then_applying(warm):
    window = SlidingInverseFisher(M, D, 1e-2, torch.float64, warm_window=warm)
    for g in gradients(30):
        u = window.push_and_apply(g)
        assert torch.allclose(u, window @ g, rtol=1e-9, atol=1e-9)


def test_zeros_count_until_the_window_is_full_unless_it_is_warm():
    rows, x = gradients(3), gradients(1, seed=1)[0]
    cold, warm = (SlidingInverseFisher(M, D, 1e-2, torch.float64, warm_window=warm) for warm in (False, True))
    for g in rows:
        cold.push(g)
        warm.push(g)
    padded = torch.cat([torch.stack(rows), torch.zeros(M - 3, D).double()])
    assert distance(cold @ x, InverseFisher(padded, 1e-2) @ x) < 1e-9
    assert distance(warm @ x, InverseFisher(torch.stack(rows), 1e-2) @ x) < 1e-9


def test_float32_storage_is_close_to_float64():
    x, rows = gradients(1, seed=1)[0], gradients(3 * M)
    window = SlidingInverseFisher(M, D, 1e-4, torch.float32)
    for g in rows:
        window.push(g)
    assert distance(window @ x, InverseFisher(torch.stack(rows[-M:]), 1e-4) @ x) < 1e-4
    assert distance(window.push_and_apply(x), InverseFisher(torch.stack([*rows[1 - M :], x]), 1e-4) @ x) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_few_bits_of_storage_give_the_inverse_of_the_rounded_gradients(dtype):
    window, rows = SlidingInverseFisher(M, D, 1e-4, dtype), [g.to(dtype) for g in gradients(2 * M)]
    for g in rows:
        u = window.push_and_apply(g.double())
    fresh = InverseFisher(torch.stack(rows[-M:]).double(), 1e-4)
    assert distance(u, fresh @ rows[-1].double()) < 1e-6
    assert window.bytes == 2 * M * D + 2 * 8 * M * M


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("m", "d"), [(1, 1), (3, 50_001), (9, 300_000)])
def test_the_products_are_those_of_float64_with_any_number_of_threads(m, d, dtype):
    draw = torch.Generator().manual_seed(0)
    grads, x, y = torch.randn(m, d, generator=draw).to(dtype), torch.randn(d, generator=draw), torch.randn(m, generator=draw)
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append((row_products(grads, x), combination(grads, y)))
    finally:
        torch.set_num_threads(threads)
    if dtype != torch.bfloat16:  # whose sums are torch's
        assert all(torch.equal(a, b) for pair in found[1:] for a, b in zip(pair, found[0], strict=True))
    assert distance(found[0][0], grads.double() @ x.double()) < 1e-12
    assert distance(found[0][1], grads.double().T @ y.double()) < 1e-12


def test_a_state_continues_bit_for_bit():
    rows, x = gradients(30), gradients(1, seed=1)[0]
    window = SlidingInverseFisher(M, D, 1e-3)
    for g in rows[:13]:
        window.push(g)
    state = window.state_dict()
    other = SlidingInverseFisher(M, D, 1e-3)
    other.load_state_dict(state)
    for g in rows[13:]:
        assert torch.equal(window.push_and_apply(g), other.push_and_apply(g))
    assert torch.equal(window @ x, other @ x)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"window": M + 1}, "the state has window=8, this window window=9"),
        ({"dim": D + 1}, "the state has dim=40, this window dim=41"),
        ({"damping": 1.0}, "damping=0.001"),
        ({"storage_dtype": torch.float64}, "torch.float32, this window's torch.float64"),
    ],
)
def test_a_state_of_another_window_is_refused_and_changes_nothing(changed, message):
    window = SlidingInverseFisher(M, D, 1e-3)
    window.push(gradients(1)[0])
    other = SlidingInverseFisher(**{"window": M, "dim": D, "damping": 1e-3} | changed)
    x = torch.ones(other.dim)
    before = other @ x
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(window.state_dict())
    assert torch.equal(other @ x, before)
    assert other.seen == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SlidingInverseFisher(0, 3), "window is 0; expected a whole number of at least 1"),
        (lambda: SlidingInverseFisher(3, 0), "dim is 0"),
        (lambda: SlidingInverseFisher(3, 3, -1.0), "damping is -1.0"),
        (lambda: SlidingInverseFisher(3, 3, storage_dtype=torch.int8), "storage_dtype is torch.int8; expected one of torch.float32"),
        (
            lambda: SlidingInverseFisher(10**6, 10**9),
            r"1000000 gradients of 1,000,000,000 weights in float32 take 4,000,000.0 GB, but .* GB are available on cpu; take a smaller window or storage_dtype",
        ),
        (lambda: SlidingInverseFisher(3, 3).push(torch.ones(4)), r"x is \(4,\).*expected a floating-point tensor \[3\]"),
        (lambda: SlidingInverseFisher(3, 3) @ torch.ones(2), r"x is \(2,\)"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("bad", "dtype"), [(float("nan"), torch.float32), (float("inf"), torch.float32), (1e6, torch.float16)])
def test_a_gradient_that_is_not_finite_leaves_the_window_as_it_was(bad, dtype):
    window, x = SlidingInverseFisher(M, D, 1e-3, dtype), gradients(1, seed=1)[0]
    for g in gradients(11):
        window.push(g)
    before = window.state_dict()
    broken = torch.ones(D)
    broken[3] = bad
    with pytest.raises(FloatingPointError, match="the window is left as it was"):
        window.push_and_apply(broken)
    after = window.state_dict()
    assert all(
        torch.equal(before[key], after[key]) if isinstance(before[key], torch.Tensor) else before[key] == after[key] for key in before
    )
    assert bool((window @ x).isfinite().all())


def columns_of_one_process(rank: int, folder: Path) -> None:
    mine = slice(0, 15) if rank == 0 else slice(15, D)
    window = SlidingInverseFisher(M, len(range(D)[mine]), 1e-3, torch.float64, process_group=dist.group.WORLD)
    for g in gradients(20):
        u = window.push_and_apply(g[mine])
    torch.save((u, window @ gradients(1, seed=1)[0][mine]), folder / f"{rank}.pt")


def test_columns_split_over_two_processes_give_the_same(tmp_path):
    on_two_processes(columns_of_one_process, tmp_path)
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    window = SlidingInverseFisher(M, D, 1e-3, torch.float64)
    for g in gradients(20):
        u = window.push_and_apply(g)
    assert distance(torch.cat([parts[0][0], parts[1][0]]), u) < 1e-6
    assert distance(torch.cat([parts[0][1], parts[1][1]]), window @ gradients(1, seed=1)[0]) < 1e-6
