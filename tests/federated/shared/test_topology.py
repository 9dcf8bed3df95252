"""Graphs of clients and gossip matrices: what they promise, the eigenvalues that are known, and what is refused."""

from __future__ import annotations

import copy
import pickle

import networkx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from topologies import TOPOLOGIES

from fewer.federated import complete, consensus_steps, exponential, from_networkx, metropolis, random_graph, ring, spectral_gap, torus
from fewer.federated._shared.topology import FixedGraph, Topology, check_weights, second_eigenvalue, without


@st.composite
def connected(draw):
    """The neighbour lists of a connected graph: a random tree and further links."""
    m = draw(st.integers(2, 12))
    links = {(draw(st.integers(0, i - 1)), i) for i in range(1, m)}
    links |= {
        tuple(sorted(pair))
        for pair in draw(st.sets(st.tuples(st.integers(0, m - 1), st.integers(0, m - 1)), max_size=20))
        if len(set(pair)) == 2
    }
    neighbors = [[] for _ in range(m)]
    for i, j in sorted(links):
        neighbors[i].append(j)
        neighbors[j].append(i)
    return neighbors


@settings(max_examples=60, deadline=None)
@given(connected())
def test_metropolis_weights_are_a_gossip_matrix(neighbors):
    w, m = metropolis(neighbors), len(neighbors)
    assert np.array_equal(w, w.T)
    assert np.abs(w.sum(axis=1) - 1).max() <= 1e-15 * m
    assert w.min() >= 0
    linked = np.eye(m, dtype=bool)
    for i, beside in enumerate(neighbors):
        linked[i, beside] = True
    assert not w[~linked].any()
    assert (w[linked] > 0).all()
    assert second_eigenvalue(w) < 1
    check_weights(w, neighbors)


@pytest.mark.parametrize("topology", TOPOLOGIES.values(), ids=TOPOLOGIES)
def test_links_go_both_ways_and_weights_belong_to_them(topology):
    for round in (1, 2):
        neighbors = topology.neighbors(round)
        assert all(i in neighbors[j] and i != j for i, beside in enumerate(neighbors) for j in beside)
        assert all(list(beside) == sorted(set(beside)) for beside in neighbors)
        assert networkx.is_connected(networkx.from_dict_of_lists(dict(enumerate(neighbors))))
        check_weights(topology.weights(round), neighbors)


def test_known_eigenvalues():
    for m in (8, 16, 32):
        assert abs(second_eigenvalue(ring(m).weights(1)) - (1 + 2 * np.cos(2 * np.pi / m)) / 3) <= 1e-12
    assert abs(second_eigenvalue(torus(4, 4).weights(1)) - 0.6) <= 1e-12
    for m, expected in ((8, 1 / 3), (16, 0.5), (32, 0.6)):
        assert abs(second_eigenvalue(exponential(m).weights(1)) - expected) <= 1e-12
    assert second_eigenvalue(complete(7).weights(1)) <= 1e-12
    two_sides = TOPOLOGIES["two sides"].weights(1)  # whose smallest eigenvalue, (1 - 3) / 4, is farther from 0 than (1 + 0) / 4
    assert abs(second_eigenvalue(two_sides) - 0.5) <= 1e-12
    assert consensus_steps(ring(16).weights(1), 1e-3) == 133
    assert consensus_steps(complete(16).weights(1), 1e-9) == 1
    assert consensus_steps(np.eye(1), 1e-3) == 1
    assert consensus_steps(torus(4, 4).weights(1), 0.6**5) == 5
    assert consensus_steps(torus(4, 4).weights(1), 2.0) == 1


def test_known_weights():
    assert np.allclose(ring(5).weights(1)[0], [1 / 3, 1 / 3, 0, 0, 1 / 3], atol=1e-15)
    assert np.allclose(complete(5).weights(1), 1 / 5, atol=1e-15)
    assert [len(beside) for beside in torus(4, 5).neighbors(1)] == [4] * 20
    assert [len(beside) for beside in torus(2, 4).neighbors(1)] == [3] * 8
    star = from_networkx(networkx.star_graph(3)).weights(1)
    assert np.allclose(star[0], 1 / 4)
    assert np.allclose(star[1], [1 / 4, 3 / 4, 0, 0])


def test_a_random_graph_is_new_each_round_and_the_same_again():
    graph = random_graph(10, 2, seed=4)
    drawn = [graph.neighbors(round) for round in range(1, 6)]
    assert len({str(each) for each in drawn}) == 5
    assert drawn == [random_graph(10, 2, seed=4).neighbors(round) for round in range(1, 6)]
    assert drawn != [random_graph(10, 2, seed=5).neighbors(round) for round in range(1, 6)]
    degrees = [len(beside) for beside in drawn[0]]
    assert min(degrees) >= 2
    assert len(set(degrees)) > 1


