"""What a predictive controller is held against: a PID loop with anti-windup, tuned, and LQR with an observer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.linalg import expm, solve_discrete_are

from fewer.errors import require


class PID:
    """u = mixing (Kp e + Ki integral of e + Kd de/dt); the integral stands still while the actuator is at its end (anti-windup).

    Args:
        kp, ki, kd: gains.
        dt: seconds a sample.
        lower, upper: what the actuators can do, [m].
        mixing: [m, p], which error moves which actuator; the identity by default.
        rest: [m], the input without error.
        smooth: share of the old derivative that is kept, against noise.
    """

    preview = 1

    def __init__(
        self, kp: float, ki: float, kd: float, dt: float, lower: Any, upper: Any, mixing: Any = None, rest: Any = 0.0, smooth: float = 0.5
    ) -> None:
        self.gains, self.dt, self.smooth = (kp, ki, kd), dt, smooth
        self.lower, self.upper = np.atleast_1d(np.asarray(lower, float)), np.atleast_1d(np.asarray(upper, float))
        self.mixing = np.eye(len(self.lower)) if mixing is None else np.asarray(mixing, float)
        self.rest = np.broadcast_to(np.asarray(rest, float), self.lower.shape)
        self.reset()

    def reset(self) -> None:
        """Forget the past."""
        self.integral = np.zeros(self.mixing.shape[1])
        self.rate = np.zeros_like(self.integral)
        self.last: np.ndarray | None = None

    def step(self, y: np.ndarray, reference: np.ndarray) -> np.ndarray:
        """The input [m] for y [p] and reference [1, p]."""
        kp, ki, kd = self.gains
        error = reference[0] - y
        rate = np.zeros_like(error) if self.last is None else (error - self.last) / self.dt
        self.rate = self.smooth * self.rate + (1 - self.smooth) * rate
        self.last = error
        wanted = self.rest + self.mixing @ (kp * error + ki * (self.integral + error * self.dt) + kd * self.rate)
        u = np.clip(wanted, self.lower, self.upper)
        if (u == wanted).all():
            self.integral = self.integral + error * self.dt
        return u


def tune_pid(error_of: Callable[[float, float, float, float], float], trials: int, seed: int, top: float = 300.0) -> tuple[float, ...]:
    """Gains (kp, ki, kd) up to `top` and smoothing that Optuna finds in so many simulations; `error_of` is what it lowers."""
    gains = dict.fromkeys(("kp", "ki", "kd"), (0.0001 * top, top, True))
    return _tuned(error_of, gains | {"smooth": (0.0, 0.9, False)}, trials, seed)


def tune_lqr(error_of: Callable[[float, float], float], trials: int, seed: int) -> tuple[float, ...]:
    """The weight r of the input and the noise that the observer believes in, likewise."""
    return _tuned(error_of, {"r": (1e-8, 1e-2, True), "noise": (1e-4, 1e-1, True)}, trials, seed)


def _tuned(error_of: Callable[..., float], ranges: dict[str, tuple[float, float, bool]], trials: int, seed: int) -> tuple[float, ...]:
    """The best of so many points of Optuna's tree-structured Parzen estimator; a range is (low, high, logarithmic)."""
    optuna = require("optuna", "control")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=trials // 4))
    study.optimize(
        lambda trial: error_of(*(trial.suggest_float(name, low, high, log=log) for name, (low, high, log) in ranges.items())), trials
    )
    return tuple(study.best_params[name] for name in ranges)


class LQR:
    """Linear-quadratic regulator of a linear plant x' = A x + B u, y = C x, with a steady-state Kalman observer and the reference fed forward.

    It knows the true equations, which the learned controller does not.
    """

    preview = 1

    def __init__(self, A: Any, B: Any, C: Any, dt: float, q: float, r: float, noise: float, lower: Any, upper: Any) -> None:
        A, B, C = (np.atleast_2d(np.asarray(each, float)) for each in (A, B, C))
        states, inputs = B.shape
        both = expm(np.block([[A, B], [np.zeros((inputs, states + inputs))]]) * dt)
        self.A, self.B, self.C = both[:states, :states], both[:states, states:], C
        cost = solve_discrete_are(self.A, self.B, q * C.T @ C + 1e-6 * np.eye(states), r * np.eye(inputs))
        self.K = np.linalg.solve(r * np.eye(inputs) + self.B.T @ cost @ self.B, self.B.T @ cost @ self.A)
        spread = solve_discrete_are(self.A.T, C.T, 1e-2 * self.B @ self.B.T + 1e-10 * np.eye(states), noise**2 * np.eye(len(C)))
        self.L = np.linalg.solve(C @ spread @ C.T + noise**2 * np.eye(len(C)), C @ spread).T
        steady = np.block([[self.A - np.eye(states), self.B], [C, np.zeros((len(C), inputs))]])
        self.steady = np.linalg.solve(steady, np.vstack([np.zeros((states, len(C))), np.eye(len(C))]))
        self.lower, self.upper = np.asarray(lower, float), np.asarray(upper, float)
        self.reset()

    def reset(self) -> None:
        """Forget the past."""
        self.x = np.zeros(len(self.A))

    def step(self, y: np.ndarray, reference: np.ndarray) -> np.ndarray:
        """The input [m] for y [p] and reference [1, p]."""
        self.x = self.x + self.L @ (y - self.C @ self.x)
        wanted = self.steady @ reference[0]
        u = np.clip(wanted[len(self.x) :] - self.K @ (self.x - wanted[: len(self.x)]), self.lower, self.upper)
        self.x = self.A @ self.x + self.B @ u
        return u
