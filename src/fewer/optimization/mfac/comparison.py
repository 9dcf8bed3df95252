"""How the arms of the study are run: pruning one trained network, training a small one, and timing the window itself."""

from __future__ import annotations

import contextlib
import copy
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from fewer.optimization.mfac.gradients import collect_gradients, flatten, split_like, weight_matrices
from fewer.optimization.mfac.inverse_fisher import InverseFisher
from fewer.optimization.mfac.obs import independent_update, joint_update, saliency
from fewer.optimization.mfac.optimizer import MFAC
from fewer.optimization.mfac.window.sliding_window import SlidingInverseFisher

Pair = tuple[Tensor, Tensor]
SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98)
MAIN, GRADIENTS = 256, (64, 1024)  # m of the curves over sparsity; m looked at beside it, at a sparsity of 0.9
AT = 0.9
EVALUATIONS = 4  # an epoch, of the validation loss


@dataclass(frozen=True)
class Task:
    """What the arms work on: a trained network with the images it learned and others, and images that a small network learns."""

    network: nn.Module
    learned: Pair
    test: Pair
    train: Pair
    validation: Pair
    make: Callable[[], nn.Module]  # the network to train


@torch.no_grad()
def scores(model: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([model(part) for part in x.split(500)])


def accuracy(model: nn.Module, data: Pair) -> float:
    """The fraction of images whose highest score is their label's."""
    return float((scores(model, data[0]).argmax(1) == data[1]).float().mean())


# Pruning


def lowest(importance: Tensor, sparsity: float) -> Tensor:
    """Which weights have the lowest importance."""
    dropped = torch.zeros(len(importance), dtype=torch.bool, device=importance.device)
    dropped[importance.topk(round(sparsity * len(importance)), largest=False).indices] = True
    return dropped


class Subject:
    """A copy of the trained network whose weights can be pruned and given back."""

    def __init__(self, task: Task, trial: Any) -> None:
        self.model = copy.deepcopy(task.network).to(trial.device)
        self.parameters = list(weight_matrices(self.model).values())
        self.weights = flatten(self.parameters)
        self.test = tuple(part.to(trial.device) for part in task.test)
        self.learned = task.learned
        self.seed = trial.seed

    def gradients(self, m: int) -> Tensor:
        """m gradients, each of one image: the empirical Fisher matrix by its definition."""
        data = TensorDataset(*self.learned)
        draw = torch.Generator().manual_seed(self.seed)
        loader = DataLoader(data, batch_size=1, sampler=RandomSampler(data, num_samples=m, generator=draw))
        return collect_gradients(self.model, F.cross_entropy, loader, m)

    @torch.no_grad()
    def accuracy_with(self, weights: Tensor) -> float:
        """Test accuracy with these weights in place of the trained ones."""
        for parameter, part in zip(self.parameters, split_like(weights, self.parameters), strict=True):
            parameter.copy_(part)
        return accuracy(self.model, self.test)  # pyright: ignore[reportArgumentType] - a pair

    def trained(self) -> None:
        self.accuracy_with(self.weights)


def prune_by(task: Task, trial: Any, importance: Callable[[Subject], Tensor]) -> None:
    """Drop by an importance, and leave the others alone."""
    subject = Subject(task, trial)
    trial.log("dense_accuracy", accuracy(subject.model, subject.test))  # pyright: ignore[reportArgumentType]
    with trial.measure("prune"):
        order = importance(subject)
    for sparsity in SPARSITIES:
        trial.log("accuracy", subject.accuracy_with(torch.where(lowest(order, sparsity), 0.0, subject.weights)), sparsity=sparsity)


def diagonal_fisher(subject: Subject, damping: float) -> Tensor:
    """w^2 (lambda + mean g^2) / 2: the saliency where F is taken as diagonal."""
    grads = subject.gradients(MAIN)
    return saliency(subject.weights, 1 / (damping + grads.square().mean(0)))


def prune_by_obs(task: Task, trial: Any, block_size: int | None) -> None:
    """Optimal brain surgeon at several sparsities with both updates, and at one sparsity with fewer and with more gradients."""
    subject, damping = Subject(task, trial), trial.settings["damping"]
    trial.log("dense_accuracy", accuracy(subject.model, subject.test))  # pyright: ignore[reportArgumentType]
    for step, m in enumerate((MAIN, *GRADIENTS)):
        subject.trained()
        if m == MAIN:
            with trial.measure("prune"):
                grads, fisher, diagonal = _fisher(subject, m, damping, block_size)
                first = lowest(saliency(subject.weights, diagonal), AT)
                independent_update(fisher, diagonal, subject.weights, first)
            trial.log("gradient_bytes", grads.numel() * grads.itemsize)
            trial.log("unseen", float((damping * diagonal).mean()))
        else:
            grads, fisher, diagonal = _fisher(subject, m, damping, block_size)
        order = saliency(subject.weights, diagonal)
        for sparsity in SPARSITIES if m == MAIN else (AT,):
            dropped = lowest(order, sparsity)
            started = time.perf_counter()
            together = joint_update(grads, damping, fisher.block_size, subject.weights, dropped)
            if m == MAIN and sparsity == AT:
                trial.log("joint_seconds", time.perf_counter() - started)
            alone = independent_update(fisher, diagonal, subject.weights, dropped)
            for ending, delta in (("", alone), ("_joint", together)):
                found = subject.accuracy_with(torch.where(dropped, 0.0, subject.weights + delta))
                if m == MAIN:
                    trial.log(f"accuracy{ending}", found, sparsity=sparsity)
                if sparsity == AT:
                    trial.log(f"accuracy_at_90{ending}", found, m=m)
        trial.progress(step + 1, 1 + len(GRADIENTS), f"{m} gradients")


def _fisher(subject: Subject, m: int, damping: float, block_size: int | None) -> tuple[Tensor, InverseFisher, Tensor]:
    grads = subject.gradients(m)
    fisher = InverseFisher(grads, damping, block_size=block_size)
    return grads, fisher, fisher.diagonal()


# Training

MakeOptimizer = Callable[[nn.Module, dict[str, Any]], torch.optim.Optimizer]


def train(task: Task, trial: Any, make_optimizer: MakeOptimizer) -> None:
    """Train with a cosine schedule; the validation loss over steps and seconds, and what a step costs, the gradient's part told apart."""
    x, y = (part.to(trial.device) for part in task.train)
    validation = tuple(part.to(trial.device) for part in task.validation)
    model = task.make().to(trial.device)
    optimizer = make_optimizer(model, trial.settings)
    batch, epochs = trial.settings["batch_size"], trial.settings["epochs"]
    per_epoch = len(x) // batch
    total, every = epochs * per_epoch, max(1, per_epoch // EVALUATIONS)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    draw = torch.Generator().manual_seed(trial.seed)
    gradient, update, losses = [], [], []
    for step in range(1, total + 1):
        if (step - 1) % per_epoch == 0:
            order = torch.randperm(len(x), generator=draw).to(x.device)
        rows = order[(step - 1) % per_epoch * batch :][:batch]  # pyright: ignore[reportPossiblyUnbound] - bound in the first step
        seconds = _step(model, optimizer, x[rows], y[rows])
        schedule.step()
        gradient.append(seconds[0])
        update.append(seconds[1])
        if step % every == 0 or step == total:
            losses.append(validation_loss(model, validation))  # pyright: ignore[reportArgumentType]
            trial.log("validation_loss", losses[-1], step=step)
            trial.log("elapsed", sum(gradient) + sum(update), step=step)
            trial.report(step, -losses[-1] if math.isfinite(losses[-1]) else -1e9)
            trial.progress(step, total, f"validation loss {losses[-1]:.3f}")
    trial.objective(-losses[-1] if math.isfinite(losses[-1]) else -1e9)
    trial.log("final_loss", losses[-1])
    trial.log("validation_accuracy", accuracy(model, validation))  # pyright: ignore[reportArgumentType]
    trial.log("gradient_seconds", statistics.median(gradient))
    trial.log("update_seconds", statistics.median(update))
    trial.log("step_seconds", statistics.median(a + b for a, b in zip(gradient, update, strict=True)))
    trial.log("train_seconds", sum(gradient) + sum(update))
    trial.log("optimizer_bytes", optimizer_bytes(optimizer))


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> tuple[float, float]:
    """One step; seconds of the gradient and of the update."""
    model.train()
    started = time.perf_counter()
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    _finish(x)
    between = time.perf_counter()
    with contextlib.suppress(FloatingPointError):  # the loss has left the numbers: what follows is as bad as it is
        optimizer.step()
    _finish(x)
    return between - started, time.perf_counter() - between


def _finish(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def validation_loss(model: nn.Module, data: Pair) -> float:
    model.eval()
    return float(F.cross_entropy(scores(model, data[0]), data[1]))


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimizer's tensors."""
    held = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(value.numel() * value.itemsize for value in held) + (optimizer.window_bytes if isinstance(optimizer, MFAC) else 0)


# Scale


def time_window(trial: Any, dims: tuple[int, ...], windows: tuple[int, ...], dim: int, window: int) -> None:
    """Seconds of a push with its product over d at one m and over m at one d, and the slopes of their logarithms."""
    over_d = {d: push_seconds(window, d, trial.device, trial.seed) for d in dims}
    over_m = {m: push_seconds(m, dim, trial.device, trial.seed) for m in windows}
    for d, seconds in over_d.items():
        trial.log("push_seconds", seconds, d=d)
    for m, seconds in over_m.items():
        trial.log("push_seconds_of_m", seconds, m=m)
    trial.log("slope_over_d", slope(over_d))
    trial.log("slope_over_m", slope(over_m))


def push_seconds(window: int, dim: int, device: str, seed: int, least: float = 0.1) -> float:
    """The median time of push_and_apply on a full window; at least `least` seconds of it are timed."""
    draw = torch.Generator().manual_seed(seed)
    g = torch.randn(dim, generator=draw).to(device)
    fisher = SlidingInverseFisher(window, dim, 1e-3, device=device)
    for _ in range(window):
        g = g.roll(1)
        fisher.push(g)
    times: list[float] = []
    while sum(times) < least or len(times) < 5:
        g = g.roll(1)
        _finish(g)
        started = time.perf_counter()
        fisher.push_and_apply(g)
        _finish(g)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def slope(seconds: dict[int, float]) -> float:
    """The least-squares slope of log seconds over log size.

    >>> round(slope({1: 2.0, 10: 20.0, 100: 200.0}), 6)
    1.0
    """
    return float(np.polyfit(np.log(list(seconds)), np.log(list(seconds.values())), 1)[0])
