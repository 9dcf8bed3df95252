"""Which channels to remove, and how many from which block: loss, size and time of a small Llama, pruned in every way at the same budget.

The model is the family's small language model (or any directory), pruned after one pass over windows of its training text; losses are
taken on text it was not trained on.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from fewer.language.cfsp.calibration import CfspStats, calibrate
from fewer.language.cfsp.gated_mlp import decoder_layers, ffn_flops, width_of
from fewer.language.cfsp.global_threshold import prune_by_global_threshold
from fewer.language.cfsp.model_files import save_pruned
from fewer.language.cfsp.pruning import PruneReport, count_parameters, prune
from fewer.language.cfsp.recovery import recover
from fewer.study import Curve, Figure, Results, Scale, Study, Tradeoff, Trial
from fewer.tasks import fetch_small_lm, open_lm
from fewer.tasks.small_lm import corpus_of

study = Study(
    "cfsp",
    question="How much does a language model lose when feed-forward channels are removed, and which way of choosing them loses least?",
    baseline="uniform-wanda",
    figures=[
        Figure("loss_at_half", "validation loss, half removed (nats)"),
        Figure("loss_at_third", "validation loss, 30 % removed (nats)"),
        Figure("accuracy_at_half", "next token right, half removed", "%", "higher"),
        Figure("perplexity_at_half", "perplexity, half removed"),
        Figure("parameters", "parameters, half removed", ""),
        Figure("ffn_flops", "feed-forward operations a token", "FLOP"),
        Figure("file_bytes", "size on disk", "bytes"),
        Figure("prune.seconds", "time to calibrate and prune", "s"),
        Figure("passes", "passes of the dense model over the text", ""),
        Figure("recover.seconds", "time of 100 recovery steps", "s"),
        Figure("prefill_seconds", "reading 256 tokens", "s"),
        Figure("decode_seconds", "writing 32 tokens", "s"),
        Figure("prune.joules", "energy to calibrate and prune", "J", detail=True),
        Figure("prune.peak_memory", "peak resident memory while pruning", "bytes", detail=True),
        Figure("loss", "validation loss (nats)"),
        Figure("block_importance", "mean angle between a block's input and output, over pi", "", ""),
        Figure("width", "channels kept", "", ""),
    ],
    charts=[
        Curve("loss", over="removed", title="Validation loss over the share of channels removed"),
        Tradeoff("loss_at_half", "prune.seconds", title="Loss with half removed against the time to prune"),
        Curve("block_importance", over="layer", title="Block importance, first layer to last"),
        Curve("width", over="layer", title="Channels kept with half removed, first layer to last"),
    ],
    time_limit=2 * 3600,
    seeds=3,
)
study.option("model", "", help="a Llama, Mistral or Qwen2 directory in place of the small language model")
study.option("text", "", help="a UTF-8 text file in place of the standard library's Python (for --set model=...)")
study.option("multiple_of", 16, help="widths are multiples of it")

HALF, THIRD = 0.5, 0.3
SHARES = {Scale.QUICK: (THIRD, HALF), Scale.FULL: (0.2, THIRD, HALF)}
WINDOW = 256
WINDOWS = {Scale.QUICK: 16, Scale.FULL: 512}  # of calibration text; 512 x 256 are the paper's 131,072 tokens
HELD_OUT = {Scale.QUICK: 24_000, Scale.FULL: 200_000}  # tokens
RECOVERY_STEPS, RECOVERY_BATCH, RECOVERY_WINDOW = 100, 4, 128


@dataclass
class Task:
    """A dense model's directory, its training text and text it has not seen, in tokens."""

    folder: Path
    train: Tensor
    test: Tensor
    scale: Scale
    multiple_of: int
    about: str  # which model, and how well it predicts

    def model(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype="float32").eval()

    def windows(self, seed: int) -> Tensor:
        """Calibration windows [N, 256] of the training text."""
        starts = torch.randint(len(self.train) - WINDOW + 1, (WINDOWS[self.scale], 1), generator=torch.Generator().manual_seed(seed))
        return self.train[starts + torch.arange(WINDOW)]


