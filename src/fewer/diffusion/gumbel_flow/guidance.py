"""STGFlow: guidance by a classifier of clean sequences, through sampled one-hots (straight-through), without training anything."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fewer.checks import check_not_negative, check_whole, is_whole
from fewer.diffusion._shared.prediction import at_least_single
from fewer.diffusion.gumbel_flow.path import check_mask, dtype_of
from fewer.fitting import evaluating


class STGuidance:
    """A velocity on the simplex towards what a classifier of clean one-hots is asked for; for any discrete flow.

    At a state x, M sequences are drawn position by position, and the gradient of the classifier's score at their one-hots is pulled
    back to x by the softmax's Jacobian: v = gamma x (G - <x, G>), G the mean over the draws.

    Args:
        classifier: one-hots [N, L, K] (zeros at padding) -> logits [N, C], or a score [N] or [N, 1]; differentiable in its input. A module
            is asked in eval mode and in the dtype of its weights.
        target: the class whose log-probability rises (of a single logit: 1 or 0); None: the score itself rises.
        gamma: strength; with `normalize` a logit is pulled by about gamma times the gradient's pattern in all, against
            (e^lambda - 1) / tau_max = 1.9 by the model, so that 1 and more swamps it.
        num_samples: M.
        normalize: G is made to a root mean square of 1 a sequence, over its real positions and letters.
        generator: of the draws.

    Raises:
        ValueError: gamma below 0, M below 1, a classifier that is not differentiable in its input or gives another batch, a mask of another
            shape.
        FloatingPointError: the state or a gradient is not finite.

    Examples:
        >>> towards = STGuidance(lambda one_hot: one_hot[..., 0].sum(1), None, gamma=0.5, normalize=False)
        >>> x = torch.full((1, 2, 4), 0.25)
        >>> towards(x, 0.0)[0, 0]
        tensor([ 0.0938, -0.0312, -0.0312, -0.0312])
    """

    def __init__(
        self,
        classifier: Callable[[Tensor], Tensor],
        target: int | None,
        gamma: float = 0.1,
        num_samples: int = 10,
        normalize: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        check_not_negative(gamma=gamma)
        check_whole(num_samples=num_samples)
        if target is not None and (not is_whole(target) or target < 0):
            raise ValueError(f"target is {target!r}; expected a class number, or None for a score")
        self.classifier, self.target, self.gamma, self.num_samples = classifier, target, gamma, num_samples
        self.normalize, self.generator, self.calls = normalize, generator, 0

    def __call__(self, x: Float[Tensor, "B L K"], t: float, mask: Tensor | None = None) -> Float[Tensor, "B L K"]:
        """The velocity to add to a flow's; its components sum to 0 at each position. `t` is there for schedules of your own."""
        wide, g = x.to(at_least_single(x.dtype)), self.logits(x, t, mask)
        return (wide * (g - (wide * g).sum(-1, keepdim=True))).to(x.dtype)

    def logits(self, x: Float[Tensor, "B L K"], t: float, mask: Tensor | None = None) -> Float[Tensor, "B L K"]:
        """gamma times the mean gradient: what moves logits a unit of time."""
        real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else check_mask(mask.to(x.device), x.shape[:2])
        assert real is not None
        if self.gamma == 0:
            return torch.zeros_like(x)
        wide = x.to(at_least_single(x.dtype))
        if not bool(wide[real].isfinite().all()):
            raise FloatingPointError("the state is not finite; expected shares of letters: look at the model that made it")
        g = self.gradients(self.draw(wide, real)).reshape(self.num_samples, *x.shape).mean(0) * real[..., None]
        if not bool(g.isfinite().all()):
            raise FloatingPointError("the classifier's gradient is not finite; expected numbers: look at its weights and its input")
        if self.normalize:
            square = g.square().sum((1, 2), keepdim=True) / (real.sum(1).clamp(min=1)[:, None, None] * x.shape[-1])
            g = g / square.sqrt().clamp_min(torch.finfo(g.dtype).tiny)
        return (self.gamma * g).to(x.dtype)

    def draw(self, x: Float[Tensor, "B L K"], real: Tensor) -> Float[Tensor, "MB L K"]:
        """M sequences a state, a letter drawn at each position, as one-hots; zeros at padding."""
        shares = torch.where(real[..., None], x, torch.ones_like(x)).flatten(0, 1)
        tokens = torch.multinomial(shares, self.num_samples, replacement=True, generator=self.generator).T
        return (F.one_hot(tokens.reshape(-1, x.shape[1]), x.shape[-1]) * real.repeat(self.num_samples, 1)[..., None]).to(x.dtype)

    def gradients(self, one_hot: Float[Tensor, "N L K"]) -> Float[Tensor, "N L K"]:
        """d score / d one-hot, all sequences in one call; the classifier's parameters get none."""
        net, mode = self.classifier, evaluating(self.classifier) if isinstance(self.classifier, nn.Module) else contextlib.nullcontext()
        with torch.inference_mode(False), torch.enable_grad(), mode:
            leaf = one_hot.to(dtype_of(net, one_hot.dtype), copy=True).requires_grad_()  # a copy: what inference made has no gradient
            answer = net(leaf)
            if not isinstance(answer, Tensor):
                raise ValueError(f"the classifier gave {type(answer).__name__}; expected a tensor of logits or scores: wrap it")
            score = self.score(answer.to(at_least_single(answer.dtype)))
            if score.shape != (len(one_hot),):
                raise ValueError(f"the classifier gave scores of {tuple(score.shape)} for {len(one_hot)} sequences; expected one each")
            grad = torch.autograd.grad(score.sum(), leaf, allow_unused=True)[0] if score.requires_grad else None
        if grad is None:
            raise ValueError("the classifier's score has no gradient in its input; expected a function differentiable in the one-hots")
        self.calls += len(one_hot)
        return grad.to(one_hot.dtype)

    def score(self, answer: Tensor) -> Tensor:
        """log P(target), or the score as it is, [N]."""
        if self.target is None:
            return answer.squeeze(-1) if answer.ndim == 2 and answer.shape[1] == 1 else answer
        if answer.ndim != 2 or (answer.shape[1] > 1 and self.target >= answer.shape[1]) or (answer.shape[1] == 1 and self.target > 1):
            raise ValueError(f"the classifier gave {tuple(answer.shape)}; expected logits [N, C] with the class {self.target}")
        if answer.shape[1] == 1:
            return F.logsigmoid(answer[:, 0] if self.target else -answer[:, 0])
        return F.log_softmax(answer, dim=-1)[:, self.target]
