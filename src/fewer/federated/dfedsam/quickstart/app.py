"""DFedSAM on handwritten digits: each process is a client with digits of its own, and averages with its neighbours on a ring.

torchrun --nproc-per-node 4 app.py --rounds 10
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, distributed, nn

from fewer.data import load_digits
from fewer.federated import DFedSAMAlgorithm, DFedSAMConfig, FlatModel, dirichlet, ring, run_peer

TEST_ROWS = 297  # of the 1,797 digits; no client trains on them


def model_fn() -> nn.Module:
    torch.manual_seed(0)  # all clients start from the same model
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.GroupNorm(4, 16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.GroupNorm(4, 32), nn.ReLU(),
        nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


def digits() -> tuple[Tensor, Tensor]:
    images = load_digits()
    return torch.from_numpy(images.x).float().div(16).unsqueeze(1), torch.from_numpy(images.y)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--gossip-steps", type=int, default=4)
    parser.add_argument("--dirichlet", type=float, default=0.3, help="how alike the clients' digits are; smaller is less")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds to wait for a neighbour")
    parser.add_argument("--checkpoints", type=Path, help="a folder to go on from, written after each round")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    client, clients = distributed.get_rank(), distributed.get_world_size()
    x, y = digits()
    rows = dirichlet(y[:-TEST_ROWS], clients, settings.dirichlet, min_size=20)[client]
    flat = FlatModel(model_fn())
    model = run_peer(
        DFedSAMAlgorithm(DFedSAMConfig(local_epochs=3, batch_size=20, gossip_steps=settings.gossip_steps)),
        flat,
        (x[rows], y[rows]),
        settings.rounds,
        topology=ring(clients),
        timeout=settings.timeout,
        checkpoint=settings.checkpoints and settings.checkpoints / f"client-{client}.pt",
    )

    def accuracy(vector: Tensor) -> float:
        return float((flat.predict(vector, x[-TEST_ROWS:]).argmax(1) == y[-TEST_ROWS:]).float().mean())

    print(f"client {client}: {len(rows)} digits, its own model {accuracy(model):.1%}", flush=True)
    mean = model.clone()
    distributed.all_reduce(mean)  # the one time that all talk to all: the model that nobody holds
    if client == 0:
        print(f"the mean of all {clients} models: {accuracy(mean / clients):.1%}", flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
