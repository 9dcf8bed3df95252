"""Four mixtures of experts trained alike from scratch: Mixtral's rule, MoE++ at two values of tau, MoE++ without gating residuals.

All have 8 feed-forward experts, 2 experts a token, a balance loss and a capacity of 1.1 in training, the same windows in the same order.
What an expert costs is timed on a layer large enough for its products to dominate, with the assignments that the trained model makes.
"""

from __future__ import annotations

import keyword
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewer.devices import one_thread
from fewer.language._shared.from_scratch import MODEL_HELP, TEXT_HELP, Ground, ground, pretrain
from fewer.language.moe_plus_plus.layer import MoEPlusPlus
from fewer.language.moe_plus_plus.model import PRESETS, MoEPlusPlusConfig, MoEPlusPlusForCausalLM
from fewer.language.moe_plus_plus.router import heterogeneous_capacity, select
from fewer.meters import median_seconds
from fewer.study import Curve, Figure, Groups, NotTestable, Results, Scale, Study, Tradeoff, Trial
from fewer.study.results import Estimate, bootstrap
from fewer.tasks import token_loss
from fewer.tasks.lm_training import Recipe

STEPS = {Scale.QUICK: 150, Scale.FULL: 20_000}
BATCH, WINDOW, HELD_OUT = 8, 128, 16_384
FFN, TOP_K, GAMMA = 8, 2, 1.1
WIDE = {"hidden_size": 512, "intermediate_size": 1408}  # the layer that is timed, on 2,048 tokens
TIMED = 2048
CLASSES = ("space and punctuation", "keyword", "identifier piece", "digit")
CLOSE = 0.05  # nats of validation loss that count as no worse

study = Study(
    "moe-plus-plus",
    question="What do experts that cost nothing save a mixture of experts, and what do they cost in quality?",
    baseline="vanilla",
    figures=[
        Figure("loss", "validation loss (nats)"),
        Figure("ffn_training", "networks a token, in training", ""),
        Figure("ffn_evaluation", "networks a token, in evaluation", ""),
        Figure("drop_rate", "assignments without room, in training", "%"),
        Figure("cpu_seconds", "processor time of a wide layer, in training", "s"),
        Figure("reading_cpu_seconds", "processor time of a wide layer, in evaluation", "s"),
        Figure("parameters", "parameters"),
        Figure("score_variance", "variance of the two gate values over tokens", "", ""),
        Figure("class_spread", "networks a token, dearest class less cheapest", "", "higher"),
        Figure("ffn_of_class", "networks a token by class", "", "", detail=True),
        Figure("training_loss", "training loss (nats)", "", "lower", detail=True),
    ],
    charts=[
        Curve("training_loss", over="step", title="Training loss"),
        Groups("ffn_of_class", over="token", title="Feed-forward experts a token, by what the token is"),
        Tradeoff("loss", "cpu_seconds", title="Loss against the processor time of a wide layer"),
    ],
    time_limit=24 * 3600,
    seeds=3,
)
study.option("model", "", help=MODEL_HELP)
study.option("text", "", help=TEXT_HELP)


@dataclass
class Task:
    """Text in tokens, and the sizes of the models.

    Attributes:
        sizes: words for the config.
        kinds: [vocabulary] the class of each token, an index into `CLASSES`.
    """

    ground: Ground
    sizes: dict[str, Any]
    test: Tensor
    kinds: Tensor
    scale: Scale

    def recipe(self, seed: int) -> Recipe:
        if self.scale is Scale.FULL:  # the paper's rates
            return Recipe(STEPS[self.scale], 64, 512, 5e-4, warm_up=500, last_lr=0.1, seed=seed)
        return Recipe(STEPS[self.scale], BATCH, WINDOW, 2e-3, warm_up=20, last_lr=0.0, seed=seed)


