"""Floating-point operations, counted from the shapes of the operations that torch runs."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any


class FlopCount:
    """What `count_flops` counts."""

    def __init__(self, counter: Any) -> None:
        self._counter = counter

    @property
    def total(self) -> int:
        """Floating-point operations so far."""
        return self._counter.get_total_flops()


@contextlib.contextmanager
def count_flops() -> Iterator[FlopCount]:
    """Count the floating-point operations of matrix products, convolutions and attention inside the block (torch's FlopCounterMode).

    Elementwise operations are not counted. It slows small operations down, so it never runs inside a timed block.

    Examples:
        >>> import torch
        >>> with count_flops() as flops:
        ...     _ = torch.ones(2, 3) @ torch.ones(3, 4)
        >>> flops.total == 2 * 2 * 3 * 4
        True
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode, addmm_flop, baddbmm_flop

    aten, formula = torch.ops.aten, inspect.unwrap  # the mode wraps a formula again
    in_place = {aten.addmm_: formula(addmm_flop), aten.baddbmm_: formula(baddbmm_flop)}  # which torch's own table leaves out
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        yield FlopCount(counter)
