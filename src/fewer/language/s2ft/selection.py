"""Which heads and channels are trained: drawn at random over all layers together (S2FT-R), or ranked by a score."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewer.language._shared.structure import KINDS, Kind, Side, Structure, Target, is_transposed, matrix, structure_of
from fewer.language.s2ft.config import CALIBRATED, S2FTConfig

Calibration = Iterable[Any]  # token ids [B, T], or what a model's forward takes as keywords


@dataclass(frozen=True)
class Selection:
    """The trained units: kind (v, o, u, d) -> layer -> unit numbers, ascending. Layers without any are left out.

    Examples:
        >>> selection = Selection({"d": {0: (3, 7), 2: (1,)}, "o": {0: (0,)}})
        >>> selection.count("d"), selection.only("o").units
        (3, {'o': {0: (0,)}})
    """

    units: Mapping[Kind, Mapping[int, tuple[int, ...]]]

    def count(self, kind: Kind) -> int:
        return sum(len(units) for units in self.units.get(kind, {}).values())

    def of(self, kind: Kind, layer: int) -> tuple[int, ...]:
        return tuple(self.units.get(kind, {}).get(layer, ()))

    def only(self, *kinds: Kind) -> Selection:
        return Selection({kind: layers for kind, layers in self.units.items() if kind in kinds})


def unit_count(ratio: float, units: int) -> int:
    """int(ratio x units), but at least 1 where the ratio is not 0: small models round to nothing.

    >>> unit_count(0.03, 1536 * 30), unit_count(0.03, 8), unit_count(0.0, 8)
    (1382, 1, 0)
    """
    return max(1, int(ratio * units)) if ratio else 0


def select_units(model: nn.Module, config: S2FTConfig, calibration: Calibration | None = None) -> Selection:
    """Choose the units that are trained, before training.

    Args:
        model: a causal language model of transformers.
        config: the shares, and how to choose. Of each kind int(ratio x units x layers) units are taken over all layers together, or
            int(ratio x units) in every layer with `per_layer`.
        calibration: batches for the ways that need them: token ids [B, T], or mappings with `input_ids` (and `attention_mask`).

    Raises:
        ValueError: a way that needs calibration without it, or a model of no known family.
    """
    if config.selection in CALIBRATED and calibration is None:
        raise ValueError(
            f"selection {config.selection!r} without calibration; expected batches of token ids: get_s2ft_model(model, config, calibration=[ids])"
        )
    structure = structure_of(model, config.target_families)
    kinds: list[Kind] = [kind for kind in KINDS if config.ratios[kind]]
    generators = {kind: torch.Generator().manual_seed(4 * config.seed + number) for number, kind in enumerate(KINDS)}
    scores = (
        {kind: _draw(structure.units(kind), generators[kind]) for kind in kinds}
        if config.selection == "random"
        else score_units(model, structure, kinds, config.selection, calibration)
    )
    chosen: dict[Kind, dict[int, tuple[int, ...]]] = {}
    for kind in kinds:
        sign = -1 if config.order == "largest" and config.selection != "random" else 1
        take = _take_per_layer if config.per_layer else _take_globally
        chosen[kind] = take([sign * each for each in scores[kind]], config.ratios[kind])
    return Selection(chosen)


def _draw(units: list[int], generator: torch.Generator) -> list[Tensor]:
    """A random rank for every unit of every layer; the lowest are taken."""
    return list(torch.randperm(sum(units), generator=generator).double().split(units))


def _take_globally(scores: list[Tensor], ratio: float) -> dict[int, tuple[int, ...]]:
    lengths = [len(each) for each in scores]
    taken = torch.zeros(sum(lengths), dtype=torch.bool)
    taken[torch.cat(scores).argsort(stable=True)[: unit_count(ratio, sum(lengths))]] = True
    return _numbers(taken.split(lengths))


def _take_per_layer(scores: list[Tensor], ratio: float) -> dict[int, tuple[int, ...]]:
    taken = [torch.zeros(len(each), dtype=torch.bool) for each in scores]
    for mask, each in zip(taken, scores, strict=True):
        mask[each.argsort(stable=True)[: unit_count(ratio, len(each))]] = True
    return _numbers(taken)


def _numbers(taken: Iterable[Tensor]) -> dict[int, tuple[int, ...]]:
    return {layer: tuple(mask.nonzero()[:, 0].tolist()) for layer, mask in enumerate(taken) if mask.any()}


# Scores: the paper names these ways; what exactly is measured is our reading of them

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
