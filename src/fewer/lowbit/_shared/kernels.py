"""Which kernels there are for a tensor: numba's on a CPU, Triton's on a GPU, or none."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor


@functools.cache
def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def on_cpu(x: Tensor) -> Any:
    """`cpu_kernels`, or None where they do not apply."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.uint8) or not x.is_contiguous() or not _has("numba"):
        return None
    from fewer.lowbit._shared import cpu_kernels

    return cpu_kernels


def on_gpu(x: Tensor) -> Any:
    """`gpu_kernels`, or None where they do not apply."""
    if x.device.type != "cuda" or x.dtype == torch.float64 or not x.is_contiguous() or not _has("triton"):
        return None
    from fewer.lowbit._shared import gpu_kernels

    return gpu_kernels
