"""The part of a method's card by which `fewer advise` tries it on a user's own: `[[advise]]` in `paper.toml`, a section a kind of thing."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

Line = Annotated[str, msgspec.Meta(min_length=1, pattern=r"^[^\n]+$")]
# What quality and costs are of: those of one job alone are laid side by side.
Job = Literal[
    "using it",
    "training it further",
    "training from nothing",
    "training among clients",
    "sampling",
    "asking it",
    "searching it",
    "keeping it",
]
# What a method changes in the thing: two that change the same are not put together.
Changes = Literal[
    "feed-forward networks",
    "which blocks run",
    "attention",
    "number formats",
    "the training algorithm",
    "the sampler",
    "the noise",
    "the network",
    "the rounds",
    "which inputs are read",
    "how many answers",
    "the code",
]
# The common costs with their units, as studies log them and `fewer advise` lays them side by side.
COSTS: dict[str, str] = {
    "seconds": "s",
    "cpu_seconds": "s",
    "peak_memory": "bytes",
    "bytes": "bytes",
    "parameters": "",
    "flops": "FLOP",
    "calls": "",
    "queries": "",
    "joules": "J",
}
# Which of them say how much was saved, for each word of a card's `saves`.
COSTS_OF: dict[str, tuple[str, ...]] = {
    "network calls": ("calls",),
    "bits": ("bytes",),
    "bytes on the wire": ("bytes",),
    "active parameters": ("flops", "parameters"),
    "samples": ("queries", "calls"),
    "queries": ("queries",),
    "memory": ("peak_memory", "bytes"),
    "seconds": ("seconds", "cpu_seconds"),
    "joules": ("joules",),
}


class Advice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How to try a method on a thing: which arms of its study stand for what, and which of their figures say it.

    Attributes:
        on: the kind of thing, one of the card's `applies_to`.
        option: of the study, which takes it: `--set option=THING`.
        job: what quality and costs are of.
        as_it_is, method, replaces: arms: the thing untouched, the method, and what it replaces where the study has that.
        quality: the figure that says how good an arm is.
        measure: that in words, with its unit; qualities of other words are not compared.
        costs: common cost -> the figure that arms log it as, or the coordinate `over` that is it.
        changes: what it changes in the thing.
        apply: the command that applies it for good, with {thing}, {text}, {data}, {out} and the value of `over` by its name in place.
        at: coordinates at which all of these are read.
        over: a coordinate whose values are choices (the share removed, the number of calls), a line of the answer each.
        words: values of `over` as `apply` writes them, where it writes them otherwise.
        as_it_is_at: where on `over` the thing untouched is read; without it, where the method is.
        needs: what must be given beside it: "text" or "data".
        settings: further options, as `--set` takes them.
        writes: whether `apply` writes a new thing of this kind into {out}.
        before: methods that may follow on what it writes.
        after: methods on what they write it may follow: the same, said from the other side.
    """

    on: Line
    option: Line
    job: Job
    as_it_is: Line
    method: Line
    quality: Line
    measure: Line
    costs: Annotated[dict[str, Line], msgspec.Meta(min_length=1)]
    changes: Changes
    apply: Line
    replaces: str = ""
    at: dict[str, Any] = {}
    over: str = ""
    words: dict[str, str] = {}
    as_it_is_at: Any = None
    needs: list[Literal["text", "data"]] = []
    settings: dict[str, str] = {}
    writes: bool = False
    before: list[Line] = []
    after: list[Line] = []

    def __post_init__(self) -> None:
        if unknown := [name for name in self.costs if name not in COSTS]:
            raise ValueError(f"`costs` names {unknown[0]!r}, which is no common cost; expected some of {', '.join(COSTS)}")
