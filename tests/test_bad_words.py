"""What a user may get wrong, over all verbs: every path, number and choice that a verb declares. A verb that comes later is in it by its declaration.

Each mistake ends with exit status 2 and one line, and changes nothing in the folder that one stands in. It is safe to run as root: only
names inside that folder are ever given.
"""

from __future__ import annotations

import os
from pathlib import Path

import click
import pytest
import typer.main

from fewer.cli import MethodVerb, app
from house import WORDS, in_this_process

PLACES = ["", ".", "absent/below", "folder", "file.txt/below", "n" * 256, "link", "pipe", "noise.bin", "cut.json"]
OUTPUTS = {"out", "out_dir", "outside", "directory", "store"}  # nothing need be there, and some of the places above are none to write
NEW = {"absent/below"}  # a good place for what is new
GROWING = {"outside"}  # files are added to what is there, none replaced: any folder will do
FOLDERS = {"", ".", "folder", *NEW}


def leaves(command: click.Command, words: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], click.Command]]:
    """Every verb with its words: `fewer run`, `fewer data fetch`, `fewer s2ft train`, ..."""
    if isinstance(command, MethodVerb):
        command = command._load()
    if isinstance(command, click.Group):
        context = click.Context(command)
        found = []
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            found += leaves(below, (*words, name))
        return found
    return [(words, command)]


LEAVES = leaves(typer.main.get_command(app))


def is_path(parameter: click.Parameter) -> bool:
    return (
        isinstance(parameter.type, click.Path)
        or parameter.name == "store"
        or (parameter.name == "out" and isinstance(parameter, click.Option))
    )


def mistakes() -> list[tuple[str, ...]]:
    """Every verb with one word wrong, its other needed words standing in."""
    found = []
    for words, command in LEAVES:
        for parameter in command.params:
            for bad in bad_words(parameter):
                found.append((*words, *given(command, parameter, bad)))
    return found


def bad_words(parameter: click.Parameter) -> list[str]:
    kind = parameter.type
    if isinstance(kind, click.IntRange | click.FloatRange):
        low = [] if kind.min is None else [str(kind.min - 1)]
        high = [] if kind.max is None else [str(kind.max * 10)]
        return [*low, *high, "many", *(["nan"] if isinstance(kind, click.FloatRange) else ["1" + "0" * 30])]
    if isinstance(kind, click.Choice):
        return ["nope"]
    if is_path(parameter):
        good = FOLDERS if parameter.name in GROWING else NEW if parameter.name in OUTPUTS else set()
        return [place for place in PLACES if place not in good]
    return []


def given(command: click.Command, wrong: click.Parameter, bad: str) -> list[str]:
    words: list[str] = []
    for parameter in command.params:
        if parameter is not wrong and not parameter.required:
            continue
        word = bad if parameter is wrong else stand_in(parameter)
        words += [parameter.opts[0], word] if isinstance(parameter, click.Option) else [word]
    return words


def stand_in(parameter: click.Parameter) -> str:
    if isinstance(parameter.type, click.Choice):
        return str(next(iter(parameter.type.choices)))
    return "new" if parameter.name in OUTPUTS else "absent"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in WORDS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FEWER_CACHE", str(tmp_path / "cache"))
    Path("folder").mkdir()
    Path("folder/mine.txt").write_text("years of work")
    Path("file.txt").write_text("mine")
    Path("link").symlink_to("nowhere")
    os.mkfifo("pipe")
    Path("noise.bin").write_bytes(bytes(range(256)) * 8)
    Path("cut.json").write_text('{"a": [1, ')
    return tmp_path


def tree(folder: Path) -> dict[str, object]:
    return {str(each.relative_to(folder)): each.read_bytes() if each.is_file() else each.is_dir() for each in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("verb", sorted({words for words, _ in LEAVES}), ids=" ".join)
def test_a_mistake_costs_one_line_and_changes_nothing(here, verb):
    before, wrong = tree(here), []
    for words in (each for each in mistakes() if each[: len(verb)] == verb):
        done = in_this_process(*words)
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        if done.returncode != 2 or len(lines) != 1 or "Traceback" in done.stderr:
            wrong.append(f"{' '.join(words)!r}: status {done.returncode}, said {done.stderr.strip()[-200:]!r}")
        if tree(here) != before:
            wrong.append(f"{' '.join(words)!r} left {sorted(set(tree(here)) ^ set(before))}")
            before = tree(here)
    assert not wrong, "\n".join(wrong)


def test_every_number_says_its_limits():
    """So that --help shows them; at least the lower one."""
    bare = [
        f"fewer {' '.join(words)} {parameter.opts[0]}"
        for words, command in LEAVES
        for parameter in command.params
        if isinstance(parameter.type, click.types.IntParamType | click.types.FloatParamType)
        and getattr(parameter.type, "min", None) is None
    ]
    assert not bare


def test_every_path_and_choice_of_the_table_is_a_real_one():
    kinds = {words[0] for words, command in LEAVES if any(bad_words(parameter) for parameter in command.params)}
    assert {"run", "export", "report", "new", "prune", "s2ft", "train-local", "compile-c", "ems", "wht", "federated"} <= kinds
