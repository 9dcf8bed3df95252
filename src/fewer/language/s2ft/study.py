"""A few channels in place, LoRA, or every weight: what a small language model learns, forgets and costs while it learns to add.

SmolLM2-135M (or any directory) learns three-digit additions in words. It is judged on others, on four-digit ones, and on how much worse it
predicts English text than before.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from fewer.data import fetch_smollm2, load_state_of_the_union
from fewer.inputs import read_pairs
from fewer.language._shared.lora import with_lora
from fewer.language._shared.questions import Pair, Problems, answer_loss, draw_sums, encode, judge
from fewer.language._shared.structure import structure_of
from fewer.language.s2ft.adapters.adapter import Adapter, Slice
from fewer.language.s2ft.config import S2FTConfig
from fewer.language.s2ft.model import S2FTModel, get_s2ft_model
from fewer.language.s2ft.training import fit
from fewer.meters import saved_bytes
from fewer.study import Curve, Figure, Results, Scale, Study, Tradeoff, Trial
from fewer.study.results import Estimate, bootstrap
from fewer.study.spaces import Choice

study = Study(
    "s2ft",
    question="What does training a few channels in place save over LoRA and full fine-tuning, and what does it cost in learning and forgetting?",
    baseline="lora",
    figures=[
        Figure("accuracy", "three-digit sums right", "%", "higher"),
        Figure("accuracy_longer", "four-digit sums right", "%", "higher"),
        Figure("loss", "loss of unseen answers (nats)"),
        Figure("forgetting", "more loss on English text (nats)"),
        Figure("trained", "trained parameters", ""),
        Figure("saved_activations", "kept for the backward pass", "bytes"),
        Figure("optimizer_bytes", "optimizer's state", "bytes"),
        Figure("peak_memory", "peak resident memory while training", "bytes"),
        Figure("step_seconds", "processor time of a step", "s"),
        Figure("merge_seconds", "time to merge", "s"),
        Figure("switch_seconds", "time to switch adapters in the weights", "s"),
        Figure("training_loss", "training loss (nats)", detail=True, at={"step": 19}),
    ],
    charts=[
        Tradeoff("accuracy", "forgetting", title="Sums right against what is forgotten"),
        Tradeoff("accuracy", "saved_activations", title="Sums right against what is kept for the backward pass"),
        Curve("training_loss", over="step", title="Training loss"),
    ],
    time_limit=2 * 3600,
    objective="share of unseen validation sums that are right",
    seeds=2,
)
study.option("model", "", help="a Llama, Mistral, Qwen2, Gemma, OPT or GPT-2 directory in place of SmolLM2-135M")
study.option("data", "", help="a JSONL file of prompt and completion in place of the additions, the last tenth of it held out")

BATCH = 12  # problems a step
STEPS = {Scale.QUICK: 20, Scale.FULL: 400}
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
        model: Any = AutoModelForCausalLM.from_pretrained(self.folder, dtype="float32" if device == "cpu" else "bfloat16")
        return model.to(device)

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
def task(scale: Scale, model: str, data: str) -> Task:
    disable_progress_bar()
    folder = Path(model) if model else fetch_smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    train, validation = None, draw_sums(VALIDATION, 3, 1002, HELD_OUT_SUMS)
    test = {"same": HELD_OUT_SUMS, "longer": draw_sums(HELD_OUT, 4, seed=1003)}
    if data:
        pairs = read_pairs(Path(data))
        held = max(1, len(pairs) // 10)
        train, validation, test = pairs[: -2 * held], pairs[-2 * held : -held], {"same": pairs[-held:]}
    address = load_state_of_the_union()[-1][1]
    text = torch.tensor(tokenizer(address[:8000], add_special_tokens=False).input_ids)
    return Task(folder, tokenizer, train, validation, test, text, scale)


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
        _, losses = fit(
            model,
            task.batches(trial.seed, steps, trial.device),
            answer_loss,
            lr=lr,
            steps=steps,
            tell=lambda step, steps, loss, lr=lr: trial.progress(step, steps, f"rate {lr:g}, loss {loss:.3f}"),
        )
        if trial.tuning:
            trial.objective(judge(model, task.problems(task.validation, trial.device))[0])
            return
        log_quality(task, trial, model, before, lr, headline=lr == rate)
        if lr == rate:
            for step, loss in enumerate(losses):
                trial.log("training_loss", loss, step=step)


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
    """What a step of 2 x 128 tokens needs, on one thread: a second thread's waiting would count as work.

    With a rate of 0 the optimizer does all its work and changes nothing.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = wrap(task.model(trial.device), trial.seed).train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0)
        rows, length = COST_SHAPE
        ids = task.text[TEXT : TEXT + rows * length].reshape(rows, length).to(trial.device)
        seconds = []
        with trial.measure("training") as cost:
            for _ in range(1 + COST_STEPS):
                started = time.process_time() if trial.device == "cpu" else time.perf_counter()
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                if trial.device != "cpu":
                    torch.cuda.synchronize()
                seconds.append((time.process_time() if trial.device == "cpu" else time.perf_counter()) - started)
        trial.log("step_seconds", min(seconds[1:]))  # what else the machine does only adds to a step
        trial.log("peak_memory", torch.cuda.max_memory_allocated() if trial.device != "cpu" else cost.figures()["peak_memory"])
        trial.log("trained", sum(p.numel() for p in trained))
        states = (value for state in optimizer.state.values() for value in state.values() if value.dim())
        trial.log("optimizer_bytes", sum(value.numel() * value.element_size() for value in states))
        with saved_bytes(model) as saved:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        trial.log("saved_activations", saved.total)
        del loss, optimizer
        log_switching(trial, model)
    finally:
        torch.set_num_threads(threads)


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


