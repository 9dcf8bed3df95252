from .algorithm import AnarchicAlgorithm, AnarchicConfig, FedBuff
from .strategy import Anarchic, anarchic_client_app

__all__ = ["Anarchic", "AnarchicAlgorithm", "AnarchicConfig", "FedBuff", "anarchic_client_app"]
