"""The network: a frame's time and a video's number in, the frame out, through the subnetwork of that video."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fewer.checks import check_choice, check_positive, check_whole, is_whole
from fewer.signals.pfnr.net.subnetworks import FourierSubneuralOperator, Placement, SubnetConv2d, SubnetLinear, Subnetwork, check_capacity

NARROWEST = 96  # channels that a default width does not go below
STEPS = (5, 4, 3, 2)  # strides that `for_size` tries


@dataclass(frozen=True)
class PFNRConfig:
    """The shape of a network, with the paper's defaults (720 x 1280).

    Attributes:
        height, width: of a frame: grid times the product of the strides.
        max_sessions: S, how many videos the network may hold; part of the embedding, so fixed beforehand.
        grid: (h, w) of the first feature map.
        grid_channels: d, its channels.
        stem: features between the two linear layers.
        strides: r of each block.
        widths: channels after each block; by default d, then max(C // 2, 96).
        fso_block: the block that is a Fourier operator; None has none (the baseline WSN).
        capacity: c, the share of each tensor that a video computes with.
        frequencies: (b, l) of the embedding.
        placement: of the Fourier operator, see there.
    """

    height: int
    width: int
    max_sessions: int
    grid: tuple[int, int] = (9, 16)
    grid_channels: int = 112
    stem: int = 512
    strides: tuple[int, ...] = (5, 2, 2, 2, 2)
    widths: tuple[int, ...] | None = None
    fso_block: int | None = 1
    capacity: float = 0.5
    frequencies: tuple[float, int] = (1.25, 40)
    placement: Placement = "centred"

    def __post_init__(self) -> None:
        sizes = {"height": self.height, "width": self.width, "max_sessions": self.max_sessions, "stem": self.stem}
        check_whole(optional=(), **sizes, grid_channels=self.grid_channels)
        check_whole(
            optional=(),
            **{"grid[0]": self.grid[0], "grid[1]": self.grid[1]},
            **{f"strides[{i}]": each for i, each in enumerate(self.strides)},
        )
        check_capacity(self.capacity)
        check_positive(**{"frequencies[0]": self.frequencies[0]})
        check_whole(optional=(), **{"frequencies[1]": self.frequencies[1]})
        check_choice(("centred", "released"), placement=self.placement)
        if not self.strides:
            raise ValueError("strides is empty; expected one stride or more, such as (5, 2, 2, 2, 2)")
        scale = math.prod(self.strides)
        if (self.height, self.width) != (self.grid[0] * scale, self.grid[1] * scale):
            raise ValueError(
                f"height and width are {self.height} x {self.width}; expected grid times the product of strides, "
                f"{self.grid[0] * scale} x {self.grid[1] * scale}: change grid, strides, or the size of the frames"
            )
        if self.widths is not None:
            check_whole(optional=(), **{f"widths[{i}]": each for i, each in enumerate(self.widths)})
            if len(self.widths) != len(self.strides):
                raise ValueError(f"widths has {len(self.widths)} entries; expected {len(self.strides)}, one a stride")
        if self.fso_block is not None:
            if not is_whole(self.fso_block) or not 0 <= self.fso_block < len(self.strides):
                raise ValueError(f"fso_block is {self.fso_block!r}; expected 0 to {len(self.strides) - 1}, or None for no Fourier operator")
            if min(self.modes) < 1:
                raise ValueError(
                    f"fso_block {self.fso_block} has modes {self.modes}; expected at least 1 each: take a larger grid or a later block"
                )

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels after each block."""
        if self.widths is not None:
            return tuple(self.widths)
        found = [self.grid_channels]
        while len(found) < len(self.strides):
            found.append(max(found[-1] // 2, NARROWEST))
        return tuple(found)

    @property
    def modes(self) -> tuple[int, int]:
        """(M1, M2) of the Fourier operator: half of its input's rows and columns."""
        before = math.prod(self.strides[: self.fso_block or 0])
        return self.grid[0] * before // 2, self.grid[1] * before // 2

    @classmethod
    def for_size(cls, height: int, width: int, max_sessions: int, **changes: Any) -> Self:
        """A small network for frames of a size: strides that divide both sides while the grid keeps 4 x 4 or more.

        >>> PFNRConfig.for_size(144, 176, max_sessions=4).strides
        (4, 4)
        """
        check_whole(height=height, width=width)
        strides: list[int] = []
        rows, columns = height, width
        while step := next((r for r in STEPS if rows % r == columns % r == 0 and min(rows, columns) >= 4 * r and len(strides) < 5), None):
            strides.append(step)
            rows, columns = rows // step, columns // step
        if not strides or rows * columns > 40 * 40:
            raise ValueError(
                f"frames are {height} x {width}, whose sides share too few factors; expected sides that 8 or 16 divide: resize to "
                f"{max(16, height // 16 * 16)} x {max(16, width // 16 * 16)}"
            )
        given = {"grid": (rows, columns), "grid_channels": 16, "stem": 128, "strides": tuple(reversed(strides))}
        widths = (16, *(24 for _ in strides[1:]))
        return cls(height, width, max_sessions, **(given | {"widths": widths, "fso_block": 1 if len(strides) > 1 else 0} | changes))

    def to_json(self) -> str:
        """All settings as one line of JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The settings that `to_json` wrote; ValueError where the text holds others.

        >>> config = PFNRConfig(720, 1280, max_sessions=8)
        >>> PFNRConfig.from_json(config.to_json()) == config
        True
        """
        try:
            said = json.loads(text)
            for name in ("grid", "strides", "widths", "frequencies"):
                said[name] = None if said[name] is None else tuple(said[name])
            return cls(**said)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"the text is no PFNRConfig ({error}); expected what to_json writes") from error


def embedding(p: Float[Tensor, " B"], base: float = 1.25, levels: int = 40) -> Float[Tensor, "B n"]:
    """gamma(p) = [sin(b^i pi p), cos(b^i pi p)], i = 0..l-1, interleaved.

    >>> embedding(torch.tensor([0.3])).shape
    torch.Size([1, 80])
    """
    angles = math.pi * p[:, None] * base ** torch.arange(levels, dtype=p.dtype, device=p.device)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


class PFNR(nn.Module):
    """One network for many videos: each has a mask over all weights and a head of its own.

    While it trains, the subnetwork is that of the highest scores; else a video that was recorded is computed with its own masks.

    Args:
        config: the shape.
        generator: draws weights and scores.

    Attributes:
        recorded: how many videos have masks.

    Examples:
        >>> net = PFNR(PFNRConfig(16, 16, max_sessions=2, grid=(4, 4), grid_channels=8, stem=16, strides=(2, 2), widths=(8, 8)))
        >>> net(torch.tensor([0.0, 0.5]), session=0).shape
        torch.Size([2, 3, 16, 16])
    """

    def __init__(self, config: PFNRConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config, given = config, {"capacity": config.capacity, "generator": generator}
        channels = (config.grid_channels, *config.channels)
        cells = math.prod(config.grid) * config.grid_channels
        stem: list[Subnetwork] = [
            SubnetLinear(4 * config.frequencies[1], config.stem, **given),
            SubnetLinear(config.stem, cells, **given),
        ]
        blocks: list[Subnetwork] = [
            FourierSubneuralOperator(before, after, config.modes, stride, placement=config.placement, **given)
            if number == config.fso_block
            else SubnetConv2d(before, after, stride, **given)
            for number, (before, after, stride) in enumerate(zip(channels, channels[1:], config.strides, strict=False))
        ]
        self.layers = nn.ModuleList(stem + blocks)
        self.heads = nn.ModuleList()
        for _ in range(config.max_sessions):
            head: Any = nn.utils.skip_init(nn.Conv2d, channels[-1], 3, 1, bias=False)  # the generator alone draws
            nn.init.kaiming_uniform_(head.weight, a=math.sqrt(5), generator=generator)
            self.heads.append(head)
        packed = (self.masked_weights() + 7) // 8
        self.register_buffer("packed_masks", torch.zeros(config.max_sessions, packed, dtype=torch.uint8))  # a bit an entry and video
        self.register_buffer("_recorded", torch.zeros((), dtype=torch.int64))

    packed_masks: Tensor
    _recorded: Tensor

    @property
    def recorded(self) -> int:
        return int(self._recorded)

    def subnetworks(self) -> Iterator[tuple[str, Subnetwork]]:
        """The masked layers with their names."""
        for name, layer in self.layers.named_children():
            assert isinstance(layer, Subnetwork)
            yield f"layers.{name}", layer

    def weights(self) -> dict[str, nn.Parameter]:
        """The masked tensors by name."""
        return {f"{name}.weights.{i}": weight for name, layer in self.subnetworks() for i, weight in enumerate(layer.weights)}

    def masked_weights(self) -> int:
        """How many entries all masked tensors have."""
        return sum(weight.numel() for weight in self.weights().values())

    def forward(self, t: Float[Tensor, " B"], session: int) -> Float[Tensor, "B 3 H W"]:
        """The frames at times t / T of a video, in [0, 1].

        Args:
            t: the frame's number over the video's length, one a frame.
            session: the video's number.

        Raises:
            ValueError: there is no such session.
        """
        if not is_whole(session) or not 0 <= session < self.config.max_sessions:
            raise ValueError(f"session is {session!r}; expected 0 to {self.config.max_sessions - 1}, the sessions planned for")
        known = not self.training and session < self.recorded
        return self.render(t, session, self.effective(self.masks(session) if known else None))

    def effective(self, masks: dict[str, Tensor] | None = None) -> list[list[Tensor]]:
        """Each layer's weights, with zeros where the masks (by default the scores) leave an entry out. Once a video is enough."""
        return [
            layer.effective(None if masks is None else [masks[f"{name}.weights.{i}"] for i in range(len(layer.weights))])
            for name, layer in self.subnetworks()
        ]

    def render(self, t: Float[Tensor, " B"], session: int, weights: Sequence[Sequence[Tensor]]) -> Float[Tensor, "B 3 H W"]:
        """The frames by given weights, as `effective` makes them."""
        config, layers = self.config, [layer for _, layer in self.subnetworks()]
        t = t.to(torch.promote_types(t.dtype, torch.float32))  # the fastest sine turns thousands of times, which no half precision follows
        video = torch.full_like(t, (session + 1) / (config.max_sessions + 1))
        x = torch.cat([embedding(t, *config.frequencies), embedding(video, *config.frequencies)], dim=1).to(weights[0][0].dtype)
        x = F.relu(layers[0].run(x, weights[0]))
        x = F.relu(layers[1].run(x, weights[1])).view(len(t), config.grid_channels, *config.grid)
        for layer, each in zip(layers[2:], weights[2:], strict=True):
            x = F.silu(layer.run(x, each))
        return (torch.tanh(self.heads[session](x)) + 1) / 2

    def current_masks(self) -> dict[str, Tensor]:
        """The masks that the scores make now."""
        return {f"{name}.weights.{i}": mask for name, layer in self.subnetworks() for i, mask in enumerate(layer.masks())}

    def masks(self, session: int) -> dict[str, Tensor]:
        """The masks of a recorded video, bool, by the name of their weights."""
        if not is_whole(session) or not 0 <= session < self.recorded:
            raise ValueError(f"session is {session!r}; expected one of the {self.recorded} that are recorded: add its video first")
        bits = _unpacked(self.packed_masks[session], self.masked_weights())
        sizes = [weight.numel() for weight in self.weights().values()]
        return {name: part.view_as(weight) for (name, weight), part in zip(self.weights().items(), bits.split(sizes), strict=True)}

    def record(self, masks: dict[str, Tensor]) -> None:
        """Keep these masks as those of the next video; ValueError where all that were planned for are there."""
        if self.recorded == self.config.max_sessions:
            raise ValueError(f"{self.recorded} sessions are recorded; expected no more than max_sessions: make a network with a larger one")
        self.packed_masks[self.recorded] = _packed(torch.cat([masks[name].flatten() for name in self.weights()]))
        self._recorded += 1

    @property
    def used(self) -> dict[str, Tensor]:
        """U: the entries that any recorded video computes with, bool, by the name of their weights."""
        found = {name: torch.zeros_like(weight, dtype=torch.bool) for name, weight in self.weights().items()}
        for session in range(self.recorded):
            for name, mask in self.masks(session).items():
                found[name] |= mask
        return found

    @property
    def free_fraction(self) -> float:
        """The share of the masked entries that no video computes with."""
        return 1 - sum(int(each.sum()) for each in self.used.values()) / self.masked_weights()

    def reset_scores(self, generator: torch.Generator | None = None) -> None:
        """Draw the scores of all layers anew."""
        for _, layer in self.subnetworks():
            layer.reset_scores(generator)

    def count_by_layer(self) -> dict[str, int]:
        """Masked entries by layer: a Fourier operator has far more than the convolution that it stands for.

        >>> PFNR(PFNRConfig(16, 16, 1, (4, 4), 8, 16, (2, 2), (8, 8))).count_by_layer()["layers.3 FourierSubneuralOperator"]
        4096
        """
        return {f"{name} {type(layer).__name__}": sum(each.numel() for each in layer.weights) for name, layer in self.subnetworks()}


def _packed(bits: Tensor) -> Tensor:
    """Bools as bytes, the first the lowest bit."""
    padded = F.pad(bits.to(torch.uint8), (0, -len(bits) % 8)).view(-1, 8)
    return (padded << torch.arange(8, device=bits.device, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def _unpacked(packed: Tensor, count: int) -> Tensor:
    return ((packed[:, None] >> torch.arange(8, device=packed.device, dtype=torch.uint8)) & 1).flatten()[:count].bool()
