"""A small classifier of digits trained in few bits: seconds of work in which a format's effect on training shows."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from fewer.devices import one_thread
from fewer.fitting import fit_steps
from fewer.tasks import image_task, mlp

STEPS, WARM_UP, BATCH, RATE = 300, 30, 64, 5e-3


def train_digits(seed: int, change: Callable[[nn.Module], nn.Module]) -> float:
    """Held-out loss (nats) of a 64-64-64-10 MLP on scikit-learn's digits; `change` puts its layers in few bits before it is trained."""
    with one_thread():  # on several, so small tensors take many times longer
        return _trained(seed, change)


def _trained(seed: int, change: Callable[[nn.Module], nn.Module]) -> float:
    task = image_task("digits")
    torch.manual_seed(seed)
    network = change(mlp(task.shape, task.classes, (64, 64)))
    x, y = task.train
    draw = torch.Generator().manual_seed(seed)
    batches = ((x[rows], y[rows]) for rows in (torch.randint(len(x), (BATCH,), generator=draw) for _ in range(STEPS)))
    optimizer = torch.optim.AdamW(network.parameters(), RATE, betas=(0.9, 0.95), weight_decay=0.1)
    fit_steps(optimizer, lambda x, y: F.cross_entropy(network(x), y), batches, STEPS, schedule=_cosine, clip=1.0)
    with torch.no_grad():
        return float(F.cross_entropy(network.eval()(task.test[0]), task.test[1]))


def _cosine(step: int) -> float:
    """Up in a line, then down to a tenth as a cosine."""
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    return 0.1 + 0.9 * (1 + math.cos(math.pi * (step + 1 - WARM_UP) / (STEPS - WARM_UP))) / 2
