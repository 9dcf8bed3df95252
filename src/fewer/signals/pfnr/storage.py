"""One file for an archive: the weights in use, quantised once a video, a compressed mask and a head a video, and the network's shape."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewer.files import read_weights, whole_file
from fewer.signals.pfnr.net.network import PFNR, PFNRConfig

FORMAT, VERSION = "fewer.pfnr", 1


@dataclass(frozen=True)
class Quantised:
    """Numbers as codes of b bits: w = low + code * step, with a low and a step for each group.

    Attributes:
        codes: [n] int64.
        low, step: [groups] float32.
        bits: b.
    """

    codes: Tensor
    low: Tensor
    step: Tensor
    bits: int

    def numbers(self, groups: Tensor) -> Tensor:
        """The numbers, float32, given the group of each."""
        return self.low[groups] + self.codes * self.step[groups]


def quantise(numbers: Tensor, groups: Tensor, count: int, bits: int) -> Quantised:
    """q = round((w - min) / s) with s = (max - min) / (2^b - 1) in each group: at most 2^b codes, and an error of at most s / 2.

    Args:
        numbers: [n].
        groups: [n], the group of each number, such as its output channel.
        count: how many groups there are; one without numbers has low 0 and step 0.
        bits: b.

    >>> quantise(torch.tensor([0.0, 1.0, 3.0]), torch.zeros(3, dtype=torch.int64), 1, bits=2).codes.tolist()
    [0, 1, 3]
    """
    low = torch.full((count,), torch.inf).scatter_reduce_(0, groups, numbers, "amin")
    high = torch.full((count,), -torch.inf).scatter_reduce_(0, groups, numbers, "amax")
    low, high = torch.where(low > high, 0, low), torch.where(low > high, 0, high)
    step = (high - low) / (2**bits - 1)
    codes = ((numbers - low[groups]) / step[groups]).nan_to_num(0).round().clamp(0, 2**bits - 1)  # a constant group has step 0
    return Quantised(codes.to(torch.int64), low, step, bits)


@dataclass
class Stored:
    """A video of a file: its name, its frames, its PSNR, and what was quantised, by the name of the tensor ("head" for its head)."""

    name: str
    frames: int
    psnr: float = math.nan
    quantised: dict[str, Quantised] = field(default_factory=dict)


def write_archive(path: str | Path, net: PFNR, videos: Sequence[Stored], bits: int | None, overwrite: bool) -> int:
    """Write the file, whole or not at all; its bytes."""
    from safetensors.torch import save_file

    if not videos:
        raise ValueError("the archive has no video; expected at least one: add it first")
    tensors: dict[str, Tensor] = {}
    told: list[dict[str, Any]] = []
    for session, video in enumerate(videos):
        said: dict[str, Any] = {"name": video.name, "frames": video.frames, "psnr": video.psnr, "bits": {}}
        masks = net.masks(session)
        packed = net.packed_masks[session].cpu().numpy().tobytes()
        tensors[f"{session}.mask"] = torch.frombuffer(bytearray(zlib.compress(packed, 9)), dtype=torch.uint8)
        for name, (numbers, groups, count) in new_numbers(net, session, masks).items():
            kept = video.quantised.get(name)
            if kept is None and bits is None:
                tensors[f"{session}.{name}"] = numbers
                continue
            kept = kept or quantise(numbers, groups, count, bits or 0)
            said["bits"][name] = kept.bits
            tensors[f"{session}.{name}"] = pack_codes(kept.codes, kept.bits)
            tensors[f"{session}.{name}.scale"] = torch.stack([kept.low, kept.step])
        told.append(said)
    about = {"format": FORMAT, "version": str(VERSION), "config": net.config.to_json(), "videos": json.dumps(told)}
    with whole_file(path, overwrite, option="path") as part:
        save_file(tensors, part, metadata=about)
        return part.stat().st_size


def bytes_by_video(path: str | Path) -> list[int]:
    """The bytes of a file's tensors by video: what it brought, its mask and its head."""
    found: dict[int, int] = {}
    for name, tensor in read_weights(path).items():
        session = int(name.partition(".")[0])
        found[session] = found.get(session, 0) + tensor.nbytes
    return [found[session] for session in sorted(found)]


def new_numbers(net: PFNR, session: int, masks: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor, int]]:
    """The weights that a video was the first to use, in order, with the output channel of each; and its head, one group."""
    earlier = {name: torch.zeros_like(mask) for name, mask in masks.items()}
    for before in range(session):
        for name, mask in net.masks(before).items():
            earlier[name] |= mask
    found = {}
    for name, weight in net.weights().items():
        fresh = (masks[name] & ~earlier[name]).cpu()
        rows = torch.arange(weight.shape[0]).view(-1, *[1] * (weight.ndim - 1)).expand(weight.shape)
        found[name] = weight.detach().cpu().float()[fresh], rows[fresh], weight.shape[0]
    head = net.heads[session].weight.detach().cpu().float().flatten()  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    found["head"] = head, torch.zeros(len(head), dtype=torch.int64), 1
    return found


