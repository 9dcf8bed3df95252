"""Forward-Forward: every layer learns to tell images with their true label from images with a wrong one.

Hinton 2022, in the variant that arXiv 2509.19063 and 2511.01061 release (after Hinton's own code).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from fewer.checks import check_choice, check_not_negative, check_positive, check_whole
from fewer.fitting import (
    Batches,
    BestState,
    Callback,
    Examples,
    History,
    check_labels,
    check_validation,
    check_width,
    fit_stages,
    mean_losses_and_accuracies,
    over_batches,
)
from fewer.forward_only._shared.backpropagation import check_precision, check_sizes
from fewer.forward_only.backprop_free_mlps.layers.goodness import PEER_START, goodness, set_layer_gradients
from fewer.forward_only.backprop_free_mlps.layers.label_embedding import (
    Activity,
    LabelledImages,
    embed_neutral,
    normalised,
    normalised_output,
    wrong_labels,
)
from fewer.forward_only.backprop_free_mlps.layers.local_loss import cross_entropy_gradient, projection_gradient

CANDIDATE_ROWS = 256  # labelled rows that `forward` has in work at a time: no more than training has


@dataclass(frozen=True)
class ForwardForwardConfig:
    """How `fit_forward_forward` trains; the defaults are the release's tuned values for MNIST on 3x1000.

    Its values for Fashion-MNIST on 4x2000: lr 3.72e-4, weight_decay 3.6e-4, downstream_lr 1.11e-2, downstream_weight_decay 5.1e-3.

    Args:
        lr: learning rate of the layers; constant for half of the epochs, then falling in a straight line to 2/epochs of it.
        weight_decay: of the layers.
        downstream_lr: learning rate of the downstream classifier, which falls alike.
        downstream_weight_decay: of the downstream classifier.
        optimizer: "adamw", or "sgd" with momentum 0.9; one for all layers, with two groups of parameters.
        epochs: passes over the data at most, and the length of the learning rate's course.
        batch_size: rows in a batch, each of which is seen with a true and with a wrong label; a DataLoader keeps its own.
        patience: epochs without a better validation accuracy before stopping; None never stops early. The best state is kept.

    Raises:
        ValueError: a value that cannot be used.
    """

    lr: float = 4.76e-4
    weight_decay: float = 4.2e-4
    downstream_lr: float = 1.07e-2
    downstream_weight_decay: float = 6.2e-3
    optimizer: Literal["adamw", "sgd"] = "adamw"
    epochs: int = 100
    batch_size: int = 100
    patience: int | None = 20

    def __post_init__(self) -> None:
        check_choice(["adamw", "sgd"], optimizer=self.optimizer)
        check_positive(lr=self.lr, downstream_lr=self.downstream_lr)
        check_not_negative(weight_decay=self.weight_decay, downstream_weight_decay=self.downstream_weight_decay)
        check_whole(optional=["patience"], epochs=self.epochs, batch_size=self.batch_size, patience=self.patience)


class ForwardForwardMLP(nn.Module):
    """A multi-layer perceptron whose layers say by their activity how well an image and a label go together.

    a_i = ReLU(W_i h_{i-1} + b_i) with h_i = a_i / (sqrt(mean(a_i^2)) + 1e-8), h_0 the normalised image whose first C entries are the
    one-hot label. A class is scored by the goodness sum(a_i^2) of layers 2..L (of layer 1 where it is the only one).

    Args:
        in_features: entries of an example, flattened; more than C, as the label takes the place of the first C.
        hidden_sizes: widths d_1, ..., d_L of the layers; at least one.
        num_classes: C, at least 2.
        activation: "relu", the only one for which the method is defined.

    Attributes:
        layers: W_i and b_i as `nn.Linear`; W normal with standard deviation 1/sqrt(d_i), b = 0.
        downstream: linear classifier without bias of the concatenated h_2, ..., h_L (h_1 where it is the only one); zero.

    Raises:
        ValueError: a size or a name that cannot be used.

    Examples:
        >>> model = ForwardForwardMLP(in_features=64, hidden_sizes=(32, 16), num_classes=10)
        >>> model(torch.zeros(5, 8, 8)).shape, model.classify(torch.zeros(5, 64)).shape
        (torch.Size([5, 10]), torch.Size([5, 10]))
    """

    def __init__(self, in_features: int, hidden_sizes: Sequence[int], num_classes: int, activation: Literal["relu"] = "relu") -> None:
        super().__init__()
        check_sizes(in_features, hidden_sizes, num_classes)
        check_choice(["relu"], activation=activation)
        if num_classes >= in_features:
            raise ValueError(
                f"{num_classes} classes and {in_features} input features; expected fewer classes than features, as the label takes the "
                f"place of the first {num_classes} features: put {num_classes} columns of zeros before them"
            )
        self.in_features, self.num_classes, self.activation = in_features, num_classes, activation
        layers = [nn.Linear(into, width) for into, width in itertools.pairwise([in_features, *hidden_sizes])]
        self.layers = cast("Sequence[nn.Linear]", nn.ModuleList(layers))
        self.downstream = nn.Linear(sum(hidden_sizes[1:]) or hidden_sizes[0], num_classes, bias=False)
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=1 / math.sqrt(layer.out_features))
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.downstream.weight)

    @property
    def judges(self) -> slice:
        """The layers that count in a prediction: 2..L, or the only one."""
        return slice(1 if len(self.layers) > 1 else 0, None)

    def layer_goodness(self, x_with_label: Float[Tensor, "batch ..."]) -> list[Float[Tensor, "batch"]]:
        """The goodness of each layer for images that hold a label already (see `embed_labels`).

        Raises:
            ValueError: the images are not `in_features` wide.
        """
        check_width(x_with_label, self.in_features, "x_with_label")
        return [g for _, g in self._pass(Activity(normalised(x_with_label.flatten(1))))]

    def forward(self, x: Float[Tensor, "batch ..."], candidates: Sequence[int] | None = None) -> Float[Tensor, "batch classes"]:
        """Goodness scores, float32 at least: each candidate label is written into the image in turn, and the layers judge.

        Args:
            x: images; what stands in the first C entries is not read.
            candidates: the labels to try, all by default; the others score minus infinity.

        Raises:
            ValueError: x is not `in_features` wide, or candidates is empty or holds what is no class.
        """
        check_width(x, self.in_features)
        tried = torch.arange(self.num_classes) if candidates is None else torch.as_tensor(candidates)
        if len(tried) == 0:
            raise ValueError(f"candidates is empty; expected at least one of 0..{self.num_classes - 1}: leave it out to try all")
        check_labels(tried, len(tried), self.num_classes)
        tried = tried.to(x.device, torch.long)
        parts = x.flatten(1).split(max(1, CANDIDATE_ROWS // len(tried)))
        scores = torch.cat([self._candidate_goodness(part, tried) for part in parts])
        if candidates is None:
            return scores
        return scores.new_full((len(x), self.num_classes), -math.inf).index_copy(1, tried, scores)

    def classify(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch classes"]:
        """Logits of the downstream classifier, from one pass with the neutral label (0.1 in the first C entries).

        A classifier of its own, quicker than `forward`: its accuracy is not Forward-Forward's.

        Raises:
            ValueError: x is not `in_features` wide.
        """
        check_width(x, self.in_features)
        passed = self._pass(Activity(normalised(embed_neutral(x.flatten(1), self.num_classes))))
        outputs = [normalised_output(a, g) for a, g in passed]
        return self.downstream(torch.cat(outputs[self.judges], dim=1))

    def _candidate_goodness(self, x: Float[Tensor, "batch features"], tried: Int[Tensor, "tried"]) -> Float[Tensor, "batch tried"]:
        labelled = LabelledImages(x, tried.repeat_interleave(len(x)), self.num_classes)
        judged = [g for _, g in self._pass(labelled)][self.judges]
        return torch.stack(judged).sum(0).view(len(tried), len(x)).T

    def _pass(self, h: LabelledImages | Activity) -> Iterator[tuple[Float[Tensor, "batch width"], Float[Tensor, "batch"]]]:
        """(activation, goodness) of layer after layer."""
        for layer in self.layers:
            a = h.preactivation(layer).relu_()
            g = goodness(a)
            yield a, g
            h = Activity(normalised_output(a, g))


class ForwardForwardTrainer:
    """Takes Forward-Forward's steps: every layer by its own loss, and the downstream classifier beside them.

    Attributes:
        optimizer: one, with two groups of parameters: the layers' and the downstream classifier's.
        peer_means: each layer's running means of its units' activity with true labels.
    """

    def __init__(self, model: ForwardForwardMLP, config: ForwardForwardConfig, generator: torch.Generator | None) -> None:
        self.model, self.generator = model, generator
        groups = [
            {"params": [p for layer in model.layers for p in layer.parameters()], "lr": config.lr, "weight_decay": config.weight_decay},
            {"params": model.downstream.parameters(), "lr": config.downstream_lr, "weight_decay": config.downstream_weight_decay},
        ]
        adamw = config.optimizer == "adamw"
        self.optimizer = torch.optim.AdamW(groups, fused=True) if adamw else torch.optim.SGD(groups, momentum=0.9, fused=True)
        self.peer_means = [torch.full_like(layer.bias, PEER_START, requires_grad=False) for layer in model.layers]

    @torch.no_grad()
    def step(self, x: Float[Tensor, "batch features"], y: Int[Tensor, "batch"]) -> Float[Tensor, "stages"]:
        """Take one step on a batch; returns the mean losses of the layers, of the downstream classifier, and their sum."""
        labels = torch.cat([y, wrong_labels(y, self.model.num_classes, self.generator)])
        h: LabelledImages | Activity = LabelledImages(x, labels, self.model.num_classes)
        losses, outputs = [], []
        for layer, m in zip(self.model.layers, self.peer_means, strict=True):
            loss, output = set_layer_gradients(layer, h, m)
            self._update()
            losses.append(loss)
            outputs.append(output[: len(y)])
            h = Activity(output)
        losses.append(self._train_downstream(torch.cat(outputs[self.model.judges], dim=1), y))
        return torch.stack([*losses, torch.stack(losses).sum()])

    def _train_downstream(self, features: Float[Tensor, "batch width"], y: Int[Tensor, "batch"]) -> Float[Tensor, ""]:
        scores = self.model.downstream(features)
        self.model.downstream.weight.grad = projection_gradient(cross_entropy_gradient(scores, y), features)
        self._update()
        return F.cross_entropy(scores, y)

    def _update(self) -> None:
        """Move the parameters that have a gradient; no other layer's gradient exists at the same time."""
        self.optimizer.step()
        self.optimizer.zero_grad()


