from .adapters.adapter import Adapter, Fusion, fuse
from .adapters.lora import to_peft_lora
from .config import S2FTConfig
from .memory import MemoryPlan, memory_plan
from .model import S2FTModel, get_s2ft_model
from .permutation import Permutation, permute_
from .selection import Selection, select_units
from .slice_linear import S2Linear

__all__ = [
    "Adapter", "Fusion", "MemoryPlan", "Permutation", "S2FTConfig", "S2FTModel", "S2Linear", "Selection", "fuse", "get_s2ft_model",
    "memory_plan", "permute_", "select_units", "to_peft_lora",
]  # fmt: skip
