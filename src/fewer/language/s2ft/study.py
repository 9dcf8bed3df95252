"""A few channels in place, LoRA, or every weight: what a small language model learns, forgets and costs while it learns to add.

SmolLM2-135M (or any directory) learns three-digit additions in words. It is judged on others, on four-digit ones, and on how much worse it
predicts English text than before.
"""

from __future__ import annotations

import copy
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fewer.data import fetch_smollm2, load_state_of_the_union
from fewer.devices import one_thread
from fewer.inputs import read_pairs, read_text
from fewer.language._shared.fine_tuning import fine_tune
from fewer.language._shared.lora import with_lora
from fewer.language._shared.model_directory import load_directory
from fewer.language._shared.questions import Pair, Problems, answer_loss, draw_sums, encode, judge
from fewer.language._shared.structure import structure_of
from fewer.language.s2ft.adapters.adapter import Adapter, Slice
from fewer.language.s2ft.config import S2FTConfig
from fewer.language.s2ft.model import S2FTModel, get_s2ft_model
from fewer.meters import median_seconds, optimizer_bytes, saved_bytes
from fewer.study import Curve, Figure, Results, Scale, Study, Tradeoff, Trial
from fewer.study.results import Estimate, NotTestable, bootstrap
from fewer.study.spaces import Choice
from fewer.tasks.lm_training import check_window

BATCH = 12  # problems a step
STEPS = {Scale.QUICK: 20, Scale.FULL: 400}

study = Study(
    "s2ft",
    question="What does training a few channels in place save over LoRA and full fine-tuning, and what does it cost in learning and forgetting?",
    baseline="lora",
    figures=[
        Figure("accuracy", "three-digit sums right", "%", "higher"),
        Figure("accuracy_longer", "four-digit sums right", "%", "higher"),
        Figure("loss", "loss of unseen answers (nats)"),
        Figure("forgetting", "more loss on English text (nats)"),
        Figure("parameters", "trained parameters"),
        Figure("bytes", "kept for the backward pass", "bytes"),
        Figure("optimizer_bytes", "optimizer's state", "bytes"),
        Figure("peak_memory", "peak resident memory while training", "bytes"),
        Figure("cpu_seconds", "processor time of a step", "s"),
        Figure("merge_seconds", "time to merge", "s"),
        Figure("switch_seconds", "time to switch adapters in the weights", "s"),
        Figure("training_loss", "training loss (nats)", detail=True, at={"step": STEPS[Scale.QUICK]}),
    ],
    charts=[
        Tradeoff("accuracy", "forgetting", title="Sums right against what is forgotten"),
        Tradeoff("accuracy", "bytes", title="Sums right against what is kept for the backward pass"),
        Curve("training_loss", over="step", title="Training loss"),
    ],
    time_limit=2 * 3600,
    objective="share of unseen validation sums that are right",
    seeds=2,
)
study.option("model", "", help="a Llama, Mistral, Qwen2, Gemma, OPT or GPT-2 directory in place of SmolLM2-135M")
study.option("text", "", help="a UTF-8 text file on which forgetting is judged, in place of an English address")
study.option("data", "", help="a JSONL file of prompt and completion in place of the additions, the last tenth of it held out")

HELD_OUT, VALIDATION, TEXT = 96, 48, 512
COST_SHAPE, COST_STEPS = (2, 128), 3  # tokens of a step whose cost is taken, and how many after the first


@dataclass
class Task:
    """A model's directory, examples to learn from, and unseen ones.

    Attributes:
        test: what is judged: "same" (as in training), "longer" (four digits), each as pairs.
        text: English tokens; those after the first 512 are what costs are taken on.
    """

    folder: Path
    tokenizer: Any
    train: list[Pair] | None
    validation: list[Pair]
    test: dict[str, list[Pair]]
    text: Tensor
    scale: Scale

    def model(self, device: str) -> Any:
        return load_directory(self.folder, "float32" if device == "cpu" else "bfloat16")[0].to(device)

    def batches(self, seed: int, steps: int, device: str) -> Iterator[Problems]:
        """A batch for each step."""
        pairs = self.train or draw_sums(steps * BATCH, 3, seed, [*self.validation, *HELD_OUT_SUMS])
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
        for step in range(steps):
            yield self.problems([pairs[order[(step * BATCH + each) % len(pairs)]] for each in range(BATCH)], device)

    def problems(self, pairs: list[Pair], device: str) -> Problems:
        made = encode(self.tokenizer, pairs, longest=512)
        return Problems(made.ids.to(device), made.labels.to(device))


