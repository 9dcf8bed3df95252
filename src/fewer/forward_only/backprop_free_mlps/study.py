"""Three ways to train without backpropagation, each beside an equally tuned twin with backpropagation.

Every arm: early stopping on validation data, test data once at the end, costs measured around the fit alone. What slows a fit down to
watch (FLOPs, tensor bytes) is taken on a short fit of the same shape after the timed one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewer import data, meters
from fewer.forward_only.backprop_free_mlps.backpropagation import BackpropagationConfig, cnn, fit_backpropagation, mlp
from fewer.forward_only.backprop_free_mlps.cascaded_forward import CascadedForwardCNN, CascadedForwardConfig, fit_cascaded_forward
from fewer.forward_only.backprop_free_mlps.forward_forward import ForwardForwardConfig, ForwardForwardMLP, fit_forward_forward
from fewer.forward_only.backprop_free_mlps.mono_forward import MonoForwardConfig, MonoForwardMLP, fit_mono_forward
from fewer.forward_only.backprop_free_mlps.training import Epoch, History
from fewer.study import Bars, Curve, Difference, Figure, LogUniform, Results, Scale, Study, Tradeoff, Trial

TRAIN, VALIDATION = 10_000, 5_000  # images at quick scale; at full scale all of them, a tenth for validation
NETWORK = "network"  # the stage that stands for all of a network's layers, trained side by side
SHORT = 4  # batches of the short fit
NORMALISATION = {"mnist": (0.1307, 0.3081), "fashion-mnist": (0.2860, 0.3530), "cifar-10": (0.4734, 0.2516)}  # mean, deviation of pixels

study = Study(
    "backprop-free-mlps",
    question="What do accuracy, time, memory and energy become when no layer waits for a backward pass?",
    figures=[
        Figure("accuracy", "test accuracy", "%", "higher"),
        Figure("train.seconds", "time to the stopped model", "s"),
        Figure("epoch_seconds", "time per epoch", "s"),
        Figure("epochs", "epochs", "", ""),
        Figure("train.joules", "energy", "J"),
        Figure("flops", "floating-point operations", "FLOP"),
        Figure("train.backward_passes", "backward passes", ""),
        Figure("tensor_bytes", "peak tensor bytes", "bytes"),
        Figure("cache_bytes", "kept features beside that", "bytes"),
        Figure("tensor_bytes.parameters", "of which parameters", "bytes", detail=True),
        Figure("tensor_bytes.gradients", "of which gradients", "bytes", detail=True),
        Figure("tensor_bytes.optimizer state", "of which optimiser state", "bytes", detail=True),
        Figure("tensor_bytes.activations", "of which activations", "bytes", detail=True),
        Figure("train.peak_memory", "peak resident memory", "bytes", detail=True),
    ],
    charts=[
        Curve("validation_accuracy", over="epoch", x="elapsed", title="Validation accuracy over seconds of training"),
        Bars(("train.seconds", "train.joules", "tensor_bytes", "flops"), title="Time, energy, memory and operations beside the twin's"),
        Difference("accuracy", title="Test accuracy minus the twin's"),
        Tradeoff("accuracy", "train.joules", log=True, title="Test accuracy against energy"),
    ],
    time_limit=6 * 3600,
)
study.option("data", "fashion-mnist", choices=list(NORMALISATION), help="the images to learn")

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Images:
    """Normalised images [N, C, H, W] with their labels."""

    train: Pair
    validation: Pair
    test: Pair
    classes: int


@study.task
def task(scale: Scale, data: str) -> Images:
    train, test = _load(data, "train"), _load(data, "test")
    order = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(0))
    kept, held_out = (TRAIN, VALIDATION) if scale is Scale.QUICK else (len(order) - len(order) // 10, len(order) // 10)
    rows = order[:kept], order[kept : kept + held_out]
    kept_rows, held_out_rows = ((train[0][each], train[1][each]) for each in rows)
    return Images(kept_rows, held_out_rows, test, classes=10)


def _load(name: str, split: Literal["train", "test"]) -> Pair:
    images = {"mnist": data.load_mnist, "fashion-mnist": data.load_fashion_mnist, "cifar-10": data.load_cifar10}[name](split)
    mean, deviation = NORMALISATION[name]
    x = torch.as_tensor(images.x).unsqueeze(1) if images.x.ndim == 3 else torch.as_tensor(images.x)
    return (x.float() / 255 - mean) / deviation, torch.as_tensor(images.y)


# How every arm is run

Fit = Callable[..., History]


def compare(images: Images, trial: Trial, make: Callable[[], nn.Module], fit: Fit, config: Any, stages: Callable[[str], bool]) -> None:
    """Fit, then log accuracy and costs. `stages` says which stages' validation accuracies are those of the network so far."""
    x, y = _to(trial.device, images.train)
    model = make().to(trial.device)
    shown: list[Epoch] = []

    def follow(line: Epoch) -> None:
        if stages(line.stage):
            shown.append(line)
            trial.report(len(shown), line.validation_accuracy)
        trial.progress(*_progress(line, config), f"{line.stage}: {100 * line.validation_accuracy:.1f} % on validation data")

    generator = torch.Generator().manual_seed(trial.seed)
    with trial.measure("train"):
        history = fit(model, x, y, validation=_to(trial.device, images.validation), config=config, callbacks=[follow], generator=generator)
    kept = [line for line in shown if line.epoch == history.best[line.stage]]
    trial.objective(kept[-1].validation_accuracy)
    if trial.tuning:
        return
    trial.log("accuracy", accuracy(model, _to(trial.device, images.test)))
    for number, line in enumerate(shown, start=1):
        trial.log("validation_accuracy", line.validation_accuracy, epoch=number)
        trial.log("elapsed", line.seconds, epoch=number)
    epochs = sum(line.stage == NETWORK for line in history.epochs) or len(history.epochs)  # stages side by side share their passes
    trial.log("epochs", epochs)
    trial.log("epoch_seconds", history.seconds / epochs)
    trial.log("cache_bytes", history.cache_bytes)
    for note in history.notes:
        trial.note("trainer", note)
    _watch(images, trial, make, fit, config, history)


