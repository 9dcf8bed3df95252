"""`fewer advise` from the outside: a third party's method takes part by its card and study alone, and whatever goes wrong costs one line."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess

import msgspec
import psutil
import pytest

from fewer.advise import advising
from fewer.advise.answer import left_of, pays
from fewer.advise.reading import Point, Spread
from fewer.advise.things import Thing
from fewer.cli.advise import duration, share
from fewer.errors import UserError
from house import command, command_environment


@pytest.fixture
def numbers(tmp_path):
    file = tmp_path / "numbers.txt"
    file.write_text(" ".join(str((i / 40) ** 2) for i in range(40)))
    return file


def test_a_third_partys_method_takes_part(fewer, numbers):
    said = json.loads(fewer("advise", numbers.name, "--only", "guessing", "--keep", "100%", "--json").stdout)
    assert said["about"] == "40 numbers"
    (group,) = said["groups"]
    assert (group["job"], group["measure"]) == ("asking it", "error of the guess")
    (line,) = group["lines"]
    assert (line["slug"], line["arm"], line["beside"]) == ("guessing", "the mean", "median")
    assert line["point"]["lost"]["seeds"] == 3
    assert set(line["point"]["costs"]) == {"seconds"}
    assert line["command"] == "fewer guess numbers.txt"


def test_what_applies_and_what_does_not_is_said_with_its_reason(fewer, numbers):
    done = fewer("advise", numbers.name, "--budget", "60s", "--keep", "0")
    assert done.stderr.splitlines()[0] == "numbers.txt: 40 numbers"
    assert "  cfsp: applies to a transformers causal LM" in done.stdout.splitlines()
    assert "guessing" in done.stdout
    assert done.stdout.splitlines()[-1].startswith(("None pays:", "For asking it", "  fewer guess"))


def test_a_second_call_runs_nothing_again_and_a_changed_thing_is_another(fewer, numbers, tmp_path):
    words = ("advise", numbers.name, "--only", "guessing", "--json")
    first = fewer(*words)
    again = fewer(*words, "--keep", "50%")
    assert "trials" in first.stderr
    assert "trials" not in again.stderr
    numbers.write_text("1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20")
    assert "trials" in fewer(*words).stderr
    assert len(list((tmp_path / "fewer-runs").glob("advise-*.sqlite"))) == 2


def test_killed_in_the_middle_it_goes_on_where_it_was(outside, tmp_path, numbers):
    slow = numbers.rename(tmp_path / "slow.txt")
    words = command("advise", slow.name, "--only", "guessing", "--json", "--store", "kept.sqlite")
    process = subprocess.Popen(
        words, cwd=tmp_path, env=command_environment(outside), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    (tmp_path / "go").touch()
    for line in process.stderr:
        if line.startswith("[1/"):
            (tmp_path / "go").unlink()  # from here on a trial waits
            break
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with sqlite3.connect(tmp_path / "kept.sqlite") as db:
        kept = db.execute("SELECT count(*) FROM trials WHERE status = 'done'").fetchone()[0]
    assert kept >= 1
    (tmp_path / "go").touch()
    again = subprocess.run(words, cwd=tmp_path, env=command_environment(outside), capture_output=True, text=True, check=True)
    assert "1 done before" in again.stderr or kept > 1
    assert json.loads(again.stdout)["groups"][0]["lines"][0]["point"]["lost"]["seeds"] == 3


def test_ctrl_c_says_that_it_can_go_on(outside, tmp_path, numbers):
    slow = numbers.rename(tmp_path / "slow.txt")
    process = subprocess.Popen(
        command("advise", slow.name, "--only", "guessing"), cwd=tmp_path, env=command_environment(outside), stderr=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("preparing"):
            os.killpg(process.pid, signal.SIGINT)
            break
    rest = process.communicate()[1]
    assert process.returncode == 130
    assert "the same command goes on from there" in " ".join(rest.split())


def test_too_little_time_is_said_and_nothing_is_advised(fewer, numbers, tmp_path):
    slow = numbers.rename(tmp_path / "slow.txt")  # nobody says go
    done = fewer("advise", slow.name, "--only", "guessing", "--budget", "1s")
    assert "Did not fit into the time:" in done.stdout
    assert "Nothing was tried to the end" in done.stdout


def test_a_refusal_of_the_study_is_told_and_the_rest_goes_on(fewer, numbers, tmp_path):
    wide = numbers.rename(tmp_path / "wide.txt")
    done = fewer("advise", wide.name, "--only", "guessing")
    assert "  guessing: these numbers are too wide for it" in done.stdout.splitlines()


def test_the_page_replaces_its_own_and_nothing_else(fewer, numbers, tmp_path):
    words = ("advise", numbers.name, "--only", "guessing", "--keep", "100%", "--page")
    fewer(*words, "answer.html")
    page = (tmp_path / "answer.html").read_text()
    assert "<svg" in page
    assert "error of the guess" in page
    fewer(*words, "answer.html")
    (tmp_path / "mine.html").write_text("years of work")
    refused = fewer(*words, "mine.html", status=2)
    assert refused.stderr.startswith("error: --page mine.html")
    assert (tmp_path / "mine.html").read_text() == "years of work"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("absent",), "'absent' is not there"),
        (("numbers.txt", "--keep", "lots"), "--keep lots: expected a share"),
        (("numbers.txt", "--keep", "101%"), "--keep 101%: expected a share"),
        (("numbers.txt", "--budget", "soon"), "--budget soon: expected a time"),
        (("numbers.txt", "--budget", "0s"), "--budget 0s: expected a time"),
        (("numbers.txt", "--saves", "memories"), "--saves memories: expected one of"),
        (("numbers.txt", "--only", "gessing"), "there is no method 'gessing': did you mean 'guessing'"),
        (("numbers.txt", "--text", "absent.txt"), "--text absent.txt: no such file"),
        ((".",), ". is a directory with neither"),
    ],
)
def test_a_mistake_costs_one_line(fewer, numbers, words, said):
    done = fewer("advise", *words, status=2)
    assert done.stderr.startswith(f"error: {said}")
    assert len(done.stderr.splitlines()) == 1
    assert not (numbers.parent / "fewer-runs").exists()


def test_a_thing_larger_than_the_memory_is_refused_before_it_is_read():
    whole = psutil.virtual_memory().total
    with pytest.raises(UserError, match="huge needs about .* in float32 with room to work"):
        advising.check_memory(Thing("huge", ("a transformers causal LM",), "huge", "huge", memory=whole))
    advising.check_memory(Thing("small", ("a transformers causal LM",), "small", "small", memory=1000))


def test_shares_and_times():
    assert [share(text) for text in ("1%", "0.01", "0", "100 %")] == [0.01, 0.01, 0.0, 1.0]
    assert [duration(text) for text in ("90s", "15m", "2h", "900", "1.5m")] == [90, 900, 7200, 900, 90]


def test_what_pays_keeps_the_quality_in_every_seed(outside, monkeypatch):
    from fewer import papers

    card = papers.find("cfsp")

    def point(lost, **costs):
        return Point(
            "cfsp", "cfsp", "CFSP", {}, Spread(lost, lost, lost, 1), {name: Spread(left, left, left, 1) for name, left in costs.items()}
        )

    assert left_of(point(0.0, cpu_seconds=0.9, bytes=0.4), card, []) == pytest.approx(0.6)  # the mean of what its card saves
    assert left_of(point(0.0, cpu_seconds=0.9, bytes=0.5), card, ["seconds"]) == 0.9
    assert left_of(point(0.0, cpu_seconds=0.9, bytes=0.5), card, ["seconds", "memory"]) == pytest.approx(0.45**0.5)
    assert left_of(point(0.0, cpu_seconds=0.9), card, ["queries"]) == 1.0
    from fewer.advise.answer import Line

    line = Line("cfsp", "CFSP", "dense", False, point(0.0, bytes=0.5), 0.5, True)
    assert pays(line)
    for worse in ({"keeps": False}, {"left": 1.0}, {"replaced": True}):
        assert not pays(msgspec.structs.replace(line, **worse))