HELD_OUT_SUMS = draw_sums(HELD_OUT, 3, seed=1001)


@study.task
def task(scale: Scale, model: str, text: str, data: str) -> Task:
    folder = Path(model) if model else fetch_smollm2()
    tokenizer = load_directory(folder)[1]
    train, validation = None, draw_sums(VALIDATION, 3, 1002, HELD_OUT_SUMS)
    test = {"same": HELD_OUT_SUMS, "longer": draw_sums(HELD_OUT, 4, seed=1003)}
    if data:
        pairs = read_pairs(Path(data))
        held = max(1, len(pairs) // 10)
        train, validation, test = pairs[: -2 * held], pairs[-2 * held : -held], {"same": pairs[-held:]}
        if not train:
            raise ValueError(f"{data} holds {len(pairs)} examples; expected at least 3, to learn from, to tune on and to judge by")
    words = read_text(text) if text else load_state_of_the_union()[-1][1]
    tokens = torch.tensor(tokenizer(words[:16_000], add_special_tokens=False).input_ids)
    check_window(tokens, TEXT + COST_SHAPE[0] * COST_SHAPE[1])
    return Task(folder, tokenizer, train, validation, test, tokens, scale)


Wrap = Callable[[Any, int], Any]


@torch.no_grad()
def text_loss(model: Any, task: Task) -> float:
    """Loss on 512 tokens of English, nats a token."""
    ids = task.text[None, :TEXT].to(next(model.parameters()).device)
    return model(input_ids=ids, labels=ids, use_cache=False).loss.item()


def run(task: Task, trial: Trial, wrap: Wrap) -> None:
    """Train at the arm's rate (with the first seed at its second rate too), judge, and say what a step costs."""
    first = trial.seed == 0 and not trial.tuning
    if not (trial.settings["repeated"] or first or trial.tuning or task.scale is Scale.FULL):
        trial.note("not repeated", "this arm stands in no claim: with the first seed alone")
        return
    if first:
        log_costs(task, trial, wrap)
    rate, beside = float(trial.settings["lr"]), float(trial.settings["beside"])
    for lr in (rate, beside) if first and beside else (rate,):
        plain = task.model(trial.device)
        before = text_loss(plain, task)
        model = wrap(plain, trial.seed)
        steps = STEPS[task.scale]
        headline = lr == rate and not trial.tuning
        told = trial.follow("training_loss", total=steps, text="loss", over="step") if headline else (lambda _: None)
        batches = task.batches(trial.seed, steps, trial.device)
        fine_tune(model, batches, answer_loss, lr=lr, steps=steps, tell=lambda _, loss, told=told: told(loss))
        if trial.tuning:
            trial.objective(judge(model, task.problems(task.validation, trial.device))[0])
            return
        log_quality(task, trial, model, before, lr, headline=lr == rate)


def log_quality(task: Task, trial: Trial, model: Any, before: float, lr: float, headline: bool) -> None:
    accuracy, loss = judge(model, task.problems(task.test["same"], trial.device))
    forgetting = text_loss(model, task) - before
    trial.log("accuracy", accuracy, lr=lr)
    trial.log("forgetting_at", forgetting, lr=lr)
    if headline:
        trial.log("accuracy", accuracy)
        trial.log("loss", loss)
        trial.log("forgetting", forgetting)
    if headline and "longer" in task.test:
        trial.log("accuracy_longer", judge(model, task.problems(task.test["longer"], trial.device))[0])


def log_costs(task: Task, trial: Trial, wrap: Wrap) -> None:
    """What a step of 2 x 128 tokens needs, on one thread."""
    with one_thread():
        model = wrap(task.model(trial.device), trial.seed).train()
        step, optimizer = a_step(model, task, trial.device)
        with trial.measure("training") as cost:
            trial.log("cpu_seconds", median_seconds(step, COST_STEPS, processor=trial.device == "cpu"))
        trial.log("peak_memory", torch.cuda.max_memory_allocated() if trial.device != "cpu" else cost.figures()["peak_memory"])
        trial.log("parameters", sum(p.numel() for p in model.parameters() if p.requires_grad))
        trial.log("optimizer_bytes", optimizer_bytes(optimizer))
        with saved_bytes(model) as saved:
            loss = loss_of_text(model, task, trial.device)
        trial.log("bytes", saved.total)
        del loss, optimizer, step
        log_switching(trial, model)
        del model
        if wrap is s2ft_model:
            log_steps_in_turn(task, trial)


def loss_of_text(model: Any, task: Task, device: str) -> Tensor:
    """The loss on the 2 x 128 tokens that costs are taken on."""
    rows, length = COST_SHAPE
    ids = task.text[TEXT : TEXT + rows * length].reshape(rows, length).to(device)
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def a_step(model: Any, task: Task, device: str) -> tuple[Callable[[], None], torch.optim.Optimizer]:
    """A training step and its optimizer. With a rate of 0 the optimizer does all its work and changes nothing."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, weight_decay=0)

    def step() -> None:
        loss_of_text(model, task, device).backward()
        optimizer.step()
        optimizer.zero_grad()
        if device != "cpu":
            torch.cuda.synchronize()

    return step, optimizer


def log_steps_in_turn(task: Task, trial: Trial) -> None:
    """A step's time over another way's, the median of pairs taken in turn in this process: the speed of a machine changes over minutes."""
    ways = {"s2ft": s2ft_model, "lora": lora_model, "full": full_model}
    clock = time.process_time if trial.device == "cpu" else time.perf_counter
    steps = {name: a_step(wrap(task.model(trial.device), trial.seed).train(), task, trial.device)[0] for name, wrap in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(1 + COST_STEPS):
        for name, step in steps.items():
            started = clock()
            step()
            seconds[name].append(clock() - started)
    for other in ("lora", "full"):
        pairs = zip(seconds["s2ft"][1:], seconds[other][1:], strict=True)  # the first step makes the optimizer's state
        trial.log("step_ratio", statistics.median(mine / theirs for mine, theirs in pairs), other=other)


def log_switching(trial: Trial, model: Any) -> None:
    """Seconds to go from one adapter in the weights to another, and to merge and be a plain model again."""
    if isinstance(model, S2FTModel):
        model.add_adapter("other", shifted(model.adapter()))
        switch = functools.partial(model.set_adapter, "other")
    elif hasattr(model, "merge_and_unload"):
        model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
        model.merge_adapter(["default"])
        switch = functools.partial(switch_merged_lora, model)
    else:
        return
    trial.log("switch_seconds", seconds_of(switch))
    trial.log("merge_seconds", seconds_of(model.merge_and_unload))


def switch_merged_lora(model: Any) -> None:
    model.unmerge_adapter()
    model.set_adapter("other")
    model.merge_adapter(["other"])


def shifted(adapter: Adapter) -> Adapter:
    """Another adapter of the same size: each row or column is the next one."""
    slices = {
        path: Slice(each.side, (each.index + 1) % each.size, each.delta + 1e-3, each.size).sorted() for path, each in adapter.slices.items()
    }
    return Adapter(adapter.config, adapter.base, slices)


def seconds_of(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def rates(first: float, *others: float) -> dict[str, Choice]:
    """Learning rates to tune over, the first the default."""
    return {"lr": Choice((first, *others))}


def full_model(model: nn.Module, seed: int) -> nn.Module:
    return model.requires_grad_(True)


def lora_model(model: nn.Module, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return with_lora(model, 4, structure_of(model))


def s2ft_model(model: nn.Module, seed: int) -> nn.Module:
    return get_s2ft_model(model, S2FTConfig(seed=seed))


def s2ft_heads_model(model: nn.Module, seed: int) -> nn.Module:
    return get_s2ft_model(model, S2FTConfig(o_ratio=0.052, d_ratio=0.02, seed=seed))  # released for Llama-2


ONCE = {"beside": 0.0, "repeated": False}  # stands in no claim: with the first seed alone
FRONT = {"repeated": True}  # `beside` is a second rate, that the first seed tries too
study.arm_table(
    run,
    {
        "s2ft": {"wrap": s2ft_model, "label": "S2FT, down", "space": rates(1e-2, 3e-3, 3e-2), "settings": FRONT | {"beside": 3e-3}},
        "s2ft-heads": {"wrap": s2ft_heads_model, "label": "S2FT, o and down", "space": rates(1e-2, 3e-3, 3e-2), "settings": ONCE},
        "lora": {
            "wrap": lora_model,
            "label": "LoRA, rank 4",
            "space": rates(3e-3, 1e-3, 1e-2),
            "settings": FRONT | {"beside": 1e-3},
            "against": "full",
        },
        "full": {"wrap": full_model, "label": "full fine-tuning", "space": rates(5e-5, 2e-5, 1e-4), "settings": FRONT | {"beside": 0.0}},
    },
)


# What the paper claims

MEMORY = "training memory up to 3 x less than full fine-tuning's, about 10 % better than LoRA's"
LATENCY = "1.5 to 2.7 x faster than full fine-tuning, about 10 % better than LoRA"


@study.claim("Kept for the backward pass: at most 0.8 of LoRA's and 0.72 of full fine-tuning's", paper=MEMORY)
def keeps_less(results: Results) -> Any:
    lora, full = (results.ratio("bytes", "s2ft", other) for other in ("lora", "full"))
    return (lora <= 0.8) & (full <= 0.72)


@study.claim("A step takes at most 0.95 of LoRA's processor time and 0.6 of full fine-tuning's, taken in turn", paper=LATENCY)
def is_quicker(results: Results) -> Any:
    lora, full = (results.mean("step_ratio", "s2ft", other=other) for other in ("lora", "full"))
    return (lora <= 0.95) & (full <= 0.6)


@study.claim("Peak memory is at most 0.6 of full fine-tuning's", paper=MEMORY)
def peaks_lower(results: Results) -> Any:
    return results.ratio("peak_memory", "s2ft", "full") <= 0.6


@study.claim(
    "At its best rate it gets at most 5 points fewer sums right than LoRA",
    paper="4.6 % (commonsense) and 1.3 % (arithmetic) over LoRA on average",
    if_fails="few steps on few problems: other channels and other problems change what is learnt by more than the ways differ",
)
def learns_as_well(results: Results) -> Any:
    if not results.mean("accuracy", "s2ft").value and not results.mean("accuracy", "lora").value:
        raise NotTestable("neither gets any sum right")
    return results.no_worse("accuracy", "s2ft", "lora", by=0.05)


def forgotten(results: Results, arm: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(sums right, forgetting) of an arm at its rates, the untrained model first, by sums right."""
    right, lost = (results.curve(figure, arm) for figure in ("accuracy", "forgetting_at"))
    points = [(by_seed[seed], lost[key][seed]) for key, by_seed in right.items() if key and seed in by_seed and key in lost]
    return tuple(np.array(sorted([(0.0, 0.0), *points])).T)  # pyright: ignore[reportReturnType]


def forgetting_difference(results: Results, other: str) -> Estimate:
    """How much more S2FT forgets than another arm at the most sums that both get right, linear between the rates that were tried."""
    differences = []
    for seed in range(len(results.values("accuracy", "s2ft"))):
        mine, theirs = forgotten(results, "s2ft", seed), forgotten(results, other, seed)
        level = min(mine[0].max(), theirs[0].max())
        if level <= 0:
            raise NotTestable(f"with seed {seed} one of s2ft and {other} gets no sum right: there is no equal accuracy but none")
        differences.append(float(np.interp(level, *mine) - np.interp(level, *theirs)))
    return bootstrap(lambda a: a, np.array(differences), what=f"forgetting at equal accuracy, s2ft - {other} (nats)")


@study.claim(
    "At equal accuracy it forgets no more than LoRA and full fine-tuning",
    paper="generalisation after instruction tuning 11.5 % over full fine-tuning's",
    if_fails="to learn as much in a few steps, a small share of the channels must move much further than all weights together do, and "
    "what moves further is further from what was known",
)
def forgets_less(results: Results) -> Any:
    return (forgetting_difference(results, "lora") <= 0.0) & (forgetting_difference(results, "full") <= 0.0)


@study.summary
def summary(results: Results) -> str:
    def three(figure: str) -> str:
        return f"{results.say(figure, 's2ft')} (LoRA {results.say(figure, 'lora')}, full fine-tuning {results.say(figure, 'full')})"

    return (
        f"Training {results.mean('parameters', 's2ft').value / 1e6:.2f} million parameters in place kept {three('bytes')} for the backward pass and "
        f"took {three('cpu_seconds')} a step; it got {three('accuracy')} of unseen sums right, and its loss on English text rose by "
        f"{three('forgetting')} nats."
    )
