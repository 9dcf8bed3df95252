"""The study on a text of one's own and a short genome: each arm runs, and every claim can be judged."""

from __future__ import annotations

import pytest
import torch

from fewer.errors import UserError
from fewer.signals.flash_fft_conv import study as module
from fewer.study import NotTestable, Results, Scale
from fewer.study.results import Row
from fewer.study.trial import FigureEvent, Trial, TrialSpec


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(module, "STEPS", {Scale.QUICK: 20})
    monkeypatch.setattr(module, "WARM_UP", 5)
    monkeypatch.setattr(module, "WIDTH", 16)
    monkeypatch.setattr(module, "ROWS", 8)
    monkeypatch.setattr(module, "MEASURED", (2, 4, 512))
    monkeypatch.setattr(module, "GENOME", {Scale.QUICK: 9_000})
    monkeypatch.setattr(module, "STREAM_TAPS", 100)
    monkeypatch.setattr(module, "CHUNK", 1000)
    monkeypatch.setattr(module, "load_e_coli", lambda: "ACGTTGCA" * 1200)


def test_every_arm_runs_and_every_claim_is_judged(small, tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("the quick brown fox jumps over the lazy dog; " * 100)
    study, rows = module.study, []
    task = study.build_task(Scale.QUICK, {"text": str(file)})
    for name, arm in study.arms.items():
        seen = []
        torch.manual_seed(0)
        arm.run(task, Trial(TrialSpec("", "", name, 0, Scale.QUICK, {}), seen.append))
        rows += [Row(name, 0, each.name, each.coordinates, each.value) for each in seen if isinstance(each, FigureEvent)]
    results = Results(rows, list(study.arms))
    outcomes = {}
    for claim in study.claims:
        try:
            outcomes[claim.text] = claim.test(results).outcome
        except NotTestable as reason:
            outcomes[claim.text] = str(reason)
    assert outcomes["the training ends where torch.fft's does: loss within 1e-3 nats"] == "holds"
    assert [text for text, outcome in outcomes.items() if outcome not in ("holds", "fails")] == [study.claims[-1].text]
    assert results.mean("stream_error", "stream").value < 1e-4
    assert results.mean("loss", "flash-fft-conv").value < 5
    assert study.summarise(results)


def test_a_text_that_is_too_short_is_refused(tmp_path):
    file = tmp_path / "short.txt"
    file.write_text("too short")
    with pytest.raises(UserError, match="has 9 bytes; expected at least 2050: name a longer text"):
        module.study.build_task(Scale.QUICK, {"text": str(file)})