@study.task
def task(scale: Scale, model: str, text: str) -> Task:
    common = ground(model, text, window=WINDOW)
    words = common.tokenizer.convert_ids_to_tokens(range(common.sizes["vocab_size"]))
    kinds = torch.tensor([class_of(common.tokenizer.convert_tokens_to_string([word]) if word else "") for word in words])
    sizes = common.sizes | {"intermediate_size": common.sizes["hidden_size"] * 3 // 2, "num_ffn_experts": FFN}
    if scale is Scale.FULL and not model:
        sizes |= PRESETS["0.6B"] | {"num_key_value_heads": PRESETS["0.6B"]["num_attention_heads"]}
    return Task(common, sizes, common.validation[:HELD_OUT], kinds, scale)


def class_of(text: str) -> int:
    """What a token is, an index into `CLASSES`.

    >>> [CLASSES[class_of(text)] for text in ("  (", " for", "_name", "42")]
    ['space and punctuation', 'keyword', 'identifier piece', 'digit']
    """
    word = text.strip()
    if not any(letter.isalnum() for letter in word):
        return 0
    return 1 if keyword.iskeyword(word) else 3 if word.isdigit() else 2


def train_and_judge(task: Task, trial: Trial, free: tuple[int, int, int], tau: float, gate_residual: bool) -> None:
    """Train one mixture, judge it, and time a wide layer with the assignments it makes."""
    zero, copies, constants = free
    torch.manual_seed(trial.seed)
    words = task.sizes | {"num_zero": zero, "num_copy": copies, "num_constant": constants, "gate_residual": gate_residual}
    config: Any = MoEPlusPlusConfig(**words, top_k=TOP_K, tau=tau, capacity_factor=GAMMA)  # pyright: ignore[reportCallIssue]
    model: Any = MoEPlusPlusForCausalLM(config)
    model.to(trial.device)
    recipe = task.recipe(trial.seed)
    counts: list[tuple[float, float]] = []
    watched = [module.register_forward_hook(lambda _, args, out: counts.append((out.stats.ffn_after, out.stats.drop_rate)))
               for module in model.modules() if isinstance(module, MoEPlusPlus)]  # fmt: skip
    told = trial.follow("training_loss", total=recipe.steps, text="loss", over="step")
    with trial.measure("training"):
        pretrain(model, task.ground.train, recipe, tell=lambda _, loss: told(loss))
    for hook in watched:
        hook.remove()
    trial.log("ffn_training", sum(ffn for ffn, _ in counts) / len(counts))
    trial.log("drop_rate", sum(dropped for _, dropped in counts) / len(counts))
    trial.log("parameters", sum(each.numel() for each in model.parameters()))
    trial.log("loss", token_loss(model, task.test.to(trial.device), window=WINDOW))
    look(task, trial, model)


@torch.no_grad()
def look(task: Task, trial: Trial, model: Any) -> None:
    """How the trained routers spend on unseen text: by class of token, how certainly, and what a wide layer takes for it."""
    ids = task.test[: len(task.test) // WINDOW * WINDOW].reshape(-1, WINDOW).to(trial.device)
    parts = [model(input_ids=rows, output_router_logits=True, use_cache=False).router_logits for rows in ids.split(BATCH)]
    logits = torch.stack([torch.cat(layer) for layer in zip(*parts, strict=True)])  # [layers, tokens, N]
    chosen = select(logits.flatten(0, 1), TOP_K)
    networks = (chosen < FFN).sum(-1).double().reshape(logits.shape[:2]).mean(0)
    values = logits.flatten(0, 1).softmax(-1).gather(-1, chosen)
    trial.log("ffn_evaluation", networks.mean().item())
    trial.log("score_variance", values.double().var(0).mean().item())
    kinds = task.kinds.to(trial.device)[ids.flatten()]
    by_class = {name: networks[kinds == number].mean().item() for number, name in enumerate(CLASSES) if (kinds == number).any()}
    for name, value in by_class.items():
        trial.log("ffn_of_class", value, token=name)
    trial.log("class_spread", max(by_class.values()) - min(by_class.values()))
    middle = len(logits) // 2
    for figure, training in (("cpu_seconds", True), ("reading_cpu_seconds", False)):
        trial.log(figure, wide_seconds(model.config, logits[middle, :TIMED], training))


def wide_seconds(config: MoEPlusPlusConfig, logits: Tensor, training: bool) -> float:
    """Processor seconds of a forward pass of a wide layer that is given these router logits, on one thread."""
    layer = forced_layer(config, **WIDE).train(training)
    x = torch.randn(len(logits), WIDE["hidden_size"], generator=torch.Generator().manual_seed(0)).to(logits.device)
    with one_thread():
        return median_seconds(lambda: layer(x, logits), 9, processor=not logits.is_cuda)


def forced_layer(config: MoEPlusPlusConfig, **sizes: int) -> MoEPlusPlus:
    """A config's mixture in other sizes, whose router gives back the logits that it is handed as a residual."""
    torch.manual_seed(0)
    given: dict[str, Any] = sizes
    layer = MoEPlusPlus(
        **given, num_ffn_experts=config.num_ffn_experts, num_zero=config.num_zero, num_copy=config.num_copy, num_constant=config.num_constant,
        top_k=config.top_k, tau=config.tau, capacity_factor=config.capacity_factor,
    )  # fmt: skip
    assert layer.router.gate_map is not None
    with torch.no_grad():
        for weight in layer.router.wg.parameters():
            weight.zero_()
        layer.router.gate_map.weight.copy_(torch.eye(layer.num_experts))
    return layer


FREE = (1, 1, 2)  # zero, copy, constant
study.arm_table(
    train_and_judge,
    {
        "vanilla": {"free": (0, 0, 0), "tau": 1.0, "gate_residual": False, "label": "mixture of 8, top 2"},
        "moe-plus-plus": {"free": FREE, "tau": 0.75, "gate_residual": True, "label": "MoE++, tau 0.75"},
        "moe-plus-plus-low": {"free": FREE, "tau": 0.25, "gate_residual": True, "label": "MoE++, tau 0.25"},
        "without-residuals": {"free": FREE, "tau": 0.75, "gate_residual": False, "label": "MoE++, no gating residuals"},
    },
)


# What the paper claims


def allowed(tau: float, free: int) -> float:
    """Networks a token that the capacities leave room for, in a batch of the study."""
    tokens = BATCH * WINDOW
    return FFN * heterogeneous_capacity(TOP_K * tokens, FFN, free, tau, GAMMA)[0] / tokens


@study.claim(
    "At tau 0.75 the validation loss is at most 0.05 nats above the vanilla mixture's",
    paper="0.6B, mean of 9 tasks: 45.6 against 44.3 (better, after 100B tokens)",
)
def no_worse(results: Results) -> Any:
    return results.no_worse("loss", "moe-plus-plus", "vanilla", CLOSE, better="lower")


@study.claim(
    "In training a token uses at most 1.3203 networks at tau 0.75 and 0.7344 at tau 0.25 (a vanilla one up to 2)",
    paper="a share tau N_FFN / (tau N_FFN + N_ZC) of the assignments goes to networks: 1.2 and 0.67 of 2",
)
def fewer_in_training(results: Results) -> Any:
    first, second = (
        results.mean("ffn_training", arm) <= allowed(tau, sum(FREE)) + 1e-9
        for arm, tau in (("moe-plus-plus", 0.75), ("moe-plus-plus-low", 0.25))
    )
    return first & second & (results.mean("ffn_training", "vanilla") <= 2)


@study.claim(
    "In evaluation, without a capacity, it uses at most 1.7 at tau 0.75, and fewer at tau 0.25",
    paper="1.2 and 0.67 of 2 (eq. 7, stationary)",
    if_fails="the balance loss moves the routers slowly: the shares of the equilibrium need longer training than this",
)
def fewer_in_evaluation(results: Results) -> Any:
    return (results.mean("ffn_evaluation", "moe-plus-plus") <= 1.7) & (
        results.difference("ffn_evaluation", "moe-plus-plus-low", "moe-plus-plus") < 0
    )


def throughput(results: Results, arm: str) -> Estimate:
    return bootstrap(
        lambda vanilla, ours: vanilla / ours,
        results.values("cpu_seconds", "vanilla"),
        results.values("cpu_seconds", arm),
        what="throughput of a wide layer in training, ours / vanilla",
    )


@study.claim(
    "A wide layer's throughput in training is at least 1.2 x the vanilla mixture's at tau 0.75, and 1.6 x at tau 0.25",
    paper="0.6B: 1.25 x at tau 0.75, 1.93 x at tau 0.25",
)
def is_quicker(results: Results) -> Any:
    return (throughput(results, "moe-plus-plus") >= 1.2) & (throughput(results, "moe-plus-plus-low") >= 1.6)


@study.claim(
    "The dearest class of tokens uses at least 0.15 networks more than the cheapest (tau 0.75)",
    paper="verbs use more feed-forward experts than word fragments and punctuation (figure, no value)",
)
def spends_unevenly(results: Results) -> Any:
    return results.mean("class_spread", "moe-plus-plus") >= 0.15


@study.claim("The gain in accuracy at equal parameters", paper="0.5 to 2 points on 9 tasks after 100B tokens")
def gains(results: Results) -> Any:
    raise NotTestable("it takes 100 billion tokens: at this length it is far below the spread over seeds")


@study.summary
def summary(results: Results) -> str:
    quick, low = (throughput(results, arm).value for arm in ("moe-plus-plus", "moe-plus-plus-low"))
    return (
        f"At tau 0.75 a token used {results.say('ffn_training', 'moe-plus-plus')} networks in training and "
        f"{results.say('ffn_evaluation', 'moe-plus-plus')} in evaluation ({results.say('ffn_training', 'moe-plus-plus-low')} and "
        f"{results.say('ffn_evaluation', 'moe-plus-plus-low')} at tau 0.25; the vanilla mixture {results.say('ffn_training', 'vanilla')} and 2): "
        f"a wide layer ran at {quick:.2f} x its throughput ({low:.2f} x). Its loss on unseen text is {results.say('loss', 'moe-plus-plus')} nats "
        f"({results.say('loss', 'moe-plus-plus-low')} at tau 0.25, {results.say('loss', 'without-residuals')} without gating residuals, vanilla "
        f"{results.say('loss', 'vanilla')}); {results.say('drop_rate', 'moe-plus-plus')} of the assignments found no room (vanilla "
        f"{results.say('drop_rate', 'vanilla')})."
    )
