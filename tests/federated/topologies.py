"""Topologies of all kinds, that the tests share."""

from __future__ import annotations

import networkx

from fewer.federated import complete, exponential, from_networkx, random_graph, ring, torus

TOPOLOGIES = {
    "ring": ring(16), "ring of 2": ring(2), "ring of 3": ring(3), "torus": torus(4, 4), "torus of side 2": torus(2, 3),
    "exponential": exponential(16), "exponential of 12": exponential(12), "complete": complete(9), "random": random_graph(12, 2, seed=3),
    "star": from_networkx(networkx.star_graph(5)), "path": from_networkx(networkx.path_graph(6)), "two sides": from_networkx(networkx.complete_bipartite_graph(3, 3)),
}  # fmt: skip
