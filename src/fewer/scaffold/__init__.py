"""`fewer new`: the folder of a new method, ours or a third party's, with a study that runs."""

from __future__ import annotations

import datetime
import re
import shutil
from importlib.resources import files
from pathlib import Path
from string import Template

from fewer import papers
from fewer.errors import UserError

METHOD_FILES = ("__init__.py", "selection.py", "study.py", "bench.py", "paper.toml")


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
    house = Path(papers.__file__).parent
    if outside is None:
        project = house.parents[1]
        if not (project / "pyproject.toml").exists():
            raise UserError("fewer is installed here, not checked out; give --outside FOLDER to lay out a package of your own")
        package, targets = f"fewer.{area}.{name}", _targets(house / area / name, project / "tests" / area / f"test_{name}.py")
    else:
        package = name
        targets = _targets(outside / "src" / name, outside / "tests" / f"test_{name}.py") | {"pyproject.toml": outside / "pyproject.toml"}
    taken = [str(target) for target in targets.values() if target.exists()]
    if taken:
        raise UserError(f"{taken[0]} is there already; choose another slug or folder")
    words = {"slug": slug, "area": area, "package": package, "name": name, "year": str(datetime.date.today().year)}
    try:
        return [_write(template, target, words) for template, target in targets.items()]
    except OSError:
        shutil.rmtree(targets["__init__.py"].parent, ignore_errors=True)
        raise


def _targets(method: Path, test: Path) -> dict[str, Path]:
    """template -> file."""
    return {template: method / template for template in METHOD_FILES} | {"test_method.py": test}


def _write(template: str, target: Path, words: dict[str, str]) -> Path:
    text = (files("fewer.scaffold") / "templates" / f"{template}.txt").read_text(encoding="utf8")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(Template(text).substitute(words), encoding="utf8")
    return target
