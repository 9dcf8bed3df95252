"""A small language model trained from scratch with four-bit products, recipe after recipe, beside the same training in full precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from fewer.devices import one_thread
from fewer.language._shared.from_scratch import MODEL_HELP, TEXT_HELP, Ground, ground, pretrain
from fewer.lowbit._shared.digit_classifier import train_digits
from fewer.lowbit.fp4_training.linear import convert
from fewer.lowbit.fp4_training.problems import gradient_cosine, lost_shares, model_overhead, multiply_gradients, small_llama
from fewer.lowbit.fp4_training.recipe import FP4Recipe
from fewer.study import Curve, Figure, Groups, NotTestable, Results, Scale, Study, Tradeoff, Trial
from fewer.study.results import Estimate, bootstrap
from fewer.tasks import token_loss
from fewer.tasks.lm_training import Recipe, windows

STEPS = {Scale.QUICK: 150, Scale.FULL: 1200}
BATCH, WINDOW, LAYERS, RATE = 8, 64, 2, 3e-3
HELD_OUT = 16_384  # tokens
DIGITS_SEEDS = 1  # a trial
LOOKED_AT = (1, 100)  # steps whose gradient is held against the exact one; the last is too
SR = frozenset({"dy"})
NEAREST = frozenset()
NVFP4 = FP4Recipe.preset("nvfp4").replace(stochastic=NEAREST)  # the naive way, against which every fix is measured

study = Study(
    "fp4-training",
    question="Which fixes of four-bit training pay on this model, and what does each cost?",
    baseline="fp32",
    figures=[
        Figure("loss", "validation loss (nats)"),
        Figure("overhead", "operations of the casts, over the products'", "%"),
        Figure("cosine", "gradient's cosine to the exact one, last step", "", "higher", at={"step": STEPS[Scale.QUICK]}),
        Figure("digits_loss", "held-out loss of a digits classifier (nats)"),
        Figure("kept_bytes", "kept a layer for the backward pass", "bytes"),
        Figure("cpu_seconds", "processor time of training, simulated", "s"),
        Figure("underflow", "cast to zero", "%", detail=True),
        Figure("saturated", "beyond the largest code", "%", detail=True),
        Figure("training_loss", "training loss (nats)", detail=True, at={"step": STEPS[Scale.QUICK]}),
    ],
    charts=[
        Tradeoff("loss", "overhead", title="Validation loss against what the casts cost"),
        Curve("training_loss", over="step", title="Training loss"),
        Groups("underflow", over="operand", title="Values cast to zero, by operand"),
        Curve("cosine", over="step", title="The gradient's cosine to the exact one"),
    ],
    time_limit=24 * 3600,
    seeds=3,
    jobs=2,
)
study.option("model", "", help=MODEL_HELP)
study.option("text", "", help=TEXT_HELP)


@dataclass
class Task:
    ground: Ground
    layers: int
    scale: Scale

    def recipe(self, seed: int) -> Recipe:
        return Recipe(STEPS[self.scale], BATCH, WINDOW, RATE, warm_up=20, seed=seed)


@study.task
def task(scale: Scale, model: str, text: str) -> Task:
    common = ground(model, text, window=WINDOW)
    return Task(common, common.sizes["num_hidden_layers"] if model else LAYERS, scale)


def train_and_judge(task: Task, trial: Trial, fmt: FP4Recipe | None, full_only: bool = False, multiplied: FP4Recipe | None = None) -> None:
    """Train the model by one recipe, judge it as it was trained, and look at its casts and gradients on the way.

    Args:
        multiplied: full precision, the weights' gradients multiplied by this recipe's derivative of the cast.
    """
    if full_only and trial.scale is not Scale.FULL:
        trial.note("recipe", "trained at full scale alone")
        return
    with one_thread():  # small tensors: a second thread saves a seventh, and loses all where another program wants it
        _train_and_judge(task, trial, fmt, multiplied)


def _train_and_judge(task: Task, trial: Trial, fmt: FP4Recipe | None, multiplied: FP4Recipe | None) -> None:
    model = small_llama(task.ground, trial.seed, task.layers).to(trial.device)
    fmt = fmt.replace(seed=trial.seed) if fmt else None
    if fmt:
        convert(model, fmt)
    if multiplied:
        multiply_gradients(model, multiplied)
    recipe = task.recipe(trial.seed)
    follow = trial.follow("training_loss", total=recipe.steps, text="loss", over="step")
    looked_at = {*LOOKED_AT, recipe.steps}

    def tell(step: int, loss: float) -> None:
        follow(loss)
        if fmt and step in looked_at:
            trial.log("cosine", gradient_cosine(model, windows(task.ground.train, recipe, step).to(trial.device)), step=step)

    with trial.measure("training"):
        pretrain(model, task.ground.train, recipe, tell=tell)
    trial.log("loss", token_loss(model, task.ground.validation[:HELD_OUT].to(trial.device), window=WINDOW))
    trial.log("overhead", model_overhead(model, BATCH * WINDOW))
    hidden = task.ground.sizes["hidden_size"]
    trial.log("kept_bytes", (fmt or FP4Recipe(element="fp32")).overhead(BATCH * WINDOW, hidden, hidden).kept_bytes)
    if fmt:
        ids = windows(task.ground.validation, recipe, 0).to(trial.device)
        for operand, (lost, beyond) in lost_shares(model, ids).items():
            trial.log("underflow", lost, operand=operand)
            trial.log("saturated", beyond, operand=operand)
    losses = [train_digits(DIGITS_SEEDS * trial.seed + each, lambda network: _converted(network, fmt)) for each in range(DIGITS_SEEDS)]
    trial.log("digits_loss", sum(losses) / len(losses))


def _converted(network: nn.Module, fmt: FP4Recipe | None) -> nn.Module:
    if fmt:
        convert(network, fmt)
    return network


ARMS: dict[str, dict[str, Any]] = {
    "fp32": {"fmt": None, "label": "full precision"},
    "nvfp4-nearest": {"fmt": NVFP4, "label": "NVFP4, nearest"},
    "nvfp4": {"fmt": NVFP4.replace(stochastic=SR), "label": "NVFP4, stochastic dY"},
    "nvfp4-hadamard": {"fmt": NVFP4.replace(stochastic=SR, hadamard="backward"), "label": "NVFP4, stochastic dY, Hadamard backward"},
    "nvfp4-dge": {"fmt": NVFP4.replace(stochastic=SR, estimator="dge"), "label": "NVFP4, stochastic dY, DGE"},
    "e4m3-unscaled": {"fmt": NVFP4.replace(tensor_scale="off"), "label": "e4m3 scales alone, nearest"},
    "ue5m3-unscaled": {"fmt": NVFP4.replace(scale="ue5m3", tensor_scale="off"), "label": "ue5m3 scales alone, nearest"},
    "mxfp4": {"fmt": FP4Recipe.preset("mxfp4").replace(stochastic=SR), "label": "MXFP4, stochastic dY"},
    "ue5m3": {"fmt": FP4Recipe.preset("paper").replace(hadamard="none"), "label": "ue5m3 in blocks of 32, stochastic dY"},
}
FULL_ARMS: dict[str, dict[str, Any]] = {
    "mxfp4-nearest": {"fmt": FP4Recipe.preset("mxfp4"), "label": "MXFP4, nearest"},
    "mxfp4-hadamard": {"fmt": FP4Recipe.preset("mxfp4-sr-rht"), "label": "MXFP4, stochastic dY, Hadamard backward"},
    "nvfp4-wgrad": {"fmt": NVFP4.replace(stochastic=SR, hadamard="wgrad"), "label": "NVFP4, stochastic dY, Hadamard wgrad"},
    "follow-up": {"fmt": FP4Recipe.preset("follow-up"), "label": "the authors' follow-up"},
    "fp32-dge": {"fmt": None, "multiplied": NVFP4.replace(estimator="dge"), "label": "full precision, DGE's multiplier"},
}
study.arm_table(train_and_judge, ARMS | {name: arm | {"full_only": True} for name, arm in FULL_ARMS.items()})


def gap(results: Results, arm: str) -> Estimate:
    return results.difference("loss", arm, "fp32")


def gain(results: Results, arm: str) -> Estimate:
    """The share of the naive way's gap that an arm closes."""
    return bootstrap(
        lambda naive, ours, high: (naive - ours) / (naive - high),
        *(results.values("loss", each) for each in ("nvfp4-nearest", arm, "fp32")),
        what=f"share of the gap of NVFP4 with nearest rounding that {arm} closes",
    )


