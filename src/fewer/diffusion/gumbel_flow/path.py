"""The path from noise to letters: softmax((e_k + g / beta) / tau(t)) with tau falling, its velocities, its exact posterior, its score.

Given its noise the path only cools: x_t is proportional to x_s^(tau(s) / tau(t)), so that x_t carries the same information about the letter
at every t. x_t is a Concrete variable of class weights e^(beta delta_ik) and temperature T = beta tau(t).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from fewer.checks import check_positive, check_whole
from fewer.diffusion._shared.prediction import at_least_single

Model = Callable[..., Tensor]  # (x [B, L, K], t [B], cond) -> logits [B, L, K]


class PathSample(NamedTuple):
    """A draw of a path; the names are those of facebookresearch/flow_matching."""

    x_t: Float[Tensor, "B L K"]
    t: Float[Tensor, "B"]
    x_1: Float[Tensor, "B L K"]
    noise: Float[Tensor, "B L K"]


def gumbel(shape: Any, *, dtype: torch.dtype, device: Any = None, generator: torch.Generator | None = None) -> Tensor:
    """Standard Gumbel noise, -log of an exponential variable, which is never log(0)."""
    draw = torch.empty(shape, dtype=dtype, device=device).exponential_(generator=generator)
    return draw.clamp_(min=torch.finfo(dtype).tiny).log_().neg_()


@dataclass(frozen=True)
class GumbelSoftmaxPath:
    """The interpolant of Gumbel-Softmax flow and score matching (arXiv 2503.17361, Eq. 8, 9, 12, 13).

    Args:
        num_classes: letters, K.
        tau_max: temperature at t = 0.
        decay: lambda; the temperature at t is tau_max exp(-lambda t).
        beta: the larger, the less noise.

    All states lie on the simplex, float [B, L, K]; they are computed in float32 or better and come back in the dtype that was given.
    t is a number or [B], in [0, 1].

    Examples:
        >>> path = GumbelSoftmaxPath(4)
        >>> drawn = path.sample(torch.tensor([[0, 3, 1]]), torch.tensor([0.5]), torch.Generator().manual_seed(0))
        >>> drawn.x_t.shape, bool(torch.allclose(drawn.x_t.sum(-1), torch.ones(1, 3)))
        (torch.Size([1, 3, 4]), True)
    """

    num_classes: int
    tau_max: float = 10.0
    decay: float = 3.0
    beta: float = 2.0

    def __post_init__(self) -> None:
        check_whole(least=2, num_classes=self.num_classes)
        check_positive(tau_max=self.tau_max, decay=self.decay, beta=self.beta)

    def tau(self, t: float | Tensor) -> Tensor:
        """The temperature (Eq. 8), float64; ValueError where t is outside [0, 1]."""
        return self.tau_max * torch.exp(-self.decay * within(torch.as_tensor(t, dtype=torch.float64)))

    def sample(self, x1: Tensor, t: float | Tensor, generator: torch.Generator | None = None) -> PathSample:
        """A state of the path to these letters with fresh noise at each position (Eq. 9).

        Args:
            x1: tokens, integers [B, L], or one-hot rows [B, L, K].
            t: a number or one a sequence.

        Returns:
            In the dtype of one-hot rows; of tokens in float32, or in float64 where t is a tensor of that.

        Raises:
            ValueError: a token outside [0, K), a shape without positions, or t outside [0, 1].
        """
        tokens = check_tokens(x1, self.num_classes)
        of_t = t.dtype if isinstance(t, Tensor) and t.is_floating_point() else torch.float32
        dtype = at_least_single(x1.dtype if x1.is_floating_point() else of_t)
        times = check_times(t, len(x1), dtype).to(x1.device, dtype)
        one_hot = F.one_hot(tokens, self.num_classes).to(dtype) if tokens is not None else x1 if x1.is_floating_point() else x1.to(dtype)
        noise = gumbel(one_hot.shape, dtype=dtype, device=x1.device, generator=generator)
        x_t = torch.softmax(torch.add(one_hot, noise, alpha=1 / self.beta).div_(_wide(self.tau(times), noise)), dim=-1)
        out = x1.dtype if x1.is_floating_point() else dtype
        return PathSample(x_t.to(out), times.to(out), one_hot, noise.to(out))

    def start(
        self, *shape: int, dtype: torch.dtype = torch.float32, device: Any = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Where sampling begins, [*shape, K]: noise without a letter."""
        noise = gumbel((*shape, self.num_classes), dtype=at_least_single(dtype), device=device, generator=generator)
        return torch.softmax(noise / (self.beta * self.tau_max), dim=-1).to(dtype)

    def velocity(self, posterior: Float[Tensor, "B L K"], x: Float[Tensor, "B L K"], t: float | Tensor) -> Float[Tensor, "B L K"]:
        """(lambda / tau) x (p - <p, x>) (Eq. 13), p what the model expects of the letter; sums to 0."""
        p, wide = posterior.to(at_least_single(x.dtype)), x.to(at_least_single(x.dtype))
        rate = self.decay / _wide(self.tau(t), wide)
        return (rate * wide * (p - (p * wide).sum(-1, keepdim=True))).to(x.dtype)

    def conditional_velocity(self, x: Float[Tensor, "B L K"], x1: Tensor, t: float | Tensor) -> Float[Tensor, "B L K"]:
        """(lambda / tau) x_k (e_k - x) (Eq. 12): the path's derivative without noise."""
        one_hot = self._one_hot(x1, x)
        rate = self.decay / _wide(self.tau(t), one_hot)
        wide = x.to(one_hot.dtype)
        return (rate * (one_hot * wide).sum(-1, keepdim=True) * (one_hot - wide)).to(x.dtype)

    def path_derivative(self, x: Float[Tensor, "B L K"]) -> Float[Tensor, "B L K"]:
        """lambda x (log x - <x, log x>): the true derivative with the noise kept, in which nothing is learned."""
        wide = x.to(at_least_single(x.dtype))
        log_x = safe_log(wide)
        return (self.decay * wide * (log_x - (wide * log_x).sum(-1, keepdim=True))).to(x.dtype)

    def posterior(self, x: Float[Tensor, "... K"], prior: Float[Tensor, "K"], t: float | Tensor) -> Float[Tensor, "... K"]:
        """P(letter | x_t) where positions are independent: prior_k (S + c w_k)^-K, w = x^-T, S = sum w, c = e^beta - 1."""
        log_w = self._log_weights(x, t)
        prior = torch.as_tensor(prior, dtype=log_w.dtype, device=x.device)
        return torch.softmax(prior.log() - self.num_classes * self._log_mixed(log_w), dim=-1).to(x.dtype)

    def score(self, x: Float[Tensor, "B L K"], x1: Tensor, t: float | Tensor) -> Float[Tensor, "B L K"]:
        """d log p(y | letter) / dy in y = log x: -T + K T softmax(beta e_k - T y); components sum to 0."""
        one_hot, log_w = self._one_hot(x1, x), self._log_weights(x, t)
        temperature = self._temperature(t, log_w)
        return (temperature * (self.num_classes * torch.softmax(self.beta * one_hot + log_w, dim=-1) - 1)).to(x.dtype)

    def score_to_posterior(self, q: Float[Tensor, "... K"], x: Float[Tensor, "... K"], t: float | Tensor) -> Float[Tensor, "... K"]:
        """The posterior that q = E[softmax(beta e_k - T y) | x_t] stands for, exactly; of a learned q it may leave the simplex.

        p_j = (q_j / w_j - A)(S + c w_j) / c, A = (sum_j q_j (S + c w_j) / w_j - c) / ((K + c) S).
        """
        log_w = self._log_weights(x, t)
        w = torch.exp(log_w - log_w.amax(-1, keepdim=True)).clamp_min(torch.finfo(log_w.dtype).tiny)
        q, c, total = q.to(w.dtype), math.expm1(self.beta), w.sum(-1, keepdim=True)
        mixed = total + c * w
        a = ((q * mixed / w).sum(-1, keepdim=True) - c) / ((self.num_classes + c) * total)
        return ((q / w - a) * mixed / c).to(x.dtype)

    def _temperature(self, t: float | Tensor, like: Tensor) -> Tensor:
        return self.beta * _wide(self.tau(t), like)

    def _log_weights(self, x: Tensor, t: float | Tensor) -> Tensor:
        """log of x^-T."""
        wide = x.to(at_least_single(x.dtype))
        return -self._temperature(t, wide) * safe_log(wide)

    def _log_mixed(self, log_w: Tensor) -> Tensor:
        """log(S + c w)."""
        return torch.logaddexp(torch.logsumexp(log_w, -1, keepdim=True), log_w + math.log(math.expm1(self.beta)))

    def _one_hot(self, x1: Tensor, like: Tensor) -> Tensor:
        tokens = check_tokens(x1, self.num_classes)
        return (x1 if tokens is None else F.one_hot(tokens, self.num_classes)).to(at_least_single(like.dtype))