@study.task
def task(scale: Scale, model: str, text: str, multiple_of: int) -> Task:
    corpus = corpus_of([text] if text else [])
    folder = Path(model) if model else fetch_small_lm(text=[text] if text else [])
    lm = open_lm(folder, corpus)
    about = f"{lm.key}, trained to a validation loss of {lm.about['validation_loss']:.3f}" if lm.about else str(folder)
    return Task(folder, lm.train, lm.validation[: HELD_OUT[scale]], scale, multiple_of, about)


@torch.no_grad()
def loss_and_accuracy(model: nn.Module, tokens: Tensor, batch: int = 8) -> tuple[float, float]:
    """(cross-entropy in nats, share of next tokens that are right) over windows one after the other."""
    rows = tokens[: len(tokens) // WINDOW * WINDOW].reshape(-1, WINDOW)
    loss = right = 0.0
    for part in rows.split(batch):
        logits, following = model(input_ids=part, use_cache=False).logits[:, :-1].flatten(0, 1), part[:, 1:].flatten()
        loss += F.cross_entropy(logits, following, reduction="sum").item()
        right += (logits.argmax(1) == following).sum().item()
    judged = rows.numel() - len(rows)
    return loss / judged, right / judged


def judge(model: nn.Module, task: Task, trial: Trial, removed: float, *, timed: bool = False) -> None:
    """Log a model's loss, and at one half its size too (and how quickly it reads and writes, where that is asked for)."""
    trial.note("language model", task.about)
    loss, accuracy = loss_and_accuracy(model, task.test)
    trial.log("loss", loss, removed=removed)
    if removed == THIRD:
        trial.log("loss_at_third", loss)
    if removed not in (0.0, HALF):
        return
    trial.log("loss_at_half", loss)
    trial.log("perplexity_at_half", float(torch.tensor(loss).exp()))
    trial.log("accuracy_at_half", accuracy)
    trial.log("parameters", count_parameters(model))
    widths = [width_of(layer) for layer in decoder_layers(model)]
    trial.log("ffn_flops", ffn_flops(model.config.hidden_size, widths))  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    for layer, width in enumerate(widths):
        trial.log("width", width, layer=layer)
    with tempfile.TemporaryDirectory() as folder:
        trial.log("file_bytes", (save_pruned(model, Path(folder) / "model") / "model.safetensors").stat().st_size)
    if timed:
        log_speed(model, task, trial)


def log_speed(model: Any, task: Task, trial: Trial, repeats: int = 3) -> None:
    """Seconds to read 256 tokens and to write 32 more, the median of some repeats."""
    prompt = task.test[None, :WINDOW]

    def median(work: Callable[[], object]) -> float:
        work()  # warm
        seconds = []
        for _ in range(repeats):
            started = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - started)
        return sorted(seconds)[repeats // 2]

    with torch.no_grad():
        trial.log("prefill_seconds", median(lambda: model(prompt)))
    words = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False, "pad_token_id": 0}
    trial.log("decode_seconds", median(lambda: model.generate(prompt[:, :16], attention_mask=torch.ones(1, 16), **words)))


Way = Callable[[nn.Module, CfspStats, float, torch.Generator], PruneReport]


def prune_and_judge(task: Task, trial: Trial, way: Way, *, timed: bool = False) -> None:
    """Calibrate, prune and judge at each share."""
    windows = task.windows(trial.seed)
    for removed in SHARES[task.scale]:
        model = task.model()
        draw = torch.Generator().manual_seed(trial.seed)
        with trial.measure("prune", removed=removed) as cost:
            stats = calibrate(model, windows.split(8))
            way(model, stats, removed, draw)
        trial.log("passes", cost.figures()["forwarded_tokens"] / windows.numel(), removed=removed)
        if removed == HALF:
            trial.log("passes", cost.figures()["forwarded_tokens"] / windows.numel())
            for figure, value in cost.figures().items():
                trial.log(f"prune.{figure}", value)
            for layer, importance in enumerate(stats.block_importance.tolist()):
                trial.log("block_importance", importance, layer=layer)
        judge(model, task, trial, removed, timed=timed)


