"""Plants to steer, simulated by Runge-Kutta steps of fourth order; controllers see only their outputs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

SUBSTEPS = 5  # Runge-Kutta steps a sample

Slope = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass
class Plant:
    """A system x' = slope(x, u), y = output(x) + noise, whose actuators saturate.

    Attributes:
        inputs, outputs: how many u and y.
        lower, upper: what the actuators can do, [inputs].
        noise: standard deviation of the sensors, [outputs].
    """

    slope: Slope
    output: Callable[[np.ndarray], np.ndarray]
    rest: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    noise: np.ndarray
    seed: int = 0
    x: np.ndarray = field(init=False)
    rng: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.reset()

    @property
    def inputs(self) -> int:
        return len(self.lower)

    @property
    def outputs(self) -> int:
        return len(self.noise)

    def reset(self, seed: int | None = None) -> np.ndarray:
        """Back to rest; what the sensors say then."""
        self.x = self.rest.astype(float).copy()
        self.rng = np.random.default_rng(self.seed if seed is None else seed)
        return self.measure()

    def measure(self) -> np.ndarray:
        """What the sensors say, [outputs]."""
        return self.true() + self.noise * self.rng.standard_normal(self.outputs)

    def true(self) -> np.ndarray:
        """The outputs without noise."""
        return self.output(self.x)

    def step(self, u: Any, dt: float) -> np.ndarray:
        """Hold u for dt seconds; what the sensors say then."""
        u = np.clip(np.asarray(u, float), self.lower, self.upper)
        h = dt / SUBSTEPS
        for _ in range(SUBSTEPS):
            k1 = self.slope(self.x, u)
            k2 = self.slope(self.x + h / 2 * k1, u)
            k3 = self.slope(self.x + h / 2 * k2, u)
            k4 = self.slope(self.x + h * k3, u)
            self.x = self.x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return self.measure()


def mass_spring_damper(
    mass: float = 1.0, damping: float = 0.5, stiffness: float = 5.0, force: float = 10.0, noise: float = 1e-3, seed: int = 0
) -> Plant:
    """m x'' + c x' + k x = u, u within +-force (N); y = x (m).

    Examples:
        >>> plant = mass_spring_damper(noise=0.0)
        >>> _ = [plant.step([5.0], 0.05) for _ in range(600)]
        >>> round(float(plant.true()[0]), 3)
        1.0
    """
    system = np.array([[0.0, 1.0], [-stiffness / mass, -damping / mass]])
    push = np.array([0.0, 1 / mass])
    return Plant(
        lambda x, u: system @ x + push * u[0], lambda x: x[:1], np.zeros(2), np.array([-force]), np.array([force]), np.array([noise]), seed
    )


def tendon_finger(length: float = 60.0, noise: float = 0.05, seed: int = 0) -> Plant:
    """A planar segment of constant curvature, bent and shortened by two tendons, with hysteresis (Bouc-Wen).

    States: angle theta and its speed, shortening and its speed, and the hysteretic torque z. The tendons' difference bends, their sum
    shortens. Inputs: two tensions, 0 to 1; outputs: the tip's two coordinates in mm.
    """

    def slope(x: np.ndarray, u: np.ndarray) -> np.ndarray:
        theta, speed, shorter, shortening, z = x
        pull, squeeze = u[0] - u[1], u[0] + u[1]
        return np.array(
            [
                speed,
                60.0 * (1.2 * pull - theta - 0.15 * theta**3 - 0.2 * z) - 12.0 * speed,
                shortening,
                100.0 * (6.0 * squeeze - shorter) - 16.0 * shortening,
                4.0 * speed - 2.0 * abs(speed) * z - 2.0 * speed * abs(z),
            ]
        )

    def tip(x: np.ndarray) -> np.ndarray:
        half = x[0] / 2
        chord = (length - x[2]) * np.sinc(half / np.pi)  # of an arc that turns by theta
        return np.array([chord * np.sin(half), chord * np.cos(half)])

    return Plant(slope, tip, np.zeros(5), np.zeros(2), np.ones(2), np.full(2, noise), seed)


def van_der_pol(mu: float = 1.0, force: float = 3.0, noise: float = 1e-3, seed: int = 0) -> Plant:
    """x'' = mu (1 - x^2) x' - x + u, |u| <= force; y = x."""

    def slope(x: np.ndarray, u: np.ndarray) -> np.ndarray:
        return np.array([x[1], mu * (1 - x[0] ** 2) * x[1] - x[0] + u[0]])

    return Plant(slope, lambda x: x[:1], np.array([0.1, 0.0]), np.array([-force]), np.array([force]), np.array([noise]), seed)


