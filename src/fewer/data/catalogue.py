"""All declared sets, and what can be done with them: find, fetch, verify."""

from __future__ import annotations

import msgspec

from fewer.data import graph_sets, image_sets, motion_sets, operator_sets, pretrained, sequence_sets, text_sets, video_sets
from fewer.data.declarations import DataSet, File
from fewer.data.fetching import locate, obtain
from fewer.errors import UserError
from fewer.papers import did_you_mean

SETS = (
    *image_sets.SETS, *graph_sets.SETS, *text_sets.SETS, *sequence_sets.SETS, *motion_sets.SETS, *operator_sets.SETS, *video_sets.SETS,
    *pretrained.SETS,
)  # fmt: skip


class Found(msgspec.Struct, frozen=True):
    """A file of a set and the verified copy that is here, if any."""

    dataset: str
    file: str
    bytes: int
    place: str  # "" where it is not here
    why_not: str  # what the places said that have it not, or not the right one


def sets() -> list[DataSet]:
    """The declared sets."""
    return list(SETS)


def find(name: str) -> DataSet:
    """The declared set of that name; UserError on an unknown one."""
    named = {each.name: each for each in SETS}
    if name not in named:
        raise UserError(f"no data set {name!r}{did_you_mean(name, named)} (known: {', '.join(named)})")
    return named[name]


def fetch(name: str) -> list[Found]:
    """Fetch what is missing of a set; where its files lie.

    Raises:
        UserError: the set is unknown.
        DataUnavailable: a file can be had from nowhere; the message names the ways.
    """
    dataset = find(name)
    places = obtain(dataset)
    return [Found(name, file.name, file.bytes, str(places[file.name]), "") for file in dataset.files]


def verify(name: str) -> list[Found]:
    """What of a set is here and has the declared checksum; nothing is fetched."""
    dataset = find(name)
    return [_look(dataset, file) for file in dataset.files]


def _look(dataset: DataSet, file: File) -> Found:
    place, reasons = locate(dataset, file)
    return Found(dataset.name, file.name, file.bytes, str(place or ""), "" if place else "; ".join(reasons))
