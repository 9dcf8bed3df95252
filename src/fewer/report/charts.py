"""Charts of a record by Altair: curves with spread bands, bars and differences against a twin, quality against cost.

A chart is made from a record and the study's own declaration of it. Text and axes are drawn in one stand-in colour that `svg` replaces by
`currentColor`, so that a chart on a page follows its light or dark mode.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fewer.quantities import on_front, show, show_change
from fewer.report.drawing import (
    FONT,
    INK,
    LABELS,
    ROW,
    TICK,
    WIDTH,
    arm_axis,
    axis_title,
    colours_of,
    coordinate_title,
    dashes_of,
    figure_of,
    in_unit,
    label_of,
    log_ticks,
    styled,
    with_front,
)
from fewer.report.terminal import seed_values
from fewer.study.figures import Bars, Chart, Curve, Difference, Groups, Tradeoff
from fewer.study.recording import Record
from fewer.study.results import NotTestable

if TYPE_CHECKING:
    import altair

TITLE_WIDTH = 52  # characters of a panel's title
FEW_TICKS = 9
WIDE = 10  # ratios that span more than this are drawn on a logarithmic axis


def chart(record: Record, declaration: Chart) -> altair.TopLevelMixin | None:
    """The chart that a study declares, or None where the record has no data for it."""
    match declaration:
        case Curve():
            drawn = _curve(record, declaration)
        case Bars():
            drawn = _bars(record, declaration)
        case Difference():
            drawn = _difference(record, declaration)
        case Groups():
            drawn = _groups(record, declaration)
        case Tradeoff():
            drawn = _tradeoff(record, declaration)
    return None if drawn is None else styled(drawn)


def title(record: Record, declaration: Chart) -> str:
    """The chart's title, as declared or made from what it shows."""
    if declaration.title:
        return declaration.title
    match declaration:
        case Curve(figure=figure, over=over, x=x):
            return f"{label_of(record, figure)} over {label_of(record, x or over)}"
        case Bars():
            return "Relative to the arm each is held against"
        case Difference(figure=figure):
            return f"{label_of(record, figure)}: difference to the arm each is held against"
        case Groups(figure=figure, over=over):
            return f"{label_of(record, figure)} by {over.replace('_', ' ')}"
        case Tradeoff(quality=quality, cost=cost):
            return f"{label_of(record, quality)} against {label_of(record, cost)}"


def table(record: Record, declaration: Chart) -> tuple[list[str], list[list[str]]]:
    """The chart's data in words: column names and rows."""
    match declaration:
        case Curve(over=over, figure=figure):
            unit = figure_of(record, figure, of_curve=True).unit
            rows = [
                [p["arm"], f"{p['at']:g}", show(p["mean"], unit), show(p["low"], unit), show(p["high"], unit), p["seeds"]]
                for p in _curve_points(record, declaration)
            ]
            return ["arm", over, "mean", "lowest", "highest", "seeds"], rows
        case Bars():
            return ["arm", "figure", "ratio"], [[p["arm"], p["figure"], f"{p['ratio']:.3g}"] for p in _ratios(record, declaration)]
        case Difference(figure=figure):
            unit = figure_of(record, figure).unit
            points = _differences(record, declaration)
            return ["arm", "against", "difference", "95 % interval"], [
                [p["arm"], p["against"], show_change(p["value"], unit), f"{show_change(p['low'], unit)} to {show_change(p['high'], unit)}"]
                for p in points
            ]
        case Groups(figure=figure, over=over):
            unit = figure_of(record, figure, of_curve=True).unit
            return [over, "arm", "mean", "lowest", "highest"], [
                [p["category"], p["arm"], show(p["mean"], unit), show(p["low"], unit), show(p["high"], unit)]
                for p in _group_points(record, declaration)
            ]
        case Tradeoff(quality=quality, cost=cost):
            points = _tradeoff_points(record, declaration)
            rows = [
                [p["arm"], show(p["quality"], figure_of(record, quality).unit), show(p["cost"], figure_of(record, cost).unit), p["front"]]
                for p in points
            ]
            return ["arm", label_of(record, quality), label_of(record, cost), "front"], rows


