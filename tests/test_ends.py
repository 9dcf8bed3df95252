"""Ends of a run: Ctrl-C, SIGTERM and SIGKILL keep what is done, leave nothing behind, and print no traceback."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys

import pytest

from house import command, command_environment

pytestmark = pytest.mark.alone
STORE = "fewer-runs/store.sqlite"


def test_ctrl_c_keeps_what_is_done_and_the_next_run_goes_on(outside, tmp_path):
    words, environment = command("run", "guessing", "--seeds", "60"), command_environment(outside)
    process = subprocess.Popen(
        words,
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("[5/"):
            os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it: to the whole group
            break
    rest = process.communicate()[1]
    assert process.returncode == 130
    assert "Stopped." in rest
    with sqlite3.connect(tmp_path / STORE) as db:
        statuses = dict(db.execute("SELECT status, count(*) FROM trials GROUP BY status"))
    assert set(statuses) == {"done"}
    assert statuses["done"] >= 5
    again = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert f"{statuses['done']} done before" in again.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_in_the_folder_for_temporary_files(outside, tmp_path, number):
    (tmp_path / "tmp").mkdir()
    words, environment = command("run", "guessing", "--seeds", "60"), command_environment(outside, TMPDIR=str(tmp_path / "tmp"))
    ignoring = lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)  # noqa: E731 - as a shell tells a job in its background
    process = subprocess.Popen(
        words, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=ignoring
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("[3/"):
            process.send_signal(number)
            break
    rest = process.communicate()[1]
    assert "Traceback" not in rest
    if number == signal.SIGTERM:  # ends as Ctrl-C does
        assert process.returncode == 130
        assert "Stopped." in rest
        assert os.listdir(tmp_path / "tmp") == []
    again = subprocess.run([*words[:-1], "3"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert "done before" in again.stderr
    assert os.listdir(tmp_path / "tmp") == [], "what a killed run left is swept by the next"


STRUCK = """
import multiprocessing.reduction as reduction, signal, sys, threading, time
real, calls = reduction.sendfds, []
other = threading.Thread(target=time.sleep, args=(100,), daemon=True)
other.start()
def struck(*words):
    calls.append(words)
    sent = real(*words)
    if len(calls) == 3:  # by then the server that forks trials listens
        signal.pthread_kill(other.ident if {elsewhere} else threading.get_ident(), signal.{number})
        time.sleep(0.2)
    return sent
reduction.sendfds = struck
sys.argv = ["fewer", "run", "guessing", "--seeds", "2"]
from fewer.cli import main
main()
"""


@pytest.mark.parametrize("elsewhere", [False, True], ids=["here", "elsewhere"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_an_end_while_a_trial_is_being_started_prints_no_traceback(outside, tmp_path, number, elsewhere):
    """Also where the system gives it to another thread, which does not hold it back."""
    words = [sys.executable, "-c", STRUCK.format(number=number.name, elsewhere=elsewhere)]
    listening = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731 - a shell's background job ignores it
    ended = subprocess.run(words, cwd=tmp_path, env=command_environment(outside), stderr=subprocess.PIPE, text=True, preexec_fn=listening)
    assert ended.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130)
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("delay", [0.3, 1.0, 1.8])
def test_ctrl_c_in_the_first_seconds_prints_no_traceback(outside, tmp_path, delay):
    process = subprocess.Popen(
        command("run", "guessing", "--seeds", "60"),
        cwd=tmp_path,
        env=command_environment(outside),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    with contextlib.suppress(subprocess.TimeoutExpired):  # whatever the process is at by then, on whatever machine
        process.wait(delay)
    os.killpg(process.pid, signal.SIGINT)
    rest = process.communicate()[1]
    assert process.returncode in (130, -signal.SIGINT)  # the latter before Python itself was ready
    if process.returncode == 130:
        assert "Traceback" not in rest


def test_no_trial_outlives_a_killed_run(outside, tmp_path):
    words = command("run", "guessing", "--seeds", "1", "--arm", "mean", "--set", "trouble=endless")
    process = subprocess.Popen(words, cwd=tmp_path, env=command_environment(outside), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert any("preparing" in line for line in process.stderr)
    process.kill()
    process.wait()
    process.stderr.read()  # ends when the last process that holds it has ended
    marks = [f"{tmp_path}".encode()]
    alive = [pid for pid in os.listdir("/proc") if pid.isdigit() and _works_in(pid, tmp_path)]
    assert not alive, marks


def _works_in(pid, folder):
    try:
        return os.readlink(f"/proc/{pid}/cwd") == str(folder)
    except OSError:
        return False
