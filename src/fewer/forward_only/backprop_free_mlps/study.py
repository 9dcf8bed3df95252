"""Three ways to train without backpropagation, each beside an equally tuned twin with backpropagation.

Every arm: early stopping on validation data, test data once at the end, costs measured around the fit alone. What slows a fit down to
watch (FLOPs, tensor bytes) is taken on a short fit of the same shape after the timed one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, Literal

import torch
from torch import nn

from fewer.forward_only._shared.backpropagation import BackpropagationConfig, cnn, fit_backpropagation, mlp
from fewer.forward_only.backprop_free_mlps import release
from fewer.forward_only.backprop_free_mlps.cascaded_forward import CascadedForwardCNN, CascadedForwardConfig, fit_cascaded_forward
from fewer.forward_only.backprop_free_mlps.forward_forward import ForwardForwardConfig, ForwardForwardMLP, fit_forward_forward
from fewer.forward_only.backprop_free_mlps.mono_forward import MonoForwardConfig, MonoForwardMLP, fit_mono_forward
from fewer.forward_only.backprop_free_mlps.problems import NETWORK, compare
from fewer.study import Bars, Curve, Difference, Figure, LogUniform, Results, Scale, Study, Tradeoff, Trial
from fewer.tasks import IMAGES_HELP, ImageTask, image_task

TRAIN, VALIDATION = 10_000, 5_000  # images at quick scale; at full scale all of them, a tenth for validation

study = Study(
    "backprop-free-mlps",
    question="What do accuracy, time, memory and energy become when no layer waits for a backward pass?",
    figures=[
        Figure("accuracy", "test accuracy", "%", "higher"),
        Figure("seconds", "time to the stopped model", "s"),
        Figure("cpu_seconds", "its processor time", "s"),
        Figure("epoch_seconds", "time per pass over the data", "s"),
        Figure("epochs", "passes (in turn: of every layer)", "", ""),
        Figure("joules", "energy", "J"),
        Figure("flops", "floating-point operations", "FLOP"),
        Figure("train.backward_passes", "backward passes", ""),
        Figure("bytes", "peak tensor bytes", "bytes"),
        Figure("cache_bytes", "kept features beside that", "bytes"),
        Figure("bytes.parameters", "of which parameters", "bytes", detail=True),
        Figure("bytes.gradients", "of which gradients", "bytes", detail=True),
        Figure("bytes.optimizer state", "of which optimiser state", "bytes", detail=True),
        Figure("bytes.activations", "of which activations", "bytes", detail=True),
        Figure("bytes.temporaries", "of which temporaries", "bytes", detail=True),
        Figure("bytes.buffers", "of which buffers", "bytes", detail=True),
        Figure("kept_state_bytes", "a state kept for early stopping, beside that", "bytes", detail=True),
        Figure("peak_memory", "peak resident memory", "bytes", detail=True),
        Figure("train.co2e_kg", "CO2 equivalent", "kg", detail=True),
        Figure("validation_accuracy", "validation accuracy", "%", "higher"),
        Figure("elapsed", "seconds of training", "s"),
    ],
    charts=[
        Curve("validation_accuracy", over="epoch", x="elapsed", title="Validation accuracy over seconds of training"),
        Bars(("cpu_seconds", "joules", "bytes", "flops"), title="Time, energy, memory and operations beside the twin's"),
        Difference("accuracy", title="Test accuracy minus the twin's"),
        Tradeoff("accuracy", "joules", log=True, title="Test accuracy against energy"),
    ],
    time_limit=6 * 3600,
)
study.option("data", "fashion-mnist", help=IMAGES_HELP)


@study.task
def task(scale: Scale, data: str) -> ImageTask:
    train, validation = (TRAIN, VALIDATION) if scale is Scale.QUICK else (None, None)
    return image_task(data, train=train, validation=validation, normalise=release.NORMALISATION.get(data))


# The arms

LR = LogUniform(1e-5, 1e-2, start=5e-4)
WEIGHT_DECAY = LogUniform(1e-6, 1e-3, start=1e-5)


def _fields(config: Any, trial: Trial) -> dict[str, Any]:
    """Those of the trial's settings that are fields of the config."""
    return {field.name: trial.settings[field.name] for field in fields(config) if field.name in trial.settings}


def _mlp(make: Callable[..., nn.Module], images: ImageTask, trial: Trial) -> Callable[[], nn.Module]:
    sizes = [trial.settings["width"]] * trial.settings["depth"]
    return lambda: make(images.train[0][0].numel(), sizes, images.classes)


def _cnn(make: Callable[..., nn.Module], images: ImageTask, trial: Trial) -> Callable[[], nn.Module]:
    channels, *size = images.shape
    sizes = [trial.settings["channels"] << step * trial.settings["growth"] for step in range(3)]  # 16, 32, 64 or 32, 128, 512
    return lambda: in_channels_last(make(channels, tuple(size), sizes, images.classes))


