"""The operands of a model's matrix products, as they come, each with its contraction last; and which format suits which layer."""

from __future__ import annotations

import contextlib
import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewer.fitting import evaluating
from fewer.lowbit._shared.blocks import largest_magnitude
from fewer.lowbit._shared.conversion import Select, linear_maps
from fewer.lowbit.int_vs_fp.quantisers import Quantiser, rotation_of
from fewer.lowbit.int_vs_fp.tensors import TensorReport, analyse_tensor
from fewer.lowbit.int_vs_fp.theory import ALL, PAIRS

OPERANDS = ("X", "W", "dY", "W^T", "X^T", "dY^T")  # of Y = X W^T by K; dX = dY W by N; dW = dY^T X by tokens
Batch = Tensor | Mapping[str, Any] | tuple[Tensor, Tensor]
Tell = Callable[[str, str, Tensor], None]


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """A batch's loss: a mapping's with labels by the model itself, a pair's (x, y) by cross-entropy."""
    if isinstance(batch, Mapping) and batch.get("labels") is not None:
        return model(**batch).loss
    if isinstance(batch, tuple) and len(batch) == 2:
        return F.cross_entropy(model(batch[0]), batch[1])
    raise ValueError(
        "a batch has no labels, which a backward pass needs; expected a mapping with 'labels' or a pair (x, y): "
        "give labels=input_ids, or backward=False"
    )


def run(model: nn.Module, batch: Batch) -> Any:
    """A forward pass."""
    if isinstance(batch, Mapping):
        return model(**{name: value for name, value in batch.items() if name != "labels"})
    return model(batch[0] if isinstance(batch, tuple) else batch)


