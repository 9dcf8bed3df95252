"""The verbs `fewer guess`, and `fewer bounds low` and `fewer bounds high`."""

from pathlib import Path
from statistics import median
from typing import Annotated

import typer


def guess(file: Annotated[Path, typer.Argument(help="A text file, a number a line.")]) -> None:
    """Guess the middle of the numbers in a file.

    Example: fewer guess numbers.txt
    """
    print(median(float(line) for line in file.read_text().split()))


bounds = typer.Typer(help="The least or the greatest number in a file.", no_args_is_help=True)


@bounds.command("low")
def low(file: Path) -> None:
    """The least number in a file.

    Example: fewer bounds low numbers.txt
    """
    print(min(float(line) for line in file.read_text().split()))


@bounds.command("high")
def high(file: Path) -> None:
    """The greatest number in a file.

    Example: fewer bounds high numbers.txt
    """
    print(max(float(line) for line in file.read_text().split()))


COMMANDS = {"guess": guess, "bounds": bounds}