def _watch(images: Images, trial: Trial, make: Callable[[], nn.Module], fit: Fit, config: Any, history: History) -> None:
    """Tensor bytes and FLOPs, from short fits of the same shape."""
    rows = SHORT * config.batch_size
    share = rows / len(images.train[0])
    short = [
        _to(trial.device, (x[: math.ceil(share * len(x))], y[: math.ceil(share * len(y))])) for x, y in (images.train, images.validation)
    ]

    model = make().to(trial.device)
    with meters.tensor_memory(model) as peak:
        fit(model, *short[0], validation=short[1], config=_short(config, epochs=1))
    kinds = {kind: size for kind, size in peak.bytes.items() if kind != "input cache"}
    trial.log("tensor_bytes", sum(kinds.values()))
    for kind in ("parameters", "gradients", "optimizer state", "activations", "temporaries"):
        trial.log(f"tensor_bytes.{kind}", kinds.get(kind, 0))

    counted: list[tuple[str, int]] = []
    with meters.count_flops() as flops:
        fit(make().to(trial.device), *short[0], validation=short[1], config=_short(config, epochs=2),
            callbacks=[lambda line: counted.append((line.stage, flops.total))])  # fmt: skip
    trial.log("flops", scaled_flops(counted, flops.total, {line.stage: line.epoch for line in history.epochs}) / share)
    trial.note("flops", f"counted on fits of {rows} rows and scaled; elementwise operations and linear solves are not counted")


def scaled_flops(counted: list[tuple[str, int]], total: int, epochs: dict[str, int]) -> int:
    """FLOPs of a fit of so many epochs a stage, from those (stage, FLOPs so far) at the end of each epoch of one with two epochs a stage.

    A stage's first epoch counts once, with what had to be done before it; its second one for all others.

    >>> scaled_flops([("layer 1", 10), ("layer 1", 20), ("layer 2", 33), ("layer 2", 43)], 44, {"layer 1": 5, "layer 2": 3})
    84
    """
    before, scaled, seen = 0, 0, set()
    for stage, so_far in counted:
        scaled += (so_far - before) * (epochs[stage] - 1 if stage in seen else 1)
        before = so_far
        seen.add(stage)
    return scaled + total - before