def in_channels_last(model: nn.Module) -> nn.Module:
    """The model with its convolutions' weights in the order in which they are quickest on a CPU."""
    return model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] - torch's stubs lack this form


def _mono_forward(images: ImageTask, trial: Trial, schedule: Literal["sequential", "simultaneous"], last: str) -> None:
    config = MonoForwardConfig(schedule=schedule, epochs_per_layer=trial.settings["epochs"], **_fields(MonoForwardConfig, trial))
    compare(images, trial, _mlp(MonoForwardMLP, images, trial), fit_mono_forward, config, lambda stage: stage.startswith(last))


def at_full(arm: dict[str, dict[str, Any]], nets: dict[str, dict[str, Any]] | None = None, **more: Any) -> Callable[[Any], dict[str, Any]]:
    """The release's settings for the data set at hand; the net is another arm's where `nets` is given."""

    def settings(options: Mapping[str, Any]) -> dict[str, Any]:
        net = release.of_set(nets, options["data"]) if nets else {}
        return {name: net[name] for name in ("width", "depth") if name in net} | release.of_set(arm, options["data"]) | more

    return settings


MF = {"width": 500, "depth": 2, "epochs": 40, "patience": 3}


@study.arm(
    "mono-forward",
    against="bp-mono-forward",
    label="Mono-Forward",
    settings=MF,
    at_full=at_full(release.MONO_FORWARD, patience=10),
    space={"lr": LR},
)
def mono_forward(images: ImageTask, trial: Trial) -> None:
    _mono_forward(images, trial, "sequential", last="layer")


@study.arm(
    "mono-forward-simultaneous",
    against="bp-mono-forward",
    label="Mono-Forward at once",
    settings=MF,
    at_full=at_full(release.MONO_FORWARD, epochs=100, patience=10),
    space={"lr": LR},
)
def mono_forward_simultaneous(images: ImageTask, trial: Trial) -> None:
    _mono_forward(images, trial, "simultaneous", last=NETWORK)


def _backpropagation(images: ImageTask, trial: Trial, make: Callable[[], nn.Module]) -> None:
    config = BackpropagationConfig(**_fields(BackpropagationConfig, trial))
    compare(images, trial, make, fit_backpropagation, config, lambda stage: True)


BP_SPACE = {"lr": LR, "weight_decay": WEIGHT_DECAY}


@study.arm(
    "bp-mono-forward",
    label="BP (MF's net)",
    settings=MF,
    at_full=at_full(release.BACKPROPAGATION, release.MONO_FORWARD, epochs=100, patience=10),
    space=BP_SPACE,
)
def bp_mono_forward(images: ImageTask, trial: Trial) -> None:
    _backpropagation(images, trial, _mlp(mlp, images, trial))


FF = {"width": 500, "depth": 3, "epochs": 30, "patience": 3}


@study.arm(
    "forward-forward",
    against="bp-forward-forward",
    label="Forward-Forward",
    settings=FF,
    at_full=at_full(release.FORWARD_FORWARD, epochs=100, patience=20),
    space=BP_SPACE,
)
def forward_forward(images: ImageTask, trial: Trial) -> None:
    config = ForwardForwardConfig(**_fields(ForwardForwardConfig, trial))
    compare(images, trial, _mlp(ForwardForwardMLP, images, trial), fit_forward_forward, config, lambda stage: stage == NETWORK)


@study.arm(
    "bp-forward-forward",
    label="BP (FF's net)",
    settings=FF,
    at_full=at_full(release.BACKPROPAGATION, release.FORWARD_FORWARD, epochs=100, patience=10),
    space=BP_SPACE,
)
def bp_forward_forward(images: ImageTask, trial: Trial) -> None:
    _backpropagation(images, trial, _mlp(mlp, images, trial))


CAFO = {"channels": 16, "growth": 1, "epochs": 40, "patience": 3}


def _cascaded_forward(images: ImageTask, trial: Trial, **kind: Any) -> None:
    config = CascadedForwardConfig(**kind, **_fields(CascadedForwardConfig, trial))
    compare(images, trial, _cnn(CascadedForwardCNN, images, trial), fit_cascaded_forward, config, lambda stage: stage != "blocks")


@study.arm(
    "cafo-rand",
    against="bp-cafo",
    label="CaFo, random",
    settings=CAFO,
    at_full=at_full(release.CAFO_RANDOM, patience=7, channels=32, growth=2),
    space=BP_SPACE,
)
def cafo_rand(images: ImageTask, trial: Trial) -> None:
    _cascaded_forward(images, trial)


@study.arm(
    "cafo-rand-mse",
    against="bp-cafo",
    label="CaFo, closed form",
    settings=CAFO,
    at_full={"channels": 32, "growth": 2},
    space={"ridge": LogUniform(1e-5, 1e-1, start=1e-3)},
)
def cafo_rand_mse(images: ImageTask, trial: Trial) -> None:
    _cascaded_forward(images, trial, predictor_loss="mse")


