"""From which batch on streaming hides: blocks come and go at the link's speed, whatever they are multiplied with; computing grows with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from fewer.language.zo2.costs.wide import wide_layers
from fewer.language.zo2.mezo import ZO2Config
from fewer.language.zo2.streaming import ZO2

LAYERS, LENGTH = 3, 32
HALF = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "vocab_size": 512}  # a block of 13 MB
ROWS = (1, 4, 16)
HIDDEN = 1.05  # a streamed step's time over one in memory, up to which streaming counts as hidden
Step = Callable[[], object]


def steps_by_batch(folder: Path, device: str, rows: Sequence[int] = ROWS) -> Iterator[tuple[int, Step, Step]]:
    """(tokens of a batch, a step with blocks streamed, a step with all in memory), of three layers of half the wide model's width.

    Blocks come to a GPU from host memory, and to a CPU from files in `folder`, which the system keeps in memory.
    """
    store = "disk" if device == "cpu" else "cpu"
    with TemporaryDirectory(dir=folder) as place:
        where = str(Path(place) / "blocks") if store == "disk" else None
        streamed = ZO2(wide_layers(LAYERS, **HALF), ZO2Config(store=store, store_dir=where, working_device=device))
        resident = ZO2(wide_layers(LAYERS, **HALF), ZO2Config(store="none", working_device=device))
        for count in rows:
            ids = torch.randint(HALF["vocab_size"], (count, LENGTH), generator=torch.Generator().manual_seed(0))
            yield count * LENGTH, lambda ids=ids: streamed.step(ids), lambda ids=ids: resident.step(ids)