def _short(config: Any, epochs: int) -> Any:
    """The same training for so many epochs a stage, without early stopping."""
    lengths = {field.name: epochs for field in fields(config) if "epochs" in field.name}
    return replace(config, patience=None, **lengths)


def _progress(line: Epoch, config: Any) -> tuple[int, int]:
    """Epochs done and to do at most, of the stage in training."""
    return line.epoch, max(getattr(config, field.name) for field in fields(config) if "epochs" in field.name)


def accuracy(model: nn.Module, data: Pair) -> float:
    """The fraction of images whose highest score is their label's."""
    model.eval()
    with torch.no_grad():
        right = sum((model(x).argmax(1) == y).sum() for x, y in zip(data[0].split(1000), data[1].split(1000), strict=True))
    return float(right) / len(data[1])


def _to(device: str, pair: Pair) -> Pair:
    return pair[0].to(device), pair[1].to(device)


# The arms

LR = LogUniform(1e-5, 1e-2, start=5e-4)
WEIGHT_DECAY = LogUniform(1e-6, 1e-3, start=1e-5)


def _mlp(make: Callable[..., nn.Module], images: Images, trial: Trial) -> Callable[[], nn.Module]:
    sizes = [trial.settings["width"]] * trial.settings["depth"]
    return lambda: make(images.train[0][0].numel(), sizes, images.classes)


def _cnn(make: Callable[..., nn.Module], images: Images, trial: Trial) -> Callable[[], nn.Module]:
    channels, height, _ = images.train[0].shape[1:]
    sizes = [trial.settings["channels"] << step * trial.settings["growth"] for step in range(3)]  # 16, 32, 64 or 32, 128, 512
    return lambda: in_channels_last(make(channels, height, sizes, images.classes))


def in_channels_last(model: nn.Module) -> nn.Module:
    """The model with its convolutions' weights in the order in which they are quickest on a CPU."""
    return model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] - torch's stubs lack this form


def _mono_forward(images: Images, trial: Trial, schedule: Literal["sequential", "simultaneous"], last: str) -> None:
    chosen = trial.settings
    config = MonoForwardConfig(schedule=schedule, lr=chosen["lr"], epochs_per_layer=chosen["epochs"], patience=chosen["patience"])
    compare(images, trial, _mlp(MonoForwardMLP, images, trial), fit_mono_forward, config, lambda stage: stage.startswith(last))


MF = {"width": 500, "depth": 2, "epochs": 40, "patience": 3}
MF_FULL = {"width": 1000, "patience": 10}


@study.arm("mono-forward", against="bp-mono-forward", label="Mono-Forward", settings=MF, at_full=MF_FULL | {"epochs": 14}, space={"lr": LR})
def mono_forward(images: Images, trial: Trial) -> None:
    _mono_forward(images, trial, "sequential", last="layer")


@study.arm(
    "mono-forward-simultaneous",
    against="bp-mono-forward",
    label="Mono-Forward, all layers at once",
    settings=MF,
    at_full=MF_FULL | {"epochs": 100},
    space={"lr": LR},
)
def mono_forward_simultaneous(images: Images, trial: Trial) -> None:
    _mono_forward(images, trial, "simultaneous", last=NETWORK)


def _backpropagation(images: Images, trial: Trial, make: Callable[[], nn.Module]) -> None:
    chosen = trial.settings
    config = BackpropagationConfig(
        lr=chosen["lr"], weight_decay=chosen["weight_decay"], epochs=chosen["epochs"], patience=chosen["patience"]
    )
    compare(images, trial, make, fit_backpropagation, config, lambda stage: True)


BP_SPACE = {"lr": LR, "weight_decay": WEIGHT_DECAY}


