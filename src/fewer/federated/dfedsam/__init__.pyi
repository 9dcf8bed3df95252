from .algorithm import DFedSAMAlgorithm, DFedSAMConfig

__all__ = ["DFedSAMAlgorithm", "DFedSAMConfig"]
