"""What a step of training keeps in memory, counted, and how long a short call takes."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn, optim

WARM_UP = 2


def median_seconds(call: Callable[[], Any], repeats: int = 15, *, processor: bool = False) -> float:
    """The median time of a call, after two that are not counted.

    Args:
        processor: processor seconds of this process, all threads, which other work on the machine does not lengthen.

    >>> median_seconds(lambda: sum(range(10))) < 1
    True
    """
    clock = time.process_time if processor else time.perf_counter
    for _ in range(WARM_UP):
        call()
    times = []
    for _ in range(repeats):
        start = clock()
        call()
        times.append(clock() - start)
    return statistics.median(times)


def optimizer_bytes(optimizer: optim.Optimizer) -> int:
    """Bytes of the tensors that an optimizer keeps between steps.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.ones(10))
    >>> optimizer = torch.optim.SGD([weight], lr=1.0, momentum=0.9)
    >>> weight.sum().backward(); optimizer.step(); optimizer_bytes(optimizer)
    40
    """
    import torch

    kept = {id(each): each for state in optimizer.state.values() for each in state.values() if isinstance(each, torch.Tensor)}
    return sum(tensor.nbytes for tensor in kept.values())


@dataclass
class SavedBytes:
    """What autograd keeps, each storage once and in full (a view keeps all of it); `total` counts bytes."""

    storages: dict[int, Any] = field(default_factory=dict)  # kept alive: the address of a dead one may be taken again

    @property
    def total(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


@contextlib.contextmanager
def saved_bytes(model: nn.Module) -> Iterator[SavedBytes]:
    """Count the bytes that forward passes inside the block keep for their backward pass, the model's own weights and buffers left out.

    >>> import torch
    >>> layer = torch.nn.Linear(100, 10)
    >>> x = torch.ones(5, 100)
    >>> with saved_bytes(layer) as saved:
    ...     y = layer(x)
    >>> saved.total
    2000
    """
    import torch

    own = {_storage_of(tensor) for tensor in (*model.parameters(), *model.buffers())}
    found = SavedBytes()

    def pack(tensor: Tensor) -> Tensor:
        if _storage_of(tensor) not in own:
            found.storages[_storage_of(tensor)] = tensor.untyped_storage()
        return tensor.detach()  # the output itself would keep its own graph alive

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def _storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