@study.arm(
    "bp-mono-forward",
    label="Backpropagation, Mono-Forward's net",
    settings=MF,
    at_full=MF_FULL | {"epochs": 100},
    space=BP_SPACE,
)
def bp_mono_forward(images: Images, trial: Trial) -> None:
    _backpropagation(images, trial, _mlp(mlp, images, trial))


FF = {"width": 500, "depth": 3, "epochs": 30, "patience": 3}
FF_FULL = {"width": 1000, "epochs": 100, "patience": 20}


@study.arm("forward-forward", against="bp-forward-forward", label="Forward-Forward", settings=FF, at_full=FF_FULL, space=BP_SPACE)
def forward_forward(images: Images, trial: Trial) -> None:
    chosen = trial.settings
    config = ForwardForwardConfig(
        lr=chosen["lr"], weight_decay=chosen["weight_decay"], epochs=chosen["epochs"], patience=chosen["patience"]
    )
    compare(images, trial, _mlp(ForwardForwardMLP, images, trial), fit_forward_forward, config, lambda stage: stage == NETWORK)


@study.arm(
    "bp-forward-forward",
    label="Backpropagation, Forward-Forward's net",
    settings=FF,
    at_full=FF_FULL | {"patience": 10},
    space=BP_SPACE,
)
def bp_forward_forward(images: Images, trial: Trial) -> None:
    _backpropagation(images, trial, _mlp(mlp, images, trial))


CAFO = {"channels": 16, "growth": 1, "epochs": 40, "patience": 3}
CAFO_FULL = {"channels": 32, "growth": 2, "epochs": 145, "patience": 7}


def _cascaded_forward(images: Images, trial: Trial, **kind: Any) -> None:
    chosen = trial.settings
    tuned = {name: chosen[name] for name in ("lr", "weight_decay", "ridge", "block_lr", "block_weight_decay") if name in chosen}
    lengths = {name: chosen[name] for name in ("epochs", "patience", "block_epochs") if name in chosen}
    config = CascadedForwardConfig(**kind, **tuned, **lengths)
    compare(images, trial, _cnn(CascadedForwardCNN, images, trial), fit_cascaded_forward, config, lambda stage: stage != "blocks")


@study.arm("cafo-rand", against="bp-cafo", label="CaFo, random blocks", settings=CAFO, at_full=CAFO_FULL, space=BP_SPACE)
def cafo_rand(images: Images, trial: Trial) -> None:
    _cascaded_forward(images, trial)


@study.arm(
    "cafo-rand-mse",
    against="bp-cafo",
    label="CaFo, random blocks, closed form",
    settings=CAFO,
    at_full=CAFO_FULL,
    space={"ridge": LogUniform(1e-5, 1e-1, start=1e-3)},
)
def cafo_rand_mse(images: Images, trial: Trial) -> None:
    _cascaded_forward(images, trial, predictor_loss="mse")


@study.arm(
    "cafo-dfa",
    against="bp-cafo",
    label="CaFo, blocks by direct feedback",
    settings=CAFO | {"block_epochs": 5},
    at_full=CAFO_FULL | {"epochs": 85, "block_epochs": 15},
    space=BP_SPACE | {"block_lr": LR, "block_weight_decay": WEIGHT_DECAY},
)
def cafo_dfa(images: Images, trial: Trial) -> None:
    _cascaded_forward(images, trial, blocks="dfa")


@study.arm(
    "bp-cafo",
    label="Backpropagation, CaFo's net",
    settings=CAFO | {"epochs": 15},
    at_full=CAFO_FULL | {"epochs": 100, "patience": 10},
    space=BP_SPACE,
)
def bp_cafo(images: Images, trial: Trial) -> None:
    _backpropagation(images, trial, _cnn(cnn, images, trial))


# What the paper claims


