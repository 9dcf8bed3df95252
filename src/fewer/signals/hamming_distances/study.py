"""How long the distances of a pattern from a million windows take: the measured choice against one way for all letters, a correlation a
letter, and plain comparison; and how much is saved where only near windows matter, or a factor will do.

Texts: E. coli's genome, the State of the Union as bytes and as words, and sqrt(m) uniform letters, the hard case of the theory. Or a file
of yours: `--set text=FILE`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from fewer.devices import one_thread
from fewer.inputs import map_array, read_text
from fewer.signals.hamming_distances.contamination import SequenceContamination
from fewer.signals.hamming_distances.counting.costs import Plan, calibrate, choose
from fewer.signals.hamming_distances.counting.letters import Alphabet, Pair, read_letters
from fewer.signals.hamming_distances.distances import hamming_distances
from fewer.signals.hamming_distances.problems import (
    LENGTH,
    LETTERS,
    PASSAGE,
    PATTERNS,
    Planted,
    Texts,
    addresses,
    by_correlation,
    contaminate,
    distance_at,
    dna,
    english,
    wrong_windows,
)
from fewer.signals.hamming_distances.profile import hamming_profile
from fewer.study import Bars, Curve, Figure, NotTestable, Results, Scale, Study, Trial

LONG = 0.08  # seconds; what is predicted to take longer is run on a part of the text and scaled up
ROUNDS = 3  # of a timed call, the least counts
WORDS = 300_000  # of the text in which passages are planted
FAR = round(0.4 * PASSAGE)  # k of the contamination
BOUNDS = (0, 4, 16, 64, 256)  # k of the sweep, m = 1024
EPSILONS = (0.1, 0.2, 0.5)
SWEPT = 50_000  # letters of the texts over which epsilon is swept
HARD = {"data": "hard"}
WITHIN = 1.3  # of the best forced way

study = Study(
    "hamming-distances",
    question="How long do the distances of a pattern from all windows of a text take, by a choice of ways and by each alone?",
    baseline="oaconvolve",
    figures=[
        Figure("seconds", "DNA, m = 4,096", "s", at={"data": "dna", "m": 4096}),
        Figure("seconds", "words, m = 4,096", "s", at={"data": "words", "m": 4096}),
        Figure("seconds", "hard alphabet, m = 4,096", "s", at={"data": "hard", "m": 4096}),
        Figure("slope", "e of time ~ m^e, hard alphabet", "", "", at=HARD),
        Figure("regret_share", "points within 1.3 of the best way", "%", "higher"),
        Figure("accuracy", "passages found, 40 % of words replaced", "%", "higher", at={"replaced": 0.4}),
        Figure("passage_seconds", "time a passage of 256 words", "s"),
        Figure("over_exact", "worst time over that of the exact way"),
        Figure("error", "worst relative error, epsilon = 0.2", "%", at={"epsilon": 0.2}),
        Figure("profile_seconds", "profile of 20,000 windows of 64", "s"),
        Figure("seconds", "time over m", "s"),
        Figure("predicted_ratio", "measured / predicted time", "", "", detail=True),
        Figure("wrong", "windows that differ from a plain comparison"),
    ],
    charts=[
        Curve("seconds", over="m", log=True, log_x=True, title="DNA, a million letters", at={"data": "dna"}),
        Curve("seconds", over="m", log=True, log_x=True, title="Words, a million", at={"data": "words"}),
        Curve("seconds", over="m", log=True, log_x=True, title="Sqrt(m) uniform letters", at=HARD),
        Bars(("passage_seconds",), title="A passage of 256 words in 300,000"),
    ],
    time_limit=1800,
)
study.option("text", "", help="a text of your own to count in: UTF-8, or an .npy file of integers")


@study.task
def task(scale: Scale, text: str = "") -> Texts:
    if text:
        letters = np.asarray(map_array(text, "integers")) if text.endswith(".npy") else read_letters(read_text(text), "text")[0]
        if letters.ndim != 1 or len(letters) < 2 * PATTERNS[0]:
            raise ValueError(
                f"it has shape {letters.shape}; expected one dimension of at least {2 * PATTERNS[0]} letters: name a longer one"
            )
        return Texts({"yours": read_letters(letters, "text")[0]}, [])
    length = LENGTH if scale is Scale.QUICK else 20_000_000
    texts = addresses()
    named = {"dna": dna(length), "bytes": english(length), "words": np.concatenate(texts)[:length]}
    return Texts(named, texts, PATTERNS if scale is Scale.QUICK else (*PATTERNS, 2**18, 10**6))


# Timing


def least_seconds(call: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """The least time of a call on one thread; a long one is timed once."""
    times: list[float] = []
    with one_thread():
        while len(times) < rounds and sum(times) < LONG:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return min(times)


def plan_of(text: np.ndarray, pattern: np.ndarray, method: str) -> Plan:
    pair = Pair.of(text, pattern, Alphabet(pattern))
    return choose(pair.in_text, pair.in_pattern, len(text), len(pattern), calibrate(), method)


def forced_seconds(text: np.ndarray, pattern: np.ndarray, method: Any, rounds: int = ROUNDS) -> tuple[float, bool]:
    """The time of one way for all letters, and whether it was scaled up from some letters (transforms) or a part of the text (the others)."""
    predicted, m = plan_of(text, pattern, method).predicted_seconds, len(pattern)
    some, part, scale = pattern, text, 1.0
    letters = np.unique(pattern)
    if predicted > LONG and method == "fft":
        few = letters[: max(1, min(LETTERS, int(len(letters) * LONG / predicted)))]
        some, scale = np.where(np.isin(pattern, few), pattern, letters.max() + 1), len(letters) / len(few)
    elif predicted > LONG:
        part = text[: m + int((len(text) - m) * LONG / predicted)]
        scale = (len(text) - m + 1) / (len(part) - m + 1)
    return scale * least_seconds(lambda: hamming_distances(part, some, method=method, threads=1), rounds), scale > 1


def slopes(trial: Trial, seconds: dict[tuple[str, int], float]) -> None:
    """The exponent of m in the time, for each text."""
    for name in dict.fromkeys(name for name, _ in seconds):
        points = np.array([(m, value) for (each, m), value in seconds.items() if each == name])
        if len(points) > 1:
            lengths, times = np.log(points).T
            trial.log("slope", float(np.polyfit(lengths, times, 1)[0]), data=name)


# The arms


@study.arm("ours", label="measured choice")
def ours(texts: Texts, trial: Trial) -> None:
    rng, seconds, wrong = np.random.default_rng(trial.seed), {}, 0
    for name, m, text, pattern in texts.problems(rng):
        distances = hamming_distances(text, pattern, threads=1)  # compiles, and warms up
        seconds[name, m] = least_seconds(lambda: hamming_distances(text, pattern, threads=1))  # noqa: B023 - called at once
        _, plan = hamming_distances(text, pattern, threads=1, return_plan=True)
        trial.log("seconds", seconds[name, m], data=name, m=m)
        trial.log("predicted_ratio", plan.measured_seconds / plan.predicted_seconds, data=name, m=m)
        trial.note(f"plan of {name}, m = {m}", ", ".join(f"{count} letters by {way}" for way, count in plan.letters_by_method.items()))
        wrong += wrong_windows(text, pattern, distances, rng)
    slopes(trial, seconds)
    if texts.addresses:
        found = on_passages(texts, trial, {})
        wrong += found
        text = texts.named["dna"][: 20_000 + 63]
        hamming_profile(text[:200], 64, threads=1)
        trial.log("profile_seconds", least_seconds(lambda: hamming_profile(text, 64, threads=1), 1))
        distances, index = hamming_profile(text, 64, threads=1)
        wrong += wrong_profile(text, distances, index, rng)
        trial.note("motif", f"the nearest two windows of 64 bases differ in {distances.min()}, the loneliest in {distances.max()}")
    trial.log("wrong", wrong)


def wrong_profile(text: np.ndarray, distances: np.ndarray, index: np.ndarray, rng: np.random.Generator) -> int:
    windows = np.lib.stride_tricks.sliding_window_view(text, 64)
    wrong = 0
    for i in rng.integers(len(windows), size=16):
        plain = (windows != windows[i]).sum(axis=1)
        plain[max(0, i - 32) : i + 33] = 65
        wrong += (int(plain.min()), int(plain.argmin())) != (int(distances[i]), int(index[i]))
    return wrong


@study.arm("single", label="best single way", against="oaconvolve")
def single(texts: Texts, trial: Trial) -> None:
    """Each way for all letters, and the choice beside them in one process, so that they can be compared."""
    rng, seconds, regrets = np.random.default_rng(trial.seed), {}, []
    for name, m, text, pattern in texts.problems(rng):
        forced = {way: forced_seconds(text, pattern, way, 1) for way in ("pairs", "bits", "fft", "direct")}
        best = min(forced, key=lambda way: forced[way][0])
        pairs = [
            (least_seconds(lambda: hamming_distances(text, pattern, threads=1)), forced_seconds(text, pattern, best)[0])  # noqa: B023
            for _ in range(2)
        ]
        chosen, seconds[name, m] = np.min(pairs, axis=0)
        regrets.append(chosen / seconds[name, m])
        trial.log("seconds", seconds[name, m], data=name, m=m)
        trial.log("regret", regrets[-1], data=name, m=m)
        scaled = ", scaled up from a part of the text" if forced[best][1] else ""
        trial.note(f"best of {name}, m = {m}", f"{best}{scaled}")
    slopes(trial, seconds)
    trial.log("regret_share", float(np.mean(np.array(regrets) <= WITHIN)))


@study.arm("oaconvolve", label="scipy oaconvolve a letter")
def oaconvolve(texts: Texts, trial: Trial) -> None:
    rng, seconds, wrong = np.random.default_rng(trial.seed), {}, 0
    for name, m, text, pattern in texts.problems(rng):
        letters = np.unique(pattern)
        by_correlation(text[: 4 * m], pattern, letters[:1])
        once = least_seconds(lambda: by_correlation(text, pattern, letters[:1]), 1)  # noqa: B023
        few = min(len(letters), LETTERS, max(1, int(LONG / once)))
        each = least_seconds(lambda: by_correlation(text, pattern, letters[:few]), 1) / few  # noqa: B023
        seconds[name, m] = each * len(letters)
        trial.log("seconds", seconds[name, m], data=name, m=m)
        if few < len(letters):
            trial.note(f"{name}, m = {m}", f"scaled up from {few} of {len(letters)} letters")
        if m == PATTERNS[0] and few == len(letters):
            wrong += wrong_windows(text, pattern, by_correlation(text, pattern), rng)
    slopes(trial, seconds)
    trial.log("wrong", wrong)


@study.arm("direct", label="every window compared")
def direct(texts: Texts, trial: Trial) -> None:
    rng, seconds = np.random.default_rng(trial.seed), {}
    for name, m, text, pattern in texts.problems(rng):
        seconds[name, m], scaled = forced_seconds(text, pattern, "direct")
        trial.log("seconds", seconds[name, m], data=name, m=m)
        if scaled:
            trial.note(f"{name}, m = {m}", "scaled up from a part of the text")
    slopes(trial, seconds)


def on_passages(texts: Texts, trial: Trial, options: dict[str, Any]) -> int:
    """Whether the planted passages are found, by what they are replaced, and the time for each; how many distances are wrong."""
    rng = np.random.default_rng([trial.seed, 1])
    text, planted = contaminate(texts.addresses, WORDS, rng)
    hamming_distances(text, planted[0].passage, threads=1, **options)
    found: dict[float, list[bool]] = {}
    seconds, wrong = [], 0
    for each in planted:
        start = time.perf_counter()
        distances = hamming_distances(text, each.passage, threads=1, **options)
        seconds.append(time.perf_counter() - start)
        # a passage may stand elsewhere as well: some addresses were both spoken and sent
        nearest = int(distances.argmin())
        found.setdefault(each.replaced, []).append(distance_at(text, each.passage, nearest) <= min(each.distance, FAR))
        wrong += wrong_passage(distances, each, options)
    for share, hits in found.items():
        trial.log("accuracy", float(np.mean(hits)), replaced=share)
    trial.log("passage_seconds", float(np.mean(seconds)))
    return wrong


def wrong_passage(distances: np.ndarray, planted: Planted, options: dict[str, Any]) -> int:
    """Whether the distance at the planted place is none that the options allow."""
    told, true = int(distances[planted.position]), planted.distance
    if "epsilon" in options:
        return not (1 - options["epsilon"]) * true <= told <= true
    return told != (min(true, options["max_distance"] + 1) if "max_distance" in options else true)


@study.arm("bounded", label="distances up to k", against="ours")
def bounded(texts: Texts, trial: Trial) -> None:
    if not texts.addresses:
        return
    rng, m, worst = np.random.default_rng(trial.seed), 1024, 0.0
    wrong = on_passages(texts, trial, {"max_distance": FAR})
    periodic = np.tile(np.frombuffer(b"abababac", dtype=np.uint8), LENGTH // 8)
    for name, text in (texts.named | {"periodic": periodic}).items():
        place = int(rng.integers(len(text) - m))
        pattern = text[place : place + m].copy()
        exact = hamming_distances(text, pattern, threads=1)
        for k in BOUNDS:
            near, plan = hamming_distances(text, pattern, max_distance=k, threads=1, return_plan=True)
            wrong += not np.array_equal(near, np.minimum(exact, k + 1))
            pairs = [
                (
                    least_seconds(lambda k=k: hamming_distances(text, pattern, max_distance=k, threads=1), 1),  # noqa: B023
                    least_seconds(lambda: hamming_distances(text, pattern, threads=1), 1),  # noqa: B023
                )
                for _ in range(ROUNDS)
            ]
            ours, plain = np.min(pairs, axis=0)
            worst = max(worst, ours / plain)
            trial.log("bounded_seconds", ours, data=name, k=k)
            trial.log("bounded_ratio", ours / plain, data=name, k=k)
            trial.log("comparisons", plan.comparisons, data=name, k=k)
    trial.log("over_exact", worst)
    trial.log("wrong", wrong)


@study.arm("approximate", label="within a factor", against="ours")
def approximate(texts: Texts, trial: Trial) -> None:
    if not texts.addresses:
        return
    rng, m = np.random.default_rng(trial.seed), 1024
    wrong = on_passages(texts, trial, {"epsilon": 0.2, "method": "hash", "seed": trial.seed})
    for epsilon in EPSILONS:
        errors = []
        for name, whole in texts.named.items():
            text = whole[:SWEPT]
            place = int(rng.integers(len(text) - m))
            pattern = text[place : place + m]
            exact = hamming_distances(text, pattern, threads=1)
            options: dict[str, Any] = {"epsilon": epsilon, "method": "hash", "seed": trial.seed, "threads": 1}
            told = hamming_distances(text, pattern, **options)
            wrong += int(((told > exact) | (told < (1 - epsilon) * exact)).sum())
            errors.append(float(((exact - told) / np.maximum(exact, 1)).max()))
            seconds = least_seconds(lambda: hamming_distances(text, pattern, **options), 1)  # noqa: B023
            trial.log("approximate_seconds", seconds, data=name, epsilon=epsilon)
        trial.log("error", max(errors), epsilon=epsilon)
    trial.log("wrong", wrong)


@study.arm("estimator", label="SequenceContamination", against="ours")
def estimator(texts: Texts, trial: Trial) -> None:
    """The same passages through the scikit-learn estimator, whose index is kept from passage to passage."""
    if not texts.addresses:
        return
    text, planted = contaminate(texts.addresses, WORDS, np.random.default_rng([trial.seed, 1]))
    fitted = SequenceContamination(threads=1).fit([text])
    fitted.score_samples([planted[0].passage])
    start = time.perf_counter()
    scores, places = fitted.score_samples([each.passage for each in planted])
    trial.log("passage_seconds", (time.perf_counter() - start) / len(planted))
    true = [distance_at(text, each.passage, int(place[1])) for place, each in zip(places, planted, strict=True)]
    for share in dict.fromkeys(each.replaced for each in planted):
        hits = [told <= min(each.distance, FAR) for told, each in zip(true, planted, strict=True) if each.replaced == share]
        trial.log("accuracy", float(np.mean(hits)), replaced=share)
    trial.log("wrong", sum(round(score * PASSAGE) != told for score, told in zip(scores, true, strict=True)))


# What is claimed


def asked(results: Results) -> Results:
    """The results, unless they are about a text of the user's, of which nothing is claimed."""
    if any(row.coordinates.get("data") == "yours" for row in results.rows):
        raise NotTestable("this run was about your own text; the claim is about the study's")
    return results


