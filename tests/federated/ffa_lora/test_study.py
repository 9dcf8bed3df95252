"""The side by side on a user's own images and texts, and that every claim can turn."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from fewer.errors import UserError
from fewer.federated import FedLoRA, FlatModel, Independent, LoRARoundsConfig, Shards, simulate
from fewer.federated.ffa_lora import study as side_by_side
from fewer.federated.ffa_lora.problems import LabelScores, texts, upside_down
from fewer.study import Results, Scale, Trial, judge
from fewer.study.results import Row
from fewer.study.trial import FigureEvent, TrialSpec
from fewer.tasks import load_small_lm

QUICK = dataclasses.replace(side_by_side.SIZES[Scale.QUICK], rounds=3)
IMAGES, CLIENTS = 400, 3


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A file with images of one's own that three clients hold, 32 each; a step draws them all, for which accounting is quick."""
    monkeypatch.setenv("FEWER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(side_by_side.SIZES, Scale.QUICK, QUICK)
    y, client = np.arange(IMAGES) % 4, np.zeros(IMAGES, int)
    x = np.random.default_rng(0).integers(0, 60, (IMAGES, 8, 8), dtype=np.uint8)
    x[:, :4] += (45 * y).astype(np.uint8)[:, None, None]
    order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(0)).numpy()  # as `image_task` shuffles
    client[order] = np.arange(IMAGES) % CLIENTS
    np.savez(tmp_path / "mine.npz", x=x, y=y, client=client)
    return tmp_path / "mine.npz"


def events_of(arm, file, **words):
    settings = {"data": str(file), "text": "", "model": ""} | side_by_side.study.arms[arm].defaults(Scale.QUICK, {})
    spec, events = TrialSpec(side_by_side.__name__, "ffa-lora", arm, 0, Scale.QUICK, settings, **words), []
    side_by_side.study.arms[arm].run(side_by_side.study.build_task(Scale.QUICK, settings), Trial(spec, events.append))
    return events


def test_every_arm_logs_what_tables_and_claims_ask_for(mine):
    rows, notes = [], set()
    for arm in side_by_side.study.arms:
        events = events_of(arm, mine)
        rows += [Row(arm, 0, each.name, each.coordinates, float(each.value or 0.0)) for each in events if isinstance(each, FigureEvent)]
        notes |= {each.text for each in events if getattr(each, "name", "") == "clients" and hasattr(each, "text")}
    assert notes == {"3, as the file says; 32 examples a step"}
    results = Results(rows, list(side_by_side.study.arms))
    assert {figure.name for figure in side_by_side.study.figures} <= {row.figure for row in rows}
    assert {verdict.verdict for verdict in judge(side_by_side.study, results)} <= {"holds", "fails", "not testable here"}
    assert "FFA-LoRA's clients sent" in side_by_side.study.summarise(results)
    at = side_by_side.TIGHT
    assert results.ratio("parameters", "ffa-lora", "lora", **at).value == 0.5
    assert 0.49 <= results.ratio("bytes", "ffa-lora", "lora", **at).value <= 0.51
    assert 0.97 <= results.mean("epsilon", "ffa-lora", **at).value <= 1.0
    assert results.mean("further_noise", "ffa-lora", **at).value == 0 < results.mean("further_noise", "lora", **at).value
    assert results.mean("gap", "ffa-lora", **at).value <= 1e-6 < 1e-3 < results.mean("gap", "lora", **at).value


def test_tuning_looks_at_validation_images_alone(mine):
    events = events_of("ffa-lora-orthonormal", mine, tuning=True)
    assert sum(type(each).__name__ == "ObjectiveEvent" for each in events) == 1


