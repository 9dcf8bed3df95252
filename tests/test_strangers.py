"""Other people's packages: what is broken in one costs that one a line, and nothing of it reaches the terminal or ends the command."""

from __future__ import annotations

import os
import re
import shutil

import pytest


def test_a_study_that_raises_at_import_is_told_with_its_place(fewer, outside, tmp_path):
    (tmp_path / "broken").mkdir()
    for file in (outside / "guessing").iterdir():
        if file.is_file():
            (tmp_path / "broken" / file.name).write_bytes(file.read_bytes())
    site = tmp_path / "site"
    (site / "guessing").mkdir(parents=True)
    for file in (tmp_path / "broken").iterdir():
        (site / "guessing" / file.name).write_bytes(file.read_bytes())
    (site / "guessing" / "study.py").write_text("x = 1\n1 / 0\n")
    done = fewer("run", "guessing", status=2, PYTHONPATH=f"{site}{os.pathsep}{outside}")
    assert "guessing.study cannot be imported: ZeroDivisionError: division by zero" in done.stderr
    assert "study.py, line 2" in done.stderr
    (site / "guessing" / "study.py").write_text("import no_such_library\n")
    done = fewer("run", "guessing", status=2, PYTHONPATH=f"{site}{os.pathsep}{outside}")
    assert "guessing needs no_such_library, which is not installed; install it with: pip install 'fewer[all]'" in done.stderr


def test_a_card_with_a_missing_field_is_told_with_file_and_field(fewer, outside, tmp_path):
    site = tmp_path / "site"
    (site / "guessing").mkdir(parents=True)
    (site / "guessing" / "__init__.py").touch()
    card = (outside / "guessing" / "paper.toml").read_text()
    (site / "guessing" / "paper.toml").write_text(re.sub(r"summary = .*\n", "", card))
    for words in (["list"], ["show", "spright"]):  # the others are shown all the same
        done = fewer(*words, PYTHONPATH=f"{site}{os.pathsep}{outside}")
        assert "spright" in done.stdout
        (line,) = done.stderr.splitlines()
        assert "guessing is left out" in line
        assert "paper.toml: the field `summary` is missing" in line


@pytest.mark.parametrize("record", ["{", "[]", '{"claims": 3}', '{"claims": [{"verdict": "wins"}]}', "\x00"])
def test_one_broken_record_costs_its_own_method_alone(fewer, outside, tmp_path, record):
    site = tmp_path / "site"
    shutil.copytree(outside / "guessing", site / "guessing")
    (site / "guessing" / "record.json").write_text(record)
    for words in (["list"], ["show", "guessing"], ["report", "guessing"]):
        done = fewer(*words, PYTHONPATH=f"{site}{os.pathsep}{outside}")
        assert "guessing: its record.json is no record" in done.stderr


@pytest.mark.parametrize("verbs", ["", "COMMANDS = 3", "COMMANDS = {}", "COMMANDS = {'guess': 3, 'bounds': None}"])
def test_verbs_that_a_card_promises_and_its_package_lacks_are_told_when_called(fewer, outside, tmp_path, verbs):
    site = tmp_path / "site"
    shutil.copytree(outside / "guessing", site / "guessing")
    (site / "guessing" / "command.py").write_text(verbs)
    path = f"{site}{os.pathsep}{outside}"
    assert "guess" in fewer("--help", PYTHONPATH=path).stdout
    fewer("list", PYTHONPATH=path)
    done = fewer("guess", "numbers.txt", status=2, PYTHONPATH=path)
    assert "guessing.command has no verb 'guess'" in done.stderr


def test_control_characters_of_strangers_do_not_reach_the_terminal(fewer, outside, tmp_path):
    site = tmp_path / "site"
    shutil.copytree(outside / "guessing", site / "guessing")
    card = (site / "guessing" / "paper.toml").read_text()
    (site / "guessing" / "paper.toml").write_text(re.sub(r'summary = "', r'summary = "\\u001b[31mred\\u0007 \\u009b', card))
    study = (site / "guessing" / "study.py").read_text()
    (site / "guessing" / "study.py").write_text(study.replace("a fault in the arm", "a fault \\x1b]0;title\\x07 in the arm"))
    path = f"{site}{os.pathsep}{outside}"
    for words, status in ((["list"], 0), (["show", "guessing"], 0), (["run", "guessing", "--seeds", "1", "--set", "trouble=raise"], 1)):
        done = fewer(*words, status=status, PYTHONPATH=path)
        assert not re.search("[\x00-\x08\x0e-\x1f\x7f-\x9f]", done.stdout + done.stderr), words
    assert "\\x1b]0;title" in done.stderr


def test_leaving_by_sys_exit_is_told(fewer, outside, tmp_path):
    site = tmp_path / "site"
    shutil.copytree(outside / "guessing", site / "guessing")
    path = f"{site}{os.pathsep}{outside}"
    text = (site / "guessing" / "study.py").read_text()
    (site / "guessing" / "study.py").write_text("raise SystemExit(3)\n" + text.replace("from __future__ import annotations\n", ""))
    assert "guessing.study cannot be imported: SystemExit: 3" in fewer("run", "guessing", status=2, PYTHONPATH=path).stderr
    (site / "guessing" / "study.py").write_text("from fewer.study import Study\nstudy = Study('guessing', question='?')\n")
    assert "declares no arm" in fewer("run", "guessing", status=2, PYTHONPATH=path).stderr
    killed = "import os\nfrom fewer.study import Study\nstudy = Study('guessing', question='?')\n@study.task\ndef task(scale): os.kill(os.getpid(), 9)\n"
    (site / "guessing" / "study.py").write_text(killed + "@study.arm('a')\ndef a(task, trial): ...\n")
    done = fewer("run", "guessing", status=1, PYTHONPATH=path)
    assert "the task of guessing could not be built (killed): the trial's process ended by signal SIGKILL" in done.stderr
    assert "Traceback" not in done.stderr
