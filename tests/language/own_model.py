"""A model directory and a text as a user has them, and what a trial of a study logs about them."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fewer.study import Scale
from fewer.study.trial import FigureEvent, TrialSpec, run_trial
from fewer.tasks import load_small_lm

TEXT = "import os\n\ndef first(values):\n    return values[0] + 12\n"


def own_model(folder: Path, patch: pytest.MonkeyPatch, text: str = TEXT, times: int = 900) -> dict[str, str]:
    """A tiny model and its text in the folder, in which the cache is from now on as well: the options `model` and `text`."""
    patch.setenv("FEWER_CACHE", str(folder / "cache"))
    (folder / "notes.txt").write_text(text * times)
    lm = load_small_lm("family-micro", text=[folder / "notes.txt"])
    lm.model.save_pretrained(folder / "model")
    lm.tokenizer.save_pretrained(folder / "model")
    return {"model": str(folder / "model"), "text": str(folder / "notes.txt")}


def events_of(room: ModuleType, arm: str, settings: dict[str, Any]) -> list[FigureEvent]:
    """The figures that a trial of a study's module logs, at quick scale with seed 0; it must end well."""
    events: list[Any] = []
    run_trial(TrialSpec(room.__name__, room.study.slug, arm, 0, Scale.QUICK, settings), events.append)
    assert events[-1].status == "done", events[-1].error
    return [each for each in events if isinstance(each, FigureEvent)]


def figures_of(room: ModuleType, arm: str, settings: dict[str, Any]) -> dict[Any, float]:
    """The same as (name, *coordinates) -> value."""
    return {(each.name, *sorted(each.coordinates.items())): each.value for each in events_of(room, arm, settings)}
