"""When the first to finish is right: the law of two length distributions, a diagnosis of recorded traces, and races replayed from them."""

from __future__ import annotations

import itertools
import math
import warnings
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float

from fewer.checks import check_positive, check_share, check_whole
from fewer.language.first_finish_search.traces import majority

GRID = 40_001  # points of an integral over lengths
FALL = 0.005  # a curve falls that falls by more than half a point, and by two standard errors over problems
PREDICTED = (1, 2, 4, 8, 16, 32, 64)
MOST_SUBSETS = 100_000  # of one problem's traces that a replay goes through

Normal = tuple[float, float]  # mean, standard deviation


def _phi(t: np.ndarray, law: Normal) -> tuple[np.ndarray, np.ndarray]:
    """Density and distribution function of a normal law at lengths t."""
    z = torch.as_tensor((t - law[0]) / law[1])
    return (torch.exp(-z.square() / 2) / (law[1] * math.sqrt(2 * math.pi))).numpy(), torch.special.ndtr(z).numpy()


def ffs_accuracy(a: float, len_correct: Normal, len_wrong: Normal, n: int) -> float:
    """The probability that the first of n traces to finish is right, lengths being normal.

    P = integral of n a f1(t) (1 - a F1(t) - (1 - a) F2(t))^(n - 1) dt.

    Args:
        a: the share of right traces.
        len_correct, len_wrong: mean and standard deviation of the lengths of right and of wrong traces, in tokens.

    Examples:
        >>> f"{ffs_accuracy(0.6, (100.0, 20.0), (150.0, 20.0), n=4):.3f}"  # wrong ones are longer
        '0.953'
        >>> f"{ffs_accuracy(0.6, (100.0, 5.0), (110.0, 40.0), n=8):.3f}"  # wrong ones are longer, but spread wider
        '0.303'
    """
    check_share(a=a)
    check_whole(n=n)
    check_positive(sd_of_correct=len_correct[1], sd_of_wrong=len_wrong[1])
    low, high = (sign(mean + end * sd for mean, sd in (len_correct, len_wrong)) for sign, end in ((min, -12), (max, 12)))
    # each law's own neighbourhood is laid out finely, however narrow beside the other
    t = np.unique(
        np.concatenate([np.linspace(low, high, GRID), *(m + s * np.linspace(-12, 12, GRID) for m, s in (len_correct, len_wrong))])
    )
    (f1, big_f1), (_, big_f2) = _phi(t, len_correct), _phi(t, len_wrong)
    return float(np.trapezoid(n * a * f1 * (1 - a * big_f1 - (1 - a) * big_f2) ** (n - 1), t))


def expected_min(mu: float, sigma: float, n: int) -> float:
    """The mean of the smallest of n independent normal lengths, by its integral; for large n about mu - sigma sqrt(2 ln n).

    That of the largest is as far on the other side: 2 mu - expected_min(mu, sigma, n).

    >>> round(expected_min(100.0, 10.0, 1), 6), round(expected_min(100.0, 10.0, 4), 3)
    (100.0, 89.706)
    """
    check_whole(n=n)
    check_positive(sigma=sigma)
    z = np.linspace(-12, 12, GRID)
    density, below = _phi(z, (0.0, 1.0))
    return mu + sigma * float(np.trapezoid(z * n * density * (1 - below) ** (n - 1), z))


@dataclass(frozen=True)
class Diagnosis:
    """What recorded traces say of First Finish Search on such problems.

    Attributes:
        a: the share of right traces.
        len_correct, len_wrong: mean and deviation of their lengths, pooled over problems; None where there are fewer than two.
        by_decile: the share of right traces among the briefest tenth of a problem's, ..., the longest tenth; NaN where there are none.
        predicted: n -> accuracy by the law of pooled lengths (1 to 64). It is optimistic: difficulty moves length and correctness together.
        replayed: n -> accuracy over all subsets of n recorded traces.
        warnings: why it should not be used here, if so.
    """

    a: float
    len_correct: Normal | None
    len_wrong: Normal | None
    by_decile: tuple[float, ...]
    predicted: Mapping[int, float]
    replayed: Mapping[int, float]
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        curves = (("predicted", self.predicted), ("replayed", self.replayed))
        lines = [f"{name}: {', '.join(f'{value:.1%} at n = {n}' for n, value in curve.items())}" for name, curve in curves if curve]
        return "\n".join([f"{self.a:.1%} of the traces are right", *lines, *self.warnings])


