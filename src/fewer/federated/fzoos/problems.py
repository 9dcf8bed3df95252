"""What FZooS's study and bench search: pictures changed until five models err together, and quadratics of unlike clients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64
from torch import nn
from torch.nn import functional as F

from fewer.federated._shared.black_box import Function
from fewer.federated._shared.problems import held_by_file
from fewer.fitting import fit_steps
from fewer.tasks import ImageTask

REACH = 0.2  # how far a pixel from 0 to 1 may be shifted
HIDDEN, STEPS, RATE = 32, 80, 1e-2
IMAGES, SHARE = 600, 0.7  # of a client's model: images, and the classes that it knows


@dataclass(frozen=True)
class Problem:
    """Black boxes, where to start, and the least mean value (None: not known)."""

    boxes: Sequence[Function]
    x0: np.ndarray
    least: float | None = None

    def value(self, x: np.ndarray) -> float:
        """The mean of the boxes: what is measured from outside, and no query of any method."""
        return float(np.mean([box(x) for box in self.boxes]))


def quadratics(dimension: int, clients: int, unlike: float, seed: int) -> Problem:
    """f_i(x) = 0.1/d (c_i' z^2 + e_i' z + 1) with z = 20 x - 10; c_i and e_i are 1 + C (Dirichlet(1/N, ...) - 1/N) a coordinate.

    Their means over clients are 1 whatever C, so F is least at z = -1/2.
    """
    rng = np.random.default_rng(seed)
    c, e = (1 + unlike * (rng.dirichlet(np.full(clients, 1 / clients), dimension).T - 1 / clients) for _ in range(2))

    def box(client: int) -> Function:
        def function(x: np.ndarray) -> float:
            z = 20 * x - 10
            return float(0.1 / dimension * (c[client] @ z**2 + e[client] @ z + 1))

        return function

    return Problem([box(client) for client in range(clients)], rng.random(dimension), 0.1 / dimension * (1 - dimension / 4))


def holdings(task: ImageTask, clients: int, seed: int) -> list[np.ndarray]:
    """The training images of each client's model: those of its own where the user's file says, else of seven in ten classes."""
    if (held := held_by_file(task)) is not None:
        return held
    rng, y = np.random.default_rng([seed, 1]), task.train[1].numpy()
    known = max(2, round(SHARE * task.classes))
    chosen = [np.flatnonzero(np.isin(y, rng.choice(task.classes, known, replace=False))) for _ in range(clients)]
    return [rng.choice(rows, min(IMAGES, len(rows)), replace=False) for rows in chosen]


class Margin:
    """A small model's logit of a class minus the best other, in NumPy: what a service that answers with scores would give."""

    def __init__(self, model: nn.Sequential) -> None:
        self.layers = [
            (layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy())
            for layer in model
            if isinstance(layer, nn.Linear)
        ]

    def __call__(self, pixels: np.ndarray, label: int) -> float:
        (w1, b1), (w2, b2) = self.layers
        scores = w2 @ np.tanh(w1 @ pixels + b1) + b2
        return float(scores[label] - np.delete(scores, label).max())


def train_margin(x: torch.Tensor, y: torch.Tensor, classes: int, seed: int) -> Margin:
    """A perceptron with one hidden layer of 32, by 80 full-batch steps of Adam."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(x.shape[1], HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, classes))
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    fit_steps(optimizer, lambda x, y: F.cross_entropy(model(x), y), [(x, y)], STEPS)
    return Margin(model)


def unit_pixels(task: ImageTask, images: torch.Tensor) -> torch.Tensor:
    """Pixels of images [N, d], the training images' darkest as 0 and brightest as 1."""
    low, high = task.train[0].min(), task.train[0].max()
    return ((images - low) / (high - low)).clamp(0, 1).flatten(1)


def attacks(task: ImageTask, clients: int, images: int, seed: int, tuning: bool = False) -> list[Problem]:
    """Images on which the clients' models are right together, each to be shifted by 0.2 (2 x - 1) a pixel until they err.

    Args:
        task: what the models learn; the images are of its test split, or of its validation split where rates are chosen.
        clients: how many models, unless the user's file says.
        images: how many, drawn among those of a positive mean margin.
        seed: of the models, their images and the draw.
    """
    train, (images_judged, labels) = unit_pixels(task, task.train[0]), task.validation if tuning else task.test
    judged = unit_pixels(task, images_judged)
    margins = [
        train_margin(train[rows], task.train[1][rows], task.classes, seed * 100 + client)
        for client, rows in enumerate(holdings(task, clients, seed))
    ]
    found = []
    for place in np.random.default_rng([seed, 2]).permutation(len(judged)):
        problem = attack(margins, judged[place].double().numpy(), int(labels[place]))
        if problem.value(problem.x0) > 0:
            found.append(problem)
        if len(found) == images:
            return found
    raise ValueError(
        f"{task.name}: {len(found)} of {len(judged)} images are told right by all models together; expected {images}: more images"
    )


def attack(margins: Sequence[Margin], pixels: Float64[np.ndarray, "d"], label: int) -> Problem:
    def box(margin: Margin) -> Function:
        return lambda x: margin(np.clip(pixels + REACH * (2 * x - 1), 0, 1), label)

    return Problem([box(margin) for margin in margins], np.full(len(pixels), 0.5))
