"""FZooS for Flower: the strategy of the ServerApp, and the ClientApp of those who own a black box."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flwr.app import Array, ArrayRecord, Context, Message
from flwr.clientapp import ClientApp

from fewer.federated._shared.black_box import BlackBox, Function, Point
from fewer.federated._shared.flower import FlowerStrategy
from fewer.federated._shared.flower_clients import answer_training, answer_who
from fewer.federated._shared.flower_records import Layout
from fewer.federated.fzoos.algorithm import FZooSAlgorithm, FZooSConfig
from fewer.federated.fzoos.peers import FedZO, FedZOConfig

Config = FZooSConfig | FedZOConfig
LAYOUT = Layout(("x",), ())


class FZooS(FlowerStrategy):
    """FZooS (or FedZO, by its settings) as a Flower strategy over `ArrayRecord({"x": Array(x0)})`, x0 a vector of float64.

    Flower's rounds are exchanges: `num_rounds=strategy.exchanges(R)` makes R rounds of FZooS, two exchanges each with correction. A client
    that misses an exchange, dies in the middle of one or comes back without its memory is not corrected until it has summed up again; one
    whose function gives no number is left out of the exchange, with a warning. Nothing is evaluated beside the queries: that would be
    calls that nobody counts.

    Args:
        config: FZooS's settings, the same as the clients'.
        fraction_train: who takes part in an exchange; all by default.
        min_available_nodes: how many nodes are waited for.
        keywords: `seed`, `checkpoint`, `clients` and more of `FlowerStrategy`.
    """

    def __init__(self, config: Config | None = None, fraction_train: float = 1.0, min_available_nodes: int = 2, **keywords: Any) -> None:
        super().__init__(algorithm_of(config), fraction_train, 0.0, min_available_nodes, **keywords)

    def exchanges(self, rounds: int) -> int:
        """How many of Flower's rounds so many of FZooS take."""
        return rounds * algorithm_of(self.algorithm.config).exchanges  # pyright: ignore[reportAttributeAccessIssue] - one of the two


def algorithm_of(config: Config | None) -> FZooSAlgorithm | FedZO:
    return FedZO(config) if isinstance(config, FedZOConfig) else FZooSAlgorithm(config or FZooSConfig())


def fzoos_client_app(objective: Callable[[Context], Function], config: Config | None = None) -> ClientApp:
    """The owners of black boxes as a Flower ClientApp; a client's queries lie in `context.state` and never leave it.

    Args:
        objective: `objective(context)`: the client's function, a point [d] to a number; `context.node_config["partition-id"]` says which
            client it is.
        config: FZooS's settings, the same as the strategy's.

    Raises:
        ValueError: (when the app is asked) the settings differ from the server's, or the function gives no finite number.

    Examples:
        >>> app = fzoos_client_app(lambda context: lambda x: float(((x - 0.3) ** 2).sum()))
    """
    app, algorithm = ClientApp(), algorithm_of(config)

    @app.query("who")
    def who(message: Message, context: Context) -> Message:
        return answer_who(message, context, LAYOUT)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return answer_training(
            algorithm, message, context, LAYOUT, lambda client, asked: BlackBox(client, Point(asked.vectors["x"]), objective(context))
        )

    return app


def arrays_of(x0: Any) -> ArrayRecord:
    """x0 [d] as the strategy starts from it."""
    return ArrayRecord({"x": Array(Point(x0).x0.numpy())})
