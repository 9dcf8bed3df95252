"""Fields of which everything is known."""

from __future__ import annotations

import torch
from torch import nn


class Linear(nn.Module):
    """v = A x."""

    def __init__(self, A):
        super().__init__()
        self.A = nn.Parameter(A.clone())

    def forward(self, t, x):
        return x @ self.A.T


class Smooth(nn.Module):
    """An MLP in (t, x) whose Lipschitz constant in x is at most `lipschitz`: that is the product of its layers' norms."""

    def __init__(self, dim=4, width=32, lipschitz=3.0, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second, self.last = nn.Linear(dim + 1, width), nn.Linear(width, width), nn.Linear(width, dim)
        self.double()
        norms = [float(torch.linalg.matrix_norm(w, 2)) for w in (self.first.weight[:, :dim], self.second.weight, self.last.weight)]
        with torch.no_grad():
            self.last.weight.mul_(lipschitz / (norms[0] * norms[1] * norms[2]))
            self.last.bias.zero_()

    def forward(self, t, x):
        h = torch.cat([x, t[:, None].to(x)], dim=1)
        return self.last(torch.tanh(self.second(torch.tanh(self.first(h)))))


def bytes_of(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}
