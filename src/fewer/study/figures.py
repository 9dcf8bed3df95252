"""What a study shows: the figures of its tables and the charts of its page, as plain data that travel with a record."""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class Figure(msgspec.Struct, frozen=True):
    """A figure worth a column in the tables.

    Args:
        name: as the arms log it.
        label: as the tables call it.
        unit: "%" shows a fraction times 100; "s", "bytes", "J" and "FLOP" are scaled for reading; "" is a plain number.
        better: which way is better; "" where neither is.
        detail: shown on the page, left out of the terminal.
        at: the coordinates whose value the tables show, where a figure is logged at some.
    """

    name: str
    label: str
    unit: str = ""
    better: Literal["higher", "lower", ""] = "lower"
    detail: bool = False
    at: dict[str, Any] = {}


class Curve(msgspec.Struct, frozen=True, tag="curve"):
    """A figure over a coordinate, a curve per arm with its spread over seeds.

    Args:
        figure: its name.
        over: the coordinate.
        x: another figure, logged at the same coordinates, that is put on the axis.
        log, log_x: logarithmic axes.
        at: further coordinates that a point must have, where a figure is logged at several.
    """

    figure: str
    over: str
    x: str = ""
    log: bool = False
    title: str = ""
    log_x: bool = False
    at: dict[str, Any] = {}


class Bars(msgspec.Struct, frozen=True, tag="bars"):
    """Figures of each arm relative to those of the arm it is held against (1 is the same)."""

    figures: tuple[str, ...]
    title: str = ""


class Difference(msgspec.Struct, frozen=True, tag="difference"):
    """A figure of each arm minus that of the arm it is held against, with the spread over seeds."""

    figure: str
    title: str = ""


class Groups(msgspec.Struct, frozen=True, tag="groups"):
    """A figure over categories (networks, data sets): a row a category, a point an arm with its spread over seeds.

    Args:
        figure: its name.
        over: the coordinate whose values are the categories, in the order in which they come.
        log: a logarithmic axis.
        at: further coordinates that a point must have.
    """

    figure: str
    over: str
    log: bool = False
    title: str = ""
    at: dict[str, Any] = {}


class Tradeoff(msgspec.Struct, frozen=True, tag="tradeoff"):
    """Quality against cost, one point an arm, the Pareto front marked."""

    quality: str
    cost: str
    log: bool = False
    title: str = ""


Chart = Curve | Bars | Difference | Groups | Tradeoff
