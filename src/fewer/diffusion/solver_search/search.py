"""The search of a solver schedule for one checkpoint and budget: evolution, guided by a predictor that learns to rank schedules."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import kendalltau
from torch import Tensor, nn

from fewer.checks import check_whole
from fewer.diffusion._shared import NoiseSchedule
from fewer.diffusion._shared.prediction import Epsilon, at_least_single
from fewer.diffusion.dpm_solver_v3 import EMS
from fewer.diffusion.solver_search.decisions import AFS, CORRECTORS, GRIDS, MAX_ORDER, PREDICTIONS, PRESETS, SolverSchedule
from fewer.diffusion.solver_search.evolution import SearchSpace, fewest
from fewer.diffusion.solver_search.solver import make_plan, run
from fewer.diffusion.solver_search.taylor import Integrals
from fewer.files import whole_file
from fewer.fitting import fit_steps

CANDIDATES, BEST, AT_RANDOM = 2000, 40, 10  # of a round: drawn, scored by rank, scored by chance (not in the paper)
FIRST_RANDOM = 40  # beside the presets
FINALISTS, FRESH = 5, 4  # rescored at the end, on so many times the noises
MOST_FAILURES = 50  # in a row
SAME_SCORE = 1e-3  # relative; what a score may differ by from one machine to the next
HIDDEN, MEMBERS, MARGIN = 64, 3, 0.1  # of the predictor
EPOCHS, RATE = 80, 1e-2  # of whole batches: 200 at 1e-3 rank no better, and take 2.5 times as long
Score = Callable[[SolverSchedule], float]


class Objective:
    """The root of the mean squared distance to where the exact flow takes fixed noises; lower is better.

    All candidates begin at the same noises: their first call is made once.

    Args:
        eps: eps(x, t) at the noise schedule's time.
        noises: at the schedule's t_max, [N, *shape].
        reference: where they end, [N, *shape].
        ems, mean_x0: for v3 steps and afs "average_x0".

    Attributes:
        calls: of the network so far, in units of one sample.
    """

    def __init__(
        self,
        eps: Epsilon,
        noises: Float[Tensor, "N *shape"],
        reference: Float[Tensor, "N *shape"],
        noise_schedule: NoiseSchedule,
        ems: EMS | None = None,
        mean_x0: Tensor | None = None,
    ) -> None:
        if noises.shape != reference.shape:
            raise ValueError(f"noises are {tuple(noises.shape)}, reference {tuple(reference.shape)}; expected one end a noise")
        self.eps, self.noises, self.reference, self.noise_schedule, self.mean_x0 = eps, noises, reference, noise_schedule, mean_x0
        self.integrals = Integrals(ems) if ems is not None else None
        self.calls, self._first = 0, dict[str, Tensor]()

    def _epsilon(self, x: Tensor, t: Tensor) -> Tensor:
        if x is self.noises:
            at = f"{float(t):.9g}"  # the EMS' grid begins at the same time, up to rounding
            if at not in self._first:
                self._first = {at: self._called(x, t)}
            return self._first[at]
        return self._called(x, t)

    def _called(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += len(x)
        return self.eps(x, t)

    @torch.no_grad()
    def ends(self, schedule: SolverSchedule) -> Float[Tensor, "N *shape"]:
        """Where the schedule takes the noises."""
        plan = make_plan(schedule, self.noise_schedule, self.integrals, self.mean_x0)
        return run(self._epsilon, self.noises, plan.to(self.noises.to(at_least_single(self.noises.dtype))))

    def __call__(self, schedule: SolverSchedule) -> float:
        return float((self.ends(schedule) - self.reference).double().square().mean().sqrt())


def evaluate(
    schedule: SolverSchedule,
    model: Epsilon,
    noises: Float[Tensor, "N *shape"],
    reference: Float[Tensor, "N *shape"],
    noise_schedule: NoiseSchedule,
    ems: EMS | None = None,
    mean_x0: Tensor | None = None,
) -> float:
    """RMSE of a schedule to the reference ends of these noises; arguments as of `Objective`."""
    return Objective(model, noises, reference, noise_schedule, ems, mean_x0)(schedule)


@dataclass(frozen=True)
class Scored:
    """A schedule and what the objective said of it."""

    schedule: SolverSchedule
    score: float


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        best: the schedule of the least score, of any number of calls.
        pareto: network calls -> the best schedule.
        score: network calls -> its score: on the search noises; the fresh score beside it where it was rescored.
        history: all that was scored, in order.
        evaluations: how many times an objective was asked, rescoring in units of the search noises.
        dropped: schedules whose score was not finite.
        tau: Kendall's rank correlation of predicted and true scores, a round each, of schedules that the predictor had not seen.
    """

    best: SolverSchedule
    pareto: dict[int, SolverSchedule]
    score: dict[int, float]
    history: list[Scored]
    evaluations: int
    dropped: int
    tau: list[float]


