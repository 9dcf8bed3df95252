"""Ratios that were searched, what they are keyed by, and the polynomial that predicts them for settings that were not searched."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from jaxtyping import Float64

from fewer.checks import check_not_negative, check_whole, is_number
from fewer.diffusion.dc_solver.unipc import first_compensated
from fewer.files import read_json, whole_file
from fewer.inputs import read_arrays

SHAPE = (4, 3, 3)  # degree in i / NFE; then powers 2, 1, 0 of CFG / 12; then powers 2, 1, 0 of NFE / 50
SCALE_UNIT, STEPS_UNIT = 12.0, 50.0
POWERS = (2, 1, 0)
KEYS = (  # settings under which ratios mean the same
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr", "solver_order",
    "solver_type", "predict_x0", "lower_order_final", "use_corrector", "disable_corrector", "dc_order", "timestep_spacing", "steps_offset",
    "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "final_sigmas_type", "thresholding", "dynamic_thresholding_ratio",
    "sample_max_value",
)  # fmt: skip


def key_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a scheduler's config that its ratios belong to."""
    return {name: list(value) if isinstance(value := config[name], tuple) else value for name in KEYS}


def check_key(found: Mapping[str, Any], config: Mapping[str, Any], what: str) -> None:
    """Refuse ratios of another config, by the fields that differ."""
    mine = key_of(config)
    differing = [f"{name} {found.get(name)!r}, here {mine[name]!r}" for name in KEYS if found.get(name) != mine[name]]
    if differing:
        raise ValueError(f"{what} of another config ({'; '.join(differing)}); expected those of this one: search them with it")


@dataclass(frozen=True)
class Ratios:
    """Ratios of one setting: so many steps, a guidance scale, and a scheduler's config.

    Attributes:
        values: one a step; the first ones, which have too few outputs before them, are 1.
        steps: network calls.
        guidance_scale: of the model that they were searched on.
        config: what else they belong to, see `KEYS`.
        removed: of each step's squared error, the share that its ratio took away (0 where it was not searched).
        calls: network calls of the search, each for all noises.
    """

    values: list[float]
    steps: int
    guidance_scale: float
    config: dict[str, Any]
    removed: list[float] = field(default_factory=list)
    calls: int = 0

    def __post_init__(self) -> None:
        check_whole(steps=self.steps)
        check_not_negative(guidance_scale=self.guidance_scale)
        check_ratios(self.values, self.steps)

    def save(self, file: str | Path, overwrite: bool = False) -> None:
        """As JSON, whole or not at all."""
        with whole_file(file, overwrite, option="file") as part:
            part.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf8")

    @classmethod
    def load(cls, file: str | Path) -> Ratios:
        """What `save` wrote; ValueError for anything else."""
        return cls.of_json(read_json(file), str(file))

    @classmethod
    def of_json(cls, read: Any, where: str) -> Ratios:
        fields = set(cls.__dataclass_fields__)
        if not isinstance(read, dict) or set(read) - fields or not {"values", "steps", "guidance_scale", "config"} <= set(read):
            raise ValueError(f"{where} is no ratios; expected the fields {', '.join(sorted(fields))}: search them anew")
        return cls(**cast("dict[str, Any]", read))


def check_ratios(values: Sequence[float], steps: int | None = None) -> None:
    """Refuse values that are no finite numbers, or not one a step."""
    if isinstance(values, str) or not all(is_number(value) for value in values):
        raise ValueError(f"ratios are {values!r}; expected finite numbers, one a step: search_ratios finds them")
    if steps is not None and len(values) != steps:
        raise ValueError(f"{len(values)} ratios for {steps} steps; expected one a step: search them for {steps} steps")


