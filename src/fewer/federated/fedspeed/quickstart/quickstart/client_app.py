"""The clients: they train on their own digits and keep their corrections to themselves."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fewer.federated import cross_entropy, fedspeed_client_app

from .task import config_of, load_data, load_test, model_fn

app = ClientApp()


def answer(message: Message, context: Context) -> Message:
    """Let FedSpeed's client answer, with the settings of this run."""
    return fedspeed_client_app(model_fn, load_data, cross_entropy, config_of(context), load_test=load_test)(message, context)


app.train()(answer)
app.evaluate()(answer)
app.query("who")(answer)
