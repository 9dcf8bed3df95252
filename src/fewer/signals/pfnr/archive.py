"""A growing archive of videos in one network: a new video takes free weights and reuses those of earlier ones, which decode as before."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor

from fewer.checks import is_whole
from fewer.papers import did_you_mean
from fewer.signals.pfnr.encoding import Training, fit
from fewer.signals.pfnr.net.network import PFNR, PFNRConfig
from fewer.signals.pfnr.quality import LOSSES, psnr
from fewer.signals.pfnr.storage import Quantised, Stored, read_archive, write_archive


@dataclass(frozen=True)
class SessionReport:
    """What encoding a video came to.

    Attributes:
        name, frames: of the video.
        psnr: mean over its frames in dB, of the state that is kept.
        best_epoch: the epoch of that state, from 1.
        seconds: of training.
        new_weights: entries that no earlier video computes with.
        free_fraction: the share of the masked entries that is free afterwards.
    """

    name: str
    frames: int
    psnr: float
    best_epoch: int
    seconds: float
    new_weights: int
    free_fraction: float


@dataclass
class _Video:
    """A video of the archive, and its weights as they were quantised when they were read from a file."""

    name: str
    frames: int
    psnr: float
    quantised: dict[str, Quantised] = field(default_factory=dict)


class VideoArchive:
    """Videos of one size in one network.

    Args:
        config: the network's shape; `max_sessions` is how many videos it will ever hold.
        generator: draws the weights and the order of the frames.

    Attributes:
        net: the `PFNR`; move it to another device with `archive.net.to(device)`.

    Examples:
        >>> config = PFNRConfig(16, 16, 2, grid=(4, 4), grid_channels=8, stem=16, strides=(2, 2), widths=(8, 8))
        >>> archive = VideoArchive(config, torch.Generator().manual_seed(0))
        >>> video = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
        >>> report = archive.add(video, "noise", epochs=1, loss="mse")
        >>> archive.decode("noise").shape, archive.names
        (torch.Size([3, 3, 16, 16]), ['noise'])

    Source: arXiv 2306.11305 and its released code.
    """

    def __init__(self, config: PFNRConfig, generator: torch.Generator | None = None) -> None:
        self.config, self.generator = config, generator
        self.net = PFNR(config, generator).eval()
        self._videos: list[_Video] = []

    @property
    def names(self) -> list[str]:
        """The videos, in the order in which they were added."""
        return [video.name for video in self._videos]

    @property
    def free_fraction(self) -> float:
        return self.net.free_fraction

    def frames(self, name: str) -> int:
        """How many frames a video has."""
        return self._videos[self._number(name)].frames

    def quality(self, name: str) -> float:
        """The PSNR in dB that was measured last: by `add`, with float weights, or by `measure`."""
        return self._videos[self._number(name)].psnr

    def measure(self, name: str, frames: Tensor) -> float:
        """The PSNR of the video as it decodes now, against its frames; kept with it."""
        video = self._videos[self._number(name)]
        video.psnr = psnr(self.decode(name), frames)
        return video.psnr

    def new_weights(self, name: str) -> int:
        """How many weights a video was the first to use."""
        session = self._number(name)
        earlier = [self.net.masks(before) for before in range(session)]
        return sum(
            int((mask & ~torch.stack([other[at] for other in earlier] or [torch.zeros_like(mask)]).any(0)).sum())
            for at, mask in self.net.masks(session).items()
        )

    def add(
        self,
        frames: Tensor,
        name: str,
        *,
        epochs: int = 150,
        lr: float = 5e-4,
        batch_size: int = 1,
        loss: Literal["ssim", "mse"] = "ssim",
        reinit_scores: bool = False,
        on_epoch: Callable[[float], None] | None = None,
    ) -> SessionReport:
        """Encode a video as the next session; earlier ones decode bit for bit as before.

        Adam is made here, without decay and from a fresh state, since any other would move weights that have no gradient.

        Args:
            frames: uint8 [T, 3, H, W].
            name: what it is decoded by.
            epochs, lr, batch_size: of the training; the rate warms up for a fifth of it and falls to 0.
            loss: "ssim", the paper's 0.7 L1 + 0.3 (1 - SSIM), or "mse", 0.7 L1 + 3 MSE, for small frames.
            reinit_scores: draw the scores anew; else those of the last video are carried on.
            on_epoch: called with the PSNR after each epoch.

        Raises:
            ValueError: frames of another size or type, a name that is taken, no session left, or a network in half precision.
            FloatingPointError: the loss became infinite or NaN. The archive is as it was before, as with any other exception.
        """
        self._check_new(frames, name)
        training = Training(epochs, lr, batch_size, loss, on_epoch)
        net, session = self.net, self.net.recorded
        LOSSES[loss](frames[:1], frames[:1])  # refuses what is too small for it
        before, start = copy.deepcopy(net.state_dict()), time.perf_counter()
        try:
            if reinit_scores:
                net.reset_scores(self.generator)
            used = net.used
            fitted = fit(net, {session: frames}, training, used, self.generator)
            masks = net.current_masks()  # those of the state that is kept, not of the last one: else a weight in use might be left free
            new = sum(int((mask & ~used[at]).sum()) for at, mask in masks.items())
            net.record(masks)
        except BaseException:
            net.load_state_dict(before)
            raise
        finally:
            net.zero_grad(set_to_none=True)
            net.eval()
        self._videos.append(_Video(name, len(frames), fitted.psnr))
        return SessionReport(name, len(frames), fitted.psnr, fitted.epoch, time.perf_counter() - start, new, net.free_fraction)

    @torch.no_grad()
    def decode(self, name: str, frames: slice | Sequence[int] | None = None) -> Tensor:
        """The frames of a video, uint8 [T, 3, H, W].

        Its masked weights are made once; frames go through one at a time, as another batch size may round otherwise.

        Args:
            name: as it was added.
            frames: which; all by default. Negative numbers count from the end.

        Raises:
            ValueError: no such video or frame.
        """
        session = self._number(name)
        count = self._videos[session].frames
        if frames is None or isinstance(frames, slice):
            wanted = list(range(count))[frames or slice(None)]
        else:
            wanted = [int(each) if is_whole(each) else each for each in frames]
            for each in wanted:
                if not is_whole(each) or not -count <= each < count:
                    raise ValueError(f"frame {each!r} of {name} is asked for; expected whole numbers from 0 to {count - 1}")
        weights = self.net.effective(self.net.masks(session))
        dtype, device = torch.promote_types(next(self.net.parameters()).dtype, torch.float32), self.net.packed_masks.device
        out = torch.empty(len(wanted), 3, self.config.height, self.config.width, dtype=torch.uint8)
        for row, number in zip(out, wanted, strict=True):
            t = torch.tensor([number % count], dtype=dtype, device=device) / count
            row.copy_((self.net.render(t, session, weights)[0] * 255).round())
        return out

    def save(self, path: str | Path, bits: int | None = 8, overwrite: bool = False) -> int:
        """Write the archive to one file: weights that some video uses, a compressed mask and a head a video.

        The weights that a video brought are quantised once, per output channel, with scales of their own: what was read from a quantised
        file is written again with the same codes, whatever `bits`.

        Args:
            path: the file (safetensors).
            bits: of a weight, 2 to 16; None keeps float32, so that frames of a network in float32 decode bit for bit as now.
            overwrite: whether an archive that stands there may be replaced.

        Returns:
            the bytes of the file.

        Raises:
            ValueError: bits out of range, or nothing to save.
        """
        if bits is not None and (not is_whole(bits) or not 2 <= bits <= 16):
            raise ValueError(f"bits is {bits!r}; expected a whole number from 2 to 16, or None for float32")
        videos = [Stored(video.name, video.frames, video.psnr, video.quantised) for video in self._videos]
        return write_archive(path, self.net, videos, bits, overwrite)

    @classmethod
    def load(cls, path: str | Path, generator: torch.Generator | None = None) -> Self:
        """The archive of a file that `save` wrote. Free weights and all scores are drawn anew, as no video needs them.

        Raises:
            FileNotFoundError, ValueError: no such file, none of ours, one cut off, or of a newer version.
        """
        config, fill, videos = read_archive(path)
        archive = cls(config, generator)
        fill(archive.net)
        archive._videos = [_Video(each.name, each.frames, each.psnr, each.quantised) for each in videos]
        return archive

    def _number(self, name: str) -> int:
        if name not in self.names:
            known = f"expected one of {', '.join(self.names)}" if self.names else "the archive is empty"
            raise ValueError(f"there is no video {name!r}; {known}{did_you_mean(name, self.names)}")
        return self.names.index(name)

    def _check_new(self, frames: Tensor, name: str) -> None:
        size = (3, self.config.height, self.config.width)
        if not isinstance(frames, Tensor) or frames.dtype != torch.uint8 or frames.ndim != 4 or tuple(frames.shape[1:]) != size:
            given = f"{frames.dtype} {list(frames.shape)}" if isinstance(frames, Tensor) else type(frames).__name__
            raise ValueError(f"frames is {given}; expected a uint8 tensor [T, {', '.join(map(str, size))}]: resize or convert it first")
        if len(frames) == 0:
            raise ValueError("frames has T = 0; expected at least one frame")
        if not isinstance(name, str) or not name or name in self.names:
            raise ValueError(f"name is {name!r}; expected one that the archive has not yet ({', '.join(self.names) or 'it is empty'})")
        if (dtype := next(self.net.parameters()).dtype) not in (torch.float32, torch.float64):
            raise ValueError(f"the network is {dtype}, too coarse to train; expected float32 or float64: archive.net.float()")
        if len(self.names) >= self.config.max_sessions:
            raise ValueError(
                f"the archive holds its {self.config.max_sessions} videos; expected no more, as max_sessions is part of the embedding: "
                "begin another archive with a larger one"
            )
