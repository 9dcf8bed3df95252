"""Races: a split round beside the same training unsplit, one forward and backward pass of the body for all clients beside one each, bytes."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from flwr.app import RecordDict
from torch import Tensor

from fewer.devices import choose_device, one_thread
from fewer.federated._shared.baselines import FedAvg
from fewer.federated._shared.clients import Shards
from fewer.federated._shared.flat_model import FlatModel
from fewer.federated._shared.flower_records import flat_record
from fewer.federated._shared.local_training import LocalConfig
from fewer.federated._shared.sampling import FixedSize
from fewer.federated._shared.simulate import simulate
from fewer.federated._shared.traffic import record_bytes
from fewer.federated.sfprompt.algorithm import SFPrompt, SFPromptConfig
from fewer.federated.sfprompt.problems import SIDE, Logits, backbone
from fewer.federated.sfprompt.split_model import SplitViT, split_vit
from fewer.federated.sfprompt.wire import Wire
from fewer.meters import tensor_memory
from fewer.study import Bench

bench = Bench("sfprompt")
CLIENTS, IMAGES, BATCH = 4, 60, 30

Step = Callable[[], object]


@cache
def whole() -> Any:
    """The study's transformer; what it knows does not change the time."""
    return backbone((1, SIDE, SIDE), 10)


def split(**words: Any) -> SplitViT:
    torch.manual_seed(0)
    return split_vit(whole(), **words)


@cache
def shards() -> Shards:
    draw = torch.Generator().manual_seed(0)
    count = CLIENTS * IMAGES
    x, y = torch.rand(count, 1, SIDE, SIDE, generator=draw), torch.randint(10, (count,), generator=draw)
    return Shards(x, y, torch.arange(count).split(IMAGES))


def round_of(algorithm: Any, flat: FlatModel) -> Step:
    def step() -> None:
        with one_thread():
            simulate(algorithm, flat, shards(), 1, sampler=FixedSize(1.0))

    return step


EVERYTHING = SFPromptConfig(keep=1.0, shortcut_epochs=0, batch_size=BATCH, lr=1e-3)
UNSPLIT = LocalConfig(
    local_epochs=1, batch_size=BATCH, lr=1e-3, weighted=True, max_grad_norm=math.inf, weight_decay=0.0, lr_decay=1.0
)  # fmt: skip


@bench.race("a round of split training, 4 clients of 60 images, all sent, serialised", peer="the same unsplit (FedAvg)", reach=1.3)
def split_round() -> tuple[Step, Step]:
    model = split()
    return round_of(SFPrompt(EVERYTHING, Wire(model.server())), FlatModel(model.client())), round_of(FedAvg(UNSPLIT), FlatModel(split()))


@bench.race("a round of SFPrompt, 2 epochs by the shortcut and half of the images sent", peer="2 epochs of full fine-tuning")
def whole_round() -> tuple[Step, Step]:
    model, config = split(), LocalConfig(local_epochs=2, batch_size=BATCH, lr=1e-3, weighted=True)
    ours = SFPrompt(SFPromptConfig(batch_size=BATCH, lr=1e-3), Wire(model.server()))
    return round_of(ours, FlatModel(model.client())), round_of(FedAvg(config), FlatModel(Logits(whole()).requires_grad_()))


@bench.race("the body's passes for 4 clients' batches together", peer="one client after the other")
def batched_body() -> tuple[Step, Step]:
    """On a GPU, where there is one: small batches leave most of it idle."""
    device = choose_device("auto")
    model = split().to(device)
    server, draw = model.server(), torch.Generator().manual_seed(0)
    parts = {client: torch.randn(BATCH, *model.cut_shape, generator=draw).to(device) for client in range(CLIENTS)}

    def together() -> None:
        outputs = server.forward_all({client: (a, None) for client, a in parts.items()})
        finish(server.backward_all(outputs))

    def one_by_one() -> None:
        for client, a in parts.items():
            finish({client: server.backward(client, server.forward(client, a))})

    return together, one_by_one


def finish(found: dict[Any, Tensor]) -> None:
    """Wait for the device."""
    for tensor in found.values():
        if tensor.is_cuda:
            torch.cuda.synchronize()


def split_bytes(**words: Any) -> float:
    """Serialised bytes both ways of a client and round of SFPrompt."""
    model = split(**words)
    wire = Wire(model.server())
    one = Shards(shards().x[:IMAGES], shards().y[:IMAGES], [range(IMAGES)])
    simulate(SFPrompt(SFPromptConfig(batch_size=BATCH), wire), FlatModel(model.client()), one, 1, sampler=FixedSize(1.0))
    return float(sum(wire.bytes.values()))


def full_bytes() -> float:
    flat = FlatModel(whole())
    return 2.0 * record_bytes(RecordDict({"model": flat_record(flat.initial())}))


@bench.quantity("bytes of a client of 60 images and round", peer="full fine-tuning", unit="bytes", reach=0.6)
def bytes_beside_full() -> tuple[float, float]:
    return split_bytes(), full_bytes()


@bench.quantity("bytes of a client and round, the prompt at the cut", peer="the prompt at the input", unit="bytes", reach=0.85)
def bytes_at_the_cut() -> tuple[float, float]:
    return split_bytes(at="cut"), split_bytes()


@bench.quantity("bytes of a client and round, the class token alone sent back", peer="the prompt at the input", unit="bytes", reach=0.5)
def bytes_of_the_class_token() -> tuple[float, float]:
    return split_bytes(at="cut", tail_blocks=0), split_bytes()


def peak_of(step: Step) -> float:
    step()
    with tensor_memory() as memory:
        step()
    return float(memory.total)


@bench.quantity("peak of what a client's batch makes: phase 1", peer="full fine-tuning", unit="bytes", reach=0.6)
def memory() -> tuple[float, float]:
    x, y = shards().x[:BATCH], shards().y[:BATCH]

    def gradient(model: Any) -> Step:
        flat = FlatModel(model)
        vector = flat.initial()
        return lambda: flat.gradient(vector, x, y)

    return peak_of(gradient(split().client())), peak_of(gradient(Logits(whole()).requires_grad_()))
