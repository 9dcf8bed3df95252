"""Cascaded-Forward: convolution blocks that no error passes through, each with a linear predictor of its own.

Zhao et al. 2023, in the variant that arXiv 2509.19063 and 2511.01061 release.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from fewer.checks import check_choice, check_not_negative, check_positive, check_whole
from fewer.fitting import (
    Batches,
    BestState,
    Callback,
    Examples,
    History,
    batches_of,
    check_validation,
    fit_stages,
    mean_loss_and_accuracy,
    over_batches,
)
from fewer.forward_only._shared.backpropagation import block_output_size, check_precision, check_sizes, convolution_block
from fewer.forward_only.backprop_free_mlps.layers.block_feedback import FeedbackTrainer
from fewer.forward_only.backprop_free_mlps.layers.layer_training import ProjectionTrainer
from fewer.forward_only.backprop_free_mlps.layers.ridge import fit_ridge
from fewer.meters import memory_for

CHUNK = 128  # images that a block works on at a time: its convolution's output is the largest thing in memory


@dataclass(frozen=True)
class CascadedForwardConfig:
    """How `fit_cascaded_forward` trains; the defaults are the release's tuned values for Fashion-MNIST.

    With `blocks="dfa"` the release has lr 3.3e-4, weight_decay 4e-5 and epochs 85 for the predictors.

    Args:
        blocks: "random" leaves the blocks as they were made (CaFo-Rand); "dfa" trains them first by direct feedback (CaFo-DFA).
        predictor_loss: "cross_entropy", by Adam; or "mse", ridge regression on one-hot labels in closed form.
        lr: learning rate of the predictors' Adam.
        weight_decay: of the predictors' Adam.
        epochs: passes over the data that a predictor gets at most.
        ridge: for "mse": what is added to the diagonal of A^T A, relative to its mean (the paper gives none; ours).
        block_lr: for "dfa": learning rate of the blocks' Adam.
        block_weight_decay: for "dfa": of the blocks' Adam.
        block_epochs: for "dfa": passes over the data for the blocks.
        batch_size: rows in a batch.
        patience: epochs without improvement of a predictor's validation loss before it stops; None never stops early. The best state
            is kept.
        min_delta: by how much the validation loss must fall to count as better.

    Raises:
        ValueError: a value that cannot be used.
    """

    blocks: Literal["random", "dfa"] = "random"
    predictor_loss: Literal["cross_entropy", "mse"] = "cross_entropy"
    lr: float = 1.37e-3
    weight_decay: float = 2.9e-7
    epochs: int = 145
    ridge: float = 1e-3
    block_lr: float = 1.4e-4
    block_weight_decay: float = 1.3e-5
    block_epochs: int = 15
    batch_size: int = 128
    patience: int | None = 7
    min_delta: float = 1e-3

    def __post_init__(self) -> None:
        check_choice(["random", "dfa"], blocks=self.blocks)
        check_choice(["cross_entropy", "mse"], predictor_loss=self.predictor_loss)
        check_positive(lr=self.lr, block_lr=self.block_lr, ridge=self.ridge)
        check_not_negative(weight_decay=self.weight_decay, block_weight_decay=self.block_weight_decay, min_delta=self.min_delta)
        check_whole(epochs=self.epochs, block_epochs=self.block_epochs, batch_size=self.batch_size)
        check_whole(optional=["patience"], patience=self.patience)


class CascadedForwardCNN(nn.Module):
    """A convolutional network whose blocks each have a linear predictor; a class is scored by the sum of the predictors' logits.

    The blocks are features, not learners: their batch norm stays in evaluation mode whatever `train()` says, so that what is
    predicted never changes them.

    Args:
        in_channels: channels of an image.
        image_size: its height and width in pixels, one number if they are the same.
        channels: channels of the blocks, at least one; each block halves the image.
        num_classes: C, at least 2.

    Attributes:
        blocks: 3x3 convolution (padding 1, no bias), ReLU, 2x2 maximum, batch norm; Kaiming-uniform (fan_in, ReLU).
        predictors: a linear layer on each block's flattened output.

    Raises:
        ValueError: a size that cannot be used, or an image too small for the blocks.

    Examples:
        >>> model = CascadedForwardCNN(in_channels=1, image_size=8, channels=(4, 8), num_classes=10)
        >>> model(torch.zeros(5, 1, 8, 8)).shape, [tuple(h.shape) for h in model.block_outputs(torch.zeros(5, 1, 8, 8))]
        (torch.Size([5, 10]), [(5, 4, 4, 4), (5, 8, 2, 2)])
    """

    def __init__(
        self, in_channels: int, image_size: int | tuple[int, int], channels: Sequence[int] = (32, 128, 512), num_classes: int = 10
    ) -> None:
        super().__init__()
        check_sizes(in_channels, channels, num_classes, names=("in_channels", "channels"))
        sizes = [block_output_size(image_size, number) for number in range(len(channels), -1, -1)][::-1]
        self.image_shape, self.num_classes = (in_channels, *sizes[0]), num_classes
        blocks = [convolution_block(into, out) for into, out in itertools.pairwise([in_channels, *channels])]
        self.blocks = cast("Sequence[nn.Sequential]", nn.ModuleList(blocks))
        predictors = [nn.Linear(out * math.prod(size), num_classes) for out, size in zip(channels, sizes[1:], strict=True)]
        self.predictors = cast("Sequence[nn.Linear]", nn.ModuleList(predictors))
        for block in self.blocks:
            nn.init.kaiming_uniform_(cast("nn.Conv2d", block[0]).weight, mode="fan_in", nonlinearity="relu")
        self.train()

    def train(self, mode: bool = True) -> CascadedForwardCNN:
        """Like any module's, but the blocks stay in evaluation mode."""
        super().train(mode)
        for block in self.blocks:
            block.eval()
        return self

    def block_outputs(self, x: Float[Tensor, "batch channels height width"]) -> list[Float[Tensor, "batch out high wide"]]:
        """The output of each block.

        Raises:
            ValueError: the images have another shape than the model was built for.
        """
        check_image_shape(x, self.image_shape)
        outputs = []
        for block in self.blocks:
            outputs.append(block(outputs[-1] if outputs else x))
        return outputs

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        logits = [predictor(h.flatten(1)) for predictor, h in zip(self.predictors, self.block_outputs(x), strict=True)]
        return torch.stack(logits).sum(0)


