"""Clients as real processes, linked by torch.distributed: what each of them does, in functions that it can import."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import struct
import threading
import warnings
from pathlib import Path

import networkx
import torch
from federations import examples, net
from torch import nn

from fewer import meters
from fewer.federated import DFedSAMAlgorithm, DFedSAMConfig, FlatModel, Shards, dirichlet, from_networkx, random_graph, ring, run_peer

COUNT, SEED, PATIENCE = 4, 5, 240.0
TCP_INFO_BYTES_SENT = 200  # where Linux's struct tcp_info has them
CONFIG = DFedSAMConfig(rho=0.1, gossip_steps=2, local_epochs=2, batch_size=8)
UNEVEN = {"star": from_networkx(networkx.star_graph(COUNT - 1)), "random": random_graph(COUNT, 1, seed=2)}
WIDE = (100, 100)  # a linear layer whose bytes are many beside the links' own


def shards():
    x, y = examples()
    return Shards(x, y, dirichlet(y, COUNT, alpha=0.3, seed=3, min_size=7))


def mine(rank):
    held = shards()
    return held.x[held.parts[rank]], held.y[held.parts[rank]]


class Fails(DFedSAMAlgorithm):
    """Client 2's second round goes wrong: the process is killed, or never answers."""

    how = ""

    def local(self, x, shard, rng, round):
        if round == 2 and torch.distributed.get_rank() == 2:
            if self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            threading.Event().wait(PATIENCE)
        return super().local(x, shard, rng, round)


class Killed(Fails):
    how = "killed"


class Silent(Fails):
    how = "silent"


# What a process does


def trains(rank, folder):
    """Three rounds, also on graphs whose degrees differ; then the same with checkpoints, cut after two rounds; then with client 0's checkpoint of the round before."""
    run = {"algorithm": DFedSAMAlgorithm(CONFIG), "model_fn": net, "data": mine(rank), "topology": ring(COUNT), "seed": SEED}
    told = {"plain": run_peer(**run, rounds=3)}
    told |= {name: run_peer(**(run | {"topology": graph}), rounds=3) for name, graph in UNEVEN.items()}
    file, older = folder / f"{rank}.pt", folder / f"{rank}-older.pt"
    run_peer(**run, rounds=1, checkpoint=file)
    shutil.copy(file, older)
    run_peer(**run, rounds=2, checkpoint=file)
    told["resumed"] = run_peer(**run, rounds=3, checkpoint=file)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_peer(**run, rounds=4, checkpoint=older if rank == 0 else file)
    told["warned"] = [str(each.message) for each in caught]
    with contextlib.suppress(ValueError):
        run_peer(**run, rounds=4, checkpoint=folder / f"{(rank + 1) % COUNT}.pt")
        told["took another's checkpoint"] = True
    return told


def sends(rank, folder):
    """What run_peer says that it sent, and what the kernel says that this process's sockets sent."""
    flat = FlatModel(nn.Linear(*WIDE))
    with torch.no_grad():
        start = FlatModel(nn.Linear(*WIDE).apply(lambda layer: [nn.init.constant_(each, 0.01) for each in layer.parameters()]))
    data = torch.ones(5, WIDE[0]), torch.arange(5)
    before = bytes_sent()
    with meters.counting() as counts:
        run_peer(DFedSAMAlgorithm(CONFIG), start, data, 3, topology=ring(COUNT))
    torch.distributed.barrier()
    return {"size": flat.size, "counted": counts["numbers_sent"], "bytes": bytes_sent() - before}


def bytes_sent():
    total = 0
    for each in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError, struct.error), socket.socket(fileno=os.dup(int(each.name))) as link:
            if link.family in (socket.AF_INET, socket.AF_INET6) and link.type == socket.SOCK_STREAM:
                info = link.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                sent, sent_again = struct.unpack_from("QQ", info, TCP_INFO_BYTES_SENT)  # a busy machine sends some twice
                total += sent - sent_again
    return total


def fails(rank, folder, algorithm, timeout=PATIENCE):
    file = folder / f"{rank}.pt"
    return run_peer(algorithm, net, mine(rank), 3, topology=ring(COUNT), seed=SEED, timeout=timeout, checkpoint=file)


def has_nan(rank, folder):
    x, y = mine(rank)
    return run_peer(DFedSAMAlgorithm(CONFIG), net, (x * (torch.nan if rank == 1 else 1.0), y), 3, topology=ring(COUNT))


def is_refused(rank, folder):
    """The message of each call that every process refuses."""
    run = {"algorithm": DFedSAMAlgorithm(CONFIG), "model_fn": net, "data": mine(rank), "rounds": 1, "topology": ring(COUNT)}
    wider, other = nn.Linear(6, 4 if rank == 3 else 3), FlatModel(nn.Linear(6, 3))
    other.model.weight.data.fill_(0.1 * (rank == 2))
    other.model.bias.data.fill_(0)
    calls = {
        "size": {"model_fn": lambda: wider},
        "start": {"model_fn": other},
        "settings": {"seed": int(rank == 1)},
        "processes": {"topology": ring(COUNT + 1)},
        "timeout": {"timeout": 0.0},
        "labels": {"data": (mine(rank)[0], mine(rank)[1][:-1])},
    }
    said = {}
    for name, wrong in calls.items():
        try:
            run_peer(**(run | wrong))
        except ValueError as error:
            said[name] = str(error)
    return said


# How they are started


def _live(job, rank, folder, answer, arguments):
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=COUNT)
    try:
        said = ("done", job(rank, folder, *arguments))
    except Exception as error:
        said = (type(error).__name__, str(error))
    answer.send_bytes(pickle.dumps(said))  # tensors whole: torch's own way wants this process to live until they are read
    torch.distributed.destroy_process_group()


def lives(job, folder, *arguments, awaited=range(COUNT)):
    """Start a process a client and give what each of those awaited answers: ("done", what the job returned), an error, or ("gone", "").

    The others are ended then.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "fewer.federated._shared.peers", "fewer.federated.dfedsam.algorithm"])
    ends, processes = [], []
    for rank in range(COUNT):
        end, far = context.Pipe(duplex=False)
        process = context.Process(target=_live, args=(job, rank, folder, far, arguments))
        process.start()
        far.close()
        ends.append(end)
        processes.append(process)
    answers = {}
    try:
        for rank in awaited:
            assert ends[rank].poll(PATIENCE), f"process {rank} did not answer"
            try:
                answers[rank] = pickle.loads(ends[rank].recv_bytes())
            except EOFError:
                answers[rank] = ("gone", "")
    finally:
        for rank, process in enumerate(processes):
            if rank not in answers:
                process.kill()
            process.join()
    return answers
