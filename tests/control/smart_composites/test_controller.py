"""The controller: exact derivatives, the exact minimiser where it is known, never at a bound, and the same in C."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.linalg import expm
from torch import nn

from fewer.control import (
    LQR,
    PID,
    ForwardKinematics,
    PredictiveController,
    compile_controller,
    excitation,
    mass_spring_damper,
    simulate,
    tendon_finger,
    tune_pid,
    van_der_pol,
)
from fewer.control._shared.toolchain import STRICT
from fewer.control.smart_composites.controller_c import compiled as controller_c
from fewer.control.smart_composites.newton import newton_step
from fewer.control.smart_composites.to_c import compiler

torch.set_num_threads(1)


def model_of(inputs: int, outputs: int, hidden: int = 9, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs)).double()


def two_by_two(**settings) -> PredictiveController:
    """Two inputs, two outputs, delays of both, a control horizon shorter than the horizon."""
    given = {
        "Q": np.array([[1.0, 0.2], [0.2, 2.0]]),
        "Lambda": np.array([[0.1, 0.03], [0.03, 0.2]]),
        "bounds": (-1.0, [1.0, 2.0]),
    } | settings
    return PredictiveController(model_of(2 * 3 + 2 * 2, 2), (2, 6), 3, sharpness=1e-2, past_inputs=2, past_outputs=1, **given)


@pytest.fixture(scope="module")
def as_c(tmp_path_factory):
    """`as_c(**settings)`: that controller in C (double), just reset; compiled once for all tests that ask for it, and not measured."""
    made = {}

    def compiled(**settings):
        if str(settings) not in made:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(compiler, "sizes_of", lambda texts: None)
                made[str(settings)] = compile_controller(two_by_two(**settings), tmp_path_factory.mktemp("c"), dtype="double")
        made[str(settings)].reset()
        return made[str(settings)]

    return compiled


def started(controller: PredictiveController, rng: np.random.Generator) -> np.ndarray:
    """Give it a random past; a random U inside the box."""
    controller.past_y = rng.standard_normal((controller.dd + 1, controller.p))
    controller.past_u = rng.uniform(-0.9, 0.9, controller.past_u.shape)
    return rng.uniform(-0.9, 0.9, (controller.nu, controller.m))


def cost_in_torch(c: PredictiveController, model, U: torch.Tensor, reference: np.ndarray) -> torch.Tensor:
    """J written down again, for autograd."""
    past_u, past_y = (torch.as_tensor(each) for each in (c.past_u, c.past_y))
    us, ys, total = [*U, *[U[-1]] * (c.n2 - c.nu)], [], torch.zeros((), dtype=torch.float64)
    for j in range(c.n2):
        z = [us[j - k] if j >= k else past_u[k - j - 1] for k in range(c.nd + 1)]
        z += [ys[j - k - 1] if j > k else past_y[k - j] for k in range(c.dd + 1)]
        ys.append(model(torch.cat(z)))
        if j + 1 >= c.n1:
            error = torch.as_tensor(reference[j]) - ys[-1]
            total = total + error @ torch.as_tensor(c.Q) @ error
    changes = U - torch.cat([past_u[:1], U[:-1]])
    total = total + sum(change @ torch.as_tensor(c.Lambda) @ change for change in changes)
    if c.lower is not None:
        low, high, s = (torch.as_tensor(each) for each in (c.lower, c.upper, c.sharpness))
        r, b = high - low, (high + low) / 2
        total = total + (s / (U + r / 2 - b) + s / (r / 2 + b - U) - 4 * s / r).sum()
    return total


def test_gradient_and_hessian_of_the_cost_equal_autograd():
    controller, rng = two_by_two(), np.random.default_rng(0)
    model = model_of(10, 2)
    for _ in range(3):
        U, reference = started(controller, rng), rng.standard_normal((6, 2))

        def cost(flat, reference=reference):
            return cost_in_torch(controller, model, flat.reshape(3, 2), reference)

        flat = torch.as_tensor(U).ravel().requires_grad_()
        value, gradient, hessian = controller.cost(U, reference)
        assert value == pytest.approx(float(cost(flat).detach()), abs=1e-9)
        assert controller.value(U, reference) == pytest.approx(value, abs=1e-12)
        assert np.abs(gradient - torch.func.grad(cost)(flat).detach().numpy()).max() < 1e-9
        assert np.abs(hessian - torch.func.hessian(cost)(flat).detach().numpy()).max() < 1e-9


def test_one_step_on_a_linear_model_is_the_least_squares_solution_and_a_warm_start_needs_none():
    """The dense solution: y = F U + free response, J a sum of squares."""
    torch.manual_seed(1)
    model = nn.Linear(2 + 2, 1).double()
    controller = PredictiveController(model, (1, 8), 3, Q=2.0, Lambda=0.1, past_inputs=1, past_outputs=1, max_iter=1)
    rng = np.random.default_rng(0)
    U, reference = started(controller, rng), rng.standard_normal((8, 1))

    def outputs(U):
        ys = []
        for j in range(8):
            z = np.concatenate([controller._inputs_at(U, j).ravel(), controller._outputs_at(ys, j).ravel()])
            ys.append(model(torch.as_tensor(z)).detach().numpy())
        return np.array(ys).ravel()

    free = outputs(np.zeros((3, 1)))
    F = np.stack([outputs(np.eye(3)[:, [k]]) - free for k in range(3)], axis=1)
    D, last = np.eye(3) - np.eye(3, k=-1), np.array([controller.past_u[0, 0], 0, 0])
    rows = np.vstack([np.sqrt(2.0) * F, np.sqrt(0.1) * D])
    wanted = np.linalg.lstsq(rows, np.concatenate([np.sqrt(2.0) * (reference.ravel() - free), np.sqrt(0.1) * last]), rcond=None)[0]
    found = controller.minimise(U, reference)
    assert controller.iterations == 1
    assert np.abs(found.ravel() - wanted).max() < 1e-10
    controller.minimise(found, reference)
    assert controller.iterations == 0


def test_bounds_are_never_touched(tmp_path):
    """10,000 samples as C (which the next test but two holds against Python), 500 in Python."""
    rng, controller = np.random.default_rng(0), two_by_two(max_iter=1)
    compiled = compile_controller(controller, tmp_path, dtype="double")
    for start in range(400):
        compiled.reset()
        controller.reset()
        for reference in rng.standard_normal((25, 6, 2)) * 10.0 ** rng.integers(-2, 4):
            y = 10.0 ** rng.integers(-1, 2) * rng.standard_normal(2)
            for u in [compiled.step(y, reference)] + ([controller.step(y, reference)] if start < 20 else []):
                assert (u > controller.lower).all()
                assert (u < controller.upper).all()


def test_an_indefinite_hessian_still_gives_a_direction_of_descent_and_a_lower_cost():
    rng, controller = np.random.default_rng(0), two_by_two(max_iter=1, Lambda=0.0)
    indefinite = 0
    for _ in range(200):
        U, reference = started(controller, rng), 3 * rng.standard_normal((6, 2))
        value, gradient, hessian = controller.cost(U, reference)
        indefinite += np.linalg.eigvalsh(hessian).min() < 0
        assert gradient @ newton_step(gradient, hessian) < 0
        assert controller.value(controller.minimise(U, reference), reference) <= value * (1 + 1e-6)
    assert indefinite > 10


def test_gauss_newton_leaves_out_second_derivatives_of_the_model_alone():
    controller, full, rng = two_by_two(gauss_newton=True), two_by_two(), np.random.default_rng(0)
    U, reference = started(controller, rng), rng.standard_normal((6, 2))
    full.past_y, full.past_u = controller.past_y, controller.past_u
    assert np.allclose(controller.cost(U, reference)[1], full.cost(U, reference)[1])
    assert np.linalg.eigvalsh(controller.cost(U, reference)[2]).min() > 0


@pytest.mark.parametrize("gauss_newton", [False, True])
def test_the_c_controller_does_what_the_python_one_does_for_500_steps(gauss_newton, tmp_path, monkeypatch):
    """The one in double as it is compiled for the sanitizer of undefined behaviour; what is built without is run by the tests below."""
    monkeypatch.setattr(compiler, "sizes_of", lambda texts: None)
    controller = two_by_two(gauss_newton=gauss_newton, max_iter=2)
    in_float = compile_controller(controller, tmp_path / "f", name="arm")
    in_float.build()
    monkeypatch.setattr(controller_c, "FAST", ("-O2", "-fsanitize=undefined"))
    compiled = compile_controller(controller, tmp_path / "d", name="arm", dtype="double")
    rng, y = np.random.default_rng(0), np.zeros(2)
    for step in range(500):
        reference = 0.5 * np.stack([np.sin(0.1 * (step + np.arange(6))), np.cos(0.07 * (step + np.arange(6)))], axis=1)
        u, v, w = controller.step(y, reference), compiled.step(y, reference), in_float.step(y, reference)
        assert np.abs(u - v).max() < 1e-8
        assert np.abs(u - w).max() < 1e-4
        y = 0.8 * y + 0.2 * u + 0.01 * rng.standard_normal(2)


def test_y_that_is_not_finite_holds_the_last_input_warns_and_counts(as_c):
    controller, reference, compiled = two_by_two(gauss_newton=False), np.ones((6, 2)), as_c(gauss_newton=False)
    u = controller.step([0.0, 0.0], reference)
    compiled.step([0.0, 0.0], reference)
    with pytest.warns(RuntimeWarning, match="not finite"):
        held = controller.step([np.nan, 0.0], reference)
    assert np.array_equal(held, u)
    assert controller.held == 1
    assert np.allclose(compiled.step([np.inf, 0.0], reference), u)
    assert np.allclose(compiled.step([0.1, 0.1], reference), controller.step([0.1, 0.1], reference), atol=1e-9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"Q": np.array([[1.0, 0.5], [0.0, 1.0]])}, "Q is not symmetric"),
        ({"Q": np.diag([1.0, -1.0])}, "Q has the negative eigenvalue"),
        ({"Lambda": np.diag([-1.0, 1.0])}, "Lambda has the negative"),
        ({"horizon": (4, 3)}, "N1 <= N2"),
        ({"control_horizon": 9}, "Nu <= N2"),
        ({"bounds": (1.0, 1.0)}, "lower < upper"),
        ({"sharpness": 0.0, "bounds": (-1, 1)}, "sharpness"),
        ({"past_inputs": 7}, "the model has 10 inputs"),
    ],
)
def test_a_controller_that_makes_no_sense_is_refused(settings, message):
    given = {"horizon": (1, 6), "control_horizon": 3, "past_inputs": 2, "past_outputs": 1} | settings
    with pytest.raises(ValueError, match=message):
        PredictiveController(model_of(10, 2), **given)


def test_a_reference_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match=r"reference has shape \(5, 2\)"):
        two_by_two().step([0.0, 0.0], np.zeros((5, 2)))
    with pytest.raises(ValueError, match="y has shape"):
        two_by_two().step([0.0], np.zeros((6, 2)))
    with pytest.raises(ValueError, match="reference has shape"):
        simulate(mass_spring_damper(), PID(1, 0, 0, 0.1, -10, 10), np.zeros(5), 0.1, 10)


# Plants, learning, baselines


def test_the_mass_spring_damper_is_the_matrix_exponential():
    plant, rng, dt = mass_spring_damper(noise=0.0), np.random.default_rng(0), 0.025
    both = expm(np.array([[0, 1, 0], [-5, -0.5, 1], [0, 0, 0]]) * dt)
    x = np.zeros(2)
    for u in rng.uniform(-10, 10, 300):
        plant.step([u], dt)
        x = both[:2, :2] @ x + both[:2, 2] * u
        assert np.abs(plant.x - x).max() < 1e-8


def test_the_actuators_saturate_and_the_finger_has_hysteresis():
    plant = mass_spring_damper(noise=0.0)
    for _ in range(2000):
        plant.step([1e6], 0.025)
    assert plant.true()[0] == pytest.approx(2.0, abs=1e-3)
    finger, ends = tendon_finger(noise=0.0), []
    for before in (0.0, 1.0):  # the same tensions, come from two sides
        finger.reset()
        for u in ([before, 1 - before], [0.6, 0.4]):
            for _ in range(200):
                finger.step(u, 0.025)
        ends.append(finger.true())
    assert np.abs(ends[0] - ends[1]).max() > 0.5
    assert np.isfinite(van_der_pol().step([1.0], 0.1)).all()


def recorded(steps: int = 1500):
    plant = mass_spring_damper()
    u = excitation(plant.lower, plant.upper, steps, np.random.default_rng(0))
    y = [plant.reset(0), *(plant.step(each, 0.025) for each in u[:-1])]
    return plant, u, np.array(y)


def test_a_learned_model_predicts_and_steers_better_than_an_equally_costly_pid():
    plant, u, y = recorded()
    learned = ForwardKinematics(steps=100).fit(u, y, (1, 3), (12,))
    assert learned.one_step_rmse < 0.005
    assert learned.rollout_rmse(10) < 0.1 * y.std()
    controller = PredictiveController(learned.model, (1, 12), 4, 1.0, 1e-5, (-10, 10), 1e-4, 1, 3, max_iter=1)
    reference = np.where(np.arange(140) // 40 % 2 == 0, 1.0, -0.5)

    def error(*gains):
        return simulate(plant, PID(*gains[:3], 0.025, -10, 10, smooth=gains[3]), reference, 0.025, 100).rms_error

    ours = simulate(plant, controller, reference, 0.025, 100)
    assert ours.rms_error < 0.8 * error(*tune_pid(error, 15, 0))
    assert ours.settling_time() <= 2.5
    lqr = LQR([[0, 1], [-5, -0.5]], [[0], [1]], [[1, 0]], 0.025, 1.0, 1e-5, 1e-3, [-10], [10])
    assert simulate(plant, lqr, np.ones(201), 0.025, 200).y[-1] == pytest.approx(1.0, abs=0.02)


def test_a_recording_that_cannot_be_learned_from_is_refused():
    for u, y, message in itertools.chain(
        [(np.zeros((30, 1)), np.zeros((40, 1)), "as many of both")], [(np.zeros((30, 1)), np.full((30, 1), np.nan), "NaN or infinity")]
    ):
        with pytest.raises(ValueError, match=message):
            ForwardKinematics().fit(u, y)


def test_strict_flags_are_the_ones_that_the_checks_name():
    assert STRICT == ("-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror")


@pytest.mark.parametrize("gauss_newton", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_bad_number_in_the_reference_holds_the_last_input_and_no_more(bad, gauss_newton, as_c):
    controller, reference, compiled = two_by_two(gauss_newton=gauss_newton), np.ones((6, 2)), as_c(gauss_newton=gauss_newton)
    u, _ = (each.step([0.0, 0.0], reference) for each in (controller, compiled))
    broken = reference.copy()
    broken[3, 1] = bad
    kept = controller.U.copy()
    with pytest.warns(RuntimeWarning, match="the reference is not finite"):
        assert np.array_equal(controller.step([0.1, 0.1], broken), u)
    assert np.allclose(compiled.step([0.1, 0.1], broken), u)
    assert np.array_equal(controller.U, kept)
    for _ in range(3):
        ours, theirs = controller.step([0.1, 0.1], reference), compiled.step([0.1, 0.1], reference)
        assert np.isfinite(ours).all()
        assert np.allclose(ours, theirs, atol=1e-9)


@pytest.mark.parametrize("gauss_newton", [False, True])
def test_numbers_too_large_to_compute_with_leave_u_where_it_was(gauss_newton, as_c):
    settings, reference = {"gauss_newton": gauss_newton, "bounds": None}, np.ones((6, 2))
    controller, compiled = two_by_two(**settings), as_c(**settings)
    for wanted in (reference, 1e308 * reference, reference):
        with np.errstate(all="ignore"):
            u, v = controller.step([0.0, 0.0], wanted), compiled.step([0.0, 0.0], wanted)
        assert np.isfinite(u).all()
        assert np.isfinite(v).all()
