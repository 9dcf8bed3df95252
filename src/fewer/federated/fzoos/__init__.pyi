from .algorithm import FZooSAlgorithm, FZooSConfig
from .peers import FedZO, FedZOConfig
from .search import Result, minimize
from .strategy import FZooS, arrays_of, fzoos_client_app
from .surrogate import GradientSurrogate, RandomFeatures

__all__ = [
    "FZooS",
    "FZooSAlgorithm",
    "FZooSConfig",
    "FedZO",
    "FedZOConfig",
    "GradientSurrogate",
    "RandomFeatures",
    "Result",
    "arrays_of",
    "fzoos_client_app",
    "minimize",
]
