"""The catalogue: every method's card (`paper.toml`) and its last record, read without importing the method.

A third party adds a method by an entry point of the group `fewer.papers` whose value is the method's package:

    [project.entry-points."fewer.papers"]
    my-method = "my_package.my_method"
"""

from __future__ import annotations

import difflib
import importlib.util
import re
import tomllib
from collections.abc import Iterable, Iterator
from functools import cache, cached_property
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import msgspec

from fewer.advice import Advice
from fewer.errors import UserError
from fewer.plain import plain, plain_all

Saves = Literal[
    "backward passes",
    "network calls",
    "bits",
    "bytes on the wire",
    "active parameters",
    "samples",
    "queries",
    "memory",
    "seconds",
    "joules",
    "labels",
]
AppliesTo = Literal[
    "a torch network",
    "a torch optimizer",
    "a small network in C",
    "a transformers causal LM",
    "a language model behind an API",
    "a diffusers pipeline",
    "images",
    "sequences",
    "text",
    "a graph",
    "a federated job",
    "a function of bits",
    "a black box",
    "an operator between functions",
    "a signal",
    "videos",
    "tensors",
    "a bilevel problem",
    "a control loop",
    "proofs",
    "numbers",
]
# What a user points at, for each of the words above: endings of files, "/" a directory, ":" a Python function `module:name`.
KINDS: dict[str, tuple[str, ...]] = {
    "a torch network": (".pt2", ".onnx", ".npz"),
    "a torch optimizer": (".npz",),
    "a small network in C": (".pt2", ".onnx"),
    "a transformers causal LM": ("/config.json",),
    "a language model behind an API": ("http",),
    "a diffusers pipeline": ("/model_index.json",),
    "images": (".npz", "/"),
    "sequences": (".fasta", ".txt"),
    "text": (".txt", ".jsonl"),
    "a graph": (".npz",),
    "a federated job": (".npz", "/"),
    "a function of bits": (":", ".npy"),
    "a black box": (":",),
    "an operator between functions": (".npz",),
    "a signal": (".npz", ".npy"),
    "videos": (".npz", "/"),
    "tensors": (".npz", ".npy", ".safetensors"),
    "a bilevel problem": (":",),
    "a control loop": (".npz",),
    "proofs": ("/",),
    "numbers": (".txt", ".npy"),
}
BRIEF = 56  # characters
Slug = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]
Line = Annotated[str, msgspec.Meta(min_length=1, pattern=r"^[^\n]+$")]


VERDICTS: tuple[str, ...] = ("holds", "fails", "undecided", "not testable here")


class _Judged(msgspec.Struct):
    """What the catalogue reads of a record's claim."""

    verdict: Literal["holds", "fails", "undecided", "not testable here"]


class PaperResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One of the paper's own numbers, with the table or figure it stands in."""

    metric: Line
    setting: Line
    value: float
    source: Line
    baseline: str = ""
    baseline_value: float | None = None
    unit: str = ""


