"""The clients: they train on their own digits, when they like and as long as they like."""

from typing import Any

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fewer.federated import anarchic_client_app, cross_entropy

from .task import config_of, load_data, load_test, model_fn

app = ClientApp()


def choose_steps(context: Context, visit: int) -> int:
    """How many local steps this client makes now; 0 would be: not now. Here is the place to look at battery and network."""
    settings: Any = context.run_config
    node: Any = context.node_config
    draw = np.random.default_rng([settings["seed"], node["partition-id"], visit])
    return int(draw.integers(1, settings["most-steps"] + 1))


def answer(message: Message, context: Context) -> Message:
    """Let the client answer, with the settings of this run."""
    return anarchic_client_app(model_fn, load_data, cross_entropy, config_of(context), choose_steps, load_test=load_test)(message, context)


app.train()(answer)
app.evaluate()(answer)
app.query("who")(answer)