@study.claim("every answer equals a plain comparison: distances, passages, profile, and distances up to k")
def equal(results: Results) -> Any:
    asked(results)
    return (results.mean("wrong", "ours") <= 0) & (results.mean("wrong", "bounded") <= 0) & (results.mean("wrong", "estimator") <= 0)


@study.claim("on sqrt(m) uniform letters time grows as m^e with e from 0.35 to 0.65", paper="O(n sqrt m); before: O(n sqrt(m log m))")
def slope(results: Results) -> Any:
    return asked(results).mean("slope", "ours", **HARD).between(0.35, 0.65)


@study.claim(
    "the choice takes at most 1.3 of the best single way's time at 90 % of the points or more",
    if_fails="the constants were measured on a quieter or a busier machine than the run, so that a way close to the best was taken",
)
def chosen_well(results: Results) -> Any:
    return asked(results).mean("regret_share", "single") >= 0.9


@study.claim(
    "distances up to k never take over twice the time of the exact ones, periodic text included",
    paper="O(n + n k / sqrt m)",
    if_fails="where the exact way takes a few milliseconds, the look-up of pieces and the windows begun before the budget is spent cost more",
)
def bounded_budget(results: Results) -> Any:
    return asked(results).mean("over_exact", "bounded") <= 2


@study.claim("approximate distances are within (1 - epsilon) D and D at every window", paper="~O(epsilon^-0.93 n), Monte Carlo")
def guaranteed(results: Results) -> Any:
    return asked(results).mean("wrong", "approximate") <= 0


