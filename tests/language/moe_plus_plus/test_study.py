"""The study on a user's own model and text, its claims, and the verb that counts networks by token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from own_model import figures_of, own_model

from fewer.language._shared.model_directory import load_directory
from fewer.language.moe_plus_plus import study as room
from fewer.language.moe_plus_plus.model import MoEPlusPlusConfig, MoEPlusPlusForCausalLM
from fewer.language.moe_plus_plus.router import select
from fewer.study import Scale
from fewer.tasks.language_corpus import read_texts, token_stream


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model directory and a text, as a user has them; the cache in a folder of its own."""
    folder = tmp_path_factory.mktemp("own")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(room.STEPS, Scale.QUICK, 4)
        patch.setattr(room, "WIDE", {"hidden_size": 32, "intermediate_size": 48})
        patch.setattr(room, "TIMED", 64)
        yield own_model(folder, patch)


def figures(arm: str, settings: dict[str, Any]) -> dict[Any, Any]:
    return figures_of(room, arm, settings)


def test_arms_run_on_a_users_model_and_text(own: dict[str, Any]) -> None:
    mine, again, low, vanilla = (figures(arm, own) for arm in ("moe-plus-plus", "moe-plus-plus", "moe-plus-plus-low", "vanilla"))
    assert mine["loss",] == again["loss",] > 0
    assert mine["ffn_training",] <= room.allowed(0.75, 4)
    assert low["ffn_training",] <= room.allowed(0.25, 4)
    assert vanilla["ffn_evaluation",] == 2
    assert vanilla["class_spread",] == 0
    classes = [value for name, value in mine.items() if name[0] == "ffn_of_class"]
    assert len(classes) == 4
    assert mine["class_spread",] == pytest.approx(max(classes) - min(classes))
    assert min(classes) <= mine["ffn_evaluation",] <= max(classes)


def test_room_for_networks_is_the_capacity_s() -> None:
    assert room.allowed(0.75, 4) == pytest.approx(1.3203, abs=5e-5)
    assert room.allowed(0.25, 4) == pytest.approx(0.7344, abs=5e-5)


def test_a_forced_layer_s_logits_are_those_it_is_given() -> None:
    logits = torch.randn(9, 12)
    layer = room.forced_layer(MoEPlusPlusConfig(num_constant=2), hidden_size=16, intermediate_size=24)
    assert torch.equal(layer(torch.randn(9, 16), logits).router_logits, logits)


def test_networks_are_counted_by_token(own: dict[str, Any], tmp_path: Path, fewer: Any) -> None:
    plain, tokenizer = load_directory(Path(own["model"]))
    torch.manual_seed(0)
    words: dict[str, Any] = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    model: Any = MoEPlusPlusForCausalLM(MoEPlusPlusConfig(**words, num_attention_heads=2, num_constant=2)).eval()  # pyright: ignore[reportCallIssue]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("values = '\u65e5\u672c\u8a9e \u00fc'\n" * 40)  # bytes of letters that it never saw: several tokens that print alike
    counted = ("moe-stats", str(tmp_path), "--text", str(text), "--window", "32")
    told = json.loads(fewer(*counted, "--json").stdout)
    tokens = token_stream(tokenizer, read_texts([text]))
    rows = tokens[: told["tokens"]].reshape(-1, 32)
    with torch.no_grad():
        logits = model(input_ids=rows, output_router_logits=True, use_cache=False).router_logits
    networks = sum((select(each, 2) < 8).sum(-1).double() for each in logits) / 2
    assert told["ffn_experts_per_token"] == pytest.approx(networks.mean().item())  # pyright: ignore[reportAttributeAccessIssue]
    alike = [tokenizer.decode([number]) == "\ufffd" for number in rows.flatten().tolist()]
    assert len(set(rows.flatten()[alike].tolist())) > 1
    assert told["by_token"]["\ufffd"] == pytest.approx(networks[alike].mean().item())  # pyright: ignore[reportIndexIssue]
    assert len(fewer(*counted, "--most", "2").stdout.splitlines()) == 5
    assert "expected a MoE++ model" in fewer("moe-stats", own["model"], "--text", own["text"], status=2).stderr
    assert type(plain).__name__ == "LlamaForCausalLM"
