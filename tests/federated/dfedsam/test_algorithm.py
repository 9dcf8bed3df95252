"""DFedSAM: with everybody linked it is FedAvg or FedSAM, on quadratics it is twelve lines of NumPy; what it counts, keeps and refuses."""

from __future__ import annotations

import copy
import pickle

import networkx
import numpy as np
import pytest
import torch
from federations import examples, gradient, linear, net, quadratics

from fewer.federated import (
    DFedSAMAlgorithm,
    DFedSAMConfig,
    FedAvg,
    FedSAM,
    FlatModel,
    LocalConfig,
    Shards,
    complete,
    dirichlet,
    from_networkx,
    load_checkpoint,
    random_graph,
    ring,
    simulate,
    simulate_decentralized,
)

LOCAL = {"local_epochs": 2, "lr": 0.1, "batch_size": 8}


def everybody(clients, round, seed):
    return list(clients)


def classification(dtype=torch.float32):
    x, y = examples()
    return Shards(x.to(dtype), y, dirichlet(y, clients=6, alpha=0.3, seed=3, min_size=7))


def run(executor=None, rounds=3, topology=None, shards=None, model=net, rho=0.1, steps=1, **keywords):
    algorithm = DFedSAMAlgorithm(DFedSAMConfig(rho=rho, gossip_steps=steps, **LOCAL))
    shards = shards or classification()
    return simulate_decentralized(algorithm, model, shards, rounds, topology=topology or ring(6), seed=5, executor=executor, **keywords)


@pytest.mark.parametrize("rho", [0.0, 0.1])
@pytest.mark.parametrize("executor", [None, "vmap"])
def test_with_everybody_linked_it_is_the_method_with_a_server(rho, executor):
    """Rho = 0: FedAvg; otherwise FedSAM, everybody taking part and on the same batches, three rounds."""
    flat, shards = FlatModel(net().double()), classification(torch.float64)
    server = FedSAM(LocalConfig(**LOCAL), rho=rho) if rho else FedAvg(LocalConfig(**LOCAL))
    theirs = simulate(server, flat, shards, 3, sampler=everybody, seed=5)
    ours = run(executor, topology=complete(6), shards=shards, model=flat, rho=rho)
    assert (ours.mean() - theirs.server.x).abs().max() <= 1e-12
    assert (ours.x - theirs.server.x).abs().max() <= 1e-12
    assert (theirs.server.x - flat.initial()).norm() > 0.1


def numpy_rounds(shards, w, steps, rho, rounds=3, eta=0.1, local_steps=4):
    x = np.full((4, 3), 0.3)
    for _ in range(rounds):
        z = x.copy()
        for client in range(4):
            for _ in range(local_steps):
                g = gradient(shards, client, z[client])
                z[client] -= eta * gradient(shards, client, z[client] + rho * g / (np.sqrt((g**2).sum()) + 1e-7))
        for _ in range(steps):
            z = np.array([sum(w[i, j] * z[j] for j in range(4)) for i in range(4)])
        x = z
    return x


WEIGHTS = {  # by hand: a ring of four, and the path 0 - 1 - 2 - 3
    "ring": (ring(4), np.array([[1, 1, 0, 1], [1, 1, 1, 0], [0, 1, 1, 1], [1, 0, 1, 1]]) / 3),
    "path": (from_networkx(networkx.path_graph(4)), np.array([[2, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 2]]) / 3),
}


@pytest.mark.parametrize("graph", WEIGHTS)
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("rho", [0.0, 0.1])
def test_quadratics_equal_numpy(graph, steps, rho):
    topology, w = WEIGHTS[graph]
    config = DFedSAMConfig(
        rho=rho, gossip_steps=steps, local_steps=4, lr=0.1, lr_decay=1.0, weight_decay=0.0, max_grad_norm=float("inf"), batch_size=12
    )
    shards = quadratics()
    ours = simulate_decentralized(DFedSAMAlgorithm(config), linear(), shards, 3, topology=topology)
    expected = numpy_rounds(shards, w, steps, rho)
    assert np.abs(ours.x.numpy() - expected).max() <= 1e-12
    assert np.abs(expected[0] - expected[2]).max() > 1e-3


GRAPHS = {"ring": ring(4), "star": from_networkx(networkx.star_graph(3)), "random": random_graph(4, 1, seed=2)}


@pytest.mark.parametrize("graph", GRAPHS)
def test_clients_with_equal_data_stay_together(graph):
    held = quadratics()
    x, y = held.x[held.parts[0]].repeat(4, 1), held.y[held.parts[0]].repeat(4)
    config = DFedSAMConfig(rho=0.1, gossip_steps=2, local_steps=3, batch_size=12)

    def spread(y):
        history = simulate_decentralized(DFedSAMAlgorithm(config), linear(), Shards(x, y, held.parts), 5, topology=GRAPHS[graph])
        return float((history.x[:, None] - history.x[None]).abs().max())

    assert spread(y) < 1e-12
    changed = y.clone()
    changed[held.parts[2]] += 1
    assert spread(changed) > 1e-3


