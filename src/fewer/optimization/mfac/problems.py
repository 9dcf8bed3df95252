"""What is solved: a network, trained once on this machine, is pruned; a small one learns; and the window is pushed to at many sizes."""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from fewer.data import WEIGHTS, folder_of, made_once
from fewer.devices import one_thread
from fewer.fitting import batches_of, fit_steps
from fewer.meters import median_seconds
from fewer.optimization.mfac.gradients import collect_gradients, flatten, split_like, weight_matrices
from fewer.optimization.mfac.window.sliding_window import SlidingInverseFisher
from fewer.tasks import accuracy, conv_net, image_task, resnet20

Pair = tuple[Tensor, Tensor]
LEARNED, TESTED, TRAINED, VALIDATED = 20_000, 2_000, 3_072, 1_000  # images at quick scale
BATCH, LR = 128, 4e-3  # of the network that is pruned


@dataclass(frozen=True)
class Task:
    """A trained network with the images it learned and others, and images that a small network learns."""

    network: nn.Module
    learned: Pair
    held_out: Pair  # what the pruners are tuned on
    test: Pair
    train: Pair
    validation: Pair
    make: Callable[[], nn.Module]  # the network to train


def quick(data: str) -> Task:
    """A ConvNet of 59,074 weights (on 28 x 28 grey pixels) to prune, and a ResNet-20 of 17,254 to train.

    MNIST is too easy to tell optimisers apart: Fashion-MNIST is trained on in its place.
    """
    known = image_task(data, train=LEARNED, validation=TESTED, test=TESTED)
    small = image_task("fashion-mnist" if data == "mnist" else data, train=TRAINED, validation=VALIDATED)
    make = functools.partial(conv_net, known.shape, known.classes, (16, 32, 56, 64), strides=(2, 1, 1, 1), pools=(1, 2, 1, 2))
    network = trained(f"{Path(data).stem} conv-net", make, *known.train, epochs=4)
    learner = functools.partial(resnet20, small.shape, small.classes, (4, 8, 16), stem_stride=2)
    return Task(network, known.train, known.validation, known.test, small.train, small.validation, learner)


def full(data: str) -> Task:
    """ResNet-20, to prune and to train, on all images."""
    images = image_task(data)
    make = functools.partial(resnet20, images.shape, images.classes)
    network = trained(f"{Path(data).stem} resnet-20", make, *images.train, epochs=30)
    return Task(network, images.train, images.validation, images.test, images.train, images.validation, make)


def trained(name: str, make: Callable[[], nn.Module], x: Tensor, y: Tensor, epochs: int) -> nn.Module:
    """`make()` trained on images x with labels y, from the cache where it was trained before; in eval mode."""
    recipe = {
        "images": hashlib.sha256(x.numpy().tobytes() + y.numpy().tobytes()).hexdigest(),
        "epochs": epochs,
        "batch": BATCH,
        "lr": LR,
        "code": inspect.getsource(learn),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make()

        def write(folder: Path) -> None:
            learn(model, x, y, epochs)
            save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / WEIGHTS)

        model.load_state_dict(load_file(made_once(folder_of("mfac", name.replace(" ", "-"), recipe), write) / WEIGHTS))
    return model.eval()


def learn(model: nn.Module, x: Tensor, y: Tensor, epochs: int) -> None:
    """AdamW with a one-cycle learning rate."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    steps = epochs * -(-len(x) // BATCH)
    course = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps + 1)
    order = shuffled(x, y, BATCH, torch.Generator().manual_seed(0))
    fit_steps(optimizer, lambda x, y: F.cross_entropy(model(x), y), order, steps, tell=lambda *_: course.step())


def shuffled(x: Tensor, y: Tensor, batch: int, draw: torch.Generator) -> Iterator[Pair]:
    """Batches without end, in a new order in each epoch."""
    while True:
        yield from batches_of(x, y, batch, generator=draw, shuffle=True, device=x.device)


def lowest(importance: Tensor, sparsity: float) -> Tensor:
    """Which weights have the lowest importance."""
    dropped = torch.zeros(len(importance), dtype=torch.bool, device=importance.device)
    dropped[importance.topk(round(sparsity * len(importance)), largest=False).indices] = True
    return dropped


class Subject:
    """A copy of the trained network whose weights can be pruned and given back."""

    def __init__(self, task: Task, device: str, seed: int) -> None:
        self.model = copy.deepcopy(task.network).to(device)
        self.parameters = list(weight_matrices(self.model).values())
        self.weights = flatten(self.parameters)
        self.learned, self.device, self.seed = task.learned, device, seed

    def gradients(self, m: int, batch: int) -> Tensor:
        """m gradients of the trained network, each of so many images."""
        self.put(self.weights)
        data = TensorDataset(*self.learned)
        draw = torch.Generator().manual_seed(self.seed)
        loader = DataLoader(data, batch, sampler=RandomSampler(data, num_samples=m * batch, generator=draw))
        return collect_gradients(self.model, F.cross_entropy, loader, m)

    @torch.no_grad()
    def put(self, weights: Tensor) -> None:
        for parameter, part in zip(self.parameters, split_like(weights, self.parameters), strict=True):
            parameter.copy_(part)

    def accuracy(self, weights: Tensor, data: Pair) -> float:
        """With these weights in place of the trained ones."""
        self.put(weights)
        return accuracy(self.model, (data[0].to(self.device), data[1].to(self.device)))


def push_seconds(window: int, dim: int, device: str, seed: int) -> float:
    """The median processor time (on a GPU the time) of a push with its product on a full window, on one thread."""
    g = torch.randn(dim, generator=torch.Generator().manual_seed(seed)).to(device)
    fisher = SlidingInverseFisher(window, dim, 1e-3, device=device)
    for _ in range(window):
        g = g.roll(1)
        fisher.push(g)

    def push() -> None:
        fisher.push_and_apply(g)
        finish(g)

    with one_thread():
        return median_seconds(push, processor=not g.is_cuda)


def finish(x: Tensor) -> None:
    """Wait for a GPU."""
    if x.is_cuda:
        torch.cuda.synchronize()


def slope(seconds: dict[int, float]) -> float:
    """The least-squares slope of log seconds over log size.

    >>> round(slope({1: 2.0, 10: 20.0, 100: 200.0}), 6)
    1.0
    """
    return float(np.polyfit(np.log(list(seconds)), np.log(list(seconds.values())), 1)[0])
