"""`fewer new`: the folder of a new method, ours or a third party's, with a study that runs."""

from __future__ import annotations

import datetime
import keyword
import re
import sys
from importlib.resources import files
from pathlib import Path
from string import Template

from fewer import papers
from fewer.errors import UserError
from fewer.files import check_new_file, whole_file

METHOD_FILES = ("__init__.py", "__init__.pyi", "selection.py", "problems.py", "peers.py", "study.py", "bench.py", "paper.toml")
TEST = "test_selection.py"


def lay_out(slug: str, area: str, outside: Path | None = None) -> list[Path]:
    """Write the files of a new method.

    Args:
        slug: lower-case words joined by hyphens.
        area: one of the house's areas, or a third party's own.
        outside: the folder of a new package; None lays the method into this checkout (`src/fewer/AREA/METHOD`).

    Returns:
        The files written.

    Raises:
        UserError: a malformed or taken slug, a folder that is there already, or no checkout to write into.
    """
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", slug) or not re.fullmatch(r"[a-z_]+", area):
        raise UserError(
            f"{slug} in {area}: expected a slug of lower-case words joined by hyphens (lazy-adam) and an area of lower-case letters"
        )
    if any(card.slug == slug for card in papers.cards()):
        raise UserError(f"there is a method {slug} already; `fewer show {slug}` shows it: choose another slug")
    name = slug.replace("-", "_")
    for word in (name, area):
        if not word.isidentifier() or keyword.iskeyword(word):
            raise UserError(
                f"{slug} in {area}: {word!r} is no name of a Python package (a keyword, or it begins with a digit); choose another"
            )
    if outside is not None and (name == "fewer" or name in sys.stdlib_module_names):
        raise UserError(f"{slug}: a package called {name!r} would stand in the place of Python's or this one; choose another slug")
    house = Path(papers.__file__).parent
    if outside is None:
        project = house.parents[1]
        if not (project / "pyproject.toml").exists():
            raise UserError("fewer is installed here, not checked out; give --outside FOLDER to lay out a package of your own")
        package, targets = f"fewer.{area}.{name}", _targets(house / area / name, project / "tests" / area / name / TEST)
    else:
        package = name
        targets = _targets(outside / "src" / name, outside / "tests" / name / TEST) | {"pyproject.toml": outside / "pyproject.toml"}
    for target in targets.values():
        if target.exists():
            raise UserError(f"{target} is there already; choose another slug or folder")
        check_new_file(target, option="--outside" if outside else "FOLDER")
    words = {"slug": slug, "area": area, "package": package, "name": name, "year": str(datetime.date.today().year)}
    written: list[Path] = []
    try:
        for template, target in targets.items():
            with whole_file(target) as part:
                part.write_text(_filled(template, words), encoding="utf8")
            written.append(target)
    except BaseException:
        for target in written:  # these alone: whatever else lies there is not ours
            target.unlink(missing_ok=True)
        raise
    return written


def _targets(method: Path, test: Path) -> dict[str, Path]:
    """template -> file."""
    return {template: method / template for template in METHOD_FILES} | {TEST: test}


def _filled(template: str, words: dict[str, str]) -> str:
    text = (files("fewer.scaffold") / "templates" / f"{template}.txt").read_text(encoding="utf8")
    lines = Template(text).substitute(words).splitlines(keepends=True)
    ours = [line for line in lines if line.startswith("from fewer.")]
    own = [line for line in lines if line.startswith(f"from {words['package']}.") and line not in ours]
    if not ours:
        return "".join(lines)
    first = next(number for number, line in enumerate(lines) if line in (*ours, *own))
    rest = [line for line in lines[first:] if line not in (*ours, *own)]
    gap = ["\n"] if lines[first - 1].strip() else []
    return "".join([*lines[:first], *gap, *sorted(ours), *(["\n"] if own else []), *sorted(own), *rest])