@study.claim(
    "Mono-Forward is at least as accurate as its backpropagation twin",
    paper="+0.51 points on Fashion-MNIST (2x1000), +0.09 on MNIST",
    if_fails="the paper trains wider layers (1000) on six times the images; here the greedy layers stop a little short of the twin",
)
def mono_forward_accuracy(results: Results) -> Any:
    return results.difference("accuracy", "mono-forward", "bp-mono-forward") >= 0


@study.claim(
    "Mono-Forward takes less time than its twin",
    paper="+18.2 % on Fashion-MNIST, -12.1 % on MNIST",
    if_fails="its layers train one after the other, each with its own early stopping, and so make more passes over the data than the twin",
)
def mono_forward_time(results: Results) -> Any:
    return results.ratio("train.seconds", "mono-forward", "bp-mono-forward") < 1


@study.claim(
    "Forward-Forward takes at least 3 times its twin's time",
    paper="13.3 times on Fashion-MNIST, 4.4 times on MNIST",
    if_fails="the epochs are capped at 30 here, where Forward-Forward still improves",
)
def forward_forward_time(results: Results) -> Any:
    return results.ratio("train.seconds", "forward-forward", "bp-forward-forward") >= 3


@study.claim(
    "Forward-Forward's accuracy comes within 1 point of its twin's",
    paper="+0.75 points on Fashion-MNIST (4x2000), +0.24 on MNIST (3x1000)",
    if_fails="it needs many more epochs and images than the quick scale gives it: its accuracy was still rising when training ended",
)
def forward_forward_accuracy(results: Results) -> Any:
    return results.difference("accuracy", "forward-forward", "bp-forward-forward") >= -0.01


@study.claim(
    "CaFo-DFA is more accurate than CaFo-Rand",
    paper="89.5 % against 88.1 % on Fashion-MNIST, by their differences of +2.47 and +1.11 points to one twin",
    if_fails="few block epochs on few images: the feedback has little time to shape the blocks",
)
def feedback_helps(results: Results) -> Any:
    return results.difference("accuracy", "cafo-dfa", "cafo-rand") > 0


@study.claim(
    "CaFo-Rand needs less memory than its twin (peak tensor bytes, without data and kept features)",
    paper="-6.7 % on Fashion-MNIST and MNIST",
)
def random_blocks_memory(results: Results) -> Any:
    return results.ratio("tensor_bytes", "cafo-rand", "bp-cafo") < 1


@study.claim(
    "Free of backpropagation is not automatically leaner: Forward-Forward's peak memory is at least its twin's",
    paper="+1.9 % on Fashion-MNIST, +0.9 % on MNIST (3x1000)",
    if_fails="its gradients exist one layer at a time here, where the released code holds all of them",
)
def forward_forward_memory(results: Results) -> Any:
    return results.ratio("tensor_bytes", "forward-forward", "bp-forward-forward") >= 1


@study.summary
def summary(results: Results) -> str:
    def percent(arm: str) -> str:
        return f"{100 * results.mean('accuracy', arm).value:.1f} %"

    def times(figure: str, arm: str, twin: str) -> str:
        return f"{results.ratio(figure, arm, twin).value:.2g}x"

    passes = results.mean("train.backward_passes", "mono-forward").value
    return (
        f"On this machine Mono-Forward reached {percent('mono-forward')} where backpropagation reached {percent('bp-mono-forward')}, "
        f"with {passes:.0f} backward passes, {times('tensor_bytes', 'mono-forward', 'bp-mono-forward')} the memory and "
        f"{times('train.seconds', 'mono-forward', 'bp-mono-forward')} the time; "
        f"Forward-Forward reached {percent('forward-forward')} where backpropagation reached {percent('bp-forward-forward')}, in "
        f"{times('train.seconds', 'forward-forward', 'bp-forward-forward')} the time; "
        f"Cascaded-Forward reached {percent('cafo-rand')} with random blocks and {percent('cafo-dfa')} with trained ones where "
        f"backpropagation reached {percent('bp-cafo')}, in {times('train.seconds', 'cafo-rand', 'bp-cafo')} and "
        f"{times('train.seconds', 'cafo-dfa', 'bp-cafo')} the time."
    )
