"""The store: one writer, kept through kills and full disks, refusing what it cannot read."""

from __future__ import annotations

import contextlib
import csv
import ctypes
import math
import os
import random
import shutil
import sqlite3
import subprocess
import sys

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fewer.errors import UserError
from fewer.study import RaceOutcome, Scale, Store
from fewer.study.export import export
from fewer.study.recording import Record
from fewer.study.store import APPLICATION_ID, MIGRATIONS
from fewer.study.trial import FigureEvent, FinishedEvent, TrialSpec
from house import command, command_environment

KILLS = 30


def spec(seed=0, **settings):
    return TrialSpec("guessing.study", "guessing", "mean", seed, Scale.QUICK, settings)


def fill(store, one, *values, status="done"):
    number = store.begin(one, {})
    for value in values:
        store.add_figure(number, FigureEvent("error", value, {"size": 2}))
    store.finish(number, FinishedEvent(status, 0.1, 1000), {"note": "words"})


@pytest.fixture
def path(tmp_path):
    return tmp_path / "runs" / "store.sqlite"


def test_figures_come_back_as_they_were_written_nan_and_infinity_included(path):
    with Store(path, write=True) as store:
        fill(store, spec(), 0.25, None, math.inf)
    with Store(path) as store:
        values = [row.value for row in store.rows([spec()])]
        assert values[0] == 0.25
        assert math.isnan(values[1])
        assert values[2] == math.inf
        assert store.trials("guessing")[0].notes == {"note": "words"}


def test_only_finished_trials_count_and_a_repeated_one_replaces_the_former(path):
    with Store(path, write=True) as store:
        fill(store, spec(), 1.0, status="failed")
        assert store.rows([spec()]) == []
        assert store.finished([spec()]) == {}
        fill(store, spec(), 2.0)
        assert [row.value for row in store.rows([spec()])] == [2.0]
        assert len(store.trials()) == 1
        assert store.finished([spec(size=3)]) == {}, "other settings are another trial"


def test_a_second_writer_is_refused_and_readers_are_not(path):
    with Store(path, write=True) as first:
        fill(first, spec(), 1.0)
        with pytest.raises(UserError, match="another fewer process is writing"):
            Store(path, write=True)
        with Store(path) as reader:
            assert len(reader.trials()) == 1
    Store(path, write=True).close()


def test_a_store_of_a_newer_version_is_refused_and_left_alone(path):
    with Store(path, write=True) as store:
        fill(store, spec(), 1.0)
    with sqlite3.connect(path) as db:
        db.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    before = path.read_bytes()
    for write in (False, True):
        with pytest.raises(UserError, match=r"made by a newer fewer .*upgrade fewer"):
            Store(path, write=write)
    assert path.read_bytes() == before


def test_a_store_of_the_first_version_is_brought_up_to_date_with_its_trials(path):
    path.parent.mkdir()
    with sqlite3.connect(path) as db:
        db.executescript(f"{MIGRATIONS[0]} PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = 1;")
        db.execute(
            "INSERT INTO trials (key, slug, arm, seed, scale, settings, device, status, started) VALUES (x'00', 'guessing', 'a', 0, 'quick', '{}', 'cpu', 'done', 0)"
        )
    db.close()
    with Store(path) as store:
        assert [trial.arm for trial in store.trials()] == ["a"]
        assert store.races("guessing", RaceOutcome) == []


def test_paths_that_are_no_store_are_refused_in_one_line(tmp_path):
    (tmp_path / "text").write_text("no database at all, but long enough to be read as one " * 20)
    with sqlite3.connect(tmp_path / "other.sqlite") as db:
        db.execute("CREATE TABLE recipes (name TEXT)")
    db.close()
    for name, message in (
        ("", "this is a directory"),
        ("text", "not an SQLite file"),
        ("other.sqlite", "of another program"),
        ("text/below", "cannot be written"),
    ):
        with pytest.raises(UserError, match=message):
            Store(tmp_path / name, write=True)
    with pytest.raises(UserError, match="there is no store yet"):
        Store(tmp_path / "none.sqlite")
    assert (tmp_path / "text").read_text().startswith("no database")


def give_up_the_right_to_ignore_permissions():
    """Root ignores permission bits by the capability DAC_OVERRIDE; a program started after this has it no more."""
    ctypes.CDLL(None).prctl(24, 1)  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE


