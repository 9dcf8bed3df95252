"""The verb `fewer federated quickstart METHOD DIR`: an app that runs as it is; by `flwr run DIR`, unless its settings say otherwise."""

from __future__ import annotations

import importlib
import shutil
import tomllib
from pathlib import Path
from typing import Annotated

import click
import typer

from fewer.files import made_whole

AREA = Path(__file__).parents[1]
SETTINGS = "pyproject.toml.in"
END_SUPERLINK = "pkill -f 'flower-superlink.*--simulation'"
FLOWER = (
    "simulate:  flwr run {directory} --stream --federation-config 'num-supernodes=10'\n"
    f"           Flower starts a SuperLink on this machine for it and keeps it for later runs; to end it: {END_SUPERLINK}\n"
    "deploy:    see the head of {directory}/pyproject.toml"
)

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
    """Write an app on handwritten digits that runs as it is: a Flower app (pyproject.toml, server_app.py, client_app.py) for `flwr run DIR`.

    That of a method without a server is an app.py for torchrun instead; the command to run it is printed.

    Example: fewer federated quickstart fedspeed my-app && flwr run my-app --stream
    """
    write_app(templates()[method], directory, overwrite)
    print(f"written to {directory}")
    print(how_to_run(templates()[method]).format(directory=directory))


def how_to_run(template: Path) -> str:
    """What is printed beside an app, with {directory} in it: `run` of its settings' table `tool.fewer`, or how Flower runs it."""
    settings = tomllib.loads((template / SETTINGS).read_text(encoding="utf8"))
    own = settings.get("tool", {}).get("fewer", {}).get("run", "")
    return f"run:       {own}\nfurther:   see the head of {{directory}}/pyproject.toml" if own else FLOWER


def write_app(template: Path, directory: Path, overwrite: bool = False) -> None:
    """Write a method's app; the folder appears whole or not at all."""
    with made_whole(directory, overwrite, option="DIRECTORY") as part:
        shutil.copytree(template, part, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        (part / SETTINGS).rename(part / "pyproject.toml")


def _add_actions() -> None:
    """The actions of the methods: each function in `ACTIONS` of a `command.py`, which imports its method only when it is called."""
    for file in sorted(AREA.glob("*/command.py")):
        if file.parent.name != "_shared":
            for name, action in getattr(importlib.import_module(f"fewer.federated.{file.parent.name}.command"), "ACTIONS", {}).items():
                federated.command(name)(action)


_add_actions()
COMMANDS = {"federated": federated}