@study.arm(
    "cafo-dfa",
    against="bp-cafo",
    label="CaFo, feedback",
    settings=CAFO | {"block_epochs": 5},
    at_full=at_full(release.CAFO_FEEDBACK, patience=7, channels=32, growth=2),
    space=BP_SPACE | {"block_lr": LR, "block_weight_decay": WEIGHT_DECAY},
)
def cafo_dfa(images: ImageTask, trial: Trial) -> None:
    _cascaded_forward(images, trial, blocks="dfa")


@study.arm(
    "bp-cafo",
    label="BP (CaFo's net)",
    settings=CAFO | {"epochs": 15},
    at_full=at_full(release.BACKPROPAGATION, epochs=100, patience=10, channels=32, growth=2),
    space=BP_SPACE,
)
def bp_cafo(images: ImageTask, trial: Trial) -> None:
    _backpropagation(images, trial, _cnn(cnn, images, trial))


# What the paper claims


@study.claim(
    "Mono-Forward is at least as accurate as its backpropagation twin",
    paper="+0.51 points on Fashion-MNIST (2x1000), +0.09 on MNIST",
    if_fails="the paper trains wider layers on more images; here the greedy layers stop a little short of the twin",
)
def mono_forward_accuracy(results: Results) -> Any:
    return results.difference("accuracy", "mono-forward", "bp-mono-forward") >= 0


@study.claim(
    "Mono-Forward takes less processor time than its twin",
    paper="+18.2 % on Fashion-MNIST, -12.1 % on MNIST",
    if_fails="its layers train one after the other, each with its own early stopping, and so make more passes over the data than the twin",
)
def mono_forward_time(results: Results) -> Any:
    return results.ratio("cpu_seconds", "mono-forward", "bp-mono-forward") < 1


@study.claim(
    "Forward-Forward takes at least 3 times its twin's processor time",
    paper="13.3 times on Fashion-MNIST, 4.4 times on MNIST",
    if_fails="the epochs are capped here, where Forward-Forward still improves",
)
def forward_forward_time(results: Results) -> Any:
    return results.ratio("cpu_seconds", "forward-forward", "bp-forward-forward") >= 3


@study.claim(
    "Forward-Forward's accuracy comes within 1 point of its twin's",
    paper="+0.75 points on Fashion-MNIST (4x2000), +0.24 on MNIST (3x1000)",
    if_fails="it needs many more epochs and images than the quick scale gives it: its accuracy was still rising when training ended",
)
def forward_forward_accuracy(results: Results) -> Any:
    return results.difference("accuracy", "forward-forward", "bp-forward-forward") >= -0.01


@study.claim(
    "CaFo-DFA is more accurate than CaFo-Rand",
    paper="+2.47 against +1.11 points above the twin on Fashion-MNIST, +0.08 against -0.32 on MNIST",
    if_fails="few block epochs on few images: the feedback has little time to shape the blocks",
)
def feedback_helps(results: Results) -> Any:
    return results.difference("accuracy", "cafo-dfa", "cafo-rand") > 0


@study.claim(
    "CaFo-Rand needs less memory than its twin (peak tensor bytes; data, kept features and kept states not counted)",
    paper="-6.7 % on Fashion-MNIST and MNIST",
)
def random_blocks_memory(results: Results) -> Any:
    return results.ratio("bytes", "cafo-rand", "bp-cafo") < 1


@study.claim(
    "Free of backpropagation is not automatically leaner: Forward-Forward's peak memory is at least its twin's",
    paper="+1.9 % on Fashion-MNIST, +0.9 % on MNIST (3x1000)",
    if_fails="its gradients exist one layer at a time here, where the released code holds all of them",
)
def forward_forward_memory(results: Results) -> Any:
    return results.ratio("bytes", "forward-forward", "bp-forward-forward") >= 1


@study.summary
def summary(results: Results) -> str:
    say, passes = results.say, results.mean("train.backward_passes", "mono-forward").value
    return (
        f"On this machine Mono-Forward reached {say('accuracy', 'mono-forward')} where backpropagation reached "
        f"{say('accuracy', 'bp-mono-forward')}, with {passes:.0f} backward passes, {say('bytes', 'mono-forward', 'bp-mono-forward')} the memory "
        f"(beside {say('cache_bytes', 'mono-forward')} of kept features) and {say('cpu_seconds', 'mono-forward', 'bp-mono-forward')} the "
        f"processor time; Forward-Forward reached {say('accuracy', 'forward-forward')} where backpropagation reached "
        f"{say('accuracy', 'bp-forward-forward')}, in {say('cpu_seconds', 'forward-forward', 'bp-forward-forward')} the processor time; "
        f"Cascaded-Forward reached {say('accuracy', 'cafo-rand')} with random blocks and {say('accuracy', 'cafo-dfa')} with trained ones where "
        f"backpropagation reached {say('accuracy', 'bp-cafo')}, in {say('cpu_seconds', 'cafo-rand', 'bp-cafo')} and "
        f"{say('cpu_seconds', 'cafo-dfa', 'bp-cafo')} the processor time."
    )
