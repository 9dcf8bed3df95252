"""Element formats of 2 to 8 bits: their tables, and casts to them.

A float format with m mantissa bits and bias B has the value M 2^(1-B-m) at exponent field 0 and (1 + M 2^-m) 2^(E-B) elsewhere: between
two powers of two its values are evenly spaced, so a cast is a division by that spacing, a rounding to whole numbers, and a product.
All spacings are powers of two: nothing but the rounding loses a bit. An integer format is one without an exponent field.

Sources: OCP MX specification v1.0 (2023); OFP8 specification.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from fewer.checks import check_choice, check_whole

Rounding = Literal["nearest", "nearest-away", "toward-zero", "up", "down", "stochastic"]
Overflow = Literal["saturate", "special"]
ROUNDINGS = ("nearest", "nearest-away", "toward-zero", "up", "down", "stochastic")
PIECE = 1 << 16  # values that are worked on at a time, on a CPU: with their temporaries they stay in the second-level cache
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BITS = {torch.float32: (torch.int32, 0x7F80_0000, 127, 23), torch.float64: (torch.int64, 0x7FF0 << 48, 1023, 52)}


@dataclass(frozen=True, eq=False)
class ElementFormat:
    """A number format of at most 8 bits.

    Attributes:
        name: as in `ELEMENTS`.
        bits: bits of a code.
        exponent_bits: bits of the exponent field; 0 for integers.
        mantissa_bits: bits of the mantissa field (integers: all but the sign).
        bias: of the exponent.
        max: the largest finite value.
        min_normal, min_subnormal: the smallest positive values with and without the hidden one (of integers, both are 1).
        values: [2^bits] float32, the value of every code; NaN and inf where the format has them.
        lowest: the smallest finite value that a cast gives.
        infinity, nan: the codes of +inf and NaN, where the format has them.
    """

    name: str
    bits: int
    exponent_bits: int
    mantissa_bits: int
    bias: int
    max: float
    min_normal: float
    min_subnormal: float
    values: Tensor = field(repr=False)
    lowest: float
    infinity: int | None = None
    nan: int | None = None

    @property
    def is_integer(self) -> bool:
        return self.exponent_bits == 0

    @property
    def is_power_of_two(self) -> bool:
        """Whether all values are powers of two, as e8m0's: no sign, no zero, no mantissa."""
        return self.mantissa_bits == 0

    @property
    def signed(self) -> bool:
        return self.lowest < 0

    @property
    def max_exponent(self) -> int:
        """floor(log2 max)."""
        return math.frexp(self.max)[1] - 1

    @property
    def ulp_bits(self) -> int:
        """Mantissa bits that a value in the highest binade has."""
        return self.bits - 2 if self.is_integer else self.mantissa_bits


def integer(bits: int, symmetric: bool = True) -> ElementFormat:
    """Two's complement integers of 2 to 8 bits; `symmetric=False` lets casts give -2^(bits-1) too.

    >>> integer(4).lowest, integer(4, symmetric=False).lowest
    (-7.0, -8.0)
    """
    check_whole(least=2, bits=bits)
    check_choice(range(2, 9), bits=bits)
    whole, half = 1 << bits, 1 << (bits - 1)
    values = torch.tensor([code - whole if code >= half else code for code in range(whole)], dtype=torch.float32)
    name = f"int{bits}" if symmetric else f"int{bits}_asymmetric"
    lowest = 1.0 - half if symmetric else float(-half)
    return ElementFormat(name, bits, 0, bits - 1, 2 - bits, half - 1.0, 1.0, 1.0, values, lowest)


def _floating(
    name: str, exponent: int, mantissa: int, bias: int, top: int, infinity: int | None = None, signed: bool = True
) -> ElementFormat:
    """A float format whose largest finite magnitude has the code `top`; magnitudes above are NaN, but for infinity's code."""
    magnitudes = 1 << (exponent + mantissa)
    table = []
    for code in range(magnitudes):
        field_e, field_m = code >> mantissa, code & ((1 << mantissa) - 1)
        value = (
            math.ldexp(field_m, 1 - bias - mantissa) if field_e == 0 else math.ldexp((1 << mantissa) + field_m, field_e - bias - mantissa)
        )
        table.append(value if code <= top else math.inf if code == infinity else math.nan)
    bits = exponent + mantissa + 1 if signed else 8  # a scale takes a byte
    table += [-value for value in table] if signed else [math.nan] * (2**bits - magnitudes)
    values = torch.tensor(table, dtype=torch.float32)
    nan = None if top == magnitudes - 1 else magnitudes - 1
    lowest = -table[top] if signed else 0.0
    return ElementFormat(name, bits, exponent, mantissa, bias, table[top], table[1 << mantissa], table[1], values, lowest, infinity, nan)


