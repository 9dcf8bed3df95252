from .backpropagation import BackpropagationGNN, fit_backpropagation, fit_link_backpropagation
from .class_nodes import AddClassNodes, remove_class_nodes
from .link_prediction import ForwardLinkPredictor
from .model import ForwardGNN, ForwardGNNConfig
from .training import Epoch, History

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
    "remove_class_nodes",
]
