"""The distances of a pattern from every window of a text: exactly, up to k, or within a factor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fewer.checks import check_choice, check_share, check_whole, is_whole
from fewer.signals.hamming_distances.counting.approximate import approximate
from fewer.signals.hamming_distances.counting.bounded import bounded
from fewer.signals.hamming_distances.counting.costs import WAYS, Constants, Plan, calibrate, choose
from fewer.signals.hamming_distances.counting.letters import Alphabet, Pair, check_kinds, count_letters, read_letters, read_wildcard
from fewer.signals.hamming_distances.counting.matches import Kept, exact

Method = Literal["auto", "pairs", "bits", "fft", "direct", "hash", "sample"]
Estimator = Literal["max", "mean"]


@dataclass(frozen=True)
class Question:
    """What is asked of each pattern, as `hamming_distances` takes it."""

    max_distance: int | None = None
    epsilon: float | None = None
    delta: float = 0.01
    estimator: Estimator = "max"
    method: Method = "auto"
    minimum: int | None = None
    positions_only: bool = False
    seed: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        check_whole(threads=self.threads, optional=["threads"])
        check_whole(0, seed=self.seed)
        check_share(delta=self.delta, ends=False)
        check_choice(("max", "mean"), estimator=self.estimator)
        if self.max_distance is not None and (not is_whole(self.max_distance) or self.max_distance < 0):
            raise ValueError(f"max_distance is {self.max_distance!r}; expected a whole number of at least 0, or None for all distances")
        if self.epsilon is None:
            if self.method in ("hash", "sample") or self.estimator != "max":
                given = f"method={self.method!r}" if self.method in ("hash", "sample") else f"estimator={self.estimator!r}"
                raise ValueError(f"{given} without epsilon; expected it for approximate distances alone: give epsilon, or leave it out")
            check_choice(("auto", *WAYS), method=self.method)
        else:
            check_share(epsilon=self.epsilon, ends=False)
            check_choice(("auto", "hash", "sample"), method=self.method)
            if self.max_distance is not None:
                raise ValueError(
                    f"epsilon={self.epsilon} and max_distance={self.max_distance} are given; expected one of them: leave one out"
                )
        if (self.minimum is not None) != (self.method == "sample"):
            raise ValueError(
                f"minimum is {self.minimum} and method {self.method!r}; expected minimum, the smallest distance of interest, for "
                "method='sample' and for no other"
            )
        check_whole(minimum=self.minimum, optional=["minimum"])
        if self.positions_only and self.max_distance is None:
            raise ValueError("positions_only=True without max_distance; expected the distance up to which positions are wanted: give it")

    def of(self, pair: Pair, constants: Constants, kept: Kept | None = None) -> tuple[np.ndarray, Plan]:
        """The answer for one pattern, and how it was found."""
        if self.epsilon is not None:
            options = {name: getattr(self, name) for name in ("delta", "estimator", "method", "minimum", "seed", "threads")}
            return approximate(pair, self.epsilon, constants, **options)
        if self.max_distance is None:
            return exact(pair, constants, self.method, self.threads, kept)
        most = min(self.max_distance, len(pair.pattern))
        if self.method == "auto":
            distances, plan = bounded(pair, most, constants, self.seed, self.threads)
        else:
            distances, plan = exact(pair, constants, self.method, self.threads, kept)
            np.minimum(distances, most + 1, out=distances)
        if not self.positions_only:
            return distances, plan
        positions = np.flatnonzero(distances <= most)
        return np.stack([positions, distances[positions]], axis=1), plan


def hamming_distances(
    text: Any,
    pattern: Any,
    *,
    max_distance: int | None = None,
    epsilon: float | None = None,
    delta: float = 0.01,
    estimator: Estimator = "max",
    wildcard: Any = None,
    method: Method = "auto",
    minimum: int | None = None,
    positions_only: bool = False,
    seed: int = 0,
    threads: int | None = None,
    return_plan: bool = False,
) -> Any:
    """How many letters of a pattern differ from each window of a text: D[i] = #{j : T[i + j] != P[j]}.

    Args:
        text: [n] integers of any size (NumPy or torch), str (compared by code point) or bytes.
        pattern: [m], or [q, m] for q patterns.
        max_distance: k: return min(D, k + 1), which takes far fewer comparisons where most windows are farther away.
        epsilon: return (1 - epsilon) D <= D~ <= D, for all windows together with probability 1 - delta.
        delta: the probability that one window of the approximation is outside.
        estimator: "max", or "mean", which is unbiased, usually nearer, and has no guarantee.
        wildcard: a letter that matches everything, in text and pattern; None has none.
        method: "auto" takes what is predicted to be quickest; "pairs", "bits", "fft" or "direct" forces one exact way, with epsilon
            "hash" or "sample" one approximate way.
        minimum: d_min of method "sample": windows at least so far away are told within a factor 1 +- epsilon.
        positions_only: with max_distance, return the windows within it alone.
        seed: of what is random: orders, hashes, samples. Exact and bounded answers do not depend on it.
        threads: at most so many work; by default the machine's for long work, one for short. The answer is the same.
        return_plan: return the `Plan` (or a list of q) as well.

    Returns:
        int32 [n - m + 1] or [q, n - m + 1], a tensor where the text is one; with positions_only [r, 2] of (position, distance), or a
        list of q such arrays.

    Raises:
        ValueError: floats, a pattern longer than the text, or options that do not go together.
        RuntimeError: the counts do not add up.

    Examples:
        >>> hamming_distances("abracadabra", "abba").tolist()
        [1, 4, 3, 3, 3, 3, 3, 1]
        >>> hamming_distances("abracadabra", "abba", max_distance=1, positions_only=True).tolist()
        [[0, 1], [7, 1]]

    Source: arXiv 2310.13174 (the problems and the O(n sqrt m) shape); the algorithm is classical counting with a measured choice.
    """
    question = Question(max_distance, epsilon, delta, estimator, method, minimum, positions_only, seed, threads)
    letters, patterns, kind, many = _read(text, pattern)
    wild = read_wildcard(wildcard, kind)
    if wild is not None and method == "sample":
        raise ValueError(f"wildcard={wildcard!r} with method='sample'; expected no wildcard there: use method='hash'")
    if epsilon is not None:
        alphabet = Alphabet(np.concatenate([np.unique(letters), np.unique(patterns)]), wild)
    else:
        alphabet = Alphabet(patterns.reshape(-1), wild)
    constants, codes = calibrate(), alphabet.codes(letters)
    in_text, kept = count_letters(codes, alphabet.size), Kept() if many and len(patterns) > 1 else None
    answers = [question.of(Pair(codes, each, alphabet.size, in_text), constants, kept) for each in alphabet.codes(patterns)]
    return given_back(answers, many, return_plan, hasattr(text, "detach"), positions_only)


def given_back(answers: list[tuple[np.ndarray, Plan]], many: bool, return_plan: bool, as_tensor: bool, ragged: bool) -> Any:
    """The answers in the shape and the type of the question."""
    found: list[Any] = [answer for answer, _ in answers]
    if as_tensor:
        import torch

        found = [torch.from_numpy(each) for each in found]
    if not many:
        return (found[0], answers[0][1]) if return_plan else found[0]
    together: Any = found
    if not ragged:
        if as_tensor:
            import torch

            together = torch.stack(found)
        else:
            together = np.stack(found)
    return (together, [plan for _, plan in answers]) if return_plan else together


def plan(text: Any, pattern: Any) -> Plan:
    """How `hamming_distances(text, pattern)` would count, and how long it is predicted to take on one thread.

    >>> plan("abracadabra", "abba").method
    'exact'
    """
    letters, patterns, _, _ = _read(text, pattern)
    pair = Pair.of(letters, patterns[0], Alphabet(patterns[0]))
    return choose(pair.in_text, pair.in_pattern, len(letters), len(patterns[0]), calibrate())


def _read(text: Any, pattern: Any) -> tuple[np.ndarray, np.ndarray, str, bool]:
    """The letters of the text [n], of the patterns [q, m], their kind, and whether several patterns were given."""
    letters, kind = read_letters(text, "text")
    if letters.ndim != 1:
        raise ValueError(f"text has shape {letters.shape}; expected one dimension: give one text a call")
    patterns, other = read_letters(pattern, "pattern")
    check_kinds(kind, other)
    check_length(letters, patterns)
    return letters, np.atleast_2d(patterns), kind, patterns.ndim == 2


def check_length(text: np.ndarray, pattern: np.ndarray) -> None:
    if pattern.shape[-1] > len(text):
        raise ValueError(f"the pattern has {pattern.shape[-1]:,} letters and the text {len(text):,}; expected a text at least as long")
