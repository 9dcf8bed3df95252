"""Five mixtures of 24 narrow experts trained alike from scratch: BlockFFN with both losses, with one, with none, and a top-K router.

The models differ in router and losses alone. What sparsity is worth is timed on a layer whose weights no cache holds, with active experts
drawn as the trained model has them.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fewer.data import folder_of, made_once
from fewer.devices import one_thread
from fewer.language._shared.from_scratch import MODEL_HELP, TEXT_HELP, Ground, ground, pretrain
from fewer.language._shared.model_directory import load_directory
from fewer.language._shared.token_rows import documents_of
from fewer.language.block_ffn.layer import BlockFFN, Kernel
from fewer.language.block_ffn.model import BlockFFNConfig, BlockFFNForCausalLM
from fewer.language.block_ffn.objective.adaptive_factor import AdaptiveFactor
from fewer.language.block_ffn.peers import DenseForCausalLM, ReMoEForCausalLM, TopKForCausalLM
from fewer.language.block_ffn.sparsity import SparsityStats, mean_stats, model_sparsity
from fewer.language.block_ffn.speculative import speculative_generate
from fewer.meters import median_seconds
from fewer.study import Curve, Figure, Results, Scale, Study, Tradeoff, Trial
from fewer.study.races import time_pairs
from fewer.study.results import bootstrap
from fewer.tasks import token_loss
from fewer.tasks.lm_training import Recipe

VERSION = 1  # of how a kept model is trained: raise it where the code trains another from the same words
STEPS = {Scale.QUICK: 160, Scale.FULL: 40_000}
BATCH, WINDOW, CHUNK, HELD_OUT = 8, 128, 64, 16_384
LOCALITY, CHUNKS = 2e-3, 5e-2  # lambda_al and lambda_cs at the start
FULL = {"num_hidden_layers": 16, "hidden_size": 768, "num_attention_heads": 12, "num_key_value_heads": 12}  # the paper's 0.1B
WIDE = (2048, 64, 128)  # hidden size, experts and their size of the layer that is timed: 134 MB of weights
AT_8: dict[str, Any] = {"window": 8}
ONE: dict[str, Any] = {"layer": "wide", "kernel": "sparse", "tokens": 1}
EIGHT: dict[str, Any] = {"layer": "wide", "kernel": "union", "tokens": 8}
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
    """Text in tokens, the token that ends a document, and the sizes of the models."""

    ground: Ground
    test: Tensor
    scale: Scale
    end: int | None

    def config(self, locality: float = 0.0, chunks: float = 0.0) -> BlockFFNConfig:
        quick = self.scale is Scale.QUICK
        sizes = self.ground.sizes | ({} if quick else FULL)
        experts, size = (24, sizes["hidden_size"] // 4) if quick else (48, 64)
        words = {"num_experts": experts, "expert_size": size, "chunk_len": CHUNK}
        return BlockFFNConfig(**sizes, **words, locality_factor=locality, chunk_factor=chunks)  # pyright: ignore[reportCallIssue]

    def rows(self) -> Tensor:
        """The text to judge on [rows, 128]."""
        return self.test[: len(self.test) // WINDOW * WINDOW].reshape(-1, WINDOW)


@study.task
def task(scale: Scale, model: str, text: str) -> Task:
    common = ground(model, text, window=WINDOW)
    ends = common.sizes["eos_token_id"]
    return Task(common, common.validation[:HELD_OUT], scale, ends[0] if isinstance(ends, list) else ends)


def learn(task: Task, model: BlockFFNForCausalLM, seed: int, tell: Callable[[int, float], None] | None = None) -> None:
    """Train a model; where it has a chunk loss, the factor follows the paper's schedule in the steps that there are."""
    recipe = Recipe(STEPS[task.scale], BATCH, WINDOW, 2e-3, warm_up=20, last_lr=0.0, seed=seed)
    start, interval = model.config.chunk_factor, max(1, recipe.steps // 40)
    factor = AdaptiveFactor(start, stable_steps=4 * interval, adjust_every=interval) if start else None

    def loss_of(ids: Tensor) -> Tensor:
        loss = model(input_ids=ids, labels=ids, doc_ids=documents_of(ids, task.end), use_cache=False).loss
        if factor is not None and model.chunk_loss is not None:
            model.chunk_factor = factor.step(model.chunk_loss.item())
        return loss

    pretrain(model, task.ground.train, recipe, loss_of=loss_of, tell=tell)


def fresh(task: Task, seed: int, locality: float = 0.0, chunks: float = 0.0) -> BlockFFNForCausalLM:
    torch.manual_seed(seed)
    return BlockFFNForCausalLM(task.config(locality, chunks))


both = functools.partial(fresh, locality=LOCALITY, chunks=CHUNKS)


def kept(task: Task, seed: int, model: BlockFFNForCausalLM | None = None) -> Path:
    """Where the model with both losses of a seed is kept: this one, or one that is trained now, where no arm has kept one."""

    def make(part: Path) -> None:
        found: Any = model or both(task, seed)
        if model is None:
            learn(task, found, seed)
        found.save_pretrained(part)
        task.ground.tokenizer.save_pretrained(part)

    digest = hashlib.sha256(task.ground.train.numpy().tobytes()).hexdigest()
    words = {"version": VERSION, "train": digest, "steps": STEPS[task.scale], "seed": seed}
    return made_once(folder_of("lm", "block-ffn", words | task.config(LOCALITY, CHUNKS).to_diff_dict()), make)


def experts_a_token(task: Task, seed: int) -> int:
    """How many experts a token activates in the model with both losses."""
    model: Any = load_directory(kept(task, seed))[0]
    stats = mean_stats(model_sparsity(model, task.rows(), task.end))
    return max(1, round((1 - stats.tls) * model.config.num_experts))


def train_and_judge(task: Task, trial: Trial, make: Callable[..., BlockFFNForCausalLM]) -> tuple[BlockFFNForCausalLM, SparsityStats]:
    """Train a model and log what it predicts, how sparse it is, and what it reads."""
    model: Any = make(task, trial.seed).to(trial.device)  # pyright: ignore[reportArgumentType] - torch moves to any device
    told = trial.follow("training_loss", total=STEPS[task.scale], text="loss", over="step")
    with trial.measure("training"):
        learn(task, model, trial.seed, lambda _, loss: told(loss))
    stats = mean_stats(model_sparsity(model, task.rows(), task.end))
    trial.log("loss", token_loss(model, task.test, window=WINDOW))
    trial.log("tls", stats.tls)
    trial.log("reuse", stats.reuse)
    for window, share in {1: stats.tls, **stats.cls}.items():
        trial.log("cls", share, window=window)
    trial.log("bytes", (1 - stats.cls[8]) * sum(layer.up_proj.nbytes + layer.down_proj.nbytes for layer in model.feed_forwards()))
    trial.log("parameters", sum(each.numel() for each in model.parameters()))
    return model, stats


@study.arm("block-ffn", label="BlockFFN")
def block_ffn(task: Task, trial: Trial) -> None:
    model, stats = train_and_judge(task, trial, both)
    kept(task, trial.seed, model)
    with one_thread():
        time_layers(task, trial, model, stats)
        write(task, trial, model)


def top_k(task: Task, seed: int) -> BlockFFNForCausalLM:
    chosen = experts_a_token(task, seed)
    torch.manual_seed(seed)
    return TopKForCausalLM(task.config(), chosen)


def remoe(task: Task, seed: int) -> BlockFFNForCausalLM:
    sparsity = 1 - experts_a_token(task, seed) / task.config().num_experts
    torch.manual_seed(seed)
    return ReMoEForCausalLM(task.config(), sparsity)


def dense(task: Task, seed: int) -> BlockFFNForCausalLM:
    torch.manual_seed(seed)
    return DenseForCausalLM(task.config())


def only_full(task: Task, trial: Trial, make: Callable[..., BlockFFNForCausalLM]) -> None:
    if task.scale is Scale.FULL:
        train_and_judge(task, trial, make)


study.arm_table(
    train_and_judge,  # pyright: ignore[reportArgumentType] - what it returns is for the first arm
    {
        "chunk-loss": {"make": functools.partial(fresh, chunks=CHUNKS), "label": "chunk loss alone"},
        "locality-loss": {"make": functools.partial(fresh, locality=LOCALITY), "label": "locality loss alone"},
        "none": {"make": fresh, "label": "neither loss"},
        "top-k": {"make": top_k, "label": "top-K router"},
    },
)
study.arm_table(only_full, {"remoe": {"make": remoe, "label": "ReMoE (--full)"}, "dense": {"make": dense, "label": "dense (--full)"}})


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
def time_layers(task: Task, trial: Trial, model: BlockFFNForCausalLM, stats: SparsityStats) -> None:
    """A trained layer on its own text, which a cache holds; and one of 134 MB, its active experts drawn as sparse as the trained ones."""
    small, wide = model.feed_forwards()[-1], BlockFFN(*WIDE).to(trial.device)
    draw = torch.Generator().manual_seed(trial.seed)
    seen: list[Tensor] = []
    with small.register_forward_pre_hook(lambda _, args: seen.append(args[0][0])):
        model(input_ids=task.rows()[:1].to(trial.device), use_cache=False)
    for tokens, union in ((1, stats.tls), (8, stats.cls[8]), (32, stats.cls[32])):
        x = seen[0][:tokens]
        time_layer(trial, small, x, small.active(small.router_proj(x)), layer="small", tokens=tokens)
        x = torch.randn(tokens, wide.hidden_size, generator=draw).to(trial.device)
        active = draw_active(tokens, wide.num_experts, 1 - stats.tls, 1 - union, draw).to(trial.device)
        trial.log("time_bound", active.any(0).float().mean().item() * 1.35 + 0.03, tokens=tokens)
        time_layer(trial, wide, x, active, layer="wide", tokens=tokens)


def time_layer(trial: Trial, network: BlockFFN, x: Tensor, active: Tensor, **at: Any) -> None:
    """Seconds a token of each kernel, and its time over that of the dense pair of maps of the same size."""
    dense = dense_pair(network, x)
    for kernel in ("dense", "sparse", "union"):
        times = time_pairs(routed(network, x, active, kernel), dense, pairs=5)
        trial.log("time_share", float(np.median(times[:, 0] / times[:, 1])), kernel=kernel, **at)
        trial.log("layer_seconds", float(np.median(times[:, 0])) / len(x), kernel=kernel, **at)


def dense_pair(layer: BlockFFN, x: Tensor) -> Callable[[], Tensor]:
    """The two maps in torch's own layout, without a router."""
    up, down = layer.up_proj.detach(), layer.down_proj.detach().contiguous()
    return lambda: F.linear(F.silu(F.linear(x, up)), down)


def routed(layer: BlockFFN, x: Tensor, active: Tensor, kernel: Kernel) -> Callable[[], Tensor]:
    """A pass with given active experts, in the time of one whose router decides."""
    gates = torch.rand(active.shape).to(x.device) * active

    def run() -> Tensor:
        logits = layer.router_proj(x)
        layer.gates(logits)
        layer.active(logits)
        return layer.mix(x, gates, active, kernel)

    return run


@torch.no_grad()
def write(task: Task, trial: Trial, model: BlockFFNForCausalLM) -> None:
    """Writing token by token and by n-gram drafts, with dense layers and with the union kernel; and whether drafts change the text."""
    rows = task.rows()[:: max(1, len(task.rows()) // PROMPTS)][:PROMPTS, :PROMPT].to(trial.device)
    for kernel in ("dense", "union"):
        for layer in model.feed_forwards():
            layer.kernel = kernel
        for way, run in (("token by token", continued), ("n-gram draft", drafted)):
            new = len(run(model, rows[:1], 48)) - PROMPT
            trial.log("tokens_a_second", new / median_seconds(functools.partial(run, model, rows[:1], 48), 3), way=f"{way}, {kernel}")
    exact = model.double()  # in float32 a pass over several tokens may round a tie otherwise
    same = [drafted(exact, row[None], WRITTEN) == continued(exact, row[None], WRITTEN) for row in rows]
    trial.log("same_text", sum(same) / len(same))
    trial.log("tokens_a_pass", speculative_generate(exact, "ngram", rows[:1], WRITTEN).tokens_a_pass)


def continued(model: Any, prompt: Tensor, tokens: int) -> list[int]:
    """transformers' own greedy decoding."""
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False, pad_token_id=0)[
        0
    ].tolist()


def drafted(model: Any, prompt: Tensor, tokens: int) -> list[int]:
    return speculative_generate(model, "ngram", prompt, tokens).sequences[0].tolist()


# What the paper claims


def gap(results: Results, arm: str) -> np.ndarray:
    """TLS - CLS_8 by seed."""
    return results.values("tls", arm) - results.values("cls", arm, **AT_8)


def within_bound(results: Results, kernel: str, tokens: int) -> Any:
    """Whether a wide layer's time, as a share of the dense one's, is at most 1.35 x its active share + 0.03."""
    times = results.values("time_share", "block-ffn", layer="wide", kernel=kernel, tokens=tokens)
    bounds = results.values("time_bound", "block-ffn", tokens=tokens)
    return bootstrap(lambda time, bound: time - bound, times, bounds, what="share of the dense layer's time - bound") <= 0


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
    "With both losses the validation loss is at most 0.02 nats above the chunk loss alone",
    paper="0.1B: perplexity 14.88 against 15.66",
    if_fails="after so few steps the locality loss still costs prediction, by itself as well; in the paper's long training that has gone",
)
def locality_is_free(results: Results) -> Any:
    return results.no_worse("loss", "block-ffn", "chunk-loss", 0.02, better="lower")


for kernel, tokens, unused, paper in (
    ("sparse", 1, "TLS", "2.8B on a Jetson Orin NX: 12.8 % of the time at 1 - TLS = 12.45 %"),
    ("union", 8, "CLS_8", "2.8B, 32 tokens: 30.7 % of the time at 1 - CLS = 30.86 %"),
):
    sentence = f"A wide layer takes for {tokens} token{'s'[: tokens > 1]} at most (1 - {unused}) x 1.35 + 0.03 of the dense layer's time"
    study.claim(sentence, paper=paper)(functools.partial(within_bound, kernel=kernel, tokens=tokens))


@study.claim("Greedy text is the same with drafts and without, for every prompt", paper="speculative decoding is lossless")
def lossless(results: Results) -> Any:
    return results.mean("same_text", "block-ffn") >= 1


@study.summary
def summary(results: Results) -> str:
    def unused(arm: str) -> str:
        return f"{results.say('tls', arm)} of the experts unused and 8 tokens together {results.say('cls', arm, **AT_8)}"

    one, eight = (results.say("time_share", "block-ffn", unit="%", **at) for at in (ONE, EIGHT))
    others = (("none", "without the losses"), ("chunk-loss", "with the chunk loss alone"), ("top-k", "with top-K"))
    losses = ", ".join(f"{results.say('loss', arm)} {words}" for arm, words in others)
    return (
        f"Trained alike for {STEPS[Scale.QUICK]} steps, a token of BlockFFN leaves {unused('block-ffn')}; without the two losses {unused('none')}, "
        f"with a top-K router {unused('top-k')}. Its validation loss is {results.say('loss', 'block-ffn')} nats ({losses}). On one core a layer of "
        f"134 MB takes {one} of the dense layer's time for a token and {eight} for 8. The small models themselves fit into a cache, where sparse "
        f"layers gain little; a draft's pass keeps {results.say('tokens_a_pass', 'block-ffn')} tokens."
    )
