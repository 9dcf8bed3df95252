from . import forward_gnn
from .forward_gnn import (
    AddClassNodes,
    BackpropagationGNN,
    Epoch,
    ForwardGNN,
    ForwardGNNConfig,
    ForwardLinkPredictor,
    History,
    fit_backpropagation,
    fit_link_backpropagation,
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
