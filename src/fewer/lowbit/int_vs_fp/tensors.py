"""One tensor in all formats: what each loses, which of a pair is better, and what the crest factor alone says of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewer.lowbit._shared.block_formats import BlockFormat
from fewer.lowbit._shared.blocks import checked_dim, largest_magnitude
from fewer.lowbit._shared.figures import crest_factor, qsnr
from fewer.lowbit._shared.formats import check_floating
from fewer.lowbit._shared.rotation import hadamard
from fewer.lowbit.int_vs_fp.quantisers import Quantiser, rotation_of
from fewer.lowbit.int_vs_fp.theory import ALL, MOST, PAIRS, compared, crossover, qsnr_theory

CROSSOVERS = {pair: crossover(pair) for pair in PAIRS}


@dataclass(frozen=True)
class TensorReport:
    """What the formats make of a tensor.

    Attributes:
        kappa: format -> the mean crest factor of its blocks (those of zeros left out; NaN where all are).
        qsnr: format -> signal over the noise of its cast, dB.
        theory: format -> the same by formula, from kappa alone; NaN where kappa is.
        predicted: pair -> the format that kappa says is better.
        winner: pair -> the format that is.
    """

    kappa: Mapping[str, float]
    qsnr: Mapping[str, float]
    theory: Mapping[str, float]
    predicted: Mapping[str, str]
    winner: Mapping[str, str]


def mean_crest(x: Tensor, block: int | None, dim: int = -1) -> float:
    """The crest factor averaged over blocks; those of zeros are left out, and NaN is what nothing is left of.

    >>> mean_crest(torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]), 4)
    2.0
    """
    crests = crest_factor(x, block, dim)
    return float(crests[crests > 0].mean())


@torch.no_grad()
def analyse_tensor(
    x: Tensor, dim: int = -1, formats: Sequence[str | BlockFormat | Quantiser] = ALL, rotate: int | str | None = None
) -> TensorReport:
    """Crest factor and loss of a tensor in each format.

    Args:
        x: any shape; its blocks lie along `dim`, the contraction of the product that it goes into.
        dim: the dimension.
        formats: names (scales as the paper has them), block formats or quantisers; the latter two are named by what they are.
        rotate: turn it first by a Hadamard matrix of this size; "block": of each format's block size.

    Raises:
        ValueError: an unknown format, or a rotation that does not divide the dimension.
        FloatingPointError: a NaN or an infinite value.

    Source: arXiv 2510.25602, section 4.3.

    Examples:
        >>> report = analyse_tensor(torch.randn(64, 512, generator=torch.Generator().manual_seed(0)))
        >>> report.winner["mx8"], report.winner["mx4"], report.predicted["mx8"], report.predicted["mx4"]
        ('mxint8', 'mxfp4', 'mxint8', 'mxfp4')
    """
    check_floating(x)
    dim = checked_dim(x, dim)
    if not largest_magnitude(x).isfinite():
        raise FloatingPointError("the tensor has a NaN or an infinite value; expected finite numbers: look for where it comes from")
    kappa, noise, theory = {}, {}, {}
    turned: dict[int, Tensor] = {0: x}
    crests: dict[tuple[int, int | None], float] = {}
    for each in formats:
        quantiser = Quantiser.of(each)
        name = each if isinstance(each, str) else quantiser.name
        size, block = rotation_of(quantiser, rotate), quantiser.fmt.block
        if size not in turned:
            turned[size] = hadamard(x, size, dim)
        if (size, block) not in crests:
            crests[size, block] = mean_crest(turned[size], block, dim)
        kappa[name] = crests[size, block]
        noise[name] = qsnr(turned[size], quantiser(turned[size], dim))
        known = 1 <= kappa[name] <= MOST
        theory[name] = qsnr_theory(quantiser.fmt, kappa[name]) if known else float("nan")
    there = {pair: names for pair, names in PAIRS.items() if set(names) <= set(kappa)}
    winner = {pair: names[0] if noise[names[0]] > noise[names[1]] else names[1] for pair, names in there.items()}
    predicted = {pair: names[0] if kappa[names[0]] < CROSSOVERS[pair] else names[1] for pair, names in there.items()}
    return TensorReport(kappa, noise, theory, predicted, winner)


def bits_of(fmt: str) -> float:
    """Bits a value of a format, its share of the scales counted.

    >>> bits_of("mxint8"), bits_of("nvfp4")
    (8.25, 4.5)
    """
    return compared(fmt).bits_per_value
