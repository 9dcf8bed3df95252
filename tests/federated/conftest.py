"""Makes this folder's federations, grids and apps known to the tests below it, whatever the import mode."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)  # the nets here are so small that a second thread only waits