@study.claim(
    "Without a scale of the tensor e4m3 scales lose at least 0.5 nats against those with one, ue5m3 scales at most 0.15",
    paper='"Scale Representation is the Primary Bottleneck": e4m3 did not converge, ue5m3 does (abstract and section 6)',
)
def scales_are_the_bottleneck(results: Results) -> Any:
    with_one = "nvfp4-nearest"
    return (results.difference("loss", "e4m3-unscaled", with_one) >= 0.5) & (results.difference("loss", "ue5m3-unscaled", with_one) <= 0.15)


@study.claim(
    "Stochastic rounding of dY closes at least a third of the gap that NVFP4 with nearest rounding leaves",
    paper="stochastic rounding backward is needed (principle 2)",
    if_fails="the gap of nearest rounding is as small as what the seed moves, so that a share of it says little",
)
def stochastic_rounding_pays(results: Results) -> Any:
    return gain(results, "nvfp4") >= 1 / 3


@study.claim(
    "The straight-through gradient is no worse than DGE by more than 0.05 nats, what a seed moves",
    paper="STE is as good as the relaxations (principle 1)",
    if_fails="DGE multiplies the gradient of weights by 1.3 on average, which at this length acts as a higher learning rate",
)
def straight_through_is_enough(results: Results) -> Any:
    return results.no_worse("loss", "nvfp4", "nvfp4-dge", 0.05, better="lower")


