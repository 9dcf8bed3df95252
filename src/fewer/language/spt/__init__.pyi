from .attention import sparse_attention
from .model import SPTConfig, SPTModel, get_spt_model
from .quantizer import CSR, ProductQuantizer, lookup
from .routed import RoutedFFN, RoutedGatedFFN

__all__ = [
    "CSR", "ProductQuantizer", "RoutedFFN", "RoutedGatedFFN", "SPTConfig", "SPTModel", "get_spt_model", "lookup", "sparse_attention",
]  # fmt: skip
