from .adapters import Adapter, Fusion, fuse
from .config import S2FTConfig
from .lora_export import to_peft_lora
from .memory import MemoryPlan, memory_plan, saved_bytes
from .model import S2FTModel, get_s2ft_model
from .permutation import Permutation, permute_
from .selection import Selection, select_units
from .slice_linear import S2Linear

__all__ = [
    "Adapter", "Fusion", "MemoryPlan", "Permutation", "S2FTConfig", "S2FTModel", "S2Linear", "Selection", "fuse", "get_s2ft_model",
    "memory_plan", "permute_", "saved_bytes", "select_units", "to_peft_lora",
]  # fmt: skip
