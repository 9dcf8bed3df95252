"""The study's arms on a user's sequences, its claims, the verb, and the data's splits."""

from __future__ import annotations

import itertools
import json
import random

import numpy as np
import pytest
import torch

from fewer.diffusion.gumbel_flow import SequenceCNN, bench, problems
from fewer.diffusion.gumbel_flow import study as study_module
from fewer.diffusion.gumbel_flow.problems import designs_of
from fewer.diffusion.gumbel_flow.study import study
from fewer.errors import UserError
from fewer.inputs import read_fasta
from fewer.study import Results, Scale, Trial
from fewer.study.results import Row
from fewer.study.trial import FigureEvent, TrialSpec
from fewer.study.verdicts import judge
from fewer.tasks.sequences import ALPHABETS, composition, decoded, edit_distances, encoded, entropy, families, word_divergence

pytestmark = pytest.mark.usefixtures("cache")
DRAW = random.Random(0)
ROWS = [
    *(("".join(DRAW.choices("ADEGILV", k=DRAW.randint(6, 10))), 0) for _ in range(60)),
    *(("".join(DRAW.choices("KRWFLGI", k=DRAW.randint(6, 10))), 1) for _ in range(60)),
]
DESIGNS = {"positive", "entropy", "unique", "novel", "composition"}


@pytest.fixture
def quick(monkeypatch):
    """Everything small: few designs, short training."""
    monkeypatch.setattr(study_module, "COUNT", 12)
    monkeypatch.setattr(study_module, "STEPS", 3)
    monkeypatch.setattr(study_module, "DRAWS", 300)
    monkeypatch.setattr(study_module, "TOY_STEPS", 3)
    monkeypatch.setattr(study_module, "TOY_TRAINING", (3, 32, 2e-3))
    monkeypatch.setattr(problems, "peptides", lambda full=False: designs_of(ROWS, ALPHABETS["protein"], (20, 20), 8))
    of_fasta = problems.of_fasta

    def small(file, full=False):
        made = of_fasta(file, full)
        return problems.Designs(made.letters, made.train, made.test, (5, 5), 8)

    monkeypatch.setattr(problems, "of_fasta", small)


def figures(arm: str, **options: str) -> list[FigureEvent]:
    chosen = study.choose_options(options)
    job, events = study.build_task(Scale.QUICK, chosen), []
    study.arms[arm].run(job, Trial(TrialSpec(study.slug, study.slug, arm, 0, Scale.QUICK, chosen), events.append))
    return [event for event in events if isinstance(event, FigureEvent)]


@pytest.mark.parametrize("arm", list(study.arms))
@pytest.mark.usefixtures("quick")
def test_every_arm_runs_and_logs_its_figures(arm):
    found = figures(arm)
    names = {each.name for each in found}
    assert all(np.isfinite(each.value) for each in found)
    if arm in ("dirichlet", "positions", "markov"):
        assert not names, "at full scale alone"
    elif arm in ("uniform", "law", "exact", "gs-fm", "gs-sm", "linear", "mask"):
        assert [each.coordinates["letters"] for each in found if each.name == "kl"] == [4, 20]
    else:
        assert names >= DESIGNS
        if arm.startswith("gamma"):
            assert next(each.value for each in found if each.name == "calls") == 3 * (1 if arm.endswith("m1") else 4)


@pytest.mark.parametrize("kind", ["gs-fm", "mask", "markov", "positions", "law"])
def test_promoters_are_judged_by_words_of_a_held_out_chromosome(monkeypatch, kind):
    tokens = [torch.randint(4, (n, 60), generator=torch.Generator().manual_seed(n)) for n in (80, 40)]
    monkeypatch.setattr(problems, "promoters", lambda length: tokens)
    for name, value in {"PROMOTER_COUNT": 10, "PROMOTER_LENGTH": 60, "PROMOTER_TRAINING": (2, 4, 1e-3)}.items():
        monkeypatch.setattr(study_module, name, value)
    events = []
    study_module.promoters(Trial(TrialSpec(study.slug, study.slug, kind, 0, Scale.FULL, {}), events.append), kind)
    found = {(each.name, each.coordinates.get("word")): each.value for each in events if isinstance(each, FigureEvent)}
    assert set(found) == {("words", 4), ("words", 6), ("gc_profile", None), ("tata", None), ("nearest", None)}
    assert found["words", 4] < found["words", 6] <= 1


@pytest.fixture
def fasta(tmp_path):
    (tmp_path / "mine.fasta").write_text(
        "".join(f">s{i} label={label}\n{row[:4].lower()}\n{row[4:]}\n" for i, (row, label) in enumerate(ROWS))
    )
    return tmp_path / "mine.fasta"


@pytest.mark.usefixtures("quick")
def test_the_study_designs_a_users_own_sequences(fasta):
    assert {each.name for each in figures("gamma-0.1", data=str(fasta))} >= DESIGNS
    assert {each.name for each in figures("wanted", data=str(fasta))} >= DESIGNS | {"accuracy"}
    assert not figures("gs-fm", data=str(fasta)), "a known law is none of theirs"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (">a label=0\nACDX1\n", r"record 1 \(a label=0\) has 'X' at position 4"),
        ("ACD\n", "letters before the first '>'"),
        ("", "holds no sequences"),
        (">a\n>b\nACD\n", r"record 1 \(a\) has no letters"),
        (">a\nACD\n", "says no label=0 or label=1"),
        (">a label=0\nACD\n", "fewer than 20 sequences of a class"),
    ],
)
def test_a_users_file_that_cannot_be_used_is_told(tmp_path, text, words):
    (tmp_path / "bad.fasta").write_text(text)
    with pytest.raises(UserError, match=words):
        study.build_task(Scale.QUICK, study.choose_options({"data": str(tmp_path / "bad.fasta")}))
    with pytest.raises(UserError, match="no file"):
        study.build_task(Scale.QUICK, study.choose_options({"data": str(tmp_path / "absent.fasta")}))


