"""The study on a user's own model and text, its claims, and the verb."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from own_model import events_of, own_model
from typer.testing import CliRunner

from fewer.language import SPTModel
from fewer.language._shared.model_directory import load_directory
from fewer.language.spt import study as room
from fewer.language.spt.command import app
from fewer.study import Results, Scale, judge
from fewer.study.results import Row

TEXT = "import os\n\ndef first(values):\n    return values[0]\n"
ARMS = ("lora", "lora-fused", "spt-ffn", "spt-attention", "spt", "oracle")


@pytest.fixture(scope="module")
def own(tmp_path_factory: Any) -> Any:
    """A model directory and a text, as a user has them; the cache in a folder of its own."""
    folder = tmp_path_factory.mktemp("own")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(room.STEPS, Scale.QUICK, 2)
        patch.setattr(room, "WINDOW", 64)
        patch.setattr(room, "LENGTHS", (64, 128))
        patch.setattr(room, "RANK", 2)
        patch.setattr(room, "BOOK_STEPS", 3)
        patch.setattr(room, "HELD_OUT", 256)
        patch.setattr(room, "SHAPES", room.Shapes(32, 64, 2, 16, 64))
        own_model(folder, patch, TEXT)
        yield folder


def figures(arm: str, folder: Path, **more: int) -> list[Row]:
    """What a trial logs."""
    settings = more | {"model": str(folder / "model"), "text": str(folder / "notes.txt"), "data": ""}
    return [Row(arm, 0, event.name, event.coordinates, event.value) for event in events_of(room, arm, settings)]


def test_arms_run_on_a_users_model_and_every_claim_has_its_figures(own: Path) -> None:
    rows = [row for arm in ARMS for row in figures(arm, own)]
    results = Results(rows, ARMS)
    assert {each.verdict for each in judge(room.study, results)} <= {"holds", "fails", "undecided"}
    said = room.summary(results)
    assert "of fused attention's" in said
    for ratio, even in ((0.9, "at 64, 128 tokens."), (1.1, "at none of these lengths.")):
        planted = [Row(row.arm, 0, row.figure, row.coordinates, ratio) if row.figure == "attention_ratio" else row for row in rows]
        assert f"it is quicker {even}" in room.summary(Results(planted, ARMS))
    assert results.mean("bytes", "spt").value < results.mean("bytes", "lora").value
    assert results.mean("mass", "oracle").value > results.mean("mass", "spt-attention").value
    lighter = Results(figures("lora-fused", own, steps=1, held_out=64), ARMS)
    assert len(lighter.curve("training_loss", "lora-fused")) == 1
    assert lighter.mean("loss", "lora-fused").value != results.mean("loss", "lora-fused").value
    again = Results(figures("spt", own), ARMS)
    assert all(again.mean(name, "spt").value == results.mean(name, "spt").value for name in ("loss", "recall", "mass", "load"))


def test_the_verb_trains_an_adapter_that_reads_back(own: Path, tmp_path: Path) -> None:
    words = [own / "model", tmp_path / "adapter", "--text", own / "notes.txt", "--steps", 3, "--batch", 1, "--window", 32, "--rank", 2]
    done = CliRunner().invoke(app, ["train", *map(str, words), "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    assert len(json.loads(done.output)["losses"]) == 3
    made = SPTModel.from_pretrained(load_directory(own / "model", "float32")[0], tmp_path / "adapter")
    assert made.spt_config.lora_r == 2
    again = CliRunner().invoke(app, ["train", *map(str, words)])
    assert isinstance(again.exception, FileExistsError)