@study.claim("the factor sqrt(log m) is gone", paper="O(n sqrt m) in place of O(n sqrt(m log m))")
def no_logarithm(results: Results) -> Any:
    raise NotTestable("asymptotic: at most a factor 5 for any real m, by a lemma that is not built")


@study.claim("the exponent of 1 / epsilon is 0.93", paper="~O(epsilon^-0.93 n)")
def exponent(results: Results) -> Any:
    raise NotTestable("asymptotic: by products of matrices that no machine runs")


@study.summary
def summary(results: Results) -> str:
    say = results.say
    if any(row.coordinates.get("data") == "yours" for row in results.rows):
        lengths = sorted(dict(point)["m"] for point in results.curve("seconds", "ours"))
        at = {"data": "yours", "m": lengths[-1]}
        return (
            f"The distances of {lengths[-1]:,} letters from every window of your text took {say('seconds', 'ours', **at)}, by one correlation a "
            f"letter {say('seconds', 'oaconvolve', **at)}, compared plainly {say('seconds', 'direct', **at)}."
        )
    dna_at, words_at = ({"data": name, "m": 4096} for name in ("dna", "words"))
    return (
        f"The distances of 4,096 bases from a million windows of DNA took {say('seconds', 'ours', **dna_at)} "
        f"({say('seconds', 'ours', beside='oaconvolve', **dna_at)} of one correlation a letter, {say('seconds', 'ours', beside='direct', **dna_at)} "
        f"of a plain comparison), of 4,096 words {say('seconds', 'ours', **words_at)} ({say('seconds', 'ours', beside='oaconvolve', **words_at)}). "
        f"On sqrt(m) letters time grew as m^{say('slope', 'ours', **HARD)}. Of passages with 40 % of their words replaced "
        f"{say('accuracy', 'ours', replaced=0.4)} were found, in {say('passage_seconds', 'ours')} each, "
        f"{say('passage_seconds', 'bounded')} up to k, and {say('passage_seconds', 'approximate')} by hashing, which costs more than the exact way."
    )
