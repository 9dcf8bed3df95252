"""The store: trials, their figures, tuned settings and races, in one SQLite file with one writer.

Figures are written as they come. The file is in WAL mode, so whatever happens to the process (`kill -9`, a full disk), every trial that
was told finished is kept and the file stays whole; a trial that was cut off is taken out when the next writer opens the store.
"""

from __future__ import annotations

import contextlib
import json
import math
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import filelock
import msgspec

from fewer.errors import UserError
from fewer.plain import plain, plain_all
from fewer.study.results import Row
from fewer.study.trial import FigureEvent, FinishedEvent, PictureEvent, TrialSpec

T = TypeVar("T")
APPLICATION_ID = 0x66657772  # "fewr"
COMMIT_EVERY = 0.5  # seconds between commits while figures stream in
DEFAULT_STORE = "fewer-runs/store.sqlite"

# Each entry takes a store from the version of its index to the next.
MIGRATIONS = (
    """
    CREATE TABLE trials (
        id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, slug TEXT NOT NULL, arm TEXT NOT NULL, seed INTEGER NOT NULL, scale TEXT NOT NULL,
        settings TEXT NOT NULL, device TEXT NOT NULL, status TEXT NOT NULL, error TEXT NOT NULL DEFAULT '', started REAL NOT NULL,
        seconds REAL, peak_memory INTEGER, notes TEXT NOT NULL DEFAULT '{}', environment TEXT NOT NULL DEFAULT '{}');
    CREATE TABLE figures (
        trial INTEGER NOT NULL REFERENCES trials ON DELETE CASCADE, name TEXT NOT NULL, coordinates TEXT NOT NULL,
        value REAL);  -- NULL is NaN, which SQLite cannot hold
    CREATE INDEX figures_by_trial ON figures (trial);
    CREATE TABLE tunings (
        slug TEXT NOT NULL, arm TEXT NOT NULL, scale TEXT NOT NULL, options TEXT NOT NULL, settings TEXT NOT NULL, objective REAL NOT NULL,
        trials INTEGER NOT NULL, pruned INTEGER NOT NULL, date TEXT NOT NULL, PRIMARY KEY (slug, arm, scale, options));
    """,
    """
    CREATE TABLE races (
        slug TEXT NOT NULL, name TEXT NOT NULL, outcome BLOB NOT NULL, date TEXT NOT NULL, PRIMARY KEY (slug, name));
    CREATE TABLE records (slug TEXT NOT NULL PRIMARY KEY, record BLOB NOT NULL);
    """,
    """
    CREATE TABLE pictures (trial INTEGER NOT NULL REFERENCES trials ON DELETE CASCADE, name TEXT NOT NULL, png BLOB NOT NULL);
    CREATE INDEX pictures_by_trial ON pictures (trial);
    """,
)


class StoredTrial(msgspec.Struct, frozen=True):
    """A trial as the store holds it."""

    slug: str
    arm: str
    seed: int
    scale: str
    settings: dict[str, Any]
    status: str
    error: str
    started: float
    seconds: float | None
    peak_memory: int | None
    notes: dict[str, str]
    environment: dict[str, Any]


class Tuning(msgspec.Struct, frozen=True):
    """The best settings that a tuning found for an arm, and how."""

    settings: dict[str, Any]
    objective: float
    trials: int
    pruned: int
    date: str


# What SQLite says of a damaged file; its words may quote the damage, and are then no text
BROKEN = (sqlite3.Error, UnicodeDecodeError)


