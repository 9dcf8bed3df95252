from .algorithm import Algorithm, Message, Reply, ServerState
from .asynchrony import Clock, Return, Update, UpdateRound, schedule, simulate_anarchic
from .baselines import FedAvg, FedDyn, FedProx, FedSAM, Scaffold
from .checkpoint import load_checkpoint, save_checkpoint
from .clients import Shards
from .flat_model import FlatModel, cross_entropy
from .flower import FlowerStrategy
from .flower_clients import flower_client_app
from .gossip import DecentralizedAlgorithm, DecentralizedHistory, GossipRound, simulate_decentralized
from .local_training import LocalConfig
from .partition import describe, dirichlet, iid, pathological
from .peers import run_peer
from .sampling import FixedSize, Independent
from .simulate import History, simulate
from .topology import (
    Topology,
    complete,
    consensus_steps,
    exponential,
    from_networkx,
    metropolis,
    random_graph,
    ring,
    spectral_gap,
    torus,
)
from .traffic import ideal_bytes, record_bytes

__all__ = [
    "Algorithm",
    "Clock",
    "DecentralizedAlgorithm",
    "DecentralizedHistory",
    "FedAvg",
    "FedDyn",
    "FedProx",
    "FedSAM",
    "FixedSize",
    "FlatModel",
    "FlowerStrategy",
    "GossipRound",
    "History",
    "Independent",
    "LocalConfig",
    "Message",
    "Reply",
    "Return",
    "Scaffold",
    "ServerState",
    "Shards",
    "Topology",
    "Update",
    "UpdateRound",
    "complete",
    "consensus_steps",
    "cross_entropy",
    "describe",
    "dirichlet",
    "exponential",
    "flower_client_app",
    "from_networkx",
    "ideal_bytes",
    "iid",
    "load_checkpoint",
    "metropolis",
    "pathological",
    "random_graph",
    "record_bytes",
    "ring",
    "run_peer",
    "save_checkpoint",
    "schedule",
    "simulate",
    "simulate_anarchic",
    "simulate_decentralized",
    "spectral_gap",
    "torus",
]
