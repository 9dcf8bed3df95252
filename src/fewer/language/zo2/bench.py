"""Races: a step against MeZO's own rule on the same model, in time and in memory."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import torch

from fewer.language.zo2.costs.wide import resident, warm, wide_layers, wide_model
from fewer.language.zo2.mezo import ZO2Config
from fewer.language.zo2.streaming import ZO2
from fewer.language.zo2.study import COST_SHAPE, in_memory, mezo_step
from fewer.meters import peak_resident_memory
from fewer.study import Bench
from fewer.study.scratch import scratch_folder

bench = Bench("zo2")
Work = Callable[[], object]
IDS = torch.randint(4096, COST_SHAPE, generator=torch.Generator().manual_seed(0))


def _race(**words: Any) -> tuple[Work, Work]:
    """On two layers of the study's wide model."""
    zo2 = ZO2(wide_layers(2), ZO2Config(working_device="cpu", **words))
    peer = mezo_step(wide_layers(2), 1e-6, 0)
    return lambda: zo2.step(IDS), lambda: peer(IDS)


@bench.race("a step in memory, 2 layers of width 1,024, 2 x 32 tokens", peer="MeZO", reach=0.9)
def in_memory_against_mezo() -> tuple[Work, Work]:
    return _race(store="none")


@bench.race("a step with blocks on disk, warm page cache, 2 layers of width 1,024", peer="MeZO, in memory", reach=1.15)
def on_disk_against_mezo() -> tuple[Work, Work]:
    return _race(store="disk", store_dir=str(Path(mkdtemp(dir=scratch_folder())) / "blocks"))


def peak_of(way: str) -> int:
    """Peak memory of reading the wide model and of one step, above what the libraries take; to be called in a process of its own."""
    folder = wide_model()
    warm(folder)
    before = resident()
    with TemporaryDirectory() as place, peak_resident_memory() as peak:
        if way == "disk":
            ZO2.from_pretrained(folder, ZO2Config(store="disk", store_dir=str(Path(place) / "blocks"), working_device="cpu")).step(IDS)
        else:
            mezo_step(in_memory(folder), 1e-6, 0)(IDS)
    return peak.peak - before


@bench.quantity(
    "peak memory of reading and a step, 312 million parameters, blocks on disk", peer="MeZO, in memory", unit="bytes", reach=0.45
)
def memory_against_mezo() -> tuple[float, float]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as processes:
        disk, memory = processes.map(peak_of, ("disk", "memory"))
    return disk, memory
