"""A model as a walk through its blocks: what comes before them, the very arguments that its own loop hands to each, what comes after.

The model's own forward runs with stand-ins in place of its blocks, so no model is written again: a stand-in notes what it is called with,
or ends the pass, or puts in the hidden state that the blocks were walked to elsewhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

FAMILIES = ("model.layers", "model.decoder.layers", "transformer.h")  # Llama, Mistral, Qwen2, Qwen3, Gemma; OPT; GPT-2


def find_blocks(model: nn.Module, path: str | None) -> tuple[str, list[nn.Module]]:
    """(dotted path, blocks) of the ModuleList that is named, or of a known family's; ValueError with the candidates where there is none."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)}
    for name in FAMILIES if path is None else (path,):
        if name in found:
            return name, list(found[name])
    said = (
        f"blocks is {path!r}, which is no ModuleList" if path is not None else f"{type(model).__name__} has no ModuleList of a known family"
    )
    raise ValueError(
        f"{said} of {type(model).__name__}; expected one of {', '.join(found) or 'none, for it has none'}: name it as blocks=..."
    )


class Parts(NamedTuple):
    """The parameters of a model by full name, in `named_parameters()` order: of each block, and of what stays on the device."""

    path: str
    blocks: list[dict[str, nn.Parameter]]
    early: dict[str, nn.Parameter]  # registered before the blocks
    late: dict[str, nn.Parameter]  # registered after them


def split(model: nn.Module, path: str | None, rng: str) -> Parts:
    """The parts of a model.

    Raises:
        ValueError: no blocks, a parameter in two of them, nothing to train, or an order of registration that is not the order of the walk.
    """
    path, blocks = find_blocks(model, path)
    _check_unshared(model, path)
    owned: list[dict[str, nn.Parameter]] = [{} for _ in blocks]
    early: dict[str, nn.Parameter] = {}
    late: dict[str, nn.Parameter] = {}
    reached = -1  # the last block whose parameter has come
    for name, parameter in model.named_parameters():
        inside = int(name.removeprefix(f"{path}.").split(".")[0]) if name.startswith(f"{path}.") else None
        if rng == "torch" and inside is not None and (inside < reached or late):
            raise ValueError(
                f"{name} is registered after what runs after it; expected parameters in the order of execution, in which rng='torch' draws: use rng='counter'"
            )
        reached = reached if inside is None else inside
        (owned[inside] if inside is not None else early if reached < 0 else late)[name] = parameter
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"no parameter of {type(model).__name__} requires a gradient; expected some to train: unfreeze them")
    return Parts(path, owned, early, late)


def check_order(late: Mapping[str, nn.Parameter], before: set[int]) -> None:
    """ValueError where a parameter that is registered after the blocks is used before them: its z would have to be drawn too early."""
    for name, parameter in late.items():
        if id(parameter) in before:
            raise ValueError(
                f"{name} is registered after the blocks and used before them; expected parameters in the order of execution, in which "
                "rng='torch' draws: use rng='counter'"
            )


def _check_unshared(model: nn.Module, path: str) -> None:
    """ValueError where a block's parameter has a second name: it would be in two places of the walk."""
    places: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(name)
    for names in places.values():
        if len(names) > 1 and any(name.startswith(f"{path}.") for name in names):
            raise ValueError(f"{names[0]} and {names[1]} are one parameter; expected each block's to be its own: give it a copy")


def owner_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter, and the parameter's own name in it."""
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


class Call(NamedTuple):
    """What the model's own loop hands to a block beside the hidden state."""

    args: tuple[Any, ...]
    words: dict[str, Any]
    by_name: bool  # the hidden state goes by its name

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        left = block(hidden_states=hidden, **self.words) if self.by_name else block(hidden, *self.args, **self.words)
        if not isinstance(left, Tensor):
            raise ValueError(f"a {type(block).__name__} returns a {type(left).__name__}; expected the hidden state alone, a tensor")
        return left


class _Reached(Exception):
    """The first block is reached: what comes after would be for nothing."""


class _StandIn(nn.Module):
    def __init__(self, act: Callable[[Tensor, Call], Tensor]) -> None:
        super().__init__()
        self.act = act

    def forward(self, *args: Any, **words: Any) -> Tensor:
        by_name = not args
        hidden, rest = (words.pop("hidden_states"), ()) if by_name else (args[0], args[1:])
        return self.act(hidden, Call(rest, words, by_name))


@contextlib.contextmanager
def _stand_ins(model: nn.Module, path: str, act: Callable[[int, Tensor, Call], Tensor]) -> Iterator[None]:
    """Stand-ins in the blocks' place inside the block."""
    parent, leaf = owner_of(model, path)
    blocks = cast(nn.ModuleList, getattr(parent, leaf))
    stand_ins = [_StandIn(lambda hidden, call, number=number: act(number, hidden, call)) for number in range(len(blocks))]
    setattr(parent, leaf, nn.ModuleList(stand_ins))
    try:
        yield
    finally:
        setattr(parent, leaf, blocks)


