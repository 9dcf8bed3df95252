"""What training needs in memory: bytes that autograd keeps for the backward pass (counted), gradients, and the optimizer's state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fewer.language._shared.lora import lora_rank, with_lora
from fewer.language._shared.structure import KINDS, Kind, Structure, structure_of
from fewer.language.s2ft.config import S2FTConfig
from fewer.language.s2ft.selection import unit_count
from fewer.language.s2ft.slice_linear import Form, S2Linear
from fewer.meters import saved_bytes


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
