"""Makes this folder's federations, grids and apps known to the tests below it, whatever the import mode."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)  # the nets here are so small that a second thread only waits

RAY = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # a written app sets it when it is imported


@pytest.fixture(autouse=True)
def _rays_word_is_taken_back():
    before = os.environ.get(RAY)
    yield
    if before is None:
        os.environ.pop(RAY, None)
    else:
        os.environ[RAY] = before
