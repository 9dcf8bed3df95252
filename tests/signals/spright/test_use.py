"""What users hold: the spectrum, the scikit-learn estimator, the verb, and the study with its peers."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer
from sklearn.exceptions import NotFittedError
from sklearn.tree import DecisionTreeRegressor

from fewer.signals.spright import SparseSpectrum, SparseWalshRegressor, fwht, sparse_wht
from fewer.signals.spright.command import wht
from fewer.signals.spright.peers import PeerSignal, lasso_on_pairs
from fewer.signals.spright.problems import Network, exact_support, k_sparse, k_sparse_array, r_squared
from fewer.signals.spright.study import Workload, study
from fewer.study import Scale, Trial
from fewer.study.trial import FigureEvent, TrialSpec


@given(st.integers(1, 130), st.integers(0, 8), st.integers(0, 2**32 - 1))
def test_a_spectrum_is_the_sum_of_its_parities_and_survives_json(n, k, seed):
    rng = np.random.default_rng(seed)
    indices = np.unique(rng.integers(0, 2, (k, n), dtype=np.uint8), axis=0)
    spectrum = SparseSpectrum(indices, rng.standard_normal(len(indices)), rng.random(len(indices)), 7, 1, False, 0.25)
    m = rng.integers(0, 2, (20, n), dtype=np.uint8)
    parities = 1 - 2.0 * ((m.astype(int) @ indices.T.astype(int)) % 2)
    assert np.allclose(spectrum(m), parities @ spectrum.values)
    back = SparseSpectrum.from_json(spectrum.to_json())
    assert back.to_json() == spectrum.to_json()
    assert (back.indices == spectrum.indices).all()
    assert (back.values == spectrum.values).all()
    assert (back.n, back.queries, back.residual_bins, back.converged) == (n, 7, 1, False)
    assert (spectrum.order() == [key.count("1") for key in spectrum.to_dict()]).all()


def test_the_largest_coefficients_come_first_with_the_names_they_join():
    found = sparse_wht(lambda m: 3.0 * m[:, 1] * m[:, 2] + 0.5 * m[:, 0], 4, sparsity=6)
    assert (np.diff(np.abs(found.values)) <= 0).all()
    named = dict(found.interactions(["a", "b", "c", "d"]))
    assert named[("b", "c")] == pytest.approx(0.75)
    assert named[()] == pytest.approx(1.0)
    assert found.top(2).to_dict() == dict(list(found.to_dict().items())[:2])


def test_the_estimator_explains_a_tree_exactly_and_is_one_of_scikit_learns():
    x, y = load_breast_cancer(return_X_y=True)
    bits = (x > np.median(x, axis=0)).astype(np.uint8)
    tree = DecisionTreeRegressor(max_depth=3, random_state=0).fit(bits, y)
    estimator = SparseWalshRegressor(max_degree=3, sparsity=40)
    with pytest.raises(NotFittedError):
        estimator.predict(bits)
    assert clone(estimator).get_params() == estimator.get_params()
    assert clone(estimator).set_params(sparsity=64).sparsity == 64
    fitted = estimator.fit(tree.predict, n_features=30)
    assert np.allclose(fitted.predict(bits), tree.predict(bits), atol=1e-9)
    assert fitted.score(bits, tree.predict(bits)) == pytest.approx(1.0)
    assert fitted.n_features_in_ == 30
    assert (fitted.spectrum_.order() <= 3).all()


def test_the_verb_prints_the_largest_coefficients_as_the_full_transform_has_them(fewer, tmp_path, capsys):
    true, array = k_sparse_array(16, 8, np.random.default_rng(0))
    np.save(tmp_path / "table.npy", array.astype(np.float32))
    plain = fewer("wht", "table.npy", "--top", "3").stdout
    assert "3 of 8 coefficients" in plain
    wht(tmp_path / "table.npy", as_json=True)
    sparse = json.loads(capsys.readouterr().out)
    wht(tmp_path / "table.npy", full=True, top=8, as_json=True)
    full = json.loads(capsys.readouterr().out)
    found, expected = ({each["bits"]: each["value"] for each in told["coefficients"]} for told in (sparse, full))
    assert found == pytest.approx(expected, abs=1e-6)
    assert found == pytest.approx(true.to_dict(), abs=1e-6)
    assert sparse["queries"] < full["queries"] == 2**16
    (tmp_path / "six.npy").write_bytes(b"")
    refused = fewer("wht", "six.npy", status=2)
    assert "cannot be read" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_the_verb_says_when_not_all_is_found(tmp_path, capsys):
    np.save(tmp_path / "noise.npy", np.random.default_rng(0).standard_normal(2**16))
    wht(tmp_path / "noise.npy", max_queries=3000, design="none")
    assert "not all is explained" in capsys.readouterr().out


def test_sparse_transform_and_we_find_the_same_spectrum():
    pytest.importorskip("sparse_transform", reason="the peer is not installed")
    true = k_sparse(16, 20, np.random.default_rng(0))
    np.random.seed(0)
    peer = PeerSignal(true, 16, bins=64).recover()
    ours = sparse_wht(true, 16, sparsity=20)
    assert exact_support(peer, true)
    assert exact_support(ours, true)
    assert peer.to_dict() == pytest.approx(ours.to_dict(), abs=1e-9)


def test_hadamard_transform_and_we_transform_alike():
    peer = pytest.importorskip("hadamard_transform", reason="the peer is not installed")
    import torch

    x = np.random.default_rng(0).standard_normal((3, 64))
    assert np.allclose(peer.hadamard_transform(torch.as_tensor(x)).numpy(), 8 * fwht(x), atol=1e-12)


def test_edges_are_counted_right_and_wrong():
    network = Network.named("karate")
    assert (network.n, network.edges) == (34, 78)
    found = sparse_wht(network, 34, max_degree=2, sparsity=79)
    assert network.edges_right(found) == 1
    pairs = found.order() == 2
    half = SparseSpectrum(found.indices[pairs][:39], found.values[pairs][:39], found.stderr[pairs][:39])
    assert network.edges_right(half) == pytest.approx(0.5)
    wrong = SparseSpectrum(half.indices, 2 * half.values, half.stderr)
    assert network.edges_right(wrong) == pytest.approx(-0.5)


def test_lasso_fits_a_model_of_pairs():
    def model(m):
        return 2.0 * m[:, 0] * m[:, 1] + m[:, 4]

    explanation = lasso_on_pairs(model, 6, 400, np.random.default_rng(0))
    assert r_squared(explanation, model, 6, np.random.default_rng(1)) > 0.99


def test_every_arm_logs_what_the_claims_ask_for(monkeypatch):
    """A short run of every arm, with small networks and models, then the claims and the summary on its figures."""
    from fewer.signals.spright import study as module
    from fewer.study import Results, judge
    from fewer.study.results import Row

    monkeypatch.setattr(module, "LENGTHS", (10, 12))
    monkeypatch.setattr(module, "DECIBELS", (10,))
    monkeypatch.setattr(module, "BUDGETS", (8_000,))
    monkeypatch.setattr(module, "ARRAY_SPARSITY", 4)
    network = Network.named("karate")

    def model(m):
        return 1.0 * m[:, 0] * m[:, 3] * m[:, 7] + m[:, 5]

    work = Workload({"karate": network, "les-miserables": network}, {"boosted trees": model, "random forest": model})
    rows = []
    for name, arm in study.arms.items():
        if name == "sparse-transform":
            pytest.importorskip("sparse_transform", reason="the peer is not installed")
        events = []
        settings = arm.defaults(Scale.QUICK, {}) | ({"instances": 2} if "instances" in arm.settings else {})
        np.random.seed(0)
        arm.run(work, Trial(TrialSpec("study", study.slug, name, 0, Scale.QUICK, settings), events.append))
        rows += [Row(name, 0, each.name, each.coordinates, each.value) for each in events if isinstance(each, FigureEvent)]
    results = Results(rows, list(study.arms))
    verdicts = judge(study, results)
    assert {verdict.verdict for verdict in verdicts} <= {"holds", "fails"}
    assert {figure.name for figure in study.figures} <= {row.figure for row in rows}
    assert "SPRIGHT found the exact spectrum" in study.summarise(results)
