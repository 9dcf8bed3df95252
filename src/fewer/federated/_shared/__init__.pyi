from .algorithm import Algorithm, Message, Reply, ServerState
from .baselines import FedAvg, FedDyn, FedProx, FedSAM, Scaffold
from .checkpoint import load_checkpoint, save_checkpoint
from .clients import Shards
from .flat_model import FlatModel, cross_entropy
from .flower import FlowerStrategy, flower_client_app
from .local_training import LocalConfig
from .partition import describe, dirichlet, iid, pathological
from .sampling import FixedSize, Independent
from .simulate import History, simulate
from .traffic import ideal_bytes, record_bytes

__all__ = [
    "Algorithm",
    "FedAvg",
    "FedDyn",
    "FedProx",
    "FedSAM",
    "FixedSize",
    "FlatModel",
    "FlowerStrategy",
    "History",
    "Independent",
    "LocalConfig",
    "Message",
    "Reply",
    "Scaffold",
    "ServerState",
    "Shards",
    "cross_entropy",
    "describe",
    "dirichlet",
    "flower_client_app",
    "ideal_bytes",
    "iid",
    "load_checkpoint",
    "pathological",
    "record_bytes",
    "save_checkpoint",
    "simulate",
]
