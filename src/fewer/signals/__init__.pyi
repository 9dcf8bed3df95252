from . import spright
from .spright import ArrayFunction, SparseSpectrum, SparseWalshRegressor, fwht, sparse_wht

__all__ = ["ArrayFunction", "SparseSpectrum", "SparseWalshRegressor", "fwht", "sparse_wht", "spright"]