def features(schedules: Sequence[SolverSchedule]) -> tuple[Float[Tensor, "N steps F"], Tensor]:
    """One row a step: lambda_t, h, one-hot prediction and order, q, c, corrector, afs; and how many steps each has."""
    width = 4 + len(PREDICTIONS) + MAX_ORDER + len(CORRECTORS) + len(AFS)
    rows = np.zeros((len(schedules), max(len(each.steps) for each in schedules), width), dtype=np.float32)
    for row, schedule in zip(rows, schedules, strict=True):
        afs = width - len(AFS) + AFS.index(schedule.afs)
        for at, step, s, t in zip(row, schedule.steps, schedule.lambdas, schedule.lambdas[1:], strict=False):
            at[:4] = t / 4, t - s, len(fewest(step)[0]), 4 * step.coefficient
            at[4 + PREDICTIONS.index(step.prediction)] = at[6 + step.order] = at[11 + CORRECTORS.index(step.corrector)] = at[afs] = 1
    return torch.from_numpy(rows), torch.tensor([len(each.steps) for each in schedules])


class Ranker(nn.Module):
    """GRU over the steps, then an MLP: a number that is lower for better schedules."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gru = nn.GRU(width, HIDDEN, batch_first=True)
        self.head = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))

    def forward(self, rows: Float[Tensor, "N steps F"], lengths: Tensor) -> Float[Tensor, "N"]:
        states, _ = self.gru(rows)
        return self.head(states[torch.arange(len(rows)), lengths - 1])[:, 0]  # at each one's last step


class Predictor:
    """An ensemble that learns to rank schedules from those already scored (the hinge of pairs; not in the paper in detail).

    Examples:
        >>> noise_schedule = NoiseSchedule.edm(0.02, 80.0)
        >>> known = [SolverSchedule.preset("dpm++2m", n, noise_schedule) for n in (2, 4, 6, 8)]
        >>> predictor = Predictor(seed=0).fit(known, [4.0, 3.0, 2.0, 1.0])
        >>> predictor(known).argsort().tolist()
        [3, 2, 1, 0]
    """

    def __init__(self, seed: int) -> None:
        self.seed, self.members = seed, list[Ranker]()

    def fit(self, schedules: Sequence[SolverSchedule], scores: Sequence[float]) -> Predictor:
        """Train anew on all that is known."""
        rows, lengths = features(schedules)
        true = torch.tensor(scores, dtype=torch.float64)
        better = (true[:, None] < true[None]).float()  # a before b
        self.members = []
        for member in range(MEMBERS):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed * MEMBERS + member)
                model = Ranker(rows.shape[-1])

            def loss(share: Tensor, model: Ranker = model) -> Tensor:
                said = model(rows, lengths)
                return (share * torch.relu(MARGIN - (said[None] - said[:, None]))).sum()

            fit_steps(torch.optim.Adam(model.parameters(), lr=RATE), loss, [better / better.sum().clamp(min=1)], EPOCHS)
            self.members.append(model.eval())
        return self

    @torch.no_grad()
    def __call__(self, schedules: Sequence[SolverSchedule]) -> Float[Tensor, "N"]:
        """The lower, the better it should be."""
        rows, lengths = features(schedules)
        said = torch.stack([member(rows, lengths) for member in self.members])
        return ((said - said.mean(1, keepdim=True)) / (said.std(1, keepdim=True) + 1e-9)).mean(0)


@dataclass
class ScheduleSearch:
    """A search of solver schedules (arXiv 2312.07243, section 4); nothing of the network is trained.

    Stage 0 scores the presets and `first_random` schedules; then children of the best are scored: with the predictor the most promising
    of many and some at random, round by round, else one after the other.

    Args:
        space: what may be chosen.
        objective: schedule -> score, lower is better; such as `Objective`.
        nfe: network calls, one number or several, whose schedules are parents of one another.
        budget: evaluations in all, the rescoring included.
        predictor: whether schedules are ranked before they are scored.
        seed: everything random comes from it.
        rescore: an objective on fresh noises, four times as many: the `FINALISTS` best of each number of calls are scored by it, at the
            price of four evaluations each, as the best of many scores is partly luck.
        starts: in place of the presets.
        first_random: random schedules of stage 0 for each number of calls.
        journal: a file that every score is appended to; a search that finds it asks for one of them again, and goes on from it where
            that is the same.

    Raises:
        ValueError: a budget below the number of presets, or 50 schedules in a row without a finite score.
    """

    space: SearchSpace
    objective: Score
    nfe: int | Sequence[int]
    budget: int
    predictor: bool = True
    seed: int = 0
    rescore: Score | None = None
    starts: Sequence[SolverSchedule] | None = None
    first_random: int = FIRST_RANDOM
    journal: str | Path | None = None
    tell: Callable[[int, int, float], None] = lambda done, total, best: None
    scored: list[Scored] = field(default_factory=list, init=False)
    tau: list[float] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        given = list(self.nfe) if isinstance(self.nfe, Iterable) else [self.nfe]
        check_whole(budget=self.budget)
        for each in given:
            check_whole(nfe=each)
        if not given:
            raise ValueError("nfe is empty; expected a number of network calls, or several")
        self.calls = sorted({int(each) for each in given})
        check_whole(least=0, seed=self.seed, first_random=self.first_random)
        if self.starts is None:
            self.starts = [each for nfe in self.calls for each in presets(self.space, nfe)]
        self._fresh = FINALISTS * FRESH * len(self.calls) * (self.rescore is not None)
        self.limit = self.budget - self._fresh
        if self.limit < max(1, len(self.starts)):
            least = len(self.starts) + self._fresh
            raise ValueError(
                f"budget is {self.budget}; expected {least} or more: {len(self.starts)} presets, {self._fresh} to rescore the best"
            )

    def run(self) -> SearchResult:
        """Spend the budget."""
        self.scored, self.tau, self.dropped, self._failed, self._seen = [], [], 0, 0, set[SolverSchedule]()
        self.draw, self._known = random.Random(self.seed), self._read_journal()
        assert self.starts is not None
        for schedule in self.starts:
            self._score(schedule)
        for nfe in self.calls * self.first_random:
            if not self._spent:
                like = next((each for each in self.starts if each.nfe == nfe), None)
                self._score(self._unseen(lambda nfe=nfe, like=like: self.space.random(nfe, self.draw, like)))
        while not self._spent:
            for schedule in self._guided() if self.predictor and len(self.scored) > 1 else self._children(self.calls):
                if not self._spent:
                    self._score(schedule)
        return self._result()

    @property
    def _spent(self) -> bool:
        return len(self.scored) + self.dropped >= self.limit

    def _best(self, nfe: int, count: int) -> list[Scored]:
        return sorted((each for each in self.scored if each.schedule.nfe == nfe), key=lambda each: each.score)[:count]

    def _unseen(self, make: Callable[[], SolverSchedule]) -> SolverSchedule:
        """One that was not scored; after many tries, one that was."""
        made = make()
        for _ in range(100):
            if made not in self._seen:
                break
            made = make()
        return made

    def _children(self, calls: Sequence[int]) -> Iterator[SolverSchedule]:
        for nfe in calls:
            parents = [each.schedule for each in self._best(nfe, self.space.parents)]
            if not parents:
                yield self.space.random(nfe, self.draw)
                continue
            # several numbers of calls feed one another: a step more or less makes a child of the neighbour's
            wanted = nfe if len(self.calls) == 1 else None
            child = self._unseen(lambda parents=parents, wanted=wanted: self.space.child(parents, wanted, self.draw))
            yield child if child.nfe in self.calls else self.space.child([child], nfe, self.draw)

    def _guided(self) -> Iterator[SolverSchedule]:
        """A round: many candidates, of which the most promising and a few at random are scored."""
        predictor = Predictor(self.seed).fit([each.schedule for each in self.scored], [each.score for each in self.scored])
        drawn = {child: None for _ in range(CANDIDATES // len(self.calls)) for child in self._children(self.calls)}
        candidates, before = [each for each in drawn if each not in self._seen], len(self.scored)
        if not candidates:  # a space so small that all of it is known
            yield from self._children(self.calls)
            return
        said = predictor(candidates)
        order = said.argsort().tolist()
        chosen = order[:BEST] + self.draw.sample(order[BEST:], min(AT_RANDOM, len(order[BEST:])))
        self.draw.shuffle(chosen)  # how soon a round finds its best is to depend on no order within it
        yield from (candidates[i] for i in chosen)
        ranks = dict(zip(candidates, said.tolist(), strict=True))
        new = [each for each in self.scored[before:] if each.schedule in ranks]
        if len(new) > 2:
            agreement: Any = kendalltau([ranks[each.schedule] for each in new], [each.score for each in new])
            self.tau.append(float(agreement.statistic))

    def _score(self, schedule: SolverSchedule) -> None:
        self._seen.add(schedule)
        score = self._asked(self.objective, schedule, "search")
        if not math.isfinite(score):
            self.dropped, self._failed = self.dropped + 1, self._failed + 1
            if self._failed == MOST_FAILURES:
                raise ValueError(f"{MOST_FAILURES} schedules in a row scored {score}; expected finite numbers: look at the objective")
            return
        self._failed = 0
        self.scored.append(Scored(schedule, score))
        self.tell(len(self.scored) + self.dropped, self.budget, min(each.score for each in self.scored))

    def _asked(self, objective: Score, schedule: SolverSchedule, on: str) -> float:
        name = on, schedule
        if name not in self._known:
            self._known[name] = float(objective(schedule))
            if self.journal is not None:
                line = {"on": on, "schedule": json.loads(schedule.to_json()), "score": self._known[name]}
                with Path(self.journal).open("a", encoding="utf8") as file:
                    file.write(json.dumps(line) + "\n")
        return self._known[name]

    def _read_journal(self) -> dict[tuple[str, SolverSchedule], float]:
        """What a journal knows; a last line that was cut off is taken away."""
        known: dict[tuple[str, SolverSchedule], float] = {}
        if self.journal is None or not Path(self.journal).exists():
            return known
        text = Path(self.journal).read_text(encoding="utf8")
        whole, _, cut = text.rpartition("\n")
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                read = json.loads(line)
                known[read["on"], SolverSchedule.from_dict(read["schedule"])] = float(read["score"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.journal}, line {number} is no score ({error}); expected a search's journal: name another file"
                ) from None
        if cut:
            with whole_file(self.journal, overwrite=True) as part:
                part.write_text(whole + "\n" if whole else "", encoding="utf8")
        # scores of another model or of other noises would be taken for this one's: one is asked again
        tried = next(((schedule, score) for (on, schedule), score in known.items() if on == "search" and math.isfinite(score)), None)
        if tried is not None and not math.isclose(again := float(self.objective(tried[0])), tried[1], rel_tol=SAME_SCORE):
            raise ValueError(
                f"{self.journal} says {tried[1]:.6g} of a schedule that scores {again:.6g} here; expected a journal of the same model and "
                "noises: name another file"
            )
        return known

    def _result(self) -> SearchResult:
        pareto, score = {}, {}
        for nfe in self.calls:
            finalists = self._best(nfe, FINALISTS)
            if not finalists:
                continue
            rescore = self.rescore
            fresh = {each.schedule: self._asked(rescore, each.schedule, "rescore") for each in finalists} if rescore else {}
            chosen = min(finalists, key=lambda each: fresh.get(each.schedule, each.score))
            pareto[nfe], score[nfe] = chosen.schedule, chosen.score
        if not score:
            raise ValueError(f"none of {self.dropped} schedules had a finite score; expected some: look at the objective")
        best = pareto[min(score, key=lambda nfe: score[nfe])]
        return SearchResult(best, pareto, score, self.scored, len(self.scored) + self.dropped + self._fresh, self.dropped, self.tau)


def presets(space: SearchSpace, nfe: int, lower_order_final: bool = True) -> list[SolverSchedule]:
    """The named solvers on the three grids: what a search begins with, and what it is held against."""
    names = [name for name, said in PRESETS.items() if said["prediction"] != "v3" or space.nodes]
    return [SolverSchedule.preset(name, nfe, space.noise_schedule, spacing, lower_order_final) for name in names for spacing in GRIDS]
