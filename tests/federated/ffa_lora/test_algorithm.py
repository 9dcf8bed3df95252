"""Federated LoRA in the engine: what it reduces to, what alpha does, how the budget is kept, and what goes wrong."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from adapted import WIDTH, all_of, drawn, federation, lora, net
from torch import nn

from fewer import data, meters
from fewer.federated import (
    FedAvg,
    FedLoRA,
    FlatModel,
    Independent,
    LocalConfig,
    LoRARoundsConfig,
    PrivacyConfig,
    Shards,
    aggregation_gap,
    epsilon_spent,
    iid,
    noise_multiplier,
    private_gradient,
    simulate,
)
from fewer.federated._shared.algorithm import run_aggregate, run_configure, run_local
from fewer.federated._shared.clients import client_rng
from fewer.federated.ffa_lora.adapters import adapter_vectors, lora_layers
from fewer.federated.ffa_lora.algorithm import TAKEN, PrivateShard

NOISY = PrivacyConfig(noise_multiplier=0.8, delta=1e-3, clip=0.5)


def config(**words):
    return LoRARoundsConfig(**({"local_steps": 4, "batch_size": 10, "lr": 0.5} | words))


def private(rounds=10, privacy=NOISY, **words):
    return config(privacy=privacy, rounds=rounds, **words)


def run(settings, model=None, rounds=2, shards=None, **words):
    flat = FlatModel(lora() if model is None else model)
    return simulate(FedLoRA(settings), flat, shards or federation(), rounds, sampler=words.pop("sampler", all_of), **words)


# What it reduces to


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("frozen", [True, False], ids=["ffa", "lora"])
def test_without_privacy_it_is_fedavg_bit_for_bit(frozen, weighted):
    words = {
        "local_steps": 5,
        "lr": 0.3,
        "lr_decay": 0.9,
        "weight_decay": 1e-2,
        "max_grad_norm": 1.0,
        "batch_size": 7,
        "weighted": weighted,
    }
    flat = FlatModel(lora(frozen=frozen))
    ours, theirs = (
        simulate(algorithm, flat, federation(), 3, sampler=all_of, seed=4).server.x
        for algorithm in (FedLoRA(LoRARoundsConfig(**words)), FedAvg(LocalConfig(**words)))
    )
    assert torch.equal(ours, theirs)
    assert (ours - flat.initial()).norm() > 0.1


def test_nothing_decays_or_clips_unless_asked_for():
    settings = LoRARoundsConfig()
    assert (settings.local_steps, settings.batch_size, settings.lr) == (10, 200, 0.5)
    assert (settings.lr_at(1000), settings.weight_decay, settings.max_grad_norm) == (0.5, 0.0, math.inf)
    assert (PrivacyConfig(epsilon=1.0).clip, PrivacyConfig(epsilon=1.0).delta, PrivacyConfig(epsilon=1.0).accountant) == (2.0, 1e-5, "rdp")


def test_frozen_a_stays_as_it_is_and_costs_nothing():
    model = lora(rank=4)
    before = [a.detach().clone() for _, a, _ in lora_layers(model)]
    history = run(private(), model, rounds=3)
    assert history.flat.size == sum(len(b) * b.shape[1] for _, _, b in lora_layers(model)) == 2 * 4 * WIDTH
    for (_, a, b), old in zip(lora_layers(model), before, strict=True):
        assert torch.equal(a, old)
        assert a.grad is None
        assert b.grad is None
    assert list(history.state_dict()) == [f"base_model.model.{layer}.lora_B.default.weight" for layer in (0, 2)]
    assert history.server.x.norm() > 0.1
    assert set(history.server.vectors) == {TAKEN}  # nothing of an optimizer's is kept


def test_loras_gap_opens_in_one_round_on_real_images_and_ffas_does_not():
    digits = data.load_digits()
    x, y = torch.from_numpy(digits.x[:300]).float().flatten(1) / 16, torch.from_numpy(digits.y[:300])
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    for frozen in (True, False):
        model = lora(copy.deepcopy(base), frozen=frozen, targets=["0"])
        flat, algorithm, shards = FlatModel(model), FedLoRA(config(batch_size=20, lr=2.0)), Shards(x, y, y.argsort().chunk(3))
        messages = algorithm.configure(algorithm.initial(flat.initial(), 3), range(3), 1)
        sent = [run_local(algorithm, {}, each, shards.shard(each.client, flat), client_rng(0, 1, each.client))[1] for each in messages]
        gap = aggregation_gap(flat, [reply.vectors["model"] for reply in sent])["base_model.model.0.default"]
        assert gap <= 1e-6 if frozen else gap > 1e-3


# What alpha does


def products(history):
    return torch.cat([(b @ a).flatten() for a, b in adapter_vectors(history.flat, history.server.x).values()])


def changed(alpha, lr, frozen=True, privacy=None):
    """s B A after 6 steps of one client, float64."""
    model = lora(net(torch.float64), alpha=alpha, frozen=frozen)
    x, y = federation(1, dtype=torch.float64).x, federation(1).y
    settings = config(local_steps=6, lr=lr, batch_size=30, privacy=privacy, rounds=None if privacy is None else 1)
    return products(run(settings, model, 1, Shards(x, y, [range(len(x))]))) * alpha / 4


@pytest.mark.parametrize("noise", [None, 0.0, 1.0])
def test_ffa_depends_on_alpha_and_eta_by_eta_alpha_squared_alone(noise):
    one, three = (
        changed(8 * c, 0.4 / c**2, privacy=None if noise is None else PrivacyConfig(noise_multiplier=noise, clip=0.3 * c, delta=1e-3))
        for c in (1, 3)
    )
    assert (one - three).abs().max() <= 1e-6
    assert one.norm() > 0.1


def test_lora_tends_to_ffa_as_alpha_grows():
    """Theorem 1: with eta = const / alpha^2 the difference falls as alpha^-2."""
    away = [float((changed(alpha, 6 / alpha**2, frozen=False) - changed(alpha, 6 / alpha**2)).norm()) for alpha in (10, 100, 1000)]
    assert 80 <= away[0] / away[1] <= 120
    assert 80 <= away[1] / away[2] <= 120


# Privacy


def test_a_private_round_is_the_papers_step_by_step():
    """Poisson batches of q = batch / n, the clipped sum and noise over the expected batch, plain SGD."""
    flat, shards, settings = FlatModel(lora()), federation(), private(lr_decay=0.5)
    algorithm = FedLoRA(settings)
    server = algorithm.initial(drawn(flat), 3)
    message = replace(algorithm.configure(server, [1], 1)[0], round=3)
    shard = shards.shard(1, flat)
    _, reply = run_local(algorithm, {TAKEN: torch.zeros(1)}, message, shard, client_rng(0, 3, 1))
    rng = client_rng(0, 3, 1)
    rng.integers(2**62)  # the engine's, for layers that draw
    noise, y = torch.Generator().manual_seed(int(rng.integers(2**62))), drawn(flat)
    sizes = []
    for _ in range(4):
        rows = shard.rows[torch.from_numpy(rng.random(40) < 10 / 40)]
        sizes.append(len(rows))
        y = y - 0.5 * 0.5**2 * private_gradient(flat, y, shards.x[rows], shards.y[rows], 0.5, 0.8, 10, noise)
    assert torch.allclose(reply.vectors["model"], y, atol=1e-6)
    assert len(set(sizes)) > 1
    assert reply.metrics["epsilon"] == epsilon_spent(0.8, 1e-3, 0.25, 4)


def test_batches_are_poisson():
    shard = federation(1).shard(0, FlatModel(lora()))
    rng = client_rng(0, 1, 0)
    sizes = torch.tensor(
        [len(batch.rows) for batch in PrivateShard(shard, private(), 1, rng).batches(rng, 6, 1, 3000)], dtype=torch.float64
    )
    q = 10 / 120
    assert sizes.mean() == pytest.approx(10, abs=4 * (120 * q * (1 - q) / 3000) ** 0.5)
    assert sizes.var() == pytest.approx(120 * q * (1 - q), rel=0.15)


def test_each_client_has_noise_for_its_own_size():
    held = federation(count=240)
    shards = Shards(held.x, held.y, [range(100), range(100, 240)])
    settings = private(rounds=3, privacy=PrivacyConfig(epsilon=1.0, delta=1e-3))
    for client, size in enumerate((100, 140)):
        made = PrivateShard(shards.shard(client, FlatModel(lora())), settings, 3, client_rng(0, 1, client))
        assert made.sigma == noise_multiplier(1.0, 1e-3, 10 / size, 12)
        assert 0.99 <= made.epsilon <= 1.0


def test_the_engines_are_equal_whoever_answers_first():
    with ThreadPoolExecutor(3) as pool:
        together = run(private(), executor=pool).server
    one_by_one = run(private()).server
    assert torch.equal(together.x, one_by_one.x)
    assert torch.equal(together.vectors[TAKEN], one_by_one.vectors[TAKEN])
    assert not torch.equal(run(private(), seed=1).server.x, one_by_one.x)


def test_secure_noise_follows_no_seed():
    secure = private(privacy=replace(NOISY, secure=True))
    assert not torch.equal(run(secure).server.x, run(secure).server.x)
    assert torch.equal(run(private()).server.x, run(private()).server.x)


def told_epsilons(settings, rounds, **words):
    """client -> what it told, round by round."""
    told = {}

    class Listening(FedLoRA):
        def aggregate(self, server, replies):
            for reply in replies:
                told.setdefault(reply.client, []).append(reply.metrics["epsilon"])
            return super().aggregate(server, replies)

    history = simulate(Listening(settings), FlatModel(lora()), federation(), rounds, sampler=words.pop("sampler", all_of), **words)
    return told, history


def test_epsilon_counts_a_clients_own_rounds():
    told, history = told_epsilons(private(), 6, sampler=Independent(0.5), seed=2)
    times = {client: sum(client in each.clients for each in history.rounds) for client in range(3)}
    assert len(set(times.values())) > 1
    assert max(times.values()) < 6
    for client, epsilons in told.items():
        assert epsilons == [epsilon_spent(0.8, 1e-3, 0.25, 4 * taken) for taken in range(1, times[client] + 1)]


def test_a_resume_adds_and_never_starts_again(tmp_path):
    whole, _ = told_epsilons(private(), 4)
    told_epsilons(private(), 2, checkpoint=tmp_path / "state.pt")
    rest, history = told_epsilons(private(), 4, checkpoint=tmp_path / "state.pt")
    assert rest[0] == whole[0][2:]
    assert dict(history.server.vectors[TAKEN].tolist()) == {0: 4, 1: 4, 2: 4}
    run(private(rounds=3), rounds=3, checkpoint=tmp_path / "spent.pt")
    with pytest.raises(ValueError, match="client 0 is asked for round 4 of its own and its noise was computed for rounds=3"):
        run(private(rounds=3), rounds=4, checkpoint=tmp_path / "spent.pt")


def round_of(algorithm, flat, server, states, spoil=None):
    """One round by hand: the server after it, what clients keep, and the replies."""
    shards, replies = federation(), []
    for message in run_configure(algorithm, server, [0, 1, 2]):
        shard = shards.shard(message.client, flat)
        states[message.client], reply = run_local(
            algorithm, states[message.client], message, shard, client_rng(0, message.round, message.client)
        )
        replies.append(spoil(reply) if spoil else reply)
    return run_aggregate(algorithm, server, replies), replies


def test_a_client_that_lost_what_it_kept_goes_on_where_the_server_saw_it():
    algorithm, flat = FedLoRA(private()), FlatModel(lora())
    server, states = algorithm.initial(flat.initial(), 3), {client: {TAKEN: torch.zeros(1)} for client in range(3)}
    for _ in range(2):
        server, _ = round_of(algorithm, flat, server, states)
    states[1] = {TAKEN: torch.zeros(1)}
    _, replies = round_of(algorithm, flat, server, states)
    assert {reply.metrics["epsilon"] for reply in replies} == {epsilon_spent(0.8, 1e-3, 0.25, 12)}


def test_a_server_that_forgot_is_not_believed():
    algorithm, flat = FedLoRA(private()), FlatModel(lora())
    server, states = algorithm.initial(flat.initial(), 3), {client: {TAKEN: torch.full((1,), 5.0)} for client in range(3)}
    _, replies = round_of(algorithm, flat, server, states)
    assert replies[0].metrics["epsilon"] == epsilon_spent(0.8, 1e-3, 0.25, 24)


def test_a_reply_of_nan_is_left_out_and_has_been_paid_for():
    algorithm, flat = FedLoRA(private()), FlatModel(lora())
    server, states = algorithm.initial(flat.initial(), 3), {client: {TAKEN: torch.zeros(1)} for client in range(3)}

    def spoil(reply):
        return replace(reply, vectors={"model": reply.vectors["model"] * math.nan}) if reply.client == 2 else reply

    with pytest.warns(UserWarning, match="client 2 sent 'model' with NaN"):
        after, replies = round_of(algorithm, flat, server, states, spoil)
    assert torch.equal(after.x, (replies[0].vectors["model"] + replies[1].vectors["model"]) / 2)
    assert [float(states[client][TAKEN][0]) for client in range(3)] == [1, 1, 1]


def test_clipped_examples_are_counted():
    with meters.counting() as counts:
        run(private(privacy=replace(NOISY, clip=1e-6)), rounds=1)
    assert counts["clipped"] == counts["drawn"] > 0
    with meters.counting() as counts:
        run(private(privacy=replace(NOISY, clip=1e6)), rounds=1)
    assert counts["clipped"] == 0
    assert counts["gradients"] == 12


# What is refused


def test_privacy_without_rounds_is_refused():
    with pytest.raises(ValueError, match="privacy is given and rounds is None; expected"):
        LoRARoundsConfig(privacy=PrivacyConfig(epsilon=1.0))


def test_a_batch_above_a_clients_examples_is_refused():
    x, y = federation().x, federation().y
    with pytest.raises(ValueError, match="batch_size is 10 and client 1 has 6 examples; expected at most that many"):
        run(private(), shards=Shards(x, y, [range(100), range(100, 106)]))
    assert run(config(), shards=Shards(x, y, [range(100), range(100, 106)])).server.round == 2  # no matter without privacy


def test_steps_of_a_clients_own_are_refused_with_privacy():
    shard = federation().shard(1, FlatModel(lora()), steps=3)
    with pytest.raises(ValueError, match=r"client 1 chooses its own steps \(3\) with privacy"):
        PrivateShard(shard, private(), 1, client_rng(0, 1, 1))


def test_batchnorm_is_refused_with_privacy():
    model = lora(net(norm=nn.BatchNorm1d(WIDTH, track_running_stats=False)), targets=["0", "3"])
    with pytest.raises(ValueError, match=r"layer 'base_model.model.1' \(BatchNorm1d\) mixes the examples of a batch"):
        run(private(), model)


def test_clients_at_once_are_refused_with_privacy_alone():
    with pytest.raises(ValueError, match="privacy with executor='vmap'; expected"):
        run(private(), executor="vmap")
    assert (run(config(), executor="vmap").server.x - run(config()).server.x).abs().max() <= 1e-5


def test_a_delta_that_guarantees_nothing_is_told_with_the_client():
    with pytest.warns(UserWarning, match="delta is 0.03 and client 2 has 40 examples; expected less than 0.025"):
        run(private(privacy=replace(NOISY, delta=0.03)), rounds=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(private(), rounds=1)


def test_settings_survive_copying_and_pickling():
    algorithm = FedLoRA(private())
    assert pickle.loads(pickle.dumps(algorithm)) == copy.deepcopy(algorithm) == algorithm
    assert repr(algorithm) == repr(pickle.loads(pickle.dumps(algorithm)))


def test_noise_costs_accuracy():
    held, right = federation(count=600), {}
    shards = Shards(held.x, held.y, iid(held.y, 3))
    for sigma in (0.2, 20.0):
        privacy = PrivacyConfig(noise_multiplier=sigma, delta=1e-3, clip=1.0)
        history = run(private(rounds=15, lr=4.0, batch_size=50, privacy=privacy), rounds=15, shards=shards)
        right[sigma] = float((history.flat.predict(history.server.x, held.x).argmax(1) == held.y).float().mean())
    assert right[0.2] > 0.8
    assert right[0.2] - right[20.0] > 0.2
