"""The rules of the house: who may import whom, how light it is, and that what it says of itself is true."""

from __future__ import annotations

import ast
import doctest
import importlib
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from fewer import papers
from fewer.report import charts
from fewer.study.recording import read_record
from house import ROOT

SOURCE = ROOT / "src" / "fewer"
ROOMS = (
    "papers", "advice", "errors", "plain", "quantities", "checks", "files", "inputs", "devices", "fitting", "study", "meters", "data", "tasks", "advise",
    "report", "scaffold", "doctor", "cli",
)  # fmt: skip
AREAS = tuple(folder.name for folder in SOURCE.iterdir() if folder.is_dir() and folder.name not in ROOMS and folder.name != "__pycache__")
FILES = sorted(file for file in SOURCE.rglob("*.py"))

LIGHT = {"errors", "plain", "quantities", "papers", "advice", "checks", "files", "inputs", "devices"}  # rooms of a file each, for everybody
ALLOWED = {  # a room -> the rooms that it may import, besides itself
    "errors": set(),
    "plain": set(),
    "quantities": set(),
    "advice": set(),
    "papers": {"errors", "plain", "advice"},
    "checks": {"papers"},
    "files": set(),
    "inputs": set(),
    "devices": {"errors"},
    "meters": LIGHT,
    "fitting": {*LIGHT, "meters"},
    "data": LIGHT,
    "tasks": {*LIGHT, "data", "meters", "fitting"},
    "study": {*LIGHT, "meters"},
    "advise": {*LIGHT, "study", "meters", "data", "tasks"},
    "report": {*LIGHT, "study", "meters", "doctor", "advise"},
    "scaffold": LIGHT,
    "doctor": {*LIGHT, "study", "meters", "data"},
    "cli": set(ROOMS),
}
NEVER = {"training", "checks", "comparison", "files", "model_files", "networks", "baselines", "toolchain", "utils", "helpers", "misc"}
MOST_FILES, MOST_LINES = 10, 1300  # of a method: .py files at a level, lines in all


def imported(file: Path) -> set[str]:
    """The modules of the house that a file imports, anywhere in it, as `study.trial` or `forward_only.some_method.study`."""
    package = ["fewer", *file.relative_to(SOURCE).parent.parts]
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            found |= {f"{module}.{alias.name}" for alias in node.names} if module == "fewer" else {module}
    return {name.removeprefix("fewer.") for name in found if name.startswith("fewer.")}


def room_of(file: Path) -> str:
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_who_may_import_whom(file):
    room = room_of(file)
    for module in imported(file):
        target = module.split(".")[0]
        if room in ALLOWED:
            assert target == room or target in ALLOWED[room], f"{room} may not import {module}"
        elif room in AREAS:
            assert target in {*LIGHT, "meters", "tasks", "data", "fitting", *AREAS} or (
                target == "study" and file.name in ("study.py", "bench.py")
            ), f"{file.name} of a method may not import {module}"
            other_method = target in AREAS and module.split(".")[:2] != list(file.relative_to(SOURCE).parts[:2])
            if other_method and module.split(".")[1:2] != ["_shared"]:
                assert len(module.split(".")) <= 2, f"{file.name} may import public names of other methods, not {module}"
        else:
            assert room in ("__init__", "__main__"), f"{room} is no room and no area"
    assert room in ("__main__", "cli") or not any(module.split(".")[0] == "cli" for module in imported(file)), "nothing imports cli"