class RecordingFlat(FlatModel):
    """A model that writes down the batches of its gradients."""

    def __init__(self, model):
        super().__init__(model)
        self.seen = []

    def gradient(self, vector, x, y):
        self.seen.append((vector.clone(), x.clone()))
        return super().gradient(vector, x, y)


def test_two_gradients_a_step_on_the_same_batch_and_gossip_takes_none():
    shards = classification()
    expected = sum(2 * -(-len(part) // 8) for part in shards.parts)
    for rho, each in ((0.0, 1), (0.1, 2)):
        flat = RecordingFlat(net())
        counted = {steps: run(shards=shards, model=flat, rho=rho, steps=steps, rounds=1).rounds[0] for steps in (1, 4)}
        assert counted[1].gradients == counted[4].gradients == each * expected
        assert len(flat.seen) == 2 * each * expected
        assert counted[4].numbers_sent == [4 * sent for sent in counted[1].numbers_sent] == [4 * 2 * FlatModel(net()).size] * 6
        if rho:
            for (at, x), (worse, again) in zip(flat.seen[::2], flat.seen[1::2], strict=True):
                assert torch.equal(x, again)
                assert abs(float((worse - at).norm()) - rho) < 1e-4


@pytest.mark.parametrize("rho", [0.0, 0.1])
def test_all_clients_at_once_equal_one_after_the_other(rho):
    assert len({len(part) for part in classification().parts}) > 3
    one, all_ = (run(executor, rho=rho, steps=2) for executor in (None, "vmap"))
    assert torch.allclose(one.x, all_.x, atol=1e-5, rtol=0)
    assert [each.gradients for each in one.rounds] == [each.gradients for each in all_.rounds]
    assert [each.drift for each in one.rounds] == pytest.approx([each.drift for each in all_.rounds], rel=1e-4)


@pytest.mark.parametrize("executor", [None, "vmap"])
def test_a_resumed_run_equals_an_uninterrupted_one(executor, tmp_path):
    file, graph = tmp_path / "state.pt", random_graph(6, 2, seed=1)
    run(executor, rounds=2, topology=graph, checkpoint=file)
    server, kept = load_checkpoint(file, 6)
    assert server.round == 2
    assert torch.equal(server.x, kept["x"].mean(dim=0))
    resumed = run(executor, rounds=4, topology=graph, checkpoint=file)
    assert [each.round for each in resumed.rounds] == [3, 4]
    assert torch.equal(resumed.x, run(executor, rounds=4, topology=graph).x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_of_other_precisions(dtype):
    """Half-precision models are trained as such, held and averaged in float32."""
    history = run(shards=classification(dtype), model=lambda: net().to(dtype), rounds=2)
    assert history.x.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    reference = run(rounds=2)
    assert (history.x - reference.x).abs().max() <= {torch.float16: 0.02, torch.bfloat16: 0.15, torch.float64: 1e-5}[dtype]


def test_one_row_a_client_non_contiguous_images_and_small_labels():
    x, y = examples(6)
    wide = torch.stack([x, x], dim=-1)[..., 0]
    assert not wide.is_contiguous()
    parts = [[row] for row in range(6)]
    expected = run(shards=Shards(x, y, parts))
    assert torch.equal(run(shards=Shards(wide, y, parts)).x, expected.x)
    assert torch.equal(run(shards=Shards(x, y.to(torch.uint8), parts)).x, expected.x)
    assert torch.allclose(run("vmap", shards=Shards(wide, y, parts)).x, expected.x, atol=1e-5)


def test_settings_and_histories_survive_copies_and_pickles():
    algorithm = DFedSAMAlgorithm(DFedSAMConfig(rho=0.2, gossip_steps=3))
    history = run(rounds=1)
    for again in (copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))):
        assert again(algorithm) == algorithm
        assert torch.equal(again(history).mean(), history.mean())
        assert again(history).rounds == history.rounds


BAD = [
    ({"rho": -0.1}, "rho is -0.1; expected a finite number of at least 0"),
    ({"rho": float("nan")}, "rho is nan"),
    ({"gossip_steps": 0}, "gossip_steps is 0; expected a whole number of at least 1"),
    ({"gossip_steps": 1.5}, "gossip_steps is 1.5"),
    ({"gossip_steps": True}, "gossip_steps is True"),
    ({"weighted": True}, "weighted is True; expected False: there is no server"),
    ({"lr": 0.0}, "lr is 0.0"),
]


@pytest.mark.parametrize(("settings", "message"), BAD)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DFedSAMConfig(**settings)


def test_defaults():
    config = DFedSAMConfig()
    told = (config.rho, config.gossip_steps, config.local_epochs, config.lr, config.lr_decay, config.weight_decay, config.batch_size)
    assert told == (0.05, 1, 5, 0.1, 0.998, 1e-3, 50)
    assert config.max_grad_norm == 10
