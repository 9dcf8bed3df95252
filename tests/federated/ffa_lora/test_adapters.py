"""A from a seed, the fingerprint, the gap of averaging, the energies of noise, and peft's own merging."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from adapted import WIDTH, drawn, lora, net
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from fewer.federated import FlatModel, adapter_fingerprint, aggregation_gap, freeze_a, noise_energy
from fewer.federated.ffa_lora.adapters import adapter_vectors, agreement, draw_a, lora_layers
from house import command_environment


def clients(flat, count=3):
    return [drawn(flat, seed) for seed in range(count)]


def test_no_gap_where_a_is_shared():
    flat = FlatModel(lora())
    gaps = aggregation_gap(flat, clients(flat))
    assert list(gaps) == ["base_model.model.0.default", "base_model.model.2.default"]
    assert max(gaps.values()) <= 1e-6
    assert max(aggregation_gap(flat, [torch.zeros(flat.size)] * 2).values()) == 0  # nothing to lose


def test_loras_gap_is_the_covariance_of_the_factors():
    flat = FlatModel(lora(net(torch.float64), frozen=False))
    sent = clients(flat)
    for layer, gap in aggregation_gap(flat, sent).items():
        a, b = (torch.stack([adapter_vectors(flat, vector)[layer][which] for vector in sent]) for which in (0, 1))
        covariance = ((b - b.mean(0)) @ (a - a.mean(0))).mean(0)
        assert gap == pytest.approx(float(covariance.norm() / (b @ a).mean(0).norm()), abs=1e-10)
        assert gap > 1e-3
    with pytest.raises(ValueError, match="no client_vectors were given; expected"):
        aggregation_gap(flat, [])


def test_the_energies_are_those_of_drawn_noise():
    """20,000 draws of the noise of one step on both factors."""
    generator = torch.Generator().manual_seed(0)
    A, B, t, draws = torch.randn(3, 7, generator=generator), torch.randn(5, 3, generator=generator), 0.4, 20_000
    xi_a = t * torch.randn(draws, 3, 7, generator=generator)
    xi_b = t * torch.randn(draws, 5, 3, generator=generator)
    first, second, third = noise_energy(A, B, t)

    def energy(change):
        return float(change.square().sum((1, 2)).mean())

    assert energy(xi_b @ A + B @ xi_a + xi_b @ xi_a) == pytest.approx(first + second + third, rel=0.03)
    assert energy(xi_b @ A) == pytest.approx(first, rel=0.03)
    assert energy(B @ xi_a) == pytest.approx(second, rel=0.03)
    assert energy(xi_b @ xi_a) == pytest.approx(third, rel=0.03)
    with pytest.raises(ValueError, match="of one rank"):
        noise_energy(A, B[:, :2], t)


def test_a_is_uniform_b_zero_and_a_frozen():
    model = lora(rank=8)
    for _, a, b in lora_layers(model):
        assert not a.requires_grad
        assert b.requires_grad
        assert b.abs().max() == 0
        bound = WIDTH**-0.5
        assert 0.9 * bound < a.abs().max() <= bound
        assert a.var() == pytest.approx(bound**2 / 3, rel=0.2)
    x = torch.randn(5, WIDTH)
    assert torch.allclose(model(x), net()(x))


def test_orthonormal_rows_are_orthonormal():
    for _, a, _ in lora_layers(lora(init="orthonormal")):
        assert torch.allclose(a @ a.T, torch.eye(4), atol=1e-6)
    with pytest.raises(ValueError, match="rank 32 and 16 inputs"):
        lora(rank=32, init="orthonormal")


def test_a_is_the_same_in_another_process_and_for_any_order_of_layers():
    here = {name: a.detach() for name, a, _ in lora_layers(lora(seed=4))}
    code = (
        f"from fewer.federated.ffa_lora.adapters import draw_a; print([draw_a((4, {WIDTH}), 4, n).numpy().tobytes() for n in {list(here)}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=command_environment(Path()), check=False)
    assert done.stdout.strip() == str([a.numpy().tobytes() for a in here.values()]), done.stderr
    for name, a, _ in lora_layers(lora(seed=4, targets=("2", "0"))):
        assert torch.equal(a, here[name])
    for (name, a), (other, b) in itertools.combinations(here.items(), 2):
        assert not torch.equal(a, b), (name, other)
    for name, a, _ in lora_layers(lora(seed=5)):
        assert not torch.equal(a, here[name])
    torch.manual_seed(7)
    before = torch.get_rng_state()
    assert torch.equal(draw_a((4, WIDTH), 4, next(iter(here))), next(iter(here.values())))
    assert torch.equal(torch.get_rng_state(), before)  # nobody else's random numbers are taken


def test_the_fingerprint_tells_a_seed_a_rank_and_a_base_but_not_b():
    plain = adapter_fingerprint(lora())
    trained = lora()
    with torch.no_grad():
        for _, _, b in lora_layers(trained):
            b.normal_()
    others = [lora(seed=1), lora(rank=3), lora(targets=("2",)), lora(nn.Sequential(*net(), nn.Linear(3, 3)))]
    assert adapter_fingerprint(trained) == plain
    assert adapter_fingerprint(copy.deepcopy(lora())) == plain
    assert len({plain, *map(adapter_fingerprint, others)}) == 5
    assert next(iter(agreement(lora()))) == "adapter fingerprint"
    assert agreement(lora())["layer base_model.model.0.default"].startswith("rank 4, (4, 16) to (16, 4), A ")


def test_merged_weights_give_the_adapters_logits_and_are_saved_by_peft(tmp_path):
    model = lora()
    flat = FlatModel(model)
    model.load_state_dict(flat.named(drawn(flat)), strict=False)
    x = torch.randn(9, WIDTH)
    expected = model(x).detach()
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(net(), str(tmp_path))
    assert torch.allclose(again(x), expected, atol=1e-6)  # A is in the file
    assert (expected - net()(x)).abs().max() > 0.05
    assert torch.allclose(model.merge_and_unload()(x), expected, atol=1e-5)


def test_convolutions_are_adapted_too():
    base = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.Flatten(), nn.Linear(6 * 16, 3))
    model = freeze_a(get_peft_model(base, LoraConfig(r=2, target_modules=["0"])))
    flat = FlatModel(model)
    assert flat.size == 2 * 6
    assert max(aggregation_gap(flat, clients(flat)).values()) <= 1e-6


def test_what_cannot_be_frozen_is_refused():
    with pytest.raises(ValueError, match=r"no layer has lora_A \(the model's modules are Linear, ReLU, Sequential\); expected"):
        freeze_a(net())
    embedding = get_peft_model(nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2)), LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match=r"layer 'base_model.model.0' adapts an embedding; expected"):
        freeze_a(embedding)
    moved = get_peft_model(net(), LoraConfig(r=2, target_modules=["0"], init_lora_weights="pissa"))
    with pytest.raises(ValueError, match="init_lora_weights='pissa', which moves weight into A; expected"):
        freeze_a(moved)
    with pytest.raises(ValueError, match="init is 'kaimin'; expected one of kaiming, orthonormal"):
        lora(init="kaimin")


def test_a_head_that_trains_is_told_with_its_share():
    with pytest.warns(UserWarning, match=r"modules_to_save.* and 1 more parameters train beside lora_B and are 28 % of the bytes") as told:
        lora(modules_to_save=["4"])
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora()