def one_way(task: Task, coarse: str, metric: str) -> Way:
    def way(model: nn.Module, stats: CfspStats, removed: float, draw: torch.Generator) -> PruneReport:
        return prune(model, stats, removed, coarse, metric, multiple_of=task.multiple_of, generator=draw)  # pyright: ignore[reportArgumentType]

    return way


@study.arm("dense", against="dense", label="not pruned")
def dense(task: Task, trial: Trial) -> None:
    judge(task.model(), task, trial, removed=0.0, timed=True)


def declare(name: str, coarse: str, metric: str, label: str) -> None:
    @study.arm(name, label=label)
    def arm(task: Task, trial: Trial) -> None:
        prune_and_judge(task, trial, one_way(task, coarse, metric), timed=name == "cfsp")


declare("uniform-random", "none", "random", "uniform, random")
declare("uniform-magnitude", "none", "magnitude", "uniform, magnitude")
declare("uniform-wanda", "none", "wanda", "uniform, Wanda")
declare("uniform-activation", "none", "activation", "uniform, as released")
declare("uniform-relative", "none", "relative", "uniform, relative")
declare("coarse-wanda", "angular", "wanda", "coarse, Wanda")
declare("coarse-activation", "angular", "activation", "coarse, as released")
declare("cfsp", "angular", "relative", "CFSP")


@study.arm("global-threshold", label="one global threshold")
def global_threshold(task: Task, trial: Trial) -> None:
    prune_and_judge(task, trial, lambda model, stats, removed, draw: prune_by_global_threshold(model, stats, removed, task.multiple_of))


def recover_and_judge(task: Task, trial: Trial, ig: Any) -> None:
    model = task.model()
    stats = calibrate(model, task.windows(trial.seed).split(8))
    report = prune(model, stats, HALF, multiple_of=task.multiple_of)
    with trial.measure("recover"):
        recover(
            model,
            task.train,
            RECOVERY_STEPS,
            scores=report.scores,
            ig=ig,
            batch=RECOVERY_BATCH,
            window=RECOVERY_WINDOW,
            seed=trial.seed,
            tell=lambda step, steps, loss: trial.progress(step, steps, f"loss {loss:.3f}"),
        )
    judge(model, task, trial, removed=HALF)


@study.arm("cfsp-recovered", against="cfsp", label="CFSP and IG-LoRA")
def recovered(task: Task, trial: Trial) -> None:
    recover_and_judge(task, trial, "importance")


@study.arm("cfsp-recovered-uniform", against="cfsp", label="CFSP and LoRA of equal ranks")
def recovered_uniform(task: Task, trial: Trial) -> None:
    recover_and_judge(task, trial, "uniform")


@study.arm("cfsp-recovered-inverse", against="cfsp", label="CFSP and inverse IG-LoRA")
def recovered_inverse(task: Task, trial: Trial) -> None:
    recover_and_judge(task, trial, "inverse")


# What the paper claims


def _within_one_spread(results: Results, figure: str, other: str) -> Any:
    """CFSP's loss minus another arm's is at most that arm's spread over seeds."""
    values = results.values(figure, other)
    return results.difference(figure, "cfsp", other) <= float(values.max() - values.min())


@study.claim(
    "With half removed, CFSP loses at least 0.30 nats less than random channels of uniform width",
    paper="best of all compared ways at 20 to 50 % (average zero-shot accuracy and perplexity)",
)
def better_than_random(results: Results) -> Any:
    return results.difference("loss_at_half", "cfsp", "uniform-random") <= -0.30


