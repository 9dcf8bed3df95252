"""The clients: they train prompt and tail on their own digits, and send activations of the hardest ones."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fewer.federated import sfprompt_client_app

from .task import config_of, load_data, split_of

app = ClientApp()


def answer(message: Message, context: Context) -> Message:
    """Let SFPrompt's client answer, with the settings of this run."""
    return sfprompt_client_app(lambda: split_of(context).client(), load_data, config_of(context))(message, context)


app.train()(answer)
app.train("grad")(answer)
app.train("smash")(answer)
app.query("who")(answer)
