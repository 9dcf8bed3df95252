"""Gumbel-Softmax flows beside other discrete generators on laws that are known, and guided peptides beside unguided ones.

One position of 4 or 20 letters tells what the flow itself leaves of an error, the exact posterior's floor beside it. Then a generator that
has seen only background peptides is guided to antimicrobial ones by a classifier of clean sequences; an independent random forest judges.
At full scale fly promoters come on top.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fewer.devices import one_thread
from fewer.diffusion.gumbel_flow import problems
from fewer.diffusion.gumbel_flow.cnn import SequenceCNN
from fewer.diffusion.gumbel_flow.guidance import STGuidance
from fewer.diffusion.gumbel_flow.path import GumbelSoftmaxPath, gumbel_flow_loss, gumbel_score_loss
from fewer.diffusion.gumbel_flow.peers import (
    DirichletPath,
    LinearPath,
    MaskPath,
    best_of,
    markov_chain,
    mask_loss,
    position_frequencies,
    sample_peer,
)
from fewer.diffusion.gumbel_flow.problems import Designs, divergence, exact_model, fit_model, toy_law
from fewer.diffusion.gumbel_flow.sampling import INTEGRATORS, Samples, draw_letters, sample
from fewer.errors import UserError
from fewer.study import Figure, Groups, NotTestable, Results, Scale, Study, Tradeoff, Trial
from fewer.study.results import All
from fewer.tasks.sequences import composition, decoded, encoded, entropy, one_hots, word_divergence

LETTERS, DRAWS, TOY_STEPS = (4, 20), 20_000, 50
TOY_TRAINING = (800, 512, 2e-3)  # steps, batch, rate
PROMOTER_TRAINING = (1500, 64, 2e-3)
COUNT, STEPS = 200, 25  # designs of an arm, steps of their sampling
PROMOTER_COUNT, PROMOTER_LENGTH = 2000, 128

study = Study(
    "gumbel-flow",
    question="How near does a softmax flow come to the law of its letters, and how far can it be guided without training?",
    baseline="unguided",
    figures=[
        Figure("positive", "designs judged antimicrobial (or wanted) by an independent forest", "", "higher"),
        Figure("entropy", "entropy of the letters", "bits", "higher"),
        Figure("unique", "share of designs that differ from all others", "", "higher"),
        Figure("novel", "share that is no training sequence", "", "higher"),
        Figure("composition", "distance of the letters' shares to the wanted training sequences'"),
        Figure("calls", "classifier calls a design"),
        Figure("cpu_seconds", "processor time of the designs", "s"),
        Figure("kl", "KL to the law, 4 letters", "nats", at={"letters": 4}),
        Figure("kl", "KL to the law, 20 letters", "nats", at={"letters": 20}),
        Figure("kl", "KL to the law", "nats", detail=True),
        Figure("corrections", "shares below 0 that were cut, a position", "", at={"letters": 20}),
        Figure("corner", "largest share of the final state", "", "", at={"letters": 20}),
        Figure("words", "Jensen-Shannon distance of 4-letter words to held-out promoters", "", at={"word": 4}),
    ],
    charts=[
        Tradeoff("positive", "calls", title="Designs judged wanted against classifier calls a design"),
        Groups("kl", over="letters", log=True, title="Distance to a known law"),
    ],
    time_limit=4 * 3600,
)
study.option("data", "", help="your own sequences: FASTA whose headers say label=0 (learned) or label=1 (guided to)")


@dataclass(frozen=True, eq=False)
class Task:
    designs: Designs
    own: bool  # a user's sequences: then everything is about them
    full: bool


@study.task
def task(scale: Scale, data: str) -> Task:
    full = scale is Scale.FULL
    try:
        return Task(problems.of_fasta(data, full) if data else problems.peptides(full), bool(data), full)
    except (OSError, ValueError) as mistake:  # in the user's own file
        raise UserError(str(mistake)) from mistake


# Known laws, and promoters


def trained(kind: str, k: int, net: nn.Module, tokens: Tensor, training: tuple[int, int, float], seed: int) -> Any:
    """A network fitted by one of the ways, and how it samples: (length, count, steps, generator, integrator) -> Samples."""
    path: Any = {"linear": LinearPath, "dirichlet": DirichletPath, "mask": MaskPath}.get(kind, GumbelSoftmaxPath)(k)
    objective = {"gs-sm": gumbel_score_loss, "mask": mask_loss}.get(kind, gumbel_flow_loss)
    fit_model(net, lambda model, rows, generator: objective(model, path, rows, generator=generator), [tokens], *training, seed)

    def drawn(length: int, count: int, steps: int, generator: torch.Generator, integrator: str = "exponential") -> Samples:
        if kind not in ("gs-fm", "gs-sm"):
            return sample_peer(net, path, length, count, steps, generator)
        prediction = "score" if kind == "gs-sm" else "posterior"
        return sample(net, path, length, count, steps, integrator, generator=generator, prediction=prediction)

    return drawn


def known_law(trial: Trial, kind: str, k: int, peaked: bool = True) -> None:
    """Log how far 20,000 draws are from the law; for this method's own ways also by each integrator and decoding."""
    law, draw, path = toy_law(k, trial.seed, peaked), torch.Generator().manual_seed(8000 + trial.seed), GumbelSoftmaxPath(k)
    started, own = time.process_time(), kind in ("exact", "gs-fm", "gs-sm")
    at = {"letters": k} if peaked else {"letters": k, "law": "nearly uniform"}
    if kind in ("uniform", "law"):
        shares = law if kind == "law" else torch.ones(k)
        trial.log("kl", divergence(torch.multinomial(shares, DRAWS, replacement=True, generator=draw), law), **at)
    else:
        model, integrators = exact_model(path, law), INTEGRATORS if own and peaked else INTEGRATORS[:1]
        if kind == "exact":
            found = {each: sample(model, path, 1, DRAWS, TOY_STEPS, each, generator=draw) for each in integrators}
        else:
            torch.manual_seed(trial.seed)
            tokens = torch.multinomial(law, 400_000, replacement=True, generator=draw)[:, None]
            sampler = trained(kind, k, problems.ToyNet(path), tokens, TOY_TRAINING, trial.seed)
            found = {each: sampler(1, DRAWS, TOY_STEPS, draw, each) for each in integrators}
        first = found[INTEGRATORS[0]]
        trial.log("kl", divergence(first.tokens, law), **at)
        if own and peaked:
            trial.log("corrections", first.corrections / DRAWS, **at)
            trial.log("corner", first.corners, **at)
            real = torch.ones(DRAWS, 1, dtype=torch.bool)
            for integrator, each in found.items():
                for decode, letters in (("argmax", each.tokens), ("sample", draw_letters(each.x, real, draw))):
                    trial.log("kl_of_ways", divergence(letters, law), letters=k, integrator=integrator, decode=decode)
    trial.log("law_seconds", time.process_time() - started, **at)


