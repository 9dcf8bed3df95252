"""Races: the private gradient beside Opacus' on the same peft model, one trained factor beside two, the bytes of a reply, and memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fewer.federated._shared.algorithm import run_local
from fewer.federated._shared.clients import Shards, client_rng
from fewer.federated._shared.flat_model import FlatModel, cross_entropy
from fewer.federated._shared.flower_records import reply_record
from fewer.federated._shared.traffic import record_bytes
from fewer.federated.ffa_lora.accounting import PrivacyConfig
from fewer.federated.ffa_lora.adapters import freeze_a
from fewer.federated.ffa_lora.algorithm import FedLoRA, LoRARoundsConfig
from fewer.federated.ffa_lora.per_example import factors_of, private_gradient
from fewer.meters import tensor_memory
from fewer.study import Bench
from fewer.tasks import mlp

bench = Bench("ffa-lora")
BATCH, CLIP, NOISE, WIDTH, RANK = 100, 1.0, 1.0, 256, 8
TEXTS, TOKENS = 32, 64

Step = Callable[[], object]


def adapted(base: nn.Module, targets: list[str], frozen: bool) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets)
    model = freeze_a(get_peft_model(base, config))  # pyright: ignore[reportArgumentType] - any module
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name or ("lora_A" in name and not frozen))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.05)
    return model


def images(frozen: bool) -> tuple[Any, Tensor, Tensor]:
    """The study's network and a batch; what the images show does not change the time."""
    torch.manual_seed(0)
    return adapted(mlp((1, 14, 14), 10, (WIDTH,) * 3), ["3", "5"], frozen), torch.rand(BATCH, 1, 14, 14), torch.randint(10, (BATCH,))


class Words(nn.Module):
    """Four wide layers, token by token, and the tokens' mean."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*[part for _ in range(4) for part in (nn.Linear(WIDTH, WIDTH), nn.ReLU())])

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).mean(1)


def words(frozen: bool) -> tuple[Any, Tensor, Tensor]:
    torch.manual_seed(0)
    model = adapted(Words(), ["body.0", "body.2", "body.4", "body.6"], frozen)
    return model, torch.randn(TEXTS, TOKENS, WIDTH), torch.randint(10, (TEXTS,))


def ours(model: Any, x: Tensor, y: Tensor) -> Step:
    flat, generator = FlatModel(model, cross_entropy), torch.Generator().manual_seed(0)
    vector = flat.initial()
    return lambda: private_gradient(flat, vector, x, y, CLIP, NOISE, len(y), generator)


def opacus(model: Any, x: Tensor, y: Tensor) -> Step:
    """The same step by Opacus, which writes it into the parameters' `grad`."""
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    warnings.filterwarnings("ignore", "Full backward hook is firing", category=UserWarning)  # the images need no gradient
    sampled = GradSampleModule(model)
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = DPOptimizer(
        torch.optim.SGD(trained, lr=0.0), noise_multiplier=NOISE, max_grad_norm=CLIP, expected_batch_size=len(y),
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(sampled(x), y).mean().backward()
        optimizer.pre_step()

    return step


@bench.race("private gradient, FFA-LoRA, batch 100", peer="Opacus' GradSampleModule and DPOptimizer", reach=0.7)
def ffa_gradient() -> tuple[Step, Step]:
    return ours(*images(frozen=True)), opacus(*images(frozen=True))


@bench.race("private gradient, LoRA, batch 100", peer="Opacus' GradSampleModule and DPOptimizer", reach=0.7)
def lora_gradient() -> tuple[Step, Step]:
    return ours(*images(frozen=False)), opacus(*images(frozen=False))


@bench.race("private gradient, FFA-LoRA, 32 texts of 64 tokens", peer="Opacus' GradSampleModule and DPOptimizer", reach=1.0)
def ffa_gradient_of_texts() -> tuple[Step, Step]:
    return ours(*words(frozen=True)), opacus(*words(frozen=True))


@bench.race("private step of FFA-LoRA, batch 100", peer="LoRA's, the same code", reach=1 / 1.1)
def one_factor() -> tuple[Step, Step]:
    return ours(*images(frozen=True)), ours(*images(frozen=False))


def reply_bytes(frozen: bool) -> float:
    """A client's serialised reply after a private round."""
    model, x, y = images(frozen)
    flat = FlatModel(model, cross_entropy)
    privacy = PrivacyConfig(noise_multiplier=NOISE, delta=1e-3, clip=CLIP)
    algorithm = FedLoRA(LoRARoundsConfig(local_steps=1, batch_size=50, privacy=privacy, rounds=1))
    message = algorithm.configure(algorithm.initial(flat.initial(), 1), [0], 1)[0]
    state = {name: torch.zeros(1) for name in algorithm.keeps}
    _, reply = run_local(algorithm, state, message, Shards(x, y, [range(BATCH)]).shard(0, flat), client_rng(0, 1, 0))
    return float(record_bytes(reply_record(reply, 1)))


@bench.quantity("bytes up a client and round, square layers", peer="LoRA's reply", unit="bytes", reach=0.51)
def bytes_up() -> tuple[float, float]:
    return reply_bytes(frozen=True), reply_bytes(frozen=False)


def peak_bytes(step: Step) -> float:
    """Bytes of what a step makes, at its peak; what stays from step to step is there already."""
    step()
    with tensor_memory() as memory:
        step()
    return float(memory.total)


@bench.quantity("peak memory of a private gradient, 32 texts of 64 tokens", peer="Opacus'", unit="bytes", reach=1.0)
def memory_beside_opacus() -> tuple[float, float]:
    return peak_bytes(ours(*words(frozen=True))), peak_bytes(opacus(*words(frozen=True)))


def held_bytes(frozen: bool) -> float:
    """What is kept of each example's gradient until its norm is known."""
    model, x, y = words(frozen)
    flat = FlatModel(model, cross_entropy)
    kept = factors_of(flat, flat.initial(), x, y)
    assert kept is not None
    return float(sum(part.numel() * part.element_size() for share in kept for part in share))


@bench.quantity("per-example gradients kept, 32 texts of 64 tokens", peer="LoRA's, the same code", unit="bytes", reach=0.51)
def kept_of_examples() -> tuple[float, float]:
    return held_bytes(frozen=True), held_bytes(frozen=False)