class Verb(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A command of the method's own, defined in its `command.py`."""

    name: Slug
    help: Line


class Card(msgspec.Struct, frozen=True, forbid_unknown_fields=True, dict=True):
    """A method's card, as `paper.toml` states it."""

    slug: Slug
    title: Line
    summary: Line  # what it does for you
    when_not: Line
    costs: Line
    authors: Annotated[list[Line], msgspec.Meta(min_length=1)]
    year: Annotated[int, msgspec.Meta(ge=1900, le=2100)]
    arxiv: list[str]
    code: str
    code_license: str
    area: Annotated[str, msgspec.Meta(pattern=r"^[a-z_]+$")]
    extra: Slug
    replaces: Line
    saves: Annotated[list[Saves], msgspec.Meta(min_length=1)]
    applies_to: Annotated[list[AppliesTo], msgspec.Meta(min_length=1)]
    needs: Literal["nothing", "calibration data", "training"]
    peers: list[Line]
    results: list[PaperResult]
    brief: Annotated[str, msgspec.Meta(max_length=BRIEF, pattern=r"^[^\n]*$")] = ""  # the summary for a line of a list
    no_results: str = ""  # why none of the paper's own numbers stands here, where none could be read
    works_with: list[Line] = msgspec.field(default_factory=list)  # `applies_to` in the method's own words: which objects of which library
    venue: str = ""
    large: str = ""  # why it takes more lines than a method should
    commands: list[Verb] = msgspec.field(default_factory=list)
    advise: list[Advice] = msgspec.field(default_factory=list)
    package: str = ""  # the method's Python package, filled in by the catalogue
    folder: str = ""  # where the package lies, likewise

    def __post_init__(self) -> None:
        for number, each in enumerate(self.advise):
            if each.on not in self.applies_to:
                raise ValueError(f"`advise[{number}].on` is {each.on!r}, which is not among applies_to: {', '.join(self.applies_to)}")

    @property
    def line(self) -> str:
        """What it does for you in at most 56 characters."""
        return self.brief or (self.summary if len(self.summary) <= BRIEF else f"{self.summary[: BRIEF - 1]}…")

    @cached_property
    def record(self) -> dict[str, Any] | None:
        """The last recorded run (`record.json`), or None; `trouble` says why where there is one that cannot be read."""
        try:
            read = msgspec.json.decode((Path(self.folder) / "record.json").read_bytes(), type=dict[str, Any])
            msgspec.convert(read["claims"], list[_Judged])
        except (OSError, msgspec.DecodeError, KeyError):
            return None
        return plain_all(read)

    @property
    def trouble(self) -> str:
        """Why the record cannot be read, where it is there and cannot."""
        there = (Path(self.folder) / "record.json").exists()
        return f"{self.package}: its record.json is no record; make it again with `fewer record`" if there and self.record is None else ""

    @property
    def verdicts(self) -> dict[str, int]:
        """How many claims of the last record hold, fail, are undecided, and are not testable here."""
        counts: dict[str, int] = dict.fromkeys(VERDICTS, 0)
        for claim in self.record["claims"] if self.record else []:
            counts[claim["verdict"]] += 1
        return counts


class AreaVerbs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The verbs that the methods of an area share, as its `_shared/verbs.toml` states them."""

    extra: Slug
    commands: list[Verb]
    slug: str = ""  # the area, filled in by the catalogue
    package: str = ""  # where `command.py` lies, likewise


def area_verbs() -> list[AreaVerbs]:
    """The verbs of all areas that have some."""
    found = []
    for file in sorted(Path(__file__).parent.glob("*/_shared/verbs.toml")):
        area = file.parts[-3]
        fields = tomllib.loads(file.read_text(encoding="utf8"))
        found.append(msgspec.convert(fields | {"slug": area, "package": f"fewer.{area}._shared"}, AreaVerbs))
    return found


def read_card(file: Path, package: str = "") -> Card:
    """The card in `file`; UserError naming the file and the field where it is not a card."""
    try:
        fields = plain_all(tomllib.loads(file.read_text(encoding="utf8")))
        return msgspec.convert(fields | {"package": package, "folder": str(file.parent)}, Card)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{file}: cannot be read as TOML ({error}); mend the file") from error
    except msgspec.ValidationError as error:
        raise UserError(f"{file}: {_plainly(str(error))}; mend the card (`fewer show` of another method shows a whole one)") from error


def _plainly(error: str) -> str:
    """msgspec's message with the place first: "results[0].value: Expected `float`, got `str`"."""
    what, _, place = error.partition(" - at `$")
    place = place.rstrip("`").lstrip(".")
    missing = re.match(r"Object missing required field `(\w+)`", what)
    if missing:
        return f"the field `{'.'.join(filter(None, [place, missing[1]]))}` is missing"
    return f"field `{place}`: {what}" if place else what


def own_folders() -> Iterator[tuple[Path, str]]:
    """(paper.toml, package) of the methods of this library."""
    house = Path(__file__).parent
    for file in sorted(house.glob("*/*/paper.toml")):
        yield file, "fewer." + ".".join(file.parent.relative_to(house).parts)


@cache
def house_studies() -> tuple[Card, ...]:
    """The studies of the house that are about no method: they run and are recorded like the others, and stand in no list of methods."""
    house = Path(__file__).parent
    files = sorted(house.glob("*/*/study.toml"))
    return tuple(read_card(file, "fewer." + ".".join(file.parent.relative_to(house).parts)) for file in files)


def outside_card(entry: EntryPoint) -> Card:
    """The card of a method that an installed package adds by the entry point group `fewer.papers`; UserError where it adds none."""
    try:
        spec = importlib.util.find_spec(entry.value)
    except Exception as error:  # finding a package imports its parents, which may do anything
        raise UserError(
            f"entry point fewer.papers:{entry.name} names {entry.value}, which cannot be found ({error}); reinstall that package"
        ) from error
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"entry point fewer.papers:{entry.name} names {entry.value}, which is no package here; reinstall that package")
    return read_card(Path(next(iter(spec.submodule_search_locations))) / "paper.toml", entry.value)


