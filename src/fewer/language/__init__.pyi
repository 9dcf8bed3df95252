from . import cfsp, s2ft
from .cfsp import CfspStats, PruneReport, allocate, calibrate, channel_importance, lora_ranks, prune, recover, save_pruned
from .s2ft import S2FTConfig, S2FTModel, S2Linear, get_s2ft_model, memory_plan, permute_, select_units, to_peft_lora

__all__ = [
    "CfspStats", "PruneReport", "S2FTConfig", "S2FTModel", "S2Linear", "allocate", "calibrate", "cfsp", "channel_importance",
    "get_s2ft_model", "lora_ranks", "memory_plan", "permute_", "prune", "recover", "s2ft", "save_pruned", "select_units", "to_peft_lora",
]  # fmt: skip
