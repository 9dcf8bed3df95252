"""One client in a process of its own: it trains, and averages with its neighbours by `torch.distributed`. Nobody stands in the middle."""

from __future__ import annotations

import contextlib
import hashlib
import re
import time
import warnings
from collections.abc import Collection, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch import distributed as dist

from fewer import meters
from fewer.checks import check_positive, check_whole
from fewer.federated._shared.algorithm import ServerState
from fewer.federated._shared.checkpoint import load_checkpoint, save_checkpoint
from fewer.federated._shared.clients import Shards, client_rng
from fewer.federated._shared.gossip import DecentralizedAlgorithm, ModelOf, check_finite, flat_model, graph_of, train
from fewer.federated._shared.topology import Topology
from fewer.files import check_new_file


def run_peer(
    algorithm: DecentralizedAlgorithm,
    model_fn: ModelOf,
    data: tuple[Tensor, Tensor],
    rounds: int,
    *,
    topology: Topology,
    group: Any = None,
    seed: int = 0,
    timeout: float = 60.0,
    checkpoint: Path | None = None,
) -> Float[Tensor, "d"]:
    """Be one client: the one whose id is this process's rank. Every process of the group calls it, with the same arguments but the data.

    What the clients compute is what `simulate_decentralized` computes of the same data, algorithm, topology and seed.

    Args:
        algorithm: a method's, as for `simulate_decentralized`.
        model_fn: makes the model that all start from; it must make the same one in every process (seed it). A `FlatModel` will do.
        data: this client's examples and labels (x [n, ...], y [n, ...]), on the model's device. They never leave the process.
        rounds: how many in all.
        topology: who is linked to whom; as many clients as the group has processes.
        group: of `torch.distributed`, gloo or nccl; None: all processes.
        seed: of every client's batches.
        timeout: seconds to wait for a neighbour, its training included, before it counts as gone.
        checkpoint: a file of this client's own that its model is written into after each round, and taken up from where it exists.

    A neighbour that dies, or does not answer in time, ends this process's run by an error that names it, and so on from neighbour to
    neighbour: none goes on alone. Start all again (`torchrun --max-restarts` does) and they take up their checkpoints. Clients that come
    back from an older round than others go on with the others' latest, each from the model it has, as if they had been away in between;
    a warning tells it.

    Returns:
        this client's model [d].

    Raises:
        ValueError: the group has another number of processes than the topology clients; models, starts or settings of the processes
            differ; or the checkpoint is of another run or client.
        ConnectionError: a neighbour did not answer in time, or is gone.
        RuntimeError: this client's training gave NaN or infinite numbers, and nothing of it was sent; or there is no process group.
        OSError: the checkpoint cannot be written where it is asked for.
    """
    check_whole(rounds=rounds)
    check_whole(least=0, seed=seed)
    check_positive(timeout=timeout)
    if checkpoint is not None:
        check_new_file(checkpoint, overwrite=True, option="checkpoint")
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("there is no process group; expected one: torch.distributed.init_process_group('gloo') in a torchrun process")
    wire, flat = Wire(group, timeout), flat_model(model_fn)
    if wire.size != topology.clients:
        raise ValueError(f"the group has {wire.size} processes and {topology!r} {topology.clients} clients; expected one each")
    shard = Shards(*data, [range(len(data[0]))]).shard(0, flat)
    about = {"seed": seed, "algorithm": repr(algorithm), "topology": repr(topology), "client": wire.rank}
    start = model = flat.initial()
    done = 0
    if checkpoint is not None and Path(checkpoint).exists():
        state, _ = load_checkpoint(checkpoint, topology.clients, flat.size, **about)
        model, done = state.x.to(model), state.round
    settings = repr((repr(algorithm), repr(topology), seed, rounds))
    done = agree(wire, flat.size, digest(settings.encode()), digest(start.cpu().numpy().tobytes()), done)
    for number in range(done + 1, rounds + 1):
        model, _ = train(algorithm, model, shard, client_rng(seed, number, wire.rank), wire.rank, number)
        check_finite(model, [wire.rank], number)
        neighbors, weights = graph_of(topology, number)
        shares = torch.from_numpy(weights[wire.rank]).to(model)
        for _ in range(algorithm.gossip_steps):
            model = average(model, shares, wire.exchange(model, neighbors[wire.rank], f"round {number}"), wire.rank)
        if checkpoint is not None:
            save_checkpoint(checkpoint, ServerState(model, topology.clients, number), **about)
    return model


