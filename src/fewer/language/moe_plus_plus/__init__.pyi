from .layer import MoEPlusPlus, MoEPlusPlusOutput, MoEPlusPlusStats
from .model import MoEPlusPlusConfig, MoEPlusPlusForCausalLM
from .parallel import expert_parallel
from .released import load_released
from .router import heterogeneous_capacity, heterogeneous_load_balance_loss

__all__ = [
    "MoEPlusPlus", "MoEPlusPlusConfig", "MoEPlusPlusForCausalLM", "MoEPlusPlusOutput", "MoEPlusPlusStats", "expert_parallel",
    "heterogeneous_capacity", "heterogeneous_load_balance_loss", "load_released",
]  # fmt: skip