def _powers_of_two() -> ElementFormat:
    values = torch.tensor([math.ldexp(1.0, code - 127) for code in range(255)] + [math.nan], dtype=torch.float32)
    return ElementFormat("e8m0", 8, 8, 0, 127, 2.0**127, 2.0**-127, 2.0**-127, values, 2.0**-127, None, 0xFF)


ELEMENTS: dict[str, ElementFormat] = {
    each.name: each
    for each in (
        _floating("e2m1", 2, 1, 1, top=0x7),
        _floating("e2m3", 2, 3, 1, top=0x1F),
        _floating("e3m2", 3, 2, 3, top=0x1F),
        _floating("e4m3", 4, 3, 7, top=0x7E),
        _floating("e5m2", 5, 2, 15, top=0x7B, infinity=0x7C),
        _floating("ue5m3", 5, 3, 15, top=0xF7, infinity=0xF8, signed=False),  # inf and NaN above: ours
        _floating("ue5m3fn", 5, 3, 15, top=0xFE, signed=False),
        _floating("ue4m3", 4, 3, 7, top=0x7E, signed=False),
        _powers_of_two(),
        *(integer(bits) for bits in range(2, 9)),
        *(integer(bits, symmetric=False) for bits in range(2, 9)),
    )
}


def element_format(element: str | ElementFormat) -> ElementFormat:
    """The format of that name; ValueError naming the choices."""
    if isinstance(element, ElementFormat):
        return element
    check_choice(list(ELEMENTS), element=element)
    return ELEMENTS[element]


@dataclass(frozen=True)
class Rule:
    """How values between two codes are rounded: checked once, where it enters."""

    rounding: Rounding = "nearest"
    generator: torch.Generator | None = None
    random_bits: int | None = None

    def checked(self, x: Tensor) -> Rule:
        """The rule itself; ValueError or TypeError where it cannot round x."""
        check_choice(ROUNDINGS, rounding=self.rounding)
        if self.random_bits is not None:
            check_choice(range(1, 9), random_bits=self.random_bits)
        if self.rounding == "stochastic":
            if self.generator is None:
                raise ValueError(
                    "rounding is 'stochastic' and generator None; expected an explicit generator: pass generator=torch.Generator().manual_seed(0)"
                )
            if self.generator.device.type != x.device.type:
                raise TypeError(
                    f"generator is on {self.generator.device} and x on {x.device}; expected the same device: "
                    f"make it with torch.Generator({str(x.device)!r})"
                )
        return self

    def whole(self, t: Tensor) -> Tensor:
        """t, in units of the spacing, rounded to whole numbers; in place."""
        match self.rounding:
            case "nearest":
                return t.round_()
            case "toward-zero":
                return t.trunc_()
            case "up":
                return t.ceil_()
            case "down":
                return t.floor_()
        magnitude = t.abs()
        low = magnitude.floor()
        rest = magnitude.sub_(low)  # exact; floor(t + r) is not, since t + r may round up to the next whole number
        up = rest.ge_(0.5) if self.rounding == "nearest-away" else self._drawn(rest)
        return low.add_(up).copysign_(t)

    def _drawn(self, rest: Tensor) -> Tensor:
        """1 with the probability `rest`, else 0; in place. What is drawn is words of 64 bits, as many bits of each as are needed."""
        n = self.random_bits
        if n is None:  # r uniform in [0, 1), on the grid of the dtype's numbers below 1
            word, bits = (torch.int64, 53) if rest.dtype == torch.float64 else (torch.int32, 24)
            drawn = self._words(rest, word).bitwise_right_shift_(word.itemsize * 8 - bits)  # signed: from -1/2 to 1/2
            return rest.gt_(drawn.to(rest.dtype).mul_(2.0**-bits).add_(0.5))
        # up where rest + (2 r + 1) / 2^(n + 1) >= 1, r uniform in 0 .. 2^n - 1
        r = self._words(rest, torch.uint8).bitwise_right_shift_(8 - n)
        return rest.ge_(r.to(rest.dtype).add_(0.5).mul_(-(2.0**-n)).add_(1.0))

    def _words(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Random bits, as many numbers as `like` has."""
        drawn = torch.empty(-(-like.numel() * dtype.itemsize // 8), dtype=torch.int64, device=like.device)
        return drawn.random_(-(2**63), None, generator=self.generator).view(dtype)[: like.numel()].view(like.shape)


def spacing_of(v: Tensor, element: ElementFormat) -> Tensor:
    """The distance of neighbouring codes at v (float32 or float64): 2^(max(floor(log2 |v|), emin) - m); inf at inf and NaN."""
    whole, mask, bias, shift = BITS[v.dtype]
    least = (1 - element.bias + bias) << shift
    return v.view(whole).bitwise_and(mask).clamp_(min=least).view(v.dtype).mul_(2.0**-element.mantissa_bits)


def round_(v: Tensor, element: ElementFormat, rule: Rule) -> Tensor:
    """v (float32 or float64, contiguous) rounded to the format's grid, its range ignored; in place. inf becomes NaN."""
    if element.is_power_of_two:
        return _round_power_(v, rule)
    if element.is_integer:
        return rule.whole(v).add_(0.0)  # there is no -0
    spacing = spacing_of(v, element)
    return rule.whole(v.div_(spacing)).mul_(spacing)


def _round_power_(v: Tensor, rule: Rule) -> Tensor:
    """To powers of two, ties up (as 1.5 goes to the even 2); in place. What is not positive ends at the lowest."""
    mantissa, exponent = torch.frexp(v)
    power = torch.ldexp(rule.whole(2 * mantissa), exponent.nan_to_num_(0.0).clamp_(-127, 129) - 1)
    return v.copy_(torch.where(v.isfinite(), torch.where(v > 0, power, 2.0**-127), math.nan))


def saturated_(q: Tensor, element: ElementFormat) -> Tensor:
    """What lies outside the format's range brought to its ends; in place. NaN stays."""
    return q.clamp_(element.lowest, element.max)


def compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_floating(x: Tensor, name: str = "x") -> None:
    """ValueError unless it is a tensor of a float type that casts take."""
    if not isinstance(x, Tensor) or x.dtype not in FLOATS:
        what = f"{x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} is {what}; expected a tensor of float32, bfloat16, float16 or float64: convert it with {name}.float()")


