"""The plan of a cascade: the sizes, steps and end times of its stages, the settings that were released with it, and what it costs."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from fewer.checks import check_choice, check_not_negative, check_positive, check_share, check_whole, is_number, is_whole

Size = tuple[int, int]  # height, width
LARGE_RATIO = 4  # beyond it a stage invents more than the one before has laid out


@dataclass(frozen=True)
class Stage:
    """One stage of a cascade.

    Attributes:
        size: of its images in pixels: a side, or (height, width).
        steps: network calls, at least 2.
        end_time: the training time that it ends at, 0 for the last stage (on EDM's schedule a sigma).
    """

    size: int | Size
    steps: int
    end_time: float

    @property
    def grid(self) -> Size:
        """(height, width) in pixels."""
        return self.size if isinstance(self.size, tuple) else (self.size, self.size)


@dataclass(frozen=True)
class FreCaSConfig:
    """How an image is sampled through growing sizes.

    Attributes:
        stages: from the training size to the one that is wanted.
        gamma: SNR at a stage's start = SNR at the former one's end / ratio^gamma; 2 keeps the SNR of the averaged image.
        guidance: classifier-free guidance of the first stage, above 1.
        high_guidance: of the band that is new in a later stage.
        low_guidance: of the other band there; None is `guidance`.
        map_weight: share of the former stage's cross-attention maps in a later stage's attention; 0 reuses none.
        map_resize: "2d" over rows and columns, or "released", the flattened matrix as an image.
        upsample: "bilinear" or "nearest", between the sizes.
        stepping: "exact" to the true next time, or "released", which guesses it as t - 1000 // n.
        micro_size: the size that SDXL is told: "first" in all stages, or "target", each stage's own.

    Raises:
        ValueError: a stage or a number that cannot be; the message names it.

    Source: arXiv 2410.18410; the defaults are the released SDXL settings, other than gamma, "2d", "bilinear" and "exact".

    >>> config = FreCaSConfig.preset("sdxl-2048")
    >>> config == FreCaSConfig.from_json(config.to_json())
    True
    >>> cost(config)  # calls of the full size, in place of 50
    20.0
    """

    stages: tuple[Stage, ...]
    gamma: float = 2.0
    guidance: float = 7.5
    high_guidance: float = 35.0
    low_guidance: float | None = None
    map_weight: float = 0.6
    map_resize: str = "2d"
    upsample: str = "bilinear"
    stepping: str = "exact"
    micro_size: str = "first"

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        check_not_negative(gamma=self.gamma, high_guidance=self.high_guidance)
        if self.low_guidance is not None:
            check_not_negative(low_guidance=self.low_guidance)
        check_share(map_weight=self.map_weight)
        check_choice(("2d", "released"), map_resize=self.map_resize)
        check_choice(("bilinear", "nearest"), upsample=self.upsample)
        check_choice(("exact", "released"), stepping=self.stepping)
        check_choice(("first", "target"), micro_size=self.micro_size)
        if not is_number(self.guidance) or self.guidance <= 1:
            raise ValueError(f"guidance is {self.guidance!r}; expected a number above 1: both bands are weights of guidance")
        if not self.stages:
            raise ValueError("stages is empty; expected at least one Stage(size, steps, end_time)")
        for j, stage in enumerate(self.stages):
            check_stage(j, stage, self.stages)

    @property
    def low(self) -> float:
        """The weight of the low band in later stages."""
        return self.guidance if self.low_guidance is None else self.low_guidance

    def ratio(self, j: int) -> float:
        """How much larger stage j is than the one before: the larger of both sides' ratios."""
        return max(now / before for now, before in zip(self.stages[j].grid, self.stages[j - 1].grid, strict=True))

    @classmethod
    def preset(cls, name: str) -> FreCaSConfig:
        """Settings as released: "sd21-1024", "sd21-2048", "sdxl-2048", "sdxl-4096" or "sd3-2048"."""
        check_choice(PRESETS, name=name)
        sizes, ends, steps, rest = PRESETS[name]
        return cls(tuple(Stage(*each) for each in zip(sizes, steps, ends, strict=True)), **rest)

    def to_json(self) -> str:
        """All settings as JSON."""
        return json.dumps(asdict(self), indent=1, default=lambda number: number.item())  # NumPy's

    @classmethod
    def from_json(cls, text: str) -> FreCaSConfig:
        """What `to_json` wrote; ValueError where a setting is unknown or missing."""
        try:
            said: Any = json.loads(text)
            stages = tuple(
                Stage(tuple(s["size"]) if isinstance(s["size"], list) else s["size"], s["steps"], s["end_time"]) for s in said["stages"]
            )
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(
                f"no FreCaSConfig ({error!r}); expected JSON as to_json writes it, with stages of size, steps, end_time"
            ) from error
        known = {field.name for field in fields(cls)}
        unknown = (set(said) - known) | {key for s in said["stages"] for key in set(s) - {"size", "steps", "end_time"}}
        if unknown:
            raise ValueError(f"{', '.join(sorted(unknown))}: no setting of FreCaSConfig; expected {', '.join(sorted(known))}")
        return cls(**said | {"stages": stages})


# name -> sizes, end times, steps, what else differs from the defaults
PRESETS: Mapping[str, Any] = {
    "sd21-1024": ((512, 1024), (100, 0), (40, 10), {"gamma": 3.0, "high_guidance": 45.0}),
    "sd21-2048": ((512, 1024, 2048), (200, 200, 0), (30, 10, 10), {"gamma": 3.0, "map_weight": 0.4}),
    "sdxl-2048": ((1024, 2048), (200, 0), (40, 10), {"gamma": 1.5}),
    "sdxl-4096": ((1024, 2048, 4096), (400, 200, 0), (30, 5, 15), {}),
    "sd3-2048": ((1024, 2048), (50, 0), (20, 8), {"gamma": 1.0, "map_weight": 0.5}),  # gamma 1: k is the root of the ratio
}


def check_stage(j: int, stage: Stage, stages: tuple[Stage, ...]) -> None:
    """ValueError, by name, where a stage cannot be, or cannot follow the one before it; a warning where it is much larger."""
    name = f"stages[{j}]"
    if not isinstance(stage, Stage):
        raise ValueError(f"{name} is {stage!r}; expected Stage(size, steps, end_time)")
    if len(stage.grid) != 2 or not all(is_whole(side) and side > 0 for side in stage.grid):
        raise ValueError(f"{name}.size is {stage.size!r}; expected a whole number of pixels, or (height, width)")
    check_whole(2, optional=(), **{f"{name}.steps": stage.steps})
    check_not_negative(**{f"{name}.end_time": stage.end_time})
    if stage is stages[-1]:
        if stage.end_time != 0:
            raise ValueError(f"{name}.end_time is {stage.end_time}; expected 0: the last stage ends with the image")
    else:
        check_positive(**{f"{name}.end_time": stage.end_time})
    if j:
        before = stages[j - 1].grid
        ratios = [now / then for now, then in zip(stage.grid, before, strict=True)]
        if min(ratios) < 1 or max(ratios) == 1:
            raise ValueError(f"{name}.size is {stage.size}; expected larger than {before[0]} x {before[1]}, that of the stage before")
        if max(ratios) > LARGE_RATIO:
            warnings.warn(
                f"{name}.size is {max(ratios):g} times the one before; up to {LARGE_RATIO} is sound: put a stage between", stacklevel=4
            )


def cost(config: FreCaSConfig, unit_flops: float = 1.0) -> float:
    """What all calls cost: sum_j n_j area_j / area_N, in units of one call at the last size (exact for convolutions; attention saves more)."""
    areas = [height * width for height, width in (stage.grid for stage in config.stages)]
    return unit_flops * sum(stage.steps * area for stage, area in zip(config.stages, areas, strict=True)) / areas[-1]
