"""The verb `fewer topology GRAPH --clients M`: what a graph of clients without a server costs a round, and how quickly it makes all agree."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fewer.federated._shared.topology import Topology

MOST_CLIENTS = 2_000  # the eigenvalues of that many take seconds


class Graph(StrEnum):
    ring = "ring"
    torus = "torus"
    exponential = "exponential"
    complete = "complete"
    random = "random"


def topology(
    graph: Annotated[Graph, typer.Argument(help="Who is linked to whom.")],
    clients: Annotated[int, typer.Option(min=2, max=MOST_CLIENTS, help="How many there are; of a torus, a product of two sides.")] = 16,
    degree: Annotated[int, typer.Option(min=1, max=MOST_CLIENTS, help="Of a random graph: how many others each client draws.")] = 3,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of a random graph.")] = 0,
    parameters: Annotated[int, typer.Option(min=1, max=10**15, help="Of the model.")] = 1_000_000,
    gossip_steps: Annotated[int, typer.Option(min=1, max=10_000, help="How often a round's exchange is made.")] = 1,
    tol: Annotated[float, typer.Option(min=0, help="The share of the distance to the mean that is to be left.")] = 1e-3,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Links, lambda, gossip steps until all agree, and bytes a round, of a graph of clients.

    lambda is what a gossip step leaves of the distance to the mean of all models at most. A random graph is new each round; told is that
    of round 1.

    Example: fewer topology ring --clients 16 --parameters 13258
    """
    from fewer.checks import check_share
    from fewer.federated._shared.topology import consensus_steps, second_eigenvalue
    from fewer.federated._shared.traffic import ideal_bytes
    from fewer.quantities import show

    check_share(ends=False, **{"--tol": tol})
    chosen = _make(graph, clients, degree, seed)
    weights, degrees = chosen.weights(1), [len(beside) for beside in chosen.neighbors(1)]
    sent = [ideal_bytes(parameters, gossip_steps * links) for links in degrees]
    told = {
        "topology": repr(chosen), "clients": clients, "links": sum(degrees) // 2, "degrees": [min(degrees), max(degrees)],
        "lambda": second_eigenvalue(weights), "tol": tol, "steps": consensus_steps(weights, tol), "parameters": parameters,
        "gossip_steps": gossip_steps, "bytes_of_a_client": max(sent), "bytes": sum(sent),
    }  # fmt: skip
    if as_json:
        print(json.dumps(told))
        return
    each = f"{min(degrees)}" if min(degrees) == max(degrees) else f"{min(degrees)} to {max(degrees)}"
    print(f"{told['topology']}: {clients} clients, {told['links']:,} links, {each} neighbours each")
    print(f"lambda   {told['lambda']:.4f}: a gossip step leaves at most that of the distance to the mean, {told['steps']:,} leave {tol:g}")
    most = "a client" if min(sent) == max(sent) else "the busiest client"
    print(
        f"a round  {show(max(sent), 'bytes')} sent by {most}, {show(sum(sent), 'bytes')} by all "
        f"({parameters:,} parameters of 4 bytes, {gossip_steps} gossip step{'s' if gossip_steps > 1 else ''})"
    )


def _make(graph: Graph, clients: int, degree: int, seed: int) -> Topology:
    from fewer.federated._shared.topology import complete, exponential, random_graph, ring, square_torus

    if graph is Graph.random:
        return random_graph(clients, degree, seed)
    makers = {Graph.ring: ring, Graph.torus: square_torus, Graph.exponential: exponential, Graph.complete: complete}
    return makers[graph](clients)


COMMANDS = {"topology": topology}
