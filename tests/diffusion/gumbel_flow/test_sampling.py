"""Sampling and guidance: what is exact, what is counted, and what is refused."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fewer.diffusion.gumbel_flow import GumbelSoftmaxPath, SequenceCNN, STGuidance, sample
from fewer.diffusion.gumbel_flow.peers import (
    DirichletPath,
    LinearPath,
    MaskPath,
    markov_chain,
    mask_loss,
    position_frequencies,
    sample_peer,
)
from fewer.diffusion.gumbel_flow.problems import divergence, exact_model, toy_law
from fewer.diffusion.gumbel_flow.sampling import onto_simplex

K = 5
PATH = GumbelSoftmaxPath(K)


@pytest.fixture
def net() -> SequenceCNN:
    torch.manual_seed(0)
    return SequenceCNN(K, width=8, dilations=(1, 2))


@pytest.fixture
def classifier() -> SequenceCNN:
    torch.manual_seed(1)
    return SequenceCNN(K, width=8, dilations=(1, 2), outputs=2)


def drawn(model, seed: int = 0, **words):
    return sample(model, PATH, words.pop("length", 6), words.pop("batch", 4), generator=torch.Generator().manual_seed(seed), **words)


class Still(GumbelSoftmaxPath):
    """A path that begins at softmax(e_k / tau_max)."""

    def start(self, *shape, **words):
        return torch.softmax(F.one_hot(torch.ones(shape, dtype=torch.long), K).double() / self.tau_max, dim=-1)


def test_the_exponential_step_is_exact_for_a_posterior_that_stands_still_and_euler_converges_to_it():
    path, e = Still(K), F.one_hot(torch.tensor(1), K).double()
    right = torch.softmax(e / path.tau(1.0), dim=-1)
    sure = lambda x, t, cond: torch.log(e + 1e-300).expand(x.shape)  # noqa: E731
    for steps in (1, 7):
        torch.testing.assert_close(sample(sure, path, 1, 1, steps).x[0, 0], right)
    errors = [float((sample(sure, path, 1, 1, steps, "euler").x[0, 0] - right).abs().max()) for steps in (40, 80, 160)]
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(0.85 < slope < 1.15 for slope in slopes)


def test_both_integrators_agree_on_a_model_as_steps_grow(net):
    for steps, tolerance in ((20, 3e-2), (400, 1.5e-3)):
        one, other = (drawn(net, steps=steps, integrator=each).x for each in ("exponential", "euler"))
        assert (one - other).abs().max() < tolerance


def test_guidance_by_a_linear_classifier_is_known_whatever_is_drawn():
    w, x = torch.randn(3, K, dtype=torch.float64), torch.softmax(torch.randn(2, 3, K, dtype=torch.float64), dim=-1)
    right = 0.7 * x * (w - (x * w).sum(-1, keepdim=True))
    for m in (1, 5):
        towards = STGuidance(lambda one_hot: (one_hot * w).sum((1, 2)), None, gamma=0.7, num_samples=m, normalize=False)
        torch.testing.assert_close(towards(x, 0.3), right, rtol=0, atol=1e-14)
        torch.testing.assert_close(towards.logits(x, 0.3), 0.7 * w.expand(2, -1, -1))


def test_a_classifier_sees_sampled_letters_never_the_soft_state():
    x, seen = torch.softmax(torch.randn(3, 6, K), dim=-1), []

    def classifier(one_hot):
        seen.append(one_hot.detach())
        return one_hot[..., 0].sum(1)

    STGuidance(classifier, None, num_samples=400).logits(x, 0.0)
    (letters,) = seen
    assert letters.shape == (1200, 6, K)
    assert set(letters.unique().tolist()) == {0.0, 1.0}
    assert (letters.sum(-1) == 1).all()
    torch.testing.assert_close(letters.reshape(400, 3, 6, K).mean(0), x, rtol=0, atol=0.12)  # drawn from the state


def test_no_strength_is_no_guidance_to_the_bit(net, classifier):
    for integrator in ("exponential", "euler"):
        without = drawn(net, steps=5, integrator=integrator)
        with_none = drawn(net, steps=5, integrator=integrator, guidance=STGuidance(classifier, 1, gamma=0.0))
        assert torch.equal(without.x, with_none.x)


def test_a_classifier_gets_no_gradient_is_asked_in_eval_mode_and_given_its_mode_back(net):
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(6 * K, 4), nn.Dropout(0.9), nn.Linear(4, 2)).train()
    first, second = (
        drawn(net, steps=4, guidance=STGuidance(classifier, 1, gamma=1.0, generator=torch.Generator().manual_seed(2))).x for _ in range(2)
    )
    assert torch.equal(first, second)
    assert classifier[2].training
    assert all(each.grad is None for each in classifier.parameters())
    net.train()
    drawn(net, steps=2)
    assert net.training


def test_guidance_raises_the_score_and_is_normalised_over_real_positions(net, classifier):
    mask = torch.arange(6) < torch.tensor([6, 3, 1, 5])[:, None]
    x = PATH.start(4, 6, generator=torch.Generator().manual_seed(0)) * mask[..., None]
    towards = STGuidance(classifier, 1, gamma=2.0, num_samples=3)
    g = towards.logits(x, 0.0, mask)
    assert not g[~mask].any()
    assert not towards(x, 0.0, mask)[~mask].any()
    for row, real in zip(g, mask, strict=True):
        assert float(row[real].square().mean().sqrt()) == pytest.approx(2.0, rel=1e-5)
    assert towards.calls == 2 * 3 * 4

    def mean_score(gamma):
        found = drawn(net, steps=10, batch=40, guidance=STGuidance(classifier, 1, gamma=gamma))
        return float(torch.log_softmax(classifier(F.one_hot(found.tokens, K).float()), -1)[:, 1].mean())

    assert mean_score(2.0) > mean_score(0.0)


def test_modules_are_asked_in_the_dtype_of_their_weights_and_inference_mode_may_stand_around():
    class Net(nn.Linear):
        def forward(self, x, t, cond=None):
            return super().forward(x)

    torch.manual_seed(0)
    net, classifier = Net(K, K), nn.Sequential(nn.Flatten(), nn.Linear(6 * K, 2))
    ends = {}
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        towards = STGuidance(classifier.to(dtype), 1, gamma=0.0 if dtype is torch.float64 else 0.5)
        with torch.inference_mode():
            ends[dtype] = drawn(net.to(dtype), steps=3, guidance=towards).x
        assert towards(PATH.start(2, 6), 0.0).isfinite().all()
        assert ends[dtype].dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    torch.manual_seed(0)
    towards = STGuidance(classifier.float(), 1, gamma=0.5)
    assert towards(PATH.start(4, 6).to(torch.bfloat16), 0.0).dtype == torch.bfloat16


def test_masks_may_be_ones_and_a_sequence_of_padding_alone_stays_empty(net, classifier):
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [0] * 6, [1] * 6, [1, 0, 0, 0, 0, 0]])
    for integrator in ("exponential", "euler"):
        found = drawn(net, steps=3, mask=mask, integrator=integrator, guidance=STGuidance(classifier, 1))
        assert found.x.isfinite().all()
        assert not found.x[mask == 0].any()
        assert found.x[0, 0].sum() == pytest.approx(1)


def test_padding_stays_empty_and_changes_nothing(net):
    mask = torch.arange(6) < torch.tensor([6, 3, 1, 5])[:, None]
    for words in ({}, {"integrator": "euler"}, {"decode": "sample"}, {"decode": "posterior"}, {"prediction": "score"}):
        found = drawn(net, steps=4, mask=mask, **words)
        assert not found.x[~mask].any()
        assert not found.tokens[~mask].any()
        torch.testing.assert_close(found.x[mask].sum(-1), torch.ones(int(mask.sum())))
        assert found.x.isfinite().all()
    torch.manual_seed(0)
    x = PATH.start(1, 3)
    long = torch.cat([x, torch.zeros(1, 4, K)], dim=1)
    torch.testing.assert_close(net(x, torch.tensor([0.3])), net(long, torch.tensor([0.3]))[:, :3])


def test_cut_shares_are_counted():
    x, cut = onto_simplex(torch.tensor([[0.5, 0.5, 0.0], [1.1, -0.3, 0.2]]))
    assert cut.tolist() == [False, True]
    torch.testing.assert_close(x, torch.tensor([[0.5, 0.5, 0.0], [1.1 / 1.3, 0.0, 0.2 / 1.3]]))
    wild = lambda x, t, cond: torch.randn(x.shape, generator=torch.Generator().manual_seed(0)) * 30  # noqa: E731
    assert drawn(wild, steps=3, prediction="score").corrections > 0
    assert drawn(wild, steps=1, integrator="euler", batch=50).corners < 1


@pytest.mark.parametrize(("k", "seed"), [(4, 0), (20, 1)])
def test_the_exact_posterior_leaves_the_floor_of_the_method(k, seed):
    path, law = GumbelSoftmaxPath(k), toy_law(k, seed)
    found = divergence(sample(exact_model(path, law), path, 1, 4000, 30, generator=torch.Generator().manual_seed(0)).tokens, law)
    flat = divergence(torch.randint(k, (4000, 1)), law)
    assert 0.002 < found < 0.2
    assert found < flat or flat < 0.15


# Peers


@pytest.mark.parametrize("kind", [LinearPath, DirichletPath, MaskPath])
def test_peers_with_the_exact_posterior_draw_the_law(kind):
    law, path = torch.tensor([0.5, 0.25, 0.15, 0.1]), kind(4)

    def model(x, t, cond=None):
        if isinstance(path, MaskPath):
            return law.log().expand(x.shape)
        if isinstance(path, LinearPath):  # x - t e_k must be positive, and then all letters are as likely
            likely = (x >= t[0]).to(x)
            return (law * likely + 1e-30).log()
        return law.log() + path.longest * t[0] * x.log()

    found = sample_peer(model, path, 1, 2000, 40, torch.Generator().manual_seed(0))
    assert divergence(found.tokens, law.double()) < 0.02


@pytest.mark.parametrize("kind", [LinearPath, DirichletPath])
def test_peers_velocities_sum_to_zero(kind):
    x, p = (torch.softmax(torch.randn(4, 3, 6, dtype=torch.float64), dim=-1) for _ in range(2))
    assert kind(6).velocity(p, x, 0.4).sum(-1).abs().max() < 1e-6


def test_dirichlets_speed_carries_its_densities_along():
    """d/ds p_s(b) = -d/db (p_s(b) C (1 - b)) for the marginal of the letter's own share, Beta(s + 1, K - 1)."""
    from scipy.stats import beta

    path, s, b = DirichletPath(6), 1.7, torch.linspace(0.05, 0.95, 19).double().numpy()
    in_time = (beta.pdf(b, s + 1 + 1e-4, 5) - beta.pdf(b, s + 1 - 1e-4, 5)) / 2e-4

    def flux(b):
        return beta.pdf(b, s + 1, 5) * path.speed(b, s) * (1 - b)

    torch.testing.assert_close(torch.from_numpy(-(flux(b + 1e-4) - flux(b - 1e-4)) / 2e-4), torch.from_numpy(in_time), rtol=1e-3, atol=1e-4)


