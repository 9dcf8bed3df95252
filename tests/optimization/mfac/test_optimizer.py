"""The optimizer against dense re-derivations, and in torch's own company: closures, schedulers, clipping, scaling, states."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fewer.optimization import MFAC

HESSIAN = torch.diag(torch.logspace(0, 2, 12, dtype=torch.float64))


def quadratic(w: torch.Tensor, step: int) -> torch.Tensor:
    """A quadratic whose centre moves, as that of a mini-batch does."""
    centre = torch.sin(torch.arange(12, dtype=torch.float64) * (step + 1))
    return (w - centre) @ HESSIAN @ (w - centre) / 2


def start() -> torch.Tensor:
    return torch.linspace(-1, 1, 12, dtype=torch.float64)


def dense_run(steps: int, window: int, damping: float, groups: list[tuple[slice, float, float, float]]) -> torch.Tensor:
    """The algorithm with the d x d matrix written out; groups are (columns, lr, momentum, weight decay)."""
    w, v, seen = start(), torch.zeros(12).double(), [torch.zeros(12).double()] * window
    for step in range(steps):
        centre = torch.sin(torch.arange(12, dtype=torch.float64) * (step + 1))
        g = HESSIAN @ (w - centre)
        for columns, _, _, decay in groups:
            g[columns] += decay * w[columns]
        seen = [*seen[1:], g]
        fisher = damping * torch.eye(12).double() + sum(torch.outer(h, h) for h in seen) / window
        u = torch.linalg.solve(fisher, g)
        for columns, lr, beta, _ in groups:
            v[columns] = beta * v[columns] + (1 - beta) * u[columns]
            w[columns] -= lr * v[columns]
    return w


@pytest.mark.parametrize("window", [1, 3, 32])
@pytest.mark.parametrize(
    "groups",
    [
        [(slice(0, 12), 0.05, 0.0, 0.0)],
        [(slice(0, 12), 0.05, 0.9, 0.1)],
        [(slice(0, 5), 0.05, 0.9, 0.0), (slice(5, 12), 0.02, 0.0, 0.3)],
    ],
)
def test_twenty_steps_equal_a_dense_derivation(window, groups):
    parameters = [nn.Parameter(start()[columns].clone()) for columns, *_ in groups]
    options = [
        {"params": [p], "lr": lr, "momentum": beta, "weight_decay": decay}
        for p, (_, lr, beta, decay) in zip(parameters, groups, strict=True)
    ]
    optimizer = MFAC(options, window=window, damping=1e-2)
    for step in range(20):
        optimizer.zero_grad()
        quadratic(torch.cat(list(parameters)), step).backward()
        optimizer.step()
    expected = dense_run(20, window, 1e-2, groups)
    torch.testing.assert_close(torch.cat([p.detach() for p in parameters]), expected, rtol=1e-9, atol=1e-9)


def test_a_window_of_one_has_the_closed_form():
    w = nn.Parameter(start())
    g, damping = HESSIAN @ start(), 1e-3
    optimizer = MFAC([w], lr=0.1, window=1, damping=damping)
    w.grad = g.clone()
    optimizer.step()
    torch.testing.assert_close(w.detach(), start() - 0.1 * g / (damping + g @ g), rtol=1e-12, atol=0)


def test_a_window_for_each_group_is_an_optimizer_for_each_group():
    def run(make) -> torch.Tensor:
        parts = [nn.Parameter(start()[:5]), nn.Parameter(start()[5:])]
        optimizers = make(parts)
        for step in range(10):
            for part in parts:
                part.grad = None
            quadratic(torch.cat(parts), step).backward()
            for optimizer in optimizers:
                optimizer.step()
        return torch.cat([part.detach() for part in parts])

    options = [{"window": 4, "damping": 1e-2, "lr": 0.05}, {"window": 6, "damping": 1e-1, "lr": 0.02}]
    one = run(lambda parts: [MFAC([{"params": [p]} | o for p, o in zip(parts, options, strict=True)], per_group=True)])
    two = run(lambda parts: [MFAC([p], **o) for p, o in zip(parts, options, strict=True)])
    assert torch.equal(one, two)


def mlp_run(optimizer_of, steps: int = 15, dtype=torch.float32) -> torch.Tensor:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    x, y = torch.randn(64, 6, dtype=dtype), torch.randint(3, (64,))
    optimizer = optimizer_of(model)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_with_much_damping_it_is_sgd():
    damping = 1e6
    ours = mlp_run(lambda model: MFAC(model.parameters(), lr=0.1 * damping, damping=damping, window=8))
    theirs = mlp_run(lambda model: torch.optim.SGD(model.parameters(), lr=0.1))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "weight_decay": 1e-2}, {"sparse": True}, {"storage_dtype": torch.bfloat16}])
def test_a_state_in_the_middle_continues_bit_for_bit(options, tmp_path):
    def run(interrupt: bool) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        with torch.no_grad():
            model[0].weight[:, :3] = 0
        x, y = torch.randn(64, 6), torch.randint(3, (64,))
        optimizer = MFAC(model.parameters(), lr=0.1, window=4, damping=1e-2, **options)
        for step in range(20):
            if interrupt and step == 11:
                torch.save(optimizer.state_dict(), tmp_path / "state.pt")
                optimizer = MFAC(model.parameters(), lr=1.0, window=4, damping=1e-2, **options)
                optimizer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(run(interrupt=True), run(interrupt=False))


def test_a_copy_goes_its_own_way():
    w = nn.Parameter(start())
    optimizer = MFAC([w], lr=0.1, window=4, damping=1e-2)
    w.grad = start()
    optimizer.step()
    other = copy.deepcopy(optimizer)
    optimizer.step()
    (copied,) = other.param_groups[0]["params"]
    copied.grad = start()
    other.step()
    assert torch.equal(copied, w)


def test_sparse_mode_keeps_zeros_and_leaves_them_out():
    torch.manual_seed(0)
    layer = nn.Linear(20, 5)
    with torch.no_grad():
        layer.weight.mul_(torch.rand(5, 20) > 0.7)
    zeros = layer.weight == 0
    optimizer = MFAC(layer.parameters(), lr=0.1, window=4, damping=1e-2, momentum=0.5, weight_decay=1e-2, sparse=True)
    assert optimizer._parts[0].window.dim == 105 - int(zeros.sum())
    before = layer.weight.detach().clone()
    for _ in range(8):
        optimizer.zero_grad()
        layer(torch.randn(16, 20)).square().mean().backward()
        optimizer.step()
    assert bool((layer.weight[zeros] == 0).all())
    assert bool((layer.weight[~zeros] != before[~zeros]).all())


def test_sparse_mode_is_the_dense_one_on_the_others():
    kept, full = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor([1.0, 0.0, 2.0]))
    one, other = MFAC([kept], lr=0.1, window=3), MFAC([full], lr=0.1, window=3, sparse=True)
    for step in range(6):
        kept.grad, full.grad = torch.tensor([1.0, step]), torch.tensor([1.0, 7.0, step])
        one.step()
        other.step()
    assert torch.equal(full.detach()[[0, 2]], kept.detach())


def test_an_overflow_step_of_the_scaler_pushes_nothing():
    w = nn.Parameter(torch.ones(4))
    optimizer = MFAC([w], lr=0.1, window=4, damping=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale((factor * w).sum()).backward()
        before, seen = w.detach().clone(), optimizer._parts[0].window.seen
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(w.detach(), before) == (factor != 1.0)
        assert optimizer._parts[0].window.seen == seen + (factor == 1.0)
    torch.testing.assert_close(optimizer._parts[0].window._grads[:2], torch.ones(2, 4))  # unscaled


def test_it_works_with_schedulers_clipping_and_closures():
    w, calls = nn.Parameter(torch.full((4,), 100.0)), []
    optimizer = MFAC([w], lr=1.0, window=4, damping=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)

    def closure() -> torch.Tensor:
        calls.append(1)
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        nn.utils.clip_grad_norm_([w], 1.0)
        return loss.detach()

    assert float(optimizer.step(closure)) == 40000.0
    scheduler.step()
    assert len(calls) == 1
    assert optimizer.param_groups[0]["lr"] == 0.5
    torch.testing.assert_close(optimizer._parts[0].window._grads[0].norm(), torch.tensor(1.0))


def test_the_window_is_warm_where_asked():
    w = nn.Parameter(start())
    optimizer = MFAC([w], lr=0.1, window=8, damping=1e-3, warm_window=True)
    w.grad = g = HESSIAN @ start()
    optimizer.step()
    torch.testing.assert_close(w.detach(), start() - 0.1 * g / (1e-3 + g @ g), rtol=1e-12, atol=0)


def stepped(optimizer_of, grads) -> None:
    parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
    optimizer = optimizer_of(parameters)
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad
    optimizer.step()


def add_group() -> None:
    MFAC([nn.Parameter(torch.ones(3))], window=2).add_param_group({"params": [nn.Parameter(torch.ones(2))]})


def add_parameter() -> None:
    w = nn.Parameter(torch.ones(3))
    optimizer = MFAC([w], window=2)
    optimizer.param_groups[0]["params"].append(extra := nn.Parameter(torch.ones(2)))
    w.grad, extra.grad = torch.ones(3), torch.ones(2)
    optimizer.step()


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: MFAC([nn.Parameter(torch.ones(3))], lr=-1.0), r"lr is -1.0; expected a number in \[0, infinity\)"),
        (lambda: MFAC([nn.Parameter(torch.ones(3))], momentum=1.0), r"momentum is 1.0; expected a number in \[0, 1\)"),
        (lambda: MFAC([nn.Parameter(torch.ones(3))], weight_decay=-0.1), "weight_decay is -0.1"),
        (lambda: MFAC([nn.Parameter(torch.ones(3))], window=0), "window is 0"),
        (lambda: MFAC([nn.Parameter(torch.ones(3))], damping=0.0), "damping is 0.0"),
        (lambda: MFAC([nn.Parameter(torch.ones(10**4))], window=10**10), "take a smaller window or storage_dtype=torch.bfloat16"),
        (lambda: MFAC([nn.Parameter(torch.zeros(3))], sparse=True), "sparse=True, but all weights are zero"),
        (
            lambda: MFAC([{"params": [nn.Parameter(torch.ones(3))]}, {"params": [nn.Parameter(torch.ones(3))], "window": 2}]),
            "share one F; give them the same or set per_group=True",
        ),
        (
            lambda: stepped(lambda ps: MFAC(ps, window=2), [torch.ones(3), None]),
            r"parameter 1 of group 0 \(2,\) has no gradient in the first step",
        ),
        (
            lambda: stepped(lambda ps: MFAC([("weight", ps[0]), ("bias", ps[1])], window=2), [torch.ones(3), None]),
            "parameter 'bias' has no gradient in the first step",
        ),
        (add_group, "a parameter group was added after construction"),
        (add_parameter, "the parameters have 5 weights now, 3 at construction"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(act, message):
    with pytest.raises(ValueError, match=message) as error:
        act()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("per_group", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(per_group, bad):
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    optimizer = MFAC([{"params": [a]}, {"params": [b]}], lr=0.1, window=2, per_group=per_group)
    a.grad, b.grad = torch.ones(3), torch.tensor([1.0, bad])
    with pytest.raises(FloatingPointError, match=r"the gradient of parameter 0 of group 1 \(2,\) has a NaN or infinite value"):
        optimizer.step()
    assert torch.equal(torch.cat([a, b]).detach(), torch.ones(5))
    assert [part.window.seen for part in optimizer._parts] == [0] * (2 if per_group else 1)


def test_a_state_of_another_size_is_refused_and_changes_nothing():
    optimizer = MFAC([nn.Parameter(torch.ones(3))], lr=0.5, window=2)
    for other, message in [
        (MFAC([nn.Parameter(torch.ones(3))], window=3), "window=3, this window window=2"),
        (MFAC([nn.Parameter(torch.ones(4))], window=2), "dim=4, this window dim=3"),
        (MFAC([nn.Parameter(torch.ones(3))], window=2, sparse=True), "differ in `sparse`"),
        (torch.optim.SGD([nn.Parameter(torch.ones(3))]), "the state has 0 windows, this optimizer 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(other.state_dict())
        assert optimizer.param_groups[0]["lr"] == 0.5
