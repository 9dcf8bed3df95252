"""The study's machinery on digits: what every arm logs, that twins are twins, that limits hold, and how passes and FLOPs are counted."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.datasets import load_digits

from fewer.fitting import Epoch, History
from fewer.forward_only.backprop_free_mlps import bench, release
from fewer.forward_only.backprop_free_mlps.problems import passes
from fewer.forward_only.backprop_free_mlps.study import study
from fewer.study import Scale, Trial
from fewer.study.trial import FigureEvent, NoteEvent, ObjectiveEvent, TrialSpec
from fewer.tasks import ImageTask

TWINS = {name: arm.against for name, arm in study.arms.items() if arm.against}


@pytest.fixture(scope="module")
def images() -> ImageTask:
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = torch.as_tensor(x, dtype=torch.float32)[order].view(-1, 1, 8, 8) / 16, torch.as_tensor(y)[order]
    return ImageTask((x[:900], y[:900]), (x[900:1200], y[900:1200]), (x[1200:], y[1200:]), classes=10, name="digits")


@pytest.fixture(scope="module")
def logged(images) -> dict[str, list]:
    """What each arm says of a short run."""
    events = {}
    for name, arm in study.arms.items():
        short = {"width": 64, "epochs": 3, "channels": 4, "lr": 2e-3, "block_epochs": 2}
        settings = arm.defaults(Scale.QUICK, {"data": "fashion-mnist"})
        settings |= {key: value for key, value in short.items() if key in settings}
        spec = TrialSpec("study", study.slug, name, 0, Scale.QUICK, settings)
        torch.manual_seed(0)
        arm.run(images, Trial(spec, events.setdefault(name, []).append))
    return events


def figure(events: list, name: str) -> float:
    (value,) = (event.value for event in events if isinstance(event, FigureEvent) and event.name == name and not event.coordinates)
    return value


def test_every_arm_logs_every_figure_of_the_study(logged):
    curves = {"validation_accuracy", "elapsed"}
    sometimes = {"joules", "train.co2e_kg"}  # where energy is known
    for events in logged.values():
        names = {event.name for event in events if isinstance(event, FigureEvent)}
        assert {each.name for each in study.figures} - sometimes <= names
        assert {event.name for event in events if isinstance(event, FigureEvent) and event.coordinates} == curves
        assert sum(isinstance(event, ObjectiveEvent) for event in events) == 1
        assert 0.1 < figure(events, "accuracy") <= 1
        assert figure(events, "flops") > 0


def test_backward_passes_are_made_by_backpropagation_and_by_feedback_alone(logged):
    for name, events in logged.items():
        steps = math.ceil(900 / 128)
        made = figure(events, "train.backward_passes")
        if name.startswith("bp-"):
            assert made == figure(events, "epochs") * steps
        elif name == "cafo-dfa":
            assert made == 2 * steps * 3  # two block epochs, three blocks
        else:
            assert made == 0


def test_a_twin_has_the_layers_of_what_it_is_held_against(logged):
    """Parameters: the twin's output layer is a predictor of the last layer, which the arm has too, beside those of the layers before."""
    for name, twin in TWINS.items():
        ours, theirs = (study.arms[each].settings for each in (name, twin))
        for size in ("width", "depth", "channels", "growth"):
            assert ours.get(size) == theirs.get(size)
        for data in release.NORMALISATION:
            ours, theirs = (study.arms[each].defaults(Scale.FULL, {"data": data}) for each in (name, twin))
            for size in ("width", "depth", "channels", "growth"):
                assert ours.get(size) == theirs.get(size), (name, data)


def test_the_quick_limits_are_the_specified_ones():
    settings = {name: arm.settings for name, arm in study.arms.items()}
    assert all(each["patience"] == 3 for each in settings.values())
    assert settings["cafo-dfa"]["block_epochs"] == 5
    assert [settings[name]["epochs"] for name in ("cafo-rand", "cafo-dfa", "bp-cafo", "forward-forward")] == [40, 40, 15, 30]
    assert [settings[name]["width"] for name in ("mono-forward", "forward-forward")] == [500, 500]


def test_the_kept_inputs_are_beside_the_peak(logged):
    assert figure(logged["mono-forward"], "cache_bytes") == (900 + 300) * 64 * 4
    assert figure(logged["bp-mono-forward"], "cache_bytes") == 0
    for events in logged.values():
        kinds = ["parameters", "gradients", "optimizer state", "activations", "temporaries", "buffers"]
        assert figure(events, "bytes") == sum(figure(events, f"bytes.{kind}") for kind in kinds)


def test_passes_leave_the_diagnostic_classifier_out():
    nan = math.nan
    lines = [
        Epoch("input projection", 1, 1.0, nan, nan, 2.0),
        Epoch("layer 1", 1, 1.0, nan, nan, 5.0),
        Epoch("layer 2", 1, 1.0, nan, nan, 8.0),
    ]
    assert passes(History(epochs=lines, seconds=8.0)) == (2, 6.0)
    side_by_side = [Epoch("layer 1", 1, 1.0, nan, nan, 3.0), Epoch("network", 1, 1.0, nan, nan, 3.0)]
    assert passes(History(epochs=side_by_side, seconds=3.0)) == (1, 3.0)


def test_what_the_closed_form_and_the_loader_did_is_noted(logged):
    for events in logged.values():
        assert any(isinstance(event, NoteEvent) and event.name == "flops" for event in events)


def test_racers_do_the_same_work(monkeypatch):
    monkeypatch.setattr(bench, "SIZES", (32, 32, 32))
    ours, theirs = bench.candidates()
    torch.manual_seed(0)
    assert torch.allclose(ours(), theirs(), rtol=1e-4)
    kept, recomputed = (bench._last_layer(cached)[1] for cached in (True, False))
    for one, other in zip(kept.batches(), recomputed.batches(), strict=True):
        assert torch.equal(one[0], other[0])
