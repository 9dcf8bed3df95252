"""The in-process engine without a server: averages keep the mean and shrink the distance to it, whoever is away; what is refused."""

from __future__ import annotations

import networkx
import numpy as np
import pytest
import torch
from federations import examples, linear, net, quadratics
from topologies import TOPOLOGIES
from torch import nn

from fewer.federated import (
    DFedSAMAlgorithm,
    DFedSAMConfig,
    FlatModel,
    Shards,
    dirichlet,
    from_networkx,
    metropolis,
    random_graph,
    ring,
    simulate_decentralized,
)
from fewer.federated._shared import gossip
from fewer.federated._shared.gossip import Averaging, consensus_distance, models_from, power
from fewer.federated._shared.topology import Topology, second_eigenvalue, without

SIZE = FlatModel(net()).size
ONE = torch.zeros(1, dtype=torch.float64)


def averaged(x, topology, round=1, away=(), steps=1):
    after = x.clone()
    Averaging.of(topology, round, away, steps, x).apply(after)
    return after


def models(clients, size=7, seed=0):
    return torch.randn(clients, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def distance(x):
    return float((x - x.mean(dim=0)).norm())


@pytest.mark.parametrize("topology", TOPOLOGIES.values(), ids=TOPOLOGIES)
def test_gossip_keeps_the_mean(topology):
    x = models(topology.clients)
    for steps in range(1, 6):
        for away in ((), (0,), (1, topology.clients - 1)):
            after = averaged(x, topology, 2, away, steps)
            assert (after.mean(dim=0) - x.mean(dim=0)).abs().max() <= 1e-12
            assert all(torch.equal(after[client], x[client]) for client in away)


@pytest.mark.parametrize("topology", TOPOLOGIES.values(), ids=TOPOLOGIES)
def test_many_steps_are_one_product_and_shrink_the_distance(topology):
    w = topology.weights(1)
    lambda_ = second_eigenvalue(w)
    for steps in (1, 2, 4):
        for seed in range(100):
            x = models(topology.clients, seed=seed)
            after = averaged(x, topology, steps=steps)
            assert distance(after) <= lambda_**steps * distance(x) * (1 + 1e-9) + 1e-12
        once_each = x
        for _ in range(steps):
            once_each = averaged(once_each, topology)
        assert torch.allclose(after, once_each, rtol=0, atol=1e-12)
        assert torch.allclose(after, torch.from_numpy(np.linalg.matrix_power(w, steps)) @ x, rtol=0, atol=1e-12)


def test_the_slowest_direction_shrinks_by_lambda_exactly():
    for topology in (ring(16), TOPOLOGIES["torus"], TOPOLOGIES["path"]):
        values, vectors = np.linalg.eigh(topology.weights(1))
        slowest = max(range(len(values) - 1), key=lambda place: abs(values[place]))
        x = torch.from_numpy(vectors[:, [slowest]].copy())
        for steps in (1, 3, 5):
            assert abs(distance(averaged(x, topology, steps=steps)) - second_eigenvalue(topology.weights(1)) ** steps) <= 1e-10


def test_many_clients_are_averaged_by_sparse_steps_in_blocks_alike(monkeypatch):
    topology = TOPOLOGIES["random"]
    x = models(topology.clients, size=11)
    dense = averaged(x, topology, steps=3)
    monkeypatch.setattr(gossip, "DENSE", 4)
    monkeypatch.setattr(gossip, "COLUMNS", 30)
    assert torch.allclose(averaged(x, topology, steps=3), dense, rtol=0, atol=1e-14)
    assert abs(consensus_distance(x) - float((x - x.mean(0)).square().sum()) / len(x)) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_product_has_the_dtype_of_the_models(dtype):
    assert power(ring(4).weights(1), 2, ONE.to(dtype))(models(4).to(dtype)).dtype == dtype


def test_models_beyond_the_limit_lie_in_a_mapped_file(monkeypatch):
    expected = run("vmap").x
    monkeypatch.setattr(gossip, "LARGE", 6 * SIZE * 4 - 1)  # a byte less than the models take
    mapped = models_from(torch.arange(3.0), 600)
    assert torch.equal(mapped, torch.arange(3.0).expand(600, 3))
    history = run("vmap")
    assert type(history.x.untyped_storage()) is torch.UntypedStorage
    assert torch.allclose(history.x, expected, rtol=0, atol=1e-6)


def classification():
    x, y = examples()
    return Shards(x, y, dirichlet(y, clients=6, alpha=0.3, seed=3, min_size=7))


def run(executor=None, rounds=3, topology=None, **keywords):
    algorithm = DFedSAMAlgorithm(DFedSAMConfig(local_epochs=2, batch_size=8, gossip_steps=2))
    return simulate_decentralized(
        algorithm, net, classification(), rounds, topology=topology or ring(6), seed=5, executor=executor, **keywords
    )


@pytest.mark.parametrize("executor", [None, "vmap"])
def test_a_client_that_is_away_keeps_its_model(executor):
    seen = {}
    history = run(executor, away=lambda round: [1, 4] if round == 2 else [], evaluate=lambda x, round: seen.update({round: x.clone()}))
    assert torch.equal(seen[2][[1, 4]], seen[1][[1, 4]])
    assert all((seen[2][client] - seen[1][client]).norm() > 1e-3 for client in (0, 2, 3, 5))
    assert history.rounds[1].clients == [0, 2, 3, 5]
    assert history.rounds[1].numbers_sent == [2 * links * SIZE * (client not in (1, 4)) for client, links in enumerate([1, 2, 1, 1, 2, 1])]
    assert (seen[3][1] - seen[2][1]).norm() > 1e-3


def test_a_round_that_falls_apart_averages_within_the_pieces():
    """Clients 1 and 4 of a ring of 6 away: {5, 0} and {2, 3} are left, each averaging with weights of 1/2."""
    x = models(6)
    after = averaged(x, ring(6), away=[1, 4])
    for i, j in ((0, 5), (2, 3)):
        assert torch.allclose(after[i], (x[i] + x[j]) / 2, rtol=0, atol=1e-15)
        assert torch.allclose(after[j], after[i], rtol=0, atol=1e-15)
    w = metropolis(without(ring(6).neighbors(1), [1, 4]))
    assert second_eigenvalue(w) == pytest.approx(1, abs=1e-12)


def test_rounds_tell_what_happened():
    told = []
    history = run(rounds=2, tell=told.append, evaluate=lambda x, round: (tuple(x.shape), round))
    assert told == history.rounds
    assert [each.evaluation for each in told] == [((6, SIZE), 1), ((6, SIZE), 2)]
    sizes = [len(part) for part in classification().parts]
    assert told[0].gradients == sum(2 * 2 * -(-size // 8) for size in sizes)
    assert told[0].numbers_sent == [2 * 2 * SIZE] * 6
    assert told[0].drift > 0
    assert told[1].consensus == pytest.approx(float((history.x - history.mean()).square().sum()) / 6, rel=1e-5)
    assert torch.equal(history.mean(), history.x.mean(dim=0))


def test_state_dicts_load_into_the_model():
    history = run(rounds=1)
    x, _ = examples()
    for client, vector in ((None, history.mean()), (2, history.x[2])):
        module = net()
        module.load_state_dict(history.state_dict(client))
        assert torch.allclose(module.eval()(x), history.flat.predict(vector, x), atol=1e-6)


def test_rounds_of_a_random_graph_use_their_own_links():
    graph = random_graph(6, 2, seed=1)
    history = run(rounds=2, topology=graph)
    assert [each.numbers_sent for each in history.rounds] == [[2 * SIZE * len(beside) for beside in graph.neighbors(r)] for r in (1, 2)]
    assert history.rounds[0].numbers_sent != history.rounds[1].numbers_sent


class HeldApart(Topology):
    """Weights of one's own that are no gossip matrix."""

    clients, fixed = 4, True

    def neighbors(self, round):
        return ring(4).neighbors(1)

    def weights(self, round):
        w = ring(4).weights(1)
        w[0, 0] += 0.1
        return w


def test_bad_input_is_refused(tmp_path):
    algorithm, shards = DFedSAMAlgorithm(), quadratics()

    def bad(error, message, **keywords):
        given = {"model_fn": linear(), "shards": shards, "rounds": 1, "topology": ring(4)} | keywords
        with pytest.raises(error, match=message):
            simulate_decentralized(algorithm, **given)

    bad(ValueError, r"ring\(5\) has 5 clients and there are 4 shards; expected one each", topology=ring(5))
    bad(ValueError, "row 0 of W sums to 1.1; expected 1", topology=HeldApart())
    bad(ValueError, "executor is 'map'", executor="map")
    bad(ValueError, "rounds is 0", rounds=0)
    bad(ValueError, "seed is -1", seed=-1)
    bad(ValueError, r"away\(1\) names client 4; expected some of 0 to 3", away=lambda round: [4])
    bad(ValueError, r"away\(1\) names client -1", away=lambda round: [-1])
    bad(ValueError, r"away\(1\) names all 4 clients", away=lambda round: range(4))
    bad(IsADirectoryError, "is a directory", checkpoint=tmp_path)
    norm = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    bad(ValueError, "BatchNorm1d.* keeps statistics", model_fn=lambda: norm)
    bad(ValueError, "keeps statistics .*no server averages them", model_fn=FlatModel(norm, buffers="average"))


@pytest.mark.parametrize("executor", [None, "vmap"])
def test_a_model_with_nan_stops_before_it_spreads(executor, tmp_path):
    shards = quadratics()
    shards.y[shards.parts[2][0]] = torch.nan
    file, seen = tmp_path / "state.pt", []
    with pytest.raises(RuntimeError, match="client 2 came out of round 1 with NaN or infinite numbers"):
        simulate_decentralized(
            DFedSAMAlgorithm(),
            linear(),
            shards,
            2,
            topology=ring(4),
            executor=executor,
            checkpoint=file,
            evaluate=lambda x, r: seen.append(r),
        )
    assert not file.exists()
    assert not seen


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    file = tmp_path / "state.pt"
    run(rounds=1, checkpoint=file)
    held = file.read_bytes()
    for message, keywords in {
        "seed 5; resumed with 6": {"seed": 6},
        r"topology 'ring\(6\)'; resumed with 'from_networkx": {"topology": from_networkx(networkx.path_graph(6))},
        "algorithm": {"algorithm": DFedSAMAlgorithm(DFedSAMConfig(rho=0.2))},
    }.items():
        given = {"algorithm": DFedSAMAlgorithm(DFedSAMConfig(local_epochs=2, batch_size=8, gossip_steps=2)), "topology": ring(6), "seed": 5}
        with pytest.raises(ValueError, match=message):
            simulate_decentralized(**(given | keywords), model_fn=net, shards=classification(), rounds=2, checkpoint=file)
    with pytest.raises(ValueError, match="has a model of 99 parameters and is resumed with one of 35; expected the same model"):
        simulate_decentralized(
            DFedSAMAlgorithm(DFedSAMConfig(local_epochs=2, batch_size=8, gossip_steps=2)),
            lambda: nn.Linear(6, 5),
            classification(),
            2,
            topology=ring(6),
            seed=5,
            checkpoint=file,
        )
    assert file.read_bytes() == held
    file.write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="checkpoint"):
        run(rounds=2, checkpoint=file)