def observe(model: nn.Module, batches: Iterable[Batch], tell: Tell, backward: bool = True, select: Select | None = None) -> None:
    """Call tell(layer, operand, tensor) for each operand of each selected linear layer while the model is passed, the contraction last.

    Nothing is kept: an operand may be looked at and is gone. Weights are told once. The model is in eval mode meanwhile, and its
    parameters' gradients stay as they were.

    Raises:
        ValueError: a batch without labels, where a backward pass is wanted; or no linear layer.
        TypeError: a layer is quantised already.
        FloatingPointError: an activation or a gradient has a NaN or an infinite value; the message names the layer.
    """
    layers = list(linear_maps(model, select))
    if not layers:
        raise ValueError("the model has no linear layer to look at; expected at least one: see model.named_modules()")
    for name, layer in layers:
        tell(name, "W", layer.weight.detach())
        if backward:
            tell(name, "W^T", layer.weight.detach().T)
    leaves: list[Tensor] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(_frozen(model))
        for name, layer in layers:
            hook = functools.partial(_seen, name, tell, leaves if backward else None)
            stack.callback(layer.register_forward_hook(hook).remove)
        for batch in batches:
            if not backward:
                with torch.no_grad():
                    run(model, batch)
                continue
            with torch.enable_grad():
                loss = loss_of(model, batch)
            torch.autograd.grad(loss, leaves, allow_unused=True)
            leaves.clear()


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No gradients of parameters inside the block: those of outputs alone are wanted, and cost less."""
    asked = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in asked:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, wanted in asked:
            parameter.requires_grad_(wanted)


def _seen(name: str, tell: Tell, leaves: list[Tensor] | None, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
    x = args[0].detach().reshape(-1, args[0].shape[-1])
    _check_finite(name, "input", x)
    tell(name, "X", x)
    if leaves is None:
        return None
    tell(name, "X^T", x.T)
    if not output.requires_grad:  # the first layer on the way: gradients begin here
        leaves.append(output.detach().requires_grad_())
        output = leaves[-1].clone()

    def gradient(dy: Tensor) -> None:
        flat = dy.detach().reshape(-1, dy.shape[-1])
        _check_finite(name, "output's gradient", flat)
        tell(name, "dY", flat)
        tell(name, "dY^T", flat.T)

    output.register_hook(gradient)
    return output


def _check_finite(name: str, what: str, x: Tensor) -> None:
    if not largest_magnitude(x).isfinite():
        raise FloatingPointError(f"{name}: its {what} has a NaN or an infinite value; expected finite numbers: look for where it overflows")


def capture(
    model: nn.Module, batches: Iterable[Batch], backward: bool = True, select: Select | None = None
) -> Iterator[tuple[str, str, Tensor]]:
    """(layer, operand, tensor) of each batch's products, the contraction last; a batch's operands are held until they are taken.

    Args:
        model: a transformers model or any other; its linear layers but a language model's head are looked at.
        batches: of each, a mapping for the model (with labels) or a pair (x, y).
        backward: the operands of the backward products too: dY, W^T, X^T, dY^T; without it X and W alone.
        select: (name, layer) -> whether to look at it.

    Raises:
        As `observe`.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> found = capture(model, [(torch.ones(3, 8), torch.zeros(3, dtype=torch.long))])
        >>> [(layer, operand, tuple(x.shape)) for layer, operand, x in found][-2:]
        [('0', 'dY', (3, 4)), ('0', 'dY^T', (4, 3))]
    """
    first = True
    for batch in batches:
        held: list[tuple[str, str, Tensor]] = []

        def keep(name: str, operand: str, x: Tensor, held: list[tuple[str, str, Tensor]] = held, first: bool = first) -> None:
            if first or operand not in ("W", "W^T"):
                held.append((name, operand, x))

        observe(model, [batch], keep, backward, select)
        first = False
        while held:
            yield held.pop(0)


@dataclass(frozen=True)
class ModelReport:
    """What the formats make of a model's operands.

    Attributes:
        rows: (layer, operand, report) of each tensor.
        rotated: whether they were turned first.
    """

    rows: Sequence[tuple[str, str, TensorReport]]
    rotated: bool = False

    @property
    def pairs(self) -> list[str]:
        return list(self.rows[0][2].winner)

    def win_rate(self, pair: str) -> float:
        """The share of tensors on which the integer format of a pair loses less."""
        return _share(report.winner[pair] == PAIRS[pair][0] for _, _, report in self.rows)

    def agreement(self, pair: str) -> float:
        """The share of tensors whose winner the crest factor alone predicts."""
        return _share(report.winner[pair] == report.predicted[pair] for _, _, report in self.rows)

    def mean_qsnr(self, fmt: str, operands: Sequence[str] = OPERANDS) -> float:
        """The mean over tensors, dB; tensors of zeros are left out."""
        return _mean(report.qsnr[fmt] for _, operand, report in self.rows if operand in operands)

    def mean_kappa(self, fmt: str, operands: Sequence[str] = OPERANDS) -> float:
        return _mean(report.kappa[fmt] for _, operand, report in self.rows if operand in operands)

    @property
    def layers(self) -> list[str]:
        return list(dict.fromkeys(layer for layer, _, _ in self.rows))

    def of_layer(self, layer: str) -> ModelReport:
        return ModelReport([row for row in self.rows if row[0] == layer], self.rotated)

    @property
    def recommended(self) -> dict[str, dict[str, str]]:
        """layer -> pair -> the format with the higher mean QSNR over the operands of its forward product."""
        found: dict[str, dict[str, str]] = defaultdict(dict)
        for layer in self.layers:
            own = self.of_layer(layer)
            for pair in self.pairs:
                integer, floating = (own.mean_qsnr(fmt, ("X", "W")) for fmt in PAIRS[pair])
                found[layer][pair] = PAIRS[pair][0] if integer > floating else PAIRS[pair][1]
        return dict(found)


def analyse_model(
    model: nn.Module,
    batches: Iterable[Batch],
    formats: Sequence[str] = ALL,
    rotate: int | str | None = None,
    backward: bool = True,
    select: Select | None = None,
) -> ModelReport:
    """Crest factor and loss of each operand of a model's linear layers, operand by operand: none is kept.

    Args:
        model, batches, backward, select: as `capture` takes them.
        formats: names of formats; both of a pair, where its winner is wanted.
        rotate: turn each operand first by a Hadamard matrix of this size along its contraction; "block": of the format's block size. An
            operand that it does not divide stays as it is.

    Examples:
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2))
        >>> report = analyse_model(model, [torch.randn(16, 64)], ("mxint8", "mxfp8_e4m3"), backward=False)
        >>> report.recommended["0"], report.win_rate("mx8")
        ({'mx8': 'mxint8'}, 1.0)
    """
    rows: list[tuple[str, str, TensorReport]] = []
    for fmt in formats:
        rotation_of(Quantiser.of(fmt), rotate)  # a strange rotation is told before the model runs

    def look(layer: str, operand: str, x: Tensor) -> None:
        fits = rotate if isinstance(rotate, int) else 32 if rotate else 1
        turn = rotate if x.shape[-1] % fits == 0 else None
        rows.append((layer, operand, analyse_tensor(x, -1, formats, turn)))

    observe(model, batches, look, backward, select)
    return ModelReport(rows, rotate is not None)


def _share(found: Iterable[bool]) -> float:
    counted = list(found)
    return sum(counted) / len(counted)


def _mean(values: Iterable[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