def note(record: Record, declaration: Chart) -> str:
    """What a reader must know of the chart's points: that some are not of every seed."""
    if isinstance(declaration, Curve) and any(point["partial"] for point in _curve_points(record, declaration)):
        return "Hollow points are of fewer seeds than the others: not every seed got there."
    return ""


def svg(drawn: altair.TopLevelMixin) -> str:
    """The chart as an SVG element whose text and axes take the colour of the text around it."""
    import vl_convert

    text = vl_convert.vegalite_to_svg(drawn.to_dict())
    return text.replace(INK, "currentColor").replace('font-family="sans-serif"', 'font-family="inherit"')


def png(drawn: altair.TopLevelMixin, file: Path) -> None:
    """The chart as a picture on white."""
    import vl_convert

    spec = drawn.to_dict()
    spec["background"] = "white"
    file.write_bytes(vl_convert.vegalite_to_png(spec, scale=2))


# Curves


def _curve_points(record: Record, declaration: Curve) -> list[dict[str, Any]]:
    """A point an arm and coordinate: mean, lowest and highest over the seeds that have it, and how many of them do."""
    results, points = record.results(), []
    for name, arm in record.arms.items():
        if not results.has(declaration.figure, name):
            continue
        curve = results.points(declaration.figure, name, declaration.over, declaration.at)
        seeds = max((len(by_seed) for by_seed in curve.values()), default=0)
        axis = results.curve(declaration.x, name) if declaration.x and results.has(declaration.x, name) else None
        for key, by_seed in curve.items():
            values = np.array([value for value in by_seed.values() if not np.isnan(value)])
            if not len(values):
                continue
            at = float(dict(key)[declaration.over])
            x = float(np.mean(list(axis[key].values()))) if axis is not None and key in axis else at
            point = {"arm": arm.label, "at": at, "x": x, "mean": values.mean(), "low": values.min(), "high": values.max()}
            points.append(point | {"seeds": f"{len(values)} of {seeds}", "partial": len(values) < seeds})
    return sorted(points, key=lambda point: (point["arm"], point["at"]))


def _curve(record: Record, declaration: Curve) -> Any:
    import altair as alt

    points = _curve_points(record, declaration)
    if not points:
        return None
    figure = figure_of(record, declaration.figure, of_curve=True)
    y_scale = alt.Scale(type="log" if declaration.log else "linear", zero=False, nice=True)
    x_title = coordinate_title(declaration.over)
    if declaration.x:
        x_title = axis_title(record, declaration.x, of_curve=True)
        points = in_unit(points, figure_of(record, declaration.x, of_curve=True), "x")
    base = alt.Chart(alt.Data(values=in_unit(points, figure, "mean", "low", "high"))).encode(
        x=alt.X("x:Q", title=x_title, scale=alt.Scale(type="log" if declaration.log_x else "linear", zero=False), axis=_ticks(points)),
        color=colours_of(record, {point["arm"] for point in points}),
    )
    band = base.mark_area(opacity=0.18).encode(
        y=alt.Y("low:Q", scale=y_scale, title=axis_title(record, declaration.figure, of_curve=True)), y2="high:Q"
    )
    line = base.mark_line(strokeWidth=2).encode(
        y=alt.Y("mean:Q", scale=y_scale), strokeDash=dashes_of(record, {point["arm"] for point in points})
    )
    ends = base.mark_point(size=30, opacity=1).encode(
        y=alt.Y("mean:Q", scale=y_scale),
        fillOpacity=alt.condition("datum.partial", alt.value(0), alt.value(1)),
        fill=colours_of(record, set(), legend=False),
    )
    return (band + line + ends).properties(width=WIDTH + LABELS - 40, height=300)


def _ticks(points: list[dict[str, Any]]) -> Any:
    """Where they are few, a tick for each coordinate; else some, none over another."""
    import altair as alt

    places = sorted({point["x"] for point in points})
    return alt.Axis(format=TICK, labelOverlap=True, values=places) if len(places) <= FEW_TICKS else alt.Axis(labelOverlap=True, tickCount=6)


# Bars and differences


