"""Which heads and channels are trained: drawn at random over all layers together (S2FT-R), or ranked by a score."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewer.language.s2ft.config import CALIBRATED, KINDS, Kind, S2FTConfig
from fewer.language.s2ft.scores import score_units
from fewer.language.s2ft.structure import structure_of

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
