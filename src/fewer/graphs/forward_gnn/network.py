"""What all of the method's networks are: layers with widths that a frozen `Shape` says, and, for classes, the virtual nodes' features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fewer.checks import check_choice, check_positive, check_whole
from fewer.graphs._shared.layers import Convolution, GraphLayer
from fewer.graphs.forward_gnn.class_nodes import Direction, Unlabelled
from fewer.graphs.forward_gnn.losses import THETA
from fewer.graphs.forward_gnn.node_task import NodeTask, prepare


@dataclass(frozen=True)
class ForwardGNNConfig:
    """What only some modes read.

    Args:
        unlabelled: label features of nodes without a label: "uniform" (1/C everywhere) or "zero".
        alternating_update: "top_to_input" updates even-numbered layers first, then odd ones, which see what is updated already;
            otherwise all layers see the time step before.
        test_time_steps: state updates of a prediction of "top_to_input".
        first_counted_step: the time step from which on its class probabilities are summed (not in the paper: the released code
            stores a set that its settings name).
        num_negs: wrong labellings a step of the Forward-Forward modes.
        theta: the goodness that right labels shall exceed there.

    Raises:
        ValueError: a value that cannot be used.
    """

    unlabelled: Unlabelled = "uniform"
    alternating_update: bool = False
    test_time_steps: int = 10
    first_counted_step: int = 3
    num_negs: int = 2
    theta: float = THETA

    def __post_init__(self) -> None:
        check_choice(("uniform", "zero"), unlabelled=self.unlabelled)
        check_whole(test_time_steps=self.test_time_steps, first_counted_step=self.first_counted_step, num_negs=self.num_negs)
        check_positive(theta=self.theta)
        if self.first_counted_step > self.test_time_steps:
            raise ValueError(
                f"first_counted_step is {self.first_counted_step}; expected at most test_time_steps={self.test_time_steps}: lower it"
            )

    @property
    def counted_steps(self) -> int:
        return self.test_time_steps - self.first_counted_step + 1


@dataclass(frozen=True)
class Shape:
    """How wide a network is.

    Attributes:
        in_channels: features of a node.
        widths: of the layers' outputs.
        classes: 0 where there are none (links).
        append_label: label features stand beside the "input" of layer 1, or beside the inputs of "all" layers.
    """

    in_channels: int
    widths: tuple[int, ...]
    classes: int = 0
    append_label: Literal["input", "all"] | None = None


class GraphNetwork(nn.Module):
    """Layers, each a PyG convolution and ReLU.

    Args:
        shape: see `Shape`.
        inputs: the widths of the parts of each layer's input.
        conv: of every layer.
        config: default `ForwardGNNConfig()`.
        kept_steps: time steps for which the class nodes' embeddings are kept after a fit; 0 keeps none.
    """

    class_features: Tensor

    def __init__(
        self, shape: Shape, inputs: Sequence[Sequence[int]], conv: Convolution, config: ForwardGNNConfig | None = None, kept_steps: int = 0
    ) -> None:
        super().__init__()
        self.shape, self.config = shape, config or ForwardGNNConfig()
        self.conv: Convolution = conv
        made = [GraphLayer(parts, width, conv) for parts, width in zip(inputs, shape.widths, strict=True)]
        self.layers = cast("Sequence[GraphLayer]", nn.ModuleList(made))
        if shape.classes:
            self.register_buffer("class_features", torch.randn(shape.classes, shape.in_channels))
        for number, width in enumerate(shape.widths if kept_steps else (), start=1):  # NaN until a fit has filled them
            self.register_buffer(f"class_embeddings_{number}", torch.full((kept_steps, shape.classes, width), torch.nan))

    @property
    def in_channels(self) -> int:
        return self.shape.in_channels

    @property
    def widths(self) -> list[int]:
        return list(self.shape.widths)

    def kept(self, number: int) -> Float[Tensor, "steps C width"]:
        """The class nodes' embeddings of layer `number` (from 1) at the end of the fit."""
        return self.get_buffer(f"class_embeddings_{number}")

    def node_task(
        self, data: Any, temperature: float, direction: Direction, *, watch: bool = False, keep_virtual: bool = False
    ) -> NodeTask:
        """A graph with node classes as the network works on it; ValueError where it cannot be used."""
        return prepare(
            data,
            classes=self.shape.classes,
            class_features=self.class_features,
            temperature=temperature,
            direction=direction,
            unlabelled=self.config.unlabelled,
            append_label=self.shape.append_label,
            watch=watch,
            keep_virtual=keep_virtual,
        )
