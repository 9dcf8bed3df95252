"""What the study takes a step's costs on: the same step streamed and in memory, from small batches to large ones."""

from __future__ import annotations

import numpy as np
import pytest

from fewer.language.zo2.costs import break_even
from fewer.language.zo2.costs.break_even import LAYERS, LENGTH, ROWS, steps_by_batch
from fewer.language.zo2.study import log_break_even, study, summary
from fewer.study import Results, Scale
from fewer.study.results import Row
from fewer.study.trial import Trial, TrialSpec

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 32}


def test_both_ways_take_the_same_step_and_one_of_them_streams(tmp_path, monkeypatch):
    monkeypatch.setattr(break_even, "HALF", SMALL)
    tokens = []
    for count, streamed, resident in steps_by_batch(tmp_path, "cpu"):
        files = {file: file.read_bytes() for file in tmp_path.rglob("block-*.bin")}
        assert {int(file.name[6:11]) for file in files} == set(range(LAYERS))
        assert streamed() == resident()
        assert any(file.read_bytes() != files.get(file) for file in tmp_path.rglob("block-*.bin"))
        tokens.append(count)
    assert tokens == [32 * rows for rows in ROWS]
    assert tokens == sorted(tokens)
    assert not list(tmp_path.iterdir())


def test_the_ratio_is_streamed_over_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("fewer.language.zo2.study.steps_by_batch", lambda *_: iter([(32, "streamed", "in memory")]))
    monkeypatch.setattr(
        "fewer.study.races.time_pairs", lambda ours, theirs, pairs: np.array([[3.0, 2.0]] if ours == "streamed" else [[2.0, 3.0]])
    )
    events = []
    log_break_even(Trial(TrialSpec("m", "zo2", "zo2-disk", 0, Scale.QUICK, {}), events.append), tmp_path)
    assert [(event.name, event.value, dict(event.coordinates)) for event in events if hasattr(event, "coordinates")] == [
        ("streaming", 1.5, {"tokens": 32})
    ]


@pytest.mark.parametrize(
    ("ratios", "said"),
    [
        ((1.4, 1.2, 1.0), "from 512 tokens a step on"),
        ((1.0, 1.2, 1.04), "from 512 tokens"),
        ((1.0, 1.0, 1.0), "from 32 tokens"),
        ((1, 1, 2), "at none"),
    ],
)
def test_streaming_hides_from_the_batch_on_behind_which_it_never_shows(ratios, said):
    names = ("drawn", "peak_memory", "cpu_seconds", "bytes", "lost", "gain")
    rows = [Row(arm, 0, name, {}, 1.0) for name in names for arm in study.arms]
    rows += [Row("zo2-disk", 0, "streaming", {"tokens": LENGTH * count}, ratio) for count, ratio in zip(ROWS, ratios, strict=True)]
    assert f"streaming hides behind computing {said}" in summary(Results(rows, list(study.arms)))