def loss_of(model: nn.Module, batch: Any) -> Any:
    """The loss that a model gives for a batch: a callable batch is called with the model, words and token ids go to its forward."""
    if callable(batch) and not isinstance(batch, Mapping):
        return batch(model)
    words = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch, "labels": batch}
    if hasattr(model, "config"):
        words.setdefault("use_cache", False)
    loss = getattr(model(**words), "loss", None)
    if loss is None:
        raise ValueError("the model gives no loss for this batch; expected one with labels, token ids, or a callable that takes the model")
    return loss


class Trace(NamedTuple):
    """A pass through a model without its blocks: what each block is called with, and which parameters are used after them."""

    hidden: Tensor
    calls: list[Call]
    before: set[int]  # ids of the parameters that are used before the blocks
    after: set[int]


class _Used(TorchFunctionMode):
    """Notes which parameters torch functions are given."""

    def __init__(self) -> None:
        self.seen: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen |= {id(each) for each in (*args, *(kwargs or {}).values()) if isinstance(each, nn.Parameter)}
        return func(*args, **(kwargs or {}))


def trace(model: nn.Module, path: str, count: int, batch: Any, *, whole: bool) -> Trace:
    """Pass a batch through all but the blocks; `whole` goes on behind them (once, to see which parameters are used there)."""
    entered: list[Tensor] = []
    calls: list[Call] = []
    seen: list[set[int]] = []
    used = _Used()

    def act(number: int, hidden: Tensor, call: Call) -> Tensor:
        if number != len(calls) or (entered and hidden is not entered[0]):
            raise ValueError(
                f"block {number} of {path} is not called next with what block {number - 1} returned; expected blocks that follow each other: "
                "name others as blocks=..."
            )
        entered[:] = [hidden]
        calls.append(call)
        seen.extend([set(used.seen)] if not seen else [])
        used.seen.clear()
        if number == count - 1 and not whole:
            raise _Reached
        return hidden

    with _stand_ins(model, path, act), used, contextlib.suppress(_Reached):
        loss_of(model, batch)
    if len(calls) != count:
        raise ValueError(f"{len(calls)} of {count} blocks of {path} are called for this batch; expected all, one after the other")
    return Trace(entered[0], calls, seen[0], set(used.seen))


def enter(model: nn.Module, path: str, batch: Any) -> Tensor:
    """The hidden state that reaches the first block."""
    entered: list[Tensor] = []

    def act(number: int, hidden: Tensor, call: Call) -> Tensor:
        entered.append(hidden)
        raise _Reached

    with _stand_ins(model, path, act), contextlib.suppress(_Reached):
        loss_of(model, batch)
    return entered[0]


@torch.no_grad()
def leave(model: nn.Module, path: str, count: int, batch: Any, hidden: Tensor) -> Any:
    """The loss, when the blocks have walked to a hidden state."""
    with _stand_ins(model, path, lambda number, entered, call: hidden if number == count - 1 else entered):
        return loss_of(model, batch)


@contextlib.contextmanager
def in_place(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Parameters with other values inside the block: a tied head must see the embedding as it was perturbed for this pass."""
    present = {name: model.get_parameter(name).data for name in values}
    try:
        for name, value in values.items():
            model.get_parameter(name).data = value
        yield
    finally:
        for name, value in present.items():
            model.get_parameter(name).data = value


def micro_batches(batch: Any, count: int, device: torch.device) -> list[Any]:
    """A list's members, or so many equal parts of one batch, on the device; ValueError where its rows are no multiple."""
    if isinstance(batch, list | tuple):
        return [_on(device, each) for each in batch]
    if count == 1:
        return [_on(device, batch)]
    words = {"input_ids": batch, "labels": batch} if isinstance(batch, Tensor) else batch
    rows = {len(each) for each in words.values() if isinstance(each, Tensor)} if isinstance(words, Mapping) else set()
    if len(rows) != 1 or min(rows) % count:
        raise ValueError(
            f"micro_batches is {count} and the batch has {sorted(rows) or 'no'} rows; expected a multiple: give a list of batches"
        )
    split = {name: each.chunk(count) if isinstance(each, Tensor) else [each] * count for name, each in words.items()}
    return [_on(device, {name: parts[number] for name, parts in split.items()}) for number in range(count)]


def _on(device: torch.device, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return {name: _on(device, each) for name, each in batch.items()}
    return batch.to(device) if isinstance(batch, Tensor) else batch


def mean_loss(losses: list[Any]) -> Any:
    """The mean over micro-batches; a single loss as it is."""
    return losses[0] if len(losses) == 1 else torch.stack(losses).mean()