class Controller(Protocol):
    """What `simulate` can steer with."""

    preview: int  # samples of the reference that it is shown

    def step(self, y: np.ndarray, reference: np.ndarray, /) -> np.ndarray: ...

    def reset(self) -> None: ...


@dataclass(frozen=True)
class Trajectory:
    """What happened.

    Attributes:
        y: [steps, p], the outputs without noise, each after the input beside it.
        u: [steps, m], the inputs applied.
        reference: [steps, p], what y was to be.
        seconds: [steps], processor time that the controller took.
    """

    y: np.ndarray
    u: np.ndarray
    reference: np.ndarray
    seconds: np.ndarray
    dt: float

    @property
    def rms_error(self) -> float:
        """Root mean square distance to the reference."""
        return float(np.sqrt(np.mean(np.sum((self.y - self.reference) ** 2, axis=1))))

    @property
    def largest_error(self) -> float:
        return float(np.linalg.norm(self.y - self.reference, axis=1).max())

    @property
    def effort(self) -> float:
        """Root mean square of the input."""
        return float(np.sqrt(np.mean(self.u**2)))

    def settling_time(self, band: float = 0.05) -> float:
        """Mean seconds from each change of a stepwise reference until y stays within `band` of the step; the whole stretch where it never does."""
        starts = [0, *(np.flatnonzero(np.any(np.diff(self.reference, axis=0) != 0, axis=1)) + 1), len(self.y)]
        times, before = [], np.zeros(self.y.shape[1])
        for start, end in itertools.pairwise(starts):
            wide = band * max(float(np.linalg.norm(self.reference[start] - before)), 1e-9)
            outside = np.flatnonzero(np.linalg.norm(self.y[start:end] - self.reference[start], axis=1) > wide)
            times.append((outside[-1] + 1) * self.dt if len(outside) else 0.0)
            before = self.reference[start]
        return float(np.mean(times))


def simulate(plant: Plant, controller: Controller, reference: Any, dt: float, steps: int, seed: int | None = None) -> Trajectory:
    """Steer a plant from rest.

    Args:
        reference: [steps + preview or more, p], what y is to be after each step; row 0 is after the first.
        dt: seconds a sample.
        seed: of the sensors' noise; the plant's own by default.

    Raises:
        ValueError: the reference is too short.
    """
    from time import process_time

    reference = np.asarray(reference, float)
    reference = reference[:, None] if reference.ndim == 1 else reference
    if len(reference) < steps + controller.preview or reference.shape[1] != plant.outputs:
        wanted = f"at least ({steps + controller.preview}, {plant.outputs}): steps and what the controller looks ahead"
        raise ValueError(f"reference has shape {reference.shape}; expected {wanted}")
    y = plant.reset(seed)
    controller.reset()
    outputs, inputs, seconds = [], [], []
    for n in range(steps):
        began = process_time()
        u = np.asarray(controller.step(y, reference[n : n + controller.preview]), float)
        seconds.append(process_time() - began)
        y = plant.step(u, dt)
        outputs.append(plant.true())
        inputs.append(np.clip(u, plant.lower, plant.upper))
    return Trajectory(np.array(outputs), np.array(inputs), reference[:steps], np.array(seconds), dt)
