"""Cutting and putting together: nothing is lost, whatever the partition; what is saved is read back, also where this library is not."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from factor_models import IDS, MADE, make
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
)

from fewer.language._shared.feed_forward import parts_of
from fewer.language.factor_llm.factorization import balanced_clusters, factorize, groups_of, unfactorize
from fewer.language.factor_llm.model import FactorizedMLP, FactorLlamaForCausalLM
from fewer.meters import count_flops

PARTITIONS = ["contiguous", "random", "cluster"]


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.float64, 1e-11)])
def test_the_experts_of_a_network_sum_to_it(partition: Any, dtype: torch.dtype, close: float) -> None:
    dense = make().to(dtype)
    model = factorize(copy.deepcopy(dense), 4, 2, partition)
    x = torch.randn(7, 16, dtype=dtype)
    for layer, plain in zip(model.model.layers, dense.model.layers, strict=True):
        whole = torch.stack([layer.mlp.expert(number, x) for number in range(4)]).sum(0)
        torch.testing.assert_close(whole, plain.mlp(x), atol=close, rtol=close)


@pytest.mark.parametrize("partition", PARTITIONS)
def test_with_all_experts_the_model_is_the_dense_one(partition: Any) -> None:
    dense = make()
    model = factorize(copy.deepcopy(dense), 4, 4, partition)
    for layer in model.model.layers:
        layer.mlp.router.weight.data.fill_(float("nan"))  # nobody asks it
        layer.mlp.route = None
    torch.testing.assert_close(model(IDS).logits, dense(IDS).logits, atol=1e-4, rtol=0)
    words: dict[str, Any] = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(model.generate(IDS, **words), dense.generate(IDS, **words))


@pytest.mark.parametrize("family", list(MADE))
@pytest.mark.parametrize("partition", PARTITIONS)
def test_what_is_put_together_again_has_every_bit(family: str, partition: Any) -> None:
    dense = make(family)
    model = unfactorize(factorize(copy.deepcopy(dense), 4, 2, partition, seed=3))
    assert type(model) is type(dense)
    assert type(model.config) is type(dense.config)
    assert model.config.to_dict() == dense.config.to_dict()
    one, two = model.state_dict(), dense.state_dict()
    assert list(one) == list(two)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_clusters_are_of_equal_size_and_closer_than_chance() -> None:
    draw = torch.Generator().manual_seed(0)
    rows = nn.functional.normalize(torch.randn(48, 16, generator=draw) + 3 * torch.randn(4, 16, generator=draw).repeat(12, 1), dim=-1)

    def cosine(groups: Tensor) -> float:
        return float(torch.stack([(rows[group] @ rows[group].T).mean() for group in groups]).mean())

    clusters, chance = (groups_of(rows, 4, partition, draw) for partition in ("cluster", "random"))  # pyright: ignore[reportArgumentType]
    for groups in (clusters, chance):
        assert groups.shape == (4, 12)
        assert groups.flatten().sort().values.tolist() == list(range(48))
    assert cosine(clusters) > cosine(chance) + 0.1


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), groups=st.sampled_from([2, 3, 4]), size=st.integers(1, 8))
def test_clusters_hold_every_row_once(seed: int, groups: int, size: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    found = balanced_clusters(torch.randn(groups * size, 5, generator=draw), groups, draw)
    assert found.shape == (groups, size)
    assert found.flatten().sort().values.tolist() == list(range(groups * size))


def masked(mlp: FactorizedMLP, x: Tensor) -> Tensor:
    """Everything computed, then masked and scaled."""
    chosen = torch.zeros(len(x), mlp.num_experts, dtype=torch.bool).scatter(1, mlp.route(x), True)
    return mlp.num_experts / mlp.top_k * sum(chosen[:, number, None] * mlp.expert(number, x) for number in range(mlp.num_experts))


@pytest.mark.parametrize(("experts", "top_k"), [(4, 1), (4, 2), (4, 3), (6, 4), (2, 1)])
@pytest.mark.parametrize("tokens", [1, 9])
def test_only_the_chosen_are_computed_and_it_is_what_a_mask_would_give(experts: int, top_k: int, tokens: int) -> None:
    mlp = factorize(make(), experts, top_k).model.layers[0].mlp
    x = torch.randn(tokens, 16)
    torch.testing.assert_close(mlp(x), masked(mlp, x), atol=1e-5, rtol=1e-5)
    seen: list[int] = []
    whole, chosen = mlp.expert, mlp.route(x)
    mlp.expert = lambda number, rows: (seen.append(rows.numel() // 16), whole(number, rows))[1]
    mlp(x)
    assert sum(seen) == tokens * top_k
    if tokens > 1:
        assert seen == [(chosen == number).any(-1).sum().item() for number in range(experts)]


def test_operations_are_k_over_n_of_the_dense_ones_and_the_router() -> None:
    dense = make()
    model, x = factorize(copy.deepcopy(dense), 4, 2), torch.randn(13, 16)
    totals = []
    for each in (model, dense):
        with count_flops() as flops, torch.no_grad():
            each.model.layers[0].mlp(x)
        totals.append(flops.total)
    assert totals[0] == totals[1] / 2 + 2 * 16 * 4 * 13


def test_neither_padding_nor_the_batch_change_a_row() -> None:
    model = factorize(make(), 4, 2)
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[0, :5], mask[0, :5] = 0, 0
    together = model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0)).logits
    torch.testing.assert_close(together[0, 5:], model(IDS[:1, 5:]).logits[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together[1], model(IDS[1:2]).logits[0], atol=1e-5, rtol=1e-5)
    words: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(model.generate(IDS, use_cache=True, **words), model.generate(IDS, use_cache=False, **words))


@pytest.mark.parametrize("family", list(MADE))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_saved_is_read_back_and_put_together(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    dense = make(family).to(dtype)
    model = factorize(copy.deepcopy(dense), 4, 2, "random", layers=[0, 2])
    model.save_pretrained(tmp_path)
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert type(again) is type(model)
    assert all(torch.equal(one, two) for one, two in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    plain = unfactorize(again)
    assert all(torch.equal(two, plain.state_dict()[name]) for name, two in dense.state_dict().items())


def test_it_is_read_where_this_library_is_not(tmp_path: Path) -> None:
    model = factorize(make(), 4, 2)
    model.save_pretrained(tmp_path / "model")
    code = (
        "import sys; sys.modules['fewer'] = None\n"
        "import torch; from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained('model', trust_remote_code=True).eval()\n"
        "print(model(torch.arange(3, 9)[None]).logits.double().sum().item())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=None)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(model(torch.arange(3, 9)[None]).logits.double().sum().item(), rel=1e-5)


def test_copies_and_pickles_give_the_same() -> None:
    model = factorize(make(), 4, 2)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(IDS[:1, :1]).logits, model(IDS[:1, :1]).logits)
    mlp, strided = model.model.layers[0].mlp, torch.randn(16, 5).T
    torch.testing.assert_close(mlp(strided), mlp(strided.contiguous()))


def test_layers_that_are_left_out_stay_dense() -> None:
    model = factorize(make(), 4, 2, layers=[1])
    assert [isinstance(layer.mlp, FactorizedMLP) for layer in model.model.layers] == [False, True, False]
    assert isinstance(model, FactorLlamaForCausalLM)
    assert len(parts_of(model.model.layers[0])) == 3


BAD: list[tuple[dict[str, Any], str]] = [
    ({"num_experts": 5}, "intermediate_size is 24 and num_experts 5; expected a divisor of 24"),
    ({"top_k": 0}, "top_k is 0; expected a whole number of at least 1"),
    ({"top_k": 5}, "top_k is 5 and there are 4 experts"),
    ({"num_experts": 1, "top_k": 1}, "num_experts is 1; expected a whole number of at least 2"),
    ({"layers": [0, 3]}, r"layers are \[0, 3\]; expected numbers from 0 to 2"),
    ({"layers": []}, r"layers are \[\]"),
    ({"partition": "sorted"}, "partition is 'sorted'; expected one of contiguous, random, cluster"),
]


@pytest.mark.parametrize(("words", "message"), BAD)
def test_what_does_not_fit_is_refused_and_nothing_is_cut(words: dict[str, Any], message: str) -> None:
    model = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        factorize(model, **words)
    assert type(model) is LlamaForCausalLM
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_models_that_cannot_be_cut_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="is factorised already"):
        factorize(factorize(make()))
    with pytest.raises(ValueError, match="LlamaForCausalLM is not factorised"):
        unfactorize(make())
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel has no `model\.layers`"):
        factorize(GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16)))
    with pytest.raises(ValueError, match="has biases"):
        factorize(make(mlp_bias=True))
    quantised = make()
    quantised.model.layers[0].mlp.gate_proj = torch.ao.nn.quantized.dynamic.Linear(16, 24)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TypeError, match="load the model without quantisation"):
        factorize(quantised)
