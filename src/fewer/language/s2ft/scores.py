"""Scores of heads and channels by weight, activation, their product, or gradient.

The paper names these strategies; what exactly is measured is our reading of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fewer.language.s2ft.config import Kind
from fewer.language.s2ft.structure import Side, Structure, Target, is_transposed, matrix

Scores = dict[Kind, list[Tensor]]  # kind -> per layer, a score of each unit


def score_units(model: nn.Module, structure: Structure, kinds: list[Kind], by: str, calibration: Any) -> Scores:
    """The scores of all units of some kinds, float64 on the CPU."""
    if by == "weight":
        return weight_scores(model, structure, kinds)
    if by == "activation":
        return activation_scores(model, structure, kinds, calibration)
    if by == "gradient":
        return gradient_scores(model, structure, kinds, calibration)
    weight, activation = weight_scores(model, structure, kinds), activation_scores(model, structure, kinds, calibration)
    return {kind: [w * a for w, a in zip(weight[kind], activation[kind], strict=True)] for kind in kinds}


def unit_norms(values: Tensor, target: Target, units: int) -> Tensor:
    """L2 norm of each unit's rows or columns of values [out, in]."""
    squares = values.double().square().sum(1 if target.side == "rows" else 0)
    return squares[target.offset : target.offset + units * target.size].reshape(units, target.size).sum(1).sqrt().cpu()


@torch.no_grad()
def weight_scores(model: nn.Module, structure: Structure, kinds: list[Kind]) -> Scores:
    """W: the L2 norm of a unit's trained submatrix."""
    return {
        kind: [unit_norms(matrix(model.get_submodule(target.path)), target, units) for target, units in _targets(structure, kind)]
        for kind in kinds
    }


def activation_source(structure: Structure, kind: Kind, layer: int) -> tuple[Target, Side]:
    """Where a unit's activation is seen: what a channel hands to down, a query head to o, and what v puts out for a key/value head."""
    if kind in "ud":
        return structure.target("d", layer), "columns"
    target = structure.target(kind, layer)
    return target, target.side


@torch.no_grad()
def activation_scores(model: nn.Module, structure: Structure, kinds: list[Kind], calibration: Iterable[Any]) -> Scores:
    """A: the mean |activation| of a unit over the calibration's tokens (padding left out)."""
    sums: dict[tuple[Kind, int], Tensor] = {}
    tokens, mask = 0, torch.empty(0)

    def watch(kind: Kind, layer: int) -> Any:
        target, side = activation_source(structure, kind, layer)

        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            seen = (args[0] if side == "columns" else output).detach()
            seen = seen.reshape(-1, seen.shape[-1])[mask.to(seen.device)].double().abs().sum(0)
            units = structure.units(kind)[layer]
            of_units = seen[target.offset : target.offset + units * target.size].reshape(units, target.size).mean(1).cpu()
            sums[kind, layer] = sums.get((kind, layer), torch.zeros(units, dtype=torch.float64)) + of_units

        return model.get_submodule(target.path).register_forward_hook(hook)

    handles = [watch(kind, layer) for kind in kinds for layer in structure.layers]
    try:
        with _evaluating(model):
            for batch in batches_of(calibration, model):
                mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool().flatten()
                tokens += int(mask.sum())
                model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return {kind: [sums[kind, layer] / tokens for layer in structure.layers] for kind in kinds}


def gradient_scores(model: nn.Module, structure: Structure, kinds: list[Kind], calibration: Iterable[Any]) -> Scores:
    """G: the L2 norm of the gradient of a unit's submatrix, the loss being the mean over the calibration's batches."""
    targets: dict[Kind, list[tuple[Target, int]]] = {kind: list(_targets(structure, kind)) for kind in kinds}
    linears = {target.path: model.get_submodule(target.path) for each in targets.values() for target, _ in each}
    weights: list[Any] = [linear.weight for linear in linears.values()]
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    total, batches = [torch.zeros_like(weight) for weight in weights], 0
    try:
        model.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        with _evaluating(model), torch.enable_grad():
            for batch in batches_of(calibration, model):
                loss = model(**{"labels": labels_of(batch), **batch}).loss
                total = [sum_ + part for sum_, part in zip(total, torch.autograd.grad(loss, weights), strict=True)]
                batches += 1
    finally:
        for parameter, wants in wanted.items():
            parameter.requires_grad_(wants)
    gradients = {
        path: (gradient.T if is_transposed(linear) else gradient) / batches
        for (path, linear), gradient in zip(linears.items(), total, strict=True)
    }
    return {kind: [unit_norms(gradients[target.path], target, units) for target, units in each] for kind, each in targets.items()}


def labels_of(batch: Mapping[str, Tensor]) -> Tensor:
    """Every token is to be predicted, padding excepted."""
    mask = batch.get("attention_mask")
    return batch["input_ids"] if mask is None else batch["input_ids"].masked_fill(mask == 0, -100)


def batches_of(calibration: Iterable[Any], model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The batches as keywords of the model, on its device; ValueError where there is none."""
    device, number = next(model.parameters()).device, 0
    for batch in calibration:
        number += 1
        named: Mapping[str, Tensor] = {"input_ids": batch} if isinstance(batch, Tensor) else batch
        yield {name: value.to(device) for name, value in named.items()}
    if not number:
        raise ValueError("the calibration has no batches; expected some, such as [token_ids]")


def _targets(structure: Structure, kind: Kind) -> Iterator[tuple[Target, int]]:
    return ((structure.target(kind, layer), units) for layer, units in zip(structure.layers, structure.units(kind), strict=True))


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
