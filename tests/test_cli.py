"""The command line, run in fresh processes as a user runs it."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import subprocess
import sys

import pytest

from house import ROOT, command, command_environment, install

STORE = "fewer-runs/store.sqlite"


def test_run_compares_judges_and_says_it_in_one_paragraph(fewer):
    done = fewer("run", "guessing", "--seeds", "2")
    for words in (
        "How near does a guess come?",
        "✓ holds",
        "✗ fails",
        "the mean",
        "The mean was off by 0.075.",
        "defaults, not tuned",
        "torch",
    ):
        assert words in done.stdout, words
    assert "[6/6] none, seed 1: done after" in done.stderr
    again = fewer("run", "guessing", "--seeds", "2")
    assert "6 done before" in again.stderr
    assert "[" not in again.stderr


def test_json_on_stdout_is_whole_and_alone(fewer):
    record = json.loads(fewer("run", "guessing", "--seeds", "1", "--json").stdout)
    assert record["slug"] == "guessing"
    assert [claim["verdict"] for claim in record["claims"]] == ["holds", "fails"]
    assert record["environment"]["cores"] >= 1
    assert json.loads(fewer("list", "--json").stdout)
    assert json.loads(fewer("show", "guessing", "--json").stdout)["title"] == "On guessing the middle"
    assert json.loads(fewer("doctor", "--json").stdout)["machine"]
    assert json.loads(fewer("bench", "guessing", "--json").stdout)[1]["ratio"] == 0.2
    assert json.loads(fewer("tune", "guessing", "--trials", "2", "--json").stdout)[0]["trials"] == 2
    assert json.loads(fewer("data", "list", "--json").stdout)


def test_a_ray_cluster_of_our_own_listens_on_the_loopback_address_alone(tmp_path):
    script = """
import psutil
from fewer.study.engines import RayEngine
engine = RayEngine()
@engine.ray.remote
def work(): ...
engine.ray.get(work.remote())
family = {process.pid for process in psutil.Process().children(recursive=True)} | {psutil.Process().pid}
session = {each.pid for each in psutil.process_iter(["cmdline"]) if any("session_" in word for word in each.info["cmdline"] or [])}
listening = [each.laddr.ip for each in psutil.net_connections("tcp") if each.status == "LISTEN" and each.pid in family | session]
print(len(listening), sorted({ip.removeprefix("::ffff:") for ip in listening}))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=command_environment(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count, _, addresses = done.stdout.strip().rpartition("\n")[2].partition(" ")
    assert int(count) > 3
    assert addresses == "['127.0.0.1']"


def test_the_local_and_the_ray_engine_give_the_same_quality_figures(fewer):
    def figures(store, *words):
        fresh = {"COLUMNS": "160"} if words else {}  # Ray's workers find packages as its own process does at its start
        record = json.loads(fewer("run", "guessing", "--seeds", "2", "--store", store, "--json", *words, **fresh).stdout)
        return {name: by_arm for name, by_arm in record["figures"].items() if not name.startswith("work.")}

    assert figures("local.sqlite") == figures("ray.sqlite", "--engine", "ray", "--jobs", "2")


def test_report_export_and_races_come_from_the_store(fewer, tmp_path):
    fewer("run", "guessing", "--seeds", "1")
    assert "a thousand numbers" in fewer("bench", "guessing").stdout
    fewer("report", "guessing")
    page = (tmp_path / "fewer-runs" / "report" / "methods" / "guessing.html").read_text()
    assert "The mean was off by" in page
    fewer("run", "guessing", "--seeds", "1")
    fewer("report", "guessing")
    assert "a thousand numbers" in (tmp_path / "fewer-runs" / "report" / "methods" / "guessing.html").read_text()
    fewer("export", "guessing", "--format", "csv", "--out", "figures.csv")
    assert "guessing" in (tmp_path / "figures.csv").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "gessing"], "there is no method 'gessing': did you mean 'guessing'?"),
        (["show", "gessing"], "did you mean 'guessing'?"),
        (["run", "guessing", "--arm", "meen"], "no arm 'meen': did you mean 'mean'?"),
        (["run", "guessing", "--seeds", "0"], "--seeds 0: expected at least 1"),
        (["run", "guessing", "--jobs", "0"], "--jobs 0: expected at least 1"),
        (["run", "guessing", "--set", "sise=3"], "did you mean 'size'?"),
        (["run", "guessing", "--set", "size"], "expected KEY=VALUE"),
        (["run", "guessing", "--scale", "huge"], "expected quick or full"),
        (["run", "guessing", "--store", "."], "this is a directory"),
        (["run", "guessing", "--store", "pyproject.toml"], "not an SQLite file"),
        (["run", "guessing", "--set", "trouble=data"], "none of 2 sources"),
        (["tune", "guessing", "--arm", "none"], "declares nothing to tune"),
        (["tune", "guessing", "--trials", "0"], "--trials 0"),
        (["list", "--area", "statistic"], "did you mean 'statistics'?"),
        (["export", "--format", "xls", "--out", "x", "--store", "made.sqlite"], "expected one of csv, parquet, mlflow"),
        (["export", "--format", "csv", "--out", "x", "--store", "absent.sqlite"], "there is no store yet"),
        (["new", "Bad Slug"], "expected a slug of lower-case words"),
        (["new", "guessing", "--outside", "here"], "there is a method guessing already"),
        (["new", "class", "--outside", "here"], "'class' is no name of a Python package"),
        (["new", "import", "--area", "graphs"], "'import' is no name of a Python package"),
        (["new", "123", "--outside", "here"], "'123' is no name of a Python package"),
        (["new", "fewer", "--outside", "here"], "a package called 'fewer'"),
        (["new", "random", "--outside", "here"], "a package called 'random'"),
        (["new", "lazy-sort", "--area", "lambda", "--outside", "here"], "'lambda' is no name"),
        (["data", "fetch", "mnisst"], "did you mean 'mnist'"),
        (["record", "guessing"], "tracked by none"),
    ],
)
def test_a_mistake_gets_one_clear_line_and_exit_status_2(fewer, tmp_path, words, message):
    (tmp_path / "pyproject.toml").write_text("# not a database, and long enough to be read as one\n" * 20)
    if "made.sqlite" in words:
        fewer("run", "guessing", "--seeds", "1", "--store", "made.sqlite")
    fresh = {"COLUMNS": "160"} if words[0] == "record" else {}  # the tests' own `guessing` lies in this checkout and is tracked
    done = fewer(*words, status=2, **fresh)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in done.stderr + done.stdout
    assert (tmp_path / "pyproject.toml").read_text().startswith("# not a database")


