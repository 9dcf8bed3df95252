from .algorithm import SFPrompt, SFPromptConfig, el2n, keep_hardest
from .cost import Cost, wire_cost
from .split_model import ClientModel, SplitModel, split_vit
from .strategy import SFPromptStrategy, sfprompt_client_app
from .wire import BodyServer, Wire, insert_prompt

__all__ = [
    "BodyServer",
    "ClientModel",
    "Cost",
    "SFPrompt",
    "SFPromptConfig",
    "SFPromptStrategy",
    "SplitModel",
    "Wire",
    "el2n",
    "insert_prompt",
    "keep_hardest",
    "sfprompt_client_app",
    "split_vit",
    "wire_cost",
]