def test_counts_and_the_loss_of_hidden_letters():
    draw = torch.Generator().manual_seed(0)
    tokens = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 2, 3, 0, 1, 2, 3]])
    assert (position_frequencies(tokens, 4, 5, draw) == tokens[:1]).all()
    chain = markov_chain(tokens.repeat(200, 1), 4, 20, draw)
    assert float((chain == tokens[:1]).double().mean()) > 0.9
    flat = lambda x, t, cond: torch.zeros_like(x)  # noqa: E731
    assert float(mask_loss(flat, MaskPath(4), tokens, generator=draw)) == pytest.approx(math.log(4), rel=1e-5)


# The network


def test_the_network_is_copied_saved_and_read_back(net, tmp_path):
    x, t = PATH.start(2, 6), torch.tensor([0.2, 0.9])
    net.save(tmp_path / "net.safetensors")
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), SequenceCNN.load(tmp_path / "net.safetensors")):
        assert torch.equal(twin(x, t), net(x, t))
    with pytest.raises(FileExistsError):
        net.save(tmp_path / "net.safetensors")
    half = net.to(torch.bfloat16)
    half.save(tmp_path / "half.safetensors")
    assert SequenceCNN.load(tmp_path / "half.safetensors")(x, t).dtype == torch.bfloat16
    assert drawn(half, steps=3).x.isfinite().all()
    (tmp_path / "bad.safetensors").write_bytes(b"{}")
    with pytest.raises(ValueError, match="no network of sequences"):
        SequenceCNN.load(tmp_path / "bad.safetensors")
    with pytest.raises(FileNotFoundError, match="expected a network"):
        SequenceCNN.load(tmp_path / "absent")


