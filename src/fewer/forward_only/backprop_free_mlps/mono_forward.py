"""Mono-Forward: every layer learns from the cross-entropy of its own linear read-out (Gong et al. 2025; arXiv 2509.19063, 2511.01061)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fewer.checks import check_choice, check_not_negative, check_positive, check_whole
from fewer.fitting import (
    Batches,
    BestState,
    Callback,
    Examples,
    History,
    check_validation,
    check_width,
    fit_stages,
    mean_loss_and_accuracy,
    mean_losses_and_accuracies,
    over_batches,
)
from fewer.forward_only._shared.backpropagation import check_precision, check_sizes
from fewer.forward_only.backprop_free_mlps.layers.layer_inputs import LayerInputs, cache_size
from fewer.forward_only.backprop_free_mlps.layers.layer_training import (
    ACTIVATIONS,
    Activation,
    LayerTrainer,
    ProjectionTrainer,
    layer_output,
    set_layer_gradients,
    set_projection_gradient,
)

INPUT_STAGE = "input projection"


@dataclass(frozen=True)
class MonoForwardConfig:
    """How `fit_mono_forward` trains; the defaults are the release's tuned values for MNIST (Fashion-MNIST: lr 3.87e-4, 12 epochs).

    Args:
        schedule: "sequential" trains layer 1 to convergence, freezes it, then layer 2, ... (the released code); "simultaneous" gives
            every layer its own step on each batch (the original idea).
        lr: learning rate of Adam, which starts afresh for each layer; no weight decay.
        epochs_per_layer: passes over the data that a layer gets at most.
        batch_size: rows in a batch; a DataLoader keeps its own.
        patience: epochs without improvement of the validation loss before a layer stops; None never stops early. The best state is
            kept (the released code keeps the last).
        min_delta: by how much the validation loss must fall to count as better.
        train_input_projection: train M_0 too, a linear classifier of the raw input: a diagnosis, no part of the prediction.
        cache_bytes: the sequential schedule keeps the inputs of the layer in training if they fit in so many bytes, and computes
            them anew for every batch otherwise (the history's notes say so).

    Raises:
        ValueError: a value that cannot be used.
    """

    schedule: Literal["sequential", "simultaneous"] = "sequential"
    lr: float = 1.57e-3
    epochs_per_layer: int = 14
    batch_size: int = 128
    patience: int | None = 5
    min_delta: float = 1e-4
    train_input_projection: bool = True
    cache_bytes: int = 2 * 2**30

    def __post_init__(self) -> None:
        check_choice(["sequential", "simultaneous"], schedule=self.schedule)
        check_positive(lr=self.lr)
        check_whole(optional=["patience"], epochs_per_layer=self.epochs_per_layer, batch_size=self.batch_size, patience=self.patience)
        check_not_negative(min_delta=self.min_delta, cache_bytes=self.cache_bytes)


class MonoForwardMLP(nn.Module):
    """A multi-layer perceptron whose activations each have a linear read-out.

    a_0 = x, a_i = act(W_i a_{i-1} + b_i), G_i = a_i M_i^T. Train it with `fit_mono_forward`, or take the gradients from
    `local_gradients` and any optimiser.

    Args:
        in_features: entries of an example, flattened.
        hidden_sizes: widths d_1, ..., d_L of the hidden layers; at least one.
        num_classes: C, at least 2.
        activation: "relu" (the paper's) or "tanh".
        prediction: "last" scores a class by G_L (as released), "sum" by G_1 + ... + G_L. G_0 is never counted: it belongs to a
            linear classifier.

    Attributes:
        layers: W_i and b_i as `nn.Linear`, i = 1..L; W Kaiming-uniform with a = sqrt(5), b = 0.
        projections: M_i as `nn.Linear` without bias, i = 0..L; Kaiming-uniform with a = sqrt(5).

    Raises:
        ValueError: a size or a name that cannot be used.

    Examples:
        >>> model = MonoForwardMLP(in_features=64, hidden_sizes=(32, 16), num_classes=10)
        >>> model(torch.zeros(5, 64)).shape
        torch.Size([5, 10])
        >>> [tuple(a.shape) for a in model.activations(torch.zeros(5, 8, 8))]
        [(5, 64), (5, 32), (5, 16)]
    """

    def __init__(
        self,
        in_features: int,
        hidden_sizes: Sequence[int],
        num_classes: int,
        activation: Activation = "relu",
        prediction: Literal["last", "sum"] = "last",
    ) -> None:
        super().__init__()
        check_sizes(in_features, hidden_sizes, num_classes)
        check_choice(list(ACTIVATIONS), activation=activation)
        check_choice(["last", "sum"], prediction=prediction)
        self.in_features, self.num_classes = in_features, num_classes
        self.activation: Activation = activation
        self.prediction = prediction
        widths = [in_features, *hidden_sizes]
        layers = [nn.Linear(into, width) for into, width in zip(widths, hidden_sizes, strict=False)]
        self.layers = cast("Sequence[nn.Linear]", nn.ModuleList(layers))
        self.projections = cast("Sequence[nn.Linear]", nn.ModuleList(nn.Linear(width, num_classes, bias=False) for width in widths))
        for layer in self.layers:
            nn.init.zeros_(layer.bias)

    def activations(self, x: Float[Tensor, "batch ..."]) -> list[Float[Tensor, "batch width"]]:
        """a_0 (x flattened), a_1, ..., a_L.

        Raises:
            ValueError: x is not `in_features` wide.
        """
        check_width(x, self.in_features)
        outputs = [x.flatten(1)]
        for layer in self.layers:
            outputs.append(layer_output(layer, outputs[-1], self.activation))
        return outputs

    def goodness(self, x: Float[Tensor, "batch ..."]) -> list[Float[Tensor, "batch classes"]]:
        """G_0, G_1, ..., G_L."""
        return [projection(a) for projection, a in zip(self.projections, self.activations(x), strict=True)]

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch classes"]:
        """The scores of the classes: G_L, or the sum over the hidden layers."""
        if self.prediction == "last":
            return self.projections[-1](self.activations(x)[-1])
        return torch.stack(self.goodness(x)[1:]).sum(0)

    def layer_gradients(
        self, i: int, a: Float[Tensor, "batch in"], y: Int[Tensor, "batch"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "batch width"]]:
        """Set `.grad` of W_i, b_i and M_i (i = 1..L) to the gradients of layer i's own loss, in closed form.

        Args:
            i: the layer, from 1.
            a: its input a_{i-1}.
            y: labels 0..C-1.

        Returns:
            The loss, and a_i, which the next layer may work on at once, on another machine if need be: there is no backward pass
            to wait for.
        """
        return set_layer_gradients(self.layers[i - 1], self.projections[i], a, y, self.activation)

    def local_gradients(self, x: Float[Tensor, "batch ..."], y: Int[Tensor, "batch"]) -> Float[Tensor, "stages"]:
        """Set `.grad` of every parameter to the gradient of its own layer's loss, in closed form; returns the losses of G_0..G_L.

        For optimisers of your own, and for data-parallel training: let each process take its share of the batch, average the
        gradients (`torch.distributed.all_reduce(p.grad)`, then divide by the number of processes), and step.

        Examples:
            >>> model = MonoForwardMLP(4, (8,), 3)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> losses = model.local_gradients(torch.ones(6, 4), torch.zeros(6, dtype=torch.long))
            >>> optimizer.step()
            >>> losses.shape
            torch.Size([2])
        """
        check_width(x, self.in_features)
        a = x.flatten(1)
        losses = [set_projection_gradient(self.projections[0], a, y)]
        for i in range(1, len(self.layers) + 1):
            loss, a = self.layer_gradients(i, a, y)
            losses.append(loss)
        return torch.stack(losses)


def fit_mono_forward(
    model: MonoForwardMLP,
    x: Float[Tensor, "rows ..."] | DataLoader,
    y: Int[Tensor, "rows"] | None,
    *,
    validation: tuple[Tensor, Tensor] | DataLoader | None,
    config: MonoForwardConfig | None = None,
    callbacks: Iterable[Callback] = (),
    generator: torch.Generator | None = None,
) -> History:
    """Train every layer from its own loss; no gradient crosses a layer and no graph is built.

    The sequential schedule holds gradients and Adam state of one layer at a time.

    Args:
        model: trained in place, where it is (CPU or CUDA) and in its dtype.
        x: examples, or a DataLoader of (x, y) batches (its inputs are then computed anew for every batch).
        y: labels 0..C-1; None with a DataLoader.
        validation: (x, y) or a DataLoader, for early stopping; None only with `patience=None`.
        config: default `MonoForwardConfig()`.
        callbacks: each is called with every `Epoch` as it ends.
        generator: shuffles the batches; the same one and the same initial model give the same result, bit for bit on a CPU.

    Returns:
        The history: stages "input projection" (a linear classifier's figures, not the network's), "layer 1", ..., and with the
        simultaneous schedule "network", whose train loss is the mean over the layers and on whose validation loss it stops.

    Raises:
        ValueError: data that cannot be used.
        FloatingPointError: a loss or a weight is not finite; the message names layer and epoch, and the last finite state is kept.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(200, 4)
        >>> y = (x[:, 0] > 0).long()
        >>> model = MonoForwardMLP(4, (16,), 2)
        >>> config = MonoForwardConfig(lr=1e-2, epochs_per_layer=20, batch_size=50)
        >>> history = fit_mono_forward(model, x[:150], y[:150], validation=(x[150:], y[150:]), config=config)
        >>> history.epochs[-1].stage, history.epochs[-1].validation_accuracy > 0.9
        ('layer 1', True)
    """
    config = config or MonoForwardConfig()
    check_precision(model)
    check_validation(validation, config.patience)
    train = Examples(x, y, num_classes=model.num_classes, in_features=model.in_features)
    held_out = Examples.of_validation(validation, num_classes=model.num_classes, in_features=model.in_features)
    history = History()
    fit = _fit_sequentially if config.schedule == "sequential" else _fit_simultaneously
    fit(model, train, held_out, config, history, list(callbacks), generator)
    return history.stop_clock()


def _fit_sequentially(
    model: MonoForwardMLP,
    train: Examples,
    held_out: Examples | None,
    config: MonoForwardConfig,
    history: History,
    callbacks: list[Callback],
    generator: torch.Generator | None,
) -> None:
    widths = [layer.out_features for layer in model.layers[:-1]]
    cache = cache_size(train, widths) + cache_size(held_out, widths)
    fits = cache <= config.cache_bytes
    history.cache_bytes = cache if fits else 0
    if widths and train.loader is not None:
        history.notes.append("x is a DataLoader: the inputs of layers 2 and up were computed anew for every batch")
    if not fits:
        history.notes.append(
            f"keeping the layers' inputs takes {cache} bytes, above cache_bytes={config.cache_bytes}: they were computed anew for every batch"
        )

    def inputs_of(examples: Examples) -> LayerInputs:
        return LayerInputs(
            examples,
            like=model.layers[0].weight,
            activation=model.activation,
            batch_size=config.batch_size,
            widths=widths,
            cached=fits and examples.loader is None,
        )

    inputs, held_out_inputs = inputs_of(train), inputs_of(held_out) if held_out else None

    def train_to_convergence(stage: str, trainer: ProjectionTrainer | LayerTrainer) -> None:
        fit_stages(
            [stage],
            over_batches(trainer.step, lambda: inputs.batches(shuffle=True, generator=generator)),
            lambda: [mean_loss_and_accuracy(trainer.scores, held_out_inputs.batches() if held_out_inputs else ())],
            state=BestState(trainer.modules, config.patience, config.min_delta, stage),
            epochs=config.epochs_per_layer,
            history=history,
            callbacks=callbacks,
        )

    if config.train_input_projection:
        train_to_convergence(INPUT_STAGE, ProjectionTrainer(model.projections[0], config.lr))
    for i, (layer, projection) in enumerate(zip(model.layers, model.projections[1:], strict=True), start=1):
        train_to_convergence(f"layer {i}", LayerTrainer(layer, projection, model.activation, config.lr))
        if i < len(model.layers):
            for each in filter(None, [inputs, held_out_inputs]):
                each.freeze(layer)


def _fit_simultaneously(
    model: MonoForwardMLP,
    train: Examples,
    held_out: Examples | None,
    config: MonoForwardConfig,
    history: History,
    callbacks: list[Callback],
    generator: torch.Generator | None,
) -> None:
    trainers = [
        LayerTrainer(layer, projection, model.activation, config.lr)
        for layer, projection in zip(model.layers, model.projections[1:], strict=True)
    ]
    input_trainer = ProjectionTrainer(model.projections[0], config.lr) if config.train_input_projection else None
    stages = [INPUT_STAGE] * config.train_input_projection + [f"layer {i}" for i in range(1, len(trainers) + 1)] + ["network"]
    weight = model.layers[0].weight

    def batches(examples: Examples | None, shuffle: bool = False) -> Batches:
        if examples is None:
            return
        for xb, yb in examples.batches(config.batch_size, generator=generator, shuffle=shuffle, device=weight.device):
            yield xb.flatten(1).to(weight.dtype), yb

    def step(xb: Tensor, yb: Tensor) -> Tensor:
        losses = [input_trainer.step(xb, yb)] if input_trainer else []
        for trainer in trainers:
            losses.append(trainer.step(xb, yb))
            xb = trainer.output
        return torch.stack([*losses, torch.stack(losses[-len(trainers) :]).mean()])

    def scores(xb: Tensor) -> list[Tensor]:
        goodness = model.goodness(xb)
        network = goodness[-1] if model.prediction == "last" else torch.stack(goodness[1:]).sum(0)
        return [*goodness[0 if input_trainer else 1 :], network]

    fit_stages(
        stages,
        over_batches(step, lambda: batches(train, shuffle=True)),
        lambda: mean_losses_and_accuracies(scores, batches(held_out), len(stages)),
        state=BestState([model], config.patience, config.min_delta),
        epochs=config.epochs_per_layer,
        history=history,
        callbacks=callbacks,
    )
