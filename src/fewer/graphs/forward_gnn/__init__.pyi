from .class_nodes import AddClassNodes, remove_class_nodes
from .link_prediction import ForwardLinkPredictor
from .model import ForwardGNN
from .network import ForwardGNNConfig

__all__ = [
    "AddClassNodes",
    "ForwardGNN",
    "ForwardGNNConfig",
    "ForwardLinkPredictor",
    "remove_class_nodes",
]
