from .bins.plan import WHTConfig
from .bins.queries import ArrayFunction
from .recovery import sparse_wht
from .regressor import SparseWalshRegressor
from .spectrum import SparseSpectrum
from .transform import fwht

__all__ = ["ArrayFunction", "SparseSpectrum", "SparseWalshRegressor", "WHTConfig", "fwht", "sparse_wht"]
