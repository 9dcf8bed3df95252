"""Fine-tuning against closed forms, the pairings, and what is kept of it."""

from __future__ import annotations

import copy
import json
import math
import pickle
import warnings

import pytest
import torch
from flow_fields import Linear, bytes_of
from torch import nn

from fewer.diffusion.flow_mle import (
    ContractingResidual,
    FineTuneConfig,
    ReconstructionMLE,
    ResidualField,
    VelocityMLP,
    finetune,
    flow_matching_loss,
    invert,
    load_finetuned,
    odeint,
)

FEW = FineTuneConfig(updates=5, batch=8)


def small(dim=4, cond_dim=0, seed=0):
    torch.manual_seed(seed)
    return VelocityMLP(dim, cond_dim, 16)


def test_the_loss_of_a_linear_field_and_its_gradient_are_the_closed_form():
    A = (0.3 * torch.randn(3, 3)).double()
    field, x0, x1, K = Linear(A), torch.randn(20, 3).double(), torch.randn(20, 3).double(), 5
    step = torch.eye(3).double() + A / K
    power = [torch.linalg.matrix_power(step, j) for j in range(K + 1)]
    error = x0 @ power[K].T - x1
    loss = ReconstructionMLE(K)(field, x0, x1)
    assert abs(float(loss - error.square().mean())) < 1e-10
    loss.backward()
    outer = 2 / error.numel() * error.T @ x0  # d loss / d (I + A / K)^K
    by_hand = sum(power[j].T @ outer @ power[K - 1 - j].T for j in range(K)) / K
    assert torch.allclose(field.A.grad, by_hand, atol=1e-10, rtol=0)


def test_a_learned_sigma_is_the_likelihoods_and_the_anchor_is_flow_matching():
    field, x0, x1 = Linear(torch.eye(2).double()), torch.randn(9, 2).double(), torch.randn(9, 2).double()
    mse = float(ReconstructionMLE(3)(field, x0, x1))
    learned = ReconstructionMLE(3, sigma="learned").double()
    learned.log_sigma.data.fill_(0.7)
    likelihood = torch.distributions.Normal(odeint(field, x0, 3), math.exp(0.7)).log_prob(x1).mean() + 0.5 * math.log(2 * math.pi)
    assert float(learned(field, x0, x1)) == pytest.approx(-float(likelihood))
    anchored = float(ReconstructionMLE(3, fm_weight=0.1)(field, x0, x1, generator=torch.Generator().manual_seed(1)))
    draw = torch.Generator().manual_seed(1)
    fresh, t = torch.randn(9, 2, generator=draw, dtype=torch.float64), torch.rand(9, generator=draw, dtype=torch.float64)
    assert anchored == pytest.approx(mse + 0.1 * float(flow_matching_loss(field, fresh, x1, t)))


def test_fine_tuning_a_linear_flow_drives_its_euler_map_to_the_exact_one():
    A = torch.tensor([[-0.5, 1.0], [-1.0, 0.2]]).double()
    field, K = Linear(A), 2
    data = torch.randn(256, 2).double() @ torch.linalg.matrix_exp(A).T
    made = finetune(field, data, steps=K, config=FineTuneConfig(updates=600, lr=0.02, ema=0.9))
    euler = torch.linalg.matrix_power(torch.eye(2) + made.field.A.detach() / K, K)
    exact = torch.linalg.matrix_exp(A)
    before = torch.linalg.matrix_power(torch.eye(2) + A / K, K)
    assert float((euler - exact).norm()) < 0.01 < 0.3 < float((before - exact).norm())
    assert torch.equal(field.A, A)
    assert field.A.requires_grad


def test_one_step_is_plain_regression():
    field, x0, x1 = small(), torch.randn(10, 4), torch.randn(10, 4)
    regression = (field(torch.zeros(10), x0) - (x1 - x0)).square().mean()
    assert torch.allclose(ReconstructionMLE(1)(field, x0, x1), regression, atol=1e-6)


def test_step_0_of_a_residual_is_the_base_bit_for_bit():
    base, x = small(), torch.randn(10, 4)
    for residual in (VelocityMLP(4, 0, 8, residual=True), ContractingResidual(4, 8, 1.0, gate=0.0)):
        assert torch.equal(odeint(ResidualField(base, residual), x, 3), odeint(base, x, 3))


