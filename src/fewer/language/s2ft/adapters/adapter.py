"""Adapters: the exact change of some rows and columns, in the model's own order. They are saved, loaded, and added to one another."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fewer.checks import check_whole
from fewer.files import read_json, read_weights, whole_file
from fewer.language._shared.structure import Side
from fewer.language.s2ft.config import S2FTConfig

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
TYPE = "S2FT"


@dataclass(frozen=True)
class Slice:
    """The change of one linear map: W[index] or W[:, index] += delta.

    Attributes:
        index: rows or columns [s], ascending, int64.
        delta: [s, in] for rows, [out, s] for columns.
        size: how many rows or columns the map has.
    """

    side: Side
    index: Tensor
    delta: Tensor
    size: int

    @property
    def axis(self) -> int:
        return 0 if self.side == "rows" else 1

    def sorted(self) -> Slice:
        order = self.index.argsort()
        return Slice(self.side, self.index[order], self.delta.index_select(self.axis, order), self.size)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the map."""
        return (self.size, self.delta.shape[1]) if self.side == "rows" else (self.delta.shape[0], self.size)


@dataclass(frozen=True)
class Adapter:
    """What training changed: the path of a linear map -> its slice.

    Attributes:
        base: a hash of the model that it was trained on.
    """

    config: S2FTConfig
    base: str
    slices: Mapping[str, Slice]

    def save(self, directory: Path | str, dtype: torch.dtype = torch.float32) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors` into a directory, each whole or not at all.

        In float32 the change of bfloat16 and float16 weights is kept exactly, that of float32 weights to a rounding.
        """
        folder = Path(directory)
        if not self.slices:
            raise ValueError("the adapter changes no map; expected one that was trained: save it before the model is taken apart")
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for path, each in self.slices.items():
            tensors[f"{path}.{each.side}"], tensors[f"{path}.delta"] = each.index.cpu(), each.delta.to("cpu", dtype).contiguous()
        sizes = {path: each.size for path, each in self.slices.items()}
        about = {"peft_type": TYPE, "base": self.base, "sizes": sizes, **dataclasses.asdict(self.config)}
        with whole_file(folder / WEIGHTS_FILE, overwrite=True) as file:
            save_file(tensors, file, metadata={"format": "pt"})
        with whole_file(folder / CONFIG_FILE, overwrite=True) as file:
            file.write_text(json.dumps(about, indent=2), encoding="utf8")

    @classmethod
    def load(cls, directory: Path | str) -> Adapter:
        """Read what `save` wrote; ValueError where the directory holds no adapter of this kind."""
        folder = Path(directory)
        if not (folder / CONFIG_FILE).is_file() or not (folder / WEIGHTS_FILE).is_file():
            raise ValueError(f"{folder} is no adapter; expected {CONFIG_FILE} and {WEIGHTS_FILE}, as save_pretrained writes them")
        try:
            about, tensors = read_json(folder / CONFIG_FILE), read_weights(folder / WEIGHTS_FILE)
            if about.pop("peft_type", None) != TYPE:
                raise ValueError("its peft_type is not S2FT")
            base, sizes = about.pop("base"), about.pop("sizes")
            if not isinstance(base, str) or not isinstance(sizes, dict) or not sizes:
                raise ValueError("base or sizes do not say which maps of which model it changes")
            return cls(S2FTConfig.from_dict(about), base, {path: _stored_slice(tensors, path, size) for path, size in sizes.items()})
        except (KeyError, TypeError, ValueError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise ValueError(f"{folder} is no S2FT adapter that can be read: {reason}; expected what save_pretrained writes") from error


def _stored_slice(tensors: Mapping[str, Tensor], path: str, size: Any) -> Slice:
    """The slice of a map in the file's tensors; ValueError where they do not go together."""
    side: Side = "rows" if f"{path}.rows" in tensors else "columns"
    index, delta = tensors[f"{path}.{side}"], tensors[f"{path}.delta"]
    check_whole(**{f"the size of {path}": size})
    part = Slice(side, index, delta, size)
    if index.dtype != torch.int64 or index.dim() != 1 or delta.dim() != 2 or delta.shape[part.axis] != len(index):
        raise ValueError(f"{path} has {side} {tuple(index.shape)} of {index.dtype} for a change {tuple(delta.shape)}")
    return part


@dataclass(frozen=True)
class Fusion:
    """What adding adapters found.

    Attributes:
        adapter: the sum.
        overlaps: path -> the rows or columns that more than one of them changes. Elsewhere each keeps its own effect.
    """

    adapter: Adapter
    overlaps: Mapping[str, tuple[int, ...]]


def fuse(adapters: Sequence[Adapter]) -> Fusion:
    """The sum of adapters of one base; it does not depend on their order.

    Raises:
        ValueError: none given, or of different bases.
    """
    if not adapters:
        raise ValueError("no adapters to add; expected at least one")
    if len({each.base for each in adapters}) > 1:
        raise ValueError(
            f"the adapters belong to different bases ({', '.join(sorted({each.base for each in adapters}))}); expected one: train them on the same model"
        )
    slices, overlaps = {}, {}
    for path in dict.fromkeys(path for each in adapters for path in each.slices):
        slices[path], shared = add_slices([each.slices[path] for each in adapters if path in each.slices])
        if shared:
            overlaps[path] = shared
    return Fusion(Adapter(adapters[0].config, adapters[0].base, slices), overlaps)


def add_slices(slices: Sequence[Slice]) -> tuple[Slice, tuple[int, ...]]:
    """The sum of slices of one map, and the rows or columns that several change."""
    axis = slices[0].axis
    index, counts = torch.cat([each.index for each in slices]).unique(return_counts=True)
    shape = list(slices[0].delta.shape)
    shape[axis] = len(index)
    places = [torch.searchsorted(index, each.index) for each in slices]
    parts = [
        torch.zeros(shape, dtype=torch.float64).index_copy(axis, place, each.delta.double())
        for place, each in zip(places, slices, strict=True)
    ]
    # sums of floats depend on their order: each entry's terms are sorted, so that the adapters' order does not matter
    total = torch.stack(parts).sort(dim=0).values.sum(0) if len(parts) > 2 else sum(parts[1:], parts[0])
    return Slice(slices[0].side, index, total, slices[0].size), tuple(index[counts > 1].tolist())


@torch.no_grad()
def base_hash(model: nn.Module, samples: int = 1024) -> str:
    """A hash of a model's weights: names, shapes, and up to `samples` values of each, rounded to bfloat16 (so that loading it so changes nothing).

    Not in the paper: it tells adapters of different bases apart.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        values = parameter.detach().reshape(-1)
        picked = values[:: max(1, len(values) // samples)].to("cpu")
        picked = picked.to(torch.bfloat16).view(torch.int16) if picked.is_floating_point() else picked
        digest.update(f"{name} {tuple(parameter.shape)}".encode() + picked.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def check_fits(adapter: Adapter, shapes: Mapping[str, tuple[int, int]]) -> None:
    """ValueError, naming the layer, where an adapter changes maps that the model lacks or that have other shapes."""
    for path, each in adapter.slices.items():
        if path not in shapes:
            raise ValueError(f"the adapter changes {path}, which the model lacks; expected an adapter for this architecture")
        if each.shape != shapes[path]:
            raise ValueError(f"{path} is {list(shapes[path])}, the adapter's {list(each.shape)} (out, in); expected equal shapes")
        if (
            not len(each.index)
            or int(each.index.min()) < 0
            or int(each.index.max()) >= each.size
            or len(each.index.unique()) < len(each.index)
        ):
            raise ValueError(
                f"{path}: the adapter's {each.side} are no numbers below {each.size}, each once; expected what save_pretrained writes"
            )


def check_base(adapter: Adapter, own: str) -> None:
    """ValueError where an adapter was trained on other weights than those of hash `own`."""
    if adapter.base != own:
        raise ValueError(
            f"the adapter was trained on other weights than these (base {adapter.base}, these are {own}); expected its base. A model in which it "
            "is merged already needs no second merge; with other_base=True it is taken all the same (the base in other precision, say)"
        )


def names_of(adapters: Iterable[str]) -> str:
    return ", ".join(adapters) or "none"
