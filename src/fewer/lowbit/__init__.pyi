from . import fp4_training, int_vs_fp
from ._shared.block_formats import FORMATS, BlockFormat
from ._shared.blocks import QuantizedTensor, fake_quantize, quantize
from ._shared.figures import crest_factor, qsnr, saturation, underflow
from ._shared.formats import ELEMENTS, ElementFormat, cast, decode, encode, integer
from ._shared.products import block_matmul
from ._shared.rotation import hadamard
from .fp4_training import FP4Linear, FP4Recipe, StableSPAM, fake_quantize_ste, fp4_matmul
from .int_vs_fp import analyse_model, analyse_tensor, crossover, divergence, hardware_cost, qsnr_theory

__all__ = [
    "ELEMENTS",
    "FORMATS",
    "BlockFormat",
    "ElementFormat",
    "FP4Linear",
    "FP4Recipe",
    "QuantizedTensor",
    "StableSPAM",
    "analyse_model",
    "analyse_tensor",
    "block_matmul",
    "cast",
    "crest_factor",
    "crossover",
    "decode",
    "divergence",
    "encode",
    "fake_quantize",
    "fake_quantize_ste",
    "fp4_matmul",
    "fp4_training",
    "hadamard",
    "hardware_cost",
    "int_vs_fp",
    "integer",
    "qsnr",
    "qsnr_theory",
    "quantize",
    "saturation",
    "underflow",
]
