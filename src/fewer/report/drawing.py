"""What charts share: figures and their words, axes, ticks, an arm's colour in every chart, one look for all."""

from __future__ import annotations

import math
import textwrap
from typing import Any

from fewer.study.figures import Figure
from fewer.study.recording import Record

INK = "#123456"  # stands for the page's own text colour
# Okabe and Ito's colours without black and yellow, then Tol's: told apart by the colour-blind, seen on white and on black.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999933", "#AA4499", "#8C6BB1", "#7F7F7F")
WIDTH, ROW, FONT = 270, 28, 14
TITLE = 40  # characters a line of an axis' title
LEGEND = 26  # characters of a label that stands beside another
COORDINATES = {"calls": "network calls"}  # in words; the others are told as they are logged
TICK = ".4~g"  # digits of a tick: without a number those of the distance between ticks, and 0.125 would read 0.1
LABELS = 170  # pixels for an arm's name
SLACK = 24  # more, as a browser's letters may be wider than those that the chart was laid out with
WIDEST_FULL_TICKS = 100  # a logarithmic axis up to this ratio shows 1, 2 and 5 of each decade


def figure_of(record: Record, name: str, *, of_curve: bool = False) -> Figure:
    """The figure of that name; of several the first, or, for a curve, the one that is not tied to one of its points."""
    named = [figure for figure in record.shown if figure.name == name]
    if of_curve:
        named.sort(key=lambda figure: bool(figure.at))
    return named[0] if named else Figure(name, name.replace("_", " ").replace(".", " "), better="")


def label_of(record: Record, name: str) -> str:
    return figure_of(record, name).label


def axis_title(record: Record, name: str, *, of_curve: bool = False) -> list[str]:
    """The figure's label and unit, in lines that are no longer than an axis."""
    figure = figure_of(record, name, of_curve=of_curve)
    unit = "MiB" if figure.unit == "bytes" else figure.unit
    return textwrap.wrap(f"{figure.label} ({unit})" if unit else figure.label, TITLE)


def coordinate_title(over: str) -> list[str]:
    """A coordinate in words. A figure of the same name may count something else, so that its label says nothing here."""
    return textwrap.wrap(COORDINATES.get(over, over.replace("_", " ")), TITLE)


def in_unit(rows: list[dict[str, Any]], figure: Figure, *names: str) -> list[dict[str, Any]]:
    """Rows with these values as the axis shows them: fractions in per cent, bytes in MiB."""
    factor = {"%": 100.0, "bytes": 2.0**-20}.get(figure.unit, 1.0)
    return [row | {name: row[name] * factor for name in names} for row in rows]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, ... between two values; over more than two decades the powers of ten alone.

    >>> log_ticks(0.15, 12), log_ticks(0.5, 2000)
    ([0.2, 0.5, 1.0, 2.0, 5.0, 10.0], [1.0, 10.0, 100.0, 1000.0])
    """
    steps = (1, 2, 5) if high / low <= WIDEST_FULL_TICKS else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [float(f"{step}e{power}") for power in powers for step in steps]
    return [tick for tick in ticks if low <= tick <= high]


def arm_axis(arms: list[str], name: str = "arm") -> Any:
    import altair as alt

    return alt.Y(
        f"{name}:N",
        sort=arms,
        title=None,
        axis=alt.Axis(labelLimit=LABELS, ticks=False, domain=False, minExtent=LABELS + SLACK, labelPadding=8),
    )


def colours_of(record: Record, present: set[str], *, legend: bool = True) -> Any:
    """The same colour for an arm in every chart."""
    import altair as alt

    labels = [arm.label for arm in record.arms.values()]
    colours = [PALETTE[i % len(PALETTE)] for i in range(len(labels))]
    named = [label for label in labels if label in present]
    columns = 2 if max(map(len, named), default=0) <= LEGEND else 1  # two of long labels would make the whole chart small
    shown = (
        alt.Legend(title=None, orient="bottom", columns=columns, columnPadding=24, values=named, labelLimit=WIDTH + 90) if legend else None
    )
    return alt.Color("arm:N", scale=alt.Scale(domain=labels, range=colours), legend=shown)


def dashes_of(record: Record, present: set[str]) -> Any:
    """Dashed lines for the arms that others are held against."""
    import altair as alt

    held = {arm.against for arm in record.arms.values()}
    labels = [arm.label for arm in record.arms.values()]
    dashes = [[6, 3] if name in held else [1, 0] for name in record.arms]
    return alt.StrokeDash("arm:N", scale=alt.Scale(domain=labels, range=dashes), legend=None)


def with_front(base: Any, colours: Any) -> Any:
    """Dots of `base`, those whose `front` says something ringed and joined."""
    front = base.transform_filter("datum.front != ''")
    line = front.mark_line(color=INK, strokeDash=[4, 3], opacity=0.7, interpolate="step-after")
    rings = front.mark_point(size=260, color=INK, strokeWidth=1.5)
    dots = base.mark_point(filled=True, size=110, opacity=1).encode(color=colours)
    return (line + rings + dots).properties(width=WIDTH + LABELS - 40, height=300)


def styled(drawn: Any) -> Any:
    """One look for all: no background, text and axes in the stand-in colour."""
    text = {"labelColor": INK, "titleColor": INK, "labelFontSize": FONT, "titleFontSize": FONT, "titleFontWeight": "normal"}
    return drawn.configure(
        background="transparent",
        font="sans-serif",
        axis=text
        | {
            "titlePadding": SLACK // 2,
            "gridColor": INK,
            "gridOpacity": 0.12,
            "domainColor": INK,
            "domainOpacity": 0.4,
            "tickColor": INK,
            "tickOpacity": 0.4,
        },
        legend=text | {"symbolSize": 110, "symbolOpacity": 1},
        title={"color": INK, "fontSize": FONT, "anchor": "start", "fontWeight": "bold"},
        view={"stroke": None},
    )