def read_archive(path: str | Path) -> tuple[PFNRConfig, Callable[[PFNR], None], list[Stored]]:
    """The shape, a function that fills a fresh network of that shape, and the videos."""
    config, told = _about(Path(path))
    tensors = read_weights(path)
    videos = [Stored(str(each["name"]), int(each["frames"]), float(each["psnr"])) for each in told]

    def fill(net: PFNR) -> None:
        try:
            for session, (video, said) in enumerate(zip(videos, told, strict=True)):
                _fill_one(net, session, video, said["bits"], tensors)
        except (KeyError, ValueError, RuntimeError, IndexError, TypeError, zlib.error) as error:
            raise ValueError(f"{path} is no whole archive ({' '.join(str(error).split())}); copy or write it again") from error

    return config, fill, videos


def _about(file: Path) -> tuple[PFNRConfig, list[dict[str, Any]]]:
    """What the file says of itself; ValueError in one line where it is none of ours."""
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise FileNotFoundError(f"{file} is no file; expected an archive of videos")
    try:
        with safe_open(file, framework="pt") as opened:
            about = opened.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{file} is no whole archive of videos ({' '.join(str(error).split())}); copy or write it again") from error
    if about.get("format") != FORMAT:
        raise ValueError(f"{file} is a safetensors file, but no archive of videos; expected one that `VideoArchive.save` wrote")
    if about.get("version") != str(VERSION):
        raise ValueError(
            f"{file} has version {about.get('version')}; expected {VERSION}: read it with the fewer that wrote it, or a newer one"
        )
    try:
        config, told = PFNRConfig.from_json(about["config"]), json.loads(about["videos"])
        names = [each["name"] for each in told]
        whole = len(set(names)) == len(names) <= config.max_sessions and all(
            isinstance(each["name"], str) and each["frames"] > 0 and isinstance(each["psnr"], float) and isinstance(each["bits"], dict)
            for each in told
        )
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{file} does not say what it holds ({error}); copy or write it again") from error
    if not whole:
        raise ValueError(f"{file} does not say what it holds; copy or write it again")
    return config, told


@torch.no_grad()
def _fill_one(net: PFNR, session: int, video: Stored, bits: dict[str, int], tensors: dict[str, Tensor]) -> None:
    """Record a video's masks, and put the weights that it brought into the network."""
    expected = net.packed_masks.shape[1]
    unpacker = zlib.decompressobj()
    packed = unpacker.decompress(tensors[f"{session}.mask"].numpy().tobytes(), expected + 1)  # no more, whatever the file unpacks to
    if len(packed) != expected:
        raise ValueError(f"mask {session} has {len(packed)} bytes in place of {expected}")
    net.packed_masks[session] = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
    net._recorded += 1
    masks = net.masks(session)
    parameters = net.weights()
    for name, (numbers, groups, count) in new_numbers(net, session, masks).items():
        found = tensors[f"{session}.{name}"]
        if name in bits:
            scale = tensors[f"{session}.{name}.scale"]
            if scale.shape != (2, count) or not 2 <= int(bits[name]) <= 16:
                raise ValueError(f"{name} of video {session} has scales {list(scale.shape)}")
            kept = Quantised(unpack_codes(found, int(bits[name]), len(numbers)), scale[0], scale[1], int(bits[name]))
            video.quantised[name], found = kept, kept.numbers(groups)
        if found.shape != numbers.shape or not found.isfinite().all():
            raise ValueError(
                f"{name} of video {session} has shape {list(found.shape)} in place of {list(numbers.shape)}, or no finite numbers"
            )
        if name == "head":
            head = net.heads[session].weight  # pyright: ignore[reportAttributeAccessIssue]
            head.copy_(found.view_as(head))  # pyright: ignore[reportCallIssue, reportArgumentType]
            continue
        earlier = torch.zeros_like(masks[name])
        for before in range(session):
            earlier |= net.masks(before)[name]
        parameters[name][masks[name] & ~earlier] = found.to(parameters[name])


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes of b bits end to end, lowest bit first, as bytes."""
    table = (codes.numpy()[:, None] >> np.arange(bits)) & 1
    return torch.from_numpy(np.packbits(table.astype(np.uint8).reshape(-1), bitorder="little"))


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """The codes that `pack_codes` packed."""
    flat = np.unpackbits(packed.numpy(), bitorder="little")
    if len(packed) != (count * bits + 7) // 8:
        raise ValueError(f"{len(packed)} bytes of codes in place of {(count * bits + 7) // 8}")
    return torch.from_numpy(flat[: count * bits].reshape(count, bits).astype(np.int64) @ (1 << np.arange(bits)))