def piece_size(x: Tensor) -> int:
    """How many values to work on at a time: what fits in a CPU's cache, or all on another device."""
    return PIECE if x.device.type == "cpu" else max(1, x.numel())


def cast(
    x: Tensor,
    element: str | ElementFormat,
    rounding: Rounding = "nearest",
    overflow: Overflow = "saturate",
    generator: torch.Generator | None = None,
    random_bits: int | None = None,
) -> Tensor:
    """x rounded to the values of an element format.

    Args:
        x: any shape; float32, bfloat16, float16 (computed in float32) or float64.
        element: a name of `ELEMENTS`, or a format.
        rounding: "nearest" (ties to the even code), "nearest-away" (ties away from 0), "toward-zero", "up", "down", or "stochastic": up in
            magnitude with the probability of the share of the way.
        overflow: "saturate": what rounds beyond the range becomes its end (below an unsigned format's range: 0); "special": it becomes inf
            where the format has it, else NaN.
        generator: what stochastic rounding draws from; on x's device.
        random_bits: bits of each draw (8: fp4-training's fast mode); by default a float's.

    Returns:
        A new tensor of x's shape and dtype. NaN stays NaN; inf stays inf where the format has it, else becomes NaN.

    Raises:
        ValueError: an unknown format or rounding, an integer or complex x, stochastic rounding without a generator, or "special" with a
            format that has neither inf nor NaN.
        TypeError: a generator on another device.

    Source: OCP MX specification v1.0, section 5.3; OFP8 specification.

    Examples:
        >>> cast(torch.tensor([0.2, 2.5, 5.1, -100.0]), "e2m1")
        tensor([ 0.,  2.,  6., -6.])
        >>> cast(torch.tensor([464.0, 465.0]), "e4m3", overflow="special")
        tensor([448.,  nan])
    """
    check_floating(x)
    element, rule = element_format(element), Rule(rounding, generator, random_bits).checked(x)
    check_choice(("saturate", "special"), overflow=overflow)
    if overflow == "special" and element.infinity is None and element.nan is None:
        raise ValueError(f"overflow is 'special' and {element.name} has neither inf nor NaN; expected 'saturate': leave it out")
    x = x.detach().contiguous()
    out = torch.empty_like(x)
    for given, made in zip(_pieces(x), _pieces(out), strict=True):
        made.copy_(_cast_piece(given.to(compute_dtype(x)), element, rule, overflow))
    return out