def test_topologies_survive_copies_and_pickles():
    for topology in TOPOLOGIES.values():
        for again in (copy.deepcopy(topology), pickle.loads(pickle.dumps(topology))):
            assert repr(again) == repr(topology)
            assert again.neighbors(3) == topology.neighbors(3)
    assert len({repr(topology) for topology in TOPOLOGIES.values()}) == len(TOPOLOGIES)


def test_clients_that_are_away_lose_their_links_on_both_ends():
    assert without([[1, 2], [0, 2], [0, 1]], [1]) == [[2], [], [0]]
    w = metropolis(without(ring(4).neighbors(1), [1]))
    assert w[1].tolist() == [0, 1, 0, 0]
    assert w[:, 1].tolist() == [0, 1, 0, 0]
    assert np.array_equal(w, w.T)


REFUSED = [
    (lambda: FixedGraph("two", [[1], [0], [3], [2]]), r"no links lead from the clients \[0, 1\] to \[2, 3\]"),
    (lambda: from_networkx(networkx.Graph([(0, 1), (2, 3)])), r"not connected: no links lead from the clients \[0, 1\] to \[2, 3\]"),
    (lambda: from_networkx(networkx.Graph([(1, 2), (2, 3)])), "node 3; expected the clients' ids 0 to 2"),
    (lambda: from_networkx(networkx.Graph([("a", "b")])), "node 'a'; expected the clients' ids 0 to 1"),
    (lambda: from_networkx(networkx.Graph([(0, 1), (1, 1)])), "client 1 is linked to itself"),
    (lambda: from_networkx(networkx.DiGraph([(0, 1)])), "directed; expected an undirected"),
    (lambda: from_networkx(networkx.Graph()), "no clients"),
    (lambda: metropolis([[1], []]), "client 0 is linked to 1, but 1 not to 0"),
    (lambda: metropolis([[1, 1], [0]]), "a neighbour twice"),
    (lambda: metropolis([[2], [0]]), "client 0 is linked to 2; expected one of the clients 0 to 1"),
    (lambda: random_graph(4, 4), "degree is 4 for 4 clients; expected 1 to 3"),
    (lambda: random_graph(4, 0), "degree is 0"),
    (lambda: torus(1, 4), "a is 1; expected a whole number of at least 2"),
    (lambda: torus(4, 1), "b is 1"),
    (lambda: ring(1), "m is 1"),
    (lambda: ring(2.5), "m is 2.5"),
    (lambda: exponential(True), "m is True"),
    (lambda: consensus_steps(metropolis([[1], [0], [3], [2]]), 1e-3), "lambda is 1: the graph is not connected"),
    (lambda: consensus_steps(ring(4).weights(1), 0.0), "tol is 0.0"),
    (lambda: spectral_gap(np.array([[0.5, 0.5], [0.6, 0.4]])), r"not symmetric: w\[0, 1\] is 0.5 and w\[1, 0\] 0.6"),
    (lambda: spectral_gap(np.array([[0.5, 0.5], [0.5, 0.7]])), "row 1 of W sums to 1.2; expected 1"),
    (lambda: spectral_gap(np.array([[1.5, -0.5], [-0.5, 1.5]])), "an entry -0.5"),
    (lambda: spectral_gap(np.ones((2, 3))), r"W is \(2, 3\); expected a square matrix"),
    (lambda: spectral_gap(np.full((2, 2), np.nan)), "NaN"),
    (lambda: check_weights(np.full((3, 3), 1 / 3), [[1], [0, 2], [1]]), r"w\[0, 2\] is 0.333333 where there is no link"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_what_is_no_graph_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_round_whose_draws_are_all_in_pieces_is_named(monkeypatch):
    """Ten clients that draw one other each are now and then in one piece; 100 draws in a row that are not do not come by chance."""
    from fewer.federated._shared import topology

    monkeypatch.setattr(topology, "REDRAWS", 1)
    graph = random_graph(10, 1, seed=0)
    with pytest.raises(ValueError, match=r"none of 1 graphs drawn for round \d+ is connected \(10 clients, degree 1\)"):
        [graph.neighbors(round) for round in range(1, 30)]


def test_a_disconnected_graph_has_no_gap():
    assert spectral_gap(metropolis([[1], [0], [3], [2]])) == pytest.approx(0, abs=1e-12)


def test_a_topology_of_ones_own_needs_neighbours_alone():
    class Growing(Topology):
        clients = 4

        def neighbors(self, round):
            return ring(4).neighbors(1) if round == 1 else complete(4).neighbors(1)

    assert np.allclose(Growing().weights(2), 1 / 4)
    assert repr(Growing()) == "Growing"