@study.claim(
    "ue5m3 scales in blocks of 32 are no worse than MXFP4's, both with stochastic dY",
    paper="ue5m3 beats e8m0 (principle 2)",
)
def ue5m3_beats_powers_of_two(results: Results) -> Any:
    return results.difference("loss", "ue5m3", "mxfp4") <= 0


@study.claim(
    "Hadamard, tensor scale and stochastic rounding together stand on the front of gain over overhead: no cheaper arm has its gain",
    paper="the best trade-off (principle 3)",
    if_fails="without outliers, as in so small a model, a rotation spreads nothing and costs its operations",
)
def all_three_are_on_the_front(results: Results) -> Any:
    dearest = "nvfp4-hadamard"
    cost = results.mean("overhead", dearest).value
    cheaper = [
        arm for arm in ARMS if arm not in ("fp32", dearest) and results.has("loss", arm) and results.mean("overhead", arm).value <= cost
    ]
    best = results.best("loss", cheaper, better="lower")
    return results.difference("loss", dearest, best) <= 0


@study.claim("Which recipe still converges after 10,000 steps, and with the outliers of a large model", paper="up to 1B parameters")
def holds_at_length(results: Results) -> Any:
    raise NotTestable("a model of half a million parameters shows neither in 200 steps")


@study.claim("Products in four bits run at up to 4 times BF16's rate", paper="Blackwell-class GPUs")
def runs_faster(results: Results) -> Any:
    raise NotTestable(
        "the casts are simulated: this machine multiplies no four-bit numbers; the operations beside the products are counted"
    )


@study.summary
def summary(results: Results) -> str:
    shares = ", ".join(
        f"{ARMS[arm]['label']} {gain(results, arm).value:.0%}" for arm in ("nvfp4", "nvfp4-hadamard", "nvfp4-dge", "mxfp4", "ue5m3")
    )
    return (
        f"Full precision ends at {results.say('loss', 'fp32')} nats, NVFP4 with nearest rounding at {results.say('loss', 'nvfp4-nearest')}. Of "
        f"that gap {shares} (negative: it grows). Without a scale of the tensor e4m3 scales end at {results.say('loss', 'e4m3-unscaled')}, ue5m3 "
        f"ones at {results.say('loss', 'ue5m3-unscaled')}. The casts add {results.say('overhead', 'nvfp4')} of the products' operations "
        f"({results.say('overhead', 'nvfp4-hadamard')} with rotations); what is kept for the backward pass falls from "
        f"{results.say('kept_bytes', 'fp32')} a layer to {results.say('kept_bytes', 'nvfp4')}. One seed moves the loss by "
        f"{max(results.spread('loss', arm) for arm in ('fp32', 'nvfp4')):.2f} nats."
    )
