from .casts import split_outliers
from .gradients import cast_derivative, fake_quantize_ste
from .linear import FP4Linear, convert, export, fp4_matmul, revert
from .optimizer import StableSPAM
from .recipe import FP4Recipe, Overhead

__all__ = [
    "FP4Linear", "FP4Recipe", "Overhead", "StableSPAM", "cast_derivative", "convert", "export", "fake_quantize_ste", "fp4_matmul", "revert",
    "split_outliers",
]  # fmt: skip
