"""The study on a user's own model and text, its claims, the verb, and what is looked at in the casts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from own_model import figures_of, own_model

from fewer.lowbit.fp4_training import FP4Recipe, convert
from fewer.lowbit.fp4_training import study as room
from fewer.lowbit.fp4_training.problems import exactly, four_bit_layers, gradient_cosine, lost_shares, model_overhead, multiply_gradients
from fewer.study import Results, Scale, judge
from fewer.study.results import Row
from fewer.tasks import micro_lm


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model directory and a text, as a user has them; the cache in a folder of its own."""
    folder = tmp_path_factory.mktemp("own")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(room.STEPS, Scale.QUICK, 4)
        patch.setattr(room, "DIGITS_SEEDS", 1)
        patch.setattr("fewer.lowbit._shared.digit_classifier.STEPS", 10)
        yield own_model(folder, patch, times=600)


def figures(arm: str, settings: dict[str, Any]) -> dict[Any, Any]:
    return figures_of(room, arm, settings)


def test_arms_run_on_a_users_model_and_text(own: dict[str, Any]) -> None:
    exact, naive, again, random = (figures(arm, own) for arm in ("fp32", "nvfp4-nearest", "nvfp4-nearest", "nvfp4-hadamard"))
    assert naive["loss",] == again["loss",]
    assert len({each["loss",] for each in (exact, naive, random)}) == 3
    assert exact["overhead",] == 0 < naive["overhead",] < random["overhead",]
    assert naive["kept_bytes",] < 0.16 * exact["kept_bytes",]
    assert 0.5 < naive["cosine", ("step", 4)] <= 1
    assert {name[1][1] for name in naive if name[0] == "underflow"} == {
        "X", "W", "dY", "X transposed", "W transposed", "dY transposed",
    }  # fmt: skip


def test_further_arms_wait_for_full_scale(own: dict[str, Any]) -> None:
    assert all(not figures(arm, own) for arm in room.FULL_ARMS)
    model = micro_lm()
    multiply_gradients(model, FP4Recipe.preset("nvfp4").replace(estimator="dge"))
    ids = torch.arange(64)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    plain = micro_lm()
    plain(input_ids=ids, labels=ids).loss.backward()
    share = model.model.layers[0].mlp.up_proj.weight.grad / plain.model.layers[0].mlp.up_proj.weight.grad
    assert 0 <= share.min() < 0.3 < 2.9 < share.max() <= 3.001


def test_looking_changes_nothing_and_an_exact_gradient_has_cosine_one() -> None:
    model, ids = micro_lm(), torch.arange(64).reshape(2, 32)
    convert(model, FP4Recipe.preset("nvfp4"))
    model.train()
    assert 0.1 < gradient_cosine(model, ids) < 0.9999
    assert {layer.steps for layer in four_bit_layers(model).values()} == {0}
    with exactly(model):
        assert gradient_cosine(model, ids) == pytest.approx(1.0, abs=1e-6)
    assert all(layer.recipe.casts for layer in four_bit_layers(model).values())
    shares = lost_shares(model, ids)
    assert all(0 <= share <= 1 for pair in shares.values() for share in pair)
    assert model.model.layers[0].mlp.up_proj.weight.grad is None
    assert {layer.steps for layer in four_bit_layers(model).values()} == {0}
    assert model_overhead(micro_lm(), 64) == 0


GOOD = {
    "fp32": 5.0, "nvfp4-nearest": 5.15, "nvfp4": 5.05, "nvfp4-hadamard": 5.03, "nvfp4-dge": 5.06, "e4m3-unscaled": 6.0,
    "ue5m3-unscaled": 5.2, "mxfp4": 5.12, "ue5m3": 5.07,
}  # fmt: skip
TURNED = [  # what makes a claim fail
    (0, {"e4m3-unscaled": 5.5}),
    (0, {"ue5m3-unscaled": 5.4}),
    (1, {"nvfp4": 5.14}),
    (2, {"nvfp4": 5.2}),
    (3, {"ue5m3": 5.2}),
    (4, {"nvfp4-hadamard": 5.09}),
]


def results(losses: dict[str, float]) -> Results:
    costs = {arm: 0.01 * place for place, arm in enumerate(GOOD)} | {"nvfp4-hadamard": 0.09, "nvfp4-dge": 0.05}
    rows = []
    for arm, loss in losses.items():
        for seed in range(3):
            values = {"loss": loss + 0.002 * seed, "overhead": costs[arm], "kept_bytes": 100.0}
            rows += [Row(arm, seed, figure, {}, value) for figure, value in values.items()]
    return Results(rows, list(room.study.arms))


def outcomes(losses: dict[str, float]) -> list[str]:
    return [verdict.verdict for verdict in judge(room.study, results(losses))]


def test_every_claim_holds_on_good_figures_and_fails_on_its_bad_ones() -> None:
    assert outcomes(GOOD) == ["holds"] * 5 + ["not testable here"] * 2
    for claim, change in TURNED:
        found = outcomes(GOOD | change)
        assert found[claim] == "fails", (claim, change, found)
    assert "Of that gap" in room.study.summarise(results(GOOD))


def test_the_verb_tries_recipes_on_a_users_model(own: dict[str, Any], fewer: Any) -> None:
    words = ("fp4-plan", own["model"], "--text", own["text"], "--steps", "3", "--batch", "2", "--window", "32", "--recipe", "paper")
    before = {file.name: file.stat().st_mtime for file in Path(own["model"]).iterdir()}
    found = json.loads(fewer(*words, "--json").stdout)
    assert list(found) == ["fp32", "nvfp4-nearest", "paper"]
    assert found["fp32"]["gap"] == 0 == found["fp32"]["overhead"] < found["paper"]["overhead"]
    told = fewer(*words).stdout.splitlines()
    assert told[0].split() == ["recipe", "loss", "gap", "gain", "overhead"]
    assert len(told) == 5
    assert {file.name: file.stat().st_mtime for file in Path(own["model"]).iterdir()} == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("--recipe", "nvfp"), "--recipe is 'nvfp'; expected one of"),
        (("--steps", "0"), "0"),
        (("--window", "4000000"), "expected at least 4000000, one window"),
    ],
)
def test_the_verb_refuses_in_one_line(own: dict[str, Any], fewer: Any, change: tuple[str, ...], said: str) -> None:
    done = fewer("fp4-plan", own["model"], "--text", own["text"], *change, status=2)
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_no_model_directory_is_told(own: dict[str, Any], fewer: Any, tmp_path: Path) -> None:
    assert "is no model directory" in fewer("fp4-plan", str(tmp_path), "--text", own["text"], status=2).stderr


def test_a_model_without_linear_layers_is_told(own: dict[str, Any], fewer: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    tokenizer = AutoTokenizer.from_pretrained(own["model"])
    tokenizer.save_pretrained(tmp_path / "gpt2")
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=1, n_head=2)).save_pretrained(
        tmp_path / "gpt2"
    )
    done = fewer("fp4-plan", str(tmp_path / "gpt2"), "--text", own["text"], "--steps", "1", "--window", "32", status=2)
    assert "has no linear layer to convert" in done.stderr
    assert "Traceback" not in done.stderr


def test_races_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from fewer.lowbit.fp4_training import bench

    monkeypatch.setattr(bench, "M", 32)
    for race in (bench.nearest, bench.rotated, bench.against_int8):
        for work in race():
            work()
    ours, theirs = bench.kept()
    assert ours < 0.16 * theirs
