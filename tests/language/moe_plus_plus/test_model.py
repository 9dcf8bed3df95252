"""The language model in its host: save and load, generate, padding, training, and the released layout."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from fewer.language.moe_plus_plus.model import PRESETS, MoEPlusPlusConfig, MoEPlusPlusForCausalLM
from fewer.language.moe_plus_plus.released import load_released

SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_ffn_experts": 4, "num_constant": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3,
}  # fmt: skip
IDS = torch.randint(3, 40, (3, 11), generator=torch.Generator().manual_seed(1))


def make(**words: Any) -> Any:
    torch.manual_seed(0)
    return MoEPlusPlusForCausalLM(MoEPlusPlusConfig(**SIZES | words)).eval()  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("words", [{}, {"router": "mlp", "gating": "released"}, {"moe_layers": [0, 2]}, {"tie_word_embeddings": True}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_what_is_saved_is_loaded_to_the_bit(words: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    model = make(**words).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path)
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert type(again) is MoEPlusPlusForCausalLM
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), again.parameters(), strict=True))
    # a cast model's own angles of rotation are rounded, those of one that is read are not
    if dtype != "bfloat16":
        torch.testing.assert_close(model(IDS).logits, again.eval()(IDS).logits, atol=1e-5, rtol=1e-5)
    layers: Any = again.model.layers
    router = next(layers[0].mlp.router.parameters())
    assert router.dtype == (torch.float64 if dtype == "float64" else torch.float32)


def test_logits_pass_from_mixture_to_mixture_over_dense_layers() -> None:
    model = make(moe_layers=[0, 2])
    assert model.model.layers[0].mlp.router.gate_map is None
    assert model.model.layers[2].mlp.router.gate_map is not None
    seen: list[Any] = []
    model.model.layers[2].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    logits = model(IDS, output_router_logits=True).router_logits
    assert len(logits) == 2
    assert torch.equal(seen[0], logits[0])


def test_writing_with_a_cache_equals_writing_without() -> None:
    model = make()
    words: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    with_cache = model.generate(IDS, attention_mask=torch.ones_like(IDS), use_cache=True, **words)
    assert torch.equal(with_cache, model.generate(IDS, attention_mask=torch.ones_like(IDS), use_cache=False, **words))


def test_left_padding_changes_no_row() -> None:
    model = make().double()
    lengths = (4, 7, 11)
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    for row, length in enumerate(lengths):
        ids[row, : 11 - length], mask[row, : 11 - length] = 0, 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    together = model(ids, attention_mask=mask, position_ids=positions).logits
    for row, length in enumerate(lengths):
        alone = model(IDS[row : row + 1, 11 - length :]).logits
        torch.testing.assert_close(together[row, 11 - length :], alone[0], atol=1e-5, rtol=0)
    words: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    written = model.generate(ids, attention_mask=mask, **words)[:, 11:]
    for row, length in enumerate(lengths):
        assert torch.equal(
            written[row], model.generate(IDS[row : row + 1, 11 - length :], attention_mask=torch.ones(1, length), **words)[0, length:]
        )


def test_padding_counts_in_no_loss() -> None:
    model = make().train()
    model.config.capacity_factor = None
    for layer in model.model.layers:
        layer.mlp.capacity_factor = None
    padded, mask = torch.cat([torch.zeros_like(IDS), IDS], 1), torch.cat([torch.zeros_like(IDS), torch.ones_like(IDS)], 1)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    one, two = model(IDS).aux_loss, model(padded, attention_mask=mask, position_ids=positions).aux_loss
    torch.testing.assert_close(one, two, atol=1e-5, rtol=0)


def test_the_balance_loss_is_added_in_training_and_not_where_text_is_judged() -> None:
    model = make()
    judged = model(IDS, labels=IDS)
    shown = model(IDS, labels=IDS, output_router_logits=True)
    expected = torch.nn.functional.cross_entropy(judged.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    torch.testing.assert_close(judged.loss, expected)
    torch.testing.assert_close(shown.loss, expected + 0.01 * judged.aux_loss)
    trained = model.train()(IDS, labels=IDS)
    token_loss = torch.nn.functional.cross_entropy(trained.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    torch.testing.assert_close(trained.loss, token_loss + 0.01 * trained.aux_loss)


def test_it_learns_with_checkpointed_gradients_as_without() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = make().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(IDS, labels=IDS).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, two in zip(*gradients, strict=True):
        assert one is not None
        torch.testing.assert_close(one, two)


def test_trainer_trains_it(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = make()
    before = model(IDS, labels=IDS).loss.item()
    words: dict[str, Any] = {"report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    arguments = TrainingArguments(str(tmp_path), max_steps=8, learning_rate=1e-2, per_device_train_batch_size=3, **words)
    Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in IDS]).train()  # pyright: ignore[reportArgumentType]
    assert model.eval()(IDS, labels=IDS).loss.item() < before


def test_copies_and_pickles_give_the_same() -> None:
    model = make()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(IDS[:1, :1]).logits, model(IDS[:1, :1]).logits)


def test_weights_of_other_experts_are_refused_by_name(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_ffn_experts": 6}))
    with pytest.raises(ValueError, match=r"disagree about .*model\.layers\.0\.mlp\.experts\.down_proj"):
        MoEPlusPlusForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"router": "mlp"}))
    with pytest.raises(ValueError, match=r"disagree about .*router\.wg"):
        MoEPlusPlusForCausalLM.from_pretrained(tmp_path)


def test_what_would_teach_the_routers_nothing_is_refused() -> None:
    model = make().train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(RuntimeError, match="expected the other kind"):
        model(IDS, labels=IDS)


def test_a_mixture_where_no_layer_is_is_refused() -> None:
    with pytest.raises(ValueError, match="moe_layers has 3; expected numbers from 0 to 2"):
        make(moe_layers=[0, 3])


def test_the_papers_sizes_are_configs() -> None:
    assert [MoEPlusPlusConfig(**dict[str, Any](words)).num_ffn_experts for words in PRESETS.values()] == [8, 16, 32, 16]  # pyright: ignore[reportCallIssue]
    assert (
        MoEPlusPlusConfig(num_ffn_experts=16, hidden_size=8, intermediate_size=8, num_attention_heads=2).mixture(1).num_constant == 2
    )  # 16 // 4 - 1 - 1


# The released layout


def released(model: Any, folder: Path, *, unused_gate_map: bool = True) -> dict[str, Tensor]:
    """Write a model's weights as the released ones are laid out."""
    tensors = {}
    for name, value in model.state_dict().items():
        if ".mlp." not in name:
            tensors[name] = value.clone()
    for number, layer in enumerate(model.model.layers):
        at, mixture = f"model.layers.{number}.mlp", layer.mlp
        for e in range(mixture.num_ffn):
            tensors[f"{at}.experts.experts.{e}.up_proj.weight"] = mixture.experts.up_proj[e].detach().clone()
            tensors[f"{at}.experts.experts.{e}.down_proj.weight"] = mixture.experts.down_proj[e].detach().clone()
        for c in range(mixture.num_constant):
            tensors[f"{at}.experts.experts.{mixture.num_ffn + c}.constant"] = mixture.constants.constant[c].detach().clone()
            tensors[f"{at}.experts.experts.{mixture.num_ffn + c}.wg.weight"] = mixture.constants.wg[c].detach().clone()
        tensors[f"{at}.gate.wg.0.weight"] = mixture.router.wg[0].weight.detach().clone()
        tensors[f"{at}.gate.wg.2.weight"] = mixture.router.wg[2].weight.detach().clone()
        if mixture.router.gate_map is not None:
            tensors[f"{at}.gate.gate_map.weight"] = mixture.router.gate_map.weight.detach().clone()
        elif unused_gate_map:
            tensors[f"{at}.gate.gate_map.weight"] = torch.randn(8, 8)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(
        json.dumps({name: value for name, value in SIZES.items() if "num_c" not in name and "num_ffn" not in name})
    )
    return tensors


def test_the_released_layout_is_read_whole(tmp_path: Path) -> None:
    model = make(router="mlp", gating="released")
    released(model, tmp_path)
    again = load_released(tmp_path)
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_a_tensor_beside_the_released_layout_is_refused(tmp_path: Path) -> None:
    tensors = released(make(router="mlp", gating="released"), tmp_path)
    save_file(tensors | {"model.layers.0.mlp.gate.bias": torch.zeros(8)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.gate\.bias"):
        load_released(tmp_path)
    del tensors["model.layers.1.mlp.experts.experts.0.down_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"unlike the first layer's: 1\.0"):
        load_released(tmp_path)
