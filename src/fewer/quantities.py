"""Quantities in words: 0.856 as 85.6 %, 0.0852 seconds as 85 ms, 123456789 bytes as 118 MiB."""

from __future__ import annotations

import math
from collections.abc import Iterable

BINARY = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
SMALL = 0.001  # a share below it is told by its digits
DECIMAL = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))


def show(value: float | None, unit: str = "") -> str:
    """A value in its unit, scaled for reading.

    >>> show(0.8561, "%"), show(0.0852, "s"), show(123.4, "s"), show(123456789, "bytes"), show(2.5e9, "FLOP"), show(0.0, "J")
    ('85.6 %', '85.2 ms', '2 min 3 s', '118 MiB', '2.5 GFLOP', '0 J')
    >>> show(2.5e-5, "%"), show(float("nan"), "%")
    ('0.0025 %', 'NaN')
    >>> show(None)
    '-'
    """
    if value is None:
        return "-"
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "never" if value > 0 else "-∞"
    match unit:
        case "%":
            return f"{100 * value:.1f} %" if value == 0 or abs(value) >= SMALL else f"{100 * value:.2g} %"
        case "s":
            return _seconds(value)
        case "bytes":
            return _scaled(value, BINARY, "B")
        case "J" | "FLOP":
            return _scaled(value, tuple((prefix + unit, size) for prefix, size in DECIMAL), unit)
    return f"{_digits(value)} {unit}".rstrip()


def show_change(value: float, unit: str = "") -> str:
    """A difference with its sign; of fractions in percentage points.

    >>> show_change(-0.0031, "%"), show_change(1.5, "s")
    ('-0.31 points', '+1.50 s')
    """
    if unit == "%":
        return f"{100 * value:+.2f} points"
    return ("+" if value >= 0 else "-") + show(abs(value), unit)


def on_front(point: tuple[float, float], others: Iterable[tuple[float, float]]) -> bool:
    """Whether no other point is at most as large in both numbers and smaller in one.

    >>> on_front((1.0, 2.0), [(1.0, 2.0), (2.0, 1.0)]), on_front((1.0, 2.0), [(1.0, 1.5)])
    (True, False)
    """
    return not any(other[0] <= point[0] and other[1] <= point[1] and other != point for other in others)


def _seconds(value: float) -> str:
    if abs(value) >= 120:
        return f"{int(value // 60)} min {int(value % 60)} s"
    if abs(value) >= 1:
        return f"{value:.3g} s" if value >= 10 else f"{value:.2f} s"
    if abs(value) >= 1e-3:
        return f"{1e3 * value:.3g} ms"
    return f"{1e6 * value:.3g} µs" if value else "0 s"


def _scaled(value: float, steps: tuple[tuple[str, float], ...], unit: str) -> str:
    for name, size in steps:
        if abs(value) >= size:
            return f"{_digits(value / size)} {name}"
    return f"{_digits(value)} {unit}"


def _digits(value: float) -> str:
    """Three significant digits, thousands grouped.

    >>> _digits(12345.6), _digits(0.012345), _digits(3.0)
    ('12,346', '0.0123', '3')
    """
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
