"""The clients: each answers from its own black box, and keeps its queries to itself."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fewer.federated import fzoos_client_app

from .task import config_of, objective

app = ClientApp()


def answer(message: Message, context: Context) -> Message:
    """Let FZooS's client answer, with the settings of this run."""
    return fzoos_client_app(objective, config_of(context))(message, context)


app.train()(answer)
app.query("who")(answer)
