"""Races: Mono-Forward's step against backpropagation's, kept inputs against recomputed ones, and the memory of both."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fewer.fitting import Examples
from fewer.forward_only._shared.backpropagation import BackpropagationConfig, fit_backpropagation, mlp
from fewer.forward_only.backprop_free_mlps.forward_forward import ForwardForwardMLP
from fewer.forward_only.backprop_free_mlps.layers.label_embedding import embed_labels
from fewer.forward_only.backprop_free_mlps.layers.layer_inputs import LayerInputs
from fewer.forward_only.backprop_free_mlps.layers.layer_training import LayerTrainer
from fewer.forward_only.backprop_free_mlps.mono_forward import MonoForwardConfig, MonoForwardMLP, fit_mono_forward
from fewer.meters import tensor_memory
from fewer.study import Bench

bench = Bench("backprop-free-mlps")
PIXELS, SIZES, CLASSES, BATCH = 784, (2000,) * 4, 10, 128

BESIDE = ["kept inputs", "kept states"]

Step = Callable[[], object]


def _batch(rows: int = BATCH) -> tuple[Tensor, Tensor]:
    """Images and labels of the shape that matters; what they show does not change the time."""
    draw = torch.Generator().manual_seed(0)
    return torch.randn(rows, PIXELS, generator=draw), torch.randint(CLASSES, (rows,), generator=draw)


@bench.race(
    "a step of all layers at once, MLP 4x2000, batch 128",
    peer="backpropagation with fused AdamW",
    reach=0.80,
)
def step() -> tuple[Step, Step]:  # M_0 reads the raw images and is no part of the network: left out
    x, y = _batch()
    model = MonoForwardMLP(PIXELS, SIZES, CLASSES)
    trainers = [LayerTrainer(layer, m, "relu", 1e-4) for layer, m in zip(model.layers, model.projections[1:], strict=True)]

    def ours() -> None:
        a = x
        for trainer in trainers:
            trainer.step(a, y)
            a = trainer.output

    twin = mlp(PIXELS, SIZES, CLASSES)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-4, fused=True)

    def theirs() -> None:
        optimizer.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        optimizer.step()

    return ours, theirs


def _last_layer(cached: bool) -> tuple[MonoForwardMLP, LayerInputs]:
    """A network 4x2000 whose last layer is to be trained, and the inputs of that layer."""
    torch.manual_seed(0)
    x, y = _batch(8 * BATCH)
    model = MonoForwardMLP(PIXELS, SIZES, CLASSES)
    examples = Examples(x, y, num_classes=CLASSES)
    inputs = LayerInputs(examples, like=x, activation="relu", batch_size=BATCH, widths=SIZES[:-1], cached=cached)
    for layer in model.layers[:-1]:
        inputs.freeze(layer)
    return model, inputs


def _epoch(cached: bool) -> Step:
    model, inputs = _last_layer(cached)
    trainer = LayerTrainer(model.layers[-1], model.projections[-1], "relu", 1e-4)
    return lambda: [trainer.step(*batch) for batch in inputs.batches(shuffle=True)]


@bench.race("an epoch of the last layer, MLP 4x2000", peer="the released scheme: inputs recomputed, autograd, torch.optim.Adam", reach=0.50)
def last_layer() -> tuple[Step, Step]:
    model, inputs = _last_layer(cached=False)
    layer, projection = model.layers[-1], model.projections[-1]
    optimizer = torch.optim.Adam([*layer.parameters(), *projection.parameters()], lr=1e-4)

    def released() -> None:
        for a, y in inputs.batches(shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(projection(layer(a).relu()), y).backward()
            optimizer.step()

    return _epoch(cached=True), released


@bench.race("the same epoch", peer="our own step on recomputed inputs")
def kept_inputs() -> tuple[Step, Step]:
    return _epoch(cached=True), _epoch(cached=False)


@bench.quantity(
    "peak tensor bytes, trained in turn, MLP 4x2000 (data, kept inputs and states kept for early stopping left out)",
    peer="backpropagation",
    unit="bytes",
    reach=0.45,
)
def memory() -> tuple[float, float]:
    x, y = _batch(2 * BATCH)
    model, twin = MonoForwardMLP(PIXELS, SIZES, CLASSES), mlp(PIXELS, SIZES, CLASSES)
    config = MonoForwardConfig(epochs_per_layer=1, patience=None, batch_size=BATCH)
    with tensor_memory(model, beside=BESIDE) as ours:
        fit_mono_forward(model, x, y, validation=None, config=config)
    with tensor_memory(twin, beside=BESIDE) as theirs:
        fit_backpropagation(twin, x, y, validation=None, config=BackpropagationConfig(epochs=1, patience=None, batch_size=BATCH))
    return ours.total, theirs.total


@bench.race("Forward-Forward's scores of 10 labels, MLP 4x2000, 128 images", peer="one pass for each label")
def candidates() -> tuple[Step, Step]:
    x, _ = _batch()
    model = ForwardForwardMLP(PIXELS, SIZES, CLASSES)

    @torch.no_grad()
    def ours() -> Tensor:
        return model(x)

    @torch.no_grad()
    def theirs() -> Tensor:
        labels = [torch.full((len(x),), label) for label in range(CLASSES)]
        return torch.stack(
            [torch.stack(model.layer_goodness(embed_labels(x, each, CLASSES))[model.judges]).sum(0) for each in labels], dim=1
        )

    return ours, theirs
