"""The study's machinery on digits, and that the racers do the same work."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from fewer.optimization.mfac import bench, problems
from fewer.optimization.mfac import study as study_module
from fewer.optimization.mfac.problems import Task
from fewer.optimization.mfac.study import SPARSITIES, study
from fewer.study import Results, Scale, Trial
from fewer.study.results import Row
from fewer.study.trial import FigureEvent, ObjectiveEvent, TrialSpec
from fewer.tasks import resnet20

PRUNERS = ["magnitude", "diagonal-fisher", "mfac-500", "mfac-2000", "mfac-full"]
OPTIMISERS = ["sgd", "adamw", "mfac-32", "mfac-128", "mfac-512"]


def small_net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Task:
    x, y = load_digits(return_X_y=True)
    x, y = torch.as_tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1, torch.as_tensor(y)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWER_CACHE", str(tmp_path_factory.mktemp("cache")))
        network = problems.trained("digits", small_net, x[:1200], y[:1200], epochs=5)
    make = functools.partial(resnet20, (1, 8, 8), 10, (2, 4, 4))
    held_out, test = (x[1100:1200], y[1100:1200]), (x[1200:], y[1200:])
    return Task(network, (x[:1100], y[:1100]), held_out, test, (x[:256], y[:256]), (x[1200:1400], y[1200:1400]), make)


def run(task: Task, name: str, tuning: bool = False, **settings: object) -> list:
    events = []
    arm = study.arms[name]
    given = arm.defaults(Scale.QUICK, {"data": "mnist"}) | settings
    torch.manual_seed(0)
    arm.run(task, Trial(TrialSpec("study", study.slug, name, 0, Scale.QUICK, given, tuning=tuning), events.append))
    return events


def figures(events: list, name: str) -> dict[tuple, float]:
    return {tuple(event.coordinates.values()): event.value for event in events if isinstance(event, FigureEvent) and event.name == name}


@pytest.mark.parametrize("name", PRUNERS)
def test_a_pruner_logs_its_accuracies_and_leaves_the_network_alone(digits, name, monkeypatch):
    monkeypatch.setattr(study_module, "MAIN", 64)
    monkeypatch.setattr(study_module, "GRADIENTS", (16, 128))
    before = {key: value.clone() for key, value in digits.network.state_dict().items()}
    events = run(digits, name)
    assert all(torch.equal(value, before[key]) for key, value in digits.network.state_dict().items())
    found = figures(events, "accuracy")
    assert list(found) == [(sparsity,) for sparsity in SPARSITIES]
    assert found[(0.5,)] > 0.8
    assert figures(events, "dense_accuracy")[()] >= 0.85
    if name.startswith("mfac"):
        assert list(figures(events, "accuracy_joint")) == [(sparsity,) for sparsity in SPARSITIES]
        for ending in ("", "_joint"):
            assert sorted(figures(events, f"accuracy_at_90{ending}")) == [(16,), (64,), (128,)]
            assert figures(events, f"accuracy_at_90{ending}")[(64,)] == figures(events, f"accuracy{ending}")[(0.9,)]
        weights = sum(part.numel() for part in digits.network.parameters() if part.ndim > 1)
        blocks = math.ceil(weights / {"mfac-500": 500, "mfac-2000": 2000, "mfac-full": weights}[name])
        assert 1 - blocks * 64 / weights <= figures(events, "unseen")[()] < 1  # the trace of 1 - damping F^-1 is at most m in a block


@pytest.mark.parametrize("name", OPTIMISERS)
def test_an_optimiser_logs_losses_times_and_bytes(digits, name):
    events = run(digits, name, epochs=2, window=16)
    losses = figures(events, "validation_loss")
    assert list(losses) == [(step,) for step in range(1, 9)]
    assert losses[(8,)] == figures(events, "loss")[()]
    assert [event.value for event in events if isinstance(event, ObjectiveEvent)] == [-losses[(8,)]]
    assert figures(events, "step_seconds")[()] >= figures(events, "gradient_seconds")[()]
    assert figures(events, "step_ratio")[()] > 0
    weights = sum(parameter.numel() for parameter in digits.make().parameters())
    expected = {"sgd": 4 * weights, "adamw": 8 * weights}.get(name, 4 * 16 * weights + 2 * 8 * 16 * 16)
    assert figures(events, "bytes")[()] == pytest.approx(expected, rel=0.05)


def test_the_window_is_timed_over_d_and_over_m(digits, monkeypatch):
    monkeypatch.setattr(problems, "push_seconds", lambda window, dim, device, seed: 1e-9 * window * dim + 1e-12)
    for name, sizes in (("DIMS", (1000, 10_000)), ("WINDOWS", (4, 8)), ("DIM", 1000), ("WINDOW", 4)):
        monkeypatch.setattr(study_module, name, sizes)
    events = run(digits, "window")
    assert list(figures(events, "push_seconds")) == [(1000,), (10_000,)]
    assert figures(events, "slope_over_d")[()] == pytest.approx(1, abs=1e-3)
    assert figures(events, "slope_over_m")[()] == pytest.approx(1, abs=1e-3)


def test_the_push_that_is_timed_is_one_on_a_full_window():
    threads = torch.get_num_threads()
    assert 0 < problems.push_seconds(3, 50, "cpu", 0) < math.inf
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("name", ["diagonal-fisher", "mfac-500"])
def test_every_pruner_tries_the_same_images_a_gradient_and_judges_them_on_held_out_ones(digits, name, monkeypatch):
    monkeypatch.setattr(study_module, "MAIN", 16)
    monkeypatch.setattr(study_module, "GRADIENTS", (8,))
    drawn, judged = [], []
    collect, score = problems.collect_gradients, problems.Subject.accuracy
    monkeypatch.setattr(
        problems, "collect_gradients", lambda net, loss, loader, m: (drawn.append(loader.batch_size), collect(net, loss, loader, m))[1]
    )

    def accuracy(subject, weights, data):
        if len(judged) < 3:
            assert data is digits.held_out
        judged.append(score(subject, weights, data))
        return judged[-1]

    monkeypatch.setattr(problems.Subject, "accuracy", accuracy)
    events = run(digits, name)
    assert drawn[:3] == [1, 4, 16]
    best = [1, 4, 16][max(range(3), key=lambda place: judged[place])]
    assert figures(events, "batch")[()] == best
    assert set(drawn[3:]) == {best}


def test_a_claim_of_never_worse_rests_on_a_stated_tolerance_not_on_the_spread():
    def verdict(drop: float, spread: float) -> str:
        arms = list(study.arms)
        rows = [
            Row(arm, seed, "accuracy_at_90", {"m": m}, 0.7 - drop * place + spread * (seed - 1))
            for place, arm in enumerate(study_module.PRUNERS)
            for m in (64, 256, 1024)
            for seed in range(3)
        ]
        return study_module.more_is_not_worse(Results(rows, arms)).outcome

    assert verdict(drop=0.01, spread=0.0) == "holds"
    assert verdict(drop=0.05, spread=0.0) == verdict(drop=0.05, spread=0.1) == "fails"


def test_a_diverged_training_is_told_to_the_tuner_and_fails_a_trial(digits):
    events = run(digits, "sgd", tuning=True, epochs=1, lr=1e30)
    assert [event.value for event in events if isinstance(event, ObjectiveEvent)][-1] == study_module.DIVERGED
    with pytest.raises(FloatingPointError):
        run(digits, "sgd", epochs=1, lr=1e30)


def test_a_network_is_trained_once_and_found_again(tmp_path, monkeypatch):
    monkeypatch.setenv("FEWER_CACHE", str(tmp_path))
    x, y = torch.randn(64, 1, 8, 8), torch.randint(10, (64,))
    state = torch.get_rng_state()
    first = problems.trained("noise", small_net, x, y, epochs=1)
    assert torch.equal(torch.get_rng_state(), state)
    monkeypatch.setattr(problems, "fit_steps", lambda *_, **__: pytest.fail("trained twice"))
    again = problems.trained("noise", small_net, x, y, epochs=1)
    assert not again.training
    assert all(torch.equal(value, first.state_dict()[key]) for key, value in again.state_dict().items())
    assert sorted(file.name for file in tmp_path.rglob("*") if file.is_file() and file.suffix != ".lock") == ["DONE", "model.safetensors"]


def test_the_full_scale_is_resnet_20():
    assert sum(parameter.numel() for parameter in resnet20((3, 32, 32)).parameters()) == 269_722  # 0.27 million
    assert resnet20((3, 32, 32))(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_other_images_are_another_network(tmp_path, monkeypatch):
    monkeypatch.setenv("FEWER_CACHE", str(tmp_path))
    y = torch.arange(64) % 10
    one, other = (problems.trained("mine", small_net, torch.full((64, 1, 8, 8), value), y, epochs=1) for value in (0.0, 1.0))
    assert not torch.equal(one[0].weight, other[0].weight)


def test_a_users_own_images_are_what_everything_is_about(tmp_path, monkeypatch):
    x, y = load_digits(return_X_y=True)
    np.savez(tmp_path / "mine.npz", x=x[:200].reshape(-1, 8, 8), y=y[:200] % 3)
    monkeypatch.setenv("FEWER_CACHE", str(tmp_path))
    task = study.build_task(Scale.QUICK, study.choose_options({"data": str(tmp_path / "mine.npz")}))
    assert task.network(task.test[0]).shape == (len(task.test[0]), 3)
    assert task.make()(task.train[0]).shape == (len(task.train[0]), 3)
    assert len({len(part[0]) for part in (task.learned, task.train)}) == 1


def test_racers_do_the_same_work(monkeypatch):
    monkeypatch.setattr(bench, "_gradients", lambda m, d: torch.randn(20, 100, generator=torch.Generator().manual_seed(0)))
    ours, theirs = bench.precomputation()
    x = torch.ones(100)
    v, c = theirs()
    by_recursion = x / 1e-3 - v[0].T @ ((v[0] @ x) / c[0])
    torch.testing.assert_close(ours() @ x, by_recursion, rtol=1e-2, atol=1)


def test_the_dense_solve_and_the_factor_solve_the_same():
    ours, theirs = bench.dense()
    torch.testing.assert_close(ours().double(), torch.as_tensor(theirs()), rtol=1e-3, atol=1e-3)


def test_the_window_and_its_two_products_are_of_one_size():
    ours, theirs = bench._push_and_apply(20, 100)
    products, sums = theirs()
    assert (ours().shape, products.shape, sums.shape) == ((100,), (20,), (100,))