def check_image_shape(x: Tensor, shape: Sequence[int]) -> None:
    """ValueError unless an image has this shape."""
    if tuple(x.shape[1:]) != tuple(shape):
        raise ValueError(f"x holds images of shape {tuple(x.shape[1:])}; expected {tuple(shape)}: the model was built for that shape")


def fit_cascaded_forward(
    model: CascadedForwardCNN,
    x: Float[Tensor, "rows channels height width"] | DataLoader,
    y: Int[Tensor, "rows"] | None,
    *,
    validation: tuple[Tensor, Tensor] | DataLoader | None,
    config: CascadedForwardConfig | None = None,
    callbacks: Iterable[Callback] = (),
    generator: torch.Generator | None = None,
) -> History:
    """Train the predictors, one after the other, on features that are computed once; with `blocks="dfa"` train the blocks before.

    Args:
        model: trained in place, where it is (CPU or CUDA) and in its dtype.
        x: images, or a DataLoader of (x, y) batches, which is gone through once: features are kept for all its images.
        y: labels 0..C-1; None with a DataLoader.
        validation: (x, y) or a DataLoader, for early stopping; None only with `patience=None`.
        config: default `CascadedForwardConfig()`.
        callbacks: each is called with every `Epoch` as it ends.
        generator: shuffles the batches and draws the feedback; the same one and the same initial model give the same result.

    Returns:
        The history: stage "blocks" (with "dfa"; the figures of the auxiliary layer), then "predictor 1", ...: losses of that
        predictor alone, by which it stops, and accuracies of the sum of the predictors so far. "mse" takes one epoch.

    Raises:
        ValueError: data that cannot be used.
        FloatingPointError: a loss or a weight is not finite; the message names the stage and the epoch, and the last finite state is
            kept.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> y = torch.arange(200) % 2
        >>> x = torch.randn(200, 1, 8, 8) + 2 * y.view(-1, 1, 1, 1)
        >>> model = CascadedForwardCNN(1, 8, (4, 8), 2)
        >>> config = CascadedForwardConfig(lr=1e-2, epochs=10, batch_size=25)
        >>> history = fit_cascaded_forward(model, x[:150], y[:150], validation=(x[150:], y[150:]), config=config)
        >>> history.epochs[-1].stage, history.epochs[-1].validation_accuracy > 0.9
        ('predictor 2', True)
    """
    config = config or CascadedForwardConfig()
    check_precision(model)
    check_validation(validation, config.patience)
    train = _in_memory(Examples(x, y, num_classes=model.num_classes), model)
    given = Examples.of_validation(validation, num_classes=model.num_classes)
    held_out = _in_memory(given, model) if given else None
    history, callbacks = History(), list(callbacks)
    model.train()
    if config.blocks == "dfa":
        _train_blocks(model, train, held_out, config, history, callbacks, generator)
    _train_predictors(model, train, held_out, config, history, callbacks, generator)
    model.eval()
    return history.stop_clock()


Data = tuple[Tensor, Tensor]


