"""What the study samples: digits, exact mixtures or a user's own pipeline, each with the statistics that the solver needs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fewer.data import WEIGHTS, folder_of, made_once
from fewer.diffusion._shared.peers import by_diffusers
from fewer.diffusion._shared.pipelines import Pipeline, open_pipeline
from fewer.diffusion._shared.problems import Flow, digits_flow, kept, mixture_flow, random_mixture
from fewer.diffusion._shared.spacing import noise_levels
from fewer.diffusion.dpm_solver_v3.ems import EMS
from fewer.diffusion.dpm_solver_v3.estimation import estimate_ems
from fewer.tasks import DigitsDiffusion, load_digits_diffusion

GRIDS = {"full": (120, 1), "independent": (120, 1), "few": (120, 8), "coarse": (30, 1)}  # name -> (N, what K is divided by)
MIXTURES = {"mixture16": (16, 10, 1000), "mixture64": (64, 50, 16)}  # name -> dimensions, components, noises
# Most of the error on a mixture lies in the few points near the border of two components: it takes many to know it.
NOISES, PIPELINE_NOISES, DRAWN_STEPS = 100, 16, 200

Statistics = Callable[[str], EMS]  # a name in GRIDS -> the statistics


@dataclass(frozen=True)
class Problem:
    """One thing to sample: how it is made from a generator, and its statistics (those without guidance)."""

    make: Callable[[torch.Generator], tuple[Flow, Tensor]]  # -> the flow, and noises to begin with
    statistics: Statistics


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
        return of_digits(load_digits_diffusion(self.kind), self.k) | of_mixtures()

    def prepare(self) -> None:
        """Make what is costly and kept, and say early what cannot be used; a pipeline's statistics wait for the device."""
        if self.pipeline:
            pipeline = open_pipeline(self.pipeline)
            if self.data:
                pipeline.read(self.data)
            return
        for problem in self.problems("cpu").values():
            for which in GRIDS:
                problem.statistics(which)


def statistics_of(name: str, flow: Flow, data: Tensor, n: int, k: int, common: bool = True, model: str = "") -> EMS:
    """EMS of a flow, estimated once on a machine."""
    digest = hashlib.sha256(data.contiguous().cpu().numpy().tobytes()).hexdigest()
    what = {"version": 2, "data": digest, "model": model, "ends": flow.ends, "n": n, "k": k, "common": common}

    def make(folder: Path) -> None:
        from safetensors.torch import save_file

        draw = torch.Generator().manual_seed(1)
        mode = "double-backward" if data.dtype == torch.float64 else None  # quicker on a mixture
        ems = estimate_ems(flow.epsilon, flow.schedule, data, n, k, 512, common, draw, progress=False, mode=mode)
        save_file({each: getattr(ems, each).contiguous() for each in ("lambdas", "l", "s", "b")}, folder / WEIGHTS)

    from safetensors.torch import load_file

    read = load_file(made_once(folder_of("ems", name, what), make) / WEIGHTS)
    return EMS(read["lambdas"], read["l"], read["s"], read["b"])


def measured(name: str, flow: Flow, data: Tensor, k: int, model: str = "") -> Statistics:
    """The statistics of a flow by name, made when they are asked for."""

    def of(which: str) -> EMS:
        n, share = GRIDS[which]
        return statistics_of(name, flow, data, n, max(k // share, 1), which != "independent", model)

    return of


def of_mixtures() -> dict[str, Problem]:
    """Mixtures of Gaussians, whose flow is exact."""

    def problem(name: str, dim: int, components: int, noises: int) -> Problem:
        data = random_mixture(dim, components)
        flow = mixture_flow(data)
        points = data.draw(512, torch.Generator().manual_seed(2))
        statistics = measured(name, flow, points, len(points))
        return Problem(
            lambda draw: (flow, flow.noise(noises, dim, generator=draw, dtype=torch.float64)),
            lambda which: statistics(which if which == "independent" else "full"),  # only the images have coarser ones
        )

    return {name: problem(name, *size) for name, size in MIXTURES.items()}


def of_digits(digits: DigitsDiffusion, k: int) -> dict[str, Problem]:
    """Digits without labels, and guided to them."""
    plain = digits_flow(digits)
    statistics = measured(digits.kind, plain, digits.data("train")[0][:4096].clone(), k, digits.folder.name)

    def noise(draw: torch.Generator) -> Tensor:
        return plain.noise(NOISES, *digits.shape, generator=draw)

    def guided(draw: torch.Generator) -> tuple[Flow, Tensor]:
        begin = noise(draw)
        return digits_flow(digits, torch.randint(10, (NOISES,), generator=draw)), begin

    return {"images": Problem(lambda draw: (plain, noise(draw)), statistics), "guided": Problem(guided, statistics)}


def of_pipeline(directory: str, data: str, k: int, device: str) -> dict[str, Problem]:
    """A user's own model: as it is, and guided to drawn labels or prompts where it takes them."""
    pipeline = open_pipeline(directory, device)
    plain = pipeline.flow()

    def statistics(which: str) -> EMS:
        clean = pipeline.read(data) if data else drawn_from(pipeline, k)
        return measured("pipeline", plain, clean, k, pipeline.digest)(which)

    def noise(draw: torch.Generator) -> Tensor:
        return plain.noise(PIPELINE_NOISES, *pipeline.shape, generator=draw).to(device)

    def guided(draw: torch.Generator) -> tuple[Flow, Tensor]:
        begin = noise(draw)
        return pipeline.guided(PIPELINE_NOISES, draw), begin

    problems = {"images": Problem(lambda draw: (plain, noise(draw)), statistics)}
    return problems | ({"guided": Problem(guided, statistics)} if pipeline.can_be_guided else {})


def drawn_from(pipeline: Pipeline, count: int) -> Tensor:
    """Samples of the model itself by 200 steps of DPM-Solver++, made once: what statistics are measured on where there are no images."""
    flow = pipeline.flow()

    def make() -> Tensor:
        draw, parts = torch.Generator().manual_seed(3), []
        for start in range(0, count, PIPELINE_NOISES):
            noise = flow.noise(min(PIPELINE_NOISES, count - start), *pipeline.shape, generator=draw).to(pipeline.device)
            parts.append(by_diffusers("dpm++2m", flow.denoise, noise, noise_levels(*flow.ends, DRAWN_STEPS)).cpu())
        return torch.cat(parts)

    return kept("pipeline-samples", "dpm++2m", {"model": pipeline.digest, "count": count}, make).to(pipeline.device)
