"""The page and its charts: made from a real run of a tiny study, and looked at in a headless Chromium."""

from __future__ import annotations

import base64
import re
import shutil
import threading
from pathlib import Path
from urllib.request import urlopen

import msgspec
import pytest
from guessing.study import study as guessing

from fewer import papers
from fewer.report import charts
from fewer.report.page import write_report
from fewer.report.serve import server
from fewer.study import Bars, Curve, Difference, Figure, Groups, LocalEngine, RaceOutcome, Store, Tradeoff, make_record, plan, run
from house import ROOT

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine: the tests of the page in a browser are left out; install chromium"
)


@pytest.fixture(scope="session")
def record(tmp_path_factory):
    """A real record with every kind of chart, one of them without data, and a race."""
    with Store(tmp_path_factory.mktemp("page") / "store.sqlite", write=True) as store:
        outcome = run(plan(guessing, "guessing.study", seeds=3, store=store), store, LocalEngine())
    race = RaceOutcome("a race", "a peer", "time", 0.45, "s", 0.5, 0.4, 0.6, 0.001, 0.002)
    made = make_record(outcome, [race])
    shown = [Figure("final", "error", "%"), Figure("work.seconds", "time", "s"), Figure("error", "error")]
    declared = [
        Curve("error", over="size"),
        Difference("final"),
        Bars(("final", "work.seconds")),
        Tradeoff("final", "work.seconds"),
        Curve("absent", over="size"),
    ]
    return msgspec.structs.replace(made, shown=shown, charts=declared)


def test_a_curve_keeps_points_that_not_every_seed_has_and_says_so(record):
    figures = record.figures | {"error": {"mean": [({"size": 1}, [0.5, 0.4, 0.3]), ({"size": 2}, [0.2]), ({"size": 4}, [None, 0.1, 0.3])]}}
    partial, declared = msgspec.structs.replace(record, figures=figures), Curve("error", over="size")
    _, rows = charts.table(partial, declared)
    assert [row[-1] for row in rows] == ["3 of 3", "1 of 3", "2 of 3"]
    assert "fewer seeds" in charts.note(partial, declared)
    assert charts.note(record, declared) == ""
    assert charts.svg(charts.chart(partial, declared)).startswith("<svg")


def test_a_curve_over_bytes_is_drawn_over_mebibytes_as_its_axis_says(record):
    figures = record.figures | {
        name: {"mean": [({"size": size}, [size * scale] * 3) for size in (1, 2)]} for name, scale in (("error", 0.1), ("sent", 2.0**20))
    }
    shown = [*record.shown, Figure("sent", "bytes sent", "bytes")]
    drawn = charts.chart(msgspec.structs.replace(record, figures=figures, shown=shown), Curve("error", over="size", x="sent"))
    assert drawn is not None
    assert [point["x"] for point in drawn.to_dict()["data"]["values"]] == [1.0, 2.0]
    assert "bytes sent (MiB)" in charts.svg(drawn)


def test_categories_are_drawn_a_row_each(record):
    figures = record.figures | {
        "loss": {arm: [({"network": name}, [1.0, 2.0]) for name in ("small", "large")] for arm in ("median", "mean")}
    }
    grouped, declared = msgspec.structs.replace(record, figures=figures), Groups("loss", over="network", log=True)
    assert charts.title(grouped, declared) == "loss by network"
    columns, rows = charts.table(grouped, declared)
    assert columns[0] == "network"
    assert [row[0] for row in rows] == ["small", "small", "large", "large"]
    picture = charts.svg(charts.chart(grouped, declared))
    assert "small" in picture
    assert "large" in picture


def test_claims_speak_of_figures_in_their_labels_words(record):
    said = " ".join(measured.what for claim in record.claims for measured in claim.ours)
    assert "_" not in said
    assert "the mean" in said, "an arm by its label"


@pytest.fixture(scope="session")
def card():
    return papers.read_card(ROOT / "tests" / "outside" / "src" / "guessing" / "paper.toml", "guessing")


@pytest.fixture(scope="session")
def site(tmp_path_factory, record, card):
    """A report with two areas, one method without a record, and text that tries to be markup."""
    other = msgspec.structs.replace(card, slug="other", area="elsewhere", summary="<script>document.title='broken in'</script> & more")
    folder = tmp_path_factory.mktemp("site") / "report"
    write_report(folder, [(card, record), (other, None)])
    return folder


def test_every_chart_becomes_a_picture_that_follows_the_text_colour(record, tmp_path):
    for declaration in record.charts[:4]:
        drawn = charts.chart(record, declaration)
        assert drawn is not None
        svg = charts.svg(drawn)
        assert svg.startswith("<svg")
        assert "currentColor" in svg
        assert charts.INK not in svg
        charts.png(drawn, tmp_path / "chart.png")
        assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_a_chart_without_data_is_none_and_its_table_empty(record):
    assert charts.chart(record, record.charts[4]) is None
    assert charts.table(record, record.charts[4])[1] == []


def test_chart_tables_hold_the_figures_of_the_results(record):
    columns, rows = charts.table(record, Difference("final"))
    assert columns == ["arm", "against", "difference", "95 % interval"]
    mine = 100 * record.results().difference("final", "mean", "median").value
    assert rows[0][:3] == ["the mean", "median", f"{mine:+.2f} points"]
    ratio = record.results().ratio("final", "mean", "median").value
    assert ["the mean", "error", f"{ratio:.3g}"] in charts.table(record, Bars(("final",)))[1]


