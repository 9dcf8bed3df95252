"""Which channels to remove, and how many from which block: loss, size and time of a small Llama, pruned in every way at the same budget.

The model is the family's small language model (or any directory), pruned after one pass over windows of its training text; losses are
taken on text it was not trained on.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewer.devices import one_thread
from fewer.language._shared.feed_forward import count_parameters, decoder_layers, ffn_flops, width_of
from fewer.language._shared.timing import reading_seconds, writing_seconds
from fewer.language._shared.trained import DATA_HELP, HELD_OUT_HELP, TEXT_HELP, Trained, trained
from fewer.language.cfsp.calibration import CfspStats, calibrate
from fewer.language.cfsp.peers import prune_by_global_threshold
from fewer.language.cfsp.pruning import PruneReport, prune, save_pruned
from fewer.language.cfsp.recovery import recover
from fewer.study import Curve, Figure, Results, Scale, Study, Tradeoff, Trial
from fewer.study.results import bootstrap
from fewer.tasks.lm_training import draw_windows

HALF: dict[str, Any] = {"removed": 0.5}
THIRD: dict[str, Any] = {"removed": 0.3}

study = Study(
    "cfsp",
    question="How much does a language model lose when feed-forward channels are removed, and which way of choosing them loses least?",
    baseline="uniform-wanda",
    figures=[
        Figure("loss", "validation loss, half removed (nats)", at=HALF),
        Figure("accuracy", "next token right, half removed", "%", "higher", at=HALF),
        Figure("parameters", "parameters, half removed", at=HALF),
        Figure("ffn_flops", "feed-forward operations a token", "FLOP", at=HALF),
        Figure("bytes", "size on disk", "bytes", at=HALF),
        Figure("calls", "passes of the dense model over the text", at=HALF),
        Figure("prune.cpu_seconds", "processor time to calibrate and prune", "s", at=HALF),
        Figure("recover.cpu_seconds", "processor time of 100 recovery steps", "s"),
        Figure("reading_seconds", "processor time to read 256 tokens, half removed", "s", at=HALF),
        Figure("writing_seconds", "processor time to write 32 tokens, half removed", "s", at=HALF),
        Figure("prune.joules", "energy to calibrate and prune", "J", detail=True, at=HALF),
        Figure("prune.peak_memory", "peak resident memory while pruning", "bytes", detail=True, at=HALF),
        Figure("block_importance", "mean angle between a block's input and output, over pi", "", ""),
        Figure("width", "channels kept", "", ""),
    ],
    charts=[
        Curve("loss", over="removed", title="Validation loss over the share of channels removed"),
        Tradeoff("loss", "prune.cpu_seconds", title="Loss with half removed against the time to prune"),
        Curve("block_importance", over="layer", title="Block importance, first layer to last"),
        Curve("width", over="layer", title="Channels kept with half removed, first layer to last"),
    ],
    time_limit=2 * 3600,
    seeds=3,
)
study.option("model", "", help="a model directory (Llama, Mistral, Qwen, Gemma, OLMo, Granite) in place of the small language model")
study.option("text", "", help=TEXT_HELP)
study.option("data", "", help=DATA_HELP)
study.option("held_out", 0, help=HELD_OUT_HELP, least=0)
study.option("multiple_of", 16, help="widths are multiples of it", least=1)

SHARES = {Scale.QUICK: (0.3, 0.5), Scale.FULL: (0.2, 0.3, 0.5)}
WINDOW = 256
WINDOWS = {Scale.QUICK: 16, Scale.FULL: 512}  # of calibration text; 512 x 256 are the paper's 131,072 tokens
HELD_OUT = {Scale.QUICK: 24_000, Scale.FULL: 200_000}  # tokens
RECOVERY_STEPS, RECOVERY_BATCH, RECOVERY_WINDOW = 100, 4, 128


@dataclass
class Task:
    """A dense model with its text; `test` is what it is judged on."""

    given: Trained
    test: Tensor
    scale: Scale
    multiple_of: int

    def windows(self, seed: int) -> Tensor:
        """Calibration windows [N, 256] of the training text."""
        return draw_windows(self.given.train, WINDOWS[self.scale], WINDOW, torch.Generator().manual_seed(seed))


@study.task
def task(scale: Scale, model: str, text: str, data: str, held_out: int = 0, multiple_of: int = 16) -> Task:
    given = trained(model, text, data, window=WINDOW)
    return Task(given, given.validation[: held_out or HELD_OUT[scale]], scale, multiple_of)


@torch.no_grad()
def loss_and_accuracy(model: nn.Module, tokens: Tensor, batch: int = 8) -> tuple[float, float]:
    """(cross-entropy in nats, share of next tokens that are right) over windows one after the other."""
    rows = tokens[: len(tokens) // WINDOW * WINDOW].reshape(-1, WINDOW).to(next(model.parameters()).device)
    loss = right = 0.0
    for part in rows.split(batch):
        logits, following = model(input_ids=part, use_cache=False).logits[:, :-1].flatten(0, 1), part[:, 1:].flatten()
        loss += F.cross_entropy(logits, following, reduction="sum").item()
        right += (logits.argmax(1) == following).sum().item()
    judged = rows.numel() - len(rows)
    return loss / judged, right / judged


def judge(model: nn.Module, task: Task, trial: Trial, *removed: float) -> None:
    """Log a model's loss and size at a share removed (a dense one's at all shares: a line to compare with)."""
    trial.note("language model", task.given.about)
    loss, accuracy = loss_and_accuracy(model, task.test)
    widths = [width_of(layer) for layer in decoder_layers(model)]
    with tempfile.TemporaryDirectory() as folder:
        stored = sum(file.stat().st_size for file in save_pruned(model, Path(folder) / "model").glob("*.safetensors"))
    for share in removed:
        trial.log("loss", loss, removed=share)
        trial.log("accuracy", accuracy, removed=share)
        trial.log("parameters", count_parameters(model), removed=share)
        trial.log("ffn_flops", ffn_flops(model.config.hidden_size, widths), removed=share)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
        trial.log("bytes", stored, removed=share)
    if removed[-1] == HALF["removed"]:
        for layer, width in enumerate(widths):
            trial.log("width", width, layer=layer)


def log_speed(model: Any, task: Task, trial: Trial, *removed: float) -> None:
    prompt = task.test[None, :WINDOW].to(trial.device)
    reading, writing = reading_seconds(model, prompt), writing_seconds(model, prompt[:, :16])
    for share in removed:
        trial.log("reading_seconds", reading, removed=share)
        trial.log("writing_seconds", writing, removed=share)


Way = Callable[[Task, nn.Module, CfspStats, float, torch.Generator], PruneReport]


def prune_and_judge(task: Task, trial: Trial, way: Way, timed: bool = False) -> None:
    """Calibrate, prune and judge at each share; how often the model is passed is counted at its embeddings, from outside."""
    windows = task.windows(trial.seed)
    for removed in SHARES[task.scale]:
        model, seen = task.given.model(trial.device), []
        watched = model.get_input_embeddings().register_forward_hook(lambda _, args, output, seen=seen: seen.append(args[0].numel()))
        with one_thread(), trial.measure("prune", removed=removed):
            stats = calibrate(model, windows.split(8))
            way(task, model, stats, removed, torch.Generator().manual_seed(trial.seed))
        watched.remove()
        trial.log("calls", sum(seen) / windows.numel(), removed=removed)
        judge(model, task, trial, removed)
        if removed == HALF["removed"]:
            for layer, importance in enumerate(stats.block_importance.tolist()):
                trial.log("block_importance", importance, layer=layer)
        if timed:
            log_speed(model, task, trial, removed)


@study.arm("dense", against="dense", label="not pruned")
def dense(task: Task, trial: Trial) -> None:
    model = task.given.model(trial.device)
    judge(model, task, trial, 0.0, *SHARES[task.scale])
    log_speed(model, task, trial, 0.0, *SHARES[task.scale])


def by(coarse: Any, metric: Any) -> Way:
    return lambda task, model, stats, removed, draw: prune(
        model, stats, removed, coarse, metric, multiple_of=task.multiple_of, generator=draw
    )


study.arm_table(
    prune_and_judge,
    {
        "uniform-random": {"way": by("none", "random"), "label": "uniform, random"},
        "uniform-magnitude": {"way": by("none", "magnitude"), "label": "uniform, magnitude"},
        "uniform-wanda": {"way": by("none", "wanda"), "label": "uniform, Wanda"},
        "uniform-activation": {"way": by("none", "activation"), "label": "uniform, as released"},
        "uniform-relative": {"way": by("none", "relative"), "label": "uniform, relative"},
        "coarse-wanda": {"way": by("angular", "wanda"), "label": "coarse, Wanda"},
        "coarse-activation": {"way": by("angular", "activation"), "label": "coarse, as released"},
        "cfsp": {"way": by("angular", "relative"), "label": "CFSP", "timed": True},
        "global-threshold": {
            "way": lambda task, model, stats, removed, draw: prune_by_global_threshold(model, stats, removed, task.multiple_of),
            "label": "one global threshold",
        },
    },
)


def recover_and_judge(task: Task, trial: Trial, ig: Any) -> None:
    model, steps = task.given.model(trial.device), RECOVERY_STEPS
    report = prune(model, calibrate(model, task.windows(trial.seed).split(8)), HALF["removed"], multiple_of=task.multiple_of)
    words = {"batch": RECOVERY_BATCH, "window": RECOVERY_WINDOW, "seed": trial.seed}
    with one_thread(), trial.measure("recover"):
        tell = trial.follow("training_loss", total=steps, text="loss", over="step")
        recover(model, task.given.train, steps, scores=report.scores, ig=ig, tell=lambda _, loss: tell(loss), **words)
    judge(model, task, trial, HALF["removed"])


study.arm_table(
    recover_and_judge,
    {
        "cfsp-recovered": {"ig": "importance", "label": "CFSP and IG-LoRA"},
        "cfsp-recovered-uniform": {"ig": "uniform", "label": "CFSP and LoRA of equal ranks"},
        "cfsp-recovered-inverse": {"ig": "inverse", "label": "CFSP and inverse IG-LoRA"},
    },
    against="cfsp",
)


# What the paper claims

CLOSE = 0.02  # nats of validation loss that count as no worse: 2 % of perplexity


def no_worse(results: Results, other: str) -> Any:
    third, half = (results.no_worse("loss", "cfsp", other, CLOSE, better="lower", **at) for at in (THIRD, HALF))
    return third & half


@study.claim(
    "With half removed, CFSP loses at least 0.30 nats less than random channels of uniform width",
    paper="best of all compared ways at 20 to 50 % (average zero-shot accuracy and perplexity)",
)
def better_than_random(results: Results) -> Any:
    return results.difference("loss", "cfsp", "uniform-random", **HALF) <= -0.30


@study.claim(
    "With half removed, CFSP loses at least 0.15 nats less than magnitude at uniform width",
    paper="better than Magnitude-SP at 20 to 50 %",
)
def better_than_magnitude(results: Results) -> Any:
    return results.difference("loss", "cfsp", "uniform-magnitude", **HALF) <= -0.15


@study.claim("CFSP is at most 0.02 nats worse than Wanda at uniform width, at 30 % and at half", paper="better than Wanda-SP")
def not_worse_than_wanda(results: Results) -> Any:
    return no_worse(results, "uniform-wanda")


@study.claim("CFSP is at most 0.02 nats worse than one global threshold, at 30 % and at half", paper="better than FLAP")
def not_worse_than_threshold(results: Results) -> Any:
    return no_worse(results, "global-threshold")


@study.claim(
    "After 100 steps of recovery, ranks by importance lose no more than equal ranks, and those no more than inverse ones",
    paper="important blocks get more rank (no figure)",
    if_fails="100 short steps at this learning rate change the loss by less than the ranks' differences can show",
)
def ranks_follow_importance(results: Results) -> Any:
    arms = ("cfsp-recovered", "cfsp-recovered-uniform", "cfsp-recovered-inverse")
    first, second = (results.difference("loss", *pair, **HALF) <= 0 for pair in itertools.pairwise(arms))
    return first & second


@study.claim(
    "Pruning takes exactly one pass of the dense model over the text (counted at its embeddings)",
    paper="one forward pass over 128 x 1,024 tokens",
)
def one_pass(results: Results) -> Any:
    return results.mean("calls", "cfsp", **HALF).between(1, 1)


@study.claim("Pruning takes under 5 % of the processor time of 100 recovery steps", paper="minutes for LLaMA-3 8B (no figure)")
def pruning_is_quick(results: Results) -> Any:
    pruning = results.values("prune.cpu_seconds", "cfsp", **HALF)
    return bootstrap(lambda a, b: a / b, pruning, results.values("recover.cpu_seconds", "cfsp-recovered"), what=QUICK) <= 0.05


QUICK = "processor time to prune / of 100 recovery steps"


@study.claim("All arms keep the same number of parameters, to within one multiple of the width a layer", paper="compared at equal ratios")
def equal_budgets(results: Results) -> Any:
    layers = len(results.curve("width", "cfsp"))
    channels = sum(results.mean("width", "cfsp", layer=layer).value for layer in range(layers))
    hidden = results.mean("ffn_flops", "cfsp", **HALF).value / (6 * channels)
    pruned = [arm for arm in results.arms if arm not in ("dense", "cfsp") and results.has("parameters", arm)]
    worst = max((results.difference("parameters", arm, "cfsp", **HALF) for arm in pruned), key=lambda each: abs(each.value))
    allowed = 3 * hidden * 16 * layers
    return worst.between(-allowed, allowed)


@study.summary
def summary(results: Results) -> str:
    def loss(arm: str) -> str:
        return results.say("loss", arm, **HALF)

    gain, coarse = (results.difference("loss", "uniform-wanda", arm, **HALF).value for arm in ("cfsp", "coarse-wanda"))
    return (
        f"On this machine a model of {results.mean('parameters', 'dense', **HALF).value / 1e6:.1f} million parameters lost half of its "
        f"feed-forward channels in {results.say('prune.cpu_seconds', 'cfsp', **HALF)}: its loss on unseen text rose from {loss('dense')} to "
        f"{loss('cfsp')} nats a token (random channels {loss('uniform-random')}, magnitude {loss('uniform-magnitude')}, Wanda "
        f"{loss('uniform-wanda')}, one global threshold {loss('global-threshold')}), {loss('cfsp-recovered')} after 100 steps of recovery. "
        f"The coarse step, how much each block keeps, makes {coarse / gain:.0%} of what CFSP gains over Wanda's channels at uniform width: with "
        f"its widths Wanda's channels come to {loss('coarse-wanda')}, the released ranking's to {loss('coarse-activation')}. It writes in "
        f"{results.say('writing_seconds', 'cfsp', beside='dense', **HALF)} the dense model's time."
    )
