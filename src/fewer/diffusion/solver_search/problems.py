"""What schedules are searched for and judged on: digits or a user's own pipeline, with noises for the search, for a second look, for the test."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from fewer.data import WEIGHTS, folder_of, made_once
from fewer.diffusion._shared import NoiseSchedule
from fewer.diffusion._shared.pipelines import open_pipeline
from fewer.diffusion._shared.problems import Flow, digits_flow
from fewer.diffusion.dpm_solver_v3 import EMS, estimate_ems
from fewer.diffusion.solver_search.evolution import SearchSpace
from fewer.diffusion.solver_search.search import Objective
from fewer.tasks import DigitsDiffusion, load_digits_diffusion
from fewer.tasks.digit_sampling import REFERENCE_STEPS

POINTS, SAMPLES, INTERVALS = 60, 512, 480  # of the statistics: estimated at N, from K, interpolated to
FRESH = 4  # times the search noises: the second look
TEST_SEED = 9000


@dataclass(frozen=True)
class Problem:
    """Something to sample.

    Attributes:
        flow: alpha is 1; lambdas are those of the model's own schedule.
        schedule: whose t is the time that a search moves.
        ems, mean: for v3 steps and the mean of the data, where they are known.
        search, test: how many noises.
        digits: what judges pictures, where it can.
    """

    flow: Flow
    schedule: NoiseSchedule
    shape: tuple[int, ...]
    ems: EMS | None
    mean: Tensor | None
    search: int
    test: int
    device: str = "cpu"
    digits: DigitsDiffusion | None = None

    def objective(self, count: int, seed: int) -> Objective:
        """RMSE on so many noises."""
        noises = self.flow.noise(count, *self.shape, generator=torch.Generator().manual_seed(seed)).to(self.device)
        return Objective(self.flow.epsilon, noises, self.flow.reference(noises), self.flow.schedule, self.ems, self.mean)

    def objectives(self, seed: int) -> tuple[Objective, Objective]:
        """(to search on, to rescore on), others for each seed."""
        return self.objective(self.search, 2 * seed), self.objective(FRESH * self.search, 2 * seed + 1)

    @cached_property
    def judge(self) -> Objective:
        """On the test noises, the same for all seeds."""
        return self.objective(self.test, TEST_SEED)

    @property
    def reference_calls(self) -> int:
        """What the converged solutions that a search needs cost, in calls of one sample."""
        return REFERENCE_STEPS * (1 + FRESH) * self.search

    def space(self, **words: object) -> SearchSpace:
        nodes = tuple(self.ems.lambdas.tolist()) if self.ems is not None else ()
        return replace(SearchSpace(self.schedule, nodes, self.mean is not None), **words)  # pyright: ignore[reportArgumentType]


def digits(kind: str = "mnist16") -> Problem:
    """Digits without labels."""
    made = load_digits_diffusion(kind)
    flow, clean = digits_flow(made), made.data("train")[0]
    return Problem(flow, flow.schedule, made.shape, statistics(flow, clean[:4096], made.folder.name), clean.mean(0), 64, 300, digits=made)


def of_pipeline(directory: str | Path, device: str = "cpu", ems: str | Path = "", images: str | Path = "") -> Problem:
    """A user's own model as it is: v3 steps with its statistics (`fewer ems`), the mean of the data with a folder of images."""
    pipeline = open_pipeline(directory, device)
    read = EMS.from_pretrained(ems, pipeline.network) if ems else None
    mean = pipeline.read(images).mean(0) if images else None
    return Problem(pipeline.flow(), pipeline.schedule, pipeline.shape, read, mean, 16, 32, device)


def statistics(flow: Flow, clean: Tensor, model: str) -> EMS:
    """EMS of a flow, estimated once on a machine at `POINTS` intervals, interpolated linearly to `INTERVALS`."""
    from safetensors.torch import load_file, save_file

    digest = hashlib.sha256(clean.contiguous().numpy().tobytes()).hexdigest()
    what = {"version": 1, "data": digest, "model": model, "ends": flow.ends, "n": POINTS, "k": SAMPLES}

    def make(folder: Path) -> None:
        draw = torch.Generator().manual_seed(1)
        ems = estimate_ems(flow.epsilon, flow.schedule, clean, POINTS, SAMPLES, SAMPLES, generator=draw, progress=False)
        save_file({name: getattr(ems, name).contiguous() for name in ("lambdas", "l", "s", "b")}, folder / WEIGHTS)

    read = load_file(made_once(folder_of("ems", "solver-search", what), make) / WEIGHTS)
    return finer(EMS(read["lambdas"], read["l"], read["s"], read["b"]), INTERVALS)


def finer(ems: EMS, intervals: int) -> EMS:
    """The same curves on more points, by lines between those that were estimated."""

    def drawn(curve: Tensor) -> Tensor:
        flat = curve.flatten(1).T[None]
        return F.interpolate(flat, intervals + 1, mode="linear", align_corners=True)[0].T.reshape(-1, *curve.shape[1:])

    lambdas = torch.linspace(float(ems.lambdas[0]), float(ems.lambdas[-1]), intervals + 1, dtype=torch.float64)
    return EMS(lambdas, drawn(ems.l), drawn(ems.s), drawn(ems.b), ems.meta)
