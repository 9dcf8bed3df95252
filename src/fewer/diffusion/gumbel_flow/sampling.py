"""Sampling: from noise along the velocity that a model's posterior gives, to letters."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from fewer.checks import check_choice, check_whole
from fewer.diffusion._shared.prediction import at_least_single
from fewer.diffusion.gumbel_flow.guidance import STGuidance
from fewer.diffusion.gumbel_flow.path import GumbelSoftmaxPath, Model, check_mask, dtype_of, logits_of, safe_log
from fewer.fitting import evaluating

INTEGRATORS, DECODES, PREDICTIONS = ("exponential", "euler"), ("argmax", "sample", "posterior"), ("posterior", "score")


@dataclass(frozen=True, eq=False)
class Samples:
    """Sequences, and what happened on the way.

    Attributes:
        tokens: [B, L]; 0 at padding.
        x: the final state, on the simplex and not near its corners: the whole gain of a logit is (e^lambda - 1) / tau_max.
        corrections: how often a share below 0 was cut and the rest made to sum to 1 again (Euler's steps; posteriors of a learned score).
        corners: the mean of each position's largest share at the end.
    """

    tokens: Int[Tensor, "B L"]
    x: Float[Tensor, "B L K"]
    corrections: int
    corners: float


@torch.no_grad()
def sample(
    model: Model,
    path: GumbelSoftmaxPath,
    length: int,
    batch: int,
    steps: int = 100,
    integrator: str = "exponential",
    decode: str = "argmax",
    guidance: STGuidance | None = None,
    generator: torch.Generator | None = None,
    cond: Any = None,
    *,
    mask: Tensor | None = None,
    prediction: str = "posterior",
    device: Any = None,
) -> Samples:
    """Draw sequences; the model is asked once a step (arXiv 2503.17361, algorithm of sampling).

    Args:
        model: (x [B, L, K], t [B], cond) -> logits; a module is asked in eval mode, in the dtype of its weights, and its mode given back.
            The state is float32, of a float64 module float64.
        length, batch: of the sequences.
        steps: N; t = 0, 1/N, ...
        integrator: "exponential" moves logits and is exact while the posterior stands still; "euler" is the paper's.
        decode: of the final state: "argmax", "sample" (a draw from it), or "posterior" (a draw from the model's answer at t = 1).
        guidance: towards a classifier, see `STGuidance`.
        mask: [B, L], True (or 1) at real positions; the others stay empty.
        prediction: what the model was trained for: "posterior" (`gumbel_flow_loss`) or "score" (`gumbel_score_loss`).

    Raises:
        ValueError: steps, length or batch below 1, an unknown word, a mask of another shape, or logits of another shape.
        FloatingPointError: the model's answer or the guidance is not finite.
    """
    check_whole(length=length, batch=batch, steps=steps)
    check_choice(INTEGRATORS, integrator=integrator)
    check_choice(DECODES, decode=decode)
    check_choice(PREDICTIONS, prediction=prediction)
    mask, dtype = check_mask(mask, (batch, length)), at_least_single(dtype_of(model, torch.float32))
    real = torch.ones(batch, length, dtype=torch.bool, device=device) if mask is None else mask.to(device)
    x = path.start(batch, length, dtype=dtype, device=device, generator=generator) * real[..., None]
    h, corrections = 1 / steps, 0

    def expected(x: Tensor, t: float) -> Tensor:
        """What the model expects of the letters."""
        nonlocal corrections
        times = torch.full((batch,), t, dtype=x.dtype, device=x.device)
        answer = torch.softmax(logits_of(model, x, times, cond).to(x.dtype), dim=-1)
        if not bool(answer[real].isfinite().all()):
            raise FloatingPointError(f"the model's answer at t = {t:g} is not finite; expected logits: look at its weights")
        if prediction == "score":
            answer, cut = onto_simplex(path.score_to_posterior(answer, x, t))
            corrections += int(cut[real].sum())
        return answer

    with evaluating(model) if isinstance(model, nn.Module) else contextlib.nullcontext():
        for n in range(steps):
            t = n * h
            p = expected(x, t)
            if integrator == "exponential":
                gain = float(1 / path.tau(min(t + h, 1.0)) - 1 / path.tau(t))
                logits = safe_log(x) + gain * p
                if guidance is not None:
                    logits = logits + h * guidance.logits(x, t, real)
                moved = torch.softmax(logits, dim=-1)
            else:
                u = path.velocity(p, x, t)
                if guidance is not None:
                    u = u + guidance(x, t, real)
                moved, cut = onto_simplex(x + h * u)
                corrections += int(cut[real].sum())
            x = moved * real[..., None]
        decoded = expected(x, 1.0) if decode == "posterior" else x
    tokens = x.argmax(-1) if decode == "argmax" else draw_letters(decoded, real, generator)
    return Samples(tokens * real, x, corrections, float(x.amax(-1)[real].mean()))


def onto_simplex(x: Float[Tensor, "*B K"]) -> tuple[Float[Tensor, "*B K"], Tensor]:
    """Shares below 0 cut, the rest made to sum to 1; and where that was needed."""
    cut = (x < 0).any(-1)
    kept = x.clamp_min(0)
    return torch.where(cut[..., None], kept / kept.sum(-1, keepdim=True), x), cut


def draw_letters(p: Float[Tensor, "B L K"], real: Tensor, generator: torch.Generator | None) -> Int[Tensor, "B L"]:
    """A letter a position; empty positions give 0."""
    filled = torch.where(real[..., None], p, F.one_hot(torch.zeros_like(real, dtype=torch.long), p.shape[-1]).to(p))
    return torch.multinomial(filled.flatten(0, 1), 1, generator=generator).reshape(real.shape)
