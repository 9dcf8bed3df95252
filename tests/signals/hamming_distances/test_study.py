"""The estimator, the verb, and every arm of the study on small texts."""

from __future__ import annotations

import json

import numpy as np
import pytest
from plain_windows import plain
from sklearn.base import clone

from fewer.signals.hamming_distances import SequenceContamination
from fewer.signals.hamming_distances.problems import Texts, contaminate
from fewer.study import Scale, Trial
from fewer.study.trial import FigureEvent, TrialSpec

GENOME = ">one\nGATTACAGATTACA\nGGGG\n>two\nTTGATCACATT\n"


def test_the_estimator_finds_passages_within_one_sequence():
    rng = np.random.default_rng(0)
    train = [rng.integers(50, size=int(n)) for n in (400, 30, 250)]
    passage = train[2][40:100].copy()
    passage[[3, 30, 59]] = 77
    across = np.concatenate([train[0][-20:], train[1]])
    estimator = SequenceContamination(threads=1)
    assert clone(estimator).get_params() == {"threads": 1, "wildcard": None}
    scores, places = estimator.fit(train).score_samples([passage, train[1], across])
    assert scores[:2].tolist() == [3 / 60, 0.0]
    assert places[:2].tolist() == [[2, 40], [1, 0]]
    best = min(int(plain(each, across).min()) for each in train if len(each) >= 50)
    assert scores[2] == best / 50, "windows over the border of two sequences are none"
    scores, places = SequenceContamination(wildcard=b"?").fit([b"cat", b"dog"]).score_samples([b"?o?"])
    assert (scores.tolist(), places.tolist()) == ([0.0], [[1, 0]])


def test_the_verb_prints_the_nearest_windows(fewer, tmp_path):
    (tmp_path / "genome.fa").write_text(GENOME)
    (tmp_path / "motif.fa").write_text(">m\nGATTACA\n")
    found = json.loads(fewer("hamming", "genome.fa", "motif.fa", "--fasta", "--max-distance", "1", "--json").stdout)
    assert found == [
        {"record": "one", "position": 0, "distance": 0},
        {"record": "one", "position": 7, "distance": 0},
        {"record": "two", "position": 2, "distance": 1},
    ]
    assert (
        json.loads(fewer("hamming", "motif.fa", "genome.fa", "--fasta", "--max-distance", "1", "--json").stdout) == found
    )  # in either order
    other = fewer("hamming", "GATNACA", "genome.fa", "--letters", "--fasta", "--wildcard", "N", "--top", "3").stdout
    told = fewer("hamming", "genome.fa", "GATNACA", "--letters", "--fasta", "--wildcard", "N", "--top", "3").stdout
    assert told == other
    assert [line.split()[:2] for line in told.splitlines()] == [["0", "0"], ["0", "7"], ["0", "2"], ["3", "windows"]]
    (tmp_path / "log.txt").write_text("open read read close\nopen write sync close")
    (tmp_path / "wanted.txt").write_text("open read sync close")
    found = json.loads(fewer("hamming", "log.txt", "wanted.txt", "--tokens", "word", "--json", "--top", "2").stdout)
    assert [(each["position"], each["distance"]) for each in found] == [(0, 1), (4, 1)]
    found = json.loads(fewer("hamming", "log.txt", "wanted.txt", "--tokens", "byte", "--json", "--top", "1").stdout)
    assert found == [{"record": "log.txt", "position": 0, "distance": 4}]
    found = json.loads(fewer("hamming", "log.txt", "SYNC", "--letters", "--case-fold", "--json", "--top", "1").stdout)
    assert found == [{"record": "log.txt", "position": 32, "distance": 0}]
    (tmp_path / "strasse.txt").write_text("die straße am fluss")
    found = json.loads(fewer("hamming", "strasse.txt", "am", "--letters", "--case-fold", "--json", "--top", "1").stdout)
    assert found == [{"record": "strasse.txt", "position": 11, "distance": 0}]
    np.save(tmp_path / "text.npy", np.arange(100) // 3)
    np.save(tmp_path / "pattern.npy", np.array([5, 6, 6]))
    assert fewer("hamming", "text.npy", "pattern.npy", "--top", "1").stdout.split()[:2] == ["0", "17"]


@pytest.mark.parametrize(
    ("words", "position"),
    [
        (["gatt.fa", "att", "--letters", "--fasta"], 1),
        (["gatt.fa", "nT", "--letters", "--fasta", "--wildcard", "n"], 1),
        (["path.txt", "b//C/", "--letters"], 2),
        (["path.txt", "c?", "--letters", "--case-fold", "--wildcard", "?"], 5),
        (["path.txt", "xc/", "--letters", "--case-fold", "--wildcard", "x"], 4),
    ],
)
def test_letters_and_wildcards_are_taken_as_they_stand(fewer, tmp_path, words, position):
    (tmp_path / "gatt.fa").write_text(">a\ngatt\n")
    (tmp_path / "path.txt").write_text("a/b//C/d")
    found = json.loads(fewer("hamming", *words, "--top", "1", "--json").stdout)
    assert [(each["position"], each["distance"]) for each in found] == [(position, 0)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["motif.fa", "", "--letters"], "pattern has shape (0,); expected at least one letter"),
        (["bare.fa", "motif.fa", "--fasta"], "bare.fa, line 1: letters before the first '>'"),
        (["mixed.fa", "motif.fa", "--fasta"], "has upper and lower case, such as 't'; expected one of them: give --case-fold"),
        (["motif.fa", "pair.fa", "--fasta"], "pair.fa has 2 records; expected one pattern"),
        (["motif.fa", "GATTACAGATT", "--letters", "--fasta"], "the pattern has 11 letters and the longest record 7"),
        (["two.fa", "GAT", "--letters", "--fasta"], "the pattern has 3 letters and the longest record 2"),
        (["floats.npy", "floats.npy"], "float64; expected letters"),
        (["floats.npy", "1", "--letters"], "floats.npy holds numbers; expected no --letters"),
        (["motif.fa", "a b", "--letters", "--tokens", "word", "--wildcard", "a"], "--wildcard a with --tokens word"),
        (["motif.fa", "a", "--letters", "--wildcard", "ab"], "wildcard is 'ab' for letters of type str"),
        (["motif.fa", "absent", "--tokens", "byte"], "absent is no file; expected a file of bytes"),
    ],
)
def test_the_verb_says_what_is_wrong_with_a_file(fewer, tmp_path, words, message):
    (tmp_path / "bare.fa").write_text("GATTACA\n")
    (tmp_path / "mixed.fa").write_text(">a\nGAtTACA\n")
    (tmp_path / "two.fa").write_text(">a\nGA\n>b\nTA\n")
    (tmp_path / "pair.fa").write_text(">a\nG\n>b\nT\n")
    (tmp_path / "motif.fa").write_text(">m\nGATTACA\n")
    np.save(tmp_path / "floats.npy", np.ones(4))
    refused = fewer("hamming", *words, status=2)
    assert message in " ".join(refused.stderr.split())
    assert "Traceback" not in refused.stderr