def test_a_mistyped_verb_or_option_gets_the_nearest(fewer):
    assert "run" in fewer("rum", "guessing", status=2).stderr
    assert "--seeds" in fewer("run", "guessing", "--seed", "1", status=2).stderr


def test_a_failed_trial_shows_its_traceback_and_exit_status_1(fewer):
    done = fewer("run", "guessing", "--seeds", "1", "--set", "trouble=raise", status=1)
    assert "ZeroDivisionError: a fault in the arm" in done.stderr
    assert "? not testable here" in done.stdout


def test_a_full_disk_is_told_in_one_line(outside, tmp_path):
    limited = f"ulimit -f 300; exec {' '.join(command('run', 'guessing', '--seeds', '400', '--quiet'))}"
    done = subprocess.run(["bash", "-c", limited], cwd=tmp_path, env=command_environment(outside), capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "the disk is full or the file may not grow" in done.stderr
    with sqlite3.connect(tmp_path / STORE) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert db.execute("SELECT count(*) FROM trials WHERE status = 'done'").fetchone()[0] > 3


def test_every_verb_has_help_with_an_example(fewer):
    verbs = re.findall(r"^[│ ]+([a-z][a-z-]+) ", fewer("--help").stdout, re.M)
    assert {
        "list",
        "show",
        "search",
        "run",
        "tune",
        "bench",
        "record",
        "report",
        "data",
        "export",
        "doctor",
        "new",
        "guess",
        "train-local",
    } <= set(verbs)
    for verb in set(verbs):
        said = fewer(verb, "--help").stdout
        actions = re.findall(r"^[│ ]+([a-z][a-z-]+) ", said.partition("Commands")[2], re.M)  # of a verb that has several
        for words in [[verb, action] for action in actions] or [[verb]]:
            assert "xample: fewer" in fewer(*words, "--help").stdout, words


def test_shell_completion_knows_the_slugs(fewer):
    done = fewer(
        "run",
        status=None,
        _FEWER_COMPLETE="complete_bash",
        COMP_WORDS="fewer run gue",
        COMP_CWORD="2",
        _TYPER_COMPLETE_ARGS="fewer run gue",
    )
    assert "guessing" in done.stdout


def test_new_lays_out_a_package_whose_tests_pass_and_whose_study_runs(fewer, outside, tmp_path):
    fewer("new", "lazy-sort", "--area", "statistics", "--outside", "lazy")
    source = tmp_path / "lazy" / "src"
    environment = command_environment(outside, PYTHONPATH=str(source))
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--doctest-modules", "lazy"],
        cwd=tmp_path,
        env=environment,
        check=True,
    )
    ruff = [sys.executable, "-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml"), "lazy"]
    subprocess.run(ruff, cwd=tmp_path, env=environment, check=True)
    site = install(tmp_path / "lazy", tmp_path / "site")
    done = fewer("run", "lazy-sort", "--seeds", "1", PYTHONPATH=str(site))
    assert "✓ holds" in done.stdout
    assert "is there already" in fewer("new", "lazy-sort", "--outside", "lazy", status=2).stderr


def test_record_writes_the_file_on_a_clean_commit_and_refuses_a_dirty_tree(fewer, outside, tmp_path):
    project = tmp_path / "lazy"
    fewer("new", "lazy-sort", "--area", "statistics", "--outside", "lazy")
    git = ["git", "-C", str(project), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "begin"]):
        subprocess.run([*git, *words], check=True)
    site = install(project, tmp_path / "site")
    environment = {"PYTHONPATH": f"{project / 'src'}{os.pathsep}{site}", "PYTHONDONTWRITEBYTECODE": "1"}
    fewer("record", "lazy-sort", **environment)
    record = json.loads((project / "src" / "lazy_sort" / "record.json").read_text())
    assert record["seeds"] == 3
    assert record["races"][0]["kind"] == "time"
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert record["commit"] == head, "the commit of the method, not of the house"
    assert "1✓" in fewer("list", **environment).stdout
    assert "the tree differs" in fewer("record", "lazy-sort", status=2, **environment).stderr


def test_a_methods_verb_may_have_several_actions(fewer, tmp_path):
    (tmp_path / "numbers.txt").write_text("3\n1\n2\n")
    assert fewer("bounds", "low", "numbers.txt").stdout == "1.0\n"
    assert fewer("bounds", "high", "numbers.txt").stdout == "3.0\n"
    assert "Example: fewer bounds high" in fewer("bounds", "high", "--help").stdout
    refused = fewer("bounds", "low", "absent.txt", status=2).stderr
    assert refused.startswith("error:")
    assert "absent.txt" in refused
    assert "Traceback" not in refused
