"""The peak of the bytes that tensors hold during a section, split by what they are for."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn, optim

PARAMETERS, GRADIENTS, OPTIMIZER_STATE = "parameters", "gradients", "optimizer state"
BUFFERS, ACTIVATIONS, TEMPORARIES = "buffers", "activations", "temporaries"


@dataclass
class TensorMemory:
    """What `tensor_memory` found, complete when its block has ended.

    Attributes:
        bytes: bytes of each kind at the moment when all tensors together held the most.
        beside: peak bytes of each kind that was kept out of that.
        allocator_peak: on a GPU, the peak of torch's allocator (bytes), rounding and workspaces included; None on a CPU.
    """

    bytes: dict[str, int] = field(default_factory=dict)
    beside: dict[str, int] = field(default_factory=dict)
    allocator_peak: int | None = None

    @property
    def total(self) -> int:
        """Bytes of all kinds at the peak, without those beside it."""
        return sum(self.bytes.values())


_open: list[Any] = []


@contextlib.contextmanager
def memory_for(kind: str) -> Iterator[None]:
    """Name what the tensors made in the block are for (an input cache, ...): an open `tensor_memory` shows their bytes as that kind.

    Where none is open, it costs nothing.
    """
    trackers = list(_open)
    before = [tracker.purpose for tracker in trackers]
    for tracker in trackers:
        tracker.purpose = kind
    try:
        yield
    finally:
        for tracker, purpose in zip(trackers, before, strict=True):
            tracker.purpose = purpose


@contextlib.contextmanager
def tensor_memory(*tracked: nn.Module | optim.Optimizer, beside: Sequence[str] = ()) -> Iterator[TensorMemory]:
    """Peak bytes of tensors inside the block: those made in it, and those of the modules and optimizers that are named.

    Kinds: parameters, buffers, gradients (what optimizers find in `.grad`), optimizer state, temporaries (made during a backward
    pass or an optimizer's step), activations (everything else made inside), and what `memory_for` names. Data from outside the
    block are not counted, nor what a kernel takes and gives back by itself. Works for any training loop, with or without autograd
    and for optimizers made inside. Each operation is watched: never time a block under it.

    Args:
        tracked: modules and optimizers that exist already.
        beside: kinds named by `memory_for` that are not part of the peak, but get one of their own.

    Examples:
        >>> import torch
        >>> layer = torch.nn.Linear(100, 10)
        >>> with tensor_memory(layer) as peak:
        ...     _ = layer(torch.ones(50, 100))
        >>> peak.bytes == {"parameters": 4 * (100 * 10 + 10), "activations": 4 * (50 * 100 + 50 * 10)}
        True
    """
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    found = TensorMemory()
    tracker = _tracker_class()(tracked, beside)
    on_gpu = torch.cuda.is_initialized()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    hooks = [
        register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: tracker.before_step(optimizer)),
        register_optimizer_step_post_hook(lambda optimizer, args, kwargs: tracker.after_step(optimizer)),
    ]
    _open.append(tracker)
    try:
        with tracker:
            yield found
    finally:
        _open.remove(tracker)
        for hook in hooks:
            hook.remove()
        found.bytes, found.beside = tracker.bytes_at_peak(), dict(tracker.peak_beside)
        found.allocator_peak = torch.cuda.max_memory_allocated() if on_gpu else None


@functools.cache
def _tracker_class() -> Any:
    """The tracker, made when torch is first needed."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from torch.utils.weak import WeakIdKeyDictionary

    class Tracker(TorchDispatchMode):
        """Follows every storage from its birth to its death. Storages get numbers; what a number is for may be learned later."""

        def __init__(self, tracked: tuple[nn.Module | optim.Optimizer, ...], beside: Sequence[str]) -> None:
            super().__init__()
            self.purpose: str | None = None  # of the tensors that are made now
            self.peak_beside = dict.fromkeys(beside, 0)
            self._beside = dict.fromkeys(beside, 0)  # bytes alive of each kind that is kept out of the peak
            self._beside_sizes: dict[int, int] = {}  # number -> bytes
            self._numbers = WeakIdKeyDictionary()  # storage -> (number, weak reference that tells its death)
            self._alive: dict[int, int] = {}  # number -> bytes
            self._kind: dict[int, str] = {}
            self._now = self._peak = 0
            self._at_peak: dict[int, int] = {}
            self._born = 0
            self._in_step = False
            for each in tracked:
                if isinstance(each, torch.nn.Module):
                    self._follow_module(each)
                else:
                    self.before_step(each)
                    self.after_step(each)
            self._note_peak()

        def label(self, kind: str, tensor: Tensor) -> None:
            """Count the tensor's storage, as `kind` from now on."""
            self._kind[self._follow(tensor.untyped_storage(), kind)] = kind

        def before_step(self, optimizer: optim.Optimizer) -> None:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    self.label(PARAMETERS, parameter)
                    if parameter.grad is not None:
                        self.label(GRADIENTS, parameter.grad)
            self._in_step = True

        def after_step(self, optimizer: optim.Optimizer) -> None:
            self._in_step = False
            for state in optimizer.state.values():
                for value in state.values():
                    if isinstance(value, torch.Tensor):
                        self.label(OPTIMIZER_STATE, value)

        def bytes_at_peak(self) -> dict[str, int]:
            kinds = Counter[str]()
            for number, size in self._at_peak.items():
                kinds[self._kind[number]] += size
            return dict(kinds)

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            given = {storage._cdata for storage in self._storages((args, kwargs))}
            result = func(*args, **(kwargs or {}))
            for storage in self._storages(result):
                if storage._cdata not in given:  # else a view of what is known already, or of data from outside
                    self._follow(storage, self._kind_of_new())
            self._note_peak()
            return result

        def _kind_of_new(self) -> str:
            if self.purpose is not None:
                return self.purpose
            backward = torch._C._current_graph_task_id() != -1
            return TEMPORARIES if backward or self._in_step else ACTIVATIONS

        def _follow_module(self, module: nn.Module) -> None:
            for parameter in module.parameters():
                self.label(PARAMETERS, parameter)
                if parameter.grad is not None:
                    self.label(GRADIENTS, parameter.grad)
            for buffer in module.buffers():
                self.label(BUFFERS, buffer)

        def _storages(self, tree: Any) -> list[torch.UntypedStorage]:
            return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided]

        def _follow(self, storage: torch.UntypedStorage, kind: str) -> int:
            known = self._numbers.get(storage)
            if known is not None:
                return known[0]
            number = self._born
            self._born += 1
            self._numbers[storage] = (number, weakref.ref(storage, lambda _: self._bury(number)))
            self._kind[number] = kind
            if kind in self._beside:
                self._beside_sizes[number] = storage.nbytes()
                self._beside[kind] += storage.nbytes()
                self.peak_beside[kind] = max(self.peak_beside[kind], self._beside[kind])
            else:
                self._alive[number] = storage.nbytes()
                self._now += storage.nbytes()
            return number

        def _bury(self, number: int) -> None:
            if number in self._alive:
                self._now -= self._alive.pop(number)
            else:
                self._beside[self._kind[number]] -= self._beside_sizes.pop(number)

        def _note_peak(self) -> None:
            if self._now > self._peak:
                self._peak, self._at_peak = self._now, dict(self._alive)

    return Tracker
