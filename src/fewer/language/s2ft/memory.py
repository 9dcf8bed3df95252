"""What training needs in memory: bytes that autograd keeps for the backward pass (counted), gradients, and the optimizer's state."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fewer.errors import require
from fewer.language.s2ft.config import KINDS, Kind, S2FTConfig
from fewer.language.s2ft.selection import unit_count
from fewer.language.s2ft.slice_linear import Form, S2Linear
from fewer.language.s2ft.structure import Structure, shapes_of, structure_of


@dataclass
class SavedBytes:
    """What autograd keeps, each storage once and in full (a view keeps all of it); `total` counts bytes."""

    storages: dict[int, Any] = field(default_factory=dict)  # kept alive: the address of a dead one may be taken again

    @property
    def total(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


@contextlib.contextmanager
def saved_bytes(model: nn.Module) -> Iterator[SavedBytes]:
    """Count the bytes that forward passes inside the block keep for their backward pass, the model's own weights and buffers left out.

    Examples:
        >>> layer = nn.Linear(100, 10)
        >>> x = torch.ones(5, 100)
        >>> with saved_bytes(layer) as saved:
        ...     y = layer(x)
        >>> saved.total
        2000
    """
    own = {id_of(tensor) for tensor in (*model.parameters(), *model.buffers())}
    found = SavedBytes()

    def pack(tensor: Tensor) -> Tensor:
        if id_of(tensor) not in own:
            found.storages[id_of(tensor)] = tensor.untyped_storage()
        return tensor.detach()  # the output itself would keep its own graph alive

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def id_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@dataclass(frozen=True)
class MemoryRow:
    """Bytes that one way of training needs."""

    trained: int  # parameters
    parameters: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class MemoryPlan:
    """What full fine-tuning, LoRA and S2FT need; `str(plan)` is a table."""

    rows: dict[str, MemoryRow]

    def __str__(self) -> str:
        lines = [
            f"{'':8}{'trained':>14}"
            + "".join(f"{name:>16}" for name in ("parameters", "gradients", "optimizer", "activations", "together"))
        ]
        for name, row in self.rows.items():
            amounts = (row.parameters, row.gradients, row.optimizer, row.activations, row.total)
            lines.append(f"{name:8}{row.trained:>14,}" + "".join(f"{amount / 2**20:>12,.1f} MiB" for amount in amounts))
        return "\n".join(lines)


def memory_plan(model: nn.Module, config: S2FTConfig | None = None, tokens: int | tuple[int, int] = 512) -> MemoryPlan:
    """What training a model with AdamW will need, before it is tried: full, LoRA of as many parameters, and S2FT.

    Activations are counted by a pass over a twin of the model without memory (torch's fake tensors); gradients have the size of what is
    trained, AdamW's state twice that.

    Args:
        model: a causal language model of transformers.
        config: S2FT's settings.
        tokens: of a step: (rows, length), or the length of one row.

    Examples:
        >>> from fewer.tasks import micro_lm
        >>> plan = memory_plan(micro_lm(), S2FTConfig(d_ratio=0.05), tokens=(2, 32))
        >>> plan.rows["s2ft"].activations < plan.rows["lora"].activations < plan.rows["full"].activations
        True
    """
    config = config or S2FTConfig()
    structure = structure_of(model, config.target_families)
    shape = (1, tokens) if isinstance(tokens, int) else tokens
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    s2ft = with_slices(twin_of(model), structure, config)
    trained = sum(p.numel() for p in s2ft.parameters() if p.requires_grad)
    lora = with_lora(twin_of(model), lora_rank(model, structure, trained), structure)
    twins = {"full": twin_of(model), "lora": lora, "s2ft": s2ft}
    device, rows = next(model.parameters()).device, {}
    with FakeTensorMode(
        allow_non_fake_inputs=True
    ) as mode:  # shapes without values, for which torch picks the kernels that it would pick on this device
        for name, twin in twins.items():
            move_to_fake(twin, mode, device)
            rows[name] = _row(twin, torch.zeros(shape, dtype=torch.long, device=device), weights)
    return MemoryPlan(rows)


def _row(model: nn.Module, ids: Tensor, weights: int) -> MemoryRow:
    model.train()
    with saved_bytes(model) as saved:
        # with a cache, as models look into the values of positions without one; it adds nothing that is kept
        model(input_ids=ids, labels=ids, use_cache=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    size = sum(p.numel() * p.element_size() for p in trained)
    beside = size if any("lora_" in name for name, _ in model.named_parameters()) else 0
    return MemoryRow(sum(p.numel() for p in trained), weights + beside, size, 2 * size, saved.total)


def twin_of(model: nn.Module) -> nn.Module:
    """A new model of the same shape and dtype on torch's meta device, which has no memory."""
    made: Any = cast(Any, type(model))
    with torch.device("meta"):
        return made(cast(Any, model).config).to(next(model.parameters()).dtype)


def move_to_fake(model: nn.Module, mode: FakeTensorMode, device: torch.device) -> None:
    """Let a model on the meta device believe that it is on another; tied weights stay tied."""
    known: dict[Any, Any] = {}
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                known[value] = known.get(value, nn.Parameter(FakeTensor(mode, value.detach(), device), value.requires_grad))
                module._parameters[name] = known[value]
        for name, value in module._buffers.items():
            module._buffers[name] = None if value is None else FakeTensor(mode, value, device)
        if isinstance(module, S2Linear):
            module.where = module.index


def with_slices(model: nn.Module, structure: Structure, config: S2FTConfig) -> nn.Module:
    """A model with evenly spread units trained: what is needed does not depend on which."""
    model.requires_grad_(False)
    for kind in KINDS:
        for layer, count in enumerate(_even(structure, kind, config.ratios[kind])):
            if count:
                target = structure.target(kind, layer)
                index = structure.positions(kind, layer, range(count))
                linear = model.get_submodule(target.path)
                form: Form = "delta" if not config.in_place else "gather"
                model.set_submodule(target.path, S2Linear(linear, index, target.side, form))
    return model


def _even(structure: Structure, kind: Kind, ratio: float) -> list[int]:
    """Counts per layer that add up to what is trained."""
    units = structure.units(kind)
    layers, total = len(units), unit_count(ratio, sum(units))
    return [total * (layer + 1) // layers - total * layer // layers for layer in range(layers)]


def lora_targets(structure: Structure) -> list[str]:
    """The linear maps that LoRA adapts in the paper's recipe: q, k, v, up and down."""
    family = structure.family
    return list(dict.fromkeys((family.q, family.k, family.v, family.upstream[-1], family.down)))


def lora_rank(model: nn.Module, structure: Structure, trained: int) -> int:
    """The rank at which LoRA trains most nearly as many parameters."""
    shapes = shapes_of(model)
    per_rank = sum(sum(shapes[structure.path(layer, name)]) for layer in structure.layers for name in lora_targets(structure))
    return max(1, round(trained / per_rank))


def with_lora(model: nn.Module, rank: int, structure: Structure) -> nn.Module:
    """The same model with peft's LoRA, dropout off."""
    peft = require("peft", "language")
    paths = [structure.path(layer, name) for layer in structure.layers for name in lora_targets(structure)]
    return peft.get_peft_model(
        model, peft.LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=paths, task_type="CAUSAL_LM")
    )
