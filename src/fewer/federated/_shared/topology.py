"""Who talks to whom where there is no server: graphs of clients, the weights they average with, and how quickly that brings them together.

A gossip matrix W is symmetric, its entries are at least 0 and zero where there is no link, and its rows sum to 1, so that averaging by it
keeps the mean over clients. lambda is its second largest eigenvalue by size: a step shrinks the distance to the mean by at least that.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

from fewer.checks import check_positive, check_whole
from fewer.errors import require

GRAPH = 2  # what a random stream is for, beside those of `clients`
REDRAWS = 100
SYMMETRIC, STOCHASTIC = 1e-12, 1e-9  # how far W may be from what it must be
APART = 1e-12  # 1 - lambda below which a graph counts as not connected
SHOWN = 5  # clients of a component that a message names

Neighbors = list[list[int]]
Weights = Float64[np.ndarray, "m m"]


class Topology(ABC):
    """Who is linked to whom in each round; `ring`, `torus`, `exponential`, `complete`, `random_graph`, `from_networkx` make some.

    A class of one's own needs `clients`, `neighbors` and a `repr` that tells it from others; `weights`, if it has its own, are checked.

    Attributes:
        clients: how many there are, m; their ids are 0 to m - 1.
        fixed: whether the graph is the same in every round.
    """

    clients: int
    fixed: bool = False

    @abstractmethod
    def neighbors(self, round: int) -> Neighbors:
        """Each client's neighbours in a round (from 1), in rising order, itself left out."""

    def weights(self, round: int) -> Weights:
        """The gossip matrix of a round: Metropolis weights."""
        return metropolis(self.neighbors(round))

    def __repr__(self) -> str:
        return getattr(self, "name", type(self).__name__)


class FixedGraph(Topology):
    """The same links in every round.

    Args:
        name: how it was made.
        links: the neighbours of each client.

    Raises:
        ValueError: a link has only one end, leads to oneself or to nobody, or the graph is not connected.

    Examples:
        >>> path = FixedGraph("path", [[1], [0, 2], [1]])
        >>> path.neighbors(1), path.weights(1).round(2).tolist()
        ([[1], [0, 2], [1]], [[0.67, 0.33, 0.0], [0.33, 0.33, 0.33], [0.0, 0.33, 0.67]])
    """

    fixed = True

    def __init__(self, name: str, links: Neighbors) -> None:
        check_links(links)
        check_connected(links)
        self.name, self.clients, self.links = name, len(links), [sorted(beside) for beside in links]

    def neighbors(self, round: int) -> Neighbors:
        return self.links


class RandomGraph(Topology):
    """A new graph each round, until one is connected; see `random_graph`.

    Raises:
        ValueError: the degree is below 1 or not below m.
    """

    def __init__(self, m: int, degree: int, seed: int = 0) -> None:
        check_whole(least=2, m=m)
        check_whole(degree=degree)
        check_whole(least=0, seed=seed)
        if degree >= m:
            raise ValueError(f"degree is {degree} for {m} clients; expected 1 to {m - 1}, the others there are: fewer")
        self.name, self.clients, self.degree, self.seed = f"random_graph({m}, {degree}, seed={seed})", m, degree, seed

    def neighbors(self, round: int) -> Neighbors:
        """The links of a round; they depend on the seed and the round alone.

        Raises:
            ValueError: none of 100 draws was connected.
        """
        rng = np.random.default_rng([self.seed, GRAPH, round])
        for _ in range(REDRAWS):
            links = self._draw(rng)
            if len(components(links)) == 1:
                return links
        raise ValueError(
            f"none of {REDRAWS} graphs drawn for round {round} is connected ({self.clients} clients, degree {self.degree}); "
            "expected one that is: a larger degree"
        )

    def _draw(self, rng: np.random.Generator) -> Neighbors:
        """Each client draws others; a link that one of its ends drew is a link."""
        linked = [set[int]() for _ in range(self.clients)]
        for i in range(self.clients):
            for drawn in rng.choice(self.clients - 1, size=self.degree, replace=False).tolist():
                j = drawn + (drawn >= i)  # the others, oneself left out
                linked[i].add(j)
                linked[j].add(i)
        return [sorted(beside) for beside in linked]


def ring(m: int) -> Topology:
    """Client i is linked to i - 1 and i + 1; lambda = (1 + 2 cos(2 pi / m)) / 3 from 4 clients on.

    Examples:
        >>> ring(5).neighbors(1)
        [[1, 4], [0, 2], [1, 3], [2, 4], [0, 3]]
    """
    return _by_offsets(f"ring({m})", m, [1])


def exponential(m: int) -> Topology:
    """Client i is linked to i +- 2^k for every 2^k < m.

    Examples:
        >>> exponential(8).neighbors(1)[0]
        [1, 2, 4, 6, 7]
    """
    check_whole(least=2, m=m)
    return _by_offsets(f"exponential({m})", m, [2**k for k in range((m - 1).bit_length())])


