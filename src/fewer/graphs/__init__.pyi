from . import forward_gnn
from ._shared.backpropagation import BackpropagationGNN, fit_backpropagation, fit_link_backpropagation
from ._shared.training import Epoch, History
from .forward_gnn import (
    AddClassNodes,
    ForwardGNN,
    ForwardGNNConfig,
    ForwardLinkPredictor,
    remove_class_nodes,
)

__all__ = [
    "AddClassNodes",
    "BackpropagationGNN",
    "Epoch",
    "ForwardGNN",
    "ForwardGNNConfig",
    "ForwardLinkPredictor",
    "History",
    "fit_backpropagation",
    "fit_link_backpropagation",
    "forward_gnn",
    "remove_class_nodes",
]
