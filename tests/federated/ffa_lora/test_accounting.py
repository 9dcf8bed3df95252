"""The accountant: the paper's noise, one function the inverse of the other, and what epsilon grows with."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewer.federated import PrivacyConfig, epsilon_spent, noise_multiplier

SST2, CLIENTS, BATCH, STEPS = 67_349, 3, 200, 10_000


def test_the_papers_noise_for_sst2():
    """The paper prints 0.99."""
    assert noise_multiplier(6.0, 1e-5, BATCH * CLIENTS / SST2, STEPS) == pytest.approx(0.990, abs=0.005)


@pytest.mark.parametrize("epsilon", [6.0, 3.0, 1.0])
def test_epsilon_spent_inverts_noise_multiplier(epsilon):
    sigma = noise_multiplier(epsilon, 1e-5, 0.05, 600)
    assert epsilon - 0.02 <= epsilon_spent(sigma, 1e-5, 0.05, 600) <= epsilon


def test_a_full_batch_is_the_gaussian_mechanism():
    assert epsilon_spent(1.5, 1e-5, 1.0, 10) == pytest.approx(11.44, abs=0.02)


def test_it_is_what_opacus_says_step_by_step():
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    for _ in range(40):
        accountant.step(noise_multiplier=1.1, sample_rate=0.1)
    assert epsilon_spent(1.1, 1e-5, 0.1, 40) == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-9)


@given(st.floats(0.7, 4.0), st.floats(0.01, 0.5), st.integers(1, 500))
@settings(max_examples=4, deadline=None)
def test_epsilon_grows_with_rounds_and_with_q_and_falls_with_sigma(sigma, q, steps):
    epsilon = epsilon_spent(sigma, 1e-5, q, steps)
    assert epsilon_spent(sigma, 1e-5, q, 2 * steps) > epsilon
    assert epsilon_spent(sigma, 1e-5, min(1.0, 1.5 * q), steps) > epsilon
    assert epsilon_spent(1.5 * sigma, 1e-5, q, steps) < epsilon


def test_the_ends():
    assert epsilon_spent(1.0, 1e-5, 0.1, 0) == 0
    assert epsilon_spent(0.0, 1e-5, 0.1, 1) == math.inf


def test_numerical_accounting_is_tighter():
    assert epsilon_spent(1.0, 1e-5, 0.05, 200, "prv") < epsilon_spent(1.0, 1e-5, 0.05, 200)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({}, "neither of epsilon and noise_multiplier given; expected one"),
        ({"epsilon": 1.0, "noise_multiplier": 1.0}, "both of epsilon and noise_multiplier given; expected one"),
        ({"epsilon": 0.0}, "epsilon is 0.0; expected"),
        ({"epsilon": -1.0}, "epsilon is -1.0; expected"),
        ({"noise_multiplier": -0.1}, "noise_multiplier is -0.1; expected"),
        ({"epsilon": 1.0, "delta": 0.0}, "delta is 0.0; expected a number between 0 and 1"),
        ({"epsilon": 1.0, "delta": 1.0}, "delta is 1.0; expected a number between 0 and 1"),
        ({"epsilon": 1.0, "clip": 0.0}, "clip is 0.0; expected"),
        ({"epsilon": 1.0, "accountant": "rpd"}, "accountant is 'rpd'; expected one of rdp, prv: did you mean 'rdp'"),
    ],
)
def test_what_is_no_budget_is_refused(words, told):
    with pytest.raises(ValueError, match=told):
        PrivacyConfig(**words)


def test_the_command_tells_q_sigma_and_epsilon_over_the_rounds(fewer):
    words = ["federated", "privacy", "--examples", "2000", "--batch", "100", "--rounds", "60", "--steps", "10", "--epsilon", "6"]
    (told,) = json.loads(fewer(*words, "--json").stdout)
    assert told["q"] == 0.05
    assert told["sigma"] == pytest.approx(noise_multiplier(6.0, 1e-5, 0.05, 600))
    assert list(told["epsilon"]) == ["1", "3", "6", "12", "30", "60"]
    assert told["epsilon"]["60"] == pytest.approx(epsilon_spent(told["sigma"], 1e-5, 0.05, 600))
    refused = fewer(*words[:2], "--examples", "50", *words[4:], status=2)
    assert "--batch is 100 and a client has 50 examples" in refused.stderr
    shown = fewer(*words[:2], "--examples", "2000", *words[4:], "--delta", "0.01").stdout
    assert "q 0.05, sigma" in shown
    assert "delta is not below 1/2000" in shown


def test_a_kept_noise_that_does_not_keep_the_budget_is_searched_again(tmp_path, monkeypatch):
    monkeypatch.setenv("FEWER_CACHE", str(tmp_path))
    budget = (5.0, 1e-4, 1.0, 3)
    sigma = noise_multiplier.__wrapped__(*budget)
    (file,) = tmp_path.rglob("sigma-*.json")
    for other in ("0.01", "nothing"):
        file.write_text(file.read_text().replace(str(sigma), other))
        assert noise_multiplier.__wrapped__(*budget) == sigma