@dataclass(frozen=True, eq=False)
class CascadePolynomial:
    """Ratios as a polynomial: rho(i; CFG, NFE) = sum_d a_d (i / NFE)^d for i from 3 on (1-based), a_d quadratic in CFG and NFE.

    Attributes:
        coefficients: float64 [4, 3, 3]; power of i / NFE, then of CFG / 12 (2, 1, 0), then of NFE / 50 (2, 1, 0).
        steps, scales: (least, most) network calls and guidance scale of the settings that it was fitted on.
        config: the scheduler's settings that it belongs to, see `KEYS`; None: not known.

    Examples:
        >>> constant = np.zeros((4, 3, 3))
        >>> constant[0, 2, 2] = 1.1
        >>> CascadePolynomial(constant, (5, 10), (1.0, 7.5)).predict(5, 4.0)
        [1.0, 1.0, 1.1, 1.1, 1.1]
    """

    coefficients: Float64[np.ndarray, "4 3 3"]
    steps: tuple[int, int]
    scales: tuple[float, float]
    config: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if np.shape(self.coefficients) != SHAPE or not np.isfinite(self.coefficients).all():
            raise ValueError(f"coefficients of shape {np.shape(self.coefficients)}; expected {SHAPE}, all finite")

    @classmethod
    def fit(cls, found: Sequence[Ratios]) -> CascadePolynomial:
        """By least squares to the ratios of at least three numbers of steps and three guidance scales, all of one config.

        Raises:
            ValueError: too few settings, or settings of different configs.

        Warns:
            UserWarning: they do not determine all 36 coefficients; those of least norm are taken.
        """
        steps, scales = sorted({each.steps for each in found}), sorted({each.guidance_scale for each in found})
        if len(steps) < 3 or len(scales) < 3:
            raise ValueError(
                f"{len(found)} settings with the numbers of steps {steps} and the guidance scales {scales}; expected at least three of each: "
                "search more"
            )
        for each in found[1:]:
            different = [name for name in KEYS if each.config.get(name) != found[0].config.get(name)]
            if different:
                raise ValueError(f"ratios of configs that differ in {', '.join(different)}; expected one config: fit each of its own")
        rows = [
            (_terms(i, each.guidance_scale, each.steps).ravel(), each.values[i - 1]) for each in found for i in range(3, each.steps + 1)
        ]
        design, wanted = (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))
        solution, _, rank, _ = np.linalg.lstsq(design, wanted, rcond=None)
        if rank < design.shape[1]:
            warnings.warn(
                f"these settings determine {rank} of {design.shape[1]} coefficients; those of least norm are taken. At least three scales and "
                "three numbers of steps from 6 on determine them all",
                stacklevel=2,
            )
        box = (steps[0], steps[-1]), (float(scales[0]), float(scales[-1]))
        return cls(solution.reshape(SHAPE), *box, dict(found[0].config))

    def predict(self, steps: int, guidance_scale: float) -> list[float]:
        """A ratio a step. Outside the settings of the fit those at its border are given, with a warning."""
        check_whole(steps=steps)
        check_not_negative(guidance_scale=guidance_scale)
        held_steps, held_scale = float(np.clip(steps, *self.steps)), float(np.clip(guidance_scale, *self.scales))
        if (held_steps, held_scale) != (steps, guidance_scale):
            warnings.warn(
                f"{steps} steps at guidance {guidance_scale:g} lie outside the fit's {self.steps[0]} to {self.steps[1]} steps and "
                f"{self.scales[0]:g} to {self.scales[1]:g}; the ratios at its border are taken",
                stacklevel=2,
            )
        first = first_compensated(self.config["dc_order"] if self.config else 2)

        def value(i: int) -> float:
            return float((self.coefficients * _terms(i / steps * held_steps, held_scale, held_steps)).sum())

        return [1.0 if i <= first else value(i) for i in range(1, steps + 1)]

    def ratios(self, steps: int, guidance_scale: float) -> Ratios:
        """The same as `Ratios`, for a scheduler of the config that it was fitted on."""
        if self.config is None:
            raise ValueError("this polynomial knows no config; expected one that fit or load made: give the scheduler predict's values")
        return Ratios(self.predict(steps, guidance_scale), steps, guidance_scale, dict(self.config))

    def save(self, file: str | Path, overwrite: bool = False) -> None:
        """As npz, whole or not at all."""
        with whole_file(file, overwrite, option="file") as part, part.open("wb") as stream:
            np.savez(
                stream, coefficients=self.coefficients, steps=np.array(self.steps), scales=np.array(self.scales),
                config=np.frombuffer(json.dumps(self.config).encode(), dtype=np.uint8),
            )  # fmt: skip

    @classmethod
    def load(cls, file: str | Path) -> CascadePolynomial:
        """What `save` wrote; ValueError for anything else."""
        read = read_arrays(file, ["coefficients", "steps", "scales", "config"])
        try:
            config = json.loads(read["config"].astype(np.uint8).tobytes().decode())
            (a, b), (c, d) = read["steps"].tolist(), read["scales"].tolist()
            return cls(read["coefficients"].astype(np.float64), (int(a), int(b)), (float(c), float(d)), config)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file} is no cascade polynomial ({error}); expected a file that save wrote: fit it anew") from error


def _terms(i: float, guidance_scale: float, steps: float) -> Float64[np.ndarray, "4 3 3"]:
    """(i / NFE)^d (CFG / 12)^p (NFE / 50)^q for every coefficient."""
    powers = [np.array([base**power for power in POWERS]) for base in (guidance_scale / SCALE_UNIT, steps / STEPS_UNIT)]
    share = np.array([(i / steps) ** d for d in range(SHAPE[0])])
    return np.einsum("d,p,q->dpq", share, *powers)


def finite_share(before: float, after: float) -> float:
    """The share of `before` that is gone in `after`; 0 where there was nothing.

    >>> finite_share(4.0, 1.0), finite_share(0.0, 0.0)
    (0.75, 0.0)
    """
    return 1 - after / before if before > 0 and math.isfinite(before) else 0.0