def test_passages_are_planted_where_they_are_said_to_be():
    rng = np.random.default_rng(1)
    texts = [rng.integers(900, size=700) for _ in range(30)]
    text, planted = contaminate(texts, 8_000, rng)
    assert len(planted) == 20
    for each in planted:
        assert np.count_nonzero(text[each.position : each.position + 256] != each.passage) == each.distance
        assert abs(each.distance / 256 - each.replaced) < 0.03


def run_all(study, work, scale=Scale.QUICK):
    from fewer.study.results import Row

    rows = []
    for name, arm in study.arms.items():
        events = []
        arm.run(work, Trial(TrialSpec("study", study.slug, name, 0, scale, arm.defaults(scale, {})), events.append))
        rows += [Row(name, 0, each.name, each.coordinates, each.value) for each in events if isinstance(each, FigureEvent)]
    return rows


def test_every_arm_logs_what_the_claims_ask_for(monkeypatch):
    from fewer.signals.hamming_distances import problems
    from fewer.signals.hamming_distances import study as module
    from fewer.study import Results, judge

    for where in (module, problems):
        monkeypatch.setattr(where, "LENGTH", 24_000)
    for name, value in {"WORDS": 8_000, "BOUNDS": (0, 40), "EPSILONS": (0.5, 0.2), "SWEPT": 3_000, "ROUNDS": 1, "LONG": 0.001}.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(problems, "PASSAGES", 5)
    rng = np.random.default_rng(2)
    named = {"dna": rng.integers(4, size=24_000).astype(np.uint8), "words": np.minimum(rng.zipf(1.3, 24_000), 5_000)}
    texts = Texts(named, [rng.integers(900, size=700) for _ in range(30)], (64, 4096))
    rows = run_all(module.study, texts)
    assert sum(row.value for row in rows if row.figure == "wrong") == 0
    assert {figure.name for figure in module.study.figures} <= {row.figure for row in rows}
    results = Results(rows, list(module.study.arms))
    verdicts = judge(module.study, results)
    assert [verdict.verdict for verdict in verdicts].count("not testable here") == 2
    assert "The distances of 4,096 bases" in module.study.summarise(results)


def test_a_text_of_ones_own_is_told_and_not_judged(tmp_path):
    from fewer.signals.hamming_distances import study as module
    from fewer.study import Results, judge

    (tmp_path / "mine.txt").write_text("the quick brown fox jumps over the lazy dog " * 8)
    work = module.task(Scale.QUICK, text=str(tmp_path / "mine.txt"))
    results = Results(run_all(module.study, work), list(module.study.arms))
    assert {verdict.verdict for verdict in judge(module.study, results)} == {"not testable here"}
    assert "The distances of 64 letters" in module.study.summarise(results)
    np.save(tmp_path / "floats.npy", np.ones(400))
    (tmp_path / "short.txt").write_text("short")
    for name, message in (("floats.npy", "float64; expected letters"), ("short.txt", "at least 128")):
        with pytest.raises(ValueError, match=message):
            module.task(Scale.QUICK, text=str(tmp_path / name))
