from .model.capture import ModelReport, analyse_model, capture
from .model.divergence import Divergence, Reference, divergence
from .model.linear import QuantLinear, convert, revert
from .model.packed import load_packed, packed_weights, save_packed
from .quantisers import Quantiser
from .tensors import TensorReport, analyse_tensor, mean_crest
from .theory import ALL, PAIRS, crossover, hardware_cost, qsnr_theory

__all__ = [
    "ALL",
    "PAIRS",
    "Divergence",
    "ModelReport",
    "QuantLinear",
    "Quantiser",
    "Reference",
    "TensorReport",
    "analyse_model",
    "analyse_tensor",
    "capture",
    "convert",
    "crossover",
    "divergence",
    "hardware_cost",
    "load_packed",
    "mean_crest",
    "packed_weights",
    "qsnr_theory",
    "revert",
    "save_packed",
]