@cache
def _catalogue() -> tuple[tuple[Card, ...], tuple[str, ...]]:
    """All cards, and one line for each installed package whose card cannot be had."""
    found = {card.slug: card for card in (read_card(file, package) for file, package in own_folders())}
    troubles = []
    for entry in entry_points(group="fewer.papers"):
        try:
            card = outside_card(entry)
            if card.slug in found:
                raise UserError(f"its method is called {card.slug}, as {found[card.slug].package} is; rename it")
        except UserError as error:
            troubles.append(plain(f"{entry.value} is left out: {error}"))
        else:
            found[card.slug] = card
    return tuple(sorted(found.values(), key=lambda card: (card.area, card.slug))), tuple(troubles)


def cards() -> tuple[Card, ...]:
    """All cards, by area and slug; an installed package whose card cannot be read is left out (`troubles` says why)."""
    return _catalogue()[0]


def troubles() -> list[str]:
    """One line for each installed package that is left out, or whose record cannot be read, with its name and the reason."""
    return [*_catalogue()[1], *(card.trouble for card in cards() if card.trouble)]


def find(slug: str) -> Card:
    """The card of one method; UserError with the nearest slug where there is none.

    >>> find("backprop-free-mlps").saves[0]
    'backward passes'
    """
    by_slug = {card.slug: card for card in (*cards(), *house_studies())}
    if slug in by_slug:
        return by_slug[slug]
    raise UserError(f"there is no method {slug!r}{did_you_mean(slug, by_slug)}; `fewer list` shows all {len(cards())}")


def did_you_mean(word: str, known: Any) -> str:
    """ ": did you mean 'x'?" for the nearest of the known words, or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f": did you mean {near[0]!r}?" if near else ""


def choose(found: Iterable[Card], *, area: str | None = None, saves: Iterable[str] = (), applies_to: Iterable[str] = ()) -> list[Card]:
    """The cards of an area that save all of `saves` and apply to all of `applies_to`; UserError on a word that no list has."""
    cards_of_all = list(found)
    areas = sorted({card.area for card in cards_of_all})
    for option, words, known in (
        ("--area", [area] if area else [], areas),
        ("--saves", list(saves), get_args(Saves)),
        ("--applies-to", list(applies_to), get_args(AppliesTo)),
    ):
        for word in words:
            if word not in known:
                raise UserError(f"{option} {word}: expected one of {', '.join(known)}{did_you_mean(word, known)}")
    return [
        card
        for card in cards_of_all
        if area in (None, card.area) and set(saves) <= set(card.saves) and set(applies_to) <= set(card.applies_to)
    ]


def search(words: str) -> list[Card]:
    """The cards in which every word stands, best match first (slug and title count most).

    >>> [card.slug for card in search("small cnns")]
    ['backprop-free-mlps']
    """
    wanted = words.casefold().split()

    def score(card: Card) -> int:
        head = f"{card.slug} {card.title} {card.summary}".casefold()
        body = " ".join(
            [head, card.area, card.replaces, *card.saves, *card.applies_to, *card.works_with, *card.peers, *card.authors]
        ).casefold()
        if not all(word in body for word in wanted):
            return 0
        return 1 + sum(2 * (word in card.slug) + (word in head) for word in wanted)

    scored = [(score(card), card) for card in cards()]
    return [card for points, card in sorted(scored, key=lambda pair: -pair[0]) if points]
