"""Losses on modes are those of the full fields, and floors those of the best prediction there is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewer.signals import T1, ModeDataset, ModeLoss, select_modes
from fewer.signals.transform_once.problems import relative


def full_loss(model, z, y):
    return ((model.from_modes(z) - y).flatten(1).norm(dim=1) / y.flatten(1).norm(dim=1)).mean()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(1, 7), st.sampled_from(["dct", "fourier"]), st.integers(1, 3))
def test_a_loss_on_modes_is_the_full_fields(m1, m2, basis, channels):
    model = T1((m1, m2), 4, 1, channels, resolution=(9, 7), basis=basis)
    z, y = torch.randn(5, channels, m1, m2, dtype=torch.float64), torch.randn(5, channels, 9, 7, dtype=torch.float64)
    loss = ModeLoss(model=model)
    torch.testing.assert_close(loss(z, loss.prepare(y)), full_loss(model, z, y), rtol=1e-12, atol=1e-12)
    single = loss(z.float(), loss.prepare(y.float()))
    torch.testing.assert_close(single, full_loss(model, z.float(), y.float()), rtol=1e-6, atol=1e-6)
    absolute = ModeLoss(relative=False)
    wanted = (model.from_modes(z) - y).flatten(1).norm(dim=1).mean()
    torch.testing.assert_close(absolute(z, absolute.prepare(y, model)), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-7), (torch.float32, 1e-6)])
def test_the_best_answer_to_a_target_of_few_modes_is_exact(dtype, near):
    """The rest is then a difference of almost equal energies."""
    model = T1((4, 4), 4, resolution=(32, 32))
    y = model.from_modes(torch.randn(5, 1, 4, 4, dtype=dtype))
    z, loss = model.to_modes(y), ModeLoss(model=model)
    assert abs(loss(z, loss.prepare(y)) - full_loss(model, z, y)) <= near
    z = z + 1e-5 * torch.randn_like(z)
    assert abs(loss(z, loss.prepare(y)) - full_loss(model, z, y)) <= near
    floors = [select_modes(y, top_k=16).floor, select_modes(y, floor=1e-5).floor]
    projected = relative(model.from_modes(model.to_modes(y.double())), y.double()).item()
    assert floors == pytest.approx([projected] * 2, abs=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_holds_the_energy_of_large_fields(dtype):
    model, y = T1((4, 4), 4, resolution=(256, 256)), 2 * torch.randn(2, 1, 256, 256).to(dtype)
    loss, z = ModeLoss(model=model), torch.randn(2, 1, 4, 4).to(dtype)
    assert loss(z, loss.prepare(y)).item() == pytest.approx(full_loss(model, z.float(), y.float()).item(), rel=1e-5)


def test_a_perfect_answer_has_a_gradient():
    model, y = T1((4,), 4, resolution=(4,)), torch.randn(2, 1, 4)
    loss = ModeLoss(model=model)
    z = loss.prepare(y).modes.clone().requires_grad_()
    loss(z, loss.prepare(y)).backward()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("basis", ["dct", "fourier"])
def test_a_floor_is_the_error_of_the_projected_truth(basis):
    y = torch.randn(6, 2, 12, 9, dtype=torch.float64).cumsum(2).cumsum(3)
    for chosen in (select_modes(y, floor=0.2, basis=basis), select_modes(y, top_k=7, basis=basis)):
        model = T1((1, 1), 4, 1, 2, resolution=(12, 9), modes=chosen)
        best = model.from_modes(model.to_modes(y))
        assert relative(best, y).item() == pytest.approx(chosen.floor, abs=1e-10)
        loss = ModeLoss(model=model)
        worse = model.to_modes(y) + 0.1 * torch.randn(6, 2, *chosen.n_modes)
        assert loss(worse, loss.prepare(y)) > chosen.floor
    block = select_modes(y, floor=0.2, basis=basis)
    smaller = T1([max(1, m - 1) for m in block.n_modes], 4, 1, 2, resolution=(12, 9), basis=basis)
    assert block.floor < 0.2 <= relative(smaller.from_modes(smaller.to_modes(y)), y).item()


def test_the_best_modes_leave_no_more_than_any_block_of_as_many():
    y = torch.randn(30, 1, 8, 8, dtype=torch.float64).cumsum(3)
    assert select_modes(y, top_k=16).floor < relative((m := T1((4, 4), 4, resolution=(8, 8))).from_modes(m.to_modes(y)), y)


def test_a_data_set_is_transformed_once_and_trains():
    torch.manual_seed(0)
    model = T1((4, 4), 8, resolution=(16, 16))
    x = torch.randn(40, 1, 16, 16).cumsum(2).cumsum(3)
    data, loss = ModeDataset(x, 0.5 * x, model, batch=7), ModeLoss()
    assert len(data) == 40
    assert data[3][0].shape == (1, 4, 4)
    torch.testing.assert_close(data.inputs, model.to_modes(x))
    order = torch.cat([z for z, _ in data.batches(9, torch.Generator().manual_seed(0))])
    assert sorted(order[:, 0, 0, 0].tolist()) == sorted(data.inputs[:, 0, 0, 0].tolist())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        for z, targets in data.batches(20):
            error = loss(model.forward_modes(z), targets)
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
    assert error < 0.5
    torch.testing.assert_close(error, loss(model.forward_modes(z), targets), rtol=0.2, atol=0.05)
    floor = relative(model.from_modes(model.to_modes(0.5 * x)), 0.5 * x)
    assert relative(model(x), 0.5 * x) > floor