def test_the_base_is_trained_once_and_images_are_turned(mine):
    task, again = upside_down(str(mine)), upside_down(str(mine))
    assert task.targets == ["3", "5"]
    for one, other in zip(task.base_of(0).state_dict().values(), again.base_of(0).state_dict().values(), strict=True):
        assert torch.equal(one, other)
    (x, y), base = task.test, task.base_of(0)
    right = (base(x.flip(-2)).argmax(1) == y).float().mean()
    assert right > 0.7, "upright"
    assert (base(x).argmax(1) == y).float().mean() < right - 0.2
    trained = [name for name, each in task.adapted(0).named_parameters() if each.requires_grad]
    assert len(trained) == 2
    assert len([name for name, each in task.adapted(0, frozen=False).named_parameters() if each.requires_grad]) == 4


def test_every_claim_can_turn():
    """Made-up figures, good and bad ones."""
    arms = list(side_by_side.study.arms)
    good = {"lora": {"none": 0.8, "6": 0.7, "1": 0.5, "1x4": 0.2}, "ffa-lora": {"none": 0.8, "6": 0.75, "1": 0.6, "1x4": 0.5}}
    bad = {"lora": good["ffa-lora"] | {"none": 0.7}, "ffa-lora": good["lora"]}

    def verdicts(accuracy, bytes_of, gaps):
        rows = []
        for seed in range(3):
            for arm in ("lora", "ffa-lora"):
                for name, value in accuracy[arm].items():
                    at = {"budget": name[:4] if name == "none" else name[0], "times": 4 if name.endswith("x4") else 1}
                    rows.append(Row(arm, seed, "accuracy", at, value + 0.001 * seed))
                rows += [Row(arm, seed, "bytes", side_by_side.TIGHT, bytes_of[arm]), Row(arm, seed, "gap", side_by_side.TIGHT, gaps[arm])]
        return [verdict.verdict for verdict in judge(side_by_side.study, Results(rows, arms))]

    assert verdicts(good, {"lora": 200, "ffa-lora": 100}, {"lora": 0.1, "ffa-lora": 0.0}) == ["holds"] * 6 + ["not testable here"]
    assert verdicts(bad, {"lora": 200, "ffa-lora": 200}, {"lora": 0.1, "ffa-lora": 0.1}) == ["fails"] * 6 + ["not testable here"]
    assert verdicts(good, {"lora": 200, "ffa-lora": 100}, {"lora": 0.0, "ffa-lora": 0.0})[1] == "fails"


def test_a_language_model_is_adapted_to_a_users_texts(tmp_path, monkeypatch):
    monkeypatch.setenv("FEWER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "notes.txt").write_text("import os\n\ndef first(values):\n    return values[0] + 12\n" * 900)
    lm, model = load_small_lm("family-micro", text=[tmp_path / "notes.txt"]), str(tmp_path / "model")
    for part in (lm.model, lm.tokenizer):
        part.save_pretrained(model)
    lines = [{"text": f"return values[{n}]", "label": ("first", "import")[n % 2]} for n in range(60)]
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = texts(model, str(file))
    base = task.base_of(0)
    assert isinstance(base, LabelScores)
    assert [len(part[0]) for part in (task.train, task.validation, task.test)] == [42, 6, 12]
    flat = FlatModel(task.adapted(0))
    assert {name.split(".")[-4] for name in flat.shapes} == {"q_proj", "v_proj"}
    x, y = task.train
    config = LoRARoundsConfig(local_steps=2, batch_size=10, lr=0.1, privacy=side_by_side.privacy_of("none", Scale.FULL), rounds=1)
    history = simulate(FedLoRA(config), flat, Shards(x, y, [range(21), range(21, 42)]), 1, sampler=Independent(1.0))
    assert history.server.x.norm() > 0
    shorter = x[:4][:, -int((x[:4] != base.pad).sum(1).max()) :]
    with torch.no_grad():
        assert torch.allclose(base.eval()(x[:4]), base(shorter), atol=1e-4)  # what fills up on the left does not count
    file.write_text('{"text": "a", "label": "same"}\n' * 20)
    with pytest.raises(UserError, match="expected one each, of two labels at least"):
        texts(model, str(file))
    with pytest.raises(UserError, match=r"--set text=FILE.jsonl"):
        texts("", "")
