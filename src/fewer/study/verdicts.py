"""Verdicts: each claim of a study tested on its results."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from fewer.errors import UserError
from fewer.study.declaration import Claim, Study
from fewer.study.results import All, Comparison, NotTestable, Results

UNDECIDED = "the interval over seeds reaches both sides of the bound; more seeds (--seeds) narrow it"


class Measured(msgspec.Struct, frozen=True):
    """Our figure in a claim, with its spread over seeds and the bound that it was held against.

    None stands for infinity, which JSON cannot say: a value that was never reached.
    """

    what: str
    value: float | None
    low: float | None
    high: float | None
    op: str
    bound: float

    def __str__(self) -> str:
        value, low, high = ("never" if each is None else f"{each:.4g}" for each in (self.value, self.low, self.high))
        return f"{value} [{low}, {high}], claimed {self.op} {self.bound:g}"


class Verdict(msgspec.Struct, frozen=True):
    """What became of a claim."""

    text: str
    paper: str
    verdict: Literal["holds", "fails", "undecided", "not testable here"]
    ours: tuple[Measured, ...] = ()
    reason: str = ""  # why it does not hold, or cannot be tested


def judge(study: Study, results: Results) -> list[Verdict]:
    """The verdict on each claim, in the order of their declaration; UserError where a claim names what does not exist."""
    return [_judge_one(claim, results) for claim in study.claims]


def _judge_one(claim: Claim, results: Results) -> Verdict:
    try:
        outcome = claim.test(results)
    except SystemExit as leave:
        raise UserError(f"claim {claim.text!r} calls sys.exit({leave.code}); mend the study: a claim returns a comparison") from leave
    except NotTestable as reason:
        return Verdict(claim.text, claim.paper, "not testable here", reason=str(reason))
    except UserError as error:
        raise UserError(f"claim {claim.text!r}: {error}; mend the study") from error
    comparisons = outcome.parts if isinstance(outcome, All) else (outcome,) if isinstance(outcome, Comparison) else ()
    ours = tuple(_measured(comparison) for comparison in comparisons)
    verdict = outcome.outcome if isinstance(outcome, Comparison | All) else "holds" if outcome else "fails"
    reason = {"holds": "", "fails": claim.if_fails, "undecided": UNDECIDED}[verdict]
    return Verdict(claim.text, claim.paper, verdict, ours, reason)


def _measured(comparison: Comparison) -> Measured:
    estimate = comparison.estimate
    return Measured(estimate.what, _finite(estimate.value), _finite(estimate.low), _finite(estimate.high), comparison.op, comparison.bound)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
