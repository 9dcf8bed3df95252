from .adaptation import Adaptation, AdaptConfig, adapt
from .factorization import factorize, unfactorize
from .loss import FactorLoss, oracle, prior_approximate_loss
from .model import FactorizedMLP, FactorLlamaConfig, FactorLlamaForCausalLM

__all__ = [
    "AdaptConfig", "Adaptation", "FactorLlamaConfig", "FactorLlamaForCausalLM", "FactorLoss", "FactorizedMLP", "adapt", "factorize", "oracle",
    "prior_approximate_loss", "unfactorize",
]  # fmt: skip
