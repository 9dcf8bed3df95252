"""A small Llama trained from scratch, recipe after recipe, and what is looked at in its casts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM  # here, so that a trial's process has it already

from fewer.language._shared.from_scratch import Ground
from fewer.lowbit._shared.conversion import converted, linear_maps
from fewer.lowbit._shared.figures import saturation, underflow
from fewer.lowbit.fp4_training.casts import Operand, Product
from fewer.lowbit.fp4_training.gradients import through_cast
from fewer.lowbit.fp4_training.linear import FP4Linear
from fewer.lowbit.fp4_training.recipe import FP4Recipe

EXACT = FP4Recipe(element="fp32")


def small_llama(ground: Ground, seed: int, layers: int) -> Any:
    """Random weights in the study's sizes; the head is tied to the embedding."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = ground.sizes | {"num_hidden_layers": layers, "intermediate_size": 3 * ground.sizes["hidden_size"]}
    return LlamaForCausalLM(LlamaConfig(**sizes))


def multiply_gradients(model: nn.Module, recipe: FP4Recipe) -> None:
    """The weights' gradients times a recipe's derivative of the cast, and nothing else of it: what an estimator does to the step's size."""
    for _, linear in linear_maps(model):
        weight = linear.weight
        weight.register_hook(lambda g, weight=weight: through_cast(g, weight.detach(), recipe, 1))


def four_bit_layers(model: nn.Module) -> dict[str, FP4Linear]:
    return converted(model, FP4Linear)


@contextlib.contextmanager
def no_step_counted(model: nn.Module) -> Iterator[None]:
    """Passes in which the layers stay at the steps where they stand."""
    kept = {layer: layer.steps for layer in four_bit_layers(model).values()}
    try:
        yield
    finally:
        for layer, steps in kept.items():
            layer.steps = steps


@contextlib.contextmanager
def exactly(model: nn.Module) -> Iterator[None]:
    """Products in full precision, and no step counted."""
    kept = {layer: layer.recipe for layer in four_bit_layers(model).values()}
    try:
        with no_step_counted(model):
            for layer in kept:
                layer.recipe = EXACT
            yield
    finally:
        for layer, recipe in kept.items():
            layer.recipe = recipe


def gradient_cosine(model: Any, ids: Tensor) -> float:
    """The cosine of the converted weights' gradient to the one that exact products give, on a batch of tokens."""
    layers = list(four_bit_layers(model).values())

    def gradient() -> Tensor:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        return torch.cat([each.flatten() for each in torch.autograd.grad(loss, [layer.weight for layer in layers])])

    with no_step_counted(model):
        ours = gradient()
    with exactly(model):
        exact = gradient()
    return float(torch.nn.functional.cosine_similarity(ours.double(), exact.double(), dim=0))


def lost_shares(model: Any, ids: Tensor) -> dict[str, tuple[float, float]]:
    """Operand -> the share of its values that are cast to zero, and of those beyond their block's largest code; means over layers."""
    found: dict[str, list[tuple[float, float]]] = {}
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    layers = four_bit_layers(model)
    hooks = []
    for name, layer in layers.items():

        def look(module: nn.Module, given: Any, made: Tensor, name: str = name) -> None:
            made.register_hook(lambda dy: seen.update({name: (given[0].detach().flatten(0, -2), dy.flatten(0, -2))}))

        hooks.append(layer.register_forward_hook(look))
    with no_step_counted(model):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    model.zero_grad()
    for hook in hooks:
        hook.remove()
    for name, layer in layers.items():
        x, dy = seen[name]
        w = layer.weight.detach()
        casts = layer.casts()
        looked: tuple[tuple[str, Operand, Product, Tensor, int], ...] = (
            ("X", "x", "forward", x, 1), ("W", "w", "forward", w, 1), ("W transposed", "w_dgrad", "dgrad", w, 0),
            ("dY", "dy", "dgrad", dy, 1), ("dY transposed", "dy", "wgrad", dy, 0), ("X transposed", "x_wgrad", "wgrad", x, 0),
        )  # fmt: skip
        for told, operand, product, tensor, dim in looked:
            turned = casts.rotated(tensor, product, dim).contiguous()
            lost = underflow(turned, casts.cast(turned, operand, product, dim))
            found.setdefault(told, []).append((lost, saturation(turned, layer.recipe.format, dim)))
    return {told: (sum(a for a, _ in each) / len(each), sum(b for _, b in each) / len(each)) for told, each in found.items()}


def model_overhead(model: nn.Module, tokens: int) -> float:
    """The casts' elementwise operations over the products' multiplications and additions, all converted layers of a step."""
    operations = products = 0.0
    for layer in four_bit_layers(model).values():
        n, k = layer.weight.shape
        operations += layer.recipe.overhead(tokens, k, n).operations
        products += 6 * tokens * n * k
    return operations / products if products else 0.0
