"""Races: a fine-tuning step beside a loop written by hand, the solver beside torchdiffeq's, what contraction and its measure cost."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import jacrev, vmap

from fewer.diffusion.flow_mle.contraction import ContractingResidual, log_norm
from fewer.diffusion.flow_mle.solver import ReconstructionMLE, flow_matching_loss, odeint
from fewer.diffusion.flow_mle.velocity import ResidualField, VelocityMLP
from fewer.errors import MissingExtra
from fewer.meters import median_seconds
from fewer.study import Bench

bench = Bench("flow-mle")
B, DIM, COND, K = 256, 64, 32, 4
Pair = tuple[Callable[[], object], Callable[[], object]]


def installed(module: str, how: str) -> Any:
    if importlib.util.find_spec(module) is None:
        raise MissingExtra(f"{module} is not installed; install it with: pip install {how}")
    return importlib.import_module(module)


def made(width: int = 256) -> tuple[VelocityMLP, Tensor, Tensor, Tensor]:
    """(field, x0, x1, condition)."""
    torch.manual_seed(0)
    return VelocityMLP(DIM, COND, width), torch.randn(B, DIM), torch.randn(B, DIM), torch.randn(B, COND)


def stepping(field: VelocityMLP, loss: Callable[[], Tensor]) -> Callable[[], None]:
    def step() -> None:
        for weight in field.parameters():
            weight.grad = None
        loss().backward()

    return step


@bench.race(f"forward and backward of a fine-tuning step, {K} Euler steps, batch {B}", peer="the loop unrolled by hand", reach=1.05)
def step() -> Pair:
    field, x0, x1, cond = made()
    ours = ReconstructionMLE(K)

    def by_hand() -> Tensor:
        x = x0
        for j in range(K):
            x = x + field(torch.full((B,), j / K), x, cond) / K
        return (x - x1).square().mean()

    return stepping(field, lambda: ours(field, x0, x1, cond)), stepping(field, by_hand)


@bench.race(f"a solve, {K} Euler steps, batch {B}", peer="torchdiffeq odeint", reach=0.9)
def solve() -> Pair:
    peer, (field, x0, _, cond) = installed("torchdiffeq", "torchdiffeq"), made()
    times = torch.linspace(0, 1, K + 1)

    @torch.no_grad()
    def theirs() -> Tensor:
        return peer.odeint(lambda t, x: field(t.expand(B), x, cond), x0, times, method="euler")[-1]

    return torch.no_grad()(lambda: odeint(field, x0, K, cond=cond)), theirs


@bench.race(f"a flow-matching step, batch {B}", peer="torchcfm ConditionalFlowMatcher", reach=1.0)
def pretraining() -> Pair:
    # with what it depends on comes torchvision, which breaks diffusers here; the matcher itself needs POT alone
    peer = installed("torchcfm", "--no-deps torchcfm pot").ConditionalFlowMatcher(sigma=0.0)
    field, x0, x1, cond = made()

    def theirs() -> Tensor:
        t, x, u = peer.sample_location_and_conditional_flow(x0, x1)
        return (field(t, x, cond) - u).square().mean()

    return stepping(field, lambda: flow_matching_loss(field, x0, x1, torch.rand(B), cond)), stepping(field, theirs)


@bench.race(f"log_norm, 20 iterations, {DIM} dimensions, batch {B}", peer="the whole Jacobian by torch.func and its eigenvalues", reach=1.0)
def norms() -> Pair:
    field, x0, _, cond = made()
    t = torch.rand(B)

    def whole() -> Tensor:
        J = vmap(jacrev(lambda x, t, c: field(t[None], x[None], c[None])[0]))(x0, t, cond)
        return torch.linalg.eigvalsh((J + J.mT) / 2).amax(1)

    return lambda: log_norm(field, t, x0, cond=cond), whole


@bench.quantity("calls of the field in 20 iterations of log_norm", peer="one call an iteration, and five", unit="", reach=1.0)
def calls() -> tuple[float, float]:
    count, (field, x0, _, cond) = [0], made()

    def counted(t: Tensor, x: Tensor) -> Tensor:
        count[0] += 1
        return field(t, x, cond)

    log_norm(counted, torch.rand(B), x0)
    return count[0], 25


@bench.quantity(f"a contracting residual's share of a solve's time, {K} steps", peer="its share of the parameters", unit="", reach=1.5)
def contraction() -> tuple[float, float]:
    field, x0, _, cond = made()
    residual = ContractingResidual(DIM, 64, 1.0, COND)
    both = ResidualField(field, residual)
    sizes = [sum(each.numel() for each in module.parameters()) for module in (residual, both)]
    with torch.no_grad():
        alone, together = (median_seconds(lambda f=f: odeint(f, x0, K, cond=cond), 101, processor=True) for f in (field, both))
    return 1 - alone / together, sizes[0] / sizes[1]


@bench.quantity("numbers kept for the backward pass of 10 Euler steps, with checkpoints", peer="without", unit="", reach=0.25)
def memory() -> tuple[float, float]:
    field, x0, _, cond = made()

    def kept(checkpoint: bool) -> float:
        held: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: held.setdefault(t.data_ptr(), t.numel()) and t, lambda t: t):
            odeint(field, x0, 10, checkpoint=checkpoint, cond=cond)
        return sum(held.values())

    return kept(True), kept(False)
