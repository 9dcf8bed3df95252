"""Two lines of NumPy that every way of counting is held against."""

from __future__ import annotations

import numpy as np


def plain(text, pattern):
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(text), len(pattern))
    return (windows != np.asarray(pattern)).sum(axis=1)
