"""What clients keep between rounds, for the in-process engine: one table a vector, in a mapped file where it grows large."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

LARGE = 2**30  # bytes from which the tables lie in files


class ClientStates:
    """Vectors [d] by name for each of m clients, zeros at first.

    Args:
        clients: m.
        names: of the vectors.
        size: d.
        lengths: of vectors that are not of that size.
        dtype: of the vectors.
        device: where the vectors are handed out (the tables stay in memory).
        large: bytes of all tables from which they lie in a temporary memory-mapped file instead of in memory.

    Examples:
        >>> states = ClientStates(3, ["correction"], size=2, dtype=torch.float32)
        >>> states.put(1, {"correction": torch.ones(2)})
        >>> states.get(1)["correction"], states.get(2)["correction"]
        (tensor([1., 1.]), tensor([0., 0.]))
    """

    def __init__(
        self,
        clients: int,
        names: Sequence[str],
        size: int,
        dtype: torch.dtype,
        large: int = LARGE,
        device: Any = "cpu",
        lengths: Mapping[str, int] | None = None,
    ) -> None:
        self._files: list[Any] = []
        self._device = device
        sizes = {name: (lengths or {}).get(name, size) for name in names}
        self.mapped = clients * sum(sizes.values()) * dtype.itemsize > large
        self.tables = {name: self._table(clients, each, dtype) for name, each in sizes.items()}

    def _table(self, clients: int, size: int, dtype: torch.dtype) -> Tensor:
        if not self.mapped:
            return torch.zeros(clients, size, dtype=dtype)
        file = tempfile.TemporaryFile(prefix="fewer-client-states-")  # noqa: SIM115 - lives as long as the table
        self._files.append(file)
        bytes_ = np.memmap(file, dtype=np.uint8, mode="w+", shape=(clients, size * dtype.itemsize))
        return torch.from_numpy(bytes_).view(dtype)

    def get(self, client: int | Sequence[int]) -> dict[str, Tensor]:
        """A copy of the vectors of a client [d], or of some clients stacked [S, d]."""
        return {name: table[client].clone().to(self._device) for name, table in self.tables.items()}

    def put(self, client: int | Sequence[int], vectors: dict[str, Tensor]) -> None:
        """Keep the vectors of a client, or of some clients stacked."""
        for name, table in self.tables.items():
            table[client] = vectors[name]
