"""Which modes, and losses on modes: the energy that a set leaves out is a floor that no training passes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.data import Dataset

from fewer.checks import check_choice, check_share, check_whole
from fewer.signals.transform_once.transforms import BASES, Basis, truncated_dct


class OnModes(Protocol):
    """What a loss and a data set ask of a model: T1, or one of yours that works on modes. Fields come in float64 as well, for a loss' rest."""

    resolution: tuple[int, ...]

    def to_modes(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Modes:
    """A set of modes.

    Attributes:
        n_modes: of each axis, the smallest block that holds them.
        index: [k, d] of each mode, or None where the whole block is meant.
        floor: mean over samples of sqrt(energy outside / energy), the least relative L2 error that is left.
        basis: "dct" or "fourier".
    """

    n_modes: tuple[int, ...]
    index: tuple[tuple[int, ...], ...] | None
    floor: float
    basis: Basis

    def mask(self) -> Bool[Tensor, "m"]:
        """Which entries of the block are in the set."""
        if self.index is None:
            return torch.ones(self.n_modes, dtype=torch.bool)
        mask = torch.zeros(self.n_modes, dtype=torch.bool)
        mask[tuple(torch.tensor(self.index).T)] = True
        return mask


def select_modes(fields: Float[Tensor, "N c n"], floor: float | None = None, top_k: int | None = None, basis: Basis = "dct") -> Modes:
    """The fewest modes that are enough for some targets.

    Args:
        fields: targets [N, c, n_1, ..., n_d].
        floor: the smallest block, the same number on each axis (no more than there are points), that leaves less than this relative error.
        top_k: in its place, the k modes of largest mean energy, of any shape.
        basis: "dct" or "fourier".

    Raises:
        ValueError: both or none of the two, a floor outside (0, 1), more modes than there are, NaN, or a target that is zero.

    Examples:
        >>> x = torch.linspace(0, 1, 33)[:-1]
        >>> waves = torch.cos(2 * torch.pi * 3 * x)[None, None]
        >>> select_modes(waves, floor=0.01, basis="fourier").n_modes, select_modes(waves, top_k=1, basis="fourier").index
        ((6,), ((5,),))
    """
    check_choice(BASES, basis=basis)
    if (floor is None) == (top_k is None):
        raise ValueError(f"floor is {floor} and top_k {top_k}; expected one of them: leave the other out")
    check_fields("Y", fields, targets=True)
    points = tuple(fields.shape[2:])
    energy = truncated_dct(fields.double(), points, basis).square().sum(1)
    share = energy / energy.flatten(1).sum(1).reshape(-1, *[1] * len(points))
    if floor is not None:
        check_share(ends=False, floor=floor)
        for m in range(1, max(points) + 1):
            block = tuple(min(m, n) for n in points)
            left = _floor(share, torch.ones(block, dtype=torch.bool))
            if left < floor:
                return Modes(block, None, left, basis)
        return Modes(points, None, 0.0, basis)
    assert top_k is not None
    check_whole(top_k=top_k)
    if top_k > math.prod(points):
        raise ValueError(f"top_k is {top_k} and there are {math.prod(points)} modes; expected at most that: take fewer")
    largest = share.mean(0).flatten().topk(top_k).indices.sort().values
    index = torch.stack(torch.unravel_index(largest, points), 1)
    block = tuple((index.amax(0) + 1).tolist())
    chosen = Modes(block, tuple(map(tuple, index.tolist())), 0.0, basis)
    return Modes(block, chosen.index, _floor(share, chosen.mask()), basis)


def _floor(share: Tensor, mask: Tensor) -> float:
    """What is outside is summed itself: one less what is inside is known to 1e-16 alone, and its root to 1e-8."""
    outside = share.clone()
    outside[(slice(None), *(slice(0, m) for m in mask.shape))] *= ~mask.to(share.device)
    return outside.flatten(1).sum(1).sqrt().mean().item()


def check_fields(name: str, fields: Tensor, resolution: Sequence[int] | None = None, targets: bool = False) -> None:
    """Refuse fields that cannot be trained on, naming the first that is wrong."""
    if fields.ndim < 3 or not fields.dtype.is_floating_point or not len(fields):
        raise ValueError(
            f"{name} is {fields.dtype} of shape {tuple(fields.shape)}; expected real floating-point fields [N, channels, n...], N >= 1"
        )
    if resolution is not None and tuple(fields.shape[2:]) != tuple(resolution):
        raise ValueError(
            f"{name} has resolution {tuple(fields.shape[2:])} and the model {tuple(resolution)}; expected the model's: resize with "
            "spectral_resize, or make T1 with that resolution"
        )
    flat = fields.flatten(1)
    wrong = ~flat.isfinite().all(1)
    if wrong.any():
        raise ValueError(
            f"{name} has a NaN or infinite value in sample {int(wrong.nonzero()[0])}; expected finite fields: drop that sample"
        )
    if targets and (zero := (flat == 0).all(1)).any():
        raise ValueError(
            f"{name} is zero everywhere in sample {int(zero.nonzero()[0])}, where a relative error means nothing; expected others: drop that "
            "sample, or use relative=False"
        )


class ModeTargets(NamedTuple):
    """Targets as a loss on modes needs them."""

    modes: Tensor  # [B, c, m...]: coefficients inside the block
    rest: Tensor  # [B]: energy outside of it
    norm: Tensor  # [B]: root of the whole energy

    def __getitem__(self, rows: Any) -> ModeTargets:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The targets of some samples."""
        return ModeTargets(*(each[rows] for each in tuple(self)))


class ModeLoss:
    """The relative L2 error of the full fields, computed on modes: sqrt(||z - y_m||^2 + r) / ||y||, mean over the batch (Parseval).

    Args:
        p: 2; other norms are not kept by an orthonormal transform.
        relative: divide by the target's norm.
        model: the T1 whose modes are meant; `prepare` may be given one in its place.

    Examples:
        >>> from fewer.signals import T1
        >>> model, y = T1((4,), 8, resolution=(16,)), torch.randn(3, 1, 16)
        >>> loss = ModeLoss()
        >>> z = torch.randn(3, 1, 4)
        >>> full = ((model.from_modes(z) - y).flatten(1).norm(dim=1) / y.flatten(1).norm(dim=1)).mean()
        >>> torch.allclose(loss(z, loss.prepare(y, model)), full)
        True
    """

    def __init__(self, p: int = 2, relative: bool = True, model: OnModes | None = None) -> None:
        if p != 2:
            raise ValueError(f"p is {p!r}; expected 2: other norms are not the same on modes; take them on from_modes(z)")
        self.relative, self.model = relative, model

    def prepare(self, y: Float[Tensor, "B c n"], model: OnModes | None = None) -> ModeTargets:
        """Targets transformed once; ValueError on a NaN, on a zero target, or on another resolution than the model's."""
        model = model or self.model
        if model is None:
            raise ValueError("no model is given; expected the T1 whose modes are meant: prepare(y, model)")
        check_fields("y", y, model.resolution, targets=self.relative)
        single = torch.promote_types(y.dtype, torch.float32)  # a field's energy is beyond what half precision can hold
        with torch.no_grad():
            y = y.double()  # the rest is a difference of energies, and its root as exact as the loss only if they are twice as exact
            modes, energy = model.to_modes(y), y.flatten(1).square().sum(1)
            rest = (energy - modes.flatten(1).square().sum(1)).clamp(min=0)
        return ModeTargets(modes.to(single), rest.to(single), energy.sqrt().to(single))

    def __call__(self, z: Float[Tensor, "B c m"], targets: ModeTargets) -> Float[Tensor, ""]:
        if z.shape != targets.modes.shape:
            raise ValueError(
                f"z has shape {tuple(z.shape)} and the targets {tuple(targets.modes.shape)}; expected the same: prepare these samples' y"
            )
        squared = (z - targets.modes).flatten(1).square().sum(1) + targets.rest
        # where nothing is left, the root has no slope: a tiny energy keeps it finite
        error = squared.clamp(min=torch.finfo(squared.dtype).tiny).sqrt()
        return (error / targets.norm if self.relative else error).mean()


class ModeDataset(Dataset):
    """Pairs of fields, transformed and cut once; what it yields are modes, so that training never transforms.

    Args:
        x, y: [N, c, n...] at the model's resolution.
        model: the T1.
        batch: fields that are transformed at a time.

    Attributes:
        inputs: [N, c_in, m...].
        targets: `ModeTargets` of all.

    Examples:
        >>> from fewer.signals import T1
        >>> model = T1((4, 4), 8, resolution=(16, 16))
        >>> data = ModeDataset(torch.randn(6, 1, 16, 16), torch.randn(6, 1, 16, 16), model)
        >>> [len(z) for z, _ in data.batches(4)]
        [4, 2]
    """

    def __init__(self, x: Float[Tensor, "N c n"], y: Float[Tensor, "N c n"], model: OnModes, batch: int = 256) -> None:
        if len(x) != len(y):
            raise ValueError(f"x has {len(x)} samples and y {len(y)}; expected as many: one target an input")
        check_whole(batch=batch)
        check_fields("x", x, model.resolution)
        loss, rows = ModeLoss(model=model), range(0, len(x), batch)
        with torch.no_grad():
            self.inputs = torch.cat([model.to_modes(x[i : i + batch]) for i in rows])
        parts = [loss.prepare(y[i : i + batch]) for i in rows] if _all_targets(y, model) else []
        self.targets = ModeTargets(*(torch.cat(each) for each in zip(*parts, strict=True)))

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, i: int) -> tuple[Tensor, ModeTargets]:
        return self.inputs[i], self.targets[i]

    def batches(self, size: int, generator: torch.Generator | None = None) -> Iterator[tuple[Tensor, ModeTargets]]:
        """One round of batches, drawn anew where a generator is given."""
        order = torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)
        check_whole(size=size)
        for rows in order.split(size):
            yield self.inputs[rows], self.targets[rows]


def _all_targets(y: Tensor, model: OnModes) -> bool:
    """Check all of them at once, so that a message names the sample's number among all."""
    check_fields("y", y, model.resolution, targets=True)
    return True