def complete(m: int) -> Topology:
    """Everybody is linked to everybody.

    Examples:
        >>> complete(3).weights(1).round(3).tolist()
        [[0.333, 0.333, 0.333], [0.333, 0.333, 0.333], [0.333, 0.333, 0.333]]
    """
    check_whole(least=2, m=m)
    return _by_offsets(f"complete({m})", m, list(range(1, m)))


def torus(a: int, b: int) -> Topology:
    """An a x b grid whose edges meet: client b r + c has four neighbours (a side of 2 gives one link along it, not two).

    Examples:
        >>> torus(3, 4).neighbors(1)[0]
        [1, 3, 4, 8]
    """
    check_whole(least=2, a=a, b=b)
    links = []
    for row, column in np.ndindex(a, b):
        beside = [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
        links.append(list({(r % a) * b + c % b for r, c in beside}))
    return FixedGraph(f"torus({a}, {b})", links)


def square_torus(m: int) -> Topology:
    """The torus of m clients whose sides are most alike.

    Examples:
        >>> square_torus(12)
        torus(3, 4)

    Raises:
        ValueError: m is a prime or 1.
    """
    check_whole(least=2, m=m)
    a = next(side for side in range(math.isqrt(m), 0, -1) if m % side == 0)
    if a == 1:
        raise ValueError(f"m is {m}, a prime; expected a product of two sides of at least 2, such as {max(4, m + 1)}")
    return torus(a, m // a)


def random_graph(m: int, degree: int, seed: int = 0) -> Topology:
    """A new graph each round: each client draws `degree` others, the links are the union (so degrees differ), until it is connected.

    Raises:
        ValueError: the degree is below 1 or not below m; from `neighbors` where 100 draws of a round are not connected.

    Examples:
        >>> graph = random_graph(6, 2, seed=1)
        >>> graph.neighbors(1) == graph.neighbors(1), graph.neighbors(1) == graph.neighbors(2)
        (True, False)
    """
    return RandomGraph(m, degree, seed)


def from_networkx(graph: Any) -> Topology:
    """The links of an undirected `networkx` graph whose nodes are 0 to m - 1.

    Raises:
        ValueError: the graph is directed, has other nodes, a link from a node to itself, or is not connected.

    Examples:
        >>> import networkx
        >>> from_networkx(networkx.star_graph(3)).neighbors(1)
        [[1, 2, 3], [0], [0], [0]]
    """
    if graph.is_directed():
        raise ValueError(
            "the graph is directed; expected an undirected one, for weights that are the same both ways: graph.to_undirected()"
        )
    m = graph.number_of_nodes()
    if m == 0:
        raise ValueError("the graph has no clients; expected the nodes 0, 1, ...: add some")
    if set(graph.nodes) != set(range(m)):
        odd = next((node for node in graph.nodes if node not in range(m)), None)
        raise ValueError(
            f"the graph has a node {odd!r}; expected the clients' ids 0 to {m - 1}: networkx.convert_node_labels_to_integers(graph)"
        )
    links = [sorted(graph[i]) for i in range(m)]
    digest = hashlib.blake2b(repr(links).encode(), digest_size=6).hexdigest()
    return FixedGraph(f"from_networkx({m} clients, {digest})", links)


def _by_offsets(name: str, m: int, offsets: Sequence[int]) -> Topology:
    """Client i linked to i +- each offset, modulo m."""
    check_whole(least=2, m=m)
    return FixedGraph(name, [list({(i + sign * by) % m for by in offsets for sign in (-1, 1)} - {i}) for i in range(m)])


def without(neighbors: Neighbors, away: Collection[int]) -> Neighbors:
    """The links that are left when some clients are away, on both ends.

    Examples:
        >>> without([[1, 2], [0, 2], [0, 1]], away=[1])
        [[2], [], [0]]
    """
    gone = set(away)
    return [[] if i in gone else [j for j in beside if j not in gone] for i, beside in enumerate(neighbors)]


def metropolis(neighbors: Neighbors) -> Weights:
    """The weights w_ij = 1 / (1 + max(deg i, deg j)) for a link, w_ii = 1 minus the others of the row.

    Args:
        neighbors: a list of neighbours a client, each link told at both its ends; a client may have none.

    Raises:
        ValueError: a link has only one end, or leads to oneself or to nobody.

    Examples:
        >>> metropolis([[1], [0]]).tolist()
        [[0.5, 0.5], [0.5, 0.5]]
    """
    check_links(neighbors)
    w = np.zeros((len(neighbors), len(neighbors)))
    for i, beside in enumerate(neighbors):
        for j in beside:
            w[i, j] = 1 / (1 + max(len(beside), len(neighbors[j])))
    np.fill_diagonal(w, 1 - w.sum(axis=1))
    return w


def second_eigenvalue(weights: Weights) -> float:
    """lambda = max(|lambda_2|, |lambda_m|) of a gossip matrix: what a step leaves of the distance to the mean at most."""
    check_weights(weights)
    values = np.linalg.eigvalsh(weights)  # in rising order; the last is 1
    return float(max(abs(values[0]), abs(values[-2]))) if len(values) > 1 else 0.0


def spectral_gap(weights: Weights) -> float:
    """1 - lambda: 1 where one step makes all agree, 0 where the graph is not connected.

    Raises:
        ValueError: W is no gossip matrix (see `check_weights`).

    Examples:
        >>> round(spectral_gap(ring(16).weights(1)), 4), round(spectral_gap(torus(4, 4).weights(1)), 4)
        (0.0507, 0.4)
    """
    return max(0.0, 1 - second_eigenvalue(weights))


def consensus_steps(weights: Weights, tol: float) -> int:
    """How many gossip steps leave at most `tol` of the distance to the mean: max(1, ceil(ln tol / ln lambda)).

    Raises:
        ValueError: the graph is not connected (lambda is 1), or W is no gossip matrix.

    Examples:
        >>> consensus_steps(ring(16).weights(1), 1e-3), consensus_steps(complete(16).weights(1), 1e-3)
        (133, 1)
    """
    check_positive(tol=tol)
    lambda_ = second_eigenvalue(weights)
    if 1 - lambda_ < APART:
        raise ValueError("lambda is 1: the graph is not connected, and no number of steps makes all agree; expected one piece: add links")
    return max(1, math.ceil(math.log(tol) / math.log(lambda_) - 1e-9)) if lambda_ > 0 else 1


# What is refused


def check_links(neighbors: Neighbors) -> None:
    """ValueError where a link leads to nobody or oneself, is told twice, or by one of its ends alone."""
    m, sets = len(neighbors), [set(beside) for beside in neighbors]
    for i, beside in enumerate(neighbors):
        for j in beside:
            if not 0 <= j < m:
                raise ValueError(f"client {i} is linked to {j}; expected one of the clients 0 to {m - 1}: take the link out")
            if j == i:
                raise ValueError(
                    f"client {i} is linked to itself; expected links to others alone: take it out (its own weight is what is left)"
                )
            if i not in sets[j]:
                raise ValueError(f"client {i} is linked to {j}, but {j} not to {i}; expected links both ways: add the other end")
        if len(sets[i]) < len(beside):
            raise ValueError(f"client {i} has a neighbour twice in {list(beside)}; expected each once: take it out")


def components(neighbors: Neighbors) -> list[list[int]]:
    """The pieces that a graph falls into, each in rising order."""
    networkx = require("networkx", "federated")
    graph = networkx.Graph()
    graph.add_nodes_from(range(len(neighbors)))
    graph.add_edges_from((i, j) for i, beside in enumerate(neighbors) for j in beside)
    return sorted(sorted(piece) for piece in networkx.connected_components(graph))


def check_connected(neighbors: Neighbors) -> None:
    """ValueError naming two pieces of a graph that has more than one."""

    def said(piece: list[int]) -> str:
        return f"{piece[:SHOWN]}" + (f" and {len(piece) - SHOWN} more" if len(piece) > SHOWN else "")

    first, *others = components(neighbors)
    if others:
        raise ValueError(
            f"the graph is not connected: no links lead from the clients {said(first)} to {said(others[0])}; expected one piece: add a link"
        )


def check_weights(weights: Weights, neighbors: Neighbors | None = None) -> None:
    """ValueError where a matrix is no gossip matrix: square, symmetric, entries at least 0, rows that sum to 1, zero where there is no link."""
    m = len(weights)
    if weights.shape != (m, m):
        raise ValueError(f"W is {weights.shape}; expected a square matrix [m, m]")
    if not np.isfinite(weights).all():
        raise ValueError("W has NaN or infinite entries; expected weights of at least 0")
    sums = weights.sum(axis=1)
    row = int(np.abs(sums - 1).argmax())
    if abs(sums[row] - 1) > STOCHASTIC:
        raise ValueError(f"row {row} of W sums to {sums[row]:.6g}; expected 1, or the mean over clients is not kept: see metropolis()")
    i, j = (int(place) for place in np.unravel_index(np.abs(weights - weights.T).argmax(), (m, m)))
    if abs(weights[i, j] - weights[j, i]) > SYMMETRIC:
        raise ValueError(f"W is not symmetric: w[{i}, {j}] is {weights[i, j]:.6g} and w[{j}, {i}] {weights[j, i]:.6g}; see metropolis()")
    if weights.min() < 0:
        raise ValueError(f"W has an entry {weights.min():.6g}; expected weights of at least 0: see metropolis()")
    if neighbors is not None:
        linked = np.eye(m, dtype=bool)
        for i, beside in enumerate(neighbors):
            linked[i, beside] = True
        if weights[~linked].any():
            i, j = (int(place) for place in np.argwhere(~linked & (weights != 0))[0])
            raise ValueError(f"w[{i}, {j}] is {weights[i, j]:.6g} where there is no link; expected 0: add the link, or see metropolis()")