def test_a_condition_is_taken_where_the_network_was_built_for_one():
    net, x = SequenceCNN(K, width=8, condition=3), PATH.start(2, 4)
    one, other = (net(x, torch.tensor([0.5, 0.5]), torch.eye(3)[[i, i]]) for i in (0, 1))
    assert not torch.allclose(one, other)
    assert sample(net, PATH, 4, 2, 2, cond=torch.eye(3)[:2]).tokens.shape == (2, 4)
    with pytest.raises(ValueError, match="cond is missing"):
        net(x)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda net: drawn(net, steps=0), ValueError, "steps"),
        (lambda net: drawn(net, length=0), ValueError, "length"),
        (lambda net: drawn(net, integrator="heun"), ValueError, "integrator"),
        (lambda net: drawn(net, decode="max"), ValueError, "decode"),
        (lambda net: drawn(net, prediction="noise"), ValueError, "prediction"),
        (lambda net: drawn(net, mask=torch.ones(4, 5).bool()), ValueError, "mask is"),
        (lambda net: drawn(lambda x, t, cond: x * math.nan, steps=1), FloatingPointError, "not finite"),
        (lambda net: drawn(net, steps=1, guidance=STGuidance(lambda o: o.argmax(-1).float().sum(1), None)), ValueError, "no gradient"),
        (lambda net: drawn(net, steps=1, guidance=STGuidance(lambda o: o.detach().sum((1, 2)), None)), ValueError, "no gradient"),
        (lambda net: drawn(net, steps=1, guidance=STGuidance(lambda o: o.sum((1, 2))[:2], None)), ValueError, "expected one each"),
        (lambda net: drawn(net, steps=1, guidance=STGuidance(lambda o: o.sum(1), 9)), ValueError, "with the class 9"),
        (
            lambda net: drawn(net, steps=1, guidance=STGuidance(lambda o: (o - 1).sum((1, 2)).sqrt(), None)),
            FloatingPointError,
            "gradient is not finite",
        ),
        (lambda net: drawn(lambda x, t, cond: x[..., :3]), ValueError, "expected as many logits"),
        (lambda net: drawn(lambda x, t, cond: torch.zeros(K)), ValueError, "expected as many logits"),
        (lambda net: drawn(net, steps=1, guidance=STGuidance(lambda o: (o.sum((1, 2)),), None)), ValueError, "gave tuple"),
        (lambda net: STGuidance(net, 1)(PATH.start(2, 3), 0.0, torch.ones(3)), ValueError, r"mask is \(3,\)"),
        (lambda net: STGuidance(net, 1)(PATH.start(2, 3) * math.nan, 0.0), FloatingPointError, "state is not finite"),
        (lambda net: STGuidance(net, 1, gamma=-1), ValueError, "gamma"),
        (lambda net: STGuidance(net, 1, num_samples=0), ValueError, "num_samples"),
        (lambda net: STGuidance(net, -1), ValueError, "target"),
        (lambda net: SequenceCNN(4, kernel=4), ValueError, "odd"),
        (lambda net: net(torch.zeros(2, 3, 4)), ValueError, r"expected \[B, L, 5\]"),
    ],
)
def test_what_cannot_be_sampled_is_refused(net, call, error, words):
    with pytest.raises(error, match=words):
        call(net)