def average(z: Tensor, shares: Float[Tensor, "m"], received: dict[int, Tensor], client: int) -> Tensor:
    """x_i = w_ii z_i + sum over neighbours of w_ij z_j, in the order of their ids, so that it does not depend on who answered first."""
    x = shares[client] * z
    for neighbor in sorted(received):
        x.addcmul_(shares[neighbor], received[neighbor])
    return x


class Wire:
    """This process's links to the others of its group; vectors travel where the group's backend takes them (nccl: GPU, gloo: memory)."""

    def __init__(self, group: Any, timeout: float) -> None:
        self.group, self.timeout = group, timeout
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else torch.device("cpu")

    def exchange(self, vector: Float[Tensor, "d"], neighbors: Collection[int], when: str) -> dict[int, Tensor]:
        """Send a vector to every neighbour and get theirs; all at once, sends beside receives."""
        sent = vector.to(self.device).contiguous()
        got = {neighbor: torch.empty_like(sent) for neighbor in neighbors}
        operations = [dist.P2POp(dist.irecv, got[neighbor], group=self.group, group_peer=neighbor) for neighbor in neighbors]
        operations += [dist.P2POp(dist.isend, sent, group=self.group, group_peer=neighbor) for neighbor in neighbors]
        deadline, whom = time.monotonic() + self.timeout, [*neighbors, *neighbors]
        try:
            works = dist.batch_isend_irecv(operations) if operations else []
        except RuntimeError:  # a link is down already, and torch does not say which
            works = self._one_by_one(operations, when)
        joint = len(works) < len(operations)  # nccl makes one piece of work of them all
        for place, work in enumerate(works):
            with self._named(whom if joint else [whom[place]], when):
                work.wait(timedelta(seconds=max(0.001, deadline - time.monotonic())))
        meters.count("numbers_sent", sent.numel() * len(neighbors))
        return {neighbor: each.to(vector.device) for neighbor, each in got.items()}

    def _one_by_one(self, operations: list[dist.P2POp], when: str) -> list[Any]:
        """The operations, each on its own, so that the neighbour whose link is down is known."""
        works = []
        for operation in operations:
            with self._named([operation.group_peer], when):
                works.append(operation.op(operation.tensor, operation.peer, operation.group))
        return works

    def gather(self, numbers: list[int]) -> list[list[int]]:
        """A few whole numbers of every process, by rank."""
        mine = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        all_ = [torch.empty_like(mine) for _ in range(self.size)]
        with self._named([rank for rank in range(self.size) if rank != self.rank], "before the first round"):
            work = dist.all_gather(all_, mine, group=self.group, async_op=True)
            if work is not None:
                work.wait(timedelta(seconds=self.timeout))
        return [each.tolist() for each in all_]

    @contextlib.contextmanager
    def _named(self, neighbors: Collection[int], when: str) -> Iterator[None]:
        """What torch raises of a link, as an error that says whose it is."""
        try:
            yield
        except RuntimeError as error:
            what = re.sub(r"^\[.*?\] ", "", str(error).splitlines()[0])  # without the place in torch's own source
            who = " or ".join(str(each) for each in sorted(set(neighbors)))
            raise ConnectionError(
                f"{when}: client {self.rank} heard nothing from its neighbour {who} ({what}); expected an answer "
                f"within {self.timeout:g} s: start all clients again, they go on from their checkpoints"
            ) from error


def digest(content: bytes) -> int:
    """63 bits that tell content apart."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") >> 1


def agree(wire: Wire, size: int, settings: int, start: int, done: int) -> int:
    """The round after which all go on: the latest that any has done.

    Raises:
        ValueError: models differ in size, settings differ, or those that begin do so from unlike models.
    """
    told = wire.gather([size, settings, start, done])
    for rank, (its_size, its_settings, its_start, _) in enumerate(told):
        if its_size != told[0][0]:
            raise ValueError(f"rank {rank} has a model of {its_size} parameters and rank 0 one of {told[0][0]}; expected the same model")
        if its_settings != told[0][1]:
            raise ValueError(
                f"rank {rank} runs with another algorithm, topology, seed or rounds than rank 0; expected the same in every process"
            )
        if its_start != told[0][2] and not any(each[3] for each in told):
            raise ValueError(f"rank {rank} starts from another model than rank 0; expected the same x^0: seed model_fn, or load one file")
    rounds = [each[3] for each in told]
    if len(set(rounds)) > 1:
        late = [rank for rank, each in enumerate(rounds) if each < max(rounds)]
        warnings.warn(
            f"the clients {late} come back after round {min(rounds)} and others after round {max(rounds)}; all go on with round "
            f"{max(rounds) + 1}, each from the model it has",
            stacklevel=3,
        )
    return max(rounds)