def without_docstrings(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            node.body[0] = ast.Pass()
    return ast.unparse(tree)


def test_the_shared_rooms_know_no_method_by_name():
    """Their examples may name one, their code may not; the help of the command line names one as an example."""
    slugs = [card.slug for card in papers.cards()]
    for file in FILES:
        if room_of(file) in ALLOWED and room_of(file) != "cli":
            code = without_docstrings(file.read_text())
            assert not [slug for slug in slugs if slug in code or slug.replace("-", "_") in code], file


def test_no_file_is_longer_than_a_reader_can_hold():
    for file in [*FILES, *(ROOT / "tests").rglob("*.py")]:
        assert len(file.read_text().splitlines()) <= 420, file


def import_seconds(module: str) -> tuple[float, set[str]]:
    """Seconds that importing a module takes in a fresh process, and what was loaded."""
    code = f"import {module}, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=True)
    last = [line for line in done.stderr.splitlines() if re.fullmatch(rf"import time:\s+\d+ \|\s+\d+ \| {module}", line)][-1]
    return int(last.split("|")[1]) / 1e6, set(done.stdout.split())


@pytest.mark.alone
def test_importing_the_house_is_quick_and_loads_nothing_heavy():
    runs = [(import_seconds("fewer"), import_seconds("numpy")) for _ in range(3)]
    ours = statistics.median(seconds for (seconds, _), _ in runs)
    numpys = statistics.median(seconds for _, (seconds, _) in runs)
    assert ours < 0.2
    assert ours < numpys, f"import fewer takes {ours:.3f} s, import numpy {numpys:.3f} s"
    assert not {"torch", "numpy", "typer", "altair", "sklearn"} & runs[0][0][1]


def test_the_catalogue_reads_no_method():
    code = "import sys; from fewer import papers; papers.cards(); assert not {'torch', 'numpy', 'sklearn'} & set(sys.modules), 'heavy'"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("card", papers.cards(), ids=lambda card: card.slug)
def test_a_method_has_all_its_parts(card):
    folder = SOURCE / card.area / card.slug.replace("-", "_")
    for part in ("__init__.py", "study.py", "bench.py", "paper.toml", "record.json"):
        assert (folder / part).exists(), f"{card.slug} lacks {part}"
    assert bool(card.results) != bool(card.no_results), "the paper's own numbers, or why there are none"
    for text in (card.summary, card.when_not, card.costs):
        assert text.endswith("."), f"one sentence, ended by a full stop: {text!r}"
    assert importlib.import_module(card.package).__doc__


@pytest.mark.parametrize("card", papers.cards(), ids=lambda card: card.slug)
def test_a_methods_folder_has_the_fixed_shape(card):
    folder = SOURCE / card.area / card.slug.replace("-", "_")
    assert (folder / "__init__.pyi").exists()
    assert not NEVER & {each.stem for each in folder.iterdir()}, "these are rooms of the house or of the area"
    for level in {file.parent for file in folder.rglob("*.py")}:
        assert len(list(level.glob("*.py"))) <= MOST_FILES, f"{level.name} has more than ten files"
    lines = sum(len(file.read_text().splitlines()) for file in folder.rglob("*.py"))
    assert lines <= MOST_LINES or card.large, f"{lines} lines: move what others need into a room, or say on the card why (`large`)"


@pytest.mark.parametrize("card", papers.cards(), ids=lambda card: card.slug)
def test_no_circles_inside_a_methods_folder(card):
    folder = SOURCE / card.area / card.slug.replace("-", "_")
    prefix = ".".join(folder.relative_to(SOURCE).parts)
    arrows = {}
    for file in folder.rglob("*.py"):
        name = ".".join(file.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
        arrows[name] = {module for module in imported(file) if module.startswith(f"{prefix}.")}
    while leaf := next((name for name, targets in arrows.items() if not targets & set(arrows) - {name}), None):
        del arrows[leaf]
    assert not arrows, f"these import one another: {', '.join(sorted(arrows))}"


@pytest.mark.parametrize("card", papers.cards(), ids=lambda card: card.slug)
def test_every_chart_of_a_record_draws_something(card):
    record = read_record(Path(card.folder))
    assert record
    empty = [charts.title(record, declaration) for declaration in record.charts if charts.chart(record, declaration) is None]
    assert not empty


def modules_with_examples() -> list[str]:
    return [
        ".".join(file.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__")
        for file in FILES
        if ">>> " in file.read_text()
    ]


@pytest.mark.parametrize("name", modules_with_examples())
def test_the_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert outcome.attempted > 0
    assert outcome.failed == 0


def public_names(package: str) -> list[str]:
    return [f"{package}.{name}" for name in importlib.import_module(package).__all__]


def test_what_is_public_says_what_it_is():
    for package in ["fewer.study", "fewer.meters", "fewer.data", *(card.package for card in papers.cards())]:
        module = importlib.import_module(package)
        for name in module.__all__:
            assert (getattr(module, name).__doc__ or "").strip(), f"{package}.{name} has no docstring"


def test_the_readme_lists_the_methods_as_the_cards_say():
    from fewer.report.readme import methods_table

    assert methods_table(papers.cards()) in (ROOT / "README.md").read_text(), "run `make readme`"


def test_the_tree_names_no_registry_and_no_machine():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for file in listed:
        path = ROOT / file
        if path.suffix in {".py", ".toml", ".md", ".txt", ".json", ".html", ".css", ".pyi"} and path.exists():
            found = re.findall(r"registry\.npmjs|pypi\.org|/root/|/home/\w+/", path.read_text())
            assert file == os.path.relpath(__file__, ROOT) or not found, f"{file} names {found}"


def test_the_readmes_first_example_runs():
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert code is not None
    names: dict = {}
    exec(code[1], names)
    assert float(names["accuracy"]) > 0.8