# Splits and measures


def test_no_family_is_on_both_sides_of_a_split():
    near = [(row[:-1] + "K", label) for row, label in ROWS[:20] if len(row) > 9]
    made = designs_of([*ROWS, *near], ALPHABETS["protein"], (1, 1), 8)
    assert set(made.train[0]).isdisjoint(made.test[0])
    for a, b in itertools.product(made.train[0], made.test[0]):
        assert edit_distances([a], [b])[0] >= 0.2 * max(len(a), len(b)) - 1e-9


def test_edit_distances_and_families_are_those_by_hand():
    assert edit_distances(["AAAA", "", "ABC"], ["AATA", "AB", "CBA"]).tolist() == [1, 2, 2]
    found = families(["ACDEFGHIKL", "ACDEFGHIKV", "WWWWWWWWWW", "ACDEFGHIVV"])
    assert found[0] == found[1] == found[3] != found[2]  # a chain: the ends are 80 % alike, each step 90 %


def test_measures_are_what_they_say():
    assert entropy(["AC", "CA"], "ACGT") == pytest.approx(1)
    np.testing.assert_allclose(composition(["AAC"], "ACGT"), [[2 / 3, 1 / 3, 0, 0]])
    a = torch.randint(4, (50, 40))
    assert word_divergence(a, a, 3) == pytest.approx(0, abs=1e-9)
    assert word_divergence(torch.zeros(2, 9, dtype=torch.long), torch.ones(2, 9, dtype=torch.long), 2) == pytest.approx(1)
    tokens, mask = encoded(["ACG", "T"], "ACGT")
    assert decoded(tokens, mask, "ACGT") == ["ACG", "T"]
    assert study_module.tata_share(encoded(["A" * 60 + "TATAA" + "A" * 30, "A" * 95], "ACGT")[0]) == 0.5


def results_of(kl: dict[str, float], positive: dict[str, float], spread: float) -> Results:
    rows = []
    for seed in range(3):
        rows += [Row(arm, seed, "kl", {"letters": k}, value + 0.001 * seed) for arm, value in kl.items() for k in (4, 20)]
        rows += [Row(arm, seed, "positive", {}, value + 0.001 * seed) for arm, value in positive.items()]
        rows += [Row("letters", seed, "entropy", {}, 4.3)]
        rows += [Row("gamma-0.1", seed, name, {}, spread * v) for name, v in (("unique", 1.0), ("entropy", 3.6))]
    return Results(rows, list(study.arms))


def test_claims_turn_where_the_method_gains_nothing():
    positive = {"unguided": 0.3, "gamma-0.1": 0.9, "best-of-4": 0.7, "letters": 0.2}
    good = results_of({"gs-fm": 0.1, "exact": 0.09, "uniform": 0.6}, positive, 1.0)
    bad = results_of({"gs-fm": 0.5, "exact": 0.09, "uniform": 0.6}, positive | {"gamma-0.1": 0.5}, 0.5)
    for results, wanted in ((good, "holds"), (bad, "fails")):
        for verdict in judge(study, results)[:5]:
            assert verdict.verdict == wanted, verdict
    assert [each.verdict for each in judge(study, good)[5:]] == ["not testable here"] * 2
    assert "designs were judged wanted" in study.summarise(good)


def test_the_racers_give_what_they_should():
    for ours, theirs in (bench.draws(), bench.velocities(), bench.guidance()):
        assert ours().shape == theirs().shape
        assert ours().isfinite().all()


# The verb

SMALL = ("--n", "7", "--steps", "3", "--train-steps", "4", "--width", "8", "--out", "made.fasta")


def test_the_verb_writes_designs_that_are_read_back(fewer, fasta, tmp_path):
    told = json.loads(fewer("design", str(fasta), *SMALL, "--json").stdout)
    assert told == {"out": "made.fasta", "designs": 7, "guided": False, "trained_on": 120}
    first = read_fasta(tmp_path / "made.fasta", ALPHABETS["protein"])
    assert len(first) == 7
    assert "made.fasta" in fewer("design", str(fasta), *SMALL, status=2).stderr
    assert "7 designs towards the guide" in fewer("design", str(fasta), *SMALL, "--overwrite", "--towards", str(fasta)).stdout
    torch.manual_seed(0)
    SequenceCNN(20, width=8, outputs=1).save(tmp_path / "guide.safetensors")
    fewer("design", str(fasta), *SMALL, "--overwrite", "--guide", "guide.safetensors", "--gamma", "30")
    assert read_fasta(tmp_path / "made.fasta", ALPHABETS["protein"]) != first


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--alphabet", "dna"), "expected letters of ACGT"),
        (("--guide", "absent"), "expected a network"),
        (("--guide", "generator.safetensors"), "is no classifier of 20 letters"),
        (("--guide", "g", "--towards", "t"), "expected one of them"),
        (("--gamma", "nan"), "gamma"),
        (("--n", "0"), "--n"),
        (("--towards", "absent"), "no file"),
    ],
)
def test_what_the_verb_cannot_do_is_one_error_and_writes_nothing(fewer, fasta, tmp_path, words, message):
    SequenceCNN(20, width=8).save(tmp_path / "generator.safetensors")
    told = fewer("design", str(fasta), *SMALL, *words, status=2).stderr
    assert message in told
    assert "Traceback" not in told
    assert not (tmp_path / "made.fasta").exists()
