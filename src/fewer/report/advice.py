"""An answer of `fewer advise` for people: tables on the terminal, and a page with a chart of quality against cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group as Parts
from rich.console import RenderableType
from rich.text import Text

from fewer.advise.answer import Answer, Group, Line, in_words, in_words_of
from fewer.files import check_new_file, whole_file
from fewer.quantities import show
from fewer.report.charts import svg
from fewer.report.drawing import PALETTE, WIDTH, styled, with_front
from fewer.report.page import templates
from fewer.report.terminal import plain_table

if TYPE_CHECKING:
    from fewer.advise.combining import Combined
    from fewer.advise.reading import Spread

SHORT = {"cpu_seconds": "cpu", "seconds": "time", "peak_memory": "memory", "parameters": "params", "flops": "ops"}
FIRST = 26  # characters of a table's first column, also where the terminal is narrow
LEGEND = "Costs are ratios to the thing as it is, measured here; ✓ loses at most {keep} with every seed; ● on the Pareto front"
OURS = '<meta name="generator" content="fewer advise">'


def view(answer: Answer) -> RenderableType:
    """All that is said on a terminal, the sentence last."""
    parts: list[RenderableType] = []
    for title, reasons in (
        ("Does not apply", answer.left_out),
        ("Applies, and could not be tried", answer.refused),
        ("Did not fit into the time", answer.unfitting),
    ):
        if reasons:
            parts += [Text(f"{title}:", style="bold"), *(Text(f"  {slug}: {why}", style="dim") for slug, why in reasons.items())]
    parts += [Text(), *(_table(group) for group in answer.groups)]
    if answer.groups:
        parts.append(Text(LEGEND.format(keep=show(answer.keep, "%")), style="dim"))
    parts += [_combined(each) for each in answer.combined]
    parts += [Text(), Text(answer.sentence, style="bold")]
    if answer.command:
        parts.append(Text(f"  {answer.command}"))
    return Parts(*parts)


def columns(group: Group) -> list[str]:
    """The costs that some line of a group has."""
    return list(dict.fromkeys(name for line in group.lines for name in line.point.costs))


def rows(group: Group) -> list[list[str]]:
    """The thing as it is, then a line each, in words."""
    costs = columns(group)
    beside = ", ".join(dict.fromkeys(line.beside for line in group.lines))
    table = [[f"as it is ({beside})", "0 %", *["1"] * len(costs), ""]]
    for line in group.lines:
        choice = in_words_of(line.point.choice)
        name = f"  not {line.slug} but {line.arm}" if line.replaced else line.slug
        left = [_ratio(line.point.costs.get(cost)) for cost in costs]
        marks = "".join(mark for mark, there in (("●", line.front), ("✓", line.keeps)) if there)
        table.append([f"{name}, {choice}" if choice else name, _share(line.point.lost), *left, marks])
    return table


def header(group: Group) -> list[str]:
    return ["", "lost", *(SHORT.get(name, name) for name in columns(group)), ""]


def _table(group: Group) -> RenderableType:
    table = plain_table(f"{group.job.capitalize()}: {group.measure}")
    for number, name in enumerate(header(group)):
        if number == 0:
            table.add_column(name, overflow="fold", min_width=FIRST)
        else:
            table.add_column(name, overflow="fold", justify="left" if number == len(columns(group)) + 2 else "right")
    for cells in rows(group):
        table.add_row(*cells)
    return table


def _share(spread: Spread | None) -> str:
    if spread is None:
        return "not measured"
    ends = f"\n{_two(100 * spread.low)} to {_two(100 * spread.high)} %" if spread.seeds > 1 and spread.low != spread.high else ""
    return f"{_two(100 * spread.mean)} %{ends}"


def _ratio(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    low, high = _two(spread.low), _two(spread.high)
    return f"{_two(spread.mean)}\n{low} to {high}" if spread.seeds > 1 and low != high else _two(spread.mean)


def _two(value: float) -> str:
    """Two digits, or all before the point: 0.0123 as 0.012, 123.4 as 123."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.2g}"


def combined_rows(combined: Combined) -> list[list[str]]:
    return [
        [name, _share(point.lost), *[_ratio(point.costs.get(cost)) for cost in combined.costs]] for name, point in combined.points.items()
    ]


def _combined(combined: Combined) -> RenderableType:
    table = plain_table(f"Together: {' + '.join(combined.slugs)}")
    for name in ("", "quality lost", *map(in_words, combined.costs)):
        table.add_column(name, justify="left" if not name else "right", overflow="fold")
    for cells in combined_rows(combined):
        table.add_row(*cells)
    return Parts(table, Text(combined.said))


# The page


def check_page(file: Path) -> Path:
    """The page's path, if it may be written: a new file, or a page of this verb's, which is replaced; FileExistsError otherwise."""
    if file.is_file() and not _is_ours(file):
        raise FileExistsError(f"--page {file} is there and is no page of `fewer advise`; expected a new file: choose another name")
    return check_new_file(file, overwrite=True, option="--page")


def _is_ours(file: Path) -> bool:
    try:
        return OURS in file.read_text(encoding="utf8")
    except (OSError, UnicodeDecodeError):
        return False


def write_page(file: Path, answer: Answer) -> None:
    """Write the answer as a page of its own, with a chart a group."""
    drawn = [{"group": group, "header": header(group), "rows": rows(group), "svg": _chart(group)} for group in answer.groups]
    together = [
        {"combined": each, "rows": combined_rows(each), "header": ["", "quality lost", *map(in_words, each.costs)]}
        for each in answer.combined
    ]
    page = (
        templates()
        .get_template("advice.html")
        .render(answer=answer, legend=LEGEND.format(keep=show(answer.keep, "%")), drawn=drawn, together=together, root="")
    )
    with whole_file(check_page(file), overwrite=True, option="--page") as part:
        part.write_text(page.replace("<head>", f"<head>\n{OURS}", 1), encoding="utf8")


def _chart(group: Group) -> str:
    """Quality lost over what is left of the costs, the front marked; "" where nothing has both."""
    import altair as alt

    values = [_point(line) for line in group.lines if line.point.lost is not None]
    if not values:
        return ""
    values.append({"method": "as it is", "left": 1.0, "lost": 0.0, "front": "on the front"})
    names = list(dict.fromkeys(value["method"] for value in values))
    base = alt.Chart(alt.Data(values=values)).encode(
        x=alt.X("left:Q", title="what is left of the costs", scale=alt.Scale(zero=False, padding=25)),
        y=alt.Y("lost:Q", title="quality lost (%)", scale=alt.Scale(zero=False, padding=20)),
    )
    colours = alt.Color(
        "method:N",
        scale=alt.Scale(domain=names, range=[PALETTE[i % len(PALETTE)] for i in range(len(names))]),
        legend=alt.Legend(title=None, orient="bottom", columns=1, labelLimit=WIDTH),
    )
    return svg(styled(with_front(base, colours)))


def _point(line: Line) -> dict[str, Any]:
    assert line.point.lost is not None
    name = f"what {line.slug} replaces" if line.replaced else line.slug
    return {"method": name, "left": line.left, "lost": 100 * line.point.lost.mean, "front": "on the front" if line.front else ""}
