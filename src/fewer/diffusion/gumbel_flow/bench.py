"""Races: a draw of the path beside torch's own, its velocity beside Dirichlet flow matching's, guidance's draws in one call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from fewer.diffusion.gumbel_flow.cnn import SequenceCNN
from fewer.diffusion.gumbel_flow.guidance import STGuidance
from fewer.diffusion.gumbel_flow.path import GumbelSoftmaxPath
from fewer.diffusion.gumbel_flow.peers import DirichletPath
from fewer.study import Bench

bench = Bench("gumbel-flow")
B, L, K, M = 256, 64, 20, 4
Pair = tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]


@bench.race(f"a draw of the path, {B} x {L} x {K}", peer="torch.nn.functional.gumbel_softmax", reach=1.3)
def draws() -> Pair:
    path, draw = GumbelSoftmaxPath(K), torch.Generator().manual_seed(0)
    tokens = torch.randint(K, (B, L), generator=draw)
    logits, t = F.one_hot(tokens, K).float() * path.beta, torch.full((B,), 0.5)
    tau = path.beta * float(path.tau(0.5))
    return lambda: path.sample(tokens, t, draw).x_t, lambda: F.gumbel_softmax(logits, tau)


@bench.race(f"a velocity, {B} x {L} x {K}", peer="Dirichlet flow matching's, by scipy's incomplete Beta function", reach=0.1)
def velocities() -> Pair:
    path, dirichlet, draw = GumbelSoftmaxPath(K), DirichletPath(K), torch.Generator().manual_seed(0)
    x, p = (torch.softmax(torch.randn(B, L, K, generator=draw), dim=-1) for _ in range(2))
    return lambda: path.velocity(p, x, 0.5), lambda: dirichlet.velocity(p, x, 0.5)


@bench.race(f"guidance from {M} draws, 50 x 30 x {K}", peer="one classifier call a draw", reach=1.0)
def guidance() -> Pair:
    torch.manual_seed(0)
    classifier, draw = SequenceCNN(K, outputs=1).eval(), torch.Generator().manual_seed(0)
    x = torch.softmax(torch.randn(50, 30, K, generator=draw), dim=-1)
    together, single = STGuidance(classifier, 1, num_samples=M, generator=draw), STGuidance(classifier, 1, num_samples=1, generator=draw)
    return lambda: together(x, 0.5), lambda: torch.stack([single(x, 0.5) for _ in range(M)]).mean(0)
