"""The side by side on a user's own images and transformer, and that every claim can turn."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from split_vits import vit

from fewer.errors import UserError
from fewer.federated.sfprompt import problems
from fewer.federated.sfprompt import study as side_by_side
from fewer.federated.sfprompt.problems import mirrored, own_model, whole
from fewer.study import Results, Scale, Trial, judge
from fewer.study.results import Row
from fewer.study.trial import FigureEvent, TrialSpec

QUICK = dataclasses.replace(side_by_side.SIZES[Scale.QUICK], rounds=3, fraction=1.0)
IMAGES, CLIENTS = 300, 3


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A file with images of one's own that three clients hold."""
    monkeypatch.setenv("FEWER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(side_by_side.SIZES, Scale.QUICK, QUICK)
    y, client = np.arange(IMAGES) % 4, np.zeros(IMAGES, int)
    x = np.random.default_rng(0).integers(0, 60, (IMAGES, 8, 8), dtype=np.uint8)
    x[:, :, :4] += (45 * y).astype(np.uint8)[:, None, None]
    order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(0)).numpy()  # as `image_task` shuffles
    client[order] = np.arange(IMAGES) % CLIENTS
    np.savez(tmp_path / "mine.npz", x=x, y=y, client=client)
    return tmp_path / "mine.npz"


def events_of(arm, file, model="", **words):
    settings = {"data": str(file), "model": model, "score": "after"} | side_by_side.study.arms[arm].defaults(Scale.QUICK, {})
    spec, events = TrialSpec(side_by_side.__name__, "sfprompt", arm, 0, Scale.QUICK, settings, **words), []
    side_by_side.study.arms[arm].run(side_by_side.study.build_task(Scale.QUICK, settings), Trial(spec, events.append))
    return events


def test_every_arm_logs_what_tables_and_claims_ask_for(mine):
    rows, notes = [], set()
    for arm in side_by_side.study.arms:
        events = events_of(arm, mine)
        rows += [Row(arm, 0, each.name, each.coordinates, float(each.value or 0.0)) for each in events if isinstance(each, FigureEvent)]
        notes |= {each.text for each in events if getattr(each, "name", "") == "clients" and hasattr(each, "text")}
    assert notes == {"3, as the file says; 25 to 26 images"} or len(notes) == 1
    results = Results(rows, list(side_by_side.study.arms))
    assert {figure.name for figure in side_by_side.study.figures} <= {row.figure for row in rows}
    assert {verdict.verdict for verdict in judge(side_by_side.study, results)} <= {"holds", "fails", "not testable here"}
    assert "SFPrompt ended at" in side_by_side.study.summarise(results)
    assert results.mean("of_formula", "sfprompt").value == pytest.approx(1, abs=0.05)
    assert results.mean("bytes", "sfprompt").value < results.mean("bytes", "splitfed").value
    assert results.mean("bytes", "sfprompt").value == results.mean("bytes", "random").value == results.mean("bytes", "no-phase-1").value
    assert results.mean("flops", "no-phase-1").value < results.mean("flops", "sfprompt").value < results.mean("flops", "full").value
    assert results.mean("parameters", "sfprompt").value < 0.5 * results.mean("parameters", "full").value


def test_tuning_looks_at_validation_images_alone(mine):
    for arm in ("full", "sfprompt"):
        events = events_of(arm, mine, tuning=True)
        assert sum(type(each).__name__ == "ObjectiveEvent" for each in events) == 1
        assert not any(isinstance(each, FigureEvent) and each.name == "accuracy" for each in events)


def test_the_backbone_is_trained_once_and_images_are_mirrored(mine):
    task, again = mirrored(str(mine)), mirrored(str(mine))
    for one, other in zip(task.model.state_dict().values(), again.model.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    x, _ = task.test
    assert x[:, :, :, 4:].mean() > x[:, :, :, :4].mean()  # the bright half was on the left
    assert len(task.train[0]) == len(task.beside["client"])


def test_a_users_transformer_is_cut(tmp_path, mine, monkeypatch):
    monkeypatch.setattr(problems, "FULL_IMAGES", 60)
    vit().save_pretrained(tmp_path / "model")
    task = own_model(str(tmp_path / "model"), str(mine))
    (x, _), model = task.train, whole(task)
    assert model(x[:2]).shape == (2, 4)  # a classifier for the data's classes
    assert model(torch.zeros(2, 1, 20, 20)).shape == (2, 4)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(UserError, match="expected a transformers directory of a ViT: --set model=DIR"):
        own_model(str(tmp_path), str(mine))
    events = events_of("sfprompt", mine, str(tmp_path / "model"))
    assert any(isinstance(each, FigureEvent) and each.name == "of_formula" for each in events)


def test_every_claim_can_turn():
    """Made-up figures, good and bad ones."""
    arms = list(side_by_side.study.arms)
    good = {
        "full": {"accuracy": 0.8, "bytes": 200.0, "flops": 100.0},
        "sfprompt": {"accuracy": 0.79, "bytes": 100.0, "flops": 40.0, "of_formula": 1.01},
        "random": {"accuracy": 0.75},
        "no-phase-1": {"accuracy": 0.7},
    }

    def verdicts(**changed):
        rows = []
        for arm, figures in good.items():
            for name, value in (figures | changed.get(arm.replace("-", "_"), {})).items():
                rows += [Row(arm, seed, name, {}, value * (1 + 1e-4 * seed)) for seed in range(3)]
        return [verdict.verdict for verdict in judge(side_by_side.study, Results(rows, arms))]

    assert verdicts() == ["holds"] * 5 + ["not testable here"]
    assert verdicts(sfprompt={"accuracy": 0.7, "bytes": 150.0, "flops": 60.0}, no_phase_1={"accuracy": 0.69})[:5] == ["fails"] * 5
    assert verdicts(sfprompt={"of_formula": 1.05})[0] == "fails"