def _in_memory(examples: Examples, model: CascadedForwardCNN) -> Data:
    """All images in the model's dtype and all labels, on its device."""
    weight = model.predictors[0].weight
    if examples.x is not None and examples.y is not None:
        x, y = examples.x, examples.y
    else:
        parts = list(examples.batches(1))
        x, y = (torch.cat([part[i] for part in parts]) for i in range(2))
    check_image_shape(x, model.image_shape)
    return x.to(weight.device, weight.dtype), y.to(weight.device, torch.long)


def _train_blocks(
    model: CascadedForwardCNN,
    train: Data,
    held_out: Data | None,
    config: CascadedForwardConfig,
    history: History,
    callbacks: list[Callback],
    generator: torch.Generator | None,
) -> None:
    trainer = FeedbackTrainer(model.blocks, model.predictors[-1], config.block_lr, config.block_weight_decay, generator)
    fit_stages(
        ["blocks"],
        over_batches(trainer.step, lambda: batches_of(*train, config.batch_size, generator=generator, shuffle=True)),
        lambda: [mean_loss_and_accuracy(trainer.scores, batches_of(*held_out, CHUNK) if held_out else ())],
        state=BestState([*model.blocks, trainer.auxiliary], None, stage="blocks"),
        epochs=config.block_epochs,
        history=history,
        callbacks=callbacks,
        score=lambda line: math.nan,  # the last epoch counts, as released
    )


def _train_predictors(
    model: CascadedForwardCNN,
    train: Data,
    held_out: Data | None,
    config: CascadedForwardConfig,
    history: History,
    callbacks: list[Callback],
    generator: torch.Generator | None,
) -> None:
    kept = [each[0] for each in (train, held_out) if each]
    logits_so_far = torch.zeros((), dtype=kept[0].dtype)  # of the validation images
    for number, (block, predictor) in enumerate(zip(model.blocks, model.predictors, strict=True), start=1):
        before = 0 if number == 1 else sum(h.nbytes for h in kept)  # given up only when the next block's features are there
        kept = [_features(block, h) for h in kept]
        history.cache_bytes = max(history.cache_bytes, before + sum(h.nbytes for h in kept))
        features = kept[0].flatten(1), train[1]
        validation = (kept[1].flatten(1), held_out[1]) if held_out else None
        _train_predictor(f"predictor {number}", predictor, features, validation, logits_so_far, config, history, callbacks, generator)
        if validation:
            with torch.no_grad():
                logits_so_far = logits_so_far + predictor(validation[0])


def _train_predictor(
    stage: str,
    predictor: nn.Linear,
    train: Data,
    held_out: Data | None,
    logits_so_far: Tensor,
    config: CascadedForwardConfig,
    history: History,
    callbacks: list[Callback],
    generator: torch.Generator | None,
) -> None:
    @torch.no_grad()
    def validate() -> tuple[float, float]:
        if held_out is None:
            return math.nan, math.nan
        x, y = held_out
        scores = predictor(x)
        loss = F.cross_entropy(scores, y) if config.predictor_loss == "cross_entropy" else _squared_error(scores, y)
        return float(loss), float(((scores + logits_so_far).argmax(1) == y).float().mean())

    if config.predictor_loss == "mse":
        try:
            fit_ridge(predictor, *train, config.ridge)
        except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
            raise FloatingPointError(
                f"the closed form of {stage} has no solution in epoch 1 ({str(error).splitlines()[0]}); try a larger ridge than {config.ridge}"
            ) from error
        with torch.no_grad():
            error = _squared_error(predictor(train[0]), train[1])
        history.add(stage, 1, float(error), validate(), callbacks)
        history.best[stage] = 1
        return
    trainer = ProjectionTrainer(predictor, config.lr, config.weight_decay)

    def batches() -> Batches:
        return batches_of(*train, config.batch_size, generator=generator, shuffle=True)

    state = BestState(trainer.modules, config.patience, config.min_delta, stage)
    epoch = over_batches(trainer.step, batches)
    fit_stages([stage], epoch, lambda: [validate()], state=state, epochs=config.epochs, history=history, callbacks=callbacks)


def _squared_error(scores: Float[Tensor, "batch classes"], y: Int[Tensor, "batch"]) -> Float[Tensor, ""]:
    """The mean over the batch of the squared distance to one-hot labels."""
    return (scores - F.one_hot(y, scores.shape[1])).square().sum(1).mean()


@torch.no_grad()
def _features(block: nn.Module, x: Float[Tensor, "rows channels height width"]) -> Float[Tensor, "rows out high wide"]:
    """A frozen block's output for all images, computed a chunk at a time."""
    first = block(x[:CHUNK])
    with memory_for("kept inputs"):
        outputs = first.new_empty(len(x), *first.shape[1:])
    outputs[:CHUNK] = first
    for start in range(CHUNK, len(x), CHUNK):
        outputs[start : start + CHUNK] = block(x[start : start + CHUNK])
    return outputs
