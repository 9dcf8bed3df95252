"""What is sampled: digits guided to their labels, or a user's own pipeline, each with converged trajectories that are made once a machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fewer.diffusion._shared.noise_schedule import NoiseSchedule
from fewer.diffusion._shared.pipelines import Pipeline, open_pipeline
from fewer.diffusion._shared.problems import kept
from fewer.diffusion.dc_solver.scheduler import DCSolverMultistepScheduler
from fewer.diffusion.dc_solver.search import Model, Trajectory, reference_trajectory, sampling_levels
from fewer.files import read_json
from fewer.tasks import DigitsDiffusion, frechet_distance, load_digits_diffusion

SCALES, UNSEEN = (1.0, 4.0, 7.5), ((7, 2.5), (9, 6.0), (7, 6.0))  # guidance that is searched; (calls, guidance) that never is
CALLS = (5, 6, 8, 10)
ALL_CALLS = tuple(sorted({*CALLS, *(calls for calls, _ in UNSEEN)}))
TEST_SEED, SEARCH_SEED = 5000, 6000
Condition = dict[str, Tensor]


@dataclass(frozen=True)
class Network:
    """A diffusion model under guidance.

    Attributes:
        name: told in the keys of kept trajectories.
        config: of its scheduler.
        shape: of one sample.
        noises: that samplers are judged on.
        scales: of guidance that it can be given.
    """

    name: str
    config: dict[str, Any]
    shape: tuple[int, ...]
    noises: int
    scales: tuple[float, ...]
    source: DigitsDiffusion | Pipeline

    def scheduler(self, **words: Any) -> DCSolverMultistepScheduler:
        return DCSolverMultistepScheduler.from_config(self.config, **words)

    def condition(self, count: int, draw: torch.Generator | None) -> Condition:
        """What to be guided to: drawn, or without a generator each in turn."""
        if isinstance(self.source, Pipeline):
            return (
                self.source.drawn(count, draw or torch.Generator().manual_seed(0))
                if self.source.can_be_guided
                else self.source.plain(count)
            )
        return {"class_labels": torch.arange(count) % 10 if draw is None else torch.randint(10, (count,), generator=draw)}

    def model(self, scale: float, condition: Condition) -> Model:
        """(x, training time) -> guided output: nothing's answer plus `scale` times the way to the condition's."""
        if isinstance(self.source, Pipeline):
            call, nothing = self.source.call, self.source.plain(len(next(iter(condition.values()), [])))
        else:
            epsilon = self.source.epsilon(NoiseSchedule.from_diffusers(self.config))
            call, nothing = (
                (lambda x, t, class_labels: epsilon(x, t, class_labels).sample),
                {"class_labels": torch.full_like(condition["class_labels"], -1)},
            )

        def guided(x: Tensor, t: Tensor) -> Tensor:
            if scale == 1:
                return call(x, t, **condition)
            both = {name: torch.cat([nothing[name], value]) for name, value in condition.items()}
            plain, towards = call(torch.cat([x, x]), t, **both).chunk(2)
            return plain + scale * (towards - plain)

        return guided

    def drawn(self, count: int, seed: int, in_turn: bool = False) -> tuple[Float[Tensor, "count *shape"], Condition]:
        """Unit noises and what they are guided to."""
        draw = torch.Generator().manual_seed(seed)
        noise = torch.randn(count, *self.shape, generator=draw)
        return noise, self.condition(count, None if in_turn else draw)

    def reference(self, scale: float, noise: Tensor, condition: Condition, calls: Sequence[int] = ALL_CALLS) -> Trajectory:
        """999 steps of DDIM from these noises, kept at every sampling time of these numbers of calls."""
        scheduler = self.scheduler()
        times, sigmas = sampling_levels(scheduler, calls)
        said = {name: float(value.double().sum()) for name, value in condition.items()}
        what: dict[str, object] = {
            "of": float(noise.double().sum()),
            "shape": list(noise.shape),
            "condition": said,
            "scale": scale,
            "sigmas": sigmas.tolist(),
        }
        states = kept(
            "dc-references",
            "ddim",
            what | {"model": self.name},
            lambda: reference_trajectory(self.model(scale, condition), noise, scheduler, calls).states.contiguous(),
        )
        return Trajectory(times, sigmas, states.to(noise))

    @torch.no_grad()
    def ends(self, scheduler: Any, calls: int, scale: float) -> Tensor:
        """Where the noises of `TEST_SEED` end after so many calls by a scheduler of diffusers."""
        noise, condition = self.drawn(self.noises, TEST_SEED)
        model, x = self.model(scale, condition), noise
        scheduler.set_timesteps(calls)
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t), t, x, return_dict=False)[0]
        return x

    def converged(self, scale: float) -> Tensor:
        """Where the same noises end after 999 steps."""
        return self.reference(scale, *self.drawn(self.noises, TEST_SEED)).states[-1]

    def error(self, scheduler: Any, calls: int, scale: float) -> float:
        """Mean squared distance of the ends to the converged ones."""
        return float((self.ends(scheduler, calls, scale) - self.converged(scale)).square().mean())

    def frechet(self, x: Tensor) -> float | None:
        """Distance to held-out digits in the features of a classifier; None of a user's own model."""
        if isinstance(self.source, Pipeline):
            return None
        return frechet_distance(self.source.features(x), self.source.features(self.source.data("test")[0]))


def digits() -> Network:
    """Digits of 16 x 16 pixels on the linear schedule of DDPM, guided to labels."""
    made = load_digits_diffusion("mnist16")
    return Network(made.folder.name, dict(DCSolverMultistepScheduler().config), made.shape, 100, SCALES, made)


def of_pipeline(directory: str | Path, device: str = "cpu") -> Network:
    """A user's own model, in float32; guided where it takes labels or text."""
    opened = open_pipeline(directory, device)
    config = read_json(Path(directory) / "scheduler" / "scheduler_config.json")
    return Network(opened.digest, config, opened.shape, 16, SCALES if opened.can_be_guided else (1.0,), opened)
