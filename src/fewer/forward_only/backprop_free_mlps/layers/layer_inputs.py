"""The inputs of the layer that is being trained: kept from the frozen layers below, or computed anew for every batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fewer.fitting import Examples, batches_of
from fewer.forward_only.backprop_free_mlps.layers.layer_training import Activation, layer_output
from fewer.meters import memory_for


@torch.no_grad()
def frozen_output(
    layers: Sequence[nn.Linear], x: Float[Tensor, "batch in"], activation: Activation, rows: int
) -> Float[Tensor, "batch width"]:
    """The output of the last of `layers`, in x's dtype.

    Computed in blocks of exactly `rows` rows, the last one padded: matrix products of one shape, so that a row's value does not
    depend on how many rows came with it, and kept inputs equal recomputed ones bit for bit.
    """
    done = []
    for block in x.split(rows):
        a = F.pad(block, (0, 0, 0, rows - len(block)))
        for layer in layers:
            a = layer_output(layer, a.to(layer.weight.dtype), activation).to(x.dtype)
        done.append(a[: len(block)])
    return done[0] if len(done) == 1 else torch.cat(done)


def cache_size(examples: Examples | None, widths: Sequence[int]) -> int:
    """Bytes that keeping the widest layer's output for all examples takes; 0 behind a DataLoader, which may give other rows each time."""
    if examples is None or examples.x is None or not widths:
        return 0
    return len(examples.x) * max(widths) * examples.x.element_size()


class LayerInputs:
    """Batches of (input of the layer in training, y).

    Args:
        examples: the data.
        like: a parameter of the model; batches come in its dtype, on its device.
        activation: the layers' activation.
        batch_size: rows in a batch.
        widths: output widths of the layers that will be frozen, in order.
        cached: keep each example's input in memory; otherwise the frozen layers are run again for every batch.
    """

    def __init__(
        self, examples: Examples, *, like: Tensor, activation: Activation, batch_size: int, widths: Sequence[int], cached: bool
    ) -> None:
        self.examples, self.batch_size = examples, batch_size
        self.activation: Activation = activation
        self.device, self.dtype = like.device, like.dtype
        self.frozen: list[nn.Linear] = []
        self._width, self._cached = max(widths, default=0), cached
        self._inputs = None if examples.x is None else examples.x.flatten(1)
        self._room: Tensor | None = None

    def freeze(self, layer: nn.Linear) -> None:
        """Take the layer that has been trained into the frozen ones: its output is the input from now on."""
        self.frozen.append(layer)
        if not self._cached:
            return
        assert self._inputs is not None
        if self._room is None:
            with memory_for("kept inputs"):
                self._room = self._inputs.new_empty(len(self._inputs), self._width)
        outputs = self._room[:, : layer.out_features]
        for start in range(0, len(outputs), self.batch_size):
            rows = slice(start, start + self.batch_size)  # the room holds these rows' input until their output takes its place
            block = self._inputs[rows].contiguous().to(self.device)
            outputs[rows] = frozen_output([layer], block, self.activation, self.batch_size).to(outputs.device)
        self._inputs = outputs

    def batches(self, *, shuffle: bool = False, generator: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over the examples."""
        if self._inputs is None:
            given = self.examples.batches(self.batch_size, generator=generator, shuffle=shuffle, device=self.device)
        else:
            assert self.examples.y is not None
            given = batches_of(self._inputs, self.examples.y, self.batch_size, generator=generator, shuffle=shuffle, device=self.device)
        for x, y in given:
            a = x.flatten(1)
            if self.frozen and not self._cached:
                a = frozen_output(self.frozen, a, self.activation, self.batch_size)
            yield a.contiguous().to(self.dtype), y