def promoters(trial: Trial, kind: str) -> None:
    """Log how far generated promoters are from a chromosome that was held out."""
    train, held_out = problems.promoters(PROMOTER_LENGTH)
    draw, k = torch.Generator().manual_seed(9000 + trial.seed), 4
    if kind == "uniform":
        found = torch.randint(k, (PROMOTER_COUNT, PROMOTER_LENGTH), generator=draw)
    elif kind == "law":
        found = train[torch.randperm(len(train), generator=draw)[:PROMOTER_COUNT]]
    elif kind == "positions":
        found = position_frequencies(train, k, PROMOTER_COUNT, draw)
    elif kind == "markov":
        found = markov_chain(train, k, PROMOTER_COUNT, draw)
    else:
        torch.manual_seed(trial.seed)
        net = SequenceCNN(k, width=64, kernel=9, dilations=(1, 1, 4, 16, 64))
        found = trained(kind, k, net, train, PROMOTER_TRAINING, trial.seed)(PROMOTER_LENGTH, PROMOTER_COUNT, 100, draw).tokens
    for word in (4, 6):
        trial.log("words", word_divergence(found, held_out, word), word=word)
    gc = [((each == 1) | (each == 2)).double().mean(0) for each in (found, held_out)]
    trial.log("gc_profile", float((gc[0] - gc[1]).abs().mean()))
    trial.log("tata", tata_share(found))
    nearest = [float((train == each).double().mean(1).max()) for each in found[:200]]
    trial.log("nearest", float(np.mean(nearest)))


def tata_share(tokens: Tensor) -> float:
    """Sequences with TATAA from 45 to 18 bases before the start site."""
    window, box = tokens[:, -45:-13].unfold(1, 5, 1), torch.tensor([3, 0, 3, 0, 0])
    return float((window == box).all(-1).any(-1).double().mean())