# The losses


def gumbel_flow_loss(
    model: Model,
    path: Any,
    tokens: Int[Tensor, "B L"],
    mask: Tensor | None = None,
    cond: Any = None,
    *,
    t: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """-log p_theta(letter | x_t, t), the mean over positions that are no padding (Eq. 11); t uniform, one a sequence.

    Args:
        model: (x [B, L, K], t [B], cond) -> logits [B, L, K]; padded positions are given as zeros.
        path: of this method, or a peer's (`LinearPath`, `DirichletPath`).
        mask: [B, L], True (or 1) at real positions; None: all are.
        t: instead of drawn times.

    Raises:
        ValueError: see `GumbelSoftmaxPath.sample`; a mask of another shape or without a real position; logits of another shape.
    """
    _, logits, mask = asked(model, path, tokens, mask, cond, t, generator)
    return mean_over(F.cross_entropy(logits.movedim(-1, 1), tokens.long(), reduction="none"), mask)


def gumbel_score_loss(
    model: Model,
    path: GumbelSoftmaxPath,
    tokens: Int[Tensor, "B L"],
    mask: Tensor | None = None,
    cond: Any = None,
    *,
    t: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """|s_theta - s|^2 / (K T)^2, s_theta = -T + K T softmax(logits); the division keeps all times on one scale. Arguments as above."""
    drawn, logits, mask = asked(model, path, tokens, mask, cond, t, generator)
    target = torch.softmax(path.beta * drawn.x_1 + path._log_weights(drawn.x_t, drawn.t), dim=-1)  # (s + T) / (K T)
    return mean_over((torch.softmax(logits, dim=-1) - target).square().sum(-1), mask)


def asked(
    model: Model, path: Any, tokens: Tensor, mask: Tensor | None, cond: Any, t: Tensor | None, generator: Any
) -> tuple[Any, Tensor, Tensor | None]:
    """A draw of the path, the model's logits there in float32 or better, and the mask as bool."""
    mask = check_mask(mask, tokens.shape[:2])
    if t is None:
        t = torch.rand(len(tokens), generator=generator, device=tokens.device)
    drawn = path.sample(tokens, t, generator)
    x = drawn.x_t if mask is None else drawn.x_t * mask[..., None]
    return drawn, logits_of(model, x, drawn.t, cond), mask


def logits_of(model: Model, x: Float[Tensor, "B L K"], t: Float[Tensor, "B"], cond: Any) -> Float[Tensor, "B L K"]:
    """The model's answer in float32 or better; it sees x in its own dtype."""
    logits = model(x.to(dtype_of(model, x.dtype)), t, cond)
    if logits.shape != x.shape:
        raise ValueError(f"the model gave {tuple(logits.shape)} for x of {tuple(x.shape)}; expected as many logits: [B, L, K]")
    return logits.to(at_least_single(logits.dtype))


def dtype_of(model: Any, other: torch.dtype) -> torch.dtype:
    """Of a module's weights; `other` for a function."""
    weights = model.parameters() if isinstance(model, nn.Module) else ()
    return next((each.dtype for each in weights if each.is_floating_point()), other)


def mean_over(losses: Float[Tensor, "B L"], mask: Tensor | None) -> Tensor:
    if mask is None:
        return losses.mean()
    if not mask.any():
        raise ValueError("mask has no real position; expected True at one at least")
    return torch.where(mask, losses, 0).sum() / mask.sum()


# What is asked of tokens and times


def check_tokens(x1: Tensor, num_classes: int) -> Tensor | None:
    """int64 tokens [B, L], or None where x1 is one-hot rows, of floats or (as torch's one_hot makes them) integers; ValueError else."""
    if x1.ndim < 2 or 0 in x1.shape:
        raise ValueError(f"x1 is {tuple(x1.shape)}; expected tokens [B, L] or one-hot rows [B, L, K], with a position at least")
    if x1.is_floating_point() or x1.ndim > 2:
        if x1.shape[-1] != num_classes or x1.ndim != 3:
            raise ValueError(f"x1 is {tuple(x1.shape)}; expected rows of {num_classes} letters, or integer tokens [B, L]")
        return None
    low, high = int(x1.min()), int(x1.max())
    if low < 0 or high >= num_classes:
        raise ValueError(f"tokens hold {low}..{high}; expected 0..{num_classes - 1}: mask padding, and give it any letter")
    return x1.long()


def check_times(t: float | Tensor, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """t as [count], numbers in `dtype`; ValueError outside [0, 1]."""
    times = within(torch.as_tensor(t, dtype=dtype if not isinstance(t, Tensor) else None))
    if times.shape not in ((), (count,)):
        raise ValueError(f"t is {tuple(times.shape)}; expected a number, or one for each of {count} sequences, in [0, 1]")
    return times.expand(count)


def within(t: Tensor) -> Tensor:
    """t; ValueError outside [0, 1]."""
    if not bool(((t >= 0) & (t <= 1)).all()):
        raise ValueError(f"t holds {float(t.min()):g}..{float(t.max()):g}; expected times in [0, 1]")
    return t


def check_mask(mask: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    """As bool; ValueError where it is not one value a position."""
    if mask is not None and mask.shape != tuple(shape):
        raise ValueError(f"mask is {tuple(mask.shape)}; expected {tuple(shape)}, True at real positions")
    return None if mask is None else mask.bool()


def safe_log(x: Tensor) -> Tensor:
    """log of a share that may have been cut to 0."""
    return x.clamp_min(torch.finfo(x.dtype).tiny).log()


def _wide(value: Tensor, like: Tensor) -> Tensor:
    """A value a sequence, in the dtype of what it multiplies, [B, ..., K]; a single one as it is."""
    value = value.to(like.device, like.dtype)
    return value.reshape(-1, *(1,) * (like.ndim - 1)) if value.ndim else value
