"""What `--set` takes: the type and the limits that a study declares."""

from __future__ import annotations

import pytest

from fewer.errors import UserError
from fewer.study import Study


@pytest.mark.parametrize(
    ("default", "text", "words"),
    [
        (True, "maybe", "expected one of yes, true, 1, no, false, 0"),
        (True, "", "expected one of yes"),
        (0.1, "nan", "expected a finite number"),
        (0.1, "inf", "expected a finite number"),
        (3, "3.5", "expected int"),
        (3, "0", "expected at least 1"),
        (3, "99", "expected at most 9"),
    ],
)
def test_an_option_takes_what_its_default_and_limits_say(default, text, words):
    study = Study("s", question="?")
    study.option(
        "it",
        default,
        least=None if isinstance(default, bool) else 1e-9 if isinstance(default, float) else 1,
        most=9 if default == 3 else None,
    )
    with pytest.raises(UserError, match=f"--set it={text}: {words}"):
        study.choose_options({"it": text})


def test_booleans_are_said_in_six_ways():
    study = Study("s", question="?")
    study.option("it", False)
    assert [study.choose_options({"it": text})["it"] for text in ("yes", "TRUE", "1", "no", "False", "0")] == [True] * 3 + [False] * 3
