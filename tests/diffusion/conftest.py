"""What the tests of samplers share: a small mixture, its flow, noise to start from, and a cache of the tests' own."""

from __future__ import annotations

import pytest
import torch
from small_mixture import ENDS

from fewer.diffusion._shared.problems import mixture_flow, random_mixture


@pytest.fixture
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FEWER_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def mixture():
    return random_mixture(4, 3)


@pytest.fixture
def noise():
    return ENDS[0] * torch.randn(64, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def flow(mixture):
    return mixture_flow(mixture, *ENDS)
