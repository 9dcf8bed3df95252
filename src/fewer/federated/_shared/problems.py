"""What the area's studies are about: images of the house or the user's own, who holds which, and how large it all is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fewer.data.made_once import WEIGHTS, folder_of, made_once
from fewer.errors import UserError
from fewer.federated._shared.clients import Shards
from fewer.files import model_digest
from fewer.tasks import IMAGES_HELP, ImageTask

DATA_HELP = f"{IMAGES_HELP} (and client [N]: who holds which)"


@dataclass(frozen=True)
class Size:
    """How large a study's federation is. At quick scale the rounds are so many that FedAvg's curve has flattened by the last of them.

    Attributes:
        images, validation, test: images that lie with the clients (None: all), that rates are chosen on, and that judge.
        clients: how many there are, unless the user's file says.
        fraction: of the clients that take part in a round.
        rounds: in all.
        batch_size: images a local step.
        side: pixels.
    """

    images: int | None
    validation: int
    test: int
    clients: int
    rounds: int
    batch_size: int
    side: int
    fraction: float = 1.0


def shards_of(
    task: ImageTask,
    split: Callable[[Tensor, int], Sequence[Any]],
    clients: int,
    *,
    how: str = "drawn",
    fewest: int = 1,
    device: str = "cpu",
) -> tuple[Shards, str]:
    """Who holds which training images, and that in words.

    Args:
        task: its training images; an array `client` beside them says who holds which.
        split: `split(labels, clients)`: an index array a client (see `partition`), where no such array is given.
        clients: how many to split over; fewer where each would have under five times `fewest` images.
        how: the split in words.
        fewest: images that a client must have.
        device: where the images go.

    Raises:
        UserError: the file names one client only.
    """
    x, y = (part.to(device) for part in task.train)
    if (held := held_by_file(task)) is not None:
        return Shards(x, y, held), f"{len(held)}, as the file says"
    clients = min(clients, len(x) // (5 * fewest))
    return Shards(x, y, split(task.train[1], clients)), f"{clients}, {how}"


def held_by_file(task: ImageTask) -> list[np.ndarray] | None:
    """The training images of each client that the user's file names; None where it names none.

    Raises:
        UserError: the file names one client only.
    """
    if "client" not in task.beside:
        return None
    names, holder = np.unique(task.beside["client"], return_inverse=True)
    if len(names) < 2:
        raise UserError(f"{task.name}: client names {len(names)} client; expected at least 2, or no client array: a split is drawn")
    return [np.flatnonzero(holder == client) for client in range(len(names))]


def load_trained(model: nn.Module, x: Tensor, y: Tensor, kind: tuple[str, str], recipe: Sequence[float], train: Callable[[], None]) -> None:
    """Load what `train()` makes of this model and these images; it is made once on a machine, and kept by images, start and recipe.

    Args:
        model: as training starts; trained afterwards.
        x, y: the images and their classes.
        kind: which cache, and which model in it.
        recipe: the numbers that training depends on.
        train: trains the model in place.
    """

    def make(part: Path) -> None:
        train()
        save_file(model.state_dict(), part / WEIGHTS)

    seen = nn.ParameterList([nn.Parameter(each, requires_grad=False) for each in (x, y)])
    what = {"images": model_digest(seen), "start": model_digest(model), "recipe": list(recipe)}
    model.load_state_dict(load_file(made_once(folder_of(*kind, what), make) / WEIGHTS))