@pytest.mark.parametrize("mode", ["residual", "contracting"])
@pytest.mark.parametrize("cond_dim", [0, 2])
def test_the_base_is_unchanged_and_adapters_come_back_from_disk(mode, cond_dim, tmp_path):
    base, x1 = small(cond_dim=cond_dim), torch.randn(40, 4)
    cond = torch.randn(40, 2) if cond_dim else None
    before, grads = bytes_of(base), [each.requires_grad for each in base.parameters()]
    made = finetune(base, x1 if cond is None else (x1, cond), steps=2, mode=mode, config=FEW)
    inside = made.field.base
    assert all(torch.equal(before[name], value) for name, value in base.state_dict().items())
    assert all(torch.equal(before[name], value) for name, value in inside.state_dict().items())
    assert all(each.grad is None for each in (*base.parameters(), *inside.parameters()))
    assert [each.requires_grad for each in base.parameters()] == grads
    made.save(tmp_path / "adapter")
    assert sum(1 for _ in (tmp_path / "adapter").iterdir()) == 3
    again = load_finetuned(tmp_path / "adapter", base)
    x0 = torch.randn(7, 4)
    given = None if cond is None else cond[:7]
    assert torch.equal(again.sample(x0, given), made.sample(x0, given))
    assert (again.steps, again.report) == (2, json.loads(json.dumps(made.report)))
    merged = ResidualField(small(cond_dim=cond_dim, seed=1), copy.deepcopy(made.adapter))
    merged.load_state_dict(made.field.state_dict())
    assert torch.equal(odeint(merged, x0, 2, cond=given), made.sample(x0, given))
    assert torch.equal(pickle.loads(pickle.dumps(made.field))(torch.zeros(7), x0, given), made.field(torch.zeros(7), x0, given))
    with pytest.raises(ValueError, match="is an adapter of the base .* expected the weights it was trained on"):
        load_finetuned(tmp_path / "adapter", small(cond_dim=cond_dim, seed=1))


def test_a_whole_field_and_an_own_residual_come_back_from_disk(tmp_path):
    base, data, x0 = small(), torch.randn(30, 4), torch.randn(5, 4)
    made = finetune(base, data, steps=3, config=FEW)
    made.save(tmp_path / "field")
    assert torch.equal(load_finetuned(tmp_path / "field", small(seed=3)).sample(x0), made.sample(x0))
    own = Linear(torch.zeros(4, 4))
    made = finetune(base, data, steps=3, mode="residual", residual=own, config=FEW)
    assert not torch.equal(made.adapter.A, own.A)
    assert torch.equal(own.A, torch.zeros(4, 4))
    made.save(tmp_path / "own")
    with pytest.raises(ValueError, match="expected residual=, a module of its shape"):
        load_finetuned(tmp_path / "own", base)
    assert torch.equal(load_finetuned(tmp_path / "own", base, own).sample(x0), made.sample(x0))
    with pytest.raises(ValueError, match="does not fit this"):
        load_finetuned(tmp_path / "own", base, nn.Linear(4, 4))
    with pytest.raises(FileExistsError):
        made.save(tmp_path / "own")


@pytest.mark.parametrize("mode", ["full", "residual"])
def test_fields_with_counters_and_in_float64_come_back_from_disk(mode, tmp_path):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros((), dtype=torch.int64))
            self.net = small().double()

        def forward(self, t, x):
            return self.net(t, x)

    base, data = Counting(), torch.randn(16, 4).double()
    made = finetune(base, data, steps=2, mode=mode, config=FEW)
    made.save(tmp_path / "made")
    assert torch.equal(load_finetuned(tmp_path / "made", base).sample(data), made.sample(data))
    net = small().double()
    with torch.no_grad():
        net.layers[0].weight.add_(1e-12)
    net.save_pretrained(tmp_path / "net")
    assert torch.equal(VelocityMLP.from_pretrained(tmp_path / "net")(torch.zeros(16).double(), data), net(torch.zeros(16).double(), data))


