"""Low-rank adapters by peft: put on a model for a while and merged, or as what a method is compared with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn

from fewer.errors import require
from fewer.language._shared.structure import Structure, shapes_of


@contextlib.contextmanager
def adapted(model: nn.Module, config: Any, seed: int = 0) -> Iterator[Any]:
    """The model with adapters of a peft config inside the block, all else frozen; afterwards they are merged, in place.

    The adapters are float32 whatever the model is. What wanted a gradient before wants one again.
    """
    wanted = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    torch.manual_seed(seed)
    wrapped = require("peft", "language").get_peft_model(model, config)
    try:
        yield wrapped
    finally:
        wrapped.merge_and_unload()
        with contextlib.suppress(AttributeError):
            del cast(Any, model).peft_config
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in wanted)


def lora_targets(structure: Structure) -> list[str]:
    """The linear maps that LoRA is usually put on in a layer: q, k, v, up and down."""
    family = structure.family
    return list(dict.fromkeys((family.q, family.k, family.v, family.upstream[-1], family.down)))


def lora_rank(model: nn.Module, structure: Structure, trained: int) -> int:
    """The rank at which LoRA trains most nearly as many parameters."""
    shapes = shapes_of(model)
    per_rank = sum(sum(shapes[structure.path(layer, name)]) for layer in structure.layers for name in lora_targets(structure))
    return max(1, round(trained / per_rank))


def with_lora(model: nn.Module, rank: int, structure: Structure) -> Any:
    """The same model with peft's LoRA, dropout off."""
    peft = require("peft", "language")
    paths = [structure.path(layer, name) for layer in structure.layers for name in lora_targets(structure)]
    return peft.get_peft_model(
        model, peft.LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=paths, task_type="CAUSAL_LM")
    )
