"""Settings out of range are refused in one line each."""

from __future__ import annotations

import pytest

from fewer.federated import (
    FedDyn,
    FedProx,
    FedSAM,
    FedSpeed,
    FedSpeedConfig,
)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prox": -0.1}, "prox is -0.1; expected a finite number of at least 0"),
        ({"rho": -1}, "rho is -1; expected a finite number of at least 0"),
        ({"lr": 2.0, "prox": 0.5}, r"lr \* prox is 1; expected less than 1"),
        ({"server_rule": "mean"}, "server_rule is 'mean'; expected one of paper, released"),
        ({"alpha": 1.5}, "alpha is 1.5; expected a number from 0 to 1"),
        ({"lr": 0}, "lr is 0; expected a finite number above 0"),
        ({"local_epochs": 0}, "local_epochs is 0; expected a whole number of at least 1"),
        ({"local_steps": 0}, "local_steps is 0; expected a whole number of at least 1"),
        ({"batch_size": 0}, "batch_size is 0; expected a whole number of at least 1"),
        ({"weight_decay": -1}, "weight_decay is -1; expected a finite number of at least 0"),
        ({"lr_decay": 0}, "lr_decay is 0; expected a finite number above 0"),
        ({"lr_decay": 1.02}, "lr_decay is 1.02; expected a number from 0 to 1"),
        ({"lr_decay": float("nan")}, "lr_decay is nan"),
        ({"lr": float("inf")}, "lr is inf"),
        ({"relaxed_beta": -0.1}, "relaxed_beta is -0.1; expected a number from 0 to 1"),
        ({"relaxed_beta": float("nan")}, "relaxed_beta is nan"),
        ({"max_grad_norm": 0}, "max_grad_norm is 0"),
        ({"batch_size": 2.5}, "batch_size is 2.5; expected a whole number"),
    ],
)
def test_settings_out_of_range_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        FedSpeedConfig(**fields)


@pytest.mark.parametrize("fraction", [0.0, 1.5])
def test_a_strategy_refuses_a_fraction_out_of_range(fraction):
    with pytest.raises(ValueError, match="more than 0 and at most 1"):
        FedSpeed(fraction_train=fraction)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: FedDyn(mu=0), "mu is 0; expected a finite number above 0"),
        (lambda: FedProx(mu=-1), "mu is -1; expected a finite number of at least 0"),
        (lambda: FedSAM(rho=float("nan")), "rho is nan"),
        (lambda: FedSpeed(min_available_nodes=0), "min_available_nodes is 0"),
        (lambda: FedSpeed(patience=0), "patience is 0"),
    ],
)
def test_the_baselines_and_the_strategy_refuse_theirs(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_clipping_may_be_left_out():
    assert FedSpeedConfig(max_grad_norm=float("inf")).max_grad_norm == float("inf")