def test_random_pairs_of_two_points_go_to_their_mean_and_inverted_ones_keep_both():
    """A flow that is exact but for its solver: two points at -1 and 1, reached by a field that is steep near the middle."""

    class TwoPoints(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = VelocityMLP(1, width=32)

        def forward(self, t, x):
            s = (1 - t)[:, None].clamp(min=0.05)
            return (torch.tanh(t[:, None] * x / s**2) - x) / s + self.net(t, x)

    torch.manual_seed(0)
    field, data = TwoPoints(), torch.tensor([[-1.0], [1.0]]).repeat(100, 1)
    with torch.no_grad():
        field.net.layers[-1].weight.zero_()
        field.net.layers[-1].bias.zero_()
    noise = torch.randn(400, 1)
    data = odeint(field, torch.randn(200, 1), 100, method="rk4").detach()  # about -1 and 1
    config, ends = FineTuneConfig(updates=300, lr=5e-3, batch=200), {}
    for pairing in ("random", "invert"):
        made = finetune(field, data, steps=1, pairing=pairing, force=True, config=config)
        ends[pairing] = made.sample(noise)
    assert float(ends["random"].std()) < 0.25
    assert float(ends["random"].mean().abs()) < 0.2
    assert float((ends["invert"].abs() - 1).abs().median()) < 0.2
    assert 0.3 < float((ends["invert"] > 0).float().mean()) < 0.7


def test_random_pairs_take_fresh_noise_though_latents_be_known(monkeypatch):
    from fewer.diffusion.flow_mle import finetuning

    seen, real = [], finetuning.noise_for
    monkeypatch.setattr(finetuning, "noise_for", lambda x1, latents, *rest: seen.append(latents) or real(x1, latents, *rest))
    data = torch.randn(16, 4)
    finetune(small(), data, steps=1, pairing="random", force=True, latents=data, config=FEW)
    assert seen == [None] * len(seen)


def test_what_was_tuned_can_be_tuned_on():
    base, data = small(), torch.randn(16, 4)
    for mode in ("residual", "contracting"):
        first = finetune(base, data, steps=2, mode=mode, config=FEW)
        again = finetune(base, data, steps=2, mode=mode, residual=first.adapter, config=FEW)
        assert again.report["parameters"] == first.report["parameters"]
        assert not torch.equal(again.sample(data), first.sample(data))
    whole = finetune(base, data, steps=2, config=FEW).field
    assert all(each.requires_grad for each in whole.parameters())


def test_a_condition_may_be_a_single_number():
    field, x1, labels = small(cond_dim=1), torch.randn(12, 4), torch.arange(12) % 3
    draws = [
        finetune(field, (x1, cond), steps=1, mode="residual", pairing="mixed", config=FEW).sample(x1, cond)
        for cond in (labels, labels[:, None].float())
    ]
    assert torch.equal(*draws)


def test_mixed_pairs_and_latents_made_anew(monkeypatch):
    from fewer.diffusion.flow_mle import finetuning

    x1, latents = torch.zeros(1000, 1), torch.full((1000, 1), 9.0)
    x0 = finetuning.noise_for(x1, latents, 0.3, torch.Generator().manual_seed(0))
    assert 0.65 < float((x0 == 9).float().mean()) < 0.75
    fields = []
    real = finetuning.latents_of
    monkeypatch.setattr(finetuning, "latents_of", lambda field, *rest: fields.append(field) or real(field, *rest))
    base, data = small(), torch.randn(16, 4)
    config = FineTuneConfig(updates=8, batch=8, reinvert_every=2, fm_weight=0.1)
    made = finetune(base, data, steps=2, pairing="mixed", force=True, config=config)
    assert len(fields) == 2  # 4 epochs
    assert not torch.equal(fields[1].layers[0].weight, base.layers[0].weight)
    assert made.report["spread"] == 1.0
    finetune(base, data, steps=2, latents=torch.randn(16, 4), config=FEW)
    assert len(fields) == 2


@pytest.mark.filterwarnings("error")
def test_reports_say_what_there_is_to_know():
    base, data = small(), 0.5 * torch.randn(64, 4)
    made = finetune(base, data, steps=2, mode="contracting", config=FineTuneConfig(updates=60, lr=0.05, rate=0.5))
    gate = float(made.adapter.gate.detach())
    assert gate >= 0
    assert made.report["certified_rate"] == pytest.approx(0.5 * gate)
    assert made.report["largest_log_norm"] <= made.report["largest_log_norm_of_base"] + 0.5
    given = (data, torch.randn(64, 1))
    rates = [finetune(small(cond_dim=n), d, steps=1, mode="contracting", config=FEW).adapter.rate for n, d in ((0, data), (1, given))]
    assert rates == [0.0, 1.0]
    latents = invert(base, data)
    assert made.report["latent_std"] == pytest.approx(float(latents.std(correction=0)), rel=1e-4)
    exact = torch.distributions.kl_divergence(
        torch.distributions.Normal(latents.mean(0), latents.std(0, correction=0)), torch.distributions.Normal(torch.zeros(4), 1.0)
    )
    assert made.report["latent_kl"] == pytest.approx(float(exact.mean()), rel=1e-3)
    assert made.report["parameters"] == sum(each.numel() for each in made.adapter.parameters())
    assert {"sample_std", "data_std", "first_loss", "last_loss"} <= made.report.keys()


def test_default_residuals_have_their_share_of_the_parameters():
    base, data = VelocityMLP(64, 32, 128), (torch.randn(9, 64), torch.randn(9, 32))
    made = finetune(base, data, steps=1, mode="residual", config=FineTuneConfig(updates=1, share=0.2))
    assert 0.1 < made.report["parameters"] / made.report["base_parameters"] <= 0.25


def test_another_number_of_steps_is_warned_of():
    made = finetune(small(), torch.randn(16, 4), steps=2, config=FEW)
    with pytest.warns(UserWarning, match="tuned for 2"):
        made.sample(torch.randn(3, 4), steps=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.sample(torch.randn(3, 4), steps=2)
    assert not made.field.training


def test_random_pairs_measure_what_the_condition_leaves_open():
    c = torch.randn(100, 2)
    field, near = small(cond_dim=2), torch.cat([c, -c], 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert finetune(field, (near, c), steps=1, pairing="random", config=FEW).report["spread"] < 1e-4
    with pytest.warns(UserWarning, match=r"leaves 0.\d\d of the data's variance open; expected at most 0.1"):
        made = finetune(field, (near + torch.randn(100, 4), c), steps=1, pairing="random", config=FEW)
    assert 0.4 < made.report["spread"] < 0.6


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"mode": "ful"}, "did you mean 'full'"),
        ({"pairing": "random"}, "of unconditional data, which it pulls to their mean; expected 'invert'"),
        ({"pairing": "mixed"}, "of unconditional data"),
        ({"mix": 2.0}, "mix is 2.0"),
        ({"data": torch.full((4, 4), math.nan)}, "data has a NaN or infinite number in row 0"),
        ({"data": torch.randn(4, 4).half()}, "expected float32 or float64"),
        ({"data": torch.randn(4, 4).double()}, "data are torch.float64 and the field's weights torch.float32; expected the same"),
        ({"data": torch.randn(4, 4).numpy()}, "data is a ndarray; expected a tensor"),
        ({"data": [torch.randn(4, 4), torch.randn(4, 1)]}, r"data is a list; expected a tensor x1, or the tuple \(x1, cond\)"),
        ({"data": torch.randn(4)}, r"data are \(4,\)"),
        ({"data": (torch.randn(4, 4), torch.randn(3, 1))}, r"cond is \(3, 1\) for data \(4, 4\); expected one row each"),
        ({"latents": torch.randn(4, 3)}, r"latents is \(4, 3\)"),
        ({"data": (torch.randn(4, 4), torch.randn(4, 1))}, "expected 0 numbers a row"),
    ],
)
def test_bad_words_are_refused(words, said):
    given = {"data": torch.randn(4, 4), "steps": 2, "config": FEW} | words
    with pytest.raises(ValueError, match=said):
        finetune(small(), **given)


@pytest.mark.parametrize(
    "words",
    [{"updates": 0}, {"lr": -1.0}, {"clip": 0}, {"rate": -1}, {"ema": 2}, {"reinvert_every": -1}, {"method": "ruler"}, {"sigma": "own"}],
)
def test_bad_settings_are_refused(words):
    with pytest.raises(ValueError, match="expected"):
        FineTuneConfig(**words)


def test_files_that_are_none_are_refused(tmp_path):
    made = finetune(small(), torch.randn(16, 4), steps=2, mode="residual", config=FEW)
    with pytest.raises(FileNotFoundError):
        load_finetuned(tmp_path / "none", small())
    made.save(tmp_path / "a")
    said = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="expected what FineTuned.save writes"):
        load_finetuned(tmp_path / "a", small())
    (tmp_path / "a" / "config.json").write_text(json.dumps({**said, "sizes": {"sides": 3}}))
    with pytest.raises(ValueError, match="does not fit this VelocityMLP .*sides"):
        load_finetuned(tmp_path / "a", small())
    made.save(tmp_path / "b")
    (tmp_path / "b" / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="no whole safetensors file"):
        load_finetuned(tmp_path / "b", small())
