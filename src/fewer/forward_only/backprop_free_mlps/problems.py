"""What is solved, images to be learnt, and how every arm is watched at it: fit, accuracy once on the test images, costs; what slows a fit down to watch is taken afterwards."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from fewer import meters
from fewer.fitting import Epoch, History
from fewer.forward_only.backprop_free_mlps.mono_forward import INPUT_STAGE
from fewer.tasks import ImageTask, accuracy

NETWORK = "network"  # the stage that stands for all of a network's layers, trained side by side
COSTS = ("seconds", "cpu_seconds", "peak_memory", "joules")
SHORT = 4  # batches of the short fits

Pair = tuple[Tensor, Tensor]
Fit = Callable[..., History]


def compare(images: ImageTask, trial: Any, make: Callable[[], nn.Module], fit: Fit, config: Any, stages: Callable[[str], bool]) -> None:
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
    with trial.measure("train") as cost:
        history = fit(model, x, y, validation=_to(trial.device, images.validation), config=config, callbacks=[follow], generator=generator)
    kept = [line for line in shown if line.epoch == history.best[line.stage]]
    trial.objective(kept[-1].validation_accuracy)
    if trial.tuning:
        return
    for figure in COSTS:
        if figure in cost.figures():
            trial.log(figure, cost.figures()[figure])
    trial.log("accuracy", accuracy(model, _to(trial.device, images.test)))
    for number, line in enumerate(shown, start=1):
        trial.log("validation_accuracy", line.validation_accuracy, epoch=number)
        trial.log("elapsed", line.seconds, epoch=number)
    epochs, seconds = passes(history)
    trial.log("epochs", epochs)
    trial.log("epoch_seconds", seconds / epochs)
    trial.log("cache_bytes", history.cache_bytes)
    for note in history.notes:
        trial.note("trainer", note)
    _watch(images, trial, make, fit, config, history)


def passes(history: History) -> tuple[int, float]:
    """Passes over the data and their seconds: through the whole network, or through one layer's kept inputs where layers train in turn.

    Where layers train in turn, the diagnostic classifier of the raw input is left out; what is done once (features of frozen layers)
    is spread over the passes.
    """
    whole = sum(line.stage == NETWORK for line in history.epochs)
    if whole:
        return whole, history.seconds
    diagnostic = [line for line in history.epochs if line.stage == INPUT_STAGE]
    return len(history.epochs) - len(diagnostic), history.seconds - (diagnostic[-1].seconds if diagnostic else 0.0)


def _watch(images: ImageTask, trial: Any, make: Callable[[], nn.Module], fit: Fit, config: Any, history: History) -> None:
    """Tensor bytes and FLOPs, from short fits of the same shape."""
    rows = SHORT * config.batch_size
    share = rows / len(images.train[0])
    short = [
        _to(trial.device, (x[: math.ceil(share * len(x))], y[: math.ceil(share * len(y))])) for x, y in (images.train, images.validation)
    ]

    model = make().to(trial.device)
    with meters.tensor_memory(model, beside=["kept inputs", "kept states"]) as peak:
        fit(model, *short[0], validation=short[1], config=_short(config, epochs=1))
    trial.log("bytes", peak.total)
    for kind in ("parameters", "gradients", "optimizer state", "activations", "temporaries", "buffers"):
        trial.log(f"bytes.{kind}", peak.bytes.get(kind, 0))
    trial.log("kept_state_bytes", peak.beside["kept states"])

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


def _to(device: str, pair: Pair) -> Pair:
    return pair[0].to(device), pair[1].to(device)
