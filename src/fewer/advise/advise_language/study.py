"""Does the first advice on the small language model stand, or on a user's own (`--set model=DIRECTORY`)?"""

from __future__ import annotations

from fewer.advise.standing import study_of
from fewer.advise.things import Thing, recognise
from fewer.study import Scale
from fewer.tasks import fetch_small_lm

study = study_of("advise-language", "Is what `fewer advise` says of a language model after one seed what more seeds say?", job="using it")
study.option("model", "", help="a model directory in place of the small language model")


@study.task
def task(scale: Scale, model: str) -> Thing:
    return recognise(model or str(fetch_small_lm()))
