"""A model's linear maps exchanged for others, and put back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

Select = Callable[[str, nn.Linear], bool]
Layer = TypeVar("Layer", bound=nn.Linear)
HOOKS = frozenset(kind for kind in vars(nn.Module()) if "hooks" in kind and "state_dict" not in kind)  # of passes forward and backward


def exclude_head(model: nn.Module) -> Select:
    """Takes every linear map but a language model's head and maps that share their weight with an embedding."""
    embedded = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    head = id(output.weight) if isinstance(output, nn.Linear) else None
    return lambda name, linear: id(linear.weight) not in embedded and id(linear.weight) != head and name.split(".")[-1] != "lm_head"


def linear_maps(model: nn.Module, select: Select | None = None) -> Iterator[tuple[str, nn.Linear]]:
    """(name, module) of each plain linear map that `select` takes (by default `exclude_head(model)`), in the model's order.

    Raises:
        TypeError: one of them is quantised already, or wrapped by an adapter; the message names it. Or the model is a linear map itself.
    """
    if isinstance(model, nn.Linear):
        raise TypeError(f"the model is a {type(model).__name__} itself; expected a model that has such layers: wrap it in nn.Sequential")
    select = select or exclude_head(model)
    adapted = tuple(f"{name}." for name, module in model.named_modules() if hasattr(module, "base_layer"))
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or isinstance(module, NonDynamicallyQuantizableLinear) or not select(name, module):
            continue  # attention of torch reads its projection's weight past the module
        if adapted and name.startswith(adapted):
            raise TypeError(f"{name} belongs to an adapter (LoRA or the like); expected a plain nn.Linear: merge the adapter first")
        plain = type(module) is nn.Linear and isinstance(module.weight, nn.Parameter) and type(module.weight.data) is Tensor
        if not plain or not module.weight.is_floating_point():  # a normed or pruned weight is made anew by a hook, and no parameter
            kind = f"{type(module).__name__} with weights of {type(module.weight.data).__name__} {module.weight.dtype}"
            raise TypeError(f"{name} is a {kind}; expected a plain nn.Linear of floating point weights: revert or dequantise it first")
        yield name, module


def exchange(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one of that name, wherever else that one stands too; its hooks stay."""
    before = model.get_submodule(name)
    vars(module).update({kind: hooks for kind, hooks in vars(before).items() if kind in HOOKS})
    places = [(owner, last) for owner in model.modules() for last, each in owner._modules.items() if each is before]
    for owner, last in places:
        owner._modules[last] = module


def with_parameters_of(kind: type[Layer], linear: nn.Linear) -> Layer:
    """A layer of that kind with a linear map's parameters, the very tensors, in its mode; what the kind adds is left to set."""
    made = kind.__new__(kind)
    nn.Module.__init__(made)
    made.in_features, made.out_features = linear.in_features, linear.out_features
    made.weight, made.bias = linear.weight, linear.bias
    return made.train(linear.training)


def converted(model: nn.Module, kind: type[Layer]) -> dict[str, Layer]:
    """Name -> layer of that kind, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def put_back(model: nn.Module, kind: type[nn.Linear]) -> list[str]:
    """Exchange the layers of that kind for plain ones with the same parameters, the very tensors; their names."""
    found = converted(model, kind)
    for name, layer in found.items():
        exchange(model, name, with_parameters_of(nn.Linear, layer))
    return list(found)
