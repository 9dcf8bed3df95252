"""FedSpeed: local steps with a prox-correction term and a gradient at a worse point nearby, and the server that averages what comes back.

Client i keeps g_i, an estimate of its gradient at the optimum; it is what removes the bias of the proximal term.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from torch import Tensor

from fewer.checks import check_choice, check_not_negative, check_share
from fewer.federated._shared.algorithm import Message, Reply, ServerState, Vectors, mean_of
from fewer.federated._shared.local_training import LocalConfig, descend, metrics_of

ServerRule = Literal["paper", "released"]


@dataclass(frozen=True, kw_only=True)
class FedSpeedConfig(LocalConfig):
    """FedSpeed's settings; the defaults are those of the released code.

    Args:
        rho: the ascent step's length (0: none, and one gradient a step).
        prox: the proximal weight 1/lambda (0: no proximal term and no correction, lambda being infinite).
        alpha: the share of the gradient at the ascent point in the quasi-gradient.
        normalize: the ascent step is rho g1 / (|g1| + 1e-7); False: the paper's rho g1.
        server_rule: "released" (the authors' simulator, whose numbers the paper's tables hold) averages the sampled clients' y_i and adds
            the mean of -lambda g_i over *all* clients; "paper" averages y_i - lambda g_i of the sampled ones alone. Both agree when all
            take part. When only some do, "paper" has no fixed point: at the optimum the g_i are the clients' own gradients, whose mean
            over all is zero but over a sample is not, and each round adds -lambda times that.
        relaxed_beta: a client starts at x + beta (x - y_i of its last round), from its second round on; 0 to 1.
        correction: False holds g_i at zero (for ablation; not in the paper).
        local_epochs, local_steps, lr, lr_decay, weight_decay, max_grad_norm, batch_size, weighted: see `LocalConfig`.

    Raises:
        ValueError: a number is out of its range, lr * prox >= 1 (the proximal step would overshoot), or the server rule is unknown.

    Examples:
        >>> FedSpeedConfig(lr=0.05).lr_at(2)
        0.0499
    """

    rho: float = 0.1
    prox: float = 0.1
    alpha: float = 1.0
    normalize: bool = True
    server_rule: ServerRule = "released"
    relaxed_beta: float = 0.0
    correction: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative(rho=self.rho, prox=self.prox)
        check_share(alpha=self.alpha, relaxed_beta=self.relaxed_beta)
        check_choice(get_args(ServerRule), server_rule=self.server_rule)
        if self.lr * self.prox >= 1:
            raise ValueError(
                f"lr * prox is {self.lr * self.prox:g}; expected less than 1, else the proximal step overshoots: a smaller lr or prox"
            )

    @property
    def corrects(self) -> bool:
        return self.correction and self.prox > 0


@dataclass(frozen=True)
class FedSpeedAlgorithm:
    """FedSpeed as three pure functions on flat vectors, for `simulate` and for Flower alike.

    Examples:
        >>> import torch
        >>> FedSpeedAlgorithm(FedSpeedConfig()).initial(torch.zeros(3), clients=10).clients
        10
    """

    config: FedSpeedConfig = field(default_factory=FedSpeedConfig)
    receives: tuple[str, ...] = ("x",)
    sends: tuple[str, ...] = ("model",)

    @property
    def keeps(self) -> tuple[str, ...]:
        """g_i, and where initialisation is relaxed y_i of the client's last round."""
        return (("correction",) if self.config.corrects else ()) + (("last",) if self.config.relaxed_beta else ())

    def initial(self, x: Tensor, clients: int) -> ServerState:
        """The server before round 1; by the released rule it also keeps the mean of -lambda g_i over all clients."""
        held = {"mean_h": x.new_zeros(x.shape)} if self._adds_mean_h else {}
        return ServerState(x, clients, vectors=held)

    @property
    def _adds_mean_h(self) -> bool:
        return self.config.server_rule == "released" and self.config.corrects

    def configure(self, server: ServerState, client_ids: Sequence[int], round: int) -> list[Message]:
        return [Message(client, round, {"x": server.x}) for client in client_ids]

    def local(self, client_state: Vectors, message: Message, shard: Any, rng: Any) -> tuple[Vectors, Reply]:
        """K local steps, then g_i <- g_i - (y - x)/lambda; "model" is y, or y - lambda g_i by the paper's rule."""
        config, x = self.config, message.vectors["x"]
        pull = config.prox * x if config.prox else None
        if config.corrects and pull is not None:
            pull = client_state["correction"] + pull
        y = descend(
            self._start(x, client_state, shard), shard, rng, config, message.round,
            prox=config.prox, pull=pull, rho=config.rho, alpha=config.alpha, normalize=config.normalize,
        )  # fmt: skip
        kept, sent = {}, y
        if config.corrects:
            kept["correction"] = g_i = client_state["correction"] - config.prox * (y - x)
            if config.server_rule == "paper":
                sent = y - g_i / config.prox
        if config.relaxed_beta:
            kept["last"] = y
        return kept, Reply(message.client, {"model": sent}, metrics_of(y, x, shard))

    def _start(self, x: Tensor, client_state: Vectors, shard: Any) -> Tensor:
        """x, or x + beta (x - y_i of the last round) from the client's second round on (before, "last" is all zeros)."""
        y = shard.start(x)
        if self.config.relaxed_beta:
            last = client_state["last"]
            been_here = last.ne(0).any(dim=-1, keepdim=True)
            y.add_((x - last).mul_(been_here), alpha=self.config.relaxed_beta)
        return y

    def aggregate(self, server: ServerState, replies: Sequence[Reply]) -> ServerState:
        """x <- mean over the sampled of what they sent, plus by the released rule the mean of h_i = -lambda g_i over all clients.

        As h_i grows by y_i - x, which the server sees, its mean over all clients is kept as one running vector.
        """
        mean = mean_of(replies, "model", self.config.weighted)
        if not self._adds_mean_h:
            return replace(server, x=mean)
        mean_h = server.vectors["mean_h"] + (mean_of(replies, "model") - server.x) * (len(replies) / server.clients)
        return replace(server, x=mean + mean_h, vectors=server.vectors | {"mean_h": mean_h})
