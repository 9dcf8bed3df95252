from .layer import BlockFFN
from .model import BlockFFNConfig, BlockFFNForCausalLM
from .objective.adaptive_factor import AdaptiveFactor, AdaptiveFactorCallback
from .objective.losses import activation_locality_loss, chunk_sparsification_loss
from .sparsity import SparsityStats, model_sparsity, sparsity_stats
from .speculative import GenerateOutput, speculative_generate

__all__ = [
    "AdaptiveFactor", "AdaptiveFactorCallback", "BlockFFN", "BlockFFNConfig", "BlockFFNForCausalLM", "GenerateOutput", "SparsityStats",
    "activation_locality_loss", "chunk_sparsification_loss", "model_sparsity", "sparsity_stats", "speculative_generate",
]  # fmt: skip