def learning_rate_factor(epoch: int, epochs: int) -> float:
    """min(1, 2 (1 + E - e) / E): 1 for the first half of the E epochs, 2/E in the last.

    >>> [learning_rate_factor(epoch, 6) for epoch in range(1, 7)]
    [1.0, 1.0, 1.0, 1.0, 0.6666666666666666, 0.3333333333333333]
    """
    return min(1.0, 2 * (1 + epochs - epoch) / epochs)


def fit_forward_forward(
    model: ForwardForwardMLP,
    x: Float[Tensor, "rows ..."] | DataLoader,
    y: Int[Tensor, "rows"] | None,
    *,
    validation: tuple[Tensor, Tensor] | DataLoader | None,
    config: ForwardForwardConfig | None = None,
    callbacks: Iterable[Callback] = (),
    generator: torch.Generator | None = None,
) -> History:
    """Train all layers side by side, each from its own loss in closed form; no gradient crosses a layer and no graph is built.

    Args:
        model: trained in place, where it is (CPU or CUDA) and in its dtype.
        x: examples, or a DataLoader of (x, y) batches. What stands in the first C entries of an example is not read.
        y: labels 0..C-1; None with a DataLoader.
        validation: (x, y) or a DataLoader, for early stopping on the accuracy of `model(x)`; None only with `patience=None`.
        config: default `ForwardForwardConfig()`.
        callbacks: each is called with every `Epoch` as it ends.
        generator: shuffles the batches and draws the wrong labels; the same one and the same initial model give the same result.

    Returns:
        The history: stages "layer 1", ..., "downstream" (the downstream classifier's figures, not Forward-Forward's), and "network",
        whose train loss is the sum of the others and whose validation figures are those of the goodness scores.

    Raises:
        ValueError: data that cannot be used.
        FloatingPointError: a loss or a weight is not finite; the message names layer and epoch, and the last finite state is kept.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(200, 6)
        >>> y = (x[:, 5] > 0).long()
        >>> model = ForwardForwardMLP(6, (32, 32), 2)
        >>> config = ForwardForwardConfig(lr=1e-2, epochs=30, batch_size=25)
        >>> history = fit_forward_forward(model, x[:150], y[:150], validation=(x[150:], y[150:]), config=config)
        >>> history.epochs[-1].stage, max(line.validation_accuracy for line in history.epochs if line.stage == "network") > 0.9
        ('network', True)
    """
    config = config or ForwardForwardConfig()
    check_precision(model)
    check_validation(validation, config.patience)
    train = Examples(x, y, num_classes=model.num_classes, in_features=model.in_features)
    held_out = Examples.of_validation(validation, num_classes=model.num_classes, in_features=model.in_features)
    trainer = ForwardForwardTrainer(model, config, generator)
    schedule = LambdaLR(trainer.optimizer, lambda done: learning_rate_factor(done + 1, config.epochs))
    stages = [f"layer {i}" for i in range(1, len(model.layers) + 1)] + ["downstream", "network"]
    weight = model.layers[0].weight

    def batches(examples: Examples | None, shuffle: bool = False) -> Batches:
        if examples is None:
            return
        for xb, yb in examples.batches(config.batch_size, generator=generator, shuffle=shuffle, device=weight.device):
            yield xb.flatten(1).to(weight.dtype), yb

    def epoch() -> Batches:
        yield from batches(train, shuffle=True)
        schedule.step()

    def validate() -> list[tuple[float, float]]:
        figures = mean_losses_and_accuracies(lambda xb: [model.classify(xb), model(xb)], batches(held_out), 2)
        return [(math.nan, math.nan)] * len(model.layers) + figures

    history = History()
    fit_stages(
        stages,
        over_batches(trainer.step, epoch),
        validate,
        state=BestState([model], config.patience),
        epochs=config.epochs,
        history=history,
        callbacks=list(callbacks),
        score=lambda line: line.validation_accuracy,
    )
    return history.stop_clock()
