"""The verb `fewer federated quickstart METHOD DIR`: a Flower app that `flwr run DIR` runs as it is."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import click
import typer

from fewer.files import made_whole

AREA = Path(__file__).parents[1]
SETTINGS = "pyproject.toml.in"
END_SUPERLINK = "pkill -f 'flower-superlink.*--simulation'"

federated = typer.Typer(help="Federated methods as Flower apps.", no_args_is_help=True)


def templates() -> dict[str, Path]:
    """method -> the folder that its app is copied from: each method of the area that has a `quickstart` folder."""
    return {file.parents[1].name.replace("_", "-"): file.parent for file in sorted(AREA.glob(f"*/quickstart/{SETTINGS}"))}


@federated.callback()
def _federated() -> None:
    """Federated methods as Flower apps."""


@federated.command()
def quickstart(
    method: Annotated[str, typer.Argument(help="The method.", click_type=click.Choice(list(templates())))],
    directory: Annotated[Path, typer.Argument(help="The new folder to write the app into.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an app that this command wrote there.")] = False,
) -> None:
    """Write a Flower app (pyproject.toml, server_app.py, client_app.py) that `flwr run DIR` runs as it is, on handwritten digits.

    Example: fewer federated quickstart fedspeed my-app && flwr run my-app --stream
    """
    write_app(templates()[method], directory, overwrite)
    print(f"written to {directory}")
    print(f"simulate:  flwr run {directory} --stream --federation-config 'num-supernodes=10'")
    print(f"           Flower starts a SuperLink on this machine for it and keeps it for later runs; to end it: {END_SUPERLINK}")
    print(f"deploy:    see the head of {directory / 'pyproject.toml'}")


def write_app(template: Path, directory: Path, overwrite: bool = False) -> None:
    """Write a method's app; the folder appears whole or not at all."""
    with made_whole(directory, overwrite, option="DIRECTORY") as part:
        shutil.copytree(template, part, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        (part / SETTINGS).rename(part / "pyproject.toml")


COMMANDS = {"federated": federated}
