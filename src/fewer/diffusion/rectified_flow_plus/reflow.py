"""Training on the pairs of one round (arXiv 2405.20320, Algorithm 1): times where the loss is large, a premetric, the average of the weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fewer.checks import check_choice, check_not_negative, check_positive, check_share, check_whole
from fewer.diffusion.rectified_flow_plus.pairs import PairDataset
from fewer.diffusion.rectified_flow_plus.premetric import LPIPSHuber, PyramidHuber
from fewer.diffusion.rectified_flow_plus.velocity import EPS, check_answer, spread
from fewer.fitting import MovingAverage, fit_steps

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
LOSS_SCALE, CLEAN_STEPS = 32768.0, 1000  # of float16: halved after an overflow, doubled after so many steps without
MOST_SKIPPED = 20  # in a row
A = 4.0


@dataclass(frozen=True)
class UShapedTimesteps:
    """p(t) = a / (2 (e^a - 1)) (e^{a t} + e^{a (1 - t)}) on [0, 1]: most times near both ends, where the loss of a second flow is largest.

    The released code's law; the paper's text prints e^{a t} + e^{-a t}, which rises from 0 to 1 and has no U.

    Args:
        a: 0 is uniform.

    Examples:
        >>> law = UShapedTimesteps(4.0)
        >>> t = torch.tensor([0.1, 0.4, 0.5])
        >>> [round(float(value), 6) for value in law.cdf(t)], torch.allclose(law.icdf(law.cdf(t)), t)
        ([0.172504, 0.443374, 0.5], True)
    """

    a: float = A

    def __post_init__(self) -> None:
        check_not_negative(a=self.a)
        if self.a > 80:  # beyond it, float32 overflows
            raise ValueError(f"a is {self.a}; expected 0 to 80: at 80 all times are within 0.1 of an end")

    def pdf(self, t: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        if not self.a:
            return torch.ones_like(t)
        return self.a / (2 * math.expm1(self.a)) * ((self.a * t).exp() + (self.a * (1 - t)).exp())

    def cdf(self, t: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        return (t if not self.a else 0.5 + torch.sinh(self.a * (t - 0.5)) / (2 * math.sinh(self.a / 2))).clamp(0, 1)

    def icdf(self, q: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        return q if not self.a else 0.5 + torch.asinh((2 * q - 1) * math.sinh(self.a / 2)) / self.a


def sample_t(
    n: int, a: float = A, eps: float = EPS, generator: torch.Generator | None = None, device: str | torch.device = "cpu"
) -> Float[Tensor, "n"]:
    """Times of the U-shaped law, squeezed into [eps, 1 - eps], float32.

    u of density a e^{a u} / (e^a - 1) by inversion, then u or 1 - u by the first bit of the same draw.
    """
    check_whole(least=0, n=n)
    UShapedTimesteps(a)
    if not 0 <= eps < 0.5:
        raise ValueError(f"eps is {eps}; expected at least 0 and below 0.5: the default is {EPS}")
    q = torch.rand(n, generator=generator, device=device)
    if a:
        q = 2 * q
        mirrored = q >= 1
        u = torch.log1p((q - mirrored.to(q)) * math.expm1(a)) / a
        q = torch.where(mirrored, 1 - u, u)
    return eps + (1 - 2 * eps) * q


@dataclass(frozen=True)
class ReflowConfig:
    """How a flow is trained; the defaults are those of CIFAR-10 (configuration F), and `preset` gives the others.

    Args:
        steps, batch_size, lr, warm_up: Adam (0.9, 0.999, 1e-8), its rate raised in a line over `warm_up` steps, then constant.
        decay: whether it then falls in a line to 0 (not in the paper; for short runs).
        ema: what the average of the weights keeps at a step.
        a: of the U-shaped law.
        dropout: what the network's dropout layers get while it trains; None leaves them.
        precision: "float32", or "bfloat16" or "float16" by autocast, the latter with a dynamic loss scale.
        real_share: of a batch, where real pairs are given (not published).
        seed: draws pairs and times.
    """

    steps: int = 800_000
    batch_size: int = 512
    lr: float = 2e-4
    warm_up: int = 5000
    decay: bool = False
    ema: float = 0.9999
    a: float = A
    dropout: float | None = None
    precision: str = "float32"
    real_share: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole(steps=self.steps, batch_size=self.batch_size)
        check_whole(least=0, warm_up=self.warm_up, seed=self.seed)
        check_positive(lr=self.lr)
        check_share(ema=self.ema, real_share=self.real_share, dropout=self.dropout or 0.0)
        check_choice(PRECISIONS, precision=self.precision)
        UShapedTimesteps(self.a)

    @classmethod
    def preset(cls, name: str) -> ReflowConfig:
        """ "cifar10" (dropout 0.13), "afhq64", "ffhq64" or "imagenet64" (configuration E is meant there: `time_weight="none"`)."""
        check_choice(PRESETS, name=name)
        return cls(**PRESETS[name])

    def on_real_data(self) -> ReflowConfig:
        """The brief training on real pairs (configuration G): a twentieth of the steps at a tenth of the rate; neither is published."""
        return replace(self, steps=math.ceil(self.steps / 20), lr=self.lr / 10, warm_up=math.ceil(self.warm_up / 20))

    def rate(self, step: int) -> float:
        """The factor on the rate at a step from 0."""
        up = min(1.0, (step + 1) / max(1, self.warm_up))
        return min(up, (self.steps - step) / max(1, self.steps - self.warm_up)) if self.decay else up


PRESETS: dict[str, dict[str, Any]] = {
    "cifar10": {"dropout": 0.13},
    "afhq64": {"steps": 1_000_000, "batch_size": 256},
    "ffhq64": {"steps": 1_000_000, "batch_size": 256},
    "imagenet64": {"steps": 700_000, "batch_size": 2048, "lr": 1e-4, "warm_up": 2500, "precision": "float16"},
}


class SkippingAdam(torch.optim.Adam):
    """Adam that leaves a step out where there are no gradients or they are not finite, with a loss scale that halves then."""

    def __init__(self, parameters: Any, lr: float, scale: float) -> None:
        super().__init__(parameters, lr=lr, betas=(0.9, 0.999), eps=1e-8, fused=True)
        self.scale, self.dynamic = scale, scale != 1
        self.skipped, self.in_a_row, self.clean = 0, 0, 0

    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradients = [weight.grad for group in self.param_groups for weight in group["params"] if weight.grad is not None]
        if gradients and bool(nn.utils.get_total_norm(gradients).isfinite()):
            for gradient in gradients if self.scale != 1 else ():
                gradient.mul_(1 / self.scale)
            super().step(closure)
            self.in_a_row, self.clean = 0, self.clean + 1
            if self.dynamic and self.clean % CLEAN_STEPS == 0:
                self.scale *= 2
            return
        self.skipped, self.in_a_row, self.clean = self.skipped + 1, self.in_a_row + 1, 0
        self.scale = self.scale / 2 if self.dynamic else self.scale
        if self.in_a_row == MOST_SKIPPED:
            raise FloatingPointError(
                f"the loss or its gradient was not finite in {MOST_SKIPPED} steps in a row; expected finite numbers: lower the rate, or look "
                "for what is not finite in the pairs"
            )


DrawTimes = Callable[[int, torch.Generator], Tensor]


def train_reflow(
    model: nn.Module,
    pairs: PairDataset,
    config: ReflowConfig,
    premetric: nn.Module | None = None,
    *,
    real: PairDataset | None = None,
    draw_times: DrawTimes | None = None,
    tell: Callable[[int, float], None] | None = None,
) -> nn.Module:
    """A straighter flow: the velocity fitted to z - x on the lines of the pairs.

    Args:
        model: the velocity to begin with (`VelocityFromEDM(teacher)`: already a flow), `model(x_t, t, *condition)`. It is left as it is;
            what is frozen in it is not trained, unless all is, as in a teacher.
        pairs: of `generate_pairs`.
        config: steps, rates and the law of times.
        premetric: `LPIPSHuber(FeatureDistance(...), time_weight="1/t")` is configuration F; by default the same over a Laplacian pyramid,
            which needs no network.
        real: pairs of `real_pairs`, of which `config.real_share` of each batch are drawn (with `config.on_real_data()`).
        draw_times: times [n] in place of the U-shaped law.
        tell: called with the step (from 1) and its loss.

    Returns:
        The moving average of the trained copy, in eval mode, on the model's device; `model.skipped_steps` says how many were skipped.

    Raises:
        ValueError: pairs of different shapes, or velocities of another shape than theirs.
        FloatingPointError: 20 steps in a row whose loss or gradient is not finite.
    """
    sets = [pairs] if real is None else [pairs, real]
    if len({each.shape for each in sets}) > 1 or len({each.label is None for each in sets}) > 1:
        raise ValueError(f"pairs are {pairs.shape} and real pairs {sets[-1].shape}; expected one shape, with labels in both or in none")
    student = copy.deepcopy(model).train()
    if not any(weight.requires_grad for weight in student.parameters()):  # a teacher is mostly frozen whole
        student.requires_grad_(True)
    for part in student.modules():
        if isinstance(part, nn.Dropout) and config.dropout is not None:
            part.p = config.dropout
    device = next(student.parameters()).device
    judge = (LPIPSHuber(PyramidHuber(), time_weight="1/t") if premetric is None else copy.deepcopy(premetric)).to(device)
    average, dtype = MovingAverage(student, config.ema), PRECISIONS[config.precision]
    optimizer = SkippingAdam(student.parameters(), config.lr, LOSS_SCALE if config.precision == "float16" else 1.0)
    losses: list[float] = []

    def loss_of(t: Tensor, x: Tensor, z: Tensor, *condition: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            column = spread(t, x)
            v = student((1 - column) * x + column * z, t, *condition)
        check_answer(v, x)
        loss = judge(v, x, z, t).mean()
        losses[:] = [loss.item()]
        return loss * optimizer.scale if math.isfinite(losses[0]) else torch.zeros((), requires_grad=True)  # without a gradient: no step

    def told(step: int, _: float) -> None:
        if not optimizer.in_a_row:
            average.update(student)
        if tell is not None:
            tell(step, losses[0])

    fit_steps(optimizer, loss_of, batches(sets, config, draw_times, device), config.steps, schedule=config.rate, tell=told)
    average.model.skipped_steps = optimizer.skipped  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
    return average.model


def batches(
    sets: list[PairDataset], config: ReflowConfig, draw_times: DrawTimes | None, device: torch.device
) -> Iterator[tuple[Tensor, ...]]:
    """(t, x, z) or (t, x, z, label), drawn with replacement; of two sets each has its share of a batch."""
    draw = torch.Generator().manual_seed(config.seed)
    real = round(config.batch_size * config.real_share) if len(sets) > 1 else 0
    while True:
        parts = []
        for each, count in zip(sets, (config.batch_size - real, real), strict=False):
            parts.append(each.batch(torch.randint(len(each), (count,), generator=draw)))
        t = draw_times(config.batch_size, draw) if draw_times else sample_t(config.batch_size, config.a, generator=draw)
        yield tuple(each.to(device) for each in (t, *(torch.cat(column) for column in zip(*parts, strict=True))))