def _pieces(x: Tensor) -> Iterator[Tensor]:
    return iter(x.view(-1).split(piece_size(x)))


def _cast_piece(v: Tensor, element: ElementFormat, rule: Rule, overflow: Overflow) -> Tensor:
    q = round_(v.clone(), element, rule)
    if overflow == "special":
        # beyond the range nothing is random
        q = torch.where((v > element.max) | (v < element.lowest), round_(v.clone(), element, replace(rule, rounding="nearest")), q)
        beyond = torch.full_like(q, math.nan if element.infinity is None else math.inf)
        below = -beyond if element.signed else torch.full_like(q, math.nan)
        q = torch.where(q > element.max, beyond, torch.where(q < element.lowest, below, q))
    else:
        q = saturated_(q, element)
    return q if element.infinity is None else torch.where(v == math.inf if not element.signed else v.isinf(), v, q)


def codes_of(q: Tensor, element: ElementFormat) -> Tensor:
    """The code (uint8) of each value of q, which lies on the format's grid; NaN and inf get their codes where it has them."""
    if element.is_integer:
        return q.to(torch.int16).bitwise_and_((1 << element.bits) - 1).to(torch.uint8)
    magnitude = q.abs()
    if element.is_power_of_two:
        codes = torch.frexp(magnitude)[1].add_(126)
    else:
        spacing = spacing_of(magnitude, element)
        least = 1 - element.bias - element.mantissa_bits
        binade = torch.frexp(spacing)[1].sub_(1 + least)
        codes = magnitude.div_(spacing).to(torch.int32).add_(binade << element.mantissa_bits)  # E 2^m + M, the hidden one being 2^m
    if element.signed:
        codes |= torch.signbit(q).to(torch.int32) << (element.bits - 1)
    if element.nan is not None:
        codes = torch.where(q.isnan(), element.nan, codes)
    if element.infinity is not None:
        codes = torch.where(
            q.isinf(), element.infinity | (q.signbit().to(torch.int32) << (element.bits - 1) if element.signed else 0), codes
        )
    return codes.to(torch.uint8)


def encode(
    x: Tensor,
    element: str | ElementFormat,
    rounding: Rounding = "nearest",
    overflow: Overflow = "saturate",
    generator: torch.Generator | None = None,
    random_bits: int | None = None,
) -> Tensor:
    """The codes of x cast to an element format: uint8 of x's shape, one a byte.

    Arguments and errors are those of `cast`.

    Raises:
        ValueError: also where x has a NaN (or an inf) and the format no code for it.

    Examples:
        >>> encode(torch.tensor([0.5, -6.0]), "e2m1")
        tensor([ 1, 15], dtype=torch.uint8)
    """
    q = cast(x, element, rounding, overflow, generator, random_bits)
    element = element_format(element)
    if element.nan is None and bool(q.isnan().any()):
        raise ValueError(f"x has a NaN or an infinite value and {element.name} no code for it; expected finite numbers: clean x first")
    return codes_of(q.to(compute_dtype(x)), element)


def decode(codes: Tensor, element: str | ElementFormat, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of codes, a tensor of integers.

    Raises:
        ValueError: a code that the format does not have, or codes that are no integers.

    Examples:
        >>> decode(torch.tensor([1, 15]), "e2m1")
        tensor([ 0.5000, -6.0000])
    """
    element = element_format(element)
    if not isinstance(codes, Tensor) or codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise ValueError(
            f"codes are {getattr(codes, 'dtype', type(codes).__name__)}; expected a tensor of integers, as `encode` gives them"
        )
    if codes.numel() and (int(codes.max()) >= 1 << element.bits or int(codes.min()) < 0):
        raise ValueError(
            f"codes reach from {int(codes.min())} to {int(codes.max())}; expected 0 to {(1 << element.bits) - 1} for {element.name}"
        )
    return element.values.to(codes.device, dtype)[codes.long()]
