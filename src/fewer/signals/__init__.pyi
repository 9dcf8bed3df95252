from . import spright
from .spright import ArrayFunction, SparseSpectrum, SparseWalshRegressor, WHTConfig, fwht, sparse_wht

__all__ = ["ArrayFunction", "SparseSpectrum", "SparseWalshRegressor", "WHTConfig", "fwht", "sparse_wht", "spright"]
