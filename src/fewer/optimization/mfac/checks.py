"""What is refused at the door, each in one line: what was given, what was expected, what to do."""

from __future__ import annotations

import math

import psutil
import torch
from torch import Tensor


def check_damping(damping: float) -> None:
    """ValueError unless the damping is a finite number above 0."""
    if not damping > 0 or not math.isfinite(damping):
        raise ValueError(f"damping is {damping}; expected a finite number above 0, such as 1e-5: it keeps F invertible")


def check_whole(name: str, value: int, least: int = 1) -> None:
    """ValueError unless the value is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {value!r}; expected a whole number of at least {least}")


def check_gradients(grads: object) -> None:
    """ValueError unless `grads` is a floating-point tensor [m, d] with m, d >= 1 and finite entries."""
    if not isinstance(grads, Tensor) or not grads.is_floating_point() or grads.ndim != 2:
        given = f"{tuple(grads.shape)} {grads.dtype}" if isinstance(grads, Tensor) else type(grads).__name__
        raise ValueError(f"grads is {given}; expected a floating-point tensor [m, d]: one flattened gradient per row")
    if grads.numel() == 0:
        raise ValueError(f"grads is {tuple(grads.shape)}, which is empty; expected at least one gradient of at least one weight")
    if not bool(grads.sum().isfinite()):  # one quick pass; a sum of finite entries may overflow, so then they are looked at one by one
        rows = (~grads.isfinite().all(1)).nonzero()[:, 0].tolist()
        if rows:
            raise ValueError(f"grads has a NaN or infinite value in row {rows[0]}; expected finite gradients: drop that row")


def check_length(x: Tensor, d: int, *, columns: bool = False) -> None:
    """ValueError unless x is [d], or [d, k] where columns are allowed."""
    if not x.is_floating_point() or x.ndim not in ((1, 2) if columns else (1,)) or x.shape[0] != d:
        expected = f"[{d}] or [{d}, k]" if columns else f"[{d}]"
        raise ValueError(f"x is {tuple(x.shape)} {x.dtype}; expected a floating-point tensor {expected}: one number for every weight")


def check_memory(rows: int, d: int, dtype: torch.dtype, device: torch.device) -> None:
    """ValueError unless `rows` gradients of `d` weights fit into the memory that is free on the device."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    needed = rows * d * dtype.itemsize
    if needed > free:
        raise ValueError(
            f"{rows} gradients of {d:,} weights in {str(dtype).removeprefix('torch.')} take {needed / 1e9:,.1f} GB, but {free / 1e9:,.1f} GB "
            f"are available on {device}; take a smaller window or storage_dtype=torch.bfloat16"
        )
