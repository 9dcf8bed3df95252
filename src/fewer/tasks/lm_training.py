"""Training the small language model: windows of text, AdamW, a cosine schedule, checkpoints to go on from."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewer.checks import check_whole
from fewer.errors import UserError
from fewer.files import whole_file

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

CHECKPOINT_EVERY = 200  # steps


@dataclass(frozen=True)
class Recipe:
    """How the model is trained: 1,200 steps of 2,048 tokens."""

    steps: int = 1200
    batch: int = 8
    window: int = 256
    lr: float = 2e-3
    warm_up: int = 50
    last_lr: float = 0.05  # of lr
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1  # of matrices only
    max_norm: float = 1.0
    seed: int = 0

    def of_length(self, steps: int | None) -> Recipe:
        """The same recipe for another number of steps."""
        if steps is not None and steps < 1:
            raise UserError(f"--steps {steps}: expected at least 1")
        return self if steps is None else dataclasses.replace(self, steps=steps)

    def lr_at(self, step: int) -> float:
        """The learning rate of a step: up in a line, then down as a cosine.

        >>> recipe = Recipe()
        >>> recipe.lr_at(0) < recipe.lr_at(49) == recipe.lr, round(recipe.lr_at(1199) / recipe.lr, 3)
        (True, 0.05)
        """
        if step < self.warm_up:
            return self.lr * (step + 1) / self.warm_up
        done = (step + 1 - self.warm_up) / max(1, self.steps - self.warm_up)
        return self.lr * (self.last_lr + (1 - self.last_lr) * (1 + math.cos(math.pi * done)) / 2)


def windows(tokens: Tensor, recipe: Recipe, step: int) -> Tensor:
    """The windows [batch, window] of a step, drawn uniformly from the stream; the same for the same seed and step."""
    import torch

    return draw_windows(tokens, recipe.batch, recipe.window, torch.Generator().manual_seed(recipe.seed * 1_000_003 + step))


def draw_windows(tokens: Tensor, count: int, window: int, generator: torch.Generator | None = None) -> Tensor:
    """Windows [count, window] of a stream of tokens, drawn uniformly."""
    import torch

    starts = torch.randint(len(tokens) - window + 1, (count, 1), generator=generator)
    return tokens[starts + torch.arange(window)]


def check_window(tokens: Tensor, window: int) -> None:
    """ValueError where a text does not fill one window, or a window is none to learn from."""
    check_whole(least=2, window=window)
    if len(tokens) < window:
        raise ValueError(f"the text has {len(tokens)} tokens; expected at least {window}, one window: give more text, or a smaller window")


def token_loss(model: nn.Module, tokens: Tensor, *, window: int = 256, batch: int = 8) -> float:
    """Mean cross-entropy (nats a token) of a causal language model on a stream [tokens], read in windows one after the other.

    The first token of each window is given and not judged; a last window that is not full is left out.
    """
    import torch

    check_window(tokens, window)
    place = next(model.parameters()).device
    rows = tokens[: len(tokens) // window * window].reshape(-1, window).to(place)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            losses = [model(input_ids=part, labels=part, use_cache=False).loss.item() * len(part) for part in rows.split(batch)]
    finally:
        model.train(was_training)
    return sum(losses) / len(rows)


def train(model: Any, tokens: Tensor, recipe: Recipe, checkpoint: Path, tell: Callable[[int, int, str], None]) -> dict[str, Any]:
    """Train in place, going on from the checkpoint where there is one; the loss curve, tokens and seconds."""
    import torch

    optimizer = optimizer_of(model, recipe)
    first, curve, before = _restore(model, optimizer, checkpoint)
    started = time.perf_counter()
    model.train()
    for step in range(first, recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr_at(step)
        batch = windows(tokens, recipe, step)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_norm)
        optimizer.step()
        if step % 10 == 0 or step == recipe.steps - 1:
            curve.append((step, loss.item()))
            tell(step + 1, recipe.steps, f"the small language model learns: loss {loss.item():.3f}")
        if (step + 1) % CHECKPOINT_EVERY == 0:
            _keep(model, optimizer, checkpoint, step + 1, curve, before + time.perf_counter() - started)
    model.eval()
    return {
        "recipe": dataclasses.asdict(recipe),
        "seconds": round(before + time.perf_counter() - started, 1),
        "trained_tokens": recipe.steps * recipe.batch * recipe.window,
        "loss_curve": curve,
    }


def optimizer_of(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """A recipe's AdamW, which decays matrices only."""
    import torch

    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, fused=True)


def _keep(model: Any, optimizer: Any, checkpoint: Path, step: int, curve: list[tuple[int, float]], seconds: float) -> None:
    """Write a checkpoint, whole or not at all: the state first, the note that names it last."""
    import torch

    checkpoint.mkdir(exist_ok=True)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint / f"{step}.pt")
    with whole_file(checkpoint / "note.json", overwrite=True) as note:
        note.write_text(json.dumps({"step": step, "curve": curve, "seconds": seconds}))
    for former in checkpoint.glob("*.pt"):
        if former.name != f"{step}.pt":
            former.unlink()


def _restore(model: Any, optimizer: Any, checkpoint: Path) -> tuple[int, list[tuple[int, float]], float]:
    """(first step to do, loss curve so far, seconds so far)."""
    import torch

    note = checkpoint / "note.json"
    if not note.exists():
        return 0, [], 0.0
    kept = json.loads(note.read_text())
    state = torch.load(checkpoint / f"{kept['step']}.pt", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return kept["step"], [tuple(point) for point in kept["curve"]], kept["seconds"]
