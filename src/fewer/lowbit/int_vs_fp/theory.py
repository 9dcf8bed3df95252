"""Which of two formats of equal bits is better for Gaussian blocks of a given crest factor, by formula; and what their units cost in gates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from fewer.checks import check_choice, check_positive, is_number
from fewer.lowbit._shared.block_formats import FORMATS, BlockFormat, block_format

Theory = Literal["released", "paper"]

PAIRS: Mapping[str, tuple[str, str]] = {
    "mx8": ("mxint8", "mxfp8_e4m3"),
    "mx6": ("mxint6", "mxfp6_e2m3"),
    "mx4": ("mxint4", "mxfp4"),
    "nv4": ("nvint4", "nvfp4"),
}
ALL = tuple(name for pair in PAIRS.values() for name in pair)
MOST = 30.0  # the largest crest factor at which a crossover is looked for: far above the root of any block


def compared(fmt: str | BlockFormat) -> BlockFormat:
    """The format as the paper compares it: by name with e8m0 scales rounded up (they never saturate); one of your own as it is.

    >>> compared("mxint8").scale_rule
    'rceil'
    """
    return fmt if isinstance(fmt, BlockFormat) else replace(block_format(fmt), scale_rule="rceil")


def qsnr_theory(
    fmt: str | BlockFormat, kappa: float, theory: Theory = "released", rho: float | None = None, exact_codes: bool = False
) -> float:
    """QSNR of a cast of N(0, sigma^2) in dB, from the crest factor of its blocks.

    Args:
        fmt: a name of `FORMATS`, or a block format.
        kappa: max |x| / rms of a block; at least 1.
        theory: "paper": values below half of the smallest subnormal are taken as rounded evenly; "released": they become 0, as the
            authors' script has it.
        rho: how much larger the block's scale is than the exact one; by default 1.5 for e8m0, else 1 ("released": 1.05, the script's).
        exact_codes: count an integer's codes exactly (7 on a side of int4, not 8).

    Raises:
        ValueError: kappa is below 1, or an unknown format.

    Source: arXiv 2510.25602, section 4, theorems 1 and 2.

    Examples:
        >>> round(qsnr_theory("mxint8", 3.0), 2), round(qsnr_theory("mxfp8_e4m3", 3.0), 2)
        (39.88, 31.86)
    """
    fmt = compared(fmt)
    check_choice(("released", "paper"), theory=theory)
    if not is_number(kappa) or kappa < 1:
        raise ValueError(f"kappa is {kappa!r}; expected a number of at least 1: a block's maximum is no smaller than its rms")
    if rho is None:
        rho = 1.5 if fmt.scale == "e8m0" else 1.05 if theory == "released" else 1.0
    check_positive(rho=rho)
    spread = rho * kappa
    block = fmt.block if fmt.block and fmt.block > 0 else math.inf
    exact = 0.0 if fmt.scale == "e8m0" else 1 / block  # the share of values that a floating scale makes exact: the block's maximum
    if fmt.elements.is_integer:
        return _integer(fmt, spread, exact, exact_codes)
    return _floating(fmt, spread, exact * kappa**2, theory)


def _integer(fmt: BlockFormat, spread: float, exact: float, exact_codes: bool) -> float:
    """Even noise of 1/12 of a step's square, a step being rho kappa sigma / (largest code), on all but the exact values."""
    if exact_codes:
        codes = 10 * math.log10(12 * fmt.elements.max**2)
    elif fmt.scale == "e8m0":
        codes = 4.78 + 6.02 * fmt.elements.bits  # 10 log10(12 4^(b-1)) as it is printed, and as the crossovers were found
    else:
        codes = 10 * math.log10(12 * 4 ** (fmt.elements.bits - 1))
    return codes - 20 * math.log10(spread) - 10 * math.log10(1 - exact)