def diagnose(traces: Sequence[Sequence[int]], correct: Sequence[Sequence[bool]]) -> Diagnosis:
    """Whether the first to finish is worth taking, from whole traces of some problems.

    Args:
        traces: lengths in tokens, a row a problem; as many in each.
        correct: which of them are right.

    Raises:
        ValueError: there are none, or the shapes differ.

    It warns (`warnings.warn`, and in the diagnosis) where the predicted or the replayed accuracy falls as n grows, by more than half a point
    and two standard errors.
    """
    lengths, right = _arrays(traces, correct)
    right_law, wrong_law = _normal(lengths[right]), _normal(lengths[~right])
    share = float(right.mean())
    predicted = {}
    if right_law and wrong_law:
        predicted = {n: np.array([ffs_accuracy(share, right_law, wrong_law, n)]) for n in PREDICTED}
    replayed = {n: _first_is_right(lengths, right, n) for n in range(1, lengths.shape[1] + 1)}
    told = []
    for name, curve in (("predicted from pooled lengths", predicted), ("replayed from the traces", replayed)):
        n, more, fall = _steepest_fall(curve)
        if fall.mean() > max(FALL, 2 * _standard_error(fall)):
            told.append(
                f"accuracy {name} falls from {curve[n].mean():.1%} at n = {n} to {curve[more].mean():.1%} at n = {more}: wrong traces are "
                "often the briefest here; take a smaller n, a vote (majority_vote), or k > 1"
            )
    for each in told:
        warnings.warn(each, stacklevel=2)
    foretold, seen = ({n: float(values.mean()) for n, values in curve.items()} for curve in (predicted, replayed))
    return Diagnosis(share, right_law, wrong_law, _by_decile(lengths, right), foretold, seen, tuple(told))


def _arrays(traces: Any, correct: Any) -> tuple[Float[np.ndarray, "P N"], Bool[np.ndarray, "P N"]]:
    try:
        lengths, right = np.asarray(traces, dtype=float), np.asarray(correct, dtype=bool)
    except ValueError as error:
        raise ValueError("traces have rows of different lengths; expected as many traces of each problem: leave the others out") from error
    if lengths.ndim != 2 or lengths.shape != right.shape or not lengths.size:
        raise ValueError(f"traces are {lengths.shape} and correct {right.shape}; expected two tables [problems, traces] of one shape")
    return lengths, right


def _normal(lengths: np.ndarray) -> Normal | None:
    return (float(lengths.mean()), max(float(lengths.std(ddof=1)), 1e-3)) if len(lengths) > 1 else None


def _steepest_fall(curve: Mapping[int, np.ndarray]) -> tuple[int, int, np.ndarray]:
    """Where a curve falls most as n grows, and by how much for each problem; a fall of 0 where there are no two points."""
    falls = [(n, more, curve[n] - curve[more]) for n, more in itertools.combinations(curve, 2)]
    return max(falls, key=lambda fall: fall[2].mean(), default=(1, 1, np.zeros(1)))


def _standard_error(values: np.ndarray) -> float:
    """Of a mean over problems, 0 for a single one: what so few problems show by chance is no fall."""
    return float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def _first_is_right(lengths: np.ndarray, right: np.ndarray, n: int) -> Float[np.ndarray, " P"]:
    """The share of each problem's subsets of n whose briefest is right: the trace at place i is it in C(N - 1 - i, n - 1) of C(N, n)."""
    sorted_right = np.take_along_axis(right, lengths.argsort(1, kind="stable"), 1)
    count = lengths.shape[1]
    first = [math.comb(count - 1 - place, n - 1) / math.comb(count, n) for place in range(count)]
    return sorted_right @ np.array(first)


