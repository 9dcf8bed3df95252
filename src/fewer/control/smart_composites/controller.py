"""Neural generalised predictive control by Newton-Raphson (Soloway and Haley 1996), as the paper uses it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from fewer.control.smart_composites.newton import HALVINGS, SLACK, TO_THE_BOUND, box_terms, newton_step
from fewer.control.smart_composites.smooth_mlp import SmoothMLP
from fewer.control.smart_composites.to_c.compiler import network_of
from fewer.control.smart_composites.to_c.network import Network


class PredictiveController:
    """Steers a plant by what a learned model predicts: a few Newton-Raphson steps a sample.

    The model is y(n+1) = f(u(n), ..., u(n-nd), y(n), ..., y(n-dd)). Minimised over U = (u(n), ..., u(n+Nu-1)) is

        J = sum_{j=N1}^{N2} (r_j - y_j)^T Q (r_j - y_j) + sum_{j=1}^{Nu} du_j^T Lambda du_j + the soft box,

    by U <- U - H^{-1} grad J from the last solution, shifted; steps are shortened so that every u stays strictly inside its bounds.

    Args:
        model: a chain of Linear and smooth activations from (nd + 1) m + (dd + 1) p inputs to p outputs.
        horizon: (N1, N2), the first and the last predicted sample that counts.
        control_horizon: Nu; later inputs repeat the last.
        Q: [p, p] weight of errors, symmetric and positive semidefinite; a number stands for it times the identity.
        Lambda: [m, m] weight of changes of the input, likewise; needed for the number of inputs where `bounds` is None.
        bounds: (lower, upper), each a number or [m]; None for no box.
        sharpness: s of the box, a number or [m].
        past_inputs: nd.
        past_outputs: dd.
        max_iter: Newton-Raphson steps a sample at most (paper: one to a few).
        rtol: stop where |grad J| is at most this times what it was at the beginning.
        gauss_newton: leave out second derivatives of the model; H is then positive definite by itself.

    Attributes:
        held: samples on which y or the reference was not finite and the last input was held.
        iterations: Newton-Raphson steps of the last sample.

    Raises:
        ValueError: Q or Lambda not symmetric or not positive semidefinite, N2 < N1, Nu > N2, bounds that cross, a model of other sizes.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Linear(2, 1, bias=False)  # y(n+1) = 0.5 u(n) + 0.9 y(n)
        >>> _ = model.weight.data.copy_(torch.tensor([[0.5, 0.9]]))
        >>> controller = PredictiveController(model, (1, 5), 2, Q=1.0, Lambda=1e-6, bounds=(-1, 1), past_inputs=0, past_outputs=0)
        >>> y = 0.0
        >>> for _ in range(30):
        ...     y = 0.5 * float(controller.step([y], [[1.0]] * 5)[0]) + 0.9 * y
        >>> round(y, 2)
        1.0
    """

    def __init__(
        self,
        model: nn.Module | Network,
        horizon: tuple[int, int],
        control_horizon: int,
        Q: Any = 1.0,
        Lambda: Any = 1e-3,
        bounds: tuple[Any, Any] | None = None,
        sharpness: Any = 1e-3,
        past_inputs: int = 1,
        past_outputs: int = 1,
        max_iter: int = 3,
        rtol: float = 1e-3,
        gauss_newton: bool = False,
    ) -> None:
        self.n1, self.n2 = horizon
        self.nu, self.nd, self.dd = control_horizon, past_inputs, past_outputs
        if not 1 <= self.n1 <= self.n2:
            raise ValueError(f"horizon {horizon}; expected 1 <= N1 <= N2")
        if not 1 <= self.nu <= self.n2:
            raise ValueError(f"control_horizon {self.nu} with N2 = {self.n2}; expected 1 <= Nu <= N2")
        if min(past_inputs, past_outputs) < 0 or max_iter < 1:
            raise ValueError(
                f"past_inputs={past_inputs}, past_outputs={past_outputs}, max_iter={max_iter}; expected delays >= 0, max_iter >= 1"
            )
        self.network = model if isinstance(model, Network) else network_of(model, example_of(model))
        self.f = SmoothMLP(self.network)
        self.p = self.f.outputs
        self.m, left = divmod(self.f.inputs - (self.dd + 1) * self.p, self.nd + 1)
        if left or self.m < 1:
            wanted = (
                f"(past_inputs + 1) m + (past_outputs + 1) p with p = {self.p} outputs, past_inputs = {self.nd}, past_outputs = {self.dd}"
            )
            raise ValueError(f"the model has {self.f.inputs} inputs; expected {wanted}")
        self.Q, self.Lambda = weight_matrix("Q", Q, self.p), weight_matrix("Lambda", Lambda, self.m)
        self.lower, self.upper, self.sharpness = None, None, np.zeros(self.m)
        if bounds is not None:
            self.lower, self.upper = (np.broadcast_to(np.asarray(each, float), (self.m,)).copy() for each in bounds)
            self.sharpness = np.broadcast_to(np.asarray(sharpness, float), (self.m,)).copy()
            if not (self.lower < self.upper).all() or not np.isfinite([self.lower, self.upper]).all():
                raise ValueError(f"bounds {self.lower} to {self.upper}; expected finite lower < upper for every input")
            if not (self.sharpness > 0).all():
                raise ValueError(f"sharpness {self.sharpness}; expected numbers above zero")
        self.max_iter, self.rtol, self.gauss_newton = max_iter, rtol, gauss_newton
        self.preview = self.n2
        changes = np.eye(self.nu) - np.eye(self.nu, k=-1)
        self.changes = np.kron(changes, np.eye(self.m))  # dU = changes U - (u(n-1), 0, ...)
        self.change_weight = np.kron(np.eye(self.nu), self.Lambda)
        self._places = self._input_places()
        self.reset()

    def _input_places(self) -> np.ndarray:
        """dz/dU of the input part of z for every predicted sample [N2, nd + 1, Nu]: which u of U stands at which delay."""
        places = np.zeros((self.n2, self.nd + 1, self.nu))
        for j in range(self.n2):
            for delay in range(min(self.nd, j) + 1):
                places[j, delay, min(j - delay, self.nu - 1)] = 1
        return places

    @property
    def rest(self) -> np.ndarray:
        """The input before the first sample: zero, or the middle of its bounds where zero is not inside them."""
        if self.lower is None or self.upper is None:
            return np.zeros(self.m)
        return np.where((self.lower < 0) & (self.upper > 0), 0.0, (self.lower + self.upper) / 2)

    def reset(self) -> None:
        """Forget the past: the last input is `rest`."""
        self.past_u = np.tile(self.rest, (max(self.nd, 1), 1))  # newest first
        self.past_y: np.ndarray | None = None
        self.U = np.tile(self.rest, (self.nu, 1))
        self.held = self.iterations = 0

    def step(self, y: Any, reference: Any) -> np.ndarray:
        """The input to apply now.

        Args:
            y: [p] what was measured now.
            reference: [N2, p], what y shall be at the next samples.

        Returns:
            [m], strictly inside the bounds.

        Raises:
            ValueError: y or the reference of a wrong shape.

        Warns:
            RuntimeWarning: y or the reference is not finite: the last input is held, and `held` counts it.
        """
        y, reference = np.atleast_1d(np.asarray(y, float)), np.asarray(reference, float)
        if reference.ndim == 1 and self.p == 1:
            reference = reference[:, None]
        if y.shape != (self.p,):
            raise ValueError(f"y has shape {y.shape}; expected ({self.p},)")
        if reference.shape != (self.n2, self.p):
            raise ValueError(f"reference has shape {reference.shape}; expected ({self.n2}, {self.p}): a row for each sample up to N2")
        if not (np.isfinite(reference).all() and np.isfinite(y).all()):
            self.held += 1
            what = f"y = {y}" if not np.isfinite(y).all() else "the reference"
            warnings.warn(f"{what} is not finite: the last input is held ({self.held} so far)", RuntimeWarning, stacklevel=2)
            self.past_u = np.roll(self.past_u, 1, axis=0)
            self.past_u[0] = self.past_u[1 % len(self.past_u)]
            return self.past_u[0].copy()
        self.past_y = np.tile(y, (self.dd + 1, 1)) if self.past_y is None else np.vstack([y, self.past_y[: self.dd]])
        self.U = self.minimise(self.U, reference)
        u = self.U[0].copy()
        self.past_u = np.roll(self.past_u, 1, axis=0)
        self.past_u[0] = u
        self.U = np.vstack([self.U[1:], self.U[-1:]])
        return u

    def minimise(self, U: np.ndarray, reference: np.ndarray) -> np.ndarray:
        """U [Nu, m] after at most `max_iter` Newton-Raphson steps."""
        first, self.iterations = np.inf, 0
        for iteration in range(self.max_iter):
            value, gradient, hessian = self.cost(U, reference)
            length = float(np.linalg.norm(gradient))
            first = length if iteration == 0 else first
            if not np.isfinite(length) or length <= 1e-9 or (iteration and length <= self.rtol * first):
                break
            U = self._moved(U, newton_step(gradient, hessian).reshape(U.shape), value, reference)
            self.iterations += 1
        return U

    def _moved(self, U: np.ndarray, step: np.ndarray, value: float, reference: np.ndarray) -> np.ndarray:
        """U + t step, t <= 1 so short that U stays inside the box, and halved while J would rise."""
        t = 1.0
        if self.lower is not None and self.upper is not None:
            with np.errstate(divide="ignore", invalid="ignore"):
                room = np.where(step < 0, (self.lower - U) / step, np.where(step > 0, (self.upper - U) / step, np.inf))
            t = min(1.0, TO_THE_BOUND * float(room.min()))
        for _ in range(HALVINGS):
            if self.value(U + t * step, reference) <= value + SLACK * abs(value):
                break
            t /= 2
        moved = U + t * step
        return moved if np.isfinite(moved).all() else U

    def _inputs_at(self, U: np.ndarray, j: int) -> np.ndarray:
        """u(n+j), ..., u(n+j-nd) [nd + 1, m]."""
        return np.array([U[min(j - k, self.nu - 1)] if j >= k else self.past_u[k - j - 1] for k in range(self.nd + 1)])

    def _outputs_at(self, ys: Sequence[np.ndarray], j: int) -> np.ndarray:
        """y(n+j), ..., y(n+j-dd) [dd + 1, p], predicted where they are not measured yet."""
        assert self.past_y is not None
        return np.array([ys[j - k - 1] if j > k else self.past_y[k - j] for k in range(self.dd + 1)])

    def value(self, U: np.ndarray, reference: np.ndarray) -> float:
        """J at U."""
        ys: list[np.ndarray] = []
        for j in range(self.n2):
            ys.append(self.f(np.concatenate([self._inputs_at(U, j).ravel(), self._outputs_at(ys, j).ravel()])))
        errors = (reference - np.array(ys))[self.n1 - 1 :]
        changes = np.diff(U, axis=0, prepend=self.past_u[:1])
        value = float(np.einsum("jp,pq,jq", errors, self.Q, errors) + np.einsum("jm,mn,jn", changes, self.Lambda, changes))
        return value + (
            box_terms(U, self.lower, self.upper, self.sharpness)[0] if self.lower is not None and self.upper is not None else 0.0
        )

    def cost(self, U: np.ndarray, reference: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        """J, its gradient [Nu m] and its Hessian [Nu m, Nu m], by forward accumulation through the recursion."""
        size, nz, inputs = self.nu * self.m, self.f.inputs, (self.nd + 1) * self.m
        value, gradient, hessian = 0.0, np.zeros(size), np.zeros((size, size))
        ys: list[np.ndarray] = []
        slopes: list[np.ndarray] = []  # dy_j/dU [p, size]
        curves: list[np.ndarray] = []  # d2y_j/dU2 [p, size, size]
        for j in range(self.n2):
            z = np.concatenate([self._inputs_at(U, j).ravel(), self._outputs_at(ys, j).ravel()])
            dz = np.zeros((nz, size))
            dz[:inputs] = np.kron(self._places[j], np.eye(self.m))
            fed = [(inputs + k * self.p, j - k - 1) for k in range(min(self.dd + 1, j))]  # where own predictions are fed back
            for row, index in fed:
                dz[row : row + self.p] = slopes[index]
            y, jacobian, second = self.f.derivatives(z, not self.gauss_newton)
            ys.append(y)
            slopes.append(jacobian @ dz)
            if second is not None:
                curve = dz.T @ second @ dz
                for row, index in fed:
                    curve = curve + np.tensordot(jacobian[:, row : row + self.p], curves[index], 1)
                curves.append(curve)
            if j + 1 >= self.n1:
                error = reference[j] - y
                weighted = self.Q @ error
                value += float(error @ weighted)
                gradient -= 2 * slopes[j].T @ weighted
                hessian += 2 * slopes[j].T @ self.Q @ slopes[j]
                if second is not None:
                    hessian -= 2 * np.tensordot(weighted, curves[j], 1)
        changes = self.changes @ U.ravel()
        changes[: self.m] -= self.past_u[0]
        value += float(changes @ self.change_weight @ changes)
        gradient += 2 * self.changes.T @ self.change_weight @ changes
        hessian += 2 * self.changes.T @ self.change_weight @ self.changes
        if self.lower is not None and self.upper is not None:
            box, first, second_box = box_terms(U, self.lower, self.upper, self.sharpness)
            value, gradient = value + box, gradient + first.ravel()
            hessian = hessian + np.diag(second_box.ravel())
        return value, gradient, hessian


def weight_matrix(name: str, value: Any, size: int) -> np.ndarray:
    """A weight as a symmetric, positive semidefinite matrix; ValueError where it is none."""
    matrix = np.asarray(value, float)
    matrix = matrix * np.eye(size) if matrix.ndim == 0 else matrix
    if matrix.shape != (size, size):
        raise ValueError(f"{name} has shape {matrix.shape}; expected ({size}, {size}) or a number")
    if not np.isfinite(matrix).all() or not np.allclose(matrix, matrix.T):
        raise ValueError(f"{name} is not symmetric:\n{matrix}\nexpected a symmetric matrix: use (M + M.T) / 2")
    if np.linalg.eigvalsh(matrix).min() < -1e-12 * max(1.0, float(np.abs(matrix).max())):
        raise ValueError(
            f"{name} has the negative eigenvalue {np.linalg.eigvalsh(matrix).min():.3g}; expected a positive semidefinite matrix"
        )
    return matrix


def example_of(model: nn.Module) -> Any:
    """An input of the size that the model's first Linear takes."""
    import torch

    for module in model.modules():
        if isinstance(module, nn.Linear):
            return torch.zeros(1, module.in_features, dtype=module.weight.dtype)
    raise ValueError("the model has no Linear layer; expected a chain of Linear and smooth activations")
