"""Five mixtures of 24 narrow experts trained alike from scratch: BlockFFN with both losses, with one, with none, and a top-K router.

The models differ in router and losses alone. What sparsity is worth is timed on a layer whose weights no cache holds, with active experts
drawn as the trained model has them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fewer.data import folder_of, made_once
from fewer.language._shared.from_scratch import MODEL_HELP, TEXT_HELP, Ground, ground, pretrain
from fewer.language._shared.model_directory import load_directory
from fewer.language._shared.timing import one_thread
from fewer.language.block_ffn.layer.block_ffn import BlockFFN, Kernel
from fewer.language.block_ffn.model import BlockFFNConfig, BlockFFNForCausalLM
from fewer.language.block_ffn.objective.adaptive_factor import AdaptiveFactor
from fewer.language.block_ffn.peers import DenseForCausalLM, ReMoEForCausalLM, TopKForCausalLM
from fewer.language.block_ffn.sparsity import SparsityStats, documents_of, mean_stats, model_sparsity
from fewer.language.block_ffn.speculative import speculative_generate
from fewer.meters import median_seconds
from fewer.study import Curve, Figure, Results, Scale, Study, Tradeoff, Trial
from fewer.study.races import time_pairs
from fewer.study.results import Estimate, bootstrap
from fewer.tasks import token_loss
from fewer.tasks.lm_training import Recipe

VERSION = 1  # of how a kept model is trained: raise it where the code trains another from the same words
STEPS = {Scale.QUICK: 160, Scale.FULL: 40_000}
BATCH, WINDOW, CHUNK, HELD_OUT = 8, 128, 64, 16_384
LOCALITY, CHUNKS = 2e-3, 5e-2  # lambda_al and lambda_cs at the start
FULL = {"num_hidden_layers": 16, "hidden_size": 768, "num_attention_heads": 12, "num_key_value_heads": 12}  # the paper's 0.1B
WIDE = (2048, 64, 128)  # hidden size, experts and their size of the layer that is timed: 134 MB of weights
AT_8: dict[str, Any] = {"window": 8}
ONE: dict[str, Any] = {"kernel": "sparse", "tokens": 1}
EIGHT: dict[str, Any] = {"kernel": "union", "tokens": 8}
PROMPTS, PROMPT, WRITTEN = 8, 24, 24  # of the check that speculation loses nothing

study = Study(
    "block-ffn",
    question="How many experts does a chunk of tokens leave unused, and what is that worth to a single user?",
    baseline="none",
    figures=[
        Figure("loss", "validation loss (nats)"),
        Figure("tls", "experts unused by a token", "%", "higher"),
        Figure("cls", "experts unused by 8 tokens together", "%", "higher", at=AT_8),
        Figure("reuse", "a token's experts that the next uses too", "%", "higher"),
        Figure("bytes", "weights of experts that 8 tokens read", "bytes"),
        Figure("training.cpu_seconds", "processor time of training", "s"),
        Figure("parameters", "parameters", detail=True),
        Figure("training_loss", "training loss (nats)", detail=True),
        Figure("time_share", "time of a wide layer / dense, 1 token", "%", at=ONE),
        Figure("tokens_a_second", "tokens written a second", "", "higher", detail=True, at={"way": "n-gram draft, union"}),
    ],
    charts=[
        Curve("cls", over="window", title="Experts unused by some tokens together"),
        Curve("training_loss", over="step", title="Training loss, the losses on router logits with it"),
        Tradeoff("loss", "bytes", title="Loss against the weights that 8 tokens read"),
    ],
    time_limit=48 * 3600,
    seeds=3,
)
study.option("model", "", help=MODEL_HELP)
study.option("text", "", help=TEXT_HELP)


@dataclass
class Task:
    """Text in tokens, and the sizes of the models."""

    ground: Ground
    test: Tensor
    scale: Scale

    def config(self, locality: float = 0.0, chunks: float = 0.0) -> BlockFFNConfig:
        quick = self.scale is Scale.QUICK
        sizes = self.ground.sizes | ({} if quick else FULL)
        experts, size = (24, sizes["hidden_size"] // 4) if quick else (48, 64)
        words = {"num_experts": experts, "expert_size": size, "chunk_len": CHUNK}
        return BlockFFNConfig(**sizes, **words, locality_factor=locality, chunk_factor=chunks)  # pyright: ignore[reportCallIssue]

    @property
    def end(self) -> int | None:
        """The token that ends a document."""
        ends = self.ground.sizes["eos_token_id"]
        return ends[0] if isinstance(ends, list) else ends

    def recipe(self, seed: int) -> Recipe:
        return Recipe(STEPS[self.scale], BATCH, WINDOW, 2e-3, warm_up=20, last_lr=0.0, seed=seed)

    def rows(self) -> Tensor:
        """The text to judge on [rows, 128]."""
        return self.test[: len(self.test) // WINDOW * WINDOW].reshape(-1, WINDOW)

    def folder(self, seed: int) -> Path:
        """Where the model with both losses is kept, for the arm that asks how many experts it uses."""
        digest = hashlib.sha256(self.ground.train.numpy().tobytes()).hexdigest()
        words = self.config(LOCALITY, CHUNKS).to_diff_dict()
        return folder_of(
            "lm", "block-ffn", {"version": VERSION, "train": digest, "config": words, "steps": STEPS[self.scale], "seed": seed}
        )


@study.task
def task(scale: Scale, model: str, text: str) -> Task:
    common = ground(model, text, window=WINDOW)
    return Task(common, common.validation[:HELD_OUT], scale)


def learn(task: Task, model: BlockFFNForCausalLM, seed: int, tell: Callable[[int, float], None] | None = None) -> None:
    """Train a model; where it has a chunk loss, the factor follows the paper's schedule in the steps that there are."""
    recipe = task.recipe(seed)
    interval = max(1, recipe.steps // 40)
    start = model.config.chunk_factor
    factor = AdaptiveFactor(start, stable_steps=4 * interval, adjust_every=interval) if start else None

    def loss_of(ids: Tensor) -> Tensor:
        loss = model(input_ids=ids, labels=ids, doc_ids=documents_of(ids, task.end), use_cache=False).loss
        if factor is not None and model.chunk_loss is not None:
            model.chunk_factor = factor.step(model.chunk_loss.item())
        return loss

    pretrain(model, task.ground.train, recipe, loss_of=loss_of, tell=tell)


def fresh(task: Task, seed: int, locality: float, chunks: float) -> BlockFFNForCausalLM:
    torch.manual_seed(seed)
    return BlockFFNForCausalLM(task.config(locality, chunks))


def save(task: Task, model: BlockFFNForCausalLM, folder: Path) -> None:
    model.save_pretrained(folder)
    task.ground.tokenizer.save_pretrained(folder)


def experts_a_token(task: Task, seed: int) -> int:
    """How many experts a token activates in the model with both losses, which is trained first where no arm has done so."""

    def make(part: Path) -> None:
        model = fresh(task, seed, LOCALITY, CHUNKS)
        learn(task, model, seed)
        save(task, model, part)

    model: Any = load_directory(made_once(task.folder(seed), make))[0]
    stats = mean_stats(model_sparsity(model, task.rows(), task.end))
    return max(1, round((1 - stats.tls) * model.config.num_experts))


def train_and_judge(task: Task, trial: Trial, model: BlockFFNForCausalLM) -> SparsityStats:
    """Train a model and log what it predicts, how sparse it is, and what it read."""
    model.to(trial.device)
    told = trial.follow("training_loss", total=STEPS[task.scale], text="loss", over="step")
    with trial.measure("training"):
        learn(task, model, trial.seed, lambda _, loss: told(loss))
    stats = mean_stats(model_sparsity(model, task.rows(), task.end))
    trial.log("loss", token_loss(model, task.test, window=WINDOW))
    trial.log("tls", stats.tls)
    trial.log("reuse", stats.reuse)
    for window, share in {1: stats.tls, **stats.cls}.items():
        trial.log("cls", share, window=window)
    layers = model.feed_forwards()
    trial.log("bytes", (1 - stats.cls[8]) * sum(layer.up_proj.nbytes + layer.down_proj.nbytes for layer in layers))
    trial.log("parameters", sum(each.numel() for each in model.parameters()))
    return stats


def plain(task: Task, trial: Trial, locality: float = 0.0, chunks: float = 0.0) -> None:
    train_and_judge(task, trial, fresh(task, trial.seed, locality, chunks))


@study.arm("block-ffn", label="BlockFFN")
def block_ffn(task: Task, trial: Trial) -> None:
    model = fresh(task, trial.seed, LOCALITY, CHUNKS)
    stats = train_and_judge(task, trial, model)
    made_once(task.folder(trial.seed), lambda part: save(task, model, part))
    with one_thread():
        time_small_layer(task, trial, model)
        time_wide_layer(trial, stats)
        write(task, trial, model)


study.arm_table(
    plain,
    {
        "chunk-loss": {"chunks": CHUNKS, "label": "chunk loss alone"},
        "locality-loss": {"locality": LOCALITY, "label": "locality loss alone"},
        "none": {"label": "neither loss"},
    },
)


@study.arm("top-k", label="top-K router")
def top_k(task: Task, trial: Trial) -> None:
    chosen = experts_a_token(task, trial.seed)
    trial.note("experts a token", str(chosen))
    torch.manual_seed(trial.seed)
    train_and_judge(task, trial, TopKForCausalLM(task.config(), chosen))


def only_full(task: Task, trial: Trial, make: Callable[[Task, int], BlockFFNForCausalLM]) -> None:
    """An arm of the full scale."""
    if task.scale is not Scale.FULL:
        trial.note("left out", "runs at --full")
        return
    torch.manual_seed(trial.seed)
    train_and_judge(task, trial, make(task, trial.seed))


def remoe(task: Task, seed: int) -> BlockFFNForCausalLM:
    config = task.config()
    return ReMoEForCausalLM(config, 1 - experts_a_token(task, seed) / config.num_experts)


study.arm_table(
    only_full,
    {
        "remoe": {"make": remoe, "label": "ReMoE"},
        "dense": {"make": lambda task, seed: DenseForCausalLM(task.config()), "label": "dense"},
    },
)


# What it is worth in time


def draw_active(tokens: int, experts: int, share: float, union: float, generator: torch.Generator) -> Tensor:
    """Active experts [tokens, experts]: each token uses a share of all, and together they use a share.

    >>> active = draw_active(8, 64, 0.2, 0.3, torch.Generator().manual_seed(0))
    >>> active.sum(1).tolist() == [13] * 8, int(active.any(0).sum())
    (True, 19)
    """
    each = max(1, round(share * experts))
    pool = torch.randperm(experts, generator=generator)[: min(tokens * each, max(each, round(union * experts)))]
    active = torch.zeros(tokens, experts, dtype=torch.bool)
    for token in range(tokens):
        own = pool[token::tokens][:each]  # so that none of the pool is left out
        others = pool[~torch.isin(pool, own)]
        more = others[torch.randperm(len(others), generator=generator)[: each - len(own)]]
        active[token, torch.cat([own, more])] = True
    return active


@torch.no_grad()
def time_small_layer(task: Task, trial: Trial, model: BlockFFNForCausalLM) -> None:
    """A layer of the trained model on its own text: it fits into a cache, and what a call costs is most of the time."""
    layer = model.feed_forwards()[len(model.feed_forwards()) // 2]
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(input_ids=task.rows()[:1].to(trial.device), use_cache=False)
    hook.remove()
    for tokens in (1, 8, 32):
        x = seen[0][0, :tokens]
        logits = layer.router_proj(x)
        gates, active = layer.gates(logits), layer.active(logits)
        for kernel in ("dense", "sparse", "union"):
            seconds = median_seconds(lambda x=x, gates=gates, active=active, kernel=kernel: layer.mix(x, gates, active, kernel))
            trial.log("layer_seconds", seconds / tokens, kernel=kernel, tokens=tokens)


@torch.no_grad()
def time_wide_layer(trial: Trial, stats: SparsityStats) -> None:
    """A layer of 134 MB against the dense pair of maps of its size, its active experts drawn as sparse as the trained model's."""
    draw = torch.Generator().manual_seed(trial.seed)
    layer = BlockFFN(*WIDE).to(trial.device)
    up, down = layer.up_proj.clone(), layer.down_proj.clone(memory_format=torch.contiguous_format)
    for tokens, union in ((1, stats.tls), (8, stats.cls[8]), (32, stats.cls[32])):
        x = torch.randn(tokens, layer.hidden_size, generator=draw).to(trial.device)
        active = draw_active(tokens, layer.num_experts, 1 - stats.tls, 1 - union, draw).to(trial.device)
        gates = torch.rand(active.shape, generator=draw).to(trial.device) * active
        trial.log("time_bound", active.any(0).float().mean().item() * 1.35 + 0.03, tokens=tokens)
        for kernel in ("dense", "sparse", "union"):
            times = time_pairs(lambda: routed(layer, x, gates, active, kernel), lambda: F.linear(F.silu(F.linear(x, up)), down), pairs=7)
            trial.log("time_share", float(np.median(times[:, 0] / times[:, 1])), kernel=kernel, tokens=tokens)
            trial.log("wide_seconds", float(np.median(times[:, 0])) / tokens, kernel=kernel, tokens=tokens)


def routed(layer: BlockFFN, x: Tensor, gates: Tensor, active: Tensor, kernel: Kernel) -> Tensor:
    """A pass with given gates, in the time of one whose router decides."""
    logits = layer.router_proj(x)
    layer.gates(logits)
    layer.active(logits)
    return layer.mix(x, gates, active, kernel)


def prompts(task: Task) -> Iterator[Tensor]:
    """Beginnings [1, 24] of unseen text."""
    for row in task.rows()[:: max(1, len(task.rows()) // PROMPTS)][:PROMPTS]:
        yield row[None, :PROMPT]


@torch.no_grad()
def write(task: Task, trial: Trial, model: BlockFFNForCausalLM) -> None:
    """Writing token by token and by n-gram drafts, with dense layers and with the union kernel; and whether drafts change the text."""
    words = {"max_new_tokens": 48, "min_new_tokens": 48, "do_sample": False, "pad_token_id": 0}
    prompt = next(prompts(task)).to(trial.device)
    for kernel in ("dense", "union"):
        for layer in model.feed_forwards():
            layer.kernel = kernel
        plain_seconds = median_seconds(lambda: model.generate(prompt, attention_mask=torch.ones_like(prompt), **words), 3)  # pyright: ignore[reportArgumentType]
        out = speculative_generate(model, "ngram", prompt, 48)
        seconds = median_seconds(lambda: speculative_generate(model, "ngram", prompt, 48), 3)
        trial.log("tokens_a_second", 48 / plain_seconds, way=f"token by token, {kernel}")
        trial.log("tokens_a_second", (out.sequences.shape[1] - PROMPT) / seconds, way=f"n-gram draft, {kernel}")
    exact = model.double()  # in float32 a pass over several tokens may round a tie otherwise
    same, passes, drafted = [], 0, 0
    for prompt in prompts(task):
        wanted = exact.generate(
            prompt.to(trial.device), attention_mask=torch.ones_like(prompt), max_new_tokens=WRITTEN, do_sample=False, pad_token_id=0
        )  # pyright: ignore[reportArgumentType]
        out = speculative_generate(exact, "ngram", prompt.to(trial.device), WRITTEN)
        same.append(out.sequences.tolist() == wanted.tolist())
        passes, drafted = passes + len(out.accepted), drafted + sum(out.accepted) + len(out.accepted)
    trial.log("same_text", sum(same) / len(same))
    trial.log("tokens_a_pass", drafted / passes)


# What the paper claims


def gap(results: Results, arm: str) -> np.ndarray:
    """TLS - CLS_8 by seed."""
    return results.values("tls", arm) - results.values("cls", arm, **AT_8)


def over_bound(results: Results, kernel: str, tokens: int) -> Estimate:
    """By how much a wide layer's time, as a share of the dense one's, exceeds 1.35 x its active share + 0.03."""
    times = results.values("time_share", "block-ffn", kernel=kernel, tokens=tokens)
    bounds = results.values("time_bound", "block-ffn", tokens=tokens)
    return bootstrap(lambda time, bound: time - bound, times, bounds, what=f"share of the dense time ({kernel}, {tokens} tokens) - bound")


@study.claim(
    "8 tokens together leave at least 20 points more of the experts unused than without the two losses",
    paper="0.1B: 71.4 % against 14.9 %",
)
def sparser_chunks(results: Results) -> Any:
    return results.difference("cls", "block-ffn", "none", **AT_8) >= 0.20


@study.claim(
    "A token leaves at least 10 points more of the experts unused than without the two losses", paper="0.1B: 80.5 % against 48.6 %"
)
def sparser_tokens(results: Results) -> Any:
    return results.difference("tls", "block-ffn", "none") >= 0.10


@study.claim(
    "8 tokens together leave more experts unused than a top-K router's at as many experts a token",
    paper="0.1B: 71.4 % against 49.2 % at TLS 80.5 and 79.2 %",
)
def sparser_than_top_k(results: Results) -> Any:
    return results.difference("cls", "block-ffn", "top-k", **AT_8) > 0


@study.claim(
    "The locality loss brings what 8 tokens leave unused nearer to what one does (chunk loss in both)",
    paper="0.1B: TLS - CLS_8 of 9.1 points with it, 14.1 without",
)
def nearer(results: Results) -> Any:
    words = "TLS - CLS_8, BlockFFN - chunk loss alone"
    return bootstrap(lambda ours, other: ours - other, gap(results, "block-ffn"), gap(results, "chunk-loss"), what=words) < 0


@study.claim(
    "The two losses cost at most 0.15 nats of validation loss",
    paper="0.1B: perplexity 14.88 against 14.85",
    if_fails="in so few steps the losses take hold while the model still learns fast, and it has no time to make that up",
)
def cheap(results: Results) -> Any:
    return results.no_worse("loss", "block-ffn", "none", 0.15, better="lower")


@study.claim(
    "With both losses the validation loss is at most 0.02 nats above the chunk loss alone", paper="0.1B: perplexity 14.88 against 15.66"
)
def locality_is_free(results: Results) -> Any:
    return results.no_worse("loss", "block-ffn", "chunk-loss", 0.02, better="lower")


@study.claim(
    "A wide layer takes, for 1 token, at most (1 - TLS) x 1.35 + 0.03 of the dense layer's time",
    paper="2.8B on a Jetson Orin NX: 12.8 % of the time at 1 - TLS = 12.45 %",
)
def quick_for_one(results: Results) -> Any:
    return over_bound(results, "sparse", 1) <= 0


@study.claim(
    "A wide layer takes, for 8 tokens, at most (1 - CLS_8) x 1.35 + 0.03 of the dense layer's time",
    paper="2.8B, 32 tokens: 30.7 % of the time at 1 - CLS = 30.86 %",
)
def quick_for_eight(results: Results) -> Any:
    return over_bound(results, "union", 8) <= 0


@study.claim("Greedy text is the same with drafts and without, for every prompt", paper="speculative decoding is lossless")
def lossless(results: Results) -> Any:
    return results.mean("same_text", "block-ffn") >= 1


@study.summary
def summary(results: Results) -> str:
    def share(figure: str, arm: str, **at: Any) -> str:
        return results.say(figure, arm, **at)

    def time(**at: Any) -> str:
        return results.say("time_share", "block-ffn", unit="%", **at)

    return (
        f"Trained alike for {STEPS[Scale.QUICK]} steps, a token of BlockFFN leaves {share('tls', 'block-ffn')} of the experts unused and 8 tokens "
        f"together {share('cls', 'block-ffn', **AT_8)}; without the two losses {share('tls', 'none')} and {share('cls', 'none', **AT_8)}, with a "
        f"top-K router {share('tls', 'top-k')} and {share('cls', 'top-k', **AT_8)}. Validation loss {results.say('loss', 'block-ffn')} nats "
        f"({results.say('loss', 'none')} without the losses, {results.say('loss', 'chunk-loss')} with the chunk loss alone, "
        f"{results.say('loss', 'top-k')} with top-K). On one core a layer of 134 MB takes {time(**ONE)} of the dense layer's time for a token and "
        f"{time(**EIGHT)} for 8. The tiny models themselves fit into a cache, where sparse layers gain little; a draft's pass keeps "
        f"{results.say('tokens_a_pass', 'block-ffn')} tokens."
    )
