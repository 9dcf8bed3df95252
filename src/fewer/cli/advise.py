"""The verb `fewer advise`."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fewer import papers
from fewer.cli.words import DEVICE, JSON, QUIET, console, escaped, print_json, tell_troubles
from fewer.devices import Device
from fewer.errors import UserError

SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600}


def advise(
    thing: Annotated[str, typer.Argument(help="A model directory, a network, an .npz, a folder, a server, or module:name:BITS.")],
    text: Annotated[Path | None, typer.Option(help="A UTF-8 text of yours, to use and judge on.")] = None,
    data: Annotated[Path | None, typer.Option(help="Examples of yours (JSONL of prompt and completion), to use and judge on.")] = None,
    saves: Annotated[list[str] | None, typer.Option(help="What is to be saved, such as memory (repeat for more).")] = None,
    keep: Annotated[str, typer.Option(help="How much of the quality may be lost.")] = "1%",
    budget: Annotated[str, typer.Option(help="How long it may take: 90s, 15m, 2h.")] = "15m",
    only: Annotated[list[str] | None, typer.Option(help="Only this method (repeat for more).")] = None,
    combine: Annotated[bool, typer.Option("--combine", help="Then put the best that touch different things together.")] = False,
    page: Annotated[Path | None, typer.Option(help="Write the answer as a page, too.")] = None,
    store: Annotated[str | None, typer.Option(help="The SQLite file that keeps the figures (default: one for each thing).")] = None,
    device: DEVICE = Device.auto,
    quiet: QUIET = False,
    as_json: JSON = False,
) -> None:
    """Try what applies to your model or data beside it as it is, and say what pays.

    Broken off, or out of time, it goes on where it was: run the same command again.

    Example: fewer advise my-model --text notes.txt --saves memory --budget 15m
    """
    from fewer.advise.advising import Question, check_memory
    from fewer.advise.advising import advise as ask
    from fewer.advise.things import recognise
    from fewer.devices import choose_device
    from fewer.report import advice as shown
    from fewer.report.progress import RunProgress

    began = time.monotonic()
    question = Question(
        saves=_known_saves(saves or []),
        keep=share(keep),
        seconds=duration(budget),
        only=[papers.find(slug).slug for slug in only or []],
        beside={name: str(file) for name, file in (("text", text), ("data", data)) if file is not None},
        combine=combine,
    )
    if page is not None:
        shown.check_page(page)
    for name, file in question.beside.items():
        if not Path(file).is_file():
            raise UserError(f"--{name} {file}: no such file; expected a text file")
    found = recognise(thing)
    told = Console(stderr=True, highlight=False, soft_wrap=True)
    told.print(escaped(f"{found.given}: {found.about}"))
    tell_troubles()
    check_memory(found)
    place = store or f"fewer-runs/advise-{found.digest(*question.beside.values())}.sqlite"
    try:
        with RunProgress(quiet=quiet) as observer:
            answer = ask(found, question, papers.cards(), place, observer, device=choose_device(device), began=began)
    except KeyboardInterrupt:
        told.print(escaped(f"\nStopped. What was finished is kept in {place}; the same command goes on from there."))
        raise typer.Exit(130) from None
    if page is not None:
        shown.write_page(page, answer)
    if as_json:
        return print_json(answer)
    console().print(shown.view(answer))
    if page is not None:
        console().print(f"Wrote {escaped(str(page))}", soft_wrap=True)


def _known_saves(words: list[str]) -> list[str]:
    papers.choose((), saves=words)
    return words


def share(text: str) -> float:
    """ "1%" or "0.01" as 0.01; UserError on anything else."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(%?)\s*", text)
    value = float(found[1]) / (100 if found[2] else 1) if found else -1.0
    if not 0 <= value <= 1:
        raise UserError(f"--keep {text}: expected a share between 0 and 100 %, such as 1% or 0.01")
    return value


def duration(text: str) -> float:
    """Seconds: "90s", "15m", "2h", "900"; UserError on anything else."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([smh]?)\s*", text)
    seconds = float(found[1]) * SECONDS[found[2]] if found else 0.0
    if not 0 < seconds < 1e7:
        raise UserError(f"--budget {text}: expected a time, such as 90s, 15m or 2h")
    return seconds


VERBS = [("advise", advise, "Run")]