def _by_decile(lengths: np.ndarray, right: np.ndarray) -> tuple[float, ...]:
    rank = lengths.argsort(1, kind="stable").argsort(1, kind="stable")
    decile = rank * 10 // lengths.shape[1]
    return tuple(float(right[decile == d].mean()) if (decile == d).any() else math.nan for d in range(10))


class Recorded(NamedTuple):
    """One recorded trace."""

    problem: Hashable
    sample: int
    tokens: int
    answer: Hashable | None
    gold: Hashable


class Way(NamedTuple):
    """What one way of answering comes to, over all subsets of all problems."""

    accuracy: float
    sequential_tokens: float
    total_tokens: float


@dataclass(frozen=True)
class Replay:
    """Races replayed from recorded traces: FFS-k@N, LFS-k@N, the vote of all N, and one sample."""

    ffs: Way
    lfs: Way
    mv: Way
    simple: Way


def replay(table: Iterable[Sequence[Any]], N: int, k: int = 1) -> Replay:
    """What races of N traces would have come to, over all subsets of N of each problem's recorded ones.

    FFS-k is the vote among the k briefest traces that have a parsed answer, LFS-k among the k longest, MV among all that have one; a tie
    goes to the answer whose first trace is briefest (of equal lengths, whose sample comes first).

    Args:
        table: rows of (problem, sample, tokens, answer or None, gold).

    Raises:
        ValueError: a problem has fewer than N traces, or too many subsets.

    Examples:
        >>> table = [("p", 0, 30, "7", "7"), ("p", 1, 50, "8", "7"), ("p", 2, 40, "7", "7")]
        >>> replay(table, N=2).ffs
        Way(accuracy=1.0, sequential_tokens=33.333333333333336, total_tokens=66.66666666666667)
    """
    check_whole(N=N, k=k)
    if k > N:
        raise ValueError(f"k is {k} and N {N}; expected k of at most N")
    problems = defaultdict(list)
    for row in itertools.starmap(Recorded, table):
        problems[row.problem].append(row)
    if not problems:
        raise ValueError("the table has no rows; expected (problem, sample, tokens, answer or None, gold)")
    ways = np.zeros((4, 3))
    for problem, rows in problems.items():
        if len(rows) < N or math.comb(len(rows), N) > MOST_SUBSETS:
            raise ValueError(
                f"problem {problem!r} has {len(rows)} traces; expected at least {N}, and at most {MOST_SUBSETS:,} subsets of that many"
            )
        rows.sort(key=lambda row: (row.tokens, row.sample))
        ways += np.mean([_raced(subset, k) for subset in itertools.combinations(rows, N)], axis=0)
    return Replay(*(Way(*map(float, way)) for way in ways / len(problems)))


def _raced(rows: Sequence[Recorded], k: int) -> list[tuple[float, float, float]]:
    """(right, sequential tokens, total tokens) of FFS-k, LFS-k, MV and one sample, on traces from the briefest to the longest."""
    parsed = [row for row in rows if row.answer is not None]
    lengths = [row.tokens for row in rows]
    stop = parsed[k - 1].tokens if len(parsed) >= k else lengths[-1]  # too few to read: all run to their end
    whole = (lengths[-1], sum(lengths))
    one = sum(row.answer == row.gold for row in rows) / len(rows), sum(lengths) / len(rows)
    return [
        (_right(parsed[:k]), stop, sum(min(each, stop) for each in lengths)),
        (_right(parsed[-k:]), *whole),
        (_right(parsed), *whole),
        (*one, one[1]),
    ]


def _right(rows: Sequence[Recorded]) -> float:
    at = majority([row.answer for row in rows])
    return float(at is not None and rows[at].answer == rows[at].gold)
