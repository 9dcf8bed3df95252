"""Direct feedback for blocks: the error at the output reaches every block through a fixed random matrix, not through the blocks between."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from fewer.forward_only.backprop_free_mlps.layers.local_loss import softmax_error


def random_feedback(classes: int, width: int, like: Tensor, generator: torch.Generator | None = None) -> Float[Tensor, "classes width"]:
    """B_i: Gaussian rows, normalised to length 1."""
    device = generator.device if generator else None
    return F.normalize(torch.randn(classes, width, generator=generator, device=device), dim=1).to(like)


def auxiliary_layer(readout: nn.Linear, generator: torch.Generator | None = None) -> nn.Linear:
    """A new linear layer of the shape of `readout`, uniform in +-1/sqrt(inputs) as torch's own, but drawn from `generator`."""
    auxiliary = nn.Linear(readout.in_features, readout.out_features, device=generator.device if generator else None)
    bound = 1 / math.sqrt(readout.in_features)
    for parameter in auxiliary.parameters():
        nn.init.uniform_(parameter, -bound, bound, generator=generator)
    return auxiliary.to(readout.weight)


class FeedbackTrainer:
    """Adam on blocks and an auxiliary linear layer on the last of them.

    The last block and the auxiliary layer take the true gradient of the mean cross-entropy. Every earlier block i takes e B_i as the
    gradient at its output, e = softmax(logits) - onehot(y), back through that block alone (not divided by the batch's size, as
    released).

    Attributes:
        auxiliary: the linear layer that the error is taken at; thrown away afterwards.
        feedback: B_1, ..., B_{L-1} [C, D_i]; made at the first batch, whose shape they depend on.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], readout: nn.Linear, lr: float, weight_decay: float, generator: torch.Generator | None = None
    ) -> None:
        self.blocks, self.generator = list(blocks), generator
        self.auxiliary = auxiliary_layer(readout, generator)
        self.feedback: list[Tensor] = []
        parameters = [p for module in [*self.blocks, self.auxiliary] for p in module.parameters()]
        self.optimizer = torch.optim.Adam(parameters, lr=lr, weight_decay=weight_decay, fused=True)

    def step(self, x: Float[Tensor, "batch ..."], y: Int[Tensor, "batch"]) -> Float[Tensor, ""]:
        """Take one step on a batch; returns the auxiliary layer's mean loss."""
        for block in self.blocks:
            block.train()
        loss = self.set_gradients(x, y)
        for block in self.blocks:
            block.eval()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def set_gradients(self, x: Float[Tensor, "batch ..."], y: Int[Tensor, "batch"]) -> Float[Tensor, ""]:
        """Set `.grad` of all parameters, one block at a time; returns the loss. No graph spans two blocks."""
        outputs = []
        for block in self.blocks:
            outputs.append(block(outputs[-1].detach() if outputs else x))
        logits = self.auxiliary(outputs[-1].flatten(1))
        loss = F.cross_entropy(logits, y)
        loss.backward()
        error = softmax_error(logits.detach(), y)
        earlier = outputs[:-1]
        if not self.feedback:
            self.feedback = [random_feedback(logits.shape[1], h[0].numel(), h, self.generator) for h in earlier]
        for h, feedback in zip(earlier, self.feedback, strict=True):
            h.backward((error @ feedback).view_as(h))
        return loss.detach()

    def scores(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch classes"]:
        """The auxiliary layer's logits, with the blocks as they stand."""
        for block in self.blocks:
            x = block(x)
        return self.auxiliary(x.flatten(1))
