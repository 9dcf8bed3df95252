"""A session: the network learns one more video, and what earlier ones compute with stands still."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fewer.checks import check_choice, check_positive, check_whole
from fewer.signals.pfnr.net.network import PFNR
from fewer.signals.pfnr.quality import LOSSES, frame_psnr, learning_rate

BETAS = (0.5, 0.999)
LOOKED_AT = 8  # frames at a time where quality is looked at after an epoch


@dataclass(frozen=True)
class Training:
    """How a session is trained, with the paper's defaults.

    Attributes:
        epochs, lr, batch_size: the rate warms up for a fifth of the epochs and falls to 0.
        loss: "ssim" or "mse".
        on_epoch: called with the PSNR after each epoch.
    """

    epochs: int = 150
    lr: float = 5e-4
    batch_size: int = 1
    loss: Literal["ssim", "mse"] = "ssim"
    on_epoch: Callable[[float], None] | None = None

    def __post_init__(self) -> None:
        check_whole(epochs=self.epochs, batch_size=self.batch_size)
        check_positive(lr=self.lr)
        check_choice(tuple(LOSSES), loss=self.loss)


class Fitted(NamedTuple):
    """The best epoch, from 1, and its PSNR in dB."""

    psnr: float
    epoch: int


@torch.enable_grad()
def fit(
    net: PFNR,
    videos: Mapping[int, Tensor],
    training: Training,
    frozen: Mapping[str, Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> Fitted:
    """Train the network on a video, and leave it in the state of the best PSNR over the video's own frames (it is encoding, not testing).

    Adam starts afresh and has no decay: a weight whose gradient is 0 from the first step on is not moved by a bit.

    Args:
        videos: session -> frames, uint8 [T, 3, H, W]; several are learned jointly, a batch from one at a time.
        frozen: the entries that keep their values, by the name of their weights; none by default.
        generator: draws the order of the frames.

    Raises:
        FloatingPointError: the loss became infinite or NaN.
    """
    device, weights, dtype = net.packed_masks.device, net.weights(), next(net.parameters()).dtype
    true = {session: (frames.to(device) / 255).to(dtype) for session, frames in videos.items()}
    times = {session: torch.arange(len(frames), device=device, dtype=dtype) / len(frames) for session, frames in videos.items()}
    adam = torch.optim.Adam(net.parameters(), lr=training.lr, betas=BETAS)
    best, best_psnr, best_epoch = net.state_dict(), -math.inf, 0
    for epoch in range(training.epochs):
        net.train()
        batches = shuffled(videos, training.batch_size, generator)
        for step, (session, batch) in enumerate(batches):
            adam.param_groups[0]["lr"] = learning_rate(training.lr, epoch + step / len(batches), training.epochs)
            loss = LOSSES[training.loss](net(times[session][batch], session), true[session][batch])
            if not loss.isfinite():
                raise FloatingPointError(
                    f"the loss is {loss.item()} in epoch {epoch + 1}; expected a finite one: lower lr, which is {training.lr:g}"
                )
            adam.zero_grad(set_to_none=True)
            loss.backward()
            for name, entries in (frozen or {}).items():
                gradient = weights[name].grad
                assert gradient is not None
                gradient.masked_fill_(entries, 0)  # before the step, so that Adam's moments of these stay 0 as well
            adam.step()
        found = [frame_psnr(rendered(net, times[session], session, LOOKED_AT), frames) for session, frames in true.items()]
        quality = float(torch.cat(found).mean())
        if quality > best_psnr:
            best, best_psnr, best_epoch = copy.deepcopy(net.state_dict()), quality, epoch + 1
        if training.on_epoch is not None:
            training.on_epoch(quality)
    if best_epoch == 0:
        raise FloatingPointError(f"no epoch gave frames of finite quality; expected finite weights: lower lr, which is {training.lr:g}")
    net.load_state_dict(best)
    return Fitted(best_psnr, best_epoch)


def shuffled(videos: Mapping[int, Tensor], batch_size: int, generator: torch.Generator | None) -> list[tuple[int, Tensor]]:
    """The batches of an epoch: (session, numbers of frames)."""
    batches = [
        (session, batch)
        for session, frames in videos.items()
        for batch in torch.randperm(len(frames), generator=generator).split(batch_size)
    ]
    if len(videos) == 1:
        return batches
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


@torch.no_grad()
def rendered(net: PFNR, times: Tensor, session: int, batch_size: int = 1) -> Tensor:
    """Frames with the masks of now; one at a time they are to the bit what is decoded."""
    net.eval()
    weights = net.effective(net.current_masks())
    return torch.cat([net.render(t, session, weights) for t in times.split(batch_size)])
