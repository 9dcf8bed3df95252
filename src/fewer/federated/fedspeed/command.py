"""The verb `fewer federated quickstart METHOD DIR`: a Flower app that `flwr run DIR` runs as it is."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import typer

federated = typer.Typer(help="Federated methods as Flower apps.", no_args_is_help=True)
AREA = Path(__file__).parents[1]
SETTINGS = "pyproject.toml.in"


def templates() -> dict[str, Path]:
    """method -> the folder that its app is copied from: each method of the area that has a `quickstart` folder."""
    return {file.parents[1].name.replace("_", "-"): file.parent for file in sorted(AREA.glob(f"*/quickstart/{SETTINGS}"))}


@federated.callback()
def _federated() -> None:
    """Federated methods as Flower apps."""


@federated.command()
def quickstart(
    method: Annotated[str, typer.Argument(help="The method, such as fedspeed.")],
    directory: Annotated[Path, typer.Argument(help="The new folder to write the app into.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what stands in the folder.")] = False,
) -> None:
    """Write a Flower app (pyproject.toml, server_app.py, client_app.py) that `flwr run DIR` runs as it is, on handwritten digits.

    Example: fewer federated quickstart fedspeed my-app && flwr run my-app --stream
    """
    if method not in (known := templates()):
        raise ValueError(f"{method!r} has no quickstart; expected one of {', '.join(known)}")
    write_app(known[method], directory, overwrite=overwrite)
    print(f"written to {directory}")
    print(f"simulate:  flwr run {directory} --stream --federation-config 'num-supernodes=10'")
    print(f"deploy:    see the head of {directory / 'pyproject.toml'}")


def write_app(template: Path, directory: Path, *, overwrite: bool) -> None:
    """Write the app; the folder appears whole or not at all."""
    if directory.exists() and not overwrite:
        raise FileExistsError(f"{directory} exists; expected a new folder: choose another, or --overwrite")
    directory.absolute().parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=directory.absolute().parent, prefix=f".{directory.name}."))
    try:
        shutil.copytree(template, unfinished, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        (unfinished / SETTINGS).rename(unfinished / "pyproject.toml")
        unfinished.chmod(0o755)
        if directory.exists():
            shutil.rmtree(directory)
        os.replace(unfinished, directory)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


COMMANDS = {"federated": federated}
