"""The clients: they train their adapters on their own digits, and what they send is private already."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fewer.federated import cross_entropy, ffa_lora_client_app

from .task import config_of, load_data, load_test, model_of

app = ClientApp()


def answer(message: Message, context: Context) -> Message:
    """Let FFA-LoRA's client answer, with the settings of this run."""
    own = ffa_lora_client_app(lambda: model_of(context), load_data, cross_entropy, config_of(context), load_test=load_test)
    return own(message, context)


app.train()(answer)
app.evaluate()(answer)
app.query("who")(answer)