def declare(name: str, label: str, rates: tuple[float, float, float], wrap: Wrap, beside: float = 0.0, repeated: bool = True) -> None:
    """An arm with three rates to tune over, the first the default; `beside` is another that the first seed tries too."""
    settings = {"beside": beside, "repeated": repeated}

    @study.arm(name, label=label, space={"lr": Choice(rates)}, settings=settings, against=None if name != "lora" else "full")
    def arm(task: Task, trial: Trial) -> None:
        run(task, trial, wrap)


def full_model(model: nn.Module, seed: int) -> nn.Module:
    return model.requires_grad_(True)


def lora_model(model: nn.Module, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return with_lora(model, 4, structure_of(model))


def s2ft_model(model: nn.Module, seed: int) -> nn.Module:
    return get_s2ft_model(model, S2FTConfig(seed=seed))


def s2ft_heads_model(model: nn.Module, seed: int) -> nn.Module:
    return get_s2ft_model(model, S2FTConfig(o_ratio=0.052, d_ratio=0.02, seed=seed))  # released for Llama-2


declare("s2ft", "S2FT, down", (1e-2, 3e-3, 3e-2), s2ft_model, beside=3e-3)
declare("s2ft-heads", "S2FT, o and down", (1e-2, 3e-3, 3e-2), s2ft_heads_model, repeated=False)
declare("lora", "LoRA, rank 4", (3e-3, 1e-3, 1e-2), lora_model, beside=1e-3)
declare("full", "full fine-tuning", (5e-5, 2e-5, 1e-4), full_model)


# What the paper claims

MEMORY = "training memory up to 3 x less than full fine-tuning's, about 10 % better than LoRA's"
LATENCY = "1.5 to 2.7 x faster than full fine-tuning, about 10 % better than LoRA"


@study.claim("Kept for the backward pass: at most 0.8 of LoRA's and 0.72 of full fine-tuning's", paper=MEMORY)
def keeps_less(results: Results) -> Any:
    lora, full = (results.ratio("saved_activations", "s2ft", other) for other in ("lora", "full"))
    return (lora <= 0.8) & (full <= 0.72)


@study.claim(
    "A step takes at most 0.95 of LoRA's processor time and 0.6 of full fine-tuning's",
    paper=LATENCY,
    if_fails="the arms are timed minutes apart, and the speed of a shared machine changes between: three recordings gave 0.91 to 1.14 of LoRA's "
    "time and 0.49 to 0.65 of full fine-tuning's; timed in turn, as the races do, it was 0.80 and 0.49",
)
def is_quicker(results: Results) -> Any:
    lora, full = (results.ratio("step_seconds", "s2ft", other) for other in ("lora", "full"))
    return (lora <= 0.95) & (full <= 0.6)


@study.claim("Peak memory is at most 0.6 of full fine-tuning's", paper=MEMORY)
def peaks_lower(results: Results) -> Any:
    return results.ratio("peak_memory", "s2ft", "full") <= 0.6


@study.claim(
    "At its best rate it gets as many sums right as LoRA, to within the larger of their spreads over seeds",
    paper="4.6 % (commonsense) and 1.3 % (arithmetic) over LoRA on average",
    if_fails="with two seeds (other channels, other problems) S2FT got 43 % and 32 % of 96 sums right, LoRA 45 % with both; 96 sums alone "
    "leave a standard error of 5 points",
)
def learns_as_well(results: Results) -> Any:
    spread = max(np.ptp(results.values("accuracy", arm)) for arm in ("s2ft", "lora"))
    return results.difference("accuracy", "s2ft", "lora") >= -float(spread)


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
        differences.append(float(np.interp(level, *mine) - np.interp(level, *theirs)))
    return bootstrap(lambda a: a, np.array(differences), what=f"forgetting at equal accuracy, s2ft - {other} (nats)")


@study.claim(
    "At equal accuracy it forgets no more than LoRA and full fine-tuning",
    paper="generalisation after instruction tuning 11.5 % over full fine-tuning's",
    if_fails="to learn as much in 20 steps, 3 % of the channels must move far: the change of the weights had a Frobenius norm of 36.6, with LoRA 11.6, "
    "with full fine-tuning 2.6 (measured with the second seed), and the loss on text rose by 0.061, 0.055 and 0.001 nats",
)
def forgets_less(results: Results) -> Any:
    return (forgetting_difference(results, "lora") <= 0.0) & (forgetting_difference(results, "full") <= 0.0)


@study.summary
def summary(results: Results) -> str:
    def value(figure: str, arm: str) -> float:
        return results.mean(figure, arm).value

    return (
        f"Training {value('trained', 's2ft') / 1e6:.2f} million parameters in place kept {value('saved_activations', 's2ft') / 1e6:.0f} MB for the "
        f"backward pass (LoRA {value('saved_activations', 'lora') / 1e6:.0f}, full fine-tuning {value('saved_activations', 'full') / 1e6:.0f}) and took "
        f"{value('step_seconds', 's2ft'):.2f} s a step ({value('step_seconds', 'lora'):.2f}, {value('step_seconds', 'full'):.2f}); it got "
        f"{value('accuracy', 's2ft'):.0%} of unseen sums right (LoRA {value('accuracy', 'lora'):.0%}, full {value('accuracy', 'full'):.0%}) and its loss on "
        f"English text rose by {value('forgetting', 's2ft'):+.3f} nats ({value('forgetting', 'lora'):+.3f}, {value('forgetting', 'full'):+.3f})."
    )