class Store:
    """A store opened for reading, or by its one writer.

    Args:
        path: the SQLite file (also as sqlite:///PATH); the folder is made where it is missing.
        write: open as the writer; UserError where another process is.

    Use it as a context manager, or call `close`.
    """

    def __init__(self, path: str | Path = DEFAULT_STORE, *, write: bool = False) -> None:
        self.path = Path(str(path).removeprefix("sqlite:///"))
        self._lock = filelock.FileLock(f"{self.path}.lock", timeout=0) if write else None
        self._committed = time.monotonic()
        self._check_path(write)
        try:
            self._open(write)
        except BROKEN as error:
            self.close()
            raise _plainly(self.path, error) from error
        except UserError:
            self.close()
            raise

    def _check_path(self, write: bool) -> None:
        try:
            there = self.path.exists()
        except (OSError, ValueError) as error:
            raise UserError(f"--store {str(self.path)[:60]}: no path of a file ({error}); choose another --store") from None
        if self.path.is_dir():
            raise UserError(f"--store {self.path}: this is a directory; expected a file, such as {self.path / 'store.sqlite'}")
        if there and not self.path.is_file():
            raise UserError(f"--store {self.path}: no regular file; choose another --store")
        if not write:
            if not there:
                raise UserError(f"--store {self.path}: there is no store yet; `fewer run SLUG` makes one")
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            assert self._lock is not None
            self._lock.acquire()
        except filelock.Timeout:
            raise UserError(
                f"--store {self.path}: another fewer process is writing to it; wait for it, or choose another --store"
            ) from None
        except OSError as error:
            raise UserError(f"--store {self.path}: cannot be written ({error.strerror}); choose another --store") from error

    def _open(self, write: bool) -> None:
        mode = "rwc" if write else "ro"
        # quoted: SQLite reads ? and % of a URI for itself
        self._db = sqlite3.connect(f"file:{quote(str(self.path.absolute()))}?mode={mode}", uri=True, isolation_level=None)
        self._db.text_factory = lambda raw: raw.decode("utf8", "replace")
        version = self._version()
        if version > len(MIGRATIONS):
            raise UserError(
                f"--store {self.path}: made by a newer fewer (store version {version}, this one reads up to {len(MIGRATIONS)}); upgrade fewer"
            )
        if not write:
            if version < len(MIGRATIONS):
                Store(self.path, write=True).close()
            return self._check_tables()
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("PRAGMA foreign_keys = ON")
        for step, script in enumerate(MIGRATIONS[version:], start=version + 1):
            self._db.executescript(f"BEGIN; {script} PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {step}; COMMIT;")
        self._check_tables()
        self._file = self.path.stat().st_ino
        self._db.execute("DELETE FROM trials WHERE status = 'running'")

    def _check_tables(self) -> None:
        """UserError where a table or a column that this version writes is not there."""
        for table, columns in _tables().items():
            have = {row[1] for row in self._db.execute(f"PRAGMA table_info({table})")}
            if not columns <= have:
                lacks = f"its table {table} lacks {', '.join(sorted(columns - have))}" if have else f"it has no table {table}"
                raise UserError(f"--store {self.path}: a damaged store ({lacks}); choose another --store")

    def _check_there(self) -> None:
        """UserError where the file was moved or removed: what is written would be lost with it."""
        try:
            same = self.path.stat().st_ino == self._file
        except OSError:
            same = False
        if not same:
            raise UserError(f"--store {self.path}: the file was removed or replaced while it was written to; run again")

    def _select(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """The rows of a query; UserError where the file cannot be read."""
        try:
            return self._db.execute(query, values).fetchall()
        except BROKEN as error:
            raise _plainly(self.path, error) from error

    def _read(self, row: Callable[[], T], what: str) -> T:
        """What is made of a row's text; UserError where that is noise."""
        try:
            return row()
        except (ValueError, TypeError, msgspec.DecodeError, RecursionError) as error:
            raise UserError(f"--store {self.path}: a damaged store ({what}: {plain(str(error))}); choose another --store") from error

    def _version(self) -> int:
        """The store's version, 0 for an empty file; UserError where the file is another program's."""
        application, version = self._pragma("application_id"), self._pragma("user_version")
        tables = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if tables and application != APPLICATION_ID:
            raise UserError(f"--store {self.path}: an SQLite file of another program; choose another --store")
        return version

    def _pragma(self, name: str) -> int:
        return self._db.execute(f"PRAGMA {name}").fetchone()[0]

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and let the next writer in."""
        if hasattr(self, "_db"):
            self._db.close()
        if self._lock is not None:
            self._lock.release()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing; UserError where the file cannot be written."""
        try:
            if not self._db.in_transaction:
                self._db.execute("BEGIN IMMEDIATE")
            yield self._db
            self._db.execute("COMMIT")
            self._committed = time.monotonic()
        except BROKEN as error:
            self._roll_back()
            raise _plainly(self.path, error) from error

    def _roll_back(self) -> None:
        with contextlib.suppress(*BROKEN):
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")

    # Trials

    def finished(self, specs: Iterable[TrialSpec]) -> dict[bytes, StoredTrial]:
        """Of these trials, those that are done, by key."""
        found = {}
        for spec in specs:
            query = f"SELECT {', '.join(StoredTrial.__struct_fields__)} FROM trials WHERE key = ? AND status = 'done'"
            for row in self._select(query, [spec.key]):
                found[spec.key] = self._read(lambda row=row: _stored_trial(row), f"trial {spec.arm}, seed {spec.seed}")
        return found

    def begin(self, spec: TrialSpec, environment: Mapping[str, Any]) -> int:
        """Note that a trial runs (a former try at it is taken out); its number."""
        with self._transaction() as db:
            db.execute("DELETE FROM trials WHERE key = ?", [spec.key])
            cursor = db.execute(
                "INSERT INTO trials (key, slug, arm, seed, scale, settings, device, status, started, environment) VALUES (?, ?, ?, ?, ?, ?, ?, 'running', ?, ?)",
                [spec.key, spec.slug, spec.arm, spec.seed, spec.scale, _json(spec.settings), spec.device, time.time(), _json(environment)],
            )
            assert cursor.lastrowid is not None
            return cursor.lastrowid

    def add_figure(self, trial: int, figure: FigureEvent) -> None:
        """Write one figure of a running trial."""
        self._stream("INSERT INTO figures VALUES (?, ?, ?, ?)", [trial, figure.name, _json(figure.coordinates), figure.value])

    def add_picture(self, trial: int, picture: PictureEvent) -> None:
        """Write one sheet of pictures of a running trial."""
        self._stream("INSERT INTO pictures VALUES (?, ?, ?)", [trial, picture.name, picture.png])

    def _stream(self, query: str, values: Sequence[Any]) -> None:
        """Write a row that may be committed together with the next ones."""
        try:
            if not self._db.in_transaction:
                self._db.execute("BEGIN IMMEDIATE")
            self._db.execute(query, values)
            if time.monotonic() - self._committed > COMMIT_EVERY:
                self._db.execute("COMMIT")
                self._committed = time.monotonic()
        except BROKEN as error:
            self._roll_back()
            raise _plainly(self.path, error) from error

    def finish(self, trial: int, finished: FinishedEvent, notes: Mapping[str, str]) -> None:
        """Note how a trial ended; from here on it is kept."""
        self._check_there()
        with self._transaction() as db:
            db.execute(
                "UPDATE trials SET status = ?, error = ?, seconds = ?, peak_memory = ?, notes = ? WHERE id = ?",
                [finished.status, finished.error, finished.seconds, finished.peak_memory, _json(notes), trial],
            )

    def forget(self, trial: int) -> None:
        """Take out a trial that was broken off."""
        with self._transaction() as db:
            db.execute("DELETE FROM trials WHERE id = ?", [trial])

    def forget_trials(self, specs: Iterable[TrialSpec]) -> None:
        """Take out these trials, to start over."""
        with self._transaction() as db:
            db.executemany("DELETE FROM trials WHERE key = ?", [[spec.key] for spec in specs])

    def rows(self, specs: Iterable[TrialSpec]) -> list[Row]:
        """All figures of those of these trials that are done."""
        found = []
        for spec in specs:
            query = "SELECT name, coordinates, value FROM figures JOIN trials ON trials.id = trial WHERE key = ? AND status = 'done' ORDER BY figures.rowid"
            for name, coordinates, value in self._select(query, [spec.key]):
                what = f"figure {name} of {spec.arm}, seed {spec.seed}"
                found.append(
                    Row(
                        spec.arm,
                        spec.seed,
                        name,
                        self._read(lambda text=coordinates: _object(text), what),
                        self._read(lambda number=value: _number(number), what),
                    )
                )
        return found

    def pictures(self, specs: Iterable[TrialSpec]) -> dict[str, dict[str, bytes]]:
        """name -> arm -> the sheet of the first of these trials that is done and has one."""
        found: dict[str, dict[str, bytes]] = {}
        for spec in specs:
            query = (
                "SELECT name, png FROM pictures JOIN trials ON trials.id = trial WHERE key = ? AND status = 'done' ORDER BY pictures.rowid"
            )
            for name, png in self._select(query, [spec.key]):
                found.setdefault(self._read(lambda text=name: plain(text), "a picture's name"), {}).setdefault(spec.arm, bytes(png))
        return found

    def trials(self, slug: str | None = None) -> list[StoredTrial]:
        """All trials of one study, or of all."""
        query = f"SELECT {', '.join(StoredTrial.__struct_fields__)} FROM trials WHERE slug = coalesce(?, slug) ORDER BY id"
        return [self._read(lambda row=row: _stored_trial(row), f"trial {row[1]}, seed {row[2]}") for row in self._select(query, [slug])]

    def table(self, slug: str | None = None) -> list[dict[str, Any]]:
        """Every figure of every finished trial as a flat record, for export."""
        query = """SELECT slug, arm, seed, scale, device, settings, name, coordinates, value FROM figures JOIN trials ON trials.id = trial
                   WHERE status = 'done' AND slug = coalesce(?, slug) ORDER BY trials.id, figures.rowid"""
        names = ("slug", "arm", "seed", "scale", "device", "settings", "figure", "coordinates", "value")
        records = [dict(zip(names, row, strict=True)) for row in self._select(query, [slug])]
        return [
            record | {"value": self._read(lambda record=record: _number(record["value"]), f"figure {record['figure']} of {record['arm']}")}
            for record in records
        ]

    # Tunings and races

    def save_tuning(self, slug: str, arm: str, scale: str, options: Mapping[str, Any], tuning: Tuning) -> None:
        with self._transaction() as db:
            row = [slug, arm, scale, _json(options), _json(tuning.settings), tuning.objective, tuning.trials, tuning.pruned, tuning.date]
            db.execute("INSERT OR REPLACE INTO tunings VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)

    def tuning(self, slug: str, arm: str, scale: str, options: Mapping[str, Any]) -> Tuning | None:
        query = "SELECT settings, objective, trials, pruned, date FROM tunings WHERE slug = ? AND arm = ? AND scale = ? AND options = ?"
        rows = self._select(query, [slug, arm, scale, _json(options)])
        return self._read(lambda: Tuning(_object(rows[0][0]), *rows[0][1:]), f"tuning of {arm}") if rows else None

    def save_race(self, slug: str, name: str, outcome: bytes, date: str) -> None:
        """Keep the outcome of a race (JSON) in place of a former one."""
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO races VALUES (?, ?, ?, ?)", [slug, name, outcome, date])

    def races(self, slug: str, kind: type[T]) -> list[T]:
        """The last outcome of each race of a method, as the `kind` that was saved."""
        rows = self._select("SELECT name, outcome FROM races WHERE slug = ? ORDER BY rowid", [slug])
        return [self._read(lambda outcome=outcome: msgspec.json.decode(outcome, type=kind), f"race {name}") for name, outcome in rows]

    def save_record(self, slug: str, record: bytes) -> None:
        """Keep the record (JSON) of a method's last run here, for the report."""
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO records VALUES (?, ?)", [slug, record])

    def record(self, slug: str, kind: type[T]) -> T | None:
        """The record of a method's last run here, as the `kind` that was saved."""
        rows = self._select("SELECT record FROM records WHERE slug = ?", [slug])
        return self._read(lambda: msgspec.convert(plain_all(msgspec.json.decode(rows[0][0])), kind), f"record of {slug}") if rows else None


def _stored_trial(row: Sequence[Any]) -> StoredTrial:
    fields = dict(zip(StoredTrial.__struct_fields__, row, strict=True))
    return msgspec.convert(fields | {name: plain_all(_object(fields[name])) for name in ("settings", "notes", "environment")}, StoredTrial)


def _object(text: str) -> dict[str, Any]:
    """The object that a text of the store says."""
    read = json.loads(text)
    if not isinstance(read, dict):
        raise ValueError(f"{text[:40]!r} is no object")
    return read


def _number(value: Any) -> float:
    """A figure's value; NULL is NaN."""
    if not isinstance(value, float | int | None):
        raise ValueError(f"{value!r} is no number")
    return math.nan if value is None else value


@cache
def _tables() -> dict[str, set[str]]:
    """table -> its columns, as the migrations make them."""
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        db.executescript("".join(MIGRATIONS))
        names = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {name: {row[1] for row in db.execute(f"PRAGMA table_info({name})")} for name in names}


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(dict(value), sort_keys=True)


def _plainly(path: Path, error: Exception) -> UserError:
    """What an SQLite error means for the user."""
    text = str(error)
    if "not a database" in text:
        return UserError(f"--store {path}: not an SQLite file; choose another --store")
    if "full" in text or "disk I/O" in text:
        return UserError(
            f"--store {path}: the disk is full or the file may not grow ({text}); what was written before is kept: make room and run again"
        )
    if "readonly" in text or "unable to open" in text:
        return UserError(f"--store {path}: cannot be written ({text}); choose another --store")
    return UserError(f"--store {path}: {text}; check the file with `sqlite3 {path} 'pragma integrity_check'` or choose another --store")