def _floating(fmt: BlockFormat, spread: float, exact_energy: float, theory: Theory) -> float:
    """Noise of normals, of a share of their own energy, and of subnormals, even; and what becomes 0."""
    element = fmt.elements
    mantissa, bias, top = element.mantissa_bits, element.bias, element.max
    alpha = 1 / (24 * 2 ** (2 * mantissa))
    beta = 2 ** (2 * (1 - bias - mantissa)) / (12 * top**2)
    normal = spread * 2.0 ** (1 - bias) / top  # the smallest normal, in units of sigma
    noise = alpha * max(0.0, _energy_above(normal) - exact_energy)
    if theory == "paper":
        return -10 * math.log10(noise + beta * spread**2 * _share_below(normal))
    least = spread * 2.0 ** (-bias - mantissa) / top  # half of the smallest subnormal
    share = _share_below(normal) - _share_below(least)
    return -10 * math.log10(noise + beta * spread**2 * share + 1 - _energy_above(least))


def _share_below(t: float) -> float:
    """2 Phi(t) - 1: the share of |x| < t sigma."""
    return math.erf(t / math.sqrt(2))


def _energy_above(t: float) -> float:
    """2 (t phi(t) + 1 - Phi(t)): the share of x^2 in |x| > t sigma."""
    return 2 * t * math.exp(-t * t / 2) / math.sqrt(2 * math.pi) + math.erfc(t / math.sqrt(2))


def crossover(pair: str, theory: Theory = "released", rho: float | None = None) -> float:
    """The crest factor below which the integer format of a pair is the better one.

    Args:
        pair: "mx8", "mx6", "mx4" or "nv4".
        theory, rho: as `qsnr_theory` takes them, the same for both formats.

    Raises:
        ValueError: an unknown pair.

    Source: arXiv 2510.25602, figure 2.

    Examples:
        >>> [round(crossover(pair), 2) for pair in PAIRS]
        [7.55, 1.96, 2.04, 2.39]
    """
    check_choice(list(PAIRS), pair=pair)
    integer, floating = PAIRS[pair]
    low, high = 1.0, MOST
    for _ in range(60):
        middle = (low + high) / 2
        wins = qsnr_theory(integer, middle, theory, rho) > qsnr_theory(floating, middle, theory, rho)
        low, high = (middle, high) if wins else (low, middle)
    return (low + high) / 2


def hardware_cost(fmt: str | BlockFormat) -> dict[str, float]:
    """Gates of a multiply-accumulate unit of a format, counted by part, and their unweighted sum.

    It has as many lanes as the block has values. This is not the paper's table of areas and energies: its weights come from a foundry's
    library that is not public.

    Source: arXiv 2510.25602, appendix C.

    Examples:
        >>> hardware_cost("mxint8")["sum"] < hardware_cost("mxfp8_e4m3")["sum"]
        True
    """
    fmt = compared(fmt)
    element = fmt.elements
    if not fmt.block or fmt.block < 1:
        raise ValueError(f"the format's block is {fmt.block}; expected a number of lanes: take a block format such as mxint8")
    lanes = fmt.block
    if element.is_integer:
        parts = {"multiplier": lanes * element.bits**2, "adder": 2 * lanes * element.bits}
    else:
        x, y = element.exponent_bits, element.mantissa_bits
        width = min(2 ** (x + 1) + 2 * y, 24)
        shifts = width * math.log2(width)
        parts = {"multiplier": lanes * (y + 1) ** 2, "adder": lanes * width}
        parts |= dict.fromkeys(("exponent adder", "exponent subtractor", "exponent comparator"), lanes * x)
        parts |= {"aligner": lanes * shifts, "normaliser": shifts}
    return {name: float(gates) for name, gates in parts.items()} | {"sum": float(sum(parts.values()))}


def pair_of(fmt: str) -> str:
    """The pair that a format belongs to; ValueError where it is in none.

    >>> pair_of("nvfp4")
    'nv4'
    """
    check_choice(ALL, fmt=fmt)
    return next(pair for pair, names in PAIRS.items() if fmt in names)


assert set(ALL) <= set(FORMATS)