def test_the_pareto_front_holds_what_nothing_beats(record):
    _, rows = charts.table(record, Tradeoff("final", "work.seconds"))
    assert any(row[3] == "on the front" for row in rows)
    lowest = min(float(row[1].split()[0]) for row in rows)
    assert any(row[3] == "on the front" for row in rows if float(row[1].split()[0]) == lowest)


def test_pages_load_nothing_from_outside_and_escape_what_cards_say(site):
    for page in site.rglob("*.html"):
        text = page.read_text()
        assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//(?!arxiv\.org/abs/)""", text), page
        assert "@import" not in text
        assert "<script>document.title" not in text
    assert "&lt;script&gt;document.title" in (site / "index.html").read_text()


def test_a_method_page_shows_verdicts_paper_machine_and_the_command_to_repeat(site, record):
    text = (site / "methods" / "guessing.html").read_text()
    for words in (
        "✓",
        "holds",
        "✗",
        "fails",
        "Paper: 0.8 %",
        "claimed &lt;= 0",
        record.environment["processor"],
        "fewer run guessing --scale quick --seeds 3 --set size=40",
    ):
        assert words in text, words
    assert "not reached" in text
    assert "There are no figures for this chart" in text
    assert "has not been run here" in (site / "methods" / "other.html").read_text()


def test_a_method_page_shows_what_arms_made_side_by_side(site, record):
    assert list(record.pictures) == ["seeds"]
    assert set(record.pictures["seeds"]) == {"median", "mean"}
    text = (site / "methods" / "guessing.html").read_text()
    assert "<h3>seeds</h3>" in text
    for arm, png in record.pictures["seeds"].items():
        assert f'src="data:image/png;base64,{base64.b64encode(png).decode()}" alt="seeds: {record.arms[arm].label}"' in text
    assert "What they made" not in (site / "methods" / "other.html").read_text()


def test_a_page_made_of_the_same_is_taken_over_and_of_anything_else_is_made_anew(tmp_path, card, record):
    page = tmp_path / "report" / "methods" / "guessing.html"
    write_report(tmp_path / "report", [(card, None)])
    page.write_text(page.read_text() + "<!-- taken over -->")
    write_report(tmp_path / "report", [(card, None)])
    assert "taken over" in page.read_text()
    write_report(tmp_path / "report", [(msgspec.structs.replace(card, summary="Another summary"), None)])
    assert "taken over" not in page.read_text()
    assert "Another summary" in page.read_text()
    write_report(tmp_path / "report", [(card, msgspec.structs.replace(record, charts=[]))])
    assert "has not been run here" not in page.read_text()


def test_a_report_replaces_a_former_one_and_nothing_else(site, tmp_path, card):
    write_report(tmp_path / "report", [(card, None)])
    index = write_report(tmp_path / "report", [])
    assert "guessing" not in index.read_text()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for folder in ("mine", "report"):  # a file of one's own beside a former report is one's own too
        (tmp_path / folder / "thesis.txt").write_text("years of work")
        with pytest.raises(FileExistsError, match="holds thesis.txt, which fewer did not write"):
            write_report(tmp_path / folder, [])
        assert (tmp_path / folder / "thesis.txt").read_text() == "years of work"
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mine", "report"], "nothing half written is left"


def test_the_server_listens_on_the_loopback_address_only(site):
    with server(site) as serving:
        assert serving.server_address[0] == "127.0.0.1"
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        assert b"The methods" in urlopen(f"http://127.0.0.1:{serving.server_port}/index.html").read()
        serving.shutdown()


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


def open_page(browser, file: Path, **context):
    page = browser.new_context(**context).new_page()
    page.complaints = []
    page.on("console", lambda message: page.complaints.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("request", lambda request: page.complaints.append(request.url) if request.url.startswith("http") else None)
    page.goto(file.as_uri())
    return page


@pytest.mark.browser
@needs_browser
def test_the_catalogue_filters_by_area_and_words_from_the_keyboard(site, browser):
    page = open_page(browser, site / "index.html")
    assert page.title() == "fewer: the methods"
    shown = lambda: page.locator(".cards > li:visible .name").all_inner_texts()  # noqa: E731
    assert shown() == ["guessing", "other"]
    page.get_by_role("button", name="elsewhere").focus()
    page.keyboard.press("Enter")
    assert shown() == ["other"]
    assert page.get_by_role("status").inner_text() == "1 method"
    page.get_by_role("button", name="all areas").click()
    page.get_by_role("searchbox").fill("few many")
    assert shown() == ["guessing"]
    page.get_by_label("saves").select_option("samples")
    page.get_by_label("applies to").select_option("numbers")
    assert shown() == ["guessing"]
    page.get_by_role("searchbox").fill("")
    assert shown() == ["guessing", "other"]
    assert page.complaints == []


@pytest.mark.browser
@needs_browser
@pytest.mark.parametrize(
    ("name", "width", "scheme"),
    [("desktop-light", 1280, "light"), ("desktop-dark", 1280, "dark"), ("phone-dark", 360, "dark"), ("phone-light", 360, "light")],
)
def test_a_method_page_draws_its_charts_and_fits_the_screen(site, browser, name, width, scheme):
    page = open_page(browser, site / "methods" / "guessing.html", viewport={"width": width, "height": 800}, color_scheme=scheme)
    assert page.locator("figure svg").count() == 4
    for chart in page.locator("figure svg").all():
        assert chart.bounding_box()["width"] > 200
        assert chart.locator("path").count() > 3
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
    assert page.complaints == []
    (ROOT / "artifacts").mkdir(exist_ok=True)
    page.screenshot(path=ROOT / "artifacts" / f"method-{name}.png", full_page=True)
