"""The settings of the released code, tuned by its author for each data set; those that it lacks for a set are Fashion-MNIST's."""

from __future__ import annotations

from typing import Any

NORMALISATION = {"mnist": (0.1307, 0.3081), "fashion-mnist": (0.2860, 0.3530), "cifar-10": (0.4733, 0.2504)}  # mean, deviation of pixels

MONO_FORWARD = {
    "mnist": {"width": 1000, "depth": 2, "lr": 1.57e-3, "epochs": 14},
    "fashion-mnist": {"width": 1000, "depth": 2, "lr": 3.87e-4, "epochs": 12},
    "cifar-10": {"width": 2000, "depth": 3, "lr": 3.87e-4, "epochs": 12},
}
FORWARD_FORWARD = {
    "mnist": {
        "width": 1000,
        "depth": 3,
        "lr": 4.76e-4,
        "weight_decay": 4.2e-4,
        "downstream_lr": 1.07e-2,
        "downstream_weight_decay": 6.2e-3,
    },
    "fashion-mnist": {
        "width": 2000,
        "depth": 4,
        "lr": 3.72e-4,
        "weight_decay": 3.6e-4,
        "downstream_lr": 1.11e-2,
        "downstream_weight_decay": 5.1e-3,
    },
}
BACKPROPAGATION = {"mnist": {"lr": 1.98e-4, "weight_decay": 7.5e-6}, "fashion-mnist": {"lr": 2.13e-4, "weight_decay": 2.7e-5}}
CAFO_RANDOM = {"fashion-mnist": {"lr": 1.37e-3, "weight_decay": 2.9e-7, "epochs": 145}}
CAFO_FEEDBACK = {
    "fashion-mnist": {
        "lr": 3.3e-4,
        "weight_decay": 4e-5,
        "epochs": 85,
        "block_lr": 1.4e-4,
        "block_weight_decay": 1.3e-5,
        "block_epochs": 15,
    }
}


def of_set(settings: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    """The settings for a data set.

    >>> of_set(BACKPROPAGATION, "mnist")["lr"], of_set(BACKPROPAGATION, "cifar-10")["lr"]
    (0.000198, 0.000213)
    """
    return settings.get(name, settings["fashion-mnist"])