def generator_arm(job: Task, trial: Trial, kind: str, laws: bool = True, full_only: bool = False) -> None:
    if job.own:
        trial.note("law", "left out: your own sequences are designed")
        return
    if full_only and not job.full:
        trial.note("law", "at full scale alone")
        return
    with one_thread():  # rows of 4 to 20 numbers: a second thread would only wait
        for k in ((*LETTERS, 64) if job.full else LETTERS) if laws else ():
            known_law(trial, kind, k)
            if job.full:
                known_law(trial, kind, k, peaked=False)
            trial.progress(k, 64, f"a law of {k} letters")
    if job.full and kind != "exact":
        promoters(trial, kind)


study.arm_table(
    generator_arm,
    {
        "uniform": {"label": "letters drawn uniformly", "kind": "uniform"},
        "law": {"label": "drawn from the law itself (noise floor)", "kind": "law"},
        "exact": {"label": "Gumbel-Softmax flow, exact posterior", "kind": "exact"},
        "gs-fm": {"label": "Gumbel-Softmax flow matching", "kind": "gs-fm"},
        "gs-sm": {"label": "Gumbel-Softmax score matching", "kind": "gs-sm"},
        "linear": {"label": "linear flow matching", "kind": "linear"},
        "mask": {"label": "masked diffusion", "kind": "mask"},
        "dirichlet": {"label": "Dirichlet flow matching", "kind": "dirichlet", "full_only": True},
        "positions": {"label": "letters by position", "kind": "positions", "laws": False, "full_only": True},
        "markov": {"label": "Markov chain of order 3", "kind": "markov", "laws": False, "full_only": True},
    },
    against="uniform",
)


# Designs


def design(job: Task, trial: Trial, gamma: float = 0.0, num_samples: int = 4, candidates: int = 1) -> None:
    designs, seed = job.designs, trial.seed
    generator, guide = designs.generator(seed), designs.guide(seed)
    count = COUNT * (5 if job.full else 1)
    mask, draw = designs.masks(count, 7000 + seed), torch.Generator().manual_seed(seed)
    towards = STGuidance(guide, 1, gamma, num_samples, generator=torch.Generator().manual_seed(100 + seed))
    started = time.process_time()
    tries = [
        sample(generator, designs.path, mask.shape[1], count, STEPS, guidance=towards if gamma else None, generator=draw, mask=mask)
        for _ in range(candidates)
    ]
    tokens = tries[0].tokens
    if candidates > 1:

        def score(rows: Tensor) -> Tensor:
            towards.calls += len(rows)
            with torch.no_grad():
                return guide(one_hots(rows, mask.repeat(candidates, 1), len(designs.letters)))[:, 0]

        tokens = best_of(score, torch.stack([each.tokens for each in tries]))
    trial.log("cpu_seconds", time.process_time() - started)
    trial.log("calls", towards.calls / count)
    judge_designs(designs, trial, decoded(tokens, mask, designs.letters))


def judge_designs(designs: Designs, trial: Trial, sequences: list[str]) -> None:
    trial.log("positive", float(designs.judge.says(sequences).mean()))
    trial.log("entropy", entropy(sequences, designs.letters))
    trial.log("unique", len(set(sequences)) / len(sequences))
    trial.log("novel", float(np.mean([each not in set(designs.train[0]) for each in sequences])))
    shares = [composition(each, designs.letters).mean(0) for each in (sequences, designs.of(1))]
    trial.log("composition", float(np.abs(shares[0] - shares[1]).sum() / 2))


def reference(job: Task, trial: Trial, kind: str) -> None:
    """What the judge says of held-out sequences of each class, and of letters at random."""
    designs = job.designs
    if kind == "letters":
        mask, draw = designs.masks(COUNT, 7000 + trial.seed), torch.Generator().manual_seed(trial.seed)
        judge_designs(designs, trial, decoded(torch.randint(len(designs.letters), mask.shape, generator=draw), mask, designs.letters))
        return
    wanted = int(kind == "wanted")
    judge_designs(designs, trial, [sequence for sequence, label in zip(*designs.test, strict=True) if label == wanted])
    if wanted:
        tokens, mask = encoded(designs.test[0], designs.letters)
        with torch.no_grad():
            says = designs.guide(trial.seed)(one_hots(tokens, mask, len(designs.letters)))[:, 0].numpy() > 0
        trial.log("accuracy", float((says == designs.test[1]).mean()), of="guide")
        trial.log("accuracy", float((designs.judge.says(designs.test[0]) == designs.test[1]).mean()), of="judge")


