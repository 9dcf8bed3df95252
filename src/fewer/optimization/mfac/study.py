"""M-FAC beside what it replaces: magnitude and diagonal Fisher in pruning, SGD and AdamW in training, and its cost over d and m.

Every pruner prunes one trained network, by gradients of as many images each as serve it best on images that are held out: each tries the
same few numbers of them in each trial, so that no budget is larger than another's. Every optimiser
gets the same tuning of its learning rate and the same cosine schedule; a step's time is taken in turn with SGD's.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewer.fitting import evaluating, fit_steps
from fewer.meters import optimizer_bytes
from fewer.optimization.mfac import problems
from fewer.optimization.mfac.inverse_fisher import InverseFisher
from fewer.optimization.mfac.obs import independent_update, joint_update, saliency
from fewer.optimization.mfac.optimizer import MFAC
from fewer.optimization.mfac.problems import Subject, Task, finish, lowest, shuffled, slope
from fewer.study import Curve, Difference, Figure, LogUniform, NotTestable, Results, Scale, Study, Tradeoff, Trial
from fewer.study.results import All, bootstrap
from fewer.tasks import IMAGES_HELP, accuracy

SPARSITIES, AT = (0.5, 0.8, 0.9, 0.95, 0.98), 0.9
MAIN, GRADIENTS = 256, (64, 1024)  # m of the curves over sparsity; m looked at beside it, at a sparsity of 0.9
EVALUATIONS = 4  # an epoch, of the validation loss
IN_TURN = 40  # steps that are timed in turn with SGD's
DIVERGED = -1e9  # what tuning is told of a training that left the numbers

study = Study(
    "mfac",
    question="What does curvature beyond a diagonal buy in pruning and in training, and what does it cost?",
    baseline="sgd",
    objective="validation loss, negated",
    figures=[
        Figure("accuracy", "accuracy at 90 % sparsity", "%", "higher", at={"sparsity": AT}),
        Figure("accuracy_joint", "the same, joint update", "%", "higher", at={"sparsity": AT}),
        Figure("accuracy", "accuracy over sparsity", "%", "higher", detail=True),
        Figure("accuracy_joint", "accuracy over sparsity, joint update", "%", "higher", detail=True),
        Figure("accuracy_at_90", "accuracy at 90 % sparsity", "%", "higher", detail=True),
        Figure("accuracy_at_90_joint", "the same, joint update", "%", "higher", detail=True),
        Figure("dense_accuracy", "accuracy before pruning", "%", "higher", detail=True),
        Figure("loss", "final validation loss"),
        Figure("validation_accuracy", "validation accuracy", "%", "higher"),
        Figure("seconds", "gradients, scores and update; or training", "s"),
        Figure("cpu_seconds", "their processor time", "s", detail=True),
        Figure("joint_seconds", "a joint update", "s", detail=True),
        Figure("bytes", "gradients kept, or optimiser state", "bytes"),
        Figure("peak_memory", "peak resident memory of pruning", "bytes", detail=True),
        Figure("batch", "images a gradient, chosen on held-out ones", "", "", detail=True),
        Figure("unseen", "mean of damping x diag F^-1 (1: the gradients tell nothing of a weight)", "", "", detail=True),
        Figure("step_ratio", "time of a step beside SGD's, in turn", "x"),
        Figure("step_seconds", "time of a step", "s"),
        Figure("gradient_seconds", "of which the gradient", "s"),
        Figure("slope_over_d", "log-log slope of a push over d", "", ""),
        Figure("slope_over_m", "log-log slope of a push over m", "", ""),
        Figure("push_seconds", "processor time of a push and product over d", "s", detail=True),
        Figure("push_seconds_of_m", "processor time of a push and product over m", "s", detail=True),
    ],
    charts=[
        Curve("accuracy", over="sparsity", title="Test accuracy after pruning in one shot (256 gradients, independent update)"),
        Curve("accuracy_joint", over="sparsity", title="The same with the joint update"),
        Curve("accuracy_at_90", over="m", log=True, title="Test accuracy at 90 % sparsity over the number of gradients"),
        Curve("validation_loss", over="step", title="Validation loss over steps"),
        Curve("validation_loss", over="step", x="elapsed", title="Validation loss over seconds of training"),
        Curve("push_seconds", over="d", log=True, title="Processor seconds of a push and a product over d"),
        Difference("loss", title="Final validation loss minus SGD's"),
        Tradeoff("accuracy", "seconds", log=True, title="Accuracy at 90 % sparsity against time"),
    ],
    time_limit=4 * 3600,
)
study.option("data", "mnist", help=IMAGES_HELP)


@study.task
def task(scale: Scale, data: str) -> Task:
    if scale is Scale.FULL:
        return problems.full("cifar-10" if data == study.options["data"].default else data)
    return problems.quick(data)


# Pruning

DAMPING = {"damping": 1e-5}  # the released default
BATCHES = (1, 4, 16)  # images a gradient that every pruner tries: with many the differences between gradients average out


def log_costs(trial: Trial, cost: Any) -> None:
    for figure in ("seconds", "cpu_seconds", "peak_memory"):
        trial.log(figure, cost.figures()[figure])


@study.arm("magnitude", label="magnitude")
def magnitude(task: Task, trial: Trial) -> None:
    subject = Subject(task, trial.device, trial.seed)
    with trial.measure("prune") as cost:
        order = subject.weights.abs()
    log_costs(trial, cost)
    log_accuracies(task, trial, subject, order)


def log_accuracies(task: Task, trial: Trial, subject: Subject, order: Tensor) -> None:
    """Of the weights of highest importance, left as they are."""
    trial.log("dense_accuracy", subject.accuracy(subject.weights, task.test))
    for sparsity in SPARSITIES:
        trial.log("accuracy", subject.accuracy(torch.where(lowest(order, sparsity), 0.0, subject.weights), task.test), sparsity=sparsity)


def best_batch(task: Task, trial: Trial, subject: Subject, pruned: Callable[[Tensor], Tensor]) -> int:
    """The images a gradient with which the weights that are left serve best on held-out images."""
    found = {batch: subject.accuracy(pruned(subject.gradients(MAIN, batch)), task.held_out) for batch in BATCHES}
    best = max(found, key=lambda batch: found[batch])
    trial.log("batch", best)
    return best


@study.arm("diagonal-fisher", label="diagonal Fisher", against="magnitude", settings=DAMPING)
def diagonal(task: Task, trial: Trial) -> None:
    subject, damping = Subject(task, trial.device, trial.seed), trial.settings["damping"]

    def importance(grads: Tensor) -> Tensor:
        """w^2 (lambda + mean g^2) / 2: the saliency where F is taken as diagonal."""
        return saliency(subject.weights, 1 / (damping + grads.square().mean(0)))

    batch = best_batch(task, trial, subject, lambda grads: torch.where(lowest(importance(grads), AT), 0.0, subject.weights))
    with trial.measure("prune") as cost:
        grads = subject.gradients(MAIN, batch)
        order = importance(grads)
    log_costs(trial, cost)
    trial.log("bytes", grads.nbytes)
    log_accuracies(task, trial, subject, order)


def prune_by_obs(task: Task, trial: Trial, block_size: int | None) -> None:
    """Optimal brain surgeon at several sparsities with both updates, and at one sparsity with fewer and with more gradients."""
    subject, damping = Subject(task, trial.device, trial.seed), trial.settings["damping"]

    def pruned(grads: Tensor) -> Tensor:
        """The weights at 90 % sparsity, by the independent update."""
        fisher = InverseFisher(grads, damping, block_size=block_size)
        diagonal = fisher.diagonal()
        dropped = lowest(saliency(subject.weights, diagonal), AT)
        return torch.where(dropped, 0.0, subject.weights + independent_update(fisher, diagonal, subject.weights, dropped))

    batch = best_batch(task, trial, subject, pruned)
    trial.log("dense_accuracy", subject.accuracy(subject.weights, task.test))
    with trial.measure("prune") as cost:
        pruned(subject.gradients(MAIN, batch))
    log_costs(trial, cost)
    for step, m in enumerate((MAIN, *GRADIENTS)):
        grads = subject.gradients(m, batch)
        fisher = InverseFisher(grads, damping, block_size=block_size)
        diagonal = fisher.diagonal()
        order = saliency(subject.weights, diagonal)
        if m == MAIN:
            trial.log("bytes", grads.nbytes)
            trial.log("unseen", float((damping * diagonal).mean()))
        for sparsity in SPARSITIES if m == MAIN else (AT,):
            dropped = lowest(order, sparsity)
            started = time.process_time()
            together = joint_update(grads, damping, fisher.block_size, subject.weights, dropped)
            if m == MAIN and sparsity == AT:
                trial.log("joint_seconds", time.process_time() - started)
            alone = independent_update(fisher, diagonal, subject.weights, dropped)
            for ending, delta in (("", alone), ("_joint", together)):
                found = subject.accuracy(torch.where(dropped, 0.0, subject.weights + delta), task.test)
                if m == MAIN:
                    trial.log(f"accuracy{ending}", found, sparsity=sparsity)
                if sparsity == AT:
                    trial.log(f"accuracy_at_90{ending}", found, m=m)
        trial.progress(step + 1, 1 + len(GRADIENTS), f"{m} gradients")


PRUNERS = {
    "mfac-500": {"label": "M-FAC, blocks of 500", "block_size": 500},
    "mfac-2000": {"label": "M-FAC, blocks of 2000", "block_size": 2000},
    "mfac-full": {"label": "M-FAC, full", "block_size": None},
}
study.arm_table(prune_by_obs, PRUNERS, against="magnitude", settings=DAMPING)

# Training

MakeOptimizer = Callable[[nn.Module, dict[str, Any]], torch.optim.Optimizer]


def train(task: Task, trial: Trial, make: MakeOptimizer) -> None:
    """Train with a cosine schedule; the validation loss over steps and seconds, then what a step costs beside SGD's."""
    x, y = (part.to(trial.device) for part in task.train)
    held_x, held_y = (part.to(trial.device) for part in task.validation)
    model = task.make().to(trial.device)
    optimizer, batch = make(model, trial.settings), trial.settings["batch_size"]
    per_epoch = -(-len(x) // batch)
    total, every = trial.settings["epochs"] * per_epoch, max(1, per_epoch // EVALUATIONS)
    spent, started = 0.0, time.perf_counter()

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y)

    def tell(step: int, _: float) -> None:
        nonlocal spent, started
        if step % every and step != total:
            return
        finish(x)
        spent += time.perf_counter() - started
        with torch.no_grad(), evaluating(model):
            loss = float(F.cross_entropy(torch.cat([model(part) for part in held_x.split(500)]), held_y))
        trial.log("validation_loss", loss, step=step)
        trial.log("elapsed", spent, step=step)
        trial.report(step, -loss if math.isfinite(loss) else DIVERGED)
        trial.progress(step, total, f"validation loss {loss:.3f}")
        if step == total:
            trial.log("loss", loss)
            trial.objective(-loss if math.isfinite(loss) else DIVERGED)
        started = time.perf_counter()

    order = shuffled(x, y, batch, torch.Generator().manual_seed(trial.seed))
    try:
        fit_steps(optimizer, loss_of, order, total, schedule=lambda step: (1 + math.cos(math.pi * step / total)) / 2, tell=tell)
    except FloatingPointError:
        if not trial.tuning:
            raise
        trial.objective(DIVERGED)
    if trial.tuning:
        return
    trial.log("seconds", spent)
    trial.log("validation_accuracy", accuracy(model, (held_x, held_y)))
    trial.log("bytes", optimizer_bytes(optimizer) + (optimizer.window_bytes if isinstance(optimizer, MFAC) else 0))
    time_in_turn(task, trial, make, (x[:batch], y[:batch]))


def time_in_turn(task: Task, trial: Trial, make: MakeOptimizer, batch: tuple[Tensor, Tensor]) -> None:
    """Log the median time of a step, its gradient's part, and the median ratio to plain SGD's step, one after the other in turn."""

    def step_of(make: MakeOptimizer) -> Callable[[], tuple[float, float]]:
        model = task.make().to(trial.device)
        optimizer = make(model, trial.settings | {"lr": 1e-9})

        def step() -> tuple[float, float]:
            """Seconds of the gradient, and of the whole."""
            started = time.perf_counter()
            optimizer.zero_grad()
            F.cross_entropy(model(batch[0]), batch[1]).backward()
            finish(batch[0])
            between = time.perf_counter()
            optimizer.step()
            finish(batch[0])
            return between - started, time.perf_counter() - started

        return step

    ours, theirs = step_of(make), step_of(plain_sgd)
    turns = [(ours(), theirs()) for _ in range(IN_TURN)][IN_TURN // 4 :]
    trial.log("gradient_seconds", statistics.median(mine[0] for mine, _ in turns))
    trial.log("step_seconds", statistics.median(mine[1] for mine, _ in turns))
    trial.log("step_ratio", statistics.median(mine[1] / other[1] for mine, other in turns))


def plain_sgd(model: nn.Module, settings: dict[str, Any]) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=settings["lr"], momentum=0.9)


def adamw(model: nn.Module, settings: dict[str, Any]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=settings["lr"], fused=True)


def mfac(model: nn.Module, settings: dict[str, Any]) -> torch.optim.Optimizer:
    return MFAC(model.parameters(), lr=settings["lr"], window=settings["window"], damping=1e-6)  # the paper's damping


TRAINING = {"epochs": 5, "batch_size": 64}
OPTIMISERS = {
    "sgd": {"label": "SGD, momentum", "make": plain_sgd, "space": {"lr": LogUniform(1e-3, 1.0, start=0.1)}},
    "adamw": {"label": "AdamW", "make": adamw, "space": {"lr": LogUniform(1e-4, 1e-1, start=1e-3)}},
    **{f"mfac-{m}": {"label": f"M-FAC, m = {m}", "make": mfac, "settings": TRAINING | {"window": m}} for m in (32, 128, 512)},
}
study.arm_table(
    train,
    OPTIMISERS,
    settings=TRAINING,
    at_full={"epochs": 50, "batch_size": 128},
    space={"lr": LogUniform(1e-4, 1.0, start=1e-2)},
)

# Scale

DIMS, WINDOWS = (10_000, 30_000, 100_000, 300_000, 1_000_000, 3_000_000), (16, 32, 64, 128, 256, 512)
DIM, WINDOW = 30_000, 16  # the one that stays where the other varies


@study.arm("window", label="the window alone")
def window(task: Task, trial: Trial) -> None:
    over_d = {d: problems.push_seconds(WINDOW, d, trial.device, trial.seed) for d in DIMS}
    over_m = {m: problems.push_seconds(m, DIM, trial.device, trial.seed) for m in WINDOWS}
    for d, seconds in over_d.items():
        trial.log("push_seconds", seconds, d=d)
    for m, seconds in over_m.items():
        trial.log("push_seconds_of_m", seconds, m=m)
    trial.log("slope_over_d", slope(over_d))
    trial.log("slope_over_m", slope(over_m))


# What the paper claims

TOLERANCE = 0.02


@study.claim(
    "At 90 % sparsity in one shot: full M-FAC >= diagonal Fisher >= magnitude in accuracy",
    paper="one-shot pruning of ResNet50 and MobileNet better than magnitude and WoodFisher at equal sparsity",
    if_fails="m gradients say little of many more weights: damping * [F^-1]_ii is at least 1 - m/d on average, so full M-FAC hardly leaves "
    "the order of magnitude, while small blocks and the diagonal do",
)
def order_of_pruners(results: Results) -> Any:
    def over(arm: str, other: str) -> Any:
        return results.difference("accuracy", arm, other, sparsity=AT) >= 0

    return over("mfac-full", "diagonal-fisher") & over("diagonal-fisher", "magnitude")


def not_worse(results: Results, more: tuple[str, int], less: tuple[str, int]) -> Any:
    """The accuracy with more minus that with less is no lower than the tolerance below 0."""
    values = [results.values("accuracy_at_90", arm, m=m) for arm, m in (more, less)]
    if len(values[0]) != len(values[1]):
        raise NotTestable(f"{more[0]} and {less[0]} were run with different seeds")
    what = f"accuracy at 90 %, {more[0]} with {more[1]} gradients - {less[0]} with {less[1]}"
    return bootstrap(lambda a, b: a - b, *values, what=what) >= -TOLERANCE


@study.claim(
    f"More gradients and larger blocks are never worse by more than {100 * TOLERANCE:.0f} points (independent update, 90 % sparsity)",
    paper="the block size decides the quality (no figure)",
    if_fails="the independent update adds up steps that each drop one weight: the more weights a block couples, the more of their "
    "correlations it ignores",
)
def more_is_not_worse(results: Results) -> Any:
    counts = sorted((MAIN, *GRADIENTS))
    pairs = [((arm, more), (arm, less)) for arm in PRUNERS for less, more in itertools.pairwise(counts)]
    pairs += [((larger, m), (smaller, m)) for m in counts for smaller, larger in itertools.pairwise(PRUNERS)]
    return All(tuple(not_worse(results, *pair) for pair in pairs))


@study.claim(
    "M-FAC (m = 512) reaches SGD's final validation loss in fewer steps than SGD takes",
    paper="on par with or better than tuned SGD and Adam (m = 512 and 1024)",
    if_fails="the steps of the quick scale do not even fill a window of 512, and a window of zeros is a strongly damped one",
)
def fewer_steps(results: Results) -> Any:
    steps = max(dict(point)["step"] for point in results.curve("validation_loss", "sgd"))
    return results.threshold("validation_loss", "mfac-512", over="step", reach="sgd", better="lower") < steps


@study.claim("A step with m = 128 takes at most twice the time of SGD's, the gradient included", paper="about 1.5x to 2x their step time")
def step_time(results: Results) -> Any:
    return results.mean("step_ratio", "mfac-128") <= 2


@study.claim(
    "The processor time of a push with its product is linear in d (log-log slope 0.9 to 1.1)",
    paper="O(d m + m^2) per product",
    if_fails="it grows more slowly where short gradients are counted in: what a push costs whatever its length is the larger part of theirs",
)
def linear_in_d(results: Results) -> Any:
    return results.mean("slope_over_d", "window").between(0.9, 1.1)


@study.claim("It is at most quadratic in m", paper="O(d m + m^3) per replaced gradient; ours O(d m + m^2)")
def at_most_quadratic_in_m(results: Results) -> Any:
    return results.mean("slope_over_m", "window") <= 2


@study.summary
def summary(results: Results) -> str:
    accuracy = functools.partial(results.say, "accuracy", sparsity=AT)
    best = results.best("accuracy", tuple(PRUNERS), sparsity=AT)
    return (
        f"With nine weights of ten gone in one shot, accuracy was {accuracy(best)} by {study.arms[best].label}, {accuracy('mfac-full')} by "
        f"full M-FAC, {accuracy('diagonal-fisher')} by the diagonal Fisher and {accuracy('magnitude')} by magnitude. Training ended at a "
        f"validation loss of {results.say('loss', 'mfac-512')} with M-FAC (m = 512), {results.say('loss', 'sgd')} with SGD and "
        f"{results.say('loss', 'adamw')} with AdamW; a step with m = 128 took {results.say('step_ratio', 'mfac-128', unit='')}x SGD's time."
    )
