"""The study on a user's own model and text, and the verb that cuts a directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from own_model import figures_of, own_model

from fewer.language._shared.model_directory import load_directory
from fewer.language.factor_llm import study as room
from fewer.language.factor_llm.factorization import unfactorize
from fewer.language.factor_llm.loss import experts_of
from fewer.study import Scale


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model directory and a text, as a user has them; the cache in a folder of its own."""
    folder = tmp_path_factory.mktemp("own")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(room.STEPS, Scale.QUICK, 6)
        patch.setitem(room.HELD_OUT, Scale.QUICK, 1024)
        patch.setattr(room, "WIDE", {"hidden_size": 32, "intermediate_size": 64})
        yield own_model(folder, patch) | {"data": ""}


def figures(arm: str, settings: dict[str, Any]) -> dict[Any, Any]:
    return figures_of(room, arm, settings)


def test_arms_run_on_a_users_model_and_text(own: dict[str, Any]) -> None:
    two = ("loss", ("k", 2))
    arms = ("dense", "random-router", "oracle-individual", "oracle-subset", "router-only", "released", "factor-llm", "cfsp")
    found = {arm: figures(arm, own) for arm in arms}
    model, _ = load_directory(Path(own["model"]))
    hidden, layers = model.config.hidden_size, model.config.num_hidden_layers
    halved = found["dense"]["flops",] / 2
    assert found["factor-llm"]["flops",] == halved + layers * 2 * 4 * hidden
    assert found["cfsp"]["flops",] == pytest.approx(halved, rel=0.2)
    assert figures("factor-llm", own)[two] == found["factor-llm"][two]
    assert found["released"]["agreement",] != found["factor-llm"]["agreement",]
    assert 0 <= found["random-router"]["agreement",] <= 1
    assert found["router-only"]["trained",] == layers * 4 * (hidden + 1)
    assert found["factor-llm"]["trained",] - found["released"]["trained",] == found["router-only"]["trained",]
    tuned = {arm: found[arm]["tokens",] for arm in ("router-only", "released", "factor-llm", "cfsp")}
    assert set(tuned.values()) == {6 * room.BATCH * room.WINDOW}
    assert found["random-router"]["writing_share",] > 0
    lighter = figures("factor-llm", own | {"steps": 3, "held_out": 256})
    assert lighter["tokens",] == 3 * room.BATCH * room.WINDOW
    assert lighter[two] != found["factor-llm"][two]


def test_a_directory_is_cut_and_can_be_put_together_again(own: dict[str, Any], tmp_path: Path, fewer: Any) -> None:
    out = tmp_path / "smaller"
    words = ("factorize", own["model"], str(out), "--text", own["text"], "--steps", "3", "--window", "32")
    told = json.loads(fewer(*words, "--json").stdout)
    assert told["tokens"] == 3 * 32
    model, tokenizer = load_directory(out)
    assert [mlp.top_k for mlp in experts_of(model)] == [2] * model.config.num_hidden_layers
    dense, _ = load_directory(Path(own["model"]))
    plain, ids = unfactorize(model), torch.tensor([tokenizer("def first(values):").input_ids])
    assert type(plain) is type(dense)
    torch.testing.assert_close(plain(ids).logits, dense(ids).logits, atol=0.1, rtol=0.1)
    assert "OUT_DIR" in fewer(*words, status=2).stderr
    assert "loss on the text" in fewer(*words, "--overwrite").stdout


def test_what_cannot_be_cut_is_refused_and_nothing_is_written(own: dict[str, Any], tmp_path: Path, fewer: Any) -> None:
    out = tmp_path / "smaller"
    words = ("factorize", own["model"], str(out), "--text", own["text"])
    for more, message in (
        (("--experts", "7"), "expected a divisor"),
        (("--top-k", "5"), "there are 4 experts"),
        (("--window", "100000"), "expected at least 100000"),
    ):
        assert message in " ".join(fewer(*words, *more, status=2).stderr.split())
        assert not out.exists()
    (tmp_path / "empty.txt").write_text("")
    assert "the text has 1 tokens" in fewer("factorize", own["model"], str(out), "--text", str(tmp_path / "empty.txt"), status=2).stderr
    assert not out.exists()