study.arm_table(
    design,
    {
        "unguided": {"label": "no guidance"},
        "gamma-0.03": {"label": "guided, gamma 0.03", "gamma": 0.03},
        "gamma-0.1": {"label": "guided, gamma 0.1", "gamma": 0.1},
        "gamma-0.3": {"label": "guided, gamma 0.3", "gamma": 0.3},
        "gamma-0.1-m1": {"label": "guided, gamma 0.1, one draw", "gamma": 0.1, "num_samples": 1},
        "best-of-4": {"label": "best of 4 by the guide", "candidates": 4},
    },
)
study.arm_table(
    reference,
    {
        "wanted": {"label": "held-out sequences of the wanted class", "kind": "wanted"},
        "background": {"label": "held-out background", "kind": "background"},
        "letters": {"label": "letters at random", "kind": "letters"},
    },
)


# What the paper claims


def of_laws(results: Results) -> None:
    if not results.has("kl", "gs-fm"):
        raise NotTestable("with your own sequences no law is known")


@study.claim(
    "Four letters: trained flow matching comes within 0.03 nats of the exact posterior",
    paper="toy, K = 20: KL .029 (linear .013, Dirichlet .007)",
    if_fails="sampling begins where no training draw lies (the start has no letter in it), and the network extrapolates there",
)
def near_exact(results: Results) -> Any:
    of_laws(results)
    return results.difference("kl", "gs-fm", "exact", letters=4) <= 0.03


@study.claim(
    "Twenty letters: flow matching leaves at most 0.4 of the uniform sampler's divergence",
    paper="toy, K = 20: KL .029; the uniform sampler alone scores .041 there",
    if_fails="the path's floor grows with the number of letters, and sampling begins off the training states",
)
def below_uniform(results: Results) -> Any:
    of_laws(results)
    return results.ratio("kl", "gs-fm", "uniform", letters=20) <= 0.4


@study.claim(
    "Guidance (gamma 0.1) raises the share judged wanted by at least 0.3 over no guidance",
    paper="peptide binders comparable to or better than known ones on most targets",
    if_fails="the classifier's gradient and the independent judge agree on too little here",
)
def guided(results: Results) -> Any:
    return results.difference("positive", "gamma-0.1", "unguided") >= 0.3


@study.claim(
    "It is above the best of four candidates by the same classifier",
    paper="guidance without training, against rejection",
    if_fails="four tries find as much as the gradient does",
)
def above_best_of(results: Results) -> Any:
    return results.difference("positive", "gamma-0.1", "best-of-4") > 0


@study.claim(
    "And stays varied: at least 0.9 of the designs unique, at least 3.2 bits of entropy",
    paper="protein, unconditional: entropy 3.41, diversity 86.1 %",
    if_fails="the pull on a logit outweighs what the model says",
)
def varied(results: Results) -> Any:
    if len(results.values("entropy", "letters")) and results.mean("entropy", "letters").value < 2.1:
        raise NotTestable("an alphabet of four letters has at most 2 bits")
    return All((results.mean("unique", "gamma-0.1") >= 0.9, results.mean("entropy", "gamma-0.1") >= 3.2))


@study.claim(
    "Promoters: 4-letter words at most 0.6 of the uniform sampler's distance to a held-out chromosome",
    paper="promoter DNA: MSE of the Sei signal .029, as Dirichlet flow matching",
    if_fails="sequences of argmax decoding repeat the commonest words",
)
def promoter_words(results: Results) -> Any:
    if not results.has("words", "gs-fm"):
        raise NotTestable("a step on promoters costs over 0.1 s on a core; `fewer run gumbel-flow --full` trains them")
    return results.ratio("words", "gs-fm", "uniform", word=4) <= 0.6


@study.claim("The Sei signal, ESMFold's and docking scores of the paper", paper="pLDDT 52.5; 4EZN docking -6.5 against -4.1 kcal/mol")
def structures(results: Results) -> Any:
    raise NotTestable("the predictors of signals and structures are beyond this machine, and nothing here stands in for them")


@study.summary
def summary(results: Results) -> str:
    def share(arm: str) -> str:
        return f"{100 * results.mean('positive', arm).value:.0f} %" if results.has("positive", arm) else "?"

    told = f"Guided by a classifier of clean sequences, {share('gamma-0.1')} of the designs were judged wanted by an independent model, "
    told += f"unguided {share('unguided')}, the best of four {share('best-of-4')}"
    if results.has("kl", "gs-fm") and results.has("kl", "exact"):
        ours, floor, flat = (results.mean("kl", arm, letters=20).value for arm in ("gs-fm", "exact", "uniform"))
        told += f". On a law of 20 letters the trained flow ended {ours:.2f} nats away; the exact posterior leaves {floor:.2f}, uniform letters {flat:.2f}"
    return told + "."
