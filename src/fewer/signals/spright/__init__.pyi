from .bins.queries import ArrayFunction
from .recovery import sparse_wht
from .regressor import SparseWalshRegressor
from .spectrum import SparseSpectrum
from .transform import fwht

__all__ = ["ArrayFunction", "SparseSpectrum", "SparseWalshRegressor", "fwht", "sparse_wht"]
