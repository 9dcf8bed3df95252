"""Which settings an arm runs with, and where they come from: tuned on this machine, recorded with the study, or its defaults."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from fewer.files import whole_file
from fewer.study.declaration import Arm, Scale, Study
from fewer.study.store import Store, Tuning


class RecordedTuning(Tuning, frozen=True, kw_only=True):
    """One arm's entry in a study's `tuned.json`."""

    arm: str
    scale: str
    options: dict[str, Any]


def tuned_file(module: str) -> Path:
    """Where the tunings recorded with a study stand: `tuned.json` beside its module."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).with_name("tuned.json")


def recorded_tunings(module: str) -> list[RecordedTuning]:
    """The tunings recorded with a study."""
    file = tuned_file(module)
    return msgspec.json.decode(file.read_bytes(), type=list[RecordedTuning]) if file.exists() else []


def choose_settings(
    study: Study, module: str, arm: Arm, scale: Scale, options: Mapping[str, Any], store: Store | None
) -> tuple[dict[str, Any], str]:
    """The settings of an arm and their origin in words."""
    settings = dict(options) | arm.defaults(scale, options)
    if not arm.space:
        return settings, "fixed"
    tuning = store.tuning(study.slug, arm.name, scale, options) if store else None
    where = "tuned here"
    if tuning is None:
        where = "recorded with the study"
        matches = [t for t in recorded_tunings(module) if (t.arm, t.scale, t.options) == (arm.name, scale.value, dict(options))]
        tuning = matches[0] if matches else None
    if tuning is None:
        return settings, "defaults, not tuned"
    return settings | tuning.settings, f"{where}: {tuning.date}, {tuning.trials} trials, {study.objective} {tuning.objective:.4g}"


def save_recorded_tunings(module: str, tunings: list[RecordedTuning]) -> Path:
    """Write tunings into `tuned.json` beside the study, in place of former ones of the same arms, scales and options."""
    merged = {(t.arm, t.scale, str(sorted(t.options.items()))): t for t in [*recorded_tunings(module), *tunings]}
    file = tuned_file(module)
    with whole_file(file, overwrite=True) as part:
        part.write_bytes(msgspec.json.format(msgspec.json.encode(list(merged.values())), indent=1) + b"\n")
    return file
