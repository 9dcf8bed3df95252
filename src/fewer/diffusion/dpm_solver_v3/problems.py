"""What the study samples: digits, exact mixtures or a user's own pipeline, each with the statistics that the solver needs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fewer.data import WEIGHTS, folder_of, made_once
from fewer.diffusion._shared.pipelines import open_pipeline
from fewer.diffusion._shared.problems import Draw, Flow, digits_draws, digits_flow, mixture_flow, random_mixture
from fewer.diffusion.dpm_solver_v3.ems import CURVES, EMS
from fewer.diffusion.dpm_solver_v3.estimation import estimate_ems
from fewer.tasks import load_digits_diffusion

GRIDS = {"full": (120, 1), "independent": (120, 1), "few": (120, 8), "coarse": (30, 1)}  # name -> (N, what K is divided by)
MIXTURES = {"mixture16": (16, 10, 1000), "mixture64": (64, 50, 16)}  # name -> dimensions, components, noises
# Most of the error on a mixture lies in the few points near the border of two components: it takes many to know it.

Statistics = Callable[[str], EMS]  # a name in GRIDS -> the statistics (those without guidance)
Problem = tuple[Draw, Statistics]


@dataclass(frozen=True)
class Task:
    """What is sampled: digits of a kind and exact mixtures, or a user's own pipeline.

    Attributes:
        k: samples at each grid point of the statistics.
        pipeline, data: a diffusers directory and a folder of images, or "".
    """

    kind: str
    k: int
    pipeline: str = ""
    data: str = ""

    def problems(self, device: str) -> dict[str, Problem]:
        """By name: "images", "guided" (where it can be), and the mixtures beside digits."""
        if self.pipeline:
            return of_pipeline(self.pipeline, self.data, self.k, device)
        return of_digits(self.kind, self.k) | {name: of_mixture(name) for name in MIXTURES}

    def prepare(self) -> None:
        """Make what is costly and kept, and say early what cannot be used; a pipeline's statistics wait for the device."""
        if self.pipeline:
            pipeline = open_pipeline(self.pipeline)
            if self.data:
                pipeline.read(self.data)
            return
        for _, statistics in self.problems("cpu").values():
            for which in GRIDS:
                statistics(which)


def of_digits(kind: str, k: int) -> dict[str, Problem]:
    """Digits without labels, and guided to them."""
    digits = load_digits_diffusion(kind)
    statistics = measured(kind, digits_flow(digits), digits.data("train")[0][:4096].clone(), k, digits.folder.name)
    return {name: (draw, statistics) for name, draw in digits_draws(digits).items()}


def of_mixture(name: str) -> Problem:
    """A mixture of Gaussians, whose flow is exact."""
    dim, components, noises = MIXTURES[name]
    data = random_mixture(dim, components)
    flow = mixture_flow(data)
    statistics = measured(name, flow, data.draw(512, torch.Generator().manual_seed(2)), 512)
    return (
        lambda draw: (flow, flow.noise(noises, dim, generator=draw, dtype=torch.float64)),
        lambda which: statistics(which if which == "independent" else "full"),  # only the images have coarser ones
    )


def of_pipeline(directory: str, data: str, k: int, device: str) -> dict[str, Problem]:
    """A user's own model: as it is, and guided to drawn labels or prompts where it takes them."""
    pipeline = open_pipeline(directory, device)

    def statistics(which: str) -> EMS:
        clean = pipeline.read(data) if data else pipeline.samples(k)
        return measured("pipeline", pipeline.flow(), clean, k, pipeline.digest)(which)

    return {name: (draw, statistics) for name, draw in pipeline.draws().items()}


def measured(name: str, flow: Flow, data: Tensor, k: int, model: str = "") -> Statistics:
    """The statistics of a flow by name, made when they are asked for."""

    def of(which: str) -> EMS:
        n, share = GRIDS[which]
        return statistics_of(name, flow, data, n, max(k // share, 1), which != "independent", model)

    return of


def statistics_of(name: str, flow: Flow, data: Tensor, n: int, k: int, common: bool = True, model: str = "") -> EMS:
    """EMS of a flow, estimated once on a machine."""
    digest = hashlib.sha256(data.contiguous().cpu().numpy().tobytes()).hexdigest()
    what = {"version": 2, "data": digest, "model": model, "ends": flow.ends, "n": n, "k": k, "common": common}

    def make(folder: Path) -> None:
        from safetensors.torch import save_file

        draw = torch.Generator().manual_seed(1)
        mode = "double-backward" if data.dtype == torch.float64 else None  # quicker on a mixture
        ems = estimate_ems(flow.epsilon, flow.schedule, data, n, k, 512, common, draw, progress=False, mode=mode)
        save_file({each: getattr(ems, each).contiguous() for each in CURVES}, folder / WEIGHTS)

    from safetensors.torch import load_file

    read = load_file(made_once(folder_of("ems", name, what), make) / WEIGHTS)
    return EMS(read["lambdas"], read["l"], read["s"], read["b"])
