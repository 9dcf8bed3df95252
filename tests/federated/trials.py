"""What a trial of a study tells, for the tests of the area's studies on a user's own images."""

from __future__ import annotations

from collections import defaultdict
from types import ModuleType
from typing import Any

from fewer.study import Scale, Trial
from fewer.study.trial import TrialSpec


def told_by(room: ModuleType, arm: str, settings: dict[str, Any], *, tuning: bool = False, scale: Scale = Scale.QUICK) -> Any:
    """Of an arm of a study's module, run here with seed 0: figures (name -> coordinates -> value), notes, objectives."""
    figures, notes, objectives = defaultdict(dict), {}, []

    def emit(event: Any) -> None:
        if hasattr(event, "coordinates"):
            figures[event.name][tuple(sorted(event.coordinates.items()))] = event.value
        elif hasattr(event, "name"):
            notes[event.name] = event.text
        elif type(event).__name__ == "ObjectiveEvent":
            objectives.append(event.value)

    spec = TrialSpec(room.__name__, room.study.slug, arm, 0, scale, settings, tuning=tuning)
    room.study.arms[arm].run(room.study.build_task(scale, settings), Trial(spec, emit))
    return figures, notes, objectives
