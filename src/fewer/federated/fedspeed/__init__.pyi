from .algorithm import FedSpeedAlgorithm, FedSpeedConfig
from .optimizer import FedSpeedOptimizer
from .strategy import FedSpeed, fedspeed_client_app

__all__ = ["FedSpeed", "FedSpeedAlgorithm", "FedSpeedConfig", "FedSpeedOptimizer", "fedspeed_client_app"]