def test_a_read_only_store_is_refused(path):
    with Store(path, write=True) as store:
        fill(store, spec(), 1.0)
    for file in path.parent.iterdir():
        file.chmod(0o444)
    path.parent.chmod(0o555)
    script = "import sys\nfrom fewer.study import Store\nfrom fewer.errors import UserError\ntry: Store(sys.argv[1], write=True)\nexcept UserError as error: print(error)"
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], preexec_fn=give_up_the_right_to_ignore_permissions, capture_output=True, text=True
    )
    path.parent.chmod(0o755)
    assert "cannot be written" in done.stdout, done.stderr
    assert done.stdout.count("\n") == 1


def test_a_full_disk_is_told_in_one_line_and_loses_nothing_written_before(path):
    """RLIMIT_FSIZE makes the file unable to grow, which SQLite meets as it meets a full disk."""
    script = f"""
import resource, sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
from test_store import fill, spec
from fewer.errors import UserError
from fewer.study import Store
store = Store(sys.argv[1], write=True)
fill(store, spec(0), 1.0, 2.0)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    for seed in range(1, 10_000):
        fill(store, spec(seed), *[0.5] * 100)
except UserError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True)
    assert "the disk is full or the file may not grow" in done.stdout, done.stderr
    assert done.stdout.count("\n") == 1
    with Store(path, write=True) as store:
        assert [row.value for row in store.rows([spec(0)])] == [1.0, 2.0]
        fill(store, spec(99_999), 3.0)


def integrity(path):
    with sqlite3.connect(path) as db:
        found = db.execute("PRAGMA integrity_check").fetchone()[0]
        done = {key: (figures, error) for key, figures, error in db.execute(
            "SELECT key, (SELECT count(*) FROM figures WHERE trial = trials.id), error FROM trials WHERE status = 'done'")}  # fmt: skip
    db.close()
    return found, done


@pytest.mark.alone
def test_thirty_kills_leave_a_whole_store_with_every_finished_trial_and_the_run_completes(outside, tmp_path):
    """Every other kill comes at any moment from the start, the others at any moment from the first finished trial."""
    path = tmp_path / "fewer-runs" / "store.sqlite"
    words = command("run", "guessing", "--seeds", "100", "--quiet")
    environment, draw, kept = command_environment(outside), random.Random(0), {}
    for kill in range(KILLS):
        with subprocess.Popen(
            words, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as process:
            if kill % 2:
                assert ": done" in next(line for line in process.stderr if line.startswith("["))
            try:
                process.wait(draw.uniform(0, 0.5) if kill % 2 else draw.uniform(0.2, 2.0))
                raise AssertionError("the run ended before it was killed")
            except subprocess.TimeoutExpired:
                process.kill()
        if path.exists():
            found, done = integrity(path)
            assert found == "ok"
            assert kept.items() <= done.items(), "a finished trial was lost"
            kept = done
    assert len(kept) >= KILLS // 2
    subprocess.run(words, cwd=tmp_path, env=environment, check=True, capture_output=True)
    found, done = integrity(path)
    assert found == "ok"
    assert len(done) == 300
    assert kept.items() <= done.items()


# Export


def test_csv_and_parquet_hold_every_figure(path, tmp_path):
    import pyarrow.parquet

    with Store(path, write=True) as store:
        fill(store, spec(), 0.25, None)
    with Store(path) as store:
        assert export(store, str(tmp_path / "f.csv"), "csv") == 2
        assert export(store, str(tmp_path / "f.parquet"), "parquet", "guessing") == 2
        with pytest.raises(UserError, match="no finished trial of other"):
            export(store, str(tmp_path / "f.csv"), "csv", "other")
        with pytest.raises(UserError, match="expected one of csv, parquet, mlflow"):
            export(store, "f", "xls")
    rows = list(csv.DictReader((tmp_path / "f.csv").open()))
    assert [(row["figure"], row["value"], row["coordinates"]) for row in rows] == [
        ("error", "0.25", '{"size": 2}'),
        ("error", "nan", '{"size": 2}'),
    ]
    columns = pyarrow.parquet.read_table(tmp_path / "f.parquet").to_pydict()
    assert columns["value"][0] == 0.25
    assert math.isnan(columns["value"][1])


def test_mlflow_gets_a_run_a_trial_with_curves_and_nan_told_apart(path, tmp_path):
    import mlflow

    with Store(path, write=True) as store:
        fill(store, spec(shape="flat"), 0.25, None)
    with Store(path) as store:
        export(store, f"sqlite:///{tmp_path}/mlflow.sqlite", "mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.sqlite")
    runs = client.search_runs([client.get_experiment_by_name("fewer/guessing").experiment_id])
    assert runs[0].data.params["shape"] == "flat"
    assert runs[0].data.tags["nan.error"] == "NaN"
    assert [(point.value, point.step) for point in client.get_metric_history(runs[0].info.run_id, "error")] == [(0.25, 2)]


# Paths and damage


@pytest.mark.parametrize("name", ["a?b.sqlite", "a%41b.sqlite", "a#b.sqlite", "a?mode=memory", "a b'ü.sqlite"])
def test_a_store_lies_where_it_was_asked_for_whatever_its_name(tmp_path, name):
    with Store(tmp_path / name, write=True) as store:
        fill(store, spec(), 0.25)
    assert {file.name for file in tmp_path.iterdir()} <= {name, f"{name}.lock"}
    with Store(tmp_path / name) as store:
        assert [row.value for row in store.rows([spec()])] == [0.25]


@pytest.mark.parametrize("place", ["", "folder", "pipe", "n" * 256, "file/below"])
def test_a_place_that_is_none_for_a_store_is_refused_in_one_line(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    os.mkfifo("pipe")
    with pytest.raises(UserError, match=r"^--store [^\n]*$"):
        Store(place, write=True)
    assert sorted(os.listdir()) == ["file", "folder", "pipe"]


def test_a_store_removed_while_it_is_written_to_ends_the_run_with_an_error(tmp_path):
    with Store(tmp_path / "runs" / "store.sqlite", write=True) as store:
        number = store.begin(spec(), {})
        shutil.rmtree(tmp_path / "runs")
        with pytest.raises(UserError, match="was removed or replaced while it was written to"):
            store.finish(number, FinishedEvent("done", 1.0, 0), {})


DAMAGE = [
    "DROP TABLE figures",
    "DROP TABLE records",
    "ALTER TABLE trials DROP COLUMN notes",
    "UPDATE trials SET settings = 'no json'",
    "UPDATE trials SET settings = '[1]'",
    "UPDATE trials SET notes = '3'",
    "UPDATE trials SET environment = x'ff00'",
    "UPDATE trials SET seconds = 'long'",
    "UPDATE figures SET value = 'much'",
    "UPDATE figures SET coordinates = '{'",
    "UPDATE races SET outcome = 'noise'",
    "UPDATE records SET record = x'00'",
    "UPDATE records SET record = '{}'",
]


def read_all(path):
    """Whatever a verb reads of a store."""
    with Store(path) as store:
        store.finished([spec()])
        store.rows([spec()])
        store.trials()
        store.table()
        store.races("guessing", RaceOutcome)
        store.record("guessing", Record)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_store_is_told_in_one_line(path, damage):
    with Store(path, write=True) as store:
        fill(store, spec(), 0.25)
        store.save_race("guessing", "a race", msgspec.json.encode(RaceOutcome("a race", "a peer", "time", None, "s")), "today")
        store.save_record("guessing", b"{}")
    if "records" not in damage:
        with contextlib.closing(sqlite3.connect(path)) as db, db:
            db.execute("DELETE FROM records")
        read_all(path)
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute(damage)
    with pytest.raises(UserError, match=r"^--store [^\n]*damaged store[^\n]*$"):
        read_all(path)


def test_noise_that_sqlite_quotes_in_its_words_is_told_as_damage(tmp_path):
    path = tmp_path / "noise.sqlite"
    with Store(path, write=True) as store:
        fill(store, spec(), 0.25)
    raw = path.read_bytes()
    assert raw.count(b"CREATE TABLE trials") == 1
    path.write_bytes(raw.replace(b"CREATE TABLE trials", b"CREATE \x80ABLE trials"))
    with pytest.raises(UserError, match=r"^--store [^\n]*$"):
        read_all(path)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_noise_in_a_stores_bytes_is_read_or_refused_in_one_line(tmp_path, data):
    path = tmp_path / "noise.sqlite"
    for file in tmp_path.glob("noise.sqlite*"):
        file.unlink()
    with Store(path, write=True) as store:
        fill(store, spec(), 0.25)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    with contextlib.suppress(UserError):  # and nothing else is raised
        read_all(path)
