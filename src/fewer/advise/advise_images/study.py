"""Does the first advice on the diffusion model of digits stand, or on a user's own (`--set pipeline=DIRECTORY`)?"""

from __future__ import annotations

from fewer.advise.standing import study_of
from fewer.advise.things import Thing, recognise
from fewer.study import Scale

study = study_of("advise-images", "Is what `fewer advise` says of a diffusion model after one seed what more seeds say?", job="sampling")
study.option("pipeline", "", help="a diffusers directory in place of the model of digits")


@study.task
def task(scale: Scale, pipeline: str) -> Thing:
    """The studies' own model of digits stands behind no directory: their options are left empty."""
    return recognise(pipeline) if pipeline else Thing("the model of digits", ("a diffusers pipeline",), "the model of digits", "")