def _ratios(record: Record, declaration: Bars) -> list[dict[str, Any]]:
    results, rows = record.results(), []
    for figure in declaration.figures:
        for name, arm in record.arms.items():
            if arm.against not in record.arms:
                continue
            try:
                ratio = (
                    results.ratio(figure, name, arm.against, **figure_of(record, figure).at).value
                    if results.has(figure, name) and results.has(figure, arm.against)
                    else np.nan
                )
            except NotTestable:
                continue
            if np.isfinite(ratio):
                words = {"arm": arm.label, "against": record.arms[arm.against].label, "figure": label_of(record, figure)}
                rows.append(words | {"ratio": ratio, "text": f"{ratio:.2g}×", "text_at": max(ratio, 1.0)})
    return rows


def _bars(record: Record, declaration: Bars) -> Any:
    import altair as alt

    rows = _ratios(record, declaration)
    if not rows:
        return None
    positive = [row["ratio"] for row in rows if row["ratio"] > 0]
    log = bool(positive) and max([*positive, 1]) / min([*positive, 1]) > WIDE and len(positive) == len(rows)
    top = max(row["ratio"] for row in rows)
    domain = [min([*positive, 1]) / 1.5, max(top, 1) * 2.5] if log else [0, max(top, 1) * 1.25]
    panels = []
    for figure in dict.fromkeys(row["figure"] for row in rows):
        own = [row for row in rows if row["figure"] == figure]
        base = alt.Chart(alt.Data(values=own)).encode(y=arm_axis([row["arm"] for row in own]))
        x = alt.X(
            "ratio:Q",
            title=None,
            scale=alt.Scale(type="log" if log else "linear", domain=domain, nice=False),
            axis=alt.Axis(format=TICK, values=log_ticks(*domain)) if log else alt.Axis(format=TICK, tickCount=5),
        )
        dots = base.mark_point(filled=True, size=90, opacity=1).encode(
            x=x, color=colours_of(record, {row["arm"] for row in own}, legend=False)
        )
        stems = (
            base.transform_calculate(one="1")
            .mark_rule(strokeWidth=4, opacity=0.55)
            .encode(x=x, x2="one:Q", color=colours_of(record, set(), legend=False))
        )
        text = base.mark_text(align="left", dx=9, color=INK, fontSize=FONT).encode(x="text_at:Q", text="text:N")
        one = alt.Chart(alt.Data(values=[{"one": 1}])).mark_rule(color=INK, strokeDash=[3, 3]).encode(x=alt.X("one:Q"))
        heading = textwrap.wrap(f"{figure}, 1 = the same", TITLE_WIDTH)
        panels.append((one + stems + dots + text).properties(width=WIDTH, height=ROW * len(own), title=heading))
    return alt.vconcat(*panels, spacing=18)


def _differences(record: Record, declaration: Difference) -> list[dict[str, Any]]:
    results, rows = record.results(), []
    for name, arm in record.arms.items():
        if arm.against not in record.arms or not results.has(declaration.figure, name) or not results.has(declaration.figure, arm.against):
            continue
        try:
            estimate = results.difference(declaration.figure, name, arm.against, **figure_of(record, declaration.figure).at)
        except NotTestable:
            continue
        rows.append(
            {
                "arm": arm.label,
                "against": record.arms[arm.against].label,
                "value": estimate.value,
                "low": estimate.low,
                "high": estimate.high,
            }
        )
    return rows


def _difference(record: Record, declaration: Difference) -> Any:
    import altair as alt

    rows = _differences(record, declaration)
    if not rows:
        return None
    figure = figure_of(record, declaration.figure)
    words = [row | {"text": show_change(row["value"], figure.unit)} for row in rows]
    base = alt.Chart(alt.Data(values=in_unit(words, figure, "value", "low", "high"))).encode(y=arm_axis([row["arm"] for row in rows]))
    points_unit = "percentage points" if figure.unit == "%" else figure.unit
    x_title = "difference" + (f" ({points_unit})" if points_unit else "")  # the chart's title says of what
    colours = colours_of(record, {row["arm"] for row in rows}, legend=False)
    spread = base.mark_rule(strokeWidth=4, opacity=0.45).encode(x=alt.X("low:Q", title=x_title), x2="high:Q", color=colours)
    dots = base.mark_point(filled=True, size=90, opacity=1).encode(x="value:Q", color=colours)
    text = base.mark_text(dy=-11, color=INK, fontSize=FONT - 2).encode(x="value:Q", text="text:N")
    zero = alt.Chart(alt.Data(values=[{"zero": 0}])).mark_rule(color=INK, strokeDash=[3, 3]).encode(x="zero:Q")
    return (zero + spread + dots + text).properties(width=WIDTH, height=(ROW + 10) * len(rows))


