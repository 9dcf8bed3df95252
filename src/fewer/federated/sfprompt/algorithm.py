"""SFPrompt as three pure functions on flat vectors: train by the shortcut, prune, train what is left over the wire, average.

A vector is [p | W_t], the prompt and all of the tail.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fewer import meters
from fewer.checks import check_choice, check_positive, check_share, check_whole
from fewer.federated._shared.algorithm import Message, Reply, ServerState, Vectors, mean_of
from fewer.federated._shared.clients import StackedShard, batch_rows
from fewer.federated._shared.flat_model import FlatModel
from fewer.federated._shared.local_training import CLIP_FLOOR, LocalConfig, metrics_of, norm
from fewer.federated.sfprompt.cost import kept_count, wire_cost
from fewer.federated.sfprompt.split_model import ClientModel, SplitModel
from fewer.federated.sfprompt.wire import Wire

Select = Literal["el2n", "random", "easiest"]
Score = Literal["after", "before"]


def el2n(logits: Float[Tensor, "n C"], labels: Int[Tensor, "n"]) -> Float[Tensor, "n"]:
    """The error's norm |softmax(z) - onehot(y)|_2 of each example, from 0 (certain and right) to sqrt 2 (certain and wrong).

    In float32 at least, whatever the logits are.

    Raises:
        ValueError: a label is none of the logits' classes, or there are not as many labels as examples.

    Examples:
        >>> el2n(torch.tensor([[99.0, 0.0], [99.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1, 0]))
        tensor([0.0000, 1.4142, 0.7071])
    """
    labels = checked_labels(logits, labels)
    if labels.shape != logits.shape[:-1]:
        raise ValueError(f"the labels are of shape {tuple(labels.shape)}; expected {tuple(logits.shape[:-1])}, one an example")
    error = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
    error = error - torch.nn.functional.one_hot(labels, logits.shape[-1])
    return torch.linalg.vector_norm(error, dim=-1)


def keep_hardest(scores: Float[Tensor, "n"], keep: float) -> Int[Tensor, "k"]:
    """The indices, in rising order, of the k = max(1, round(keep n)) largest scores; of equal ones the lower index is kept.

    Raises:
        ValueError: keep is not in (0, 1].

    Examples:
        >>> keep_hardest(torch.tensor([0.5, 0.9, 0.5, 0.1]), keep=0.5).tolist()
        [0, 1]
    """
    check_positive(keep=keep)
    check_share(keep=keep)
    return scores.sort(descending=True, stable=True).indices[: kept_count(len(scores), keep)].sort().values


@dataclass(frozen=True, kw_only=True)
class SFPromptConfig(LocalConfig):
    """How a client trains.

    Args:
        shortcut_epochs: U_l, passes of phase 1 over all examples, without the wire; 0: no phase 1.
        split_epochs: passes over the kept examples with the wire.
        keep: the share of the examples that is kept, in (0, 1].
        select: which: "el2n" those with the largest error, "easiest" those with the smallest, "random".
        score: when they are scored: "after" or "before" phase 1.
        lr, batch_size: of plain SGD in both phases.
        lr_decay, weight_decay: see `LocalConfig`; off.
        max_grad_norm: p and W_t are each clipped to it by their own norms, as the tail steps before p's gradient is there; off.
        weighted: the server weighs clients by their examples.

    Raises:
        ValueError: a number is out of its range.

    Examples:
        >>> SFPromptConfig(keep=0.2).shortcut_epochs
        2
    """

    shortcut_epochs: int = 2
    split_epochs: int = 1
    keep: float = 0.5
    select: Select = "el2n"
    score: Score = "after"
    lr: float = 0.2
    batch_size: int = 30
    lr_decay: float = 1.0
    weight_decay: float = 0.0
    max_grad_norm: float = math.inf
    weighted: bool = True
    local_epochs: int = field(default=1, init=False, repr=False)  # epochs are those of the two phases
    local_steps: None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(least=0, shortcut_epochs=self.shortcut_epochs)
        check_whole(split_epochs=self.split_epochs)
        check_positive(keep=self.keep)
        check_share(keep=self.keep)
        check_choice(get_args(Select), select=self.select)
        check_choice(get_args(Score), score=self.score)


@dataclass(frozen=True)
class SFPrompt:
    """The three functions. Its `FlatModel` is of a client's model (`SplitModel.client()`), whose whole is with the wire's server.

    A reply with NaN is left out by the server. Clients keep nothing between rounds, so that one that comes back starts as any other.

    Args:
        config: the settings.
        wire: the way to the body in this process; None: the body is that of the `SplitModel` that is trained, or the exchange is Flower's.

    Raises:
        ValueError: (when it trains) there is no way to a body, a label is none of the classes, or clients are trained at once by "vmap".

    Warns:
        UserWarning: a client sends more examples than full fine-tuning would cost.

    Examples:
        >>> SFPrompt(SFPromptConfig(keep=0.2)).initial(torch.zeros(3), clients=10).clients
        10
    """

    config: SFPromptConfig = field(default_factory=SFPromptConfig)
    wire: Wire | None = field(default=None, repr=False, compare=False)
    keeps: tuple[str, ...] = ()
    receives: tuple[str, ...] = ("x",)
    sends: tuple[str, ...] = ("model",)

    def initial(self, x: Tensor, clients: int) -> ServerState:
        return ServerState(x, clients)

    def configure(self, server: ServerState, client_ids: Sequence[int], round: int) -> list[Message]:
        return [Message(client, round, {"x": server.x}) for client in client_ids]

    def local(self, client_state: Vectors, message: Message, shard: Any, rng: Any) -> tuple[Vectors, Reply]:
        """Phase 1, pruning and phase 2 of one client; the reply also tells "sent", how many examples' activations it sends."""
        wire = self._wire_of(shard)
        x = wire.send("model_down", message.vectors["x"])
        client = SplitClient(shard, x, self.config, message.round)
        for rows in client.begin(rng):
            smashed, prompt = client.smash(rows)
            output = wire.forward(message.client, smashed, prompt, keep=client.returns)
            gradient = client.step_tail(rows, output)
            if client.returns:
                client.step_prompt(rows, wire.backward(message.client, gradient))
        y = wire.send("model_up", client.y)
        return {}, Reply(message.client, {"model": y}, client.metrics(x))

    def aggregate(self, server: ServerState, replies: Sequence[Reply]) -> ServerState:
        """p and W_t: the mean of the clients', weighted by their examples."""
        return replace(server, x=mean_of(replies, "model", self.config.weighted))

    def _wire_of(self, shard: Any) -> Wire:
        if isinstance(shard, StackedShard):
            raise ValueError(
                "SFPrompt with executor='vmap'; expected clients trained one by one, each over a wire of its own: executor=None"
            )
        if self.wire is not None:
            return self.wire
        model = shard.flat.model
        if not isinstance(model, SplitModel):
            raise ValueError(
                f"the model is a {type(model).__name__} and no wire leads to a body; expected SFPrompt(config, Wire(split.server())), or a SplitModel"
            )
        return Wire(model.server())


class SplitClient:
    """One client's round: what it does by itself, and its side of the exchange.

    Args:
        shard: its examples, and the `FlatModel` of its model.
        x: the global [p | W_t].
        config, round: set the rate of its steps.
    """

    def __init__(self, shard: Any, x: Tensor, config: SFPromptConfig, round: int) -> None:
        self.shard, self.config, self.eta = shard, config, config.lr_at(round)
        self.flat: FlatModel = shard.flat
        model: Any = self.flat.model
        if not isinstance(model, ClientModel):
            raise ValueError(
                f"the model is a {type(model).__name__}; expected a SplitModel, or what it gives its clients: SplitModel.client()"
            )
        self.y, self.at, self.sent = x.clone(), model.at, 0
        self.prompt_size = 0 if model.prompt is None else model.prompt.numel()
        self.returns = bool(self.prompt_size)  # without a prompt nobody needs the body's gradient
        self._made: Tensor | None = None  # the head's outputs at the cut, where they never change: made once an example
        self._missing = np.ones(shard.size, dtype=bool)  # those that are not made yet
        self._graph: Tensor | None = None  # the head's output whose gradient is to come

    # The round

    def begin(self, rng: np.random.Generator) -> list[np.ndarray]:
        """Phase 1 and pruning; the batches of phase 2, places among the client's examples."""
        config, size = self.config, self.shard.size
        self._warn_of_cost()
        before = self.scores() if config.score == "before" else None
        if config.shortcut_epochs:
            steps = config.shortcut_epochs * -(-size // config.batch_size)
            for rows in batch_rows(size, config.batch_size, config.shortcut_epochs, steps, rng):
                self.step_shortcut(rows)
        kept = self.prune(rng, before)
        self.sent = len(kept)
        steps = config.split_epochs * -(-len(kept) // config.batch_size)
        return [kept[rows] for rows in batch_rows(len(kept), config.batch_size, config.split_epochs, steps, rng)]

    def prune(self, rng: np.random.Generator, before: Tensor | None = None) -> np.ndarray:
        """The places of the examples that are kept, in rising order."""
        config, size = self.config, self.shard.size
        count = kept_count(size, config.keep)
        if count == size:
            return np.arange(size)
        if config.select == "random":
            return np.sort(rng.choice(size, count, replace=False))
        scores = self.scores() if before is None else before
        return keep_hardest(scores if scores is not None and config.select == "el2n" else -scores, config.keep).cpu().numpy()

    def scores(self) -> Float[Tensor, "n"]:
        """EL2N of each example, by the shortcut as it is now."""
        model, places = self.model(), np.arange(self.shard.size)
        with torch.no_grad():
            parts = np.split(places, range(self.config.batch_size, len(places), self.config.batch_size))
            return torch.cat([el2n(model.tail(model.prompted(self.head_output(model, rows))), self.labels(rows)) for rows in parts])

    def step_shortcut(self, rows: np.ndarray) -> None:
        """A step of p and W_t on the loss of tail(head(x, p))."""
        meters.count("gradients")
        model = self.model()
        with torch.enable_grad():
            loss = self.loss(model.tail(model.prompted(self.head_output(model, rows))), rows)
            gradient = self.gradient(loss, self.trained(model))
        self.step(0, self.prompt_size, gradient[: self.prompt_size])
        self.step(self.prompt_size, self.flat.size, gradient[self.prompt_size :])

    # The exchange

    def smash(self, rows: np.ndarray) -> tuple[Tensor, Tensor | None]:
        """What is sent first: the head's output, and at the cut the prompt."""
        model = self.model()
        with torch.enable_grad():
            output = self.head_output(model, rows)
        if self.at == "cut":
            return output, None if model.prompt is None else model.prompt.detach().clone()
        self._graph = output
        return output.detach(), None

    def step_tail(self, rows: np.ndarray, output: Tensor) -> Tensor:
        """The loss of tail(b): its gradient by b, which is sent back, and a step of W_t."""
        meters.count("gradients")
        model = self.model()
        with torch.enable_grad():
            b = output.detach().to(self.flat.held).requires_grad_(self.returns)
            loss = self.loss(model.tail(b.view_as(b)), rows)  # a view, as FlopCounterMode cannot follow a leaf
            tail = [parameter for name, parameter in self.trained(model).items() if name != "prompt"]
            by_b, *grads = torch.autograd.grad(loss, [b, *tail]) if self.returns else (b, *torch.autograd.grad(loss, tail))
        self.step(self.prompt_size, self.flat.size, torch.cat([each.reshape(-1) for each in grads]).to(self.flat.dtype))
        return by_b

    def step_prompt(self, rows: np.ndarray, returned: Tensor) -> None:
        """A step of p by what the server sent back: dL/da, which goes through the head, or dL/dp itself at the cut.

        The head runs again where its output's graph is no longer there; p has not changed since.
        """
        gradient = returned
        if self.at == "input":
            model, graph = self.model(), self._graph
            with torch.enable_grad():
                output = graph if graph is not None else self.head_output(model, rows)
            assert model.prompt is not None
            (gradient,) = torch.autograd.grad(output, [model.prompt], returned.to(output))
            self._graph = None
        self.step(0, self.prompt_size, gradient.reshape(-1).to(self.flat.dtype))

    def metrics(self, x: Tensor) -> dict[str, Any]:
        return metrics_of(self.y, x, self.shard) | {"sent": float(self.sent)}

    # Its model and its examples

    def model(self) -> ClientModel:
        """The client's model with the parameters as they are now."""
        model: Any = self.flat.module_at(self.y)
        return model

    def trained(self, model: ClientModel) -> dict[str, Tensor]:
        named: dict[str, Any] = dict(model.named_parameters())
        return {name: named[name] for name in self.flat.shapes}

    def labels(self, rows: np.ndarray) -> Tensor:
        return self.shard.y[self.shard.rows[torch.from_numpy(rows)].to(self.shard.y.device)]

    def head_output(self, model: ClientModel, rows: np.ndarray) -> Float[Tensor, "B T D"]:
        """The head's output of some examples; at the cut, made once an example and kept for the round."""
        if self.at == "input":
            return model.smashed(self.examples(rows))
        if (missing := rows[self._missing[rows]]).size:
            with torch.no_grad():
                made = model.smashed(self.examples(missing))
            if self._made is None:
                self._made = made.new_empty(self.shard.size, *made.shape[1:])
            self._made[torch.from_numpy(missing)] = made
            self._missing[missing] = False
        assert self._made is not None
        return self._made[torch.from_numpy(rows)]

    def examples(self, rows: np.ndarray) -> Tensor:
        return self.shard.x[self.shard.rows[torch.from_numpy(rows)].to(self.shard.x.device)]

    def loss(self, logits: Tensor, rows: np.ndarray) -> Tensor:
        return self.flat.loss_fn(logits, checked_labels(logits, self.labels(rows))).mean()

    def gradient(self, loss: Tensor, parameters: dict[str, Tensor]) -> Float[Tensor, "d"]:
        """The flat gradient; zero for a prompt that the shortcut does not read."""
        grads = torch.autograd.grad(loss, [*parameters.values()], allow_unused=True, materialize_grads=True)
        return torch.cat([each.reshape(-1) for each in grads]).to(self.flat.dtype)

    def step(self, first: int, last: int, gradient: Tensor) -> None:
        """SGD of one part of y, its gradient clipped by its own norm."""
        if first == last:
            return
        clip = (self.config.max_grad_norm / (norm(gradient) + CLIP_FLOOR)).clamp_(max=1.0)
        self.y[first:last].mul_(1 - self.eta * self.config.weight_decay).addcmul_(gradient, clip.mul_(self.eta), value=-1)

    def _warn_of_cost(self) -> None:
        model: Any = self.flat.model
        if model.tokens is None:
            return
        cost = wire_cost(model, self.shard.size, self.config.keep, split_epochs=self.config.split_epochs, batch_size=self.config.batch_size)
        if cost.sent_examples > cost.break_even:
            warnings.warn(
                f"client {self.shard.client} sends {cost.sent_examples} examples a round and full fine-tuning costs as much as "
                f"{cost.break_even}; expected at most that many, or SFPrompt sends more than what it replaces: a smaller keep",
                stacklevel=2,
            )


def checked_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """The labels as int64.

    Raises:
        ValueError: they are no whole numbers, or one is none of the classes.
    """
    if labels.is_floating_point():
        raise ValueError(f"the labels are {labels.dtype}; expected whole numbers, the classes' numbers: labels.long()")
    labels = labels.long()
    least, most = (int(labels.min()), int(labels.max())) if len(labels) else (0, 0)
    if least < 0 or most >= logits.shape[-1]:
        raise ValueError(f"the labels go from {least} to {most}; expected 0 to {logits.shape[-1] - 1}, the classifier's classes")
    return labels
