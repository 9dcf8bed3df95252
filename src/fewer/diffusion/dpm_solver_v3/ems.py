"""Empirical model statistics: the curves l, s, b that say what of a noise predictor is linear, measured once a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float32, Float64
from torch import Tensor, nn

from fewer.files import model_digest as model_hash
from fewer.files import read_json, read_weights, whole_file

WEIGHTS, META = "ems.safetensors", "ems.json"
CURVES = ("lambdas", "l", "s", "b")


@dataclass(frozen=True, eq=False)
class EMS:
    """l, s, b of a model on a grid of lambda = log(alpha / sigma) (section 3.2).

    Args:
        lambdas: float64 [N + 1], rising in equal steps: from the noisiest time to the cleanest.
        l, s, b: float32 [N + 1, *sample_shape], or any shape that broadcasts to a sample's.
        meta: plain data that are kept with it: of which model (`model`, a hash), of how many samples, ...

    Raises:
        ValueError: shapes that do not belong together, a grid that is not one, or a value that is not finite.

    The paper's ImageNet-256 setting, l replaced by 1 after s and b were measured, is `dataclasses.replace(ems, l=torch.ones_like(ems.l))`.

    Examples:
        >>> ems = EMS.data_prediction(torch.linspace(-4, 4, 121, dtype=torch.float64))
        >>> ems.num_timesteps, ems.sample_shape
        (120, ())
    """

    lambdas: Float64[Tensor, "N_plus_1"]
    l: Float32[Tensor, "N_plus_1 *shape"]  # noqa: E741 - the paper's name
    s: Float32[Tensor, "N_plus_1 *shape"]
    b: Float32[Tensor, "N_plus_1 *shape"]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shapes = [tuple(each.shape) for each in (self.lambdas, self.l, self.s, self.b)]
        if len(shapes[0]) != 1 or shapes[0][0] < 2 or shapes[1][:1] != shapes[0] or not shapes[1] == shapes[2] == shapes[3]:
            raise ValueError(f"lambdas, l, s, b are {shapes}; expected [N + 1] and three times [N + 1, *sample_shape], N >= 1")
        gaps = self.lambdas.diff()
        if self.lambdas.dtype != torch.float64 or not bool((gaps > 0).all()) or float((gaps / gaps.mean() - 1).abs().max()) > 1e-6:
            raise ValueError("lambdas must be float64 and rise in equal steps; make them with torch.linspace(..., dtype=torch.float64)")
        for name in ("l", "s", "b"):
            bad = ~torch.isfinite(getattr(self, name)).reshape(len(self.lambdas), -1).all(1)
            if bool(bad.any()):
                where = float(self.lambdas[bad][0])
                raise ValueError(
                    f"{name} is not finite at lambda = {where:.4f}; expected finite statistics: estimate them again in float32"
                )

    @property
    def num_timesteps(self) -> int:
        """N."""
        return len(self.lambdas) - 1

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """The shape of one sample that it was measured on; () or ones where it holds for every element alike."""
        return tuple(self.l.shape[1:])

    @staticmethod
    def data_prediction(lambdas: Float64[Tensor, "N_plus_1"]) -> EMS:
        """l = 1, s = 0, b = 0: the solver that trusts the data prediction (its order 1 is DDIM)."""
        return _constant(lambdas, 1.0, 0.0)

    @staticmethod
    def noise_prediction(lambdas: Float64[Tensor, "N_plus_1"]) -> EMS:
        """l = 0, s = -1, b = 0: the solver that trusts the noise prediction."""
        return _constant(lambdas, 0.0, -1.0)

    def scalar(self) -> EMS:
        """The means over the elements: less to keep, and less exact."""

        def mean(curve: Tensor) -> Tensor:
            return curve.double().reshape(len(curve), -1).mean(1).reshape(-1, *[1] * (curve.ndim - 1)).float()

        return replace(self, l=mean(self.l), s=mean(self.s), b=mean(self.b))

    def check_shape(self, shape: Sequence[int]) -> None:
        """ValueError where it was measured on samples of another shape."""
        mine = self.sample_shape
        fits = not mine or (len(mine) == len(shape) and all(a in (1, b) for a, b in zip(mine, shape, strict=True)))
        if not fits:
            raise ValueError(f"samples are {tuple(shape)}, the EMS are for {mine}; estimate EMS for this shape")

    def check_model(self, model: nn.Module) -> None:
        """ValueError where it was measured on another model, or is not known to be this one's."""
        if self.meta.get("model") != model_hash(model):
            raise ValueError(
                f"the EMS are of the model {self.meta.get('model')}, this one is {model_hash(model)}; estimate EMS for this checkpoint"
            )

    def save_pretrained(self, directory: str | Path) -> None:
        """Write it into a directory (`ems.safetensors`, `ems.json`), each file whole; EMS that stand there are replaced."""
        from safetensors.torch import save_file

        directory = Path(directory)
        with whole_file(directory / META, overwrite=True) as part:
            part.write_text(json.dumps(dict(self.meta), indent=2))
        with whole_file(directory / WEIGHTS, overwrite=True) as part:  # last: they say that it is whole
            save_file({name: getattr(self, name).contiguous() for name in CURVES}, part)

    @staticmethod
    def from_pretrained(directory: str | Path, model: nn.Module | None = None) -> EMS:
        """Read what `save_pretrained` wrote.

        Args:
            model: where given, the model that it must have been measured on.

        Raises:
            FileNotFoundError: no EMS there.
            ValueError: of another model, or files that are cut off.
        """
        directory = Path(directory)
        if not (directory / WEIGHTS).is_file() or not (directory / META).is_file():
            raise FileNotFoundError(
                f"{directory} has no {WEIGHTS} and {META}; expected a directory that save_pretrained or `fewer ems` wrote"
            )
        read = read_weights(directory / WEIGHTS)
        if set(read) != set(CURVES):
            raise ValueError(f"{directory / WEIGHTS} holds {', '.join(sorted(read))}; expected {', '.join(CURVES)}: estimate EMS again")
        ems = EMS(**read, meta=read_json(directory / META))
        if model is not None:
            ems.check_model(model)
        return ems


def _constant(lambdas: Tensor, l: float, s: float) -> EMS:  # noqa: E741
    like = torch.ones(len(lambdas), dtype=torch.float32)
    return EMS(lambdas, l * like, s * like, 0 * like, {"kind": "constant"})
