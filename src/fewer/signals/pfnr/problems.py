"""Clips of the study, frames of any folder, file or video, and the ways that PFNR is held against."""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fewer.errors import require
from fewer.files import read_weights
from fewer.inputs import IMAGES, read_arrays, read_images
from fewer.signals.pfnr.archive import VideoArchive
from fewer.signals.pfnr.encoding import Training, rendered
from fewer.signals.pfnr.net.network import PFNR, PFNRConfig
from fewer.signals.pfnr.storage import Stored, write_archive

VIDEOS = (".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v")
FRAMES, EVERY = 16, 4  # of a clip: 16 frames, each fourth
CLIPS = (("bikes", 0), ("bigbuckbunny", 0), ("carphone_pristine", 0), ("bikes", 150))  # and the first frame; the last shares a source
SMALL = PFNRConfig(48, 64, max_sessions=4, grid=(6, 8), grid_channels=16, stem=128, strides=(2, 2, 2), widths=(16, 24, 24))
LARGE = PFNRConfig(360, 640, max_sessions=4, grid=(9, 16), grid_channels=56, strides=(5, 2, 2, 2))


def resized(frames: Tensor, height: int, width: int) -> Tensor:
    """uint8 [T, 3, H, W] cut to the largest centred part of that shape, and resampled by areas."""
    rows, columns = frames.shape[-2:]
    tall, wide = min(rows, max(1, columns * height // width)), min(columns, max(1, rows * width // height))
    top, left = (rows - tall) // 2, (columns - wide) // 2
    part = frames[..., top : top + tall, left : left + wide].float()
    return F.interpolate(part, (height, width), mode="area").round().to(torch.uint8)


def study_clips(config: PFNRConfig, frames: int = FRAMES) -> list[Tensor]:
    """The four real clips at the network's size."""
    from fewer.data import load_clips

    videos = load_clips()
    clips = []
    for name, first in CLIPS:
        chosen = torch.from_numpy(videos[name][first : first + frames * EVERY : EVERY]).permute(0, 3, 1, 2)
        clips.append(resized(chosen, config.height, config.width))
    return clips


def read_clip(path: str | Path) -> Tensor:
    """The frames of a folder of pictures, of an .npz file with `frames`, or of a video file: uint8 [T, 3, H, W].

    Raises:
        ValueError, OSError: it is none of these, or has no frame that can be read.
    """
    path = Path(path)
    if path.is_dir():
        return torch.from_numpy(read_images(path))
    if path.suffix == ".npz":
        frames = read_arrays(path, ["frames"])["frames"]
        if frames.dtype.name != "uint8" or frames.ndim != 4 or 3 not in (frames.shape[1], frames.shape[3]) or len(frames) == 0:
            raise ValueError(
                f"{path}: frames is {frames.dtype} {frames.shape}; expected uint8 [T, H, W, 3] or [T, 3, H, W]: convert it first"
            )
        return torch.from_numpy(frames if frames.shape[1] == 3 else frames.transpose(0, 3, 1, 2).copy())
    if path.suffix.lower() not in VIDEOS or not path.is_file():
        what = "no file" if not path.exists() else "no clip"
        raise ValueError(
            f"{path} is {what}; expected a folder of pictures ({', '.join(IMAGES)}), an .npz with `frames`, or {', '.join(VIDEOS)}"
        )
    cv2 = require("cv2", "signals")
    video, rows = cv2.VideoCapture(str(path)), []
    while (read := video.read())[0]:
        rows.append(torch.from_numpy(read[1][..., ::-1].copy()).permute(2, 0, 1))
    video.release()
    if not rows:
        raise ValueError(f"{path} has no frame that OpenCV can read; expected a whole video: copy it again, or convert it")
    return torch.stack(rows)


def read_clips(directory: str | Path, config: PFNRConfig, frames: int = FRAMES) -> list[Tensor]:
    """The clips of a folder, sorted by name: their first frames, at the network's size."""
    directory = Path(directory)
    if not directory.is_dir():
        raise NotADirectoryError(f"{directory} is no folder; expected one with clips: videos, .npz files, or folders of pictures")
    found = sorted(each for each in directory.iterdir() if each.is_dir() or each.suffix.lower() in (".npz", *VIDEOS))
    if not found:
        raise ValueError(f"{directory} has no clips; expected videos, .npz files, or folders of pictures")
    return [resized(read_clip(each)[:frames], config.height, config.width) for each in found]


@dataclass(frozen=True)
class Recipe:
    """How every arm trains: `Training`'s words."""

    epochs: int = 24
    lr: float = 5e-3
    batch_size: int = 2
    loss: Any = "mse"

    def training(self, **changes: Any) -> Training:
        return Training(**(dataclasses.asdict(self) | changes))


def dense(config: PFNRConfig) -> PFNRConfig:
    """The same network without masks (all weights compute) and without the Fourier operator."""
    return dataclasses.replace(config, capacity=1.0, fso_block=None)


@torch.no_grad()
def rendered_now(net: PFNR, clip: Tensor, session: int) -> Tensor:
    """The clip as the network of now gives it, uint8."""
    times = torch.arange(len(clip), device=net.packed_masks.device) / len(clip)
    return (rendered(net, times, session) * 255).round().to(torch.uint8).cpu()


class Weighed(NamedTuple):
    """A file of some videos: its bytes, those of its masks, and the archive that is read back from it."""

    bytes: int
    mask_bytes: int
    archive: VideoArchive


def weigh(net: PFNR, clips: list[Tensor], bits: int = 8) -> Weighed:
    """Write the recorded videos to a file, and read it back."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "archive"
        size = write_archive(file, net, [Stored(f"clip {number}", len(clip)) for number, clip in enumerate(clips)], bits, overwrite=False)
        masks = sum(len(tensor) for name, tensor in read_weights(file).items() if name.endswith(".mask"))
        return Weighed(size, masks, VideoArchive.load(file))