@study.claim(
    "With half removed, CFSP loses at least 0.15 nats less than magnitude at uniform width",
    paper="better than Magnitude-SP at 20 to 50 %",
)
def better_than_magnitude(results: Results) -> Any:
    return results.difference("loss_at_half", "cfsp", "uniform-magnitude") <= -0.15


@study.claim(
    "CFSP is not worse than Wanda at uniform width by more than one spread over seeds, at 30 % and at half",
    paper="better than Wanda-SP",
)
def not_worse_than_wanda(results: Results) -> Any:
    return _within_one_spread(results, "loss_at_third", "uniform-wanda") & _within_one_spread(results, "loss_at_half", "uniform-wanda")


@study.claim(
    "CFSP is not worse than one global threshold by more than one spread over seeds, at 30 % and at half",
    paper="better than FLAP",
)
def not_worse_than_threshold(results: Results) -> Any:
    return _within_one_spread(results, "loss_at_third", "global-threshold") & _within_one_spread(
        results, "loss_at_half", "global-threshold"
    )


@study.claim(
    "After 100 steps of recovery, ranks by importance lose no more than equal ranks, and those no more than inverse ones",
    paper="important blocks get more rank (no figure)",
    if_fails="100 short steps at this learning rate change the loss by less than the ranks' differences can show",
)
def ranks_follow_importance(results: Results) -> Any:
    return (results.difference("loss_at_half", "cfsp-recovered", "cfsp-recovered-uniform") <= 0) & (
        results.difference("loss_at_half", "cfsp-recovered-uniform", "cfsp-recovered-inverse") <= 0
    )


@study.claim("Pruning takes exactly one pass of the dense model over the text (counted)", paper="one forward pass over 128 x 1,024 tokens")
def one_pass(results: Results) -> Any:
    return (results.mean("passes", "cfsp") >= 1) & (results.mean("passes", "cfsp") <= 1)


@study.claim("Pruning takes under 5 % of the time of 100 recovery steps", paper="minutes for LLaMA-3 8B (no figure)")
def pruning_is_quick(results: Results) -> Any:
    recovery = float(results.mean("recover.seconds", "cfsp-recovered"))
    return results.mean("prune.seconds", "cfsp") <= 0.05 * recovery


@study.claim("All arms keep the same number of parameters, to within one multiple of the width a layer", paper="compared at equal ratios")
def equal_budgets(results: Results) -> Any:
    layers = len(results.curve("width", "cfsp"))
    hidden = float(results.mean("ffn_flops", "cfsp")) / (6 * sum(float(results.mean("width", "cfsp", layer=n)) for n in range(layers)))
    allowed = 3 * hidden * 16 * layers
    pruned = [arm for arm in results.arms if arm != "dense" and results.has("parameters", arm)]
    comparisons = [results.difference("parameters", arm, "cfsp") for arm in pruned if arm != "cfsp"]
    worst = max(comparisons, key=lambda estimate: abs(estimate.value))
    return (worst <= allowed) & (worst >= -allowed)


@study.summary
def summary(results: Results) -> str:
    def loss(arm: str) -> str:
        return f"{results.mean('loss_at_half', arm).value:.2f}"

    faster = results.ratio("decode_seconds", "dense", "cfsp").value
    return (
        f"On this machine a model of {results.mean('parameters', 'dense').value / 1e6:.1f} million parameters lost half of its feed-forward "
        f"channels in {results.mean('prune.seconds', 'cfsp').value:.1f} s: its loss on unseen text rose from {loss('dense')} to {loss('cfsp')} "
        f"nats a token (random channels {loss('uniform-random')}, magnitude {loss('uniform-magnitude')}, Wanda {loss('uniform-wanda')}, one "
        f"global threshold {loss('global-threshold')}), {loss('cfsp-recovered')} after 100 steps of recovery; it writes {faster:.2f}x as fast."
    )