# Categories


def _group_points(record: Record, declaration: Groups) -> list[dict[str, Any]]:
    """A point a category and arm: mean, lowest and highest over seeds."""
    results, points = record.results(), []
    for name, arm in record.arms.items():
        if not results.has(declaration.figure, name):
            continue
        for key, by_seed in results.curve(declaration.figure, name).items():
            at, values = dict(key), np.array([value for value in by_seed.values() if not np.isnan(value)])
            if declaration.over in at and len(values) and all(at.get(axis) == value for axis, value in declaration.at.items()):
                spread = {"mean": values.mean(), "low": values.min(), "high": values.max()}
                points.append({"category": str(at[declaration.over]), "arm": arm.label} | spread)
    order = list(dict.fromkeys(point["category"] for point in points))
    return sorted(points, key=lambda point: order.index(point["category"]))


def _groups(record: Record, declaration: Groups) -> Any:
    import altair as alt

    points = _group_points(record, declaration)
    if not points:
        return None
    figure = figure_of(record, declaration.figure, of_curve=True)
    values = in_unit(points, figure, "mean", "low", "high")
    log = declaration.log and min(value["low"] for value in values) > 0
    domain = [min(value["low"] for value in values) / 1.5, max(value["high"] for value in values) * 1.5]
    x = {
        "title": axis_title(record, figure.name, of_curve=True),
        "scale": alt.Scale(type="log", domain=domain, nice=False) if log else alt.Scale(zero=False, padding=20),
        "axis": alt.Axis(format=TICK, values=log_ticks(*domain)) if log else alt.Axis(tickCount=6),
    }
    present = {point["arm"] for point in points}
    categories = list(dict.fromkeys(point["category"] for point in points))
    base = alt.Chart(alt.Data(values=values)).encode(y=arm_axis(categories, "category"), color=colours_of(record, present))
    spread = base.mark_rule(strokeWidth=4, opacity=0.45).encode(x=alt.X("low:Q", **x), x2="high:Q")
    dots = base.mark_point(filled=True, size=90, opacity=1).encode(x=alt.X("mean:Q", **x))
    return (spread + dots).properties(width=WIDTH, height=ROW * len(categories))


# Quality against cost


def _tradeoff_points(record: Record, declaration: Tradeoff) -> list[dict[str, Any]]:
    """A point an arm, told whether it stands on the Pareto front (no other arm is at least as good in both and better in one)."""
    quality, cost = figure_of(record, declaration.quality), figure_of(record, declaration.cost)
    results, points = record.results(), []
    for name, arm in record.arms.items():
        q, c = seed_values(results, quality, name), seed_values(results, cost, name)
        if len(q) and len(c) and np.isfinite(q.mean()) and np.isfinite(c.mean()):
            points.append({"arm": arm.label, "quality": float(q.mean()), "cost": float(c.mean())})
    down = 1 if quality.better == "lower" else -1
    places = [(down * point["quality"], point["cost"]) for point in points]
    return [point | {"front": "on the front" if on_front(place, places) else ""} for point, place in zip(points, places, strict=True)]


def _tradeoff(record: Record, declaration: Tradeoff) -> Any:
    import altair as alt

    points = _tradeoff_points(record, declaration)
    if not points:
        return None
    quality, cost = figure_of(record, declaration.quality), figure_of(record, declaration.cost)
    values = in_unit(in_unit(points, quality, "quality"), cost, "cost")
    costs = [value["cost"] for value in values]
    log = declaration.log and min(costs) > 0
    domain = [min(costs) / 1.5, max(costs) * 1.5]
    base = alt.Chart(alt.Data(values=values)).encode(
        x=alt.X(
            "cost:Q",
            title=axis_title(record, cost.name),
            scale=alt.Scale(type="log", domain=domain, nice=False) if log else alt.Scale(zero=False, padding=25),
            axis=alt.Axis(format=TICK, values=log_ticks(*domain)) if log else alt.Axis(),
        ),
        y=alt.Y("quality:Q", title=axis_title(record, quality.name), scale=alt.Scale(zero=False, padding=20)),
    )
    return with_front(base, colours_of(record, {point["arm"] for point in points}))
