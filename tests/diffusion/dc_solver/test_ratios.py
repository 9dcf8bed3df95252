"""Ratios in their files, and the polynomial that predicts them."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch
from dc_models import noises, sampled

from fewer.diffusion import CascadePolynomial, DCSolverMultistepScheduler, Ratios
from fewer.diffusion.dc_solver.ratios import key_of

CONFIG = key_of(DCSolverMultistepScheduler().config)
COEFFICIENTS = np.random.default_rng(0).normal(size=(4, 3, 3))


def explicit(coefficients, i: int, scale: float, steps: int) -> float:
    total = 0.0
    for d in range(4):
        for p in range(3):
            for q in range(3):
                total += coefficients[d, p, q] * (i / steps) ** d * (scale / 12) ** (2 - p) * (steps / 50) ** (2 - q)
    return total


def noiseless(steps, scales) -> list[Ratios]:
    return [
        Ratios([1.0, 1.0] + [explicit(COEFFICIENTS, i, scale, each) for i in range(3, each + 1)], each, scale, CONFIG)
        for each in steps
        for scale in scales
    ]


def test_a_fit_recovers_the_polynomial_that_made_the_ratios():
    fitted = CascadePolynomial.fit(noiseless((6, 8, 10, 15, 20), (1.0, 2.5, 4.0, 6.0, 7.5)))
    for steps, scale in ((7, 3.0), (12, 7.5), (20, 1.0)):
        predicted = fitted.predict(steps, scale)
        assert predicted[:2] == [1, 1]
        assert len(predicted) == steps
        wanted = [explicit(COEFFICIENTS, i, scale, steps) for i in range(3, steps + 1)]
        assert predicted[2:] == pytest.approx(wanted, rel=1e-6)


def test_a_prediction_is_the_triple_sum_with_the_released_order_of_powers():
    polynomial = CascadePolynomial(COEFFICIENTS, (5, 20), (1.0, 7.5))
    for steps, scale in ((5, 1.0), (12, 4.0)):
        assert polynomial.predict(steps, scale)[2:] == pytest.approx([explicit(COEFFICIENTS, i, scale, steps) for i in range(3, steps + 1)])


def test_settings_that_determine_too_little_are_told_and_still_predict_themselves():
    with pytest.warns(UserWarning, match="determine 33 of 36 coefficients"):
        fitted = CascadePolynomial.fit(noiseless((5, 8, 10), (1.0, 4.0, 7.5)))
    assert fitted.predict(8, 4.0)[2:] == pytest.approx([explicit(COEFFICIENTS, i, 4.0, 8) for i in range(3, 9)], rel=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CascadePolynomial.fit(noiseless((5, 6, 8, 10), (1.0, 4.0, 7.5)))


@pytest.mark.parametrize(("steps", "scales", "words"), [((5, 8), (1.0, 4.0, 7.5), r"\[5, 8\]"), ((5, 8, 10), (1.0, 4.0), "three of each")])
def test_too_few_settings_are_refused(steps, scales, words):
    with pytest.raises(ValueError, match=words):
        CascadePolynomial.fit(noiseless(steps, scales))


def test_configs_are_not_mixed():
    found = noiseless((5, 6, 8), (1.0, 4.0, 7.5))
    other = Ratios(found[0].values, found[0].steps, found[0].guidance_scale, CONFIG | {"dc_order": 1})
    with pytest.raises(ValueError, match="differ in dc_order"):
        CascadePolynomial.fit([*found[1:], other])


def test_outside_its_settings_the_border_is_taken_with_a_warning():
    fitted = CascadePolynomial.fit(noiseless((6, 8, 10), (1.0, 4.0, 7.5)))
    with pytest.warns(UserWarning, match="outside the fit's 6 to 10 steps and 1 to 7.5"):
        assert fitted.predict(8, 20.0) == fitted.predict(8, 7.5)
    with pytest.warns(UserWarning, match="outside"):
        assert len(fitted.predict(12, 4.0)) == 12


def test_a_polynomial_and_ratios_are_read_back(tmp_path):
    fitted = CascadePolynomial.fit(noiseless((6, 8, 10), (1.0, 4.0, 7.5)))
    fitted.save(tmp_path / "cpr.npz")
    again = CascadePolynomial.load(tmp_path / "cpr.npz")
    assert again.predict(7, 2.5) == fitted.predict(7, 2.5)
    ratios = again.ratios(7, 2.5)
    ratios.save(tmp_path / "ratios.json")
    assert Ratios.load(tmp_path / "ratios.json") == ratios
    assert sampled(DCSolverMultistepScheduler(ratios=ratios), 7, noises()).isfinite().all()
    with pytest.raises(FileExistsError):
        ratios.save(tmp_path / "ratios.json")
    with pytest.raises(ValueError, match="another config"):
        DCSolverMultistepScheduler(ratios=ratios, solver_order=3)
    with pytest.raises(ValueError, match="knows no config"):
        CascadePolynomial(COEFFICIENTS, (5, 10), (1.0, 7.5)).ratios(7, 2.5)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"values": [1, 1, 2]}', '{"values": [1], "steps": 2, "guidance_scale": 1, "config": {}}', '{"x": 1}']
)
def test_files_that_are_no_ratios_are_told(tmp_path, text):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ValueError, match=r"r\.json|ratios for"):
        Ratios.load(tmp_path / "r.json")


def test_files_that_are_no_polynomial_are_told(tmp_path):
    np.savez(tmp_path / "a.npz", coefficients=np.zeros((4, 3)), steps=[5, 10], scales=[1, 2], config=np.frombuffer(b"null", np.uint8))
    with pytest.raises(ValueError, match=r"a\.npz is no cascade polynomial"):
        CascadePolynomial.load(tmp_path / "a.npz")
    (tmp_path / "b.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"b\.npz"):
        CascadePolynomial.load(tmp_path / "b.npz")


@pytest.mark.parametrize("values", [[1, 1, "a"], "111", [1, 1, float("inf")], [True, 1, 1], [1, 1]])
def test_ratios_that_are_none_are_refused(values):
    with pytest.raises(ValueError, match="ratios"):
        Ratios(values, 3, 1.0, CONFIG)


def test_a_third_order_compensation_begins_a_step_later():
    config = CONFIG | {"dc_order": 3}
    found = [
        Ratios([1.0] * 3 + each.values[3:], each.steps, each.guidance_scale, config) for each in noiseless((6, 8, 10), (1.0, 4.0, 7.5))
    ]
    fitted = CascadePolynomial.fit(found)
    assert fitted.predict(8, 4.0)[:3] == [1, 1, 1]
    assert torch.isfinite(sampled(DCSolverMultistepScheduler(dc_order=3, ratios=fitted.ratios(8, 4.0)), 8, noises())).all()
    assert json.loads(json.dumps(fitted.config)) == config
