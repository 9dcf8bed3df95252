"""The verb `fewer guess`."""

from pathlib import Path
from statistics import median
from typing import Annotated

import typer


def guess(file: Annotated[Path, typer.Argument(help="A text file, a number a line.")]) -> None:
    """Guess the middle of the numbers in a file.

    Example: fewer guess numbers.txt
    """
    print(median(float(line) for line in file.read_text().split()))


COMMANDS = {"guess": guess}
