"""The verbs `fewer videos encode | decode | list`: an archive of videos in one file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fewer.checks import check_positive
from fewer.devices import Device, choose_device
from fewer.files import check_new_file, made_whole

MANY = 10**6
app = typer.Typer(help="Keep videos of one size in one growing network, in one file: encode, decode, list.", no_args_is_help=True)
ARCHIVE = Annotated[Path, typer.Argument(help="The archive's file.")]
JSON = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("encode")
def encode(
    archive_file: ARCHIVE,
    clip: Annotated[Path, typer.Argument(help="A folder of pictures, an .npz with `frames` (uint8 [T, H, W, 3]), or a video.")],
    name: Annotated[str, typer.Option(help="What the clip is decoded by; its file's name by default.")] = "",
    size: Annotated[str, typer.Option(help="HEIGHTxWIDTH to cut and resample the frames to, such as 144x176.")] = "",
    sessions: Annotated[int, typer.Option(min=1, max=1000, help="How many clips a new archive will ever hold.")] = 8,
    capacity: Annotated[float, typer.Option(min=0.01, max=1, help="The share of a new archive's weights that a clip computes with.")] = 0.5,
    minutes: Annotated[float, typer.Option(min=0.01, max=MANY, help="About how long to train.")] = 3.0,
    epochs: Annotated[int, typer.Option(min=0, max=MANY, help="Passes over the clip in place of --minutes; 0 leaves it to them.")] = 0,
    lr: Annotated[float, typer.Option(min=1e-9, max=10, help="The highest learning rate.")] = 5e-3,
    bits: Annotated[int, typer.Option(min=2, max=16, help="Of a weight in the file.")] = 8,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Draws free weights and the order of the frames.")] = 0,
    device: Annotated[Device, typer.Option(help="Where to compute.")] = Device.cpu,
    as_json: JSON = False,
) -> None:
    """Add a clip to an archive, which is made where it is not there. Clips that are in it decode bit for bit as before.

    Example: fewer videos encode archive clip.mp4 --name holiday --size 144x176 --minutes 3
    """
    check_positive(**{"--capacity": capacity, "--minutes": minutes, "--lr": lr})
    check_new_file(archive_file, overwrite=archive_file.is_file(), inputs=[clip], option="ARCHIVE")
    import torch

    from fewer.signals.pfnr.archive import VideoArchive
    from fewer.signals.pfnr.net.network import PFNRConfig
    from fewer.signals.pfnr.problems import read_clip, resized

    frames, generator = read_clip(clip), torch.Generator().manual_seed(seed)
    old = VideoArchive.load(archive_file, generator) if archive_file.exists() else None
    if size:
        frames = resized(frames, *_size(size))
    elif old is not None:
        frames = resized(frames, old.config.height, old.config.width)
    archive = old or VideoArchive(PFNRConfig.for_size(*frames.shape[-2:], max_sessions=sessions, capacity=capacity), generator)
    archive.net.to(choose_device(device))
    loss, batch = ("ssim" if min(frames.shape[-2:]) >= 96 else "mse"), 2
    passes = epochs or _passes(archive, frames, 60 * minutes, lr, batch, loss)
    report = archive.add(frames, name or clip.stem, epochs=passes, lr=lr, batch_size=batch, loss=loss)
    archive.save(archive_file, bits, overwrite=True)
    stored = VideoArchive.load(archive_file)  # as it decodes from the file, which is what its bytes buy
    quality = stored.measure(report.name, frames)
    total = stored.save(archive_file, bits, overwrite=True)
    if as_json:
        told = {"name": report.name, "frames": report.frames, "psnr": quality, "seconds": report.seconds, "epochs": passes}
        print(json.dumps(told | {"bytes": total, "free_fraction": report.free_fraction}))
        return
    print(f"{report.name}: {report.frames} frames at {quality:.2f} dB after {passes} passes in {report.seconds:.0f} s")
    print(
        f"{archive_file} has {len(archive.names)} of {archive.config.max_sessions} clips in {total:,} bytes; {report.free_fraction:.1%} free"
    )


@app.command("decode")
def decode(
    archive_file: ARCHIVE,
    name: Annotated[str, typer.Argument(help="The clip, as `fewer videos list` names it.")],
    out: Annotated[Path, typer.Option(help="The folder to write 0000.png, 0001.png, ... into.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what fewer wrote into the folder before.")] = False,
) -> None:
    """Write a clip's frames as pictures.

    Example: fewer videos decode archive holiday --out frames
    """
    from PIL import Image

    from fewer.signals.pfnr.archive import VideoArchive

    with made_whole(out, overwrite, inputs=[archive_file]) as folder:
        frames = VideoArchive.load(archive_file).decode(name)
        for number, frame in enumerate(frames.permute(0, 2, 3, 1).numpy()):
            Image.fromarray(frame).save(folder / f"{number:04d}.png")
    print(f"{len(frames)} frames of {name} written to {out}")


@app.command("list")
def list_clips(archive_file: ARCHIVE, as_json: JSON = False) -> None:
    """The clips of an archive: frames, PSNR, bytes and weights that each was the first to use, and how much is free.

    Example: fewer videos list archive
    """
    from fewer.signals.pfnr.archive import VideoArchive
    from fewer.signals.pfnr.storage import bytes_by_video

    archive, size = VideoArchive.load(archive_file), archive_file.stat().st_size
    config = archive.config
    clips = [
        {
            "name": each,
            "frames": archive.frames(each),
            "psnr": archive.quality(each),
            "bytes": its,
            "new_weights": archive.new_weights(each),
        }
        for each, its in zip(archive.names, bytes_by_video(archive_file), strict=True)
    ]
    pixels = sum(archive.frames(each) for each in archive.names) * config.height * config.width
    about = {"height": config.height, "width": config.width, "max_sessions": config.max_sessions, "bytes": size}
    about |= {"bits_per_pixel": 8 * size / pixels, "free_fraction": archive.free_fraction}
    if as_json:
        print(json.dumps({"clips": clips, **about}))
        return
    for each in clips:
        its = f"{each['psnr']:.2f} dB, {each['bytes']:,} bytes, {each['new_weights']:,} weights of its own"
        print(f"{each['name']}  {each['frames']} frames, {its}")
    print(
        f"{len(clips)} of {config.max_sessions} clips of {config.height} x {config.width} in {size:,} bytes "
        f"({about['bits_per_pixel']:.3g} bits a pixel); {archive.free_fraction:.1%} of the weights free"
    )


COMMANDS = {"videos": app}


def _size(words: str) -> tuple[int, int]:
    """Height and width of "144x176"."""
    height, _, width = words.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) > 0 and int(width) > 0 and len(words) < 12):
        raise typer.BadParameter(f"--size {words!r}; expected HEIGHTxWIDTH, such as 144x176", param_hint="--size")
    return int(height), int(width)


def _passes(archive: object, frames: object, seconds: float, lr: float, batch: int, loss: str) -> int:
    """How many passes over the clip take about so long, from one that is tried on a copy."""
    import copy

    from fewer.signals.pfnr.archive import VideoArchive

    assert isinstance(archive, VideoArchive)
    trial = copy.deepcopy(archive)
    trial.generator = None
    report = trial.add(frames, " ", epochs=1, lr=lr, batch_size=batch, loss=loss)  # pyright: ignore[reportArgumentType]
    return max(1, min(MANY, int(seconds / max(report.seconds, 1e-3))))
